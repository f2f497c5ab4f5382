"""NLL under each prior, where the rate goes, samples and pseudo-inputs."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.priors.claims import difference, title
from experiments.priors.protocol import NAMES, OPTION, PLAIN, PUBLISHED, TITLES, VAMP
from vae.claims import Gain
from vae.experiment_figures import BLUE, GREEN, MUTED, note, unpack_images

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {PLAIN: MUTED, "mixture": GREEN, VAMP: BLUE}


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    shown = list(results["data"])
    strips = [  # a column a data set, if there are two
        (data, prior, key)
        for prior, key in [
            *((prior, "samples") for prior in results["protocol"]["priors"]),
            (VAMP, "pseudo_inputs"),
        ]
        for data in shown
    ]
    picture = plt.figure(figsize=(11, 3.9 + 0.85 * math.ceil(len(strips) / 2)))
    above, below = picture.subfigures(2, 1, height_ratios=[3.9, 0.85 * math.ceil(len(strips) / 2)])
    axes = above.subplots(1, len(shown) + 1)
    for ax, data in zip(axes, shown, strict=False):
        draw_gain(ax, results, data)
    draw_rate(axes[-1], results)
    for ax, (data, prior, key) in zip(below.subplots(math.ceil(len(strips) / 2), 2, squeeze=False).flat, strips):  # noqa: B905
        images = unpack_images(results["data"][data][prior][key])
        ax.imshow(np.concatenate(list(images), axis=1), cmap="gray", vmin=0, vmax=1)
        of = "samples from" if key == "samples" else "pseudo-inputs of"
        ax.set_title(f"{of} {NAMES[prior]}" + f", {TITLES[data]}" * (len(shown) > 1), fontsize=8, weight="normal")
    for ax in below.axes:
        ax.set_axis_off()
    return picture


def draw_gain(ax: Axes, results: dict[str, Any], data: str) -> None:
    """NLL of each prior: the seeds joined, since they share initial weights' seeds and images; the paper's at the side."""
    protocol, of_prior = results["protocol"], results["data"][data]
    places = range(len(of_prior))
    for seed in range(len(protocol["seeds"])):
        ax.plot(places, [found["nll"][seed] for found in of_prior.values()], color="#b9c0ca", lw=1, zorder=1)
    for place, (prior, found) in zip(places, of_prior.items(), strict=True):
        colour, nll = COLOURS[prior], found["nll"]
        ax.plot([place] * len(nll), nll, "o", color=colour, ms=5, zorder=3)
        if prior != PLAIN:
            better = Gain.of(of_prior, PLAIN, prior)
            words = f"gain {better.mean:.2f} ± {better.se:.2f}"
            note(ax, words, (place, min(nll)), (0, -8), va="top", color=colour, fontsize=9)
    ax.margins(x=0.6 / len(of_prior))
    low = min(min(found["nll"]) for found in of_prior.values())
    high = max(max(found["nll"]) for found in of_prior.values())
    ax.set_ylim(low - 0.55 * (high - low), high + 0.12 * (high - low))
    ax.set_xticks(
        places, [title(prior, protocol).replace(", ", ",\n") if prior in OPTION else NAMES[prior] for prior in of_prior]
    )
    ax.set_ylabel(f"-$L_{{{protocol['samples']}}}$ (nats a test image)")
    ax.set_title(f"{TITLES[data]}, NLL after {protocol['epochs']} epochs")
    ax.text(
        0.98,
        0.98,
        f"published: {difference(data):.2f} nats better\n({' to '.join(PUBLISHED[data].values())})",
        transform=ax.transAxes,
        ha="right",
        va="top",
        fontsize=8,
        color=COLOURS[VAMP],
    )


def draw_rate(ax: Axes, results: dict[str, Any]) -> None:
    """The rate in its two parts, of every prior and data set."""
    labels, place = [], 0
    for data, of_prior in results["data"].items():
        for prior, found in of_prior.items():
            information, marginal = (statistics.fmean(found[key]) for key in ("mutual_information", "marginal_kl"))
            ax.bar(place, information, 0.65, color=COLOURS[prior])
            ax.bar(place, marginal, 0.65, bottom=information, color=COLOURS[prior], alpha=0.35)
            ax.text(place, information + marginal / 2, f"{marginal:.1f}", ha="center", va="center", fontsize=8)
            ax.text(place, information / 2, f"{information:.1f}", ha="center", va="center", fontsize=8, color="white")
            labels.append(
                NAMES[prior].replace(" of ", "\nof ")
                + ("\n" + TITLES[data].replace("-", "-\n")) * (len(results["data"]) > 1)
            )
            place += 1
        place += 0.5
    ticks = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches[::2]]
    ax.set_xticks(ticks, labels, fontsize=8)
    ax.grid(axis="x", visible=False)
    ax.set(ylabel="nats an image", title="Where the rate goes")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 1.2)
    ax.text(
        0.02,
        0.98,
        "pale: KL(q(z) || p(z))\nfull: information about the image",
        transform=ax.transAxes,
        va="top",
        fontsize=8,
    )
