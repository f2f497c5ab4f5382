"""Latent spaces, samples, interpolations and distances, a column for each weight."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch

from experiments.what_the_kl_term_does.claims import of_seeds
from experiments.what_the_kl_term_does.protocol import GRID, NUMBERS, PATH, REACH
from vae.experiment_figures import BLUE, INK, OCHRE, ORANGE, dots, guide, note, unpack_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOURCES = {"prior": ORANGE, "fitted Gaussian": OCHRE, "aggregate posterior": BLUE}
KINDS = {"0": "autoencoder", "1": "VAE"}


def figure(results: dict[str, Any]) -> Figure:
    """A column for each weight; the numbers below."""
    import matplotlib.pyplot as plt

    betas = list(results["runs"])
    picture = plt.figure(figsize=(11, 10.6))
    above, below = picture.subfigures(2, 1, height_ratios=[3.5, 1])
    axes = above.subplots(4, len(betas), height_ratios=[1.1, 1, 0.42, 0.42])
    for column, beta in enumerate(betas):
        draw_map(axes[0, column], results["maps"][beta])
        axes[0, column].set_title(f"β = {beta}, {KINDS.get(beta, 'a heavy KL')}")
        shown, plane_of = results["runs"][beta][0]["pictures"], results["maps"][beta]["pictures"]["plane"]
        draw_images(axes[1, column], plane_of, GRID, extent=REACH)
        draw_images(axes[2, column], shown["samples"], 9)
        draw_images(axes[3, column], shown["paths"], PATH)
    for row, label in enumerate(
        (
            "2 latents: $q(z)$ of test images\n(axes differ)",
            f"2 latents: the decoded plane,\n±{REACH} sd of the prior",
            f"{NUMBERS} latents:\nprior samples",
            f"{NUMBERS} latents:\n0 to 2, 7 to 1, 5 to 3",
        )
    ):
        axes[row, 0].set_ylabel(label, color=INK)
    left, middle, right = below.subplots(1, 3)
    draw_frechet(left, results)
    draw_distances(middle, results)
    draw_cost(right, results)
    return picture


def draw_map(ax: Axes, run: dict[str, Any]) -> None:
    """Draws of q(z|x), the prior's circles of 1 and 2 standard deviations."""
    from matplotlib.patches import Circle

    points, labels = torch.tensor(run["pictures"]["codes"]), run["pictures"]["labels"]
    ax.scatter(points[:, 0], points[:, 1], c=labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=4, lw=0)
    for radius, style in ((1, "-"), (2, "--")):
        ax.add_patch(Circle((0, 0), radius, fill=False, color=INK, lw=1.2, ls=style))
    reach = max(3.0, 1.05 * points.abs().max().item())
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.text(
        0.03,
        0.03,
        f"{100 * run['empty']:.0f} % of prior draws: q(z) < p(z)/10",
        transform=ax.transAxes,
        fontsize=8,
        bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1},
    )


def draw_images(ax: Axes, packed: dict[str, Any], columns: int, extent: float | None = None) -> None:
    """Images side by side, ink dark on white; with the prior's circles where they are a plane's."""
    from matplotlib.patches import Circle

    images = unpack_images(packed)
    n, height, width = images.shape
    sheet = images.reshape(n // columns, columns, height, width).transpose(0, 2, 1, 3).reshape(-1, columns * width)
    # images stand for the points at their centres
    edge = None if extent is None else extent * columns / (columns - 1)
    box = None if edge is None else (-edge, edge, -edge, edge)
    ax.imshow(1 - sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=box)
    if edge is not None:
        for radius, style in ((1, "-"), (2, "--")):
            ax.add_patch(Circle((0, 0), radius, fill=False, color=ORANGE, lw=1, ls=style))
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)


def draw_frechet(ax: Axes, results: dict[str, Any]) -> None:
    betas = list(results["runs"])
    for place, (source, colour) in enumerate(SOURCES.items()):
        for number, beta in enumerate(betas):
            found, x = of_seeds(results, beta, source), number + 0.26 * (place - 1)
            ax.bar(x, statistics.fmean(found), 0.24, color=colour, label=source if number == 0 else None)
            dots(ax, x, found, ms=3, zorder=2)
    floor = statistics.fmean(of_seeds(results, "1", "training images"))
    guide(ax, y=floor, color=INK, lw=1, ls=":", label="training images")
    ax.set_xticks(range(len(betas)), betas)
    ax.grid(axis="x", visible=False)
    heights = [found for beta in betas for source in SOURCES for found in of_seeds(results, beta, source)]
    ax.set_yscale("log")
    ax.set_ylim(0.5 * min(*heights, floor), 40 * max(heights))  # room for the legend
    ax.legend(fontsize=7.5, title="codes drawn from", title_fontsize=7.5, ncols=2, loc="upper center")
    ax.set(xlabel="β", ylabel="Frechet distance to test images", title="Samples, by their codes")


def draw_lines(ax: Axes, results: dict[str, Any], keys: dict[str, str]) -> None:
    betas = list(results["runs"])
    for key, label in keys.items():
        means = [statistics.fmean(of_seeds(results, beta, key)) for beta in betas]
        (line,) = ax.plot(range(len(betas)), means, "o-", ms=4, label=label)
        for number, beta in enumerate(betas):
            found = of_seeds(results, beta, key)
            ax.plot([number] * len(found), found, ".", color=line.get_color(), ms=4, alpha=0.6)
    ax.set_xticks(range(len(betas)), betas)


def draw_distances(ax: Axes, results: dict[str, Any]) -> None:
    images = results["runs"]["1"][0]["images"]
    draw_lines(ax, results, {"marginal_kl": f"mixture over {images:,} images", "moment_kl": "its moments alone"})
    ax.legend(fontsize=7.5)
    ax.set(yscale="log", xlabel="β", ylabel="KL to N(0, I), nats", title="Aggregate posterior to prior")


def draw_cost(ax: Axes, results: dict[str, Any]) -> None:
    draw_lines(ax, results, {"distortion": "distortion"})
    betas = list(results["runs"])
    for number, beta in enumerate(betas):
        active = statistics.fmean(of_seeds(results, beta, "active_units"))
        at = statistics.fmean(of_seeds(results, beta, "distortion"))
        note(ax, f"{active:.3g} active", (number, at), (-5, 5), ha="right")
    ax.margins(x=0.25, y=0.15)
    ax.set(xlabel="β", ylabel="distortion, nats a test image", title=f"Distortion, active units of {NUMBERS}")
