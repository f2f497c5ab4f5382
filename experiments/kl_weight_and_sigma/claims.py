"""What is claimed of the weight on the KL and of sigma. All thresholds were written before the first run."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from vae.claims import Bound, Claim, Table, above, at_least, at_most, near, ordered, spread

SAME = 1e-9  # relative, in float64: what is one thing to rounding
NEAR = 0.05  # relative: what is one point of a curve
NATS = 5  # an image: what is as good as the best
PLAIN = 500  # nats that a sigma of 1 costs on images of 784 sub-pixels
TENFOLD = 10
GREY = 255  # grey levels between 0 and 1


def mean(runs: list[dict], split: str, name: str) -> float:
    return fmean(run[split][name] for run in runs)


def log_density(run: dict, sigma2: float) -> float:
    """The ELBO of the test images in nats under a Gaussian of this variance, at the network and the code that the run has."""
    error = run["test"]["mse"] / sigma2
    return -0.5 * run["pixels"] * (math.log(2 * math.pi * sigma2) + error) - run["test"]["rate"]


def elbo(runs: list[dict]) -> float:
    """With sigma^2 what the run's error is on training images, whatever it was trained with."""
    return fmean(log_density(run, run["train"]["mse"]) for run in runs)


def same_point(a: list[dict], b: list[dict]) -> tuple[Bound, Bound]:
    return tuple(near(mean(a, "test", name), NEAR, mean(b, "test", name)) for name in ("mse", "rate"))  # type: ignore[return-value]


def off(a: list[dict], b: list[dict]) -> str:
    names = {"mse": "MSE", "rate": "rate"}
    return ", ".join(f"{names[n]} {mean(a, 'test', n) / mean(b, 'test', n) - 1:+.1%}" for n in names)


def claims(results: dict[str, Any]) -> list[Claim]:
    return [*exact_claims(results["exact"]), *trained_claims(results)]


def exact_claims(exact: dict[str, float]) -> list[Claim]:
    steps, beta = exact["steps"], exact["beta"]
    identities = {
        "sgd": f"SGD at beta = {beta:g}, sigma = 1 and SGD at sigma^2 = {beta:g}, beta = 1 with {beta:g} of the learning rate: "
        f"the same weights after {steps} steps",
        "adam": f"Adam, its epsilon divided by {beta:g} and its learning rate as it was: the same weights after {steps} steps",
        "optimal_gradient": "the optimal sigma has 1 / MSE times the gradient of beta = MSE, sigma = 1",
        "optimal_distortion": "its sigma^2 is the batch's MSE: the distortion is (n / 2) log(2 pi e MSE)",
        "published_l1": f"kl_weight {exact['weight']:g}, |error| summed over pixels in [-1, 1]: a Laplace of scale "
        f"{exact['laplace_scale']:g} in [0, 1], up to a factor",
        "published_l2": f"kl_weight {exact['weight']:g}, squared error summed likewise: a Gaussian of sigma "
        f"{exact['gaussian_sigma']:.3g} in [0, 1], up to a factor",
    }
    return [
        Claim.of(f"float64: {words}", f"{exact[name]:.1e} apart", "at most {:g}, relative", at_most(exact[name], SAME))
        for name, words in identities.items()
    ]


def trained_claims(results: dict[str, Any]) -> list[Claim]:
    runs, betas = results["runs"], results["betas"]
    optimal, learned, found = runs["optimal"], runs["learned"], runs["found"]
    beta = results["found_beta"]
    best = max(betas, key=lambda b: elbo(runs[f"beta={b:g}"]))
    ours = elbo(optimal)
    rates = [[run["test"]["rate"] for run in runs[f"beta={b:g}"]] for b in sorted(betas, reverse=True)]
    plain = fmean(log_density(run, 1.0) for run in runs["beta=1"])
    return [
        Claim.of(
            "the rate falls with beta, in every seed",
            f"{fmean(rates[-1]):.1f} to {fmean(rates[0]):.2f} nats from {min(betas):g} to {max(betas):g}",
            "in this order",
            ordered(*rates),
        ),
        *(
            Claim.of(
                f"Adam: beta = {b:g} and sigma^2 = {b:g} land on one point",
                off(runs[f"sigma2={b:g}"], runs[f"beta={b:g}"]),
                "each within {0:.0%}",
                *same_point(runs[f"sigma2={b:g}"], runs[f"beta={b:g}"]),
            )
            for b in betas
        ),
        *(
            Claim.of(
                f"{name}: sigma^2 is the MSE of the training images",
                f"sigma^2 = {spread([run['sigma2'] for run in of], 5)}, MSE {spread([r['train']['mse'] for r in of], 5)}",
                "within {0:.0%}",
                near([run["sigma2"] / run["train"]["mse"] for run in of], NEAR, 1.0),
            )
            for name, of in (("optimal sigma", optimal), ("learned sigma", learned))
        ),
        *(
            Claim.of(
                f"{name}: lands where beta = {beta:g}, its own sigma^2, does with sigma = 1",
                off(of, found),
                "each within {0:.0%}",
                *same_point(of, found),
            )
            for name, of in (("optimal sigma", optimal), ("learned sigma", learned))
        ),
        Claim.of(
            "no weight has a higher ELBO than the optimal sigma's, each with its sigma fitted afterwards",
            f"{ours:.1f} nats; best weight {best:g}: {elbo(runs[f'beta={best:g}']):.1f}",
            "at most {:g} nats below the best",
            at_least(ours - elbo(runs[f"beta={best:g}"]), -NATS),
        ),
        Claim.of(
            "sigma = 1 costs hundreds of nats",
            f"{ours - plain:.0f} nats below the optimal sigma",
            "above {:g}",
            above(ours - plain, PLAIN),
        ),
        Claim.of(
            f"the sigma that a weight of {min(betas):g} stands for is far below the error",
            f"sigma = {math.sqrt(min(betas)) * GREY:.2g} grey levels, error {grey(runs[f'beta={min(betas):g}']):.1f}",
            "the error above {:g} sigmas",
            above(grey(runs[f"beta={min(betas):g}"]) / (math.sqrt(min(betas)) * GREY), TENFOLD),
        ),
    ]


def grey(runs: list[dict]) -> float:
    """The root of the test images' mean squared error, in grey levels of 255."""
    return GREY * math.sqrt(mean(runs, "test", "mse"))


def title(cell: str, results: dict[str, Any]) -> str:
    named = {
        "optimal": "optimal sigma",
        "learned": "learned sigma",
        "learned from 1": "learned sigma, from 1 on",
        "found": f"beta = {results['found_beta']:g}, that of the optimal sigma",
    }
    return named.get(cell) or cell.replace("sigma2=", "sigma^2 = ").replace("beta=", "beta = ")


def table(results: dict[str, Any]) -> Table:
    rows = []
    for cell, runs in results["runs"].items():
        sigma2 = fmean(run["sigma2"] for run in runs)
        beta = cell.removeprefix("beta=") if cell.startswith("beta=") else f"{sigma2:.3g}"
        if cell == "found":
            beta = f"{results['found_beta']:g}"
        rows.append(
            (
                title(cell, results),
                beta,
                f"{GREY * math.sqrt(float(beta)):.3g}",
                spread([1e3 * run["test"]["mse"] for run in runs]),
                f"{grey(runs):.1f}",
                spread([run["test"]["rate"] for run in runs], 1),
                f"{elbo(runs):.0f}",
                f"{fmean(run['latent_sd'] for run in runs):.2f}",
                f"{fmean(run['posterior_sd'] for run in runs):.3f}",
            )
        )
    columns = (
        "",
        "beta at sigma = 1",
        "as sigma, grey levels",
        "MSE x 1000",
        "error, grey levels",
        "rate, nats",
        "ELBO, nats",
        "sd of z",
        "of it noise",
    )
    return Table(columns, rows, "Test images, mean ± sd over seeds; ELBO with the sigma that fits the training images")
