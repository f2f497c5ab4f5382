"""Scores of every run, parts of the variance, traversals."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.disentanglement.claims import SHARES, bootstrapped, compared, variance_shares
from experiments.disentanglement.protocol import (
    BETA,
    CAPACITY,
    FACTOR,
    FACTOR_SCORE,
    METRICS,
    MIG,
    PUBLISHED,
    REACH,
    TC,
    VAE,
)
from vae.experiment_figures import INK, MUTED, guide, unpack_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    drawing = plt.figure(figsize=(10, 7.2))
    grid = drawing.add_gridspec(2, 6, height_ratios=(1, 1.05))
    draw_scores(drawing.add_subplot(grid[0, :3]), results, MIG)
    draw_scores(drawing.add_subplot(grid[0, 3:]), results, FACTOR_SCORE)
    draw_shares(drawing.add_subplot(grid[1, :2]), results)
    for number, (method, packed) in enumerate(results["traversals"].items()):
        draw_traversals(drawing.add_subplot(grid[1, 2 + 2 * number : 4 + 2 * number]), method, unpack_images(packed))
    return drawing


def draw_scores(ax: Axes, results: dict[str, Any], metric: str) -> None:
    """Every run a dot, medians as bars; the best reported number of a method as a cross, floor and ceiling dashed."""
    colours = {method: f"C{number}" for number, method in enumerate((BETA, TC, FACTOR, CAPACITY))} | {VAE: "#40464f"}
    labels = []
    for place, cell in enumerate(results["cells"]):
        method, strength = cell["method"], cell["strength"]
        found = [run["scores"][metric] for run in cell["runs"]]
        across = place + np.linspace(-0.16, 0.16, len(found))
        ax.plot(across, found, "o", ms=4.5, color=colours[method], alpha=0.85)
        ax.plot([place - 0.3, place + 0.3], [median(found)] * 2, color=colours[method], lw=2)
        if results["claimed"].get(method) == strength:
            ax.plot(place, PUBLISHED[metric][method], "x", color=MUTED, ms=6)
        labels.append(method if method == VAE else f"{method}\n{strength}")
    for bound in ("floor", "ceiling"):
        height = results["bounds"].get(f"{metric}/{bound}")
        if height is not None:
            guide(ax, y=height, color="#98a1ad", ls="--")
            ax.text(len(labels) - 0.5, height, bound, fontsize=7, va="bottom", ha="right", color=MUTED)
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
        ax.plot(bootstrapped(scores)[:, 0], [place, place], color=INK, lw=1.2, marker="|", ms=5)
    guide(ax, x=0.5, ls="--")
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
