"""IWAE, its signal to noise, and DReG: the toy against closed forms, and the claims on made-up results."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments.iwae.claims import claims, slope, table
from experiments.iwae.protocol import PUBLISHED, SETTINGS, cells, overrides, protocol, title
from experiments.iwae.toy import SPREAD, Toy, agreement, ratio
from vae.claims import Gain
from vae.cli import CONFIGS
from vae.engine.build import instantiate

K = [1, 4, 16, 64, 256, 1024]


# --- the toy --------------------------------------------------------------------------------------------------------


def test_gradients_of_the_elbo_have_their_closed_form_mean_and_variance():
    toy = Toy(points=40, dim=3, off=0.5, seed=0)
    found = toy.gradients(samples=1, estimator="reparameterised", draws=2000)
    slopes = toy.x + toy.mu - 2 * toy.means  # of the ELBO of each point in its mean of q
    expected = {
        "b": (slopes.mean(0), torch.full((3,), 4 * SPREAD / 40)),
        "A": ((slopes.T @ toy.x / 40).flatten(), (4 * SPREAD * toy.x.square().sum(0) / 40**2).repeat(3)),
        "mu": ((toy.means - toy.mu).mean(0), torch.full((3,), SPREAD / 40)),
    }
    for name, (mean, variance) in expected.items():
        assert ((found[name].mean - mean).abs() < 4.5 * found[name].standard_error).all()
        torch.testing.assert_close(found[name].variance, variance.double(), rtol=0.05, atol=0)


def test_both_estimators_have_one_mean_and_dreg_the_clearer_signal():
    toy = Toy(points=40, dim=3, off=0.1, seed=1)
    plain, dreg = (toy.gradients(8, estimator, 400) for estimator in ("reparameterised", "dreg"))
    same = agreement(plain["b"], dreg["b"])
    assert abs(same["multiple"] - 1) < 4 * same["se"] < 1
    assert same["rms"] < 2
    assert ratio(dreg["b"], dreg["b"])[0] > 3 * ratio(dreg["b"], plain["b"])[0]


# --- what is trained ------------------------------------------------------------------------------------------------


def test_cells_are_those_of_the_settings_cheap_ones_first():
    assert [title(cell) for cell in cells(SETTINGS["quick"])] == ["1L-vae-1", "1L-iwae-5", "1L-dreg-5"]
    both = {"cells": {"2": {"iwae": [5]}, "1": {"iwae": [50, 5], "vae": [1]}}}
    assert [title(cell) for cell in cells(both)] == ["1L-vae-1", "1L-iwae-5", "2L-iwae-5", "1L-iwae-50"]


def test_the_configs_are_the_protocol():
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        vae = compose("train", ["experiment=iwae", "seed=2", *overrides(("1", "vae", 5), SETTINGS["full"])])
        deep = compose("train", ["experiment=iwae", *overrides(("2", "dreg", 50), SETTINGS["quick"])])
    assert vae.objective._target_.endswith("MIWAE")
    assert (vae.objective.groups, vae.objective.samples) == (5, 1)
    assert (vae.seed, vae.trainer.max_epochs, vae.optimizer.eps, vae.model.latent_dim) == (2, 300, 1e-4, 50)
    assert vae.lr_schedule.gamma**300 == pytest.approx(0.1)
    assert (deep.objective.estimator, deep.objective.samples, deep.model.latent_dim) == ("dreg", 50, 100)
    assert deep.prior.top_dim == deep.posterior.top_dim == 50


def test_the_papers_schedule_spends_3_to_the_i_epochs_in_each_stage():
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", ["lr_schedule=burda"])
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule, rates = instantiate(config.lr_schedule)(optimizer), []
    for _ in range(3280):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    np.testing.assert_allclose(rates, [1e-3 * 10 ** (-i / 7) for i in range(8) for _ in range(3**i)])


# --- claims ---------------------------------------------------------------------------------------------------------


def toy_results(**slopes: float) -> dict:
    exponents = {"iwae b": -0.5, "iwae A": -0.5, "iwae mu": 0.5, "dreg b": 0.5, "iwae b, own mean": -0.5} | slopes
    rows = {name: {"snr": [k**power for k in K], "se": [0.01] * 6} for name, power in exponents.items()}
    same = [{"multiple": 1.01, "se": 0.02 * k**0.5, "rms": 1.0} for k in K]
    exact = {"reparameterised": 0.1, "dreg": 1e-8, "sticking_the_landing": 1e-7}
    return {"samples": K, "agreement": same, "at exact posterior": exact, **rows}


def cell(nll: float, seeds: int = 3, active: int = 20) -> dict:
    """Made up: images differ by nats, seeds by tenths, and every cell alike."""
    images = nll + np.linspace(-30, 30, 100)
    bounds = [{"1": -nll - 5, "5": -nll - 2, "50": -nll - 0.5, "1000": -nll}] * seeds
    own = {"nll": [nll + 0.1 * s for s in range(seeds)], "nll_of_images": (images + 0.1 * (seeds - 1) / 2).tolist()}
    return {**own, "bounds": bounds, "active": [[active]] * seeds}


def made_up(**nll: float) -> dict:
    settings = SETTINGS["full"]
    models = {name.replace("_", "-"): cell(value) for name, value in nll.items()}
    return {"toy": toy_results(), "cells": models, "protocol": protocol(settings)}


AS_PUBLISHED = {
    title(at).replace("-", "_"): float(of.nll or of.nbip) for at, of in PUBLISHED.items() if of.nll or of.nbip
}


def failing(results: dict) -> list[str]:
    return [claim.name for claim in claims(results) if not claim.holds]


def test_the_papers_own_table_bears_out_every_claim():
    results = made_up(**AS_PUBLISHED)
    results["cells"]["1L-iwae-50"]["active"] = results["cells"]["2L-iwae-50"]["active"] = [[25], [24], [26]]
    results["protocol"] |= {"epochs": 3280, "lr_schedule": "burda"}
    assert failing(results) == []
    assert len(claims(results)) == 5 + 2 * 3 + 2 + 2 + 1 + 2 + 10
    assert sum("not yet run" in row for row in table(results).rows) == len(PUBLISHED) - len(AS_PUBLISHED)


def test_a_claim_fails_where_its_numbers_do_not_bear_it_out():
    assert failing(made_up(**{"1L_vae_1": 90, "1L_iwae_5": 89.6}))[0] == "1 layer: IWAE-5 is better than the VAE"
    assert "1 layer: IWAE-50 is better than the VAE" in failing(made_up(**{"1L_vae_1": 90, "1L_iwae_50": 89.1}))
    assert "1 layer: DReG-5 is not worse than IWAE-5" in failing(made_up(**{"1L_iwae_5": 88, "1L_dreg_5": 88.2}))
    assert "1 layer: five samples do little for the VAE" in failing(made_up(**{"1L_vae_1": 90, "1L_vae_5": 89}))
    assert "1 layer: more active units with importance samples" in failing(made_up(**{"1L_vae_1": 90, "1L_iwae_5": 88}))
    falling = made_up(**{"1L_vae_1": 90})
    falling["cells"]["1L-vae-1"]["bounds"] = [{"1": -95.0, "5": -96.0, "50": -90.5, "1000": -90.0}]
    assert failing(falling) == ["L_1 <= L_5 <= L_50 <= L_1000 of every model"]


def test_what_was_trained_briefly_is_judged_and_shown_beside_what_was_trained_at_length():
    results = made_up(**{"1L_vae_1": 90, "1L_iwae_5": 89})
    brief = made_up(**{"1L_vae_1": 97, "1L_iwae_5": 95, "1L_iwae_50": 95.1})
    results["briefly"] = {"cells": brief["cells"], "protocol": {**brief["protocol"], "epochs": 8}}
    assert failing(results) == [
        "1 layer: more active units with importance samples",
        "8 epochs, 1 layer: IWAE-50 is better than IWAE-5",
    ]
    shown = {row[0]: row[3:] for row in table(results).rows}
    assert shown["1 layer, IWAE-5: NLL"] == ("89.10 ± 0.10", "20.0 ± 0.0", "95.10 ± 0.10", "20.0 ± 0.0")
    assert shown["1 layer, IWAE-50: NLL"][:2] == ("not yet run", "")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"iwae b": -0.35}, "toy: SNR of the encoder's gradient (b), IWAE"),
        ({"iwae mu": 0.35}, "toy: SNR of the model's gradient (mu), IWAE"),
        ({"dreg b": 0.0}, "toy: SNR of the encoder's gradient (b), DReG"),
    ],
)
def test_a_toy_with_another_slope_fails(change, name):
    results = made_up(**{"1L_vae_1": 90})
    results["toy"] = toy_results(**change)
    assert failing(results) == [name]


def test_a_biased_or_a_noisy_estimator_fails():
    results = made_up(**{"1L_vae_1": 90})
    biased, noisy = copy.deepcopy(results), copy.deepcopy(results)
    biased["toy"]["agreement"][1]["multiple"] = 1.3
    noisy["toy"]["at exact posterior"]["dreg"] = 0.01
    assert failing(biased) == ["toy: the IWAE and DReG gradients of b have one mean"]
    assert [name.split(":")[1][:23] for name in failing(noisy)] == [" at the exact posterior"]


def test_active_units_are_not_judged_before_they_have_settled():
    results = made_up(**{"1L_vae_1": 90, "1L_iwae_5": 88})
    results["protocol"]["epochs"] = 8
    assert failing(results) == []


def test_gain_is_paired_by_image_and_by_seed():
    results = made_up(**{"1L_vae_1": 90, "1L_iwae_5": 88})
    found = Gain.of(results["cells"], "1L-vae-1", "1L-iwae-5")
    assert found.mean == pytest.approx(2)
    assert found.se == pytest.approx(0, abs=1e-9)  # images differ by tens of nats, the pairs by nothing
    assert found.seeds == pytest.approx([2, 2, 2])
    assert Gain.of(results["cells"], "1L-vae-1", "1L-iwae-50") is None


def test_slopes_skip_what_was_lost_in_noise():
    toy = {"samples": K, "b": {"snr": [1, 2, 4, 8, 16, None]}}
    assert slope(toy, "b") == pytest.approx(0.5)
    assert slope(toy, "b", start=64) == pytest.approx(0.5)
