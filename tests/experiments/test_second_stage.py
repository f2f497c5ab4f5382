"""Which measure predicts the second stage: the correlations, what is measured of a model, and that claims can fail."""

from __future__ import annotations

import math
import re
from functools import partial

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from experiments.second_stage import claims, figure, protocol
from vae.cli import CONFIGS
from vae.engine.run import evaluate, train
from vae.evaluation.samples import trained_classifier
from vae.experiment_figures import pack_images
from vae.fitting import Whitened

PRIORS = {"gaussian": {}, "mixture": {"components": 2}, "realnvp": {"epochs": 1, "layers": 2}}


def test_rank_correlations_are_scipys_with_ties_too():
    stats = pytest.importorskip("scipy.stats")
    noise = np.random.default_rng(1)
    for a, b in (
        (noise.normal(size=12), noise.normal(size=12)),
        (noise.integers(4, size=12), noise.integers(4, size=12)),
    ):
        assert claims.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert math.isnan(claims.spearman(np.ones(5), np.arange(5)))


def test_the_interval_is_the_bootstraps_over_models():
    """Of a mean its half width is 1.96 standard errors; the same models are drawn on both sides of a pair."""
    x = np.random.default_rng(2).normal(size=400)
    low, high = claims.bootstrap([x], lambda drawn: drawn.mean(-1))
    error = x.std() / 20
    assert (x.mean() - low, high - x.mean()) == pytest.approx((1.96 * error, 1.96 * error), rel=0.1)
    assert claims.bootstrap([x, x], lambda a, b: np.abs(a - b).max(-1)) == (0, 0)


def test_every_cell_is_a_first_stage_that_can_be_built():
    found = protocol.cells(protocol.SETTINGS["full"])
    assert len(found) == 5 * 5 + 3 * 3 * 5
    of, overrides = found["map,D=98,spectrum,beta=0.01"]
    assert of == {"kind": "map", "size": 98, "regularizer": "spectrum", "beta": 0.01}
    assert overrides[-3:] == ["model.latent_dim=98", "regularizer=spectrum", "objective.beta=0.01"]
    assert all(name.startswith("flat,") for name in found if "network=resnet" in found[name][1])


@pytest.mark.parametrize(("form", "config"), [("quick", "second_stage_quick"), ("full", "second_stage")])
def test_the_configs_take_every_kind_of_latent(form, config):
    made = protocol.cells(protocol.SETTINGS[form])
    last = {of["kind"]: (of, overrides) for of, overrides in made.values()}
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        for of, overrides in last.values():
            found = compose("train", [f"experiment={config}", *overrides])
            assert (found.objective.beta, found.model.latent_dim) == (of["beta"], of["size"])
            assert (found.data.binarize, found.likelihood.sigma) == ("none", 1.0)
            assert ("autoencoder_kl" in found.network._target_) == (of["kind"] == "map")


def test_a_model_is_measured_as_the_library_measures_it(tiny, tmp_path, monkeypatch):
    short = partial(trained_classifier, steps=10)
    monkeypatch.setattr("vae.evaluation.reconstruction.trained_classifier", short)
    sampled, model_samples = [], protocol.model_samples
    monkeypatch.setattr(
        protocol,
        "model_samples",
        lambda vae, *of, **how: (sampled.append(vae.prior), model_samples(vae, *of, **how))[1],
    )
    config = tiny("likelihood=gaussian", "objective.beta=0.01", "data.binarize=none")
    train(config, tmp_path, [], progress_bar=False)
    found = protocol.measure_run(tmp_path / "classifiers", tmp_path, 60, PRIORS, pictures=True)
    assert found["rate"] == pytest.approx(evaluate(tmp_path)["test/rate"], rel=1e-6)
    assert set(found["frechet"]) == {"aggregate", "N(0, I)", *PRIORS}
    assert [len(getattr(prior, "logits", "")) for prior in sampled] == [
        0,
        1,
        2,
        0,
    ]  # N(0, I), one Gaussian, two, a flow
    assert isinstance(sampled[3], Whitened)
    assert [row["shape"] for row in found["pictures"].values()] == [[8, 8, 8]] * 4
    assert found["latent_dim"] == 3 and 1 <= found["effective_rank"] <= 3


def model(number: int, beta: float) -> dict:
    """Made up: its samples follow the interpolated distance, not the reconstructions'."""
    between = 20.0 + 3 * number
    seen = (7 * number) % 12 + 10.0
    run = {"reconstruction_fd": seen, "interpolated_fd": between, "mse": seen / 1000, "rate": 50 - number, "floor": 1.0}
    run |= {"effective_rank": 5.0, "ks": 0.01 * number, "excess_kurtosis": 0.1, "prior_fd": 0.5, "latent_dim": 8}
    run["frechet"] = {"aggregate": between / 2, "gaussian": 2 * between, "mixture": between}
    run["frechet"]["N(0, I)"] = between * (3 - math.log10(beta))
    run["pictures"] = dict.fromkeys(("N(0, I)", "gaussian", "mixture"), pack_images([[[0.5] * 4] * 4] * 2))
    kind, of = ("map", "none") if number % 3 == 0 else ("flat", "none")
    if kind == "map":
        run |= {"equivariance_error_shift": 0.1 * number, "equivariance_error_rotation": 0.2 * number}
    return {"kind": kind, "size": 8, "regularizer": of, "beta": beta, "seeds": [run]}


def made_up() -> dict:
    models = [model(number, (1e-4, 1e-2, 1e-1)[number % 3]) for number in range(12)]
    return {"models": models, "priors": ["gaussian", "mixture"], "images": 5000}


def each(results: dict, prior: str, number: slice = slice(None), times: float = 1.0) -> None:
    for chosen in results["models"][number]:
        chosen["seeds"][0]["frechet"][prior] *= times


def test_made_up_results_pass_every_claim_and_fill_table_and_figure():
    missed = [claim for claim in claims.claims(made_up()) if not claim.holds]
    assert not missed
    rows = claims.table(made_up()).rows
    assert len(rows) == 13 and rows[-1][1].startswith("0.24 [") and rows[-1][2] == "1.00 [1.00, 1.00]"
    assert claims.correlation(made_up(), "equivariance_error_shift").models == 4
    assert len(figure.figure(made_up()).axes) == 5


def swap(results: dict) -> None:
    for chosen in results["models"]:
        run = chosen["seeds"][0]
        run["interpolated_fd"], run["reconstruction_fd"] = run["reconstruction_fd"], run["interpolated_fd"]


@pytest.mark.parametrize(
    ("break_it", "claim"),
    [
        (swap, "between neighbours"),
        (swap, "reconstructions do not"),
        (swap, "better than reconstructions"),
        (lambda r: each(r, "N(0, I)", slice(1), 0.13), "no worse"),
        (lambda r: each(r, "N(0, I)", times=0.24), "on the whole"),
        (lambda r: each(r, "N(0, I)", slice(0, None, 3), 0.4), "lighter the KL"),
        (lambda r: each(r, "gaussian", slice(2), 0.45), "better than one"),
    ],
)
def test_each_claim_can_fail(break_it, claim):
    results = made_up()
    break_it(results)
    missed = [c.name for c in claims.claims(results) if not c.holds]
    assert any(re.search(claim, name) for name in missed), missed
