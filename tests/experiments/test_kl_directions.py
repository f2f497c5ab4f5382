"""kl_directions: the claims hold of the committed results, and each direction is judged by its own optimum."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from experiments.kl_directions import claims, protocol

COMMITTED = Path(claims.__file__).parent / "results" / "full" / "results.json"


def missed(results: dict) -> set[str]:
    return {claim.name for claim in claims.claims(results) if not claim.holds}


@pytest.fixture
def results():
    return json.loads(COMMITTED.read_text())["results"]


@pytest.mark.parametrize(("name", "own", "other"), [("k2", "reverse", "forward"), ("k3", "forward", "reverse")])
def test_a_loss_is_judged_by_the_optimum_of_its_own_direction(results, name, own, other):
    claim = f"{name} as a loss descends to an optimum of the {own} KL"
    before = missed(results)
    for mean, sd, _ in protocol.MIXTURES["near"][own]:
        results["as_loss"][name]["end"] = [[mean, sd]]
        assert missed(results) == before - {claim}
    for mean, sd, _ in protocol.MIXTURES["near"][other]:
        results["as_loss"][name]["end"] = [[mean, sd]]
        assert missed(results) == before | {claim}


@pytest.mark.parametrize(("name", "own", "other"), [("k2", "reverse", "forward"), ("k3", "forward", "reverse")])
def test_a_gradient_is_judged_by_that_of_its_own_direction(results, name, own, other):
    claim = f"E[grad {name}] is the gradient of the {own} KL"
    for direction in (own, other):
        found = copy.deepcopy(results)
        found["as_loss"][name]["gradient"]["mean"] = results["as_loss"][direction]["gradient"]
        assert (claim in missed(found)) == (direction == other)


def test_fits_of_the_two_directions_swapped_are_misses(results):
    for name in protocol.MIXTURES:
        found = copy.deepcopy(results)
        fits = found["fits"]
        forward, reverse = f"{name}, forward", f"{name}, reverse"
        fits[forward], fits[reverse] = fits[reverse], fits[forward]
        told = {claim for claim in missed(found) - missed(results) if f"{name} modes" in claim}
        assert {claim.split()[0] for claim in told} == {"forward", "reverse"}
