"""Rank correlations of what is known of a first stage with the samples of the second. Thresholds were written before a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean, geometric_mean
from typing import Any, NamedTuple

import numpy as np

from vae.claims import Bound, Claim, Limit, Table, above, at_least, at_most

PUBLISHED = 0.85  # Xu et al. 2026: Pearson and Spearman of the interpolated FID with the FID of diffusion, about
PREDICTS, SILENT = 0.7, 0.5  # from which a measure predicts, and up to which it does not
WORSE = 1.05  # how much worse a fitted prior's samples may be than those of N(0, I), in any model
GAIN = 0.8  # the mean ratio of the two distances, at most
LIGHTER = -0.5  # rank correlation of beta and the gain
BETTER = 0.9  # part of the models in which ten Gaussians are better than one
OWN, MAIN = "N(0, I)", "mixture"
DRAWS = 2000  # of the bootstrap over models

PREDICTORS: dict[str, tuple[str, str]] = {  # key: name and where it stands
    "reconstruction_fd": ("reconstruction FD", "measures=reconstruction"),
    "interpolated_fd": ("interpolated FD", "measures=latent"),
    "mse": ("squared error", "measures=reconstruction"),
    "rate": ("rate", "test/rate"),
    "effective_rank": ("effective rank", "measures=latent"),
    "ks": ("distance to a Gaussian (KS)", "measures=latent"),
    "excess_kurtosis": ("excess kurtosis", "measures=latent"),
    "prior_fd": ("FD of q(z) to N(0, I), by latent", "measures=latent"),
    "equivariance_error_shift": ("equivariance error, shift", "measures=latent"),
    "equivariance_error_rotation": ("equivariance error, rotation", "measures=latent"),
}


class Correlation(NamedTuple):
    """Spearman's, its 95% interval from the bootstrap over models, and how many models had both numbers."""

    rho: float
    low: float
    high: float
    models: int

    def __str__(self) -> str:
        return f"{self.rho:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ranks(values: np.ndarray) -> np.ndarray:
    """1 to n along the last axis, equal values sharing the mean of theirs."""
    a, b = values[..., :, None], values[..., None, :]
    return (a > b).sum(-1) + ((a == b).sum(-1) + 1) / 2


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The correlation of the ranks along the last axis; nan where one side is constant."""
    a, b = ranks(a), ranks(b)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    spread = np.sqrt((a * a).mean(-1) * (b * b).mean(-1))
    return np.where(spread > 0, (a * b).mean(-1) / np.where(spread > 0, spread, 1), np.nan)


def bootstrap(columns: list[np.ndarray], of: Callable[..., np.ndarray]) -> tuple[float, float]:
    """The 95% interval of a number of paired columns along the last axis, models drawn with replacement, from one seed."""
    index = np.random.default_rng(0).integers(len(columns[0]), size=(DRAWS, len(columns[0])))
    found = of(*(column[index] for column in columns))
    there = found[~np.isnan(found)]
    low, high = np.percentile(there, [2.5, 97.5]) if len(there) else (math.nan, math.nan)
    return float(low), float(high)


def values(results: dict[str, Any], key: str) -> np.ndarray:
    """A number of every model, the mean over its seeds; nan where a model has none. `frechet/PRIOR` is of its samples."""
    group, _, name = key.partition("/")
    return np.array(
        [
            fmean((run[group][name] if name else run.get(key, math.nan)) for run in model["seeds"])
            for model in results["models"]
        ]
    )


def correlation(results: dict[str, Any], key: str, prior: str = MAIN) -> Correlation:
    a, b = values(results, key), values(results, f"frechet/{prior}")
    there = ~np.isnan(a)
    a, b = a[there], b[there]
    return Correlation(float(spearman(a, b)), *bootstrap([a, b], spearman), int(there.sum()))


def claims(results: dict[str, Any]) -> list[Claim]:
    seen, between = (correlation(results, key) for key in ("reconstruction_fd", "interpolated_fd"))
    columns = [values(results, key) for key in ("interpolated_fd", "reconstruction_fd", f"frechet/{MAIN}")]
    low, high = bootstrap(columns, lambda i, r, g: spearman(i, g) - spearman(r, g))
    own, one, many = (values(results, f"frechet/{prior}") for prior in (OWN, "gaussian", MAIN))
    betas = np.array([model["beta"] for model in results["models"]])
    lighter, part = float(spearman(betas, own / many)), float((many < one).mean())
    mean_ratio = geometric_mean(many / own)
    return [
        Claim.of(
            "decoding between neighbours predicts the fitted prior's samples",
            f"Spearman {between}, {between.models} models",
            f"at least {{:g}} and an interval above {{:g}} (paper: {PUBLISHED})",
            at_least(between.rho, PREDICTS),
            above(between.low, 0),
        ),
        Claim.of(
            "reconstructions do not", f"Spearman {seen}", "at most {:g} (paper: poorly)", at_most(seen.rho, SILENT)
        ),
        Claim.of(
            "it predicts better than reconstructions do",
            f"by {between.rho - seen.rho:+.2f} [{low:.2f}, {high:.2f}]",
            "an interval above {:g}",
            above(low, 0),
        ),
        Claim.of(
            "a fitted mixture samples no worse than N(0, I)",
            f"distance over that of N(0, I) at most {max(many / own):.2f}",
            "at most {:g} in every model",
            at_most(many / own, WORSE),
        ),
        Claim.of(
            "and better on the whole",
            f"{mean_ratio:.2f} of the distance, in the geometric mean",
            "at most {:g}",
            at_most(mean_ratio, GAIN),
        ),
        Claim.of(
            "it gains the more the lighter the KL",
            f"Spearman of beta and the gain {lighter:.2f}",
            "at most {:g}",
            at_most(lighter, LIGHTER),
        ),
        Claim.of(
            "several Gaussians sample better than one",
            f"in {part:.0%} of the models",
            "in at least {:.0%}",
            Bound(part >= BETTER, (Limit(BETTER),)),
        ),
    ]


def title(model: dict[str, Any]) -> str:
    rest = "" if model["regularizer"] == "none" else f", {model['regularizer']}"
    return f"{model['kind']}, {model['size']} latents{rest}, beta = {model['beta']:g}"


def table(results: dict[str, Any]) -> Table:
    """A row a model, then the rank correlations of each column with the samples under the mixture."""
    priors = (OWN, *results["priors"], "aggregate")
    keys = ("reconstruction_fd", "interpolated_fd", "effective_rank", "ks", "rate")
    columns = [values(results, key) for key in (*keys, *(f"frechet/{prior}" for prior in priors))]
    digits = (1, 1, 1, 3, 1, *[1] * len(priors))
    rows = [
        (title(model), *(f"{column[number]:.{d}f}" for column, d in zip(columns, digits, strict=True)))
        for number, model in enumerate(results["models"])
    ]
    rows.append(
        (
            "Spearman with the mixture's, 95% interval",
            *(str(correlation(results, key)) for key in keys),
            *(str(correlation(results, f"frechet/{prior}")) if prior != MAIN else "" for prior in priors),
        )
    )
    names = ("reconstruction FD", "interpolated FD", "effective rank", "KS", "rate, nats")
    floor = fmean(run["floor"] for run in results["models"][0]["seeds"])
    words = (
        f"Frechet distances of {results['images']} images on the project's classifier, {floor:.1f} for training images; "
        "the last columns are of samples under each prior, and of decoded draws of q(z) itself"
    )
    return Table(("", *names, *priors), rows, words)
