"""The weight on the KL and sigma: the identities hold in float64, and the claims can fail."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from experiments.kl_weight_and_sigma import claims, figure, protocol
from vae.cli import CONFIGS
from vae.engine.run import evaluate, train
from vae.experiment_figures import pack_images

BETAS = [1e-6, 1e-4, 1e-2, 1]
PIXELS = 784


BEST = 0.002 / (1 - 16 / PIXELS)  # where the error below is its own weight


def halves(beta: float) -> dict[str, float]:
    """A point of a made-up curve whose slope is -beta: d(SSE / 2) = 8 dbeta, dR = -8 dbeta / beta."""
    return {"mse": 0.002 + 16 * beta / PIXELS, "rate": 10 - 8 * math.log(beta)}


def runs_at(beta: float, sigma2: float, seeds: int = 2) -> list[dict]:
    blank = pack_images([[[0.5] * 4] * 4] * 2)
    rest = {"sigma2": sigma2, "pixels": PIXELS, "pictures": [blank] * 3, "posterior_sd": 0.1, "latent_sd": 1.0}
    return [{"train": halves(beta), "test": halves(beta), **rest} for _ in range(seeds)]


def made_up() -> dict:
    runs = {f"beta={b:g}": runs_at(b, 1.0) for b in BETAS} | {f"sigma2={b:g}": runs_at(b, b) for b in BETAS}
    runs |= {name: runs_at(BEST, BEST) for name in ("optimal", "learned")}
    runs |= {"learned from 1": runs_at(0.1, 0.1), "found": runs_at(BEST, 1.0)}
    identities = ("sgd", "adam", "optimal_gradient", "optimal_distortion", "published_l1", "published_l2")
    exact = {**dict.fromkeys(identities, 1e-15), "adam_same_epsilon": 0.02, "laplace_scale": 5e-7}
    exact |= {"gaussian_sigma": 3.5e-4, "steps": 50, "beta": 0.01, "weight": 1e-6}
    return {"exact": exact, "betas": BETAS, "found_beta": BEST, "runs": runs}


def test_the_two_forms_are_one_objective_in_float64(monkeypatch):
    """On the digits, so that it needs no data set: the identities, and that they see a beta that is a little off."""
    monkeypatch.setattr(protocol, "EXACT", {**protocol.EXACT, "images": 32, "steps": 8})
    found = protocol.measure_exact("data=digits")
    for name in ("sgd", "adam", "optimal_gradient", "optimal_distortion", "published_l1", "published_l2"):
        assert found[name] < 1e-12, name
    assert found["adam_same_epsilon"] > 1e-12  # which is why epsilon has to be scaled with the loss
    assert (found["laplace_scale"], found["gaussian_sigma"]) == pytest.approx((5e-7, math.sqrt(1.25e-7)))
    exactly = protocol.exactly
    monkeypatch.setattr(protocol, "exactly", lambda p, beta, s=1.0: exactly(p, beta, s if s == 1 else 1.001 * s))
    off = protocol.measure_exact("data=digits")
    assert min(off[name] for name in ("sgd", "adam", "published_l1", "published_l2")) > 1e-9


def test_a_run_is_measured_as_the_library_measures_it(tiny, tmp_path):
    config = tiny("likelihood=gaussian_optimal", "objective.beta=0.5", "data.binarize=none")
    train(config, tmp_path, [], progress_bar=False)
    found, library = protocol.measure_run(tmp_path, pictures=True), evaluate(tmp_path)
    assert found["test"]["rate"] == pytest.approx(library["test/rate"], rel=1e-6)
    sigma2, pixels = found["sigma2"], found["pixels"]
    distortion = 0.5 * pixels * (math.log(2 * math.pi * sigma2) + found["test"]["mse"] / sigma2)
    assert distortion == pytest.approx(library["test/distortion"], rel=1e-5)
    assert found["posterior_sd"] < found["latent_sd"]
    assert claims.log_density(found, sigma2) == pytest.approx(library["test/elbo"], rel=1e-5)
    assert [row["shape"] for row in found["pictures"]] == [[8, 8, 8]] * 3


@pytest.mark.parametrize("config", ["kl_weight_and_sigma_quick", "kl_weight_and_sigma"])
def test_the_configs_take_every_way_to_choose_a_weight(config):
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        for name, overrides in protocol.cells([0.01], 0.1).items():
            found = compose("train", [f"experiment={config}", *overrides])
            weight = found.objective.beta * found.likelihood.sigma**2  # sigma is where a learned one starts
            assert weight == pytest.approx(1.0 if name in ("optimal", "learned from 1") else 0.01)
            assert found.data.binarize == "none"


def test_the_runs_differ_in_the_weight_or_in_sigma():
    found = protocol.cells([0.01, 1], 0.1)
    assert found["beta=0.01"] == ["objective.beta=0.01"]
    assert found["sigma2=0.01"] == ["likelihood.sigma=0.1"]
    assert list(found) == ["beta=0.01", "beta=1", "sigma2=0.01", "sigma2=1", "optimal", "learned", "learned from 1"]


def test_made_up_results_pass_every_claim_and_fill_table_and_figure():
    missed = [claim for claim in claims.claims(made_up()) if not claim.holds]
    assert not missed
    assert len(claims.table(made_up()).rows) == 2 * len(BETAS) + 4
    assert len(figure.figure(made_up()).axes) == 6


def test_the_page_says_what_the_results_do():
    root = Path(__file__).resolve().parents[2]
    record = json.loads((root / "experiments/kl_weight_and_sigma/results/quick/results.json").read_text())
    rows = claims.table(record["results"]).markdown().splitlines()
    said = [line for line in (root / "docs/kl_weight_and_sigma.md").read_text().splitlines() if line.count("|") == 10]
    assert len(said) == 8 and set(said[2:]) <= set(rows)


def test_the_best_weight_is_the_one_that_is_its_own_error():
    found = {beta: claims.elbo(runs_at(beta, 1.0)) for beta in (0.97 * BEST, BEST, 1.03 * BEST)}
    assert max(found, key=found.get) == BEST


@pytest.mark.parametrize(
    ("break_it", "claim"),
    [
        (lambda r: r["exact"].update(sgd=2e-9), "SGD"),
        (lambda r: r["exact"].update(adam=2e-9), "float64: Adam"),
        (lambda r: r["exact"].update(optimal_gradient=2e-9), "gradient of beta = MSE"),
        (lambda r: r["exact"].update(optimal_distortion=2e-9), "batch's MSE"),
        (lambda r: r["exact"].update(published_l1=2e-9), "Laplace"),
        (lambda r: r["exact"].update(published_l2=2e-9), "Gaussian of sigma"),
        (lambda r: r["runs"]["beta=0.01"][1]["test"].update(rate=84.0), "rate falls"),
        (lambda r: [a["test"].update(mse=0.00211) for a in r["runs"]["sigma2=0.0001"]], "0.0001 land"),
        (lambda r: [a["test"].update(rate=10.6) for a in r["runs"]["sigma2=1"]], "beta = 1 and"),
        (lambda r: r["runs"]["optimal"][1].update(sigma2=0.00215), "optimal sigma: sigma.2"),
        (lambda r: r["runs"]["learned"][0].update(sigma2=0.00193), "learned sigma: sigma.2"),
        (lambda r: [a["test"].update(rate=56.0) for a in r["runs"]["found"]], "optimal sigma: lands"),
        (lambda r: [a["test"].update(mse=0.00215) for a in r["runs"]["learned"]], "learned sigma: lands"),
        (lambda r: [a["test"].update(rate=5.0) for a in r["runs"]["beta=0.01"]], "higher ELBO"),
        (lambda r: [a["test"].update(rate=2500.0) for a in r["runs"]["optimal"]], "hundreds of nats"),
        (lambda r: [a["test"].update(mse=9e-5) for a in r["runs"]["beta=1e-06"]], "far below the error"),
    ],
)
def test_each_claim_can_fail(break_it, claim):
    results = made_up()
    break_it(results)
    missed = [c.name for c in claims.claims(results) if not c.holds]
    assert any(re.search(claim, name) for name in missed), missed
