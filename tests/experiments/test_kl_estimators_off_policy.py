"""The exact part against its written results, the page made of it, and the claims on results that miss them."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch

from experiments.kl_estimators_off_policy import claims, exact, page
from experiments.kl_estimators_off_policy.estimators import ESTIMATORS
from vae.advantages import penalised_reward
from vae.importance import log_importance, ratio_k3
from vae.kl import kl_categorical
from vae.token_kl import served_kl


@pytest.fixture(scope="module")
def written():
    return json.loads(page.RESULTS.read_text())["results"]


# --- the exact part ---------------------------------------------------------------------------------------------------


def test_the_written_numbers_are_those_of_the_code(written):
    distance = page.OFF
    at = written["exact"]["distances"].index(distance)
    again = exact.along_the_path("one token", [distance], written["exact"]["seeds"])
    for name, of in again["of"].items():
        for what in ("bias", "sd"):
            assert written["exact"]["worlds"]["one token"]["of"][name][what][at] == pytest.approx(
                of[what][0], rel=1e-6, abs=1e-12
            )


def test_every_estimator_of_the_table_is_unbiased_on_policy_or_its_bias_is_seen(written):
    # on-policy and for one token, what is unbiased and what is not, as the literature has it
    biased = {
        name
        for name, of in written["exact"]["worlds"]["one token"]["of"].items()
        if of["bias"][written["exact"]["distances"].index(0.0)] > page.EXACT
    }
    assert biased == {
        "value: k2",
        "reward: k3 of pi, w of the answer",
        "loss: k1",
        "loss: k3",
        "loss: w k2, w of a token, not held",
        "loss: w k3, w of a token, held",
    }
    assert len(written["exact"]["worlds"]["sequences"]["of"]) == len(ESTIMATORS)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_current(written):
    assert page.PAGE.read_text() == page.page(written)


def test_the_page_has_a_row_for_each_estimator_and_its_numbers_from_the_results(written):
    rows = [line for line in page.PAGE.read_text().splitlines() if re.match(r"\| (value|reward|loss) \|", line)]
    assert len(rows) == len(ESTIMATORS)
    k2 = next(row for row in rows if row.startswith("| loss | k2 |"))
    bias = written["exact"]["worlds"]["one token"]["of"]["loss: k2"]["bias"][
        written["exact"]["distances"].index(page.OFF)
    ]
    assert "| exact (" in k2 and f"| {bias:.3f} (" in k2


def snippet(name: str):
    source = next(code for code in page.SNIPPETS.values() if f"def {name}(" in code)
    assert len(source.splitlines()) <= 10
    namespace: dict = {"torch": torch}
    exec(source, namespace)
    return namespace[name]


@pytest.fixture
def batch():
    noise = torch.Generator().manual_seed(0)
    logits, old, ref = torch.randn(3, 4, 5, 7, generator=noise)
    tokens = torch.randint(7, (4, 5, 1), generator=noise)
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    log_pi, log_old, log_ref = (x.log_softmax(-1).gather(-1, tokens)[..., 0] for x in (logits, old, ref))
    return {"log_pi": log_pi.requires_grad_(), "log_old": log_old, "log_ref": log_ref, "mask": mask}, logits, ref


@pytest.mark.parametrize(("name", "per"), [("kl_in_loss", "token"), ("sequence_kl_in_loss", "prefix")])
def test_the_losses_to_paste_are_those_of_the_library(batch, name, per):
    logs, _, _ = batch
    ratio = log_importance(log_pi=logs["log_pi"], log_old=logs["log_old"], mask=logs["mask"], per=per)
    expected = (ratio_k3(log_pi=logs["log_pi"], log_ref=logs["log_ref"], log_ratio=ratio) * logs["mask"]).sum(-1).mean()
    value = snippet(name)(**logs)
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(x, logs["log_pi"], retain_graph=True)[0] for x in (value, expected)]
    torch.testing.assert_close(*gradients)


def test_the_other_lines_to_paste_are_those_of_the_library(batch):
    logs, logits, ref = batch
    of = {"rewards": torch.ones(4), "log_pi": logs["log_pi"], "log_ref": logs["log_ref"], "mask": logs["mask"]}
    torch.testing.assert_close(snippet("penalised")(beta=0.1, **of), penalised_reward(beta=0.1, **of))
    whole = (kl_categorical(p_logits=logits, q_logits=ref) * logs["mask"]).sum(-1).mean()
    torch.testing.assert_close(snippet("exact_token_kl")(logits, ref, logs["mask"]), whole)
    served = ref.log_softmax(-1).topk(3, -1)
    expected = served_kl(student_logits=logits, teacher_indices=served.indices, teacher_log_probs=served.values)
    torch.testing.assert_close(snippet("truncated_kl")(logits, served.indices, served.values), expected)


# --- claims -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(written):
    """The exact part as written, and a tuned part as the claims would have it."""

    def policies(kl: float, objective: float):
        trace = [1.0] * 15 + [kl] * 5
        return [{"reward": 0.7, "kl": kl, "objective": objective, "trace": trace} for _ in range(3)]

    tuned = {name: policies(5.0, 0.5) for name in ("loss_k2", "loss_k3")}
    tuned |= {
        name: policies(4.0, 0.6) for name in ("loss_exact", "loss_k3_is", "loss_exact, prefix", "loss_k3_is, prefix")
    }
    tuned["target"] = policies(3.0, 0.65)
    return {**written, "tuned": tuned, "judged": 0.25}


def test_every_claim_on_tuning_holds_of_results_that_bear_it_out(results):
    found = claims.tuning_claims(results)
    assert len(found) == 6 and all(claim.holds for claim in found)


@pytest.mark.parametrize(
    ("penalty", "changed", "word"),
    [
        ("loss_k3_is, prefix", {"trace": [4.0] * 15 + [4.6] * 5}, "w k3 of the prefix holds"),
        ("loss_k3_is", {"trace": [4.0] * 15 + [3.4] * 5}, "w k3 of a token holds"),
        ("loss_k2", {"trace": [9.0] * 15 + [4.1] * 5}, "k2 without its ratio drifts"),
        ("loss_k3", {"trace": [9.0] * 15 + [3.0] * 5}, "k3 without its ratio drifts"),
        ("loss_k2", {"objective": 0.7}, "and k2 reaches less"),
    ],
)
def test_a_claim_on_tuning_misses_where_its_target_is_missed(results, penalty, changed, word):
    damaged = copy.deepcopy(results)
    damaged["tuned"][penalty] = [{**of_seed, **changed} for of_seed in damaged["tuned"][penalty]]
    missed = [claim.name for claim in claims.claims(damaged) if not claim.holds]
    assert any(word in name for name in missed)


@pytest.mark.parametrize(
    ("world", "name", "what", "value"),
    [
        ("one token", "loss: w k3, w of a token", "bias", 1e-6),
        ("sequences", "reward: k1 of pi, w of the answer", "bias", 1e-6),
        ("one token", "loss: k2", "bias", 0.2),
        ("one token", "loss: k3", "bias", 0.0),
        ("sequences", "loss: w k2, w of a token, held", "bias", 0.5),
        ("sequences", "loss: exact next-token KL, w of the past", "sd", 100.0),
        ("sequences", "reward: k1 of the sampler, w of the answer", "bias", 0.3),
        ("one token", "loss: w k2, w of a token, held", "sd", 1.0),
    ],
)
def test_a_claim_on_the_exact_part_misses_where_a_number_is_another(results, world, name, what, value):
    damaged = copy.deepcopy(results)
    of = damaged["exact"]["worlds"][world]["of"][name]
    of[what] = [value] * len(of[what])
    missed = {claim.name for claim in claims.exact_claims(damaged) if not claim.holds}
    assert missed > {claim.name for claim in claims.exact_claims(results) if not claim.holds}
