"""Codes on one plane: its cells compose, and its claims on results made up to hold, and to fail by a little."""

from __future__ import annotations

import copy
import math
import re

import pytest
from hydra import compose, initialize_config_dir

from experiments.codes_on_one_plane import figure
from experiments.codes_on_one_plane.claims import claims, gaps, gaussian_at, table
from experiments.codes_on_one_plane.protocol import FAMILIES, PRIORS, SETTINGS, cells, squared_error
from vae.cli import CONFIGS
from vae.likelihoods import Gaussian


def made_up() -> dict:
    sizes, betas = [27, 240, 1000], [2, 4, 8, 16, 32, 64, 128]
    curve = {
        2: (32.0, -340.0),
        4: (28.0, -320.0),
        8: (24.0, -295.0),
        16: (20.0, -250.0),
        32: (16.0, -170.0),
        64: (11.0, -20.0),
        128: (9.0, 90.0),
    }
    points = {f"gaussian-{b}": [{"rate": r, "distortion": d, "elbo": -(r + d)}] * 2 for b, (r, d) in curve.items()}
    points |= {f"realnvp-{b}": copy.deepcopy(points[f"gaussian-{b}"]) for b in betas}
    used = {"fsq": [27, 239, 980], "vq": [27, 238, 970], "vq_plain": [27, 200, 300]}
    distortion = {27: -40.0, 240: -200.0, 1000: -240.0}
    for name in cells(SETTINGS["full"]):
        family, size, *prior = name.split("-")
        if not prior:
            continue
        number, place = int(size), sizes.index(int(size))
        rate = 4 * math.log(number) - {"uniform": 0.0, "categorical": 0.4, "autoregressive": 1.0}[prior[0]]
        found = {"rate": rate, "distortion": distortion[number], "elbo": -(rate + distortion[number])}
        points[name] = [{**found, "codes_used": used[family][place], "perplexity": 0.8 * number} for _ in range(2)]
    return copy.deepcopy({"points": points, "sizes": sizes, "middle": 240, "betas": betas})


def test_cells_compose_with_their_prior_and_the_same_network():
    known = cells(SETTINGS["quick"])
    assert len(known) == 14 + 3 * len(FAMILIES) + 2 * (len(PRIORS) - 1)
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        for name, prior in {
            "fsq-240-uniform": "UniformCodes",
            "vq_plain-27-autoregressive": "AutoregressiveCodes",
        }.items():
            config = compose("train", ["experiment=codes_on_one_plane_quick", *known[name]])
            assert config.prior._target_.endswith(prior)
            assert (config.model.latent_dim, config.network.hidden, config.callbacks.checkpoint.monitor) == (
                12,
                [256],
                None,
            )


def test_squared_error_is_what_a_gaussian_of_this_sigma_makes_of_it():
    import torch

    x = torch.rand(1, 1, 28, 28)
    distortion = -Gaussian(sigma=0.1).log_prob(torch.full((1, 1, 1, 28, 28), 0.5), x).item()
    assert squared_error(distortion) == pytest.approx((x - 0.5).square().sum().item(), rel=1e-4)


def test_at_a_rate_between_two_betas_the_gaussian_stands_on_the_chord():
    results = made_up()
    assert gaussian_at(results, 22.0, 0) == pytest.approx(-272.5)
    assert gaussian_at(results, 11.0, 0) == -20.0
    assert math.isnan(gaussian_at(results, 8.9, 0))
    results["points"]["realnvp-16"][1]["distortion"] = -260.0
    assert gaussian_at(results, 20.0, 1, "realnvp") == -260.0
    rate = 4 * math.log(240) - 1
    assert gaps(results, "fsq", 240)[1] == pytest.approx(-200 - (-250 + (rate - 20) / 4 * -45))


def test_made_up_results_pass_every_claim_and_fill_table_and_figure():
    assert [claim.name for claim in claims(made_up()) if not claim.holds] == []
    assert len(table(made_up()).rows) == 14 + 13
    assert len(figure.figure(made_up()).axes) == 2


def change(name, **values):
    return lambda results: results["points"][name][1].update(values)


@pytest.mark.parametrize(
    ("break_it", "claim"),
    [
        (change("fsq-240-autoregressive", codes_used=227), "FSQ uses nearly all"),
        (change("vq_plain-1000-autoregressive", codes_used=980), "VQ without restarts uses fewer"),
        (change("vq-240-autoregressive", codes_used=240), "VQ with restarts uses no more"),
        (change("fsq-240-uniform", rate=4 * math.log(240) + 0.01), "FSQ: under a uniform prior"),
        (change("vq-240-categorical", distortion=-200.01), "VQ: the prior moves the rate"),
        (change("vq-240-categorical", rate=4 * math.log(240)), "VQ: a learned prior is cheaper"),
        (change("fsq-240-autoregressive", rate=4 * math.log(240) - 0.4), "FSQ: a learned prior is cheaper"),
        (change("fsq-1000-autoregressive", distortion=-199.0), "FSQ: more codes, less distortion"),
        (change("fsq-1000-autoregressive", distortion=-150.0), "FSQ reconstructs as well"),
        (change("vq-27-autoregressive", distortion=-100.0), "At the rate of VQ's codes"),
        (change("fsq-1000-autoregressive", rate=32.1), "At the rate of FSQ's codes a Gaussian VAE has"),
        (change("realnvp-8", distortion=0.0), "At the rate of FSQ's codes a Gaussian VAE under"),
    ],
)
def test_each_claim_can_fail(break_it, claim):
    results = made_up()
    break_it(results)
    missed = [c.name for c in claims(results) if not c.holds]
    assert any(re.search(claim, name) for name in missed), missed
