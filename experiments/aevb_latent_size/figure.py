"""The bound against images seen, and the gap between training and test images."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.aevb_latent_size.claims import of_size, sizes_of
from experiments.aevb_latent_size.protocol import PUBLISHED, PUBLISHED_AT
from vae.experiment_figures import BLUE, FINE, GREEN, INK, OCHRE, ORANGE, PINK, dots, guide, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {3: OCHRE, 5: PINK, 10: ORANGE, 20: GREEN, 200: BLUE}


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    picture, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=[2.1, 1])
    draw_curves(left, results)
    draw_gaps(right, results)
    return picture


def draw_curves(ax: Axes, results: dict[str, Any]) -> None:
    for size in sizes_of(results):
        for number, run in enumerate(results["runs"][str(size)]):
            kept, colour = run["curve"], COLOURS[size]
            ax.plot(kept["images"], kept["train"], color=colour, lw=0.9, ls=FINE, alpha=0.8)
            ax.plot(kept["images"], kept["validation"], color=colour, lw=1.6, alpha=1 if number == 0 else 0.5)
            ax.plot(kept["images"][-1], run["elbo"], "o", color=colour, ms=4.5, zorder=3)
        ax.plot(PUBLISHED_AT, -PUBLISHED[size].others, "D", color=COLOURS[size], mfc="white", ms=6, mew=1.5, zorder=3)
    ends = {size: -PUBLISHED[size].others for size in sizes_of(results)}
    for size, y in ends.items():
        nudge = {20: -1.3, 200: 1.3}.get(size, 0.0) if {20, 200} <= ends.keys() else 0.0
        ax.text(PUBLISHED_AT * 1.25, y + nudge, f"$N_z$ = {size}", color=COLOURS[size], va="center")
    for style, words in (
        ({"lw": 1.6}, "held out (validation images)"),
        ({"lw": 0.9, "ls": FINE}, "training, mean over each epoch"),
        ({"lw": 0, "marker": "o", "ms": 4.5}, "test images, at the end"),
        ({"lw": 0, "marker": "D", "mfc": "white", "ms": 6, "mew": 1.5}, "test, reproduction after 300 epochs"),
    ):
        ax.plot([], [], color=INK, label=words, **style)
    ax.legend(loc="lower right", fontsize=8)
    ax.set(
        xscale="log",
        xlim=(4.5e4, PUBLISHED_AT * 3.2),
        ylim=(-172, -94),
        xlabel="training images seen",
        ylabel="ELBO (nats an image)",
        title="The lower bound, by number of latents",
    )


def draw_gaps(ax: Axes, results: dict[str, Any]) -> None:
    sizes = sizes_of(results)
    for place, size in enumerate(sizes):
        gaps = of_size(results, size, "gap")
        ax.bar(place, fmean(gaps), color=COLOURS[size], width=0.6)
        dots(ax, place, gaps, ms=5)
        note(ax, f"{fmean(of_size(results, size, 'active_units')):.0f} active", (place, max(0.0, *gaps)))
    ax.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    ax.grid(axis="x", visible=False)
    guide(ax, y=0)
    ax.margins(y=0.15)
    ax.set(
        xlabel="latents, $N_z$",
        ylabel="train less test ELBO (nats an image)",
        title="Overfitting, by number of latents",
    )
