"""The linear VAE against pPCA: its full-batch phase finds the optimum, and its claims can fail."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest
import torch

from experiments.linear_vae_ppca import claims, figure, protocol
from vae.evaluation.ppca import Spectrum, optimum
from vae.seeding import generator

VALUES = torch.tensor([6.0, 4.0, 2.5, 1.5, 0.9, 0.5, 0.3, 0.2], dtype=torch.float64)
DATA = Spectrum(torch.zeros(8, dtype=torch.float64), VALUES, torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("sigma2", [None, 1.0])
@pytest.mark.slow
def test_full_batch_phase_finds_the_optimum_its_components_and_what_collapses(sigma2):
    best = optimum(VALUES, 5, sigma2)
    start = protocol.random_start(8, 5, generator("start"))
    if sigma2 is not None:
        start = start._replace(log_sigma2=torch.zeros((), dtype=torch.float64))
    found = protocol.describe(protocol.full_batch(start, VALUES, 500, sigma2 is None), DATA, best)
    assert found["gap"] == pytest.approx(0, abs=1e-6)
    assert found["rate"] == pytest.approx(best.rate, rel=1e-4)
    assert found["sigma2"] == pytest.approx(best.sigma2, rel=1e-4)
    assert found["kl"].tolist() == pytest.approx(best.kl, abs=1e-3)
    assert found["nearest"].tolist() == list(range(best.active))
    assert found["alignment"] > 0.999
    assert found["angle"] < 1e-3


def test_angle_and_alignment_see_a_rotation():
    best = optimum(VALUES, 3)
    weights = protocol.full_batch(protocol.random_start(8, 3, generator(1)), VALUES, 500, True)
    turn = torch.eye(8, dtype=torch.float64)
    turn[2:4, 2:4] = torch.tensor([[0.8, -0.6], [0.6, 0.8]])  # the third component leaves the subspace by asin 0.6
    turned = protocol.describe(weights._replace(decoder=turn @ weights.decoder), DATA, best)
    assert turned["angle"] == pytest.approx(0.6435, abs=1e-3)
    assert turned["alignment"] == pytest.approx((1 + 1 + 0.8) / 3, abs=1e-3)


def made_up() -> dict:
    def piece(elbo, rate, sigma2, active, k):
        kl = [rate / active] * active + [0.0] * (k - active)
        final = {"elbo": elbo, "gap": 0.01, "rate": rate, "sigma2": sigma2, "angle": 0.001, "alignment": 0.999}
        final |= {
            "sampled_elbo": elbo + 0.01,
            "active": active,
            "nearest": list(range(active)),
            "kl": kl,
        }
        best = {"elbo": elbo + 0.01, "rate": rate, "sigma2": sigma2, "active": active, "kl": kl}
        return {"optimum": best, "minibatch": {**final, "gap": 0.3}, "final": final}

    def model(k, sigma2, found):
        return {"data": "mnist", "k": k, "sigma2": sigma2, "seeds": [found, deepcopy(found)]}

    closed = [
        {"data": data, "k": k, "sigma2": s, "elbo": elbo, "rate": rate, "active": active}
        for (data, k, s), (elbo, rate, active) in protocol.PUBLISHED.items()
    ]
    return {
        "closed_form": closed,
        "models": [model(10, None, piece(182.1, 21.0, 0.035, 10, 10)), model(50, 1.0, piece(-743.2, 4.3, 1.0, 12, 50))],
        "starts": {"data": "mnist", "k": 10, "start": [900.0, 50.0], "end": [0.001, 0.002]},
    }


def test_made_up_results_pass_every_claim_and_fill_table_and_figure():
    assert all(claim.holds for claim in claims.claims(made_up()))
    assert len(claims.table(made_up()).rows) == 11
    assert len(figure.figure(made_up()).subfigs) == 1


@pytest.mark.parametrize(
    ("break_it", "claim"),
    [
        (lambda r: r["models"][0]["seeds"][1]["final"].update(gap=0.6), "k = 10.*ELBO and rate"),
        (lambda r: r["models"][0]["seeds"][1]["final"].update(rate=21.4), "k = 10.*ELBO and rate"),
        (lambda r: r["models"][0]["seeds"][0]["final"].update(sigma2=0.0357), "sigma² ends"),
        (lambda r: r["models"][1]["seeds"][0]["final"].update(kl=[0.3] * 13 + [0.0] * 37), "carry anything"),
        (lambda r: r["models"][1]["seeds"][0]["final"].update(nearest=[*range(11), 13]), "carry anything"),
        (lambda r: r["models"][0]["seeds"][0]["final"].update(angle=0.03), "k = 10.*subspace"),
        (lambda r: r["models"][0]["seeds"][0]["final"].update(alignment=0.9), "k = 10.*components themselves"),
        (lambda r: r["models"][1]["seeds"][0]["final"].update(sampled_elbo=-742.0), "k = 50.*image by image"),
        (lambda r: r["starts"].update(end=[0.001, 3.0]), "random starts"),
        (lambda r: r["closed_form"][0].update(elbo=182.075), "closed form.*k = 10"),
        (lambda r: r["models"][1]["seeds"][0]["final"].update(elbo=-100.0), "has to be learned"),
    ],
)
def test_each_claim_can_fail(break_it, claim):
    results = made_up()
    break_it(results)
    missed = [c.name for c in claims.claims(results) if not c.holds]
    assert any(re.search(claim, name) for name in missed), missed
