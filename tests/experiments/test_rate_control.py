"""Rate control: a weight and a capacity find the exact point of a small linear VAE, and the claims can fail."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest
import torch

from experiments.rate_control import claims, figure, protocol
from vae.evaluation.ppca import optimum

VALUES = [6.0, 4.0, 2.5, 1.5, 0.9, 0.5, 0.3, 0.2]
SMALL = {"k": 6, "sigma2": 0.1, "steps": 450, "lr": 0.05, "free_nats": 0.5, "free_beta": 20}
BEST = optimum(torch.tensor(VALUES, dtype=torch.float64), 6, 0.1, beta=10.0)  # four of six latents in use
TARGET = {"beta": 10.0, "rate": BEST.rate, "distortion": BEST.distortion}


@pytest.mark.parametrize("method", ["fixed", "capacity20"])
def test_the_exact_linear_vae_is_steered_to_the_exact_point(method):
    found = protocol.steer(VALUES, SMALL, method, TARGET)
    assert found["rate"] == pytest.approx(BEST.rate, rel=0.01)
    assert found["squared_error"] == pytest.approx(BEST.squared_error, rel=0.01)
    assert len(found["trace"]["step"]) == 150
    assert (found["trace"]["weight"] is None) == (method == "capacity20")


def test_a_linear_vae_that_has_not_converged_says_so_and_by_how_many_nats(caplog):
    there = protocol.steer(VALUES, SMALL, "fixed", {"beta": 20.0})
    assert 0 <= there["nats_above_optimum"] < protocol.CONVERGED
    assert not caplog.records
    short = protocol.steer(VALUES, {**SMALL, "steps": 150}, "fixed", {"beta": 0.1})
    best = optimum(torch.tensor(VALUES, dtype=torch.float64), 6, 0.1, beta=0.1)
    above = short["distortion"] + 0.1 * short["rate"] - best.distortion - 0.1 * best.rate
    assert short["nats_above_optimum"] == pytest.approx(above)
    assert above > protocol.CONVERGED
    assert f"beta = 0.1 has not converged in 150 steps: distortion + beta rate is {above:.2f} nats" in caplog.text


def test_the_table_marks_a_weight_whose_run_has_not_converged():
    results = made_up()
    results["linear"]["runs"]["fixed-3"]["distortion"] += 0.7
    rows = {row[0]: row[2] for row in claims.table(results).rows}
    assert rows["linear: fixed beta = 3"].endswith("(not converged: 0.70 nats above the optimum)")
    assert "converged" not in rows["linear: fixed beta = 10"]


def test_free_bits_hold_every_latent_of_the_linear_vae_at_the_floor():
    found = protocol.steer(VALUES, SMALL, "free_bits", TARGET)
    assert min(found["kl"]) >= 0.45
    assert min(protocol.steer(VALUES, SMALL, "fixed", {"beta": 20.0})["kl"]) < 0.01


def test_the_log_mean_of_two_betas_is_the_mean_slope_under_water_filling():
    values = torch.tensor(VALUES, dtype=torch.float64)
    low, high = (optimum(values, 6, 0.05, beta) for beta in (6.5, 9.5))  # the same five latents in use
    assert low.active == high.active
    slope = (high.distortion - low.distortion) / (high.rate - low.rate)
    assert -slope == pytest.approx(claims.log_mean(6.5, 9.5))


def test_a_set_point_is_judged_by_its_worst_window_of_the_last_fifth():
    trace = {"step": [100.0, 700.0, 800.0, 900.0, 1000.0], "rate": [50.0, 13.0, 10.1, 9.9, 9.7]}
    assert claims.largest_error(trace, 1000, "rate", 10.0) == pytest.approx(0.03)
    assert claims.last_part(trace, 1000, "rate") == [10.1, 9.9, 9.7]


def made_up() -> dict:
    values = torch.tensor([5.0 / (i + 1) for i in range(784)], dtype=torch.float64)

    def exact(beta):
        best = optimum(values, 100, 0.01, beta)
        return {name: getattr(best, name) for name in ("rate", "squared_error", "distortion", "active")}

    def trace(rate, distortion, weight, steps):
        course = {"step": [steps * i / 10 for i in range(1, 11)], "rate": [rate] * 10, "distortion": [distortion] * 10}
        return {**course, "weight": weight and [weight] * 10}

    def linear_run(beta, weight=None):
        return {**exact(beta), "kl": [0.6] * 100, "trace": trace(1.0, 1.0, weight, 3000)}

    linear = {
        **protocol.LINEAR,
        "betas": [3, 10],
        "set_points": [10],
        "published": {
            str(beta): {"rate": rate, "squared_error": error, "active": active}
            for beta, (rate, error, active) in protocol.PUBLISHED.items()
        },
        "exact": {"3": exact(3), "10": exact(10)},
        "curve": {"rate": [200.0, 40.0, 5.0], "squared_error": [4.0, 14.0, 30.0]},
        "runs": {
            **{"fixed-3": linear_run(3), "fixed-10": linear_run(10), "free_bits": linear_run(30)},
            **{f"{method}-10": linear_run(10, 10.0) for method in ("geco", "control")},
            **{f"capacity{gamma}-10": linear_run(10) for gamma in (20, 1000)},
        },
    }
    points = {0.5: (31.0, 70.0), 1: (24.0, 75.05), 2: (17.0, 85.15), 4: (11.0, 102.5)}  # slopes as they should be

    def mlp_run(beta, weight=None, kl=(1.0,) * 10 + (0.0,) * 10):
        rate, distortion = points[beta]
        halves = {"rate": rate, "distortion": distortion}
        split = {**halves, "elbo": -(rate + distortion)}
        return {
            **{"train": split, "test": split, "last_epoch": halves, "kl": list(kl)},
            "trace": trace(rate, distortion, weight, 2000),
        }

    mlp = {
        **protocol.MLP,
        "betas": list(points),
        "steps": 2000,
        "target": {"rate": 17.0, "distortion": 85.15},
        "runs": {
            **{f"fixed-{beta:g}": [mlp_run(beta), mlp_run(beta)] for beta in points},
            **{method: [mlp_run(2, 2.0), mlp_run(2, 2.0)] for method in ("geco", "control")},
            **{f"capacity{gamma}": [mlp_run(2), mlp_run(2)] for gamma in protocol.MLP["gammas"]},
            "free_bits": [mlp_run(4, 4.0, [0.6] * 20)] * 2,
        },
    }
    ablations = {
        "linear": [exact(2), exact(10)],
        "exact": [exact(2), exact(10)],
        "mlp": [[mlp_run(2), mlp_run(2)]] * 2,
        "settings": protocol.SETTINGS["full"]["ablations"],
    }
    return deepcopy({"linear": linear, "mlp": mlp, "ablations": ablations})


def test_made_up_results_pass_every_claim_and_fill_table_and_figure():
    missed = [claim for claim in claims.claims(made_up()) if not claim.holds]
    assert not missed
    assert len(claims.table(made_up()).rows) == 1 + 5 + 4 + 3 + len(protocol.MLP["gammas"]) + 4
    assert len(figure.figure(made_up()).axes) == 6


@pytest.mark.parametrize(
    ("break_it", "claim"),
    [
        (lambda r: r["linear"]["published"]["10"].update(active=70), "closed form at beta = 10"),
        (lambda r: r["linear"]["runs"]["fixed-3"].update(rate=100.0), "fixed beta"),
        (lambda r: r["linear"]["runs"]["geco-10"].update(rate=46.0), "GECO.*exact curve"),
        (lambda r: r["linear"]["runs"]["control-10"].update(squared_error=14.0), "ControlVAE.*exact curve"),
        (lambda r: r["linear"]["runs"]["capacity20-10"].update(squared_error=14.0), "gamma 20.*exact curve"),
        (lambda r: r["linear"]["runs"]["geco-10"]["trace"].update(weight=[9.0] * 10), "linear: GECO.*weight"),
        (lambda r: r["linear"]["runs"]["free_bits"].update(kl=[0.6] * 99 + [0.2]), "linear: free bits"),
        (lambda r: r["mlp"]["runs"]["fixed-2"][1]["test"].update(rate=25.0), "rate falls"),
        (lambda r: [run["test"].update(elbo=-98.5) for run in r["mlp"]["runs"]["fixed-2"]], "ELBO is best"),
        (lambda r: [run["train"].update(distortion=80.0) for run in r["mlp"]["runs"]["fixed-2"]], "slope.*train"),
        (lambda r: [run["test"].update(distortion=80.0) for run in r["mlp"]["runs"]["fixed-2"]], "slope.*test"),
        (lambda r: r["mlp"]["runs"]["geco"][1]["trace"]["distortion"].__setitem__(9, 88.0), "GECO holds"),
        (lambda r: r["mlp"]["runs"]["control"][1]["trace"]["rate"].__setitem__(8, 17.5), "ControlVAE holds"),
        (
            lambda r: [run["last_epoch"].update(distortion=90.0) for run in r["mlp"]["runs"]["capacity1000"]],
            "gamma 1000 ends",
        ),
        (
            lambda r: [run["trace"].update(weight=[2.7] * 10) for run in r["mlp"]["runs"]["control"]],
            "MLP: ControlVAE finds",
        ),
        (lambda r: r["mlp"]["runs"]["free_bits"][0].update(kl=[1.0] * 19 + [0.4]), "MLP: free bits"),
        (lambda r: r["ablations"]["linear"][0].update(rate=100.0), "ablation, linear"),
        (lambda r: r["ablations"]["mlp"][0][1]["last_epoch"].update(rate=19.0), "ablation, MLP: GECO"),
        (lambda r: r["ablations"]["mlp"][1][0]["last_epoch"].update(distortion=90.0), "ablation, MLP: a capacity"),
        (lambda r: r["mlp"]["runs"]["fixed-4"][0].update(kl=[1.0] * 11 + [0.0] * 9), "half the latents collapse"),
    ],
)
def test_each_claim_can_fail(break_it, claim):
    results = made_up()
    break_it(results)
    missed = [c.name for c in claims.claims(results) if not c.holds]
    assert any(re.search(claim, name) for name in missed), missed
