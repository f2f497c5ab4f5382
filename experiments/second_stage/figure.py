"""The samples' distance against two measures of the first stage, every rank correlation, what a fitted prior gains, samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.second_stage.claims import MAIN, OWN, PREDICTORS, correlation, title, values
from vae.experiment_figures import BLUE, GREEN, INK, MUTED, OCHRE, ORANGE, PINK, guide, unpack_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {"none": "s", "equivariance": "^", "spectrum": "v"}
COLOURS = (BLUE, GREEN, OCHRE, ORANGE, PINK)  # from the lightest weight on


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    picture = plt.figure(figsize=(12, 7.2))
    above, below = picture.subfigures(2, 1, height_ratios=[3.6, 3.6])
    left, right = above.subplots(1, 2, sharey=True)
    for ax, key in ((left, "reconstruction_fd"), (right, "interpolated_fd")):
        draw_plane(ax, results, key)
    left.set_ylabel("Frechet distance of samples, mixture fitted")
    right.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    correlations, gains, pictures = below.subplots(1, 3, width_ratios=[1, 1, 1.2])
    draw_correlations(correlations, results)
    draw_gains(gains, results)
    draw_pictures(pictures, results)
    return picture


def look(model: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    betas = sorted({other["beta"] for other in results["models"]})
    marker = "o" if model["kind"] == "flat" else MARKERS[model["regularizer"]]
    return {"marker": marker, "color": COLOURS[betas.index(model["beta"])]}


def draw_plane(ax: Axes, results: dict[str, Any], key: str) -> None:
    x, y, labelled = values(results, key), values(results, f"frechet/{MAIN}"), set()
    for model, *at in zip(results["models"], x, y, strict=True):
        style = look(model, results)
        kind = "flat" if model["kind"] == "flat" else f"map, {model['regularizer']}".removesuffix(", none")
        label = f"{kind}, beta = {model['beta']:g}"
        size = 4 + 1.3 * np.log2(model["size"] / 8) if model["kind"] == "flat" else 7
        ax.plot(*at, ls="", ms=size, alpha=0.85, label=label if label not in labelled else None, **style)
        labelled.add(label)
    low, high = min(x.min(), y.min()), max(x.max(), y.max())
    ax.plot([low, high], [low, high], color=MUTED, lw=0.8, ls=":")
    name = PREDICTORS[key][0]
    ax.set(xscale="log", yscale="log", xlabel=name, title=f"{name}: Spearman {correlation(results, key)}")


def draw_correlations(ax: Axes, results: dict[str, Any]) -> None:
    keys = [key for key in PREDICTORS if np.sum(~np.isnan(values(results, key))) >= 5]
    for place, key in enumerate(reversed(keys)):
        found = correlation(results, key)
        ax.plot([found.low, found.high], [place, place], color=INK, lw=1.2)
        ax.plot(found.rho, place, "o", color=INK)
    ax.set_yticks(range(len(keys)), [named(results, key) for key in reversed(keys)], fontsize=7.5)
    guide(ax, x=0)
    ax.set(xlim=(-1.05, 1.05), title="Rank correlation, 95%")


def named(results: dict[str, Any], key: str) -> str:
    there = correlation(results, key).models
    return PREDICTORS[key][0] + (f" ({there} maps)" if there < len(results["models"]) else "")


def draw_gains(ax: Axes, results: dict[str, Any]) -> None:
    priors = (OWN, *results["priors"], "aggregate")
    rows = np.stack([values(results, f"frechet/{prior}") for prior in priors])
    for model, row in zip(results["models"], rows.T, strict=True):
        ax.plot(range(len(priors)), row, lw=1, ms=4, alpha=0.85, **look(model, results))
    guide(ax, y=np.mean([run["floor"] for run in results["models"][0]["seeds"]]), ls=":")
    ax.set_xticks(range(len(priors)), [prior.replace("aggregate", "q(z) itself") for prior in priors], fontsize=7.5)
    ax.set(yscale="log", title="Samples under each prior")


def draw_pictures(ax: Axes, results: dict[str, Any]) -> None:
    """Samples of the model whose mixture is the best, under each prior."""
    best = results["models"][int(values(results, f"frechet/{MAIN}").argmin())]
    pictures = best["seeds"][0]["pictures"]
    rows = [np.concatenate(list(unpack_images(row)), 1) for row in pictures.values()]
    ax.imshow(np.concatenate(rows), cmap="gray", vmin=0, vmax=1)
    height = len(rows[0])
    ax.set_yticks([height * (row + 0.5) for row in range(len(rows))], list(pictures), fontsize=7.5)
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set_title(title(best), fontsize=8, weight="normal")
