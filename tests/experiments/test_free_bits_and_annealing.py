"""Posterior collapse: the experiment's verdicts on made-up results, and the pieces that they rest on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import yaml

from experiments.free_bits_and_annealing import claims, protocol
from vae.beta import Cyclical, Linear
from vae.cli import CONFIGS

GOOD = {"plain": 0.3, "no latents": 0.0, "warm-up": 4.0, "cyclical": 3.5, "free bits": 4.4, "factorised": 2.0}


def results(rates: dict[str, float] | None = None, nll: dict[str, float] | None = None) -> dict:
    """As `measure` gives them, of two seeds: every method's rate spread evenly over 16 dimensions and kept while training,
    every NLL 12 and every ELBO -13 unless said."""
    rates, nll = {**GOOD, **(rates or {})}, nll or {}

    def run(name: str) -> dict:
        rate = rates[name]
        curve = {"steps": [550, 1100, 1650], "rate": [rate] * 3, "elbo": [-13.0] * 3}
        return {"rate": rate, "distortion": 13 - rate, "nll": 12.0, "kl": [rate / 16] * 16, "curve": curve}

    return {
        "methods": {name: [run(name), run(name)] for name in GOOD},
        "difference": {n: {"mean": nll.get(n, 0.0), "se_of_seeds": 0.01, "se_of_images": 0.02} for n in GOOD},
        "larger": {"14": [5.0, 6.0]},
        "warm_up": 550,
        "cycles_end": 1100,
    }


def missed(made_up: dict) -> list[str]:
    return [claim.name for claim in claims.claims(made_up) if not claim.holds]


def test_every_claim_holds_of_results_as_the_papers_have_them():
    assert missed(results()) == []


@pytest.mark.parametrize(
    "change, names",
    [
        ({"rates": {"plain": 0.6}}, ["the plain ELBO collapses"]),
        ({"rates": {"factorised": 0.8}}, ["it is the decoder's doing: a factorised one uses its latents"]),
        (
            {"rates": {"free bits": 3.5}},
            ["free bits hold what they promise", "free bits: in every dimension"],
        ),
        ({"nll": {"no latents": 0.2}}, ["what is left of the latents is worth nothing"]),
        ({"nll": {"cyclical": 0.11}}, ["cyclical: the likelihood is no worse"]),
        ({"nll": {"cyclical": -0.11}}, []),
    ],
)
def test_each_claim_can_miss(change, names):
    assert missed(results(**change)) == names


def test_a_rate_that_falls_after_the_warm_up_misses_the_end_alone():
    made_up = results()
    for run in made_up["methods"]["warm-up"]:
        run["curve"]["rate"] = [4.0, 3.2, 2.0]
        run["rate"], run["distortion"] = 2.0, 11.0
    assert missed(made_up) == ["warm-up: and still are at the end"]
    assert claims.at_step(made_up, "warm-up", 551) == [3.2, 3.2]


def test_one_seed_that_does_not_collapse_is_enough_to_miss():
    made_up = copy.deepcopy(results())
    made_up["methods"]["plain"][1]["rate"] = 0.6
    assert "the plain ELBO collapses" in missed(made_up)


def test_paired_standard_errors_have_what_is_common_to_images_taken_out():
    differences = torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    found = protocol.paired(differences)
    assert found["mean"] == pytest.approx(3.0)
    assert found["se_of_seeds"] == pytest.approx(1.0)  # seeds' means 2 and 4: sd sqrt(2), over sqrt(2)
    assert found["se_of_images"] == pytest.approx(1 / 3**0.5)  # images' means 2, 3, 4: sd 1


def test_curves_keep_the_rows_of_validations(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,train/rate,val/elbo,val/rate\n0,49,5.0,,\n0,549,,-13.5,1.25\n1,1099,,-13.0,1.5\n")
    assert protocol.curve(tmp_path) == {"steps": [550, 1100], "rate": [1.25, 1.5], "elbo": [-13.5, -13.0]}


def test_the_weight_of_a_schedule_stays_at_1_from_the_step_that_is_said():
    steps = claims.at_full_weight({"warm_up": 600, "cycles_end": 1000})
    for name, schedule in (("warm-up", Linear(600)), ("cyclical", Cyclical(1000))):
        weights = [float(schedule(step)) for step in range(1100)]
        assert weights[steps[name] - 1] < 1
        assert min(weights[steps[name] :]) == 1


def test_schedules_end_within_the_training():
    for form, suffix in (("quick", "_quick"), ("full", "")):
        config = yaml.safe_load(Path(CONFIGS, "experiment", f"free_bits_and_annealing{suffix}.yaml").read_text())
        settings, steps = protocol.SETTINGS[form], config["trainer"]["max_epochs"] * protocol.STEPS_PER_EPOCH
        assert 2 * settings["cycles_end"] == 4 * settings["warm_up"] == steps
