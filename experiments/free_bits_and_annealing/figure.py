"""Rates while training, where they are, what they cost, what z says."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.free_bits_and_annealing.claims import at_full_weight, of_seeds
from experiments.free_bits_and_annealing.protocol import (
    ALONE,
    CYCLICAL,
    FACTORISED,
    FREE_BITS,
    FREE_NATS,
    PICTURED,
    PLAIN,
    WARM_UP,
)
from vae.experiment_figures import MUTED, bare, guide, log_ticks, unpack_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    colours = dict(
        zip((WARM_UP, FREE_BITS, CYCLICAL, PLAIN, FACTORISED), ["C0", "C1", "C2", "#40464f", "C3"], strict=True)
    )
    drawing, axes = plt.subplots(2, 2, figsize=(9, 6.4))
    draw_rates(axes[0, 0], results, colours)
    draw_dimensions(axes[0, 1], results, colours)
    draw_likelihoods(axes[1, 0], results, colours)
    draw_images(axes[1, 1], results)
    return drawing


def draw_rates(ax: Axes, results: dict[str, Any], colours: dict[str, str]) -> None:
    for name in (FACTORISED, WARM_UP, CYCLICAL, FREE_BITS, PLAIN):
        for number, run in enumerate(results["methods"][name]):
            label = name if number == 0 else None
            ax.plot(run["curve"]["steps"], run["curve"]["rate"], color=colours[name], lw=1.2, alpha=0.8, label=label)
    for name, end in at_full_weight(results).items():
        ax.axvline(end, color=colours[name], lw=0.9, ls=":")
    guide(ax, y=0.5, ls="--")
    ax.text(0.99, 0.5, "collapse", va="bottom", ha="right", fontsize=7, color=MUTED, transform=ax.get_yaxis_transform())
    ax.set(yscale="symlog", xlabel="training step (dotted: weight at 1 for good)", ylabel="rate, validation (nats)")
    ax.set_yscale("symlog", linthresh=1)
    ax.set_ylim(0, None)
    log_ticks(ax, y=(0, 0.5, 1, 2, 4, 8, 16))
    ax.set_title("Rate while training, each seed")
    ax.legend(fontsize=7, ncols=2)


def draw_dimensions(ax: Axes, results: dict[str, Any], colours: dict[str, str]) -> None:
    for name in (WARM_UP, CYCLICAL, FREE_BITS, PLAIN):
        for number, run in enumerate(results["methods"][name]):
            kl = sorted(run["kl"], reverse=True)
            label = name if number == 0 else None
            ax.plot(range(1, len(kl) + 1), kl, color=colours[name], lw=1, marker=".", ms=4, alpha=0.8, label=label)
    ax.axhline(FREE_NATS, color=colours[FREE_BITS], lw=0.9, ls=":")
    ax.set(
        xlabel="latent dimension, by KL", ylabel="KL to the prior (nats)", title="Where the rate is (dotted: lambda)"
    )
    ax.legend(fontsize=7)


def draw_likelihoods(ax: Axes, results: dict[str, Any], colours: dict[str, str]) -> None:
    """Means over seeds; each seed as a dot. The bar from NLL to -ELBO is the inference gap."""
    names = (ALONE, PLAIN, WARM_UP, CYCLICAL, FREE_BITS, FACTORISED)
    for place, name in enumerate(reversed(names)):
        nll, bound = of_seeds(results, name, "nll"), [-elbo for elbo in of_seeds(results, name, "elbo")]
        colour = colours.get(name, "#98a1ad")
        ax.plot([fmean(nll), fmean(bound)], [place, place], color=colour, lw=5, alpha=0.35, solid_capstyle="butt")
        ax.plot(nll, [place] * len(nll), "o", color=colour, ms=4)
        ax.plot(bound, [place] * len(bound), "|", color=colour, ms=10)
    ax.set_yticks(range(len(names)), reversed(names))
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="nats an image: NLL (dots) to -ELBO (ticks), each seed", title="Likelihood and bound, test")
    ax.locator_params(axis="x", nbins=5)


def draw_images(ax: Axes, results: dict[str, Any]) -> None:
    rows = {name: unpack_images(packed)[:, 0] for name, packed in results["images"].items()}
    size = rows[PLAIN].shape[-1]
    for row, images in enumerate(rows.values()):
        for column, image in enumerate(images):
            left, top = column * (size + 1), row * (size + 1)
            ax.imshow(image, cmap="gray_r", vmin=0, vmax=1, extent=(left, left + size, top + size, top), zorder=2)
    ax.set_xlim(-0.5, PICTURED * (size + 1) - 0.5)
    ax.set_ylim(len(rows) * (size + 1) - 0.5, -0.5)
    ax.set_xticks([])
    ax.set_yticks([row * (size + 1) + size / 2 for row in range(len(rows))], rows)
    bare(ax)
    ax.set_title("What z says: E[x|z] at the z of test images")
