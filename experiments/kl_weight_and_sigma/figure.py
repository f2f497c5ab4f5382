"""The curve of error against rate, the weight that is its own error, the ELBO, and what the models draw."""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.kl_weight_and_sigma.claims import elbo, mean
from vae.experiment_figures import BLUE, DASHES, GREEN, INK, MUTED, ORANGE, guide, log_ticks, note, unpack_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEARNED = {"optimal": ("optimal sigma", GREEN, "*"), "learned": ("learned sigma", ORANGE, "P")}


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    picture = plt.figure(figsize=(11.5, 5.6))
    above, below = picture.subfigures(2, 1, height_ratios=[3.7, 1.9])
    plane, crossing, likelihood = above.subplots(1, 3)
    draw_plane(plane, results)
    draw_crossing(crossing, results)
    draw_elbo(likelihood, results)
    low, high = min(results["betas"]), max(results["betas"])
    columns = {
        f"beta = {low:g}": f"beta={low:g}",
        "optimal sigma": "optimal",
        f"beta = {high:g}": f"beta={high:g}",
    }
    for ax, (title, cell) in zip(below.subplots(1, 3), columns.items(), strict=True):
        rows = [np.concatenate(list(unpack_images(row)), 1) for row in results["runs"][cell][0]["pictures"]]
        ax.imshow(np.concatenate(rows), cmap="gray", vmin=0, vmax=1)
        ax.set_title(title, fontsize=9)
        ax.set_xticks([])
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        height = len(rows[0])
        words = ["image", "at a draw of z", "sample of N(0, I)"] if cell == columns[f"beta = {low:g}"] else [""] * 3
        ax.set_yticks([height * (row + 0.5) for row in range(3)], words, fontsize=8)
        ax.tick_params(length=0)
    return picture


def points(results: dict[str, Any], kind: str, name: str, split: str = "test") -> list[float]:
    return [mean(results["runs"][f"{kind}={beta:g}"], split, name) for beta in results["betas"]]


def draw_plane(ax: Axes, results: dict[str, Any]) -> None:
    rate, mse = points(results, "beta", "rate"), points(results, "beta", "mse")
    ax.plot(rate, mse, "o-", color=INK, mfc="white", ms=7, lw=1, label="beta, sigma = 1")
    ax.plot(
        points(results, "sigma2", "rate"), points(results, "sigma2", "mse"), "x", color=BLUE, label="sigma, beta = 1"
    )
    for number, (beta, *at) in enumerate(zip(results["betas"], rate, mse, strict=True)):
        note(ax, f"{beta:g}", tuple(at), (0, (-13, -21, -29)[number % 3]), fontsize=7.5, color=MUTED)
    for cell, (label, colour, marker) in LEARNED.items():
        runs = results["runs"][cell]
        ax.plot(mean(runs, "test", "rate"), mean(runs, "test", "mse"), marker, color=colour, ms=10, ls="", label=label)
    ax.set(xlabel="rate (nats per image)", ylabel="mean squared error of a sub-pixel", title="One curve")
    ax.set(xscale="log", yscale="log")
    log_ticks(ax, x=[5, 10, 20, 50, 100, 200, 400], y=[0.01, 0.015, 0.02, 0.03])
    ax.set_ylim(0.8 * min(mse), 1.15 * max(mse))
    ax.legend(fontsize=7.5)


def draw_crossing(ax: Axes, results: dict[str, Any]) -> None:
    betas = results["betas"]
    ax.plot(
        betas, points(results, "beta", "mse", "train"), "o-", color=INK, mfc="white", lw=1, label="MSE, training images"
    )
    ax.plot(betas, betas, color=MUTED, ls=DASHES, lw=1, label="beta = MSE")
    for cell, (label, colour, marker) in LEARNED.items():
        runs = results["runs"][cell]
        sigma2 = fmean(run["sigma2"] for run in runs)
        ax.plot(sigma2, mean(runs, "train", "mse"), marker, color=colour, ms=10, ls="", label=label)
    ax.set(xscale="log", yscale="log", xlabel="beta, or sigma²", title="The weight that is its own error")
    ax.legend(fontsize=7.5, loc="lower right")


def draw_elbo(ax: Axes, results: dict[str, Any]) -> None:
    betas, runs = results["betas"], results["runs"]
    ax.plot(betas, [elbo(runs[f"beta={beta:g}"]) for beta in betas], "o-", color=INK, mfc="white", lw=1)
    for cell, (label, colour, marker) in LEARNED.items():
        sigma2 = fmean(run["sigma2"] for run in runs[cell])
        ax.plot(sigma2, elbo(runs[cell]), marker, color=colour, ms=10, ls="", label=label)
    guide(ax, x=results["found_beta"], ls=DASHES)
    note(
        ax,
        f"sigma = {255 * math.sqrt(results['found_beta']):.0f} grey levels",
        (results["found_beta"], ax.get_ylim()[0]),
        (-4, 4),
        ha="right",
        color=MUTED,
    )
    ax.set(xscale="log", xlabel="beta, or sigma²", ylabel="nats per test image", title="ELBO, sigma fitted afterwards")
