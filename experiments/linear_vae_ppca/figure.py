"""KL of each latent, the distance from the optimum, components and columns."""

from __future__ import annotations

from itertools import product

import numpy as np

from experiments.linear_vae_ppca.claims import FOUND, TITLES
from experiments.linear_vae_ppca.protocol import DRAWN
from vae.experiment_figures import FINE, MUTED, bare, guide, note, unpack_images


def figure(results: dict):
    import matplotlib.pyplot as plt

    drawn = [model for model in results["models"] if "pictures" in model["seeds"][0]]
    fig = plt.figure(figsize=(10.5, 4.0 + 2.0 * len(drawn)))
    heights = [4.0] + [2.0] * len(drawn)
    top, *below = fig.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    axes = top.subplots(1, 3, width_ratios=[1.3, 1.15, 0.9])
    draw_latents(axes[0], results)
    draw_gaps(axes[1], results)
    draw_starts(axes[2], results)
    for part, model in zip(below, drawn, strict=True):
        part.suptitle(
            f"{TITLES[model['data']]}: the first principal components, and the columns that were learned (sign turned)",
            x=0.01,
            ha="left",
            fontsize=10,
            fontweight="bold",
        )
        grid = part.subplots(2, DRAWN)
        shown = unpack_images(model["seeds"][0]["pictures"])
        for row, column in product(range(2), range(DRAWN)):
            ax = grid[row, column]
            ax.imshow(shown[row, column], cmap="RdBu_r", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            bare(ax)
        for row, name in enumerate(("component", "column")):
            grid[row, 0].set_ylabel(name, fontsize=8)
    return fig


def draw_latents(ax, results: dict) -> None:
    shown = [model for model in results["models"] if model["data"] == "mnist"]
    for number, model in enumerate(shown):
        piece = model["seeds"][0]
        label = f"k = {model['k']}, sigma² " + (f"= {model['sigma2']:g}" if model["sigma2"] else "learned")
        place = np.arange(1, model["k"] + 1)
        ax.plot(place, piece["optimum"]["kl"], color=f"C{number}", lw=1.0)
        ax.plot(place, piece["final"]["kl"], ".", color=f"C{number}", ms=5, label=label)
    ax.set(xlabel="latent, by its KL", ylabel="KL (nats)", title="MNIST: what each latent carries")
    ax.set(xlim=(0, 51), ylim=(-0.08, 1.3 * max(kl for model in shown for kl in model["seeds"][0]["final"]["kl"])))
    ax.plot([], [], color=MUTED, lw=1.0, label="1/2 log(eigenvalue / sigma²), or 0")
    ax.legend(fontsize=8, loc="upper right")


def draw_gaps(ax, results: dict) -> None:
    floor = 1e-7
    labels = []
    for number, model in enumerate(results["models"][::-1]):
        for stage, color in (("minibatch", "C1"), ("final", "C0")):
            gaps = [max(floor, piece[stage]["gap"]) for piece in model["seeds"]]
            ax.plot(gaps, [number] * len(gaps), "o", color=color, ms=5, alpha=0.8, mec="white", mew=0.5)
        kind = f"σ² = {model['sigma2']:g}" if model["sigma2"] else "learned"
        labels.append(f"{ {'mnist': 'MNIST', 'fashion_mnist': 'Fashion'}[model['data']] } {model['k']}, {kind}")
    guide(ax, x=0.5, lw=1.0, ls=FINE)
    note(ax, "0.5 nats", (0.5, 1), (-2, -2), xycoords=("data", "axes fraction"), ha="right", va="top", color=MUTED)
    ax.set(
        xscale="log", yticks=range(len(labels)), ylim=(-0.6, 1.35 * len(labels)), xlabel="nats below the exact optimum"
    )
    ax.set_yticklabels(labels, fontsize=8)
    ax.plot([], [], "o", color="C1", label="after minibatches")
    ax.plot([], [], "o", color="C0", label="then full batch")
    ax.legend(fontsize=8, loc="upper left")
    ax.set_title("ELBO, each seed")


def draw_starts(ax, results: dict) -> None:
    starts = results["starts"]
    for before, after in zip(starts["start"], starts["end"], strict=True):
        ax.plot([0, 1], [before, max(after, 1e-7)], "o-", color="C2", ms=4, lw=0.8, alpha=0.7)
    guide(ax, y=FOUND, lw=1.0, ls=FINE)
    ax.set(yscale="log", xlim=(-0.25, 1.25), xticks=[0, 1], ylabel="nats below the optimum")
    ax.set_xticklabels(["start", "end"])
    ax.set_title(f"{len(starts['end'])} random starts, k = {starts['k']}")
