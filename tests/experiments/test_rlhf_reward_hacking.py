"""The pure parts of experiments/rlhf_reward_hacking: claims on made-up results, sampling, distinct-n, the corpus."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from experiments.rlhf_reward_hacking import experiment, language
from vae.seeding import generator

BETAS = {"REINFORCE": (0, 0.05, 0.5), "GRPO": (0, 0.5, 2)}


def policy(reward: float, kl: float, nll: float, distinct4: float) -> list[dict]:
    """Three seeds, all the same."""
    measured = {"reward": reward, "kl": kl, "nll": nll, "distinct4": distinct4, "distinct4_all": 0.3, "reward_sd": 0.1}
    text = {"prompts": ["p|"], "answers": ["an\nswer"]}
    return [{**measured, **text, "trace": {"reward": [0.4, reward], "kl": [0.1, kl], "beta": [1.0, 2.0]}}] * 3


@pytest.fixture
def results():
    """As the claims would have it: hacked, tamed, hardly moved."""
    of_beta = (policy(1.0, 250.0, 6.0, 0.1), policy(0.6, 3.0, 1.9, 0.98), policy(0.45, 0.1, 1.7, 0.98))
    held = [{**policy(0.7, 6.0, 2.0, 0.98)[0], "trace": {"kl": [0.0] * 10 + [5.8] * 10, "beta": [0.1] * 20}}] * 3
    return {
        "classifiers": [{"validation": 0.7, "strings": 0.6, "strings_99": 0.8, "others": 0.4}] * 3,
        "real": {"nll": 1.3, "distinct4": 0.98},
        "reference": policy(0.44, 0.0, 1.7, 0.98),
        "policies": {m: dict(zip(map(str, betas), of_beta, strict=True)) for m, betas in BETAS.items()},
        "controlled": {"REINFORCE": held},
        "controller": {"target": 6.0, "judged": 10},
    }


def test_every_claim_holds_of_results_that_bear_it_out(results):
    assert all(claim.holds for claim in experiment.claims(results))
    assert len(experiment.claims(results)) == 1 + 5 * 2 + 1


@pytest.mark.parametrize(
    ("beta", "changed", "word"),
    [
        ("0", {"reward": 0.7}, "beta 0"),  # no further than real text goes
        ("0", {"nll": 2.5}, "beta 0"),
        ("0", {"distinct4": 0.6}, "beta 0"),
        ("0.05", {"reward": 0.5}, "kept"),
        ("0.05", {"nll": 2.1}, "kept"),
        ("0.05", {"distinct4": 0.9}, "kept"),
        ("0.5", {"reward": 0.55}, "barely"),
        ("0.5", {"kl": 1.2}, "barely"),
        ("0.05", {"reward": 1.1}, "proxy falls"),
        ("0.5", {"kl": 20.0}, "KL falls"),
    ],
)
def test_each_claim_misses_where_its_target_is_missed(results, beta, changed, word):
    damaged = copy.deepcopy(results)
    of_seeds = damaged["policies"]["REINFORCE"]
    of_seeds[beta] = [{**of_seed, **changed} for of_seed in of_seeds[beta]]
    missed = [claim.name for claim in experiment.claims(damaged) if not claim.holds]
    assert any(word in name for name in missed)
    assert all(name.startswith("REINFORCE") for name in missed)


def test_a_controller_off_by_more_than_a_tenth_or_a_blind_proxy_is_a_miss(results):
    results["controlled"]["REINFORCE"][0]["trace"]["kl"][-10:] = [5.3] * 10
    results["classifiers"][0]["validation"] = 0.52
    assert [claim.holds for claim in experiment.claims(results)].count(False) == 2


def test_a_rise_within_two_percent_or_two_standard_errors_is_a_tie():
    assert experiment.steps_up([[10.0], [5.0], [0.0]]) == (0, 0, 0.0)
    rises, ties, worst = experiment.steps_up([[10.0], [10.1], [0.0]])
    assert (rises, ties) == (0, 1) and worst == pytest.approx(0.01)
    assert experiment.steps_up([[10.0], [10.3], [0.0]])[:2] == (1, 0)
    # what should fall and only rises, and the same the other way round
    assert experiment.steps_up([[0.0], [4.0], [10.0]])[:2] == (2, 0)
    assert experiment.steps_up([[10.0], [4.0], [0.0]]) == (0, 0, 0.0)
    # up by 1, 0 and 5: 2 on average, standard error 1.53
    assert experiment.steps_up([[10.0, 10.0, 10.0], [11.0, 10.0, 15.0], [0.0, 0.0, 0.0]])[:2] == (0, 1)
    assert experiment.steps_up([[10.0, 10.0, 10.0], [12.0, 11.9, 12.2], [0.0, 0.0, 0.0]])[:2] == (1, 0)


def test_the_table_shows_each_policy_with_its_answer(results):
    table = experiment.table(results)
    assert [row[0] for row in table.rows][1:] == [
        "reference (beta infinite)",
        *("REINFORCE, beta 0.5", "REINFORCE, beta 0.05", "REINFORCE, beta 0", "REINFORCE, KL held to 6"),
        *("GRPO, beta 2", "GRPO, beta 0.5", "GRPO, beta 0"),
    ]
    assert "`an⏎swer`" in table.markdown()


def test_distinct_n_counts_different_ngrams_in_each_text():
    texts = torch.tensor([[1, 1, 1, 1, 1], [1, 2, 3, 4, 5]])
    assert language.distinct(texts, 1) == pytest.approx((1 / 5 + 1) / 2)
    assert language.distinct(texts, 4) == pytest.approx((1 / 2 + 1) / 2)
    assert language.distinct(texts, 2, pooled=True) == pytest.approx(5 / 8)


def test_answers_are_drawn_with_the_probabilities_that_log_probs_gives_them():
    net = language.LanguageModel(3, 8, generator(0)).requires_grad_(False)
    for weights in net.parameters():  # so that the characters are far from equally likely
        weights.data *= 3
    prompts = torch.tensor([[0, 1, 2], [2, 2, 0]])
    n = 20_000
    answers = net.generate(prompts, 3, n, generator(1))
    every = torch.cartesian_prod(*[torch.arange(3)] * 3).repeat(2, 1)  # all 27 answers to either prompt
    log_probs = experiment.of_drawn(net.log_probs(prompts, every), every).sum(-1).view(2, 27)
    assert log_probs.exp().sum(-1) == pytest.approx([1.0, 1.0], abs=1e-5)
    number = (answers * torch.tensor([9, 3, 1])).sum(-1).view(2, n)
    for row, expected in zip(number, log_probs.exp(), strict=True):
        error = (expected * (1 - expected) / n).sqrt()
        assert ((row.bincount(minlength=27) / n - expected).abs() < 4.5 * error).all()


def test_the_manual_is_split_without_overlap_and_survives_encoding():
    text = language.corpus(0)
    parts = [{p.text for p in part} for part in (text.reference, text.judge, text.held_out)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert all(any(p.strings for p in part) for part in (text.reference, text.judge, text.held_out))
    assert text.decode(text.encode(text.held_out[:1])) == text.held_out[0].text + "\n"
    x, y = language.snippets(text, text.reference, 3, 48, generator(0))
    assert x.shape == (6, 48) and y.tolist() == [True] * 3 + [False] * 3


def test_the_predicted_kl_is_that_of_a_tilted_gaussian():
    reference = [{"reward_sd": 0.1}]
    # exp(r / beta) moves N(m, sd^2) by sd^2 / beta, which costs (sd / beta)^2 / 2
    assert experiment.predicted_kl(reference, "REINFORCE", 0.05) == pytest.approx(2.0)
    assert experiment.predicted_kl(reference, "GRPO", 0.5) == pytest.approx(2.0)
    assert math.isclose(experiment.predicted_kl(reference, "GRPO", 2), 0.125)
