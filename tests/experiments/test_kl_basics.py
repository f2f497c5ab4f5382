"""The page of worked numbers: each number on it is the known one, and each snippet on it does what it is there for."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from experiments import kl_basics
from experiments.kl_basics import SNIPPETS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kl.md"


@pytest.fixture
def noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_two_categoricals_have_their_worked_numbers_through_every_call():
    numbers = kl_basics.two_categoricals()
    there, back = 0.020698, 0.020481
    expected = {
        "KL(P||Q)": there,
        "KL(Q||P)": back,
        'F.kl_div(Q.log(), P, reduction="sum")': there,
        'F.kl_div(Q.log(), P.log(), reduction="sum", log_target=True)': there,
        'F.kl_div(P.log(), Q, reduction="sum")': back,
        'F.kl_div(Q, P, reduction="sum")': sum(
            p * (math.log(p) - q) for p, q in ((0.3, 0.35), (0.5, 0.4), (0.2, 0.25))
        ),
        'F.kl_div(Q.log(), P, reduction="mean")': there / 3,
    }
    assert numbers == pytest.approx(expected, abs=5e-7)


def test_the_policy_penalty_has_its_worked_numbers():
    numbers = kl_basics.policy_penalty()
    k3 = sum(math.exp(d) - 1 - d for d in (0.2, 0.7, 0.4, 0.1)) / 4
    assert numbers == pytest.approx({"k1": -0.35, "k3": k3, "loss": -2.5175}, abs=1e-6)


@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_schulmans_table_is_measured_within_four_standard_errors(noise, mu):
    for row in kl_basics.schulman_table(mu, 200_000, noise).values():
        assert abs(row["bias"] - row["exact bias"]) < 4 * row["standard error"]
        assert row["deviation"] == pytest.approx(row["exact deviation"], rel=0.05)


def test_the_table_of_losses_shows_nothing_for_k1_reverse_for_k2_and_forward_for_k3():
    gradients = kl_basics.gradients_as_losses(torch.tensor([0.5, 0.0, -1.0]), torch.tensor([-0.5, 0.8, 0.0]))
    torch.testing.assert_close(gradients["k1"], torch.zeros(3), atol=1e-7, rtol=0)
    torch.testing.assert_close(gradients["k2"], gradients["reverse"])
    torch.testing.assert_close(gradients["k3"], gradients["forward"])


def test_the_vae_snippet_reaches_the_rates_of_the_linear_vae(noise):
    rates = kl_basics.role_of_regulariser(noise)
    assert rates["rate 1"] == pytest.approx(0.5 * math.log(4), rel=0.03)
    assert rates["rate 2"] < 0.01


def test_the_distillation_snippet_brings_the_student_to_the_teacher(noise):
    divergence = kl_basics.role_of_teacher(noise)
    assert divergence["before"] > 0.3
    assert divergence["after"] < 1e-3


def test_the_policy_snippet_reaches_the_reference_tilted_by_the_reward(noise):
    policy = kl_basics.role_of_penalty(noise)
    tilted = torch.tensor([0.4, 0.3 * math.exp(1.0), 0.2 * math.exp(0.6), 0.1 * math.exp(1.2)])
    torch.testing.assert_close(policy["optimum"], tilted / tilted.sum())
    torch.testing.assert_close(policy["reached"], policy["optimum"], atol=0.01, rtol=0)


def test_each_snippet_stands_alone_in_ten_lines():
    for snippet in SNIPPETS.values():
        lines = [line for line in snippet.splitlines() if line.strip()]
        assert len(lines) <= 10
        exec(snippet, {})


def test_the_page_on_kl_shows_the_snippets_that_are_tested_here():
    assert re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) == list(SNIPPETS.values())


def test_the_page_prints_the_numbers_that_it_is_there_for(monkeypatch):
    for role, steps in (("role_of_regulariser", 5), ("role_of_teacher", 5), ("role_of_penalty", 5)):
        whole = getattr(kl_basics, role)
        monkeypatch.setattr(kl_basics, role, lambda generator, whole=whole, steps=steps: whole(generator, steps))
    text = io.StringIO()
    kl_basics.main(Console(file=text, width=120))
    for number in ("0.020698", "0.020481", "-0.3500", "+0.1080", "-2.5175", "1.6950"):
        assert number in text.getvalue()
