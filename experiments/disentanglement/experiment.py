"""VAEs that are to find the factors behind sprites: does the method matter, or its strength, or the seed?

VAE, beta-VAE, annealed capacity, beta-TC-VAE and FactorVAE, some strengths each and several seeds of each strength; every
metric of vae.evaluation.disentanglement; the variance of each metric split between method, strength and seed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vae.engine.folder import read_metrics
from vae.engine.run import load
from vae.evaluation.disentanglement import evaluate, floor_and_ceiling
from vae.evaluation.disentanglement.information import discretise, factor_entropy, mutual_information
from vae.evaluation.measures import encode
from vae.experiment import Claim, Context, Table, pack_images, spread, unpack_images
from vae.seeding import generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = "Higgins et al. 2017; Burgess et al. 2018; Chen et al. 2018; Kim & Mnih 2018; Locatello et al. 2019 (is it the method?)"
CLAIM = (
    "Weighing the KL, its total correlation above all, disentangles the factors of sprites; yet the seed and the strength "
    "decide about a score as much as the method."
)
VAE, BETA, CAPACITY, TC, FACTOR = "VAE", "beta-VAE", "capacity", "beta-TC-VAE", "FactorVAE"
QUICK_CAPACITY = ["objective.gamma=30", "objective.schedule.steps=2500"]  # 1000 costs the picture: see rate_control
QUICK_TC = "objective.sampling=stratified"
QUICK_FACTOR = ["objective.hidden=[256,256,256]", "objective.discriminator_lr=1e-3"]  # small, and fast to learn
# method -> strength -> overrides; all but the VAE, which has no strength, enter the split of the variance. `claimed` is the
# strength that stands for its method in the claims of order.
SETTINGS = {
    "quick": {
        "seeds": [0, 1, 2],
        "methods": {
            VAE: {"1": []},
            BETA: {"4": ["objective.beta=4"], "8": ["objective.beta=8"]},
            CAPACITY: {
                "6": ["objective=capacity", "objective.capacity=6", *QUICK_CAPACITY],
                "8": ["objective=capacity", "objective.capacity=8", *QUICK_CAPACITY],
            },
            TC: {
                "10": ["objective=tcvae", "objective.beta=10", QUICK_TC],
                "20": ["objective=tcvae", "objective.beta=20", QUICK_TC],
            },
            FACTOR: {
                "40": ["objective=factor_vae", "objective.gamma=40", *QUICK_FACTOR],
                "80": ["objective=factor_vae", "objective.gamma=80", *QUICK_FACTOR],
            },
        },
        "claimed": {VAE: "1", BETA: "8", TC: "20", FACTOR: "80"},
        "points": None,
        "constants": {
            "num_train": 2000,
            "num_test": 1000,
            "num_train_votes": 2000,
            "num_eval_votes": 1000,
            "num_variance_estimate": 2000,
            "num_train_batches": 2000,
            "num_eval_batches": 1000,
            "num_samples": 1500,
        },
    },
    "full": {
        "seeds": [0, 1, 2, 3, 4],
        "methods": {
            VAE: {"1": []},
            BETA: {"4": ["objective.beta=4"], "16": ["objective.beta=16"]},
            CAPACITY: {
                "10": ["objective=capacity", "objective.capacity=10", "objective.schedule.steps=100000"],
                "25": ["objective=capacity", "objective.capacity=25", "objective.schedule.steps=100000"],
            },
            TC: {"6": ["objective=tcvae", "objective.beta=6"], "10": ["objective=tcvae", "objective.beta=10"]},
            FACTOR: {
                "20": ["objective=factor_vae", "objective.gamma=20"],
                "40": ["objective=factor_vae", "objective.gamma=40"],
            },
        },
        "claimed": {VAE: "1", BETA: "4", TC: "6", FACTOR: "20"},
        "points": 15_000,
        "constants": {"num_samples": 5000},
    },
}
METRICS = {
    "mig/means_20bins": "MIG",
    "mig_chen/samples": "MIG, Chen's",
    "factor_vae/means": "FactorVAE score",
    "beta_vae/means": "beta-VAE score",
    "dci_fast/means_disentanglement": "DCI D (fast)",
    "sap/means_svm": "SAP",
    "modularity/means_20bins": "modularity",
    "explicitness/means_test": "explicitness",
    "irs/means_20bins": "IRS",
}
MIG, FACTOR_SCORE = "mig/means_20bins", "factor_vae/means"
SHARES = ("method", "strength", "seed")
BOOTSTRAPS = 2000
TRAVERSED, COLUMNS, REACH = 5, 9, 2.5

# --- measuring ----------------------------------------------------------------------------------------------------------


def measure(context: Context) -> dict[str, Any]:
    settings = context.settings
    form = "experiment=disentanglement" + "_quick" * context.quick
    cells = [(method, strength) for method, strengths in settings["methods"].items() for strength in strengths]

    def run(method: str, strength: str, seed: int) -> str:
        return f"{method},{strength},seed={seed}"

    folders = context.train_many(
        {
            run(method, strength, seed): [form, *settings["methods"][method][strength], f"seed={seed}"]
            for seed in settings["seeds"]
            for method, strength in cells
        }
    )

    scores = context.cached_many(
        {f"scores,{name}": partial(score, folder, settings) for name, folder in folders.items()}
    )
    seed = settings["seeds"][0]
    return {
        "cells": [
            {
                "method": method,
                "strength": strength,
                "runs": [scores[f"scores,{run(method, strength, seed)}"] for seed in settings["seeds"]],
            }
            for method, strength in cells
        ],
        "claimed": settings["claimed"],
        "bounds": context.cached("bounds", lambda: bounds(folders[run(*cells[0], seed)], settings)),
        "traversals": {
            method: context.cached(
                f"traversals,{method}",
                lambda method=method: traversals(folders[run(method, settings["claimed"][method], seed)]),
            )
            for method in (VAE, TC)
        },
    }


def codes_of(folder: Path, settings: dict[str, Any]) -> Any:
    """Of the whole grid, or of so many random points of it."""
    _, data, module = load(folder, threads=1)
    grid = data.splits_ready().train.grid
    points = torch.arange(len(grid))
    if settings["points"] is not None:
        points = torch.randperm(len(grid), generator=generator("disentanglement"))[: settings["points"]]
    return encode(module.vae, data, grid, points)


def score(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Every metric, and how much the two best latents tell about each factor, as parts of its entropy."""
    codes = codes_of(folder, settings)
    information = mutual_information(discretise(codes.codes), codes.factors) / factor_entropy(codes.factors)
    names = [key.partition("/")[0] for key in METRICS]
    scores = evaluate(codes, 0, [*names, "unsupervised"], **settings["constants"], n_jobs=1)
    metrics = read_metrics(folder)
    return {
        "scores": {key: round(value, 4) for key, value in scores.items()},
        "factors": list(codes.factor_names),
        "best_two": np.sort(information, axis=0)[::-1][:2].round(4),
        "kl": np.sort(codes.kl)[::-1].round(3),
        "rate": round(metrics["val/rate"], 3),
        "distortion": round(metrics["val/distortion"], 3),
    }


def bounds(folder: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Of every metric, what random codes and the factors themselves score on these points."""
    codes = codes_of(folder, settings)
    names = [key.partition("/")[0] for key in METRICS]
    found = floor_and_ceiling(
        codes.factors, codes.factor_sizes, 0, names, factor_names=codes.factor_names, **settings["constants"], n_jobs=1
    )
    return {key: round(value, 4) for key, value in found.items() if key.rsplit("/", 1)[0] in METRICS}


@torch.no_grad()
def traversals(folder: Path) -> dict[str, Any]:
    """The central image of the grid, its latents of largest KL moved one at a time: rows latents, columns values."""
    _, data, module = load(folder, threads=1)
    grid = data.splits_ready().train.grid
    centre = grid.index(torch.tensor(grid.factor_sizes) // 2)
    x = data.scale(grid.gather(centre[None])[0])
    posterior = module.vae.encode(x)
    order = module.vae.prior.kl(encode_all(module.vae, data, grid)).mean(0).argsort(descending=True)[:TRAVERSED]
    z = posterior.mean.repeat(TRAVERSED, COLUMNS, 1)
    for row, dimension in enumerate(order):
        z[row, :, dimension] = torch.linspace(-REACH, REACH, COLUMNS)
    return pack_images(module.vae.mean_image(z.flatten(0, 1)).unflatten(0, (TRAVERSED, COLUMNS))[:, :, 0])


def encode_all(vae: Any, data: Any, grid: Any, most: int = 2000) -> Any:
    points = torch.linspace(0, len(grid) - 1, min(most, len(grid))).long()
    return vae.encode(data.scale(grid.gather(points)[0]))


# --- the split of the variance ----------------------------------------------------------------------------------------


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


# --- what the results say -------------------------------------------------------------------------------------------


def runs_of(results: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """Of the strength that stands for the method."""
    strength = results["claimed"][method]
    return next(c["runs"] for c in results["cells"] if (c["method"], c["strength"]) == (method, strength))


def scores_of(results: dict[str, Any], method: str, metric: str) -> list[float]:
    return [run["scores"][metric] for run in runs_of(results, method)]


def claims(results: dict[str, Any]) -> list[Claim]:
    """Orders and gaps are those that the project's notes set, from the published numbers, before any run."""
    mig = {method: median(scores_of(results, method, MIG)) for method in (VAE, BETA, TC)}
    named = {method: fmean(scores_of(results, method, FACTOR_SCORE)) for method in (VAE, TC, FACTOR)}
    held = [
        Claim(
            "MIG: VAE < beta-VAE < beta-TC-VAE",
            mig[VAE] < mig[BETA] < mig[TC],
            " < ".join(f"{mig[method]:.3f}" for method in (VAE, BETA, TC)) + " (medians)",
            "in this order (best reported: 0.10, 0.21, 0.45)",
        ),
        Claim(
            "MIG: what the total correlation's weight gains",
            mig[TC] - mig[VAE] >= 0.1,
            f"{mig[TC] - mig[VAE]:+.3f}",
            "at least 0.10 over the VAE",
        ),
    ]
    held += [
        Claim(
            f"FactorVAE score: {method} above the VAE",
            named[method] >= named[VAE] + 0.05,
            f"{named[method]:.3f} and {named[VAE]:.3f} (means)",
            "by at least 0.05",
        )
        for method in (TC, FACTOR)
    ]
    for cell in results["cells"]:
        if cell["method"] == CAPACITY:
            rates = [run["rate"] for run in cell["runs"]]
            held.append(
                Claim(
                    f"capacity {cell['strength']}: the rate is what was asked for",
                    all(abs(rate - float(cell["strength"])) <= 1 for rate in rates),
                    "rates " + ", ".join(f"{rate:.2f}" for rate in rates) + " nats",
                    "within 1 nat, every seed",
                )
            )
    first = min((c for c in results["cells"] if c["method"] == CAPACITY), key=lambda c: float(c["strength"]))
    told = {
        name: fmean(run["best_two"][0][k] for run in first["runs"])
        for k, name in enumerate(first["runs"][0]["factors"])
    }
    position, others = min(told["x"], told["y"]), [told[name] for name in told if name not in ("x", "y")]
    held.append(
        Claim(
            f"capacity {first['strength']}: position is told first",
            position > max(others),
            ", ".join(f"{name} {part:.2f}" for name, part in told.items()),
            "best latent's part of the entropy: x and y before all others",
        )
    )
    scores = compared(results, MIG)
    share, interval = variance_shares(scores)[0], bootstrapped(scores)[:, 0]
    held.append(
        Claim(
            "MIG: strength and seed matter more than the method (Locatello et al. 2019)",
            share < 0.5,
            f"the method's part is {share:.2f} (90%: {interval[0]:.2f} to {interval[1]:.2f})",
            "below one half",
        )
    )
    return held


def table(results: dict[str, Any]) -> Table:
    published = {VAE: "0.10, 0.63", BETA: "0.21, 0.63", TC: "0.45, 0.62", FACTOR: "0.43, 0.82"}
    rows = []
    for cell in results["cells"]:
        method, strength = cell["method"], cell["strength"]
        of_method = published.get(method, "") if results["claimed"].get(method) == strength else ""
        rows.append(
            (
                f"{method} {strength}" if method != VAE else VAE,
                of_method,
                *(spread((run["scores"][key] for run in cell["runs"]), 2) for key in METRICS),
                spread((run["rate"] for run in cell["runs"]), 1),
            )
        )
    for bound, name in (("floor", "random codes"), ("ceiling", "the factors themselves")):
        found = (results["bounds"].get(f"{key}/{bound}") for key in METRICS)
        rows.append((name, "", *("" if value is None else f"{value:.2f}" for value in found), ""))
    return Table(("", "best reported MIG, FactorVAE score", *METRICS.values(), "rate (nats)"), rows)


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    drawing = plt.figure(figsize=(10, 7.2))
    grid = drawing.add_gridspec(2, 6, height_ratios=(1, 1.05))
    draw_scores(drawing.add_subplot(grid[0, :3]), results, MIG, {VAE: 0.10, BETA: 0.21, TC: 0.45, FACTOR: 0.43})
    draw_scores(
        drawing.add_subplot(grid[0, 3:]), results, FACTOR_SCORE, {VAE: 0.63, BETA: 0.63, TC: 0.62, FACTOR: 0.82}
    )
    draw_shares(drawing.add_subplot(grid[1, :2]), results)
    for number, (method, packed) in enumerate(results["traversals"].items()):
        draw_traversals(drawing.add_subplot(grid[1, 2 + 2 * number : 4 + 2 * number]), method, unpack_images(packed))
    return drawing


def draw_scores(ax: Axes, results: dict[str, Any], metric: str, published: dict[str, float]) -> None:
    """Every run a dot, medians as bars; the best reported number of a method as a cross, floor and ceiling dashed."""
    colours = {method: f"C{number}" for number, method in enumerate((BETA, TC, FACTOR, CAPACITY))} | {VAE: "#40464f"}
    labels = []
    for place, cell in enumerate(results["cells"]):
        method, strength = cell["method"], cell["strength"]
        found = [run["scores"][metric] for run in cell["runs"]]
        across = place + np.linspace(-0.16, 0.16, len(found))
        ax.plot(across, found, "o", ms=4.5, color=colours[method], alpha=0.85)
        ax.plot([place - 0.3, place + 0.3], [median(found)] * 2, color=colours[method], lw=2)
        if results["claimed"].get(method) == strength and method in published:
            ax.plot(place, published[method], "x", color="#667080", ms=6)
        labels.append(method if method == VAE else f"{method}\n{strength}")
    for bound in ("floor", "ceiling"):
        height = results["bounds"].get(f"{metric}/{bound}")
        if height is not None:
            ax.axhline(height, color="#98a1ad", lw=0.8, ls="--")
            ax.text(len(labels) - 0.5, height, bound, fontsize=7, va="bottom", ha="right", color="#667080")
    ax.set_xticks(range(len(labels)), labels, fontsize=7, rotation=45, ha="right", rotation_mode="anchor")
    ax.grid(axis="x", visible=False)
    ax.set(ylabel=METRICS[metric], title=f"{METRICS[metric]}, each seed (cross: best reported)")


def draw_shares(ax: Axes, results: dict[str, Any]) -> None:
    """Parts of the variance, method, strength and seed from the left; the line is the 90% interval of the method's."""
    colours, names = ("C0", "C3", "#c4cad3"), list(METRICS)
    for place, metric in enumerate(reversed(names)):
        scores = compared(results, metric)
        left = 0.0
        for part, colour, label in zip(variance_shares(scores), colours, SHARES, strict=True):
            ax.barh(place, part, left=left, color=colour, height=0.62, label=label if place == 0 else None)
            left += part
        ax.plot(bootstrapped(scores)[:, 0], [place, place], color="#1d2127", lw=1.2, marker="|", ms=5)
    ax.axvline(0.5, color="#667080", lw=0.8, ls="--")
    ax.set_yticks(range(len(names)), [METRICS[name] for name in reversed(names)], fontsize=7)
    ax.set(xlim=(0, 1), xlabel="part of the variance between runs", title="Method, strength or seed?")
    ax.grid(visible=False)
    ax.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.4, -0.34), handlelength=1)


def draw_traversals(ax: Axes, method: str, images: np.ndarray) -> None:
    rows, columns, size, _ = images.shape
    framed = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.6)
    ax.imshow(
        framed.transpose(0, 2, 1, 3).reshape(rows * (size + 2), columns * (size + 2)), cmap="gray", vmin=0, vmax=1
    )
    ax.set_xticks(
        [(column + 0.5) * (size + 2) for column in (0, columns // 2, columns - 1)], [f"{-REACH:g}", "0", f"{REACH:g}"]
    )
    ax.set_yticks([(row + 0.5) * (size + 2) for row in range(rows)], range(1, rows + 1))
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.set(xlabel="value of one latent", ylabel="latent, by KL", title=f"{method}, seed 0")
