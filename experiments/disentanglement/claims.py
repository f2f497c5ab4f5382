"""What is claimed of methods that are to disentangle, and the split of a score's variance between method, strength and seed."""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

import numpy as np

from experiments.disentanglement.protocol import BETA, CAPACITY, FACTOR, FACTOR_SCORE, METRICS, MIG, PUBLISHED, TC, VAE
from vae.claims import Claim, Table, at_least, below, listed, ordered, spread, values, within

SHARES = ("method", "strength", "seed")
BOOTSTRAPS = 2000


def variance_shares(scores: np.ndarray) -> np.ndarray:
    """Shares (3,) of the sum of squares of scores (methods, strengths, seeds): between methods, between the strengths of a
    method, between the seeds of a strength; eta^2 of a nested analysis of variance. They add up to 1."""
    of_cells, of_methods, overall = scores.mean(2), scores.mean((1, 2)), scores.mean()
    strengths, seeds = scores.shape[1:]
    parts = np.array(
        [
            strengths * seeds * ((of_methods - overall) ** 2).sum(),
            seeds * ((of_cells - of_methods[:, None]) ** 2).sum(),
            ((scores - of_cells[..., None]) ** 2).sum(),
        ]
    )
    return parts / parts.sum()


def variance_components(scores: np.ndarray) -> np.ndarray:
    """The same without bias: variances (3,) of a random method, strength of it and seed of that, by the expectations of the
    mean squares (so an estimate may be negative). Eta^2 of few methods is too large by what strengths and seeds add."""
    methods, strengths, seeds = scores.shape
    of_cells, of_methods = scores.mean(2), scores.mean((1, 2))
    mean_squares = np.array(
        [
            strengths * seeds * of_methods.var(ddof=1),
            seeds * ((of_cells - of_methods[:, None]) ** 2).sum() / (methods * (strengths - 1)),
            ((scores - of_cells[..., None]) ** 2).sum() / (methods * strengths * (seeds - 1)),
        ]
    )
    between_methods, between_strengths, within = mean_squares
    return np.array(
        [(between_methods - between_strengths) / (strengths * seeds), (between_strengths - within) / seeds, within]
    )


def bootstrapped(scores: np.ndarray, share: Any = variance_shares, level: float = 0.9) -> np.ndarray:
    """Interval (2, 3) of the shares when the seeds of each cell are drawn again, with replacement.

    Draws are spread out by sqrt(S / (S - 1)) about their cell's mean, or S seeds would seem to vary less than they do.
    """
    rng = np.random.default_rng(0)
    seeds = scores.shape[2]
    means = scores.mean(2, keepdims=True)
    residuals = (scores - means) * np.sqrt(seeds / (seeds - 1))
    drawn = []
    for _ in range(BOOTSTRAPS):
        again = rng.integers(seeds, size=scores.shape)
        drawn.append(share(means + np.take_along_axis(residuals, again, axis=2)))
    return np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)


def compared(results: dict[str, Any], metric: str) -> np.ndarray:
    """Scores (methods, strengths, seeds) of all methods that have a strength."""
    methods = dict.fromkeys(cell["method"] for cell in results["cells"] if cell["method"] != VAE)
    return np.array(
        [
            [[run["scores"][metric] for run in cell["runs"]] for cell in results["cells"] if cell["method"] == method]
            for method in methods
        ]
    )


def runs_of(results: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """Of the strength that stands for the method."""
    strength = results["claimed"][method]
    return next(c["runs"] for c in results["cells"] if (c["method"], c["strength"]) == (method, strength))


def scores_of(results: dict[str, Any], method: str, metric: str) -> list[float]:
    return values(values(runs_of(results, method), "scores"), metric)


def claims(results: dict[str, Any]) -> list[Claim]:
    """Orders and gaps are those that the project's notes set, from the published numbers, before any run."""
    mig = {method: median(scores_of(results, method, MIG)) for method in (VAE, BETA, TC)}
    named = {method: fmean(scores_of(results, method, FACTOR_SCORE)) for method in (VAE, TC, FACTOR)}
    scores = compared(results, MIG)
    share, interval = variance_shares(scores)[0], bootstrapped(scores)[:, 0]
    capacities = [cell for cell in results["cells"] if cell["method"] == CAPACITY]
    return [
        Claim.of(
            "MIG: VAE < beta-VAE < beta-TC-VAE",
            listed(mig.values(), ".3f", " < ") + " (medians)",
            f"in this order (best reported: {listed(PUBLISHED[MIG][method] for method in mig)})",
            ordered(*mig.values()),
        ),
        Claim.of(
            "MIG: what the total correlation's weight gains",
            f"{mig[TC] - mig[VAE]:+.3f}",
            "at least {:.2f} over the VAE",
            at_least(mig[TC] - mig[VAE], 0.1),
        ),
        *(
            Claim.of(
                f"FactorVAE score: {method} above the VAE",
                f"{named[method]:.3f} and {named[VAE]:.3f} (means)",
                "by at least {:g}",
                at_least(named[method] - named[VAE], 0.05),
            )
            for method in (TC, FACTOR)
        ),
        *map(rate_claim, capacities),
        position_claim(min(capacities, key=lambda cell: float(cell["strength"]))),
        Claim.of(
            "MIG: strength and seed matter more than the method (Locatello et al. 2019)",
            f"the method's part is {share:.2f} (90%: {interval[0]:.2f} to {interval[1]:.2f})",
            "below one {:words}",
            below(share, 1 / 2),
        ),
    ]


def rate_claim(cell: dict[str, Any]) -> Claim:
    rates = values(cell["runs"], "rate")
    return Claim.of(
        f"capacity {cell['strength']}: the rate is what was asked for",
        f"rates {listed(rates)} nats",
        "within {:g} nat, every seed",
        within(rates, 1, float(cell["strength"])),
    )


def position_claim(cell: dict[str, Any]) -> Claim:
    told = {
        name: fmean(run["best_two"][0][k] for run in cell["runs"]) for k, name in enumerate(cell["runs"][0]["factors"])
    }
    others = max(told[name] for name in told if name not in ("x", "y"))
    return Claim.of(
        f"capacity {cell['strength']}: position is told first",
        ", ".join(f"{name} {part:.2f}" for name, part in told.items()),
        "best latent's part of the entropy: x and y before all others",
        ordered(others, min(told["x"], told["y"])),
    )


def table(results: dict[str, Any]) -> Table:
    rows = []
    for cell in results["cells"]:
        method, strength = cell["method"], cell["strength"]
        of_method = (
            "" if results["claimed"].get(method) != strength else listed(of[method] for of in PUBLISHED.values())
        )
        rows.append(
            (
                f"{method} {strength}" if method != VAE else VAE,
                of_method,
                *(spread(values(values(cell["runs"], "scores"), key)) for key in METRICS),
                spread(values(cell["runs"], "rate"), 1),
            )
        )
    for bound, name in (("floor", "random codes"), ("ceiling", "the factors themselves")):
        found = (results["bounds"].get(f"{key}/{bound}") for key in METRICS)
        rows.append((name, "", *("" if value is None else f"{value:.2f}" for value in found), ""))
    return Table(("", "best reported MIG, FactorVAE score", *METRICS.values(), "rate (nats)"), rows)
