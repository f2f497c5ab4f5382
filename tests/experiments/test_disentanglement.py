"""Disentanglement: the split of the variance against known answers, and the experiment's verdicts on made-up results."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.disentanglement import claims, protocol
from experiments.disentanglement.protocol import BETA, CAPACITY, FACTOR, FACTOR_SCORE, MIG, TC, VAE

SCORES = {VAE: 0.1, BETA: 0.2, CAPACITY: 0.2, TC: 0.4, FACTOR: 0.4}


def results(mig: dict[str, float] | None = None, spread_of_seeds: float = 0.2, told: tuple = (0.5, 0.5, 0.1)) -> dict:
    """As `measure` gives them, of two strengths and two seeds that lie `spread_of_seeds` to both sides of the mean."""
    mig = {**SCORES, **(mig or {})}

    def run(method: str, strength: str, sign: int) -> dict:
        scores = dict.fromkeys(protocol.METRICS, mig[method] + sign * spread_of_seeds)
        return {
            "scores": scores,
            "factors": ["x", "y", "scale"],
            "best_two": [list(told), [0] * 3],
            "rate": float(strength),
        }

    cells = [
        {"method": method, "strength": strength, "runs": [run(method, strength, sign) for sign in (-1, 1)]}
        for method in SCORES
        for strength in (("1",) if method == VAE else ("5", "10"))
    ]
    return {"cells": cells, "claimed": {VAE: "1", BETA: "5", TC: "5", FACTOR: "5"}, "bounds": {}}


def missed(made_up: dict) -> list[str]:
    return [claim.name for claim in claims.claims(made_up) if not claim.holds]


def test_every_claim_holds_of_results_as_the_papers_have_them():
    assert missed(results()) == []


@pytest.mark.parametrize(
    "change, names",
    [
        ({"mig": {BETA: 0.05}}, ["MIG: VAE < beta-VAE < beta-TC-VAE"]),
        (
            {"mig": {TC: 0.19, BETA: 0.15}},
            ["MIG: what the total correlation's weight gains"],
        ),
        ({"mig": {FACTOR: 0.14}}, ["FactorVAE score: FactorVAE above the VAE"]),
        ({"told": (0.5, 0.05, 0.1)}, ["capacity 5: position is told first"]),
        ({"spread_of_seeds": 0.05}, ["MIG: strength and seed matter more than the method (Locatello et al. 2019)"]),
    ],
)
def test_each_claim_can_miss(change, names):
    assert missed(results(**change)) == names


def test_a_rate_that_is_not_the_capacity_misses():
    made_up = results()
    for cell in made_up["cells"]:
        if (cell["method"], cell["strength"]) == (CAPACITY, "10"):
            cell["runs"][0]["rate"] = 8.9
    assert missed(made_up) == ["capacity 10: the rate is what was asked for"]


def test_shares_of_the_variance_have_the_hand_computed_values():
    # methods at 0 and 4; strengths -1 and +1 about them; seeds -0.5 and +0.5 about those
    scores = np.array([[[m + h + s for s in (-0.5, 0.5)] for h in (-1, 1)] for m in (0, 4)])
    assert claims.variance_shares(scores) == pytest.approx(np.array([4, 1, 0.25]) / 5.25)


def test_components_are_those_that_random_effects_were_drawn_with():
    rng = np.random.default_rng(0)
    sd = np.array([2.0, 1.0, 0.5])
    draws = [
        sd[0] * rng.standard_normal((5, 1, 1))
        + sd[1] * rng.standard_normal((5, 3, 1))
        + sd[2] * rng.standard_normal((5, 3, 4))
        for _ in range(2000)
    ]
    found = np.array([claims.variance_components(scores) for scores in draws])
    error = np.abs(found.mean(0) - sd**2) / (found.std(0) / len(draws) ** 0.5)
    assert (error < 4).all()


def test_an_interval_of_shares_holds_the_estimate_and_vanishes_without_noise():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((4, 1, 1)) + 0.3 * rng.standard_normal((4, 2, 5))
    low, high = claims.bootstrapped(scores)
    assert (low < claims.variance_shares(scores)).all() and (claims.variance_shares(scores) < high).all()
    still = np.broadcast_to(rng.standard_normal((4, 2, 1)), (4, 2, 5))
    assert np.ptp(claims.bootstrapped(still), axis=0) == pytest.approx(np.zeros(3), abs=1e-12)


def test_methods_are_compared_in_order_and_the_vae_is_not_among_them():
    scores = claims.compared(results(), MIG)
    assert scores.shape == (4, 2, 2)
    assert scores.mean((1, 2)) == pytest.approx([SCORES[m] for m in (BETA, CAPACITY, TC, FACTOR)])
    assert claims.scores_of(results(), VAE, FACTOR_SCORE) == pytest.approx([-0.1, 0.3])


def test_both_forms_claim_about_strengths_that_they_train():
    for settings in protocol.SETTINGS.values():
        assert all(strength in settings["methods"][method] for method, strength in settings["claimed"].items())
        assert len({len(s) for method, s in settings["methods"].items() if method != VAE}) == 1  # a balanced design
