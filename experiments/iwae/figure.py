"""The toy's signal to noise, the bounds by K, the gains over the VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from experiments.iwae.claims import ASYMPTOTIC
from experiments.iwae.protocol import NAMES, PUBLISHED, title
from vae.claims import Gain
from vae.experiment_figures import BLUE, GREEN, INK, MUTED, ORANGE, guide, log_ticks, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"vae": MUTED, "elbo": GREEN, "iwae": BLUE, "dreg": ORANGE}


def figure(results: dict) -> Figure:
    import matplotlib.pyplot as plt

    lengths = [results, *([results["briefly"]] if "briefly" in results else [])]
    mosaic = [["toy", f"bounds {row}", f"gains {row}"] for row in range(len(lengths))]
    fig, axes = plt.subplot_mosaic(mosaic, figsize=(12, 4 * len(lengths)))
    draw_toy(axes["toy"], results["toy"])
    axes["toy"].set_title("The toy: signal to noise of the gradients")
    for row, of in enumerate(lengths):
        epochs = of["protocol"]["epochs"]
        draw_bounds(axes[f"bounds {row}"], of)
        axes[f"bounds {row}"].set_title(f"Bounds on log p of test images, {epochs} epochs")
        draw_gains(axes[f"gains {row}"], of)
        axes[f"gains {row}"].set_title(f"Gain over the VAE, {epochs} epochs")
    fig.get_layout_engine().set(w_pad=0.12)
    return fig


def draw_toy(ax: Axes, toy: dict) -> None:
    k = np.array(toy["samples"], float)
    lines = (
        ("dreg b", "encoder (b), DReG", "dreg", "o-", 1.0),
        ("iwae mu", "model (mu)", "vae", "s-", 0.5),
        ("iwae b", "encoder (b), IWAE", "iwae", "o-", -1.0),
    )
    for row, label, colour, style, _ in lines:
        snr = np.array([np.nan if s is None else s for s in toy[row]["snr"]])
        ax.plot(k, snr, style, color=COLOURS[colour], label=label, ms=4)
        sign = -0.5 if row == "iwae b" else 0.5
        tail = k >= ASYMPTOTIC
        slant = snr[-1] * (k[tail] / k[-1]) ** sign * (1.5 if sign > 0 else 0.67)
        ax.plot(k[tail], slant, color=INK, lw=0.8, ls=":")
        rising = sign > 0
        words, offset = ("K$^{1/2}$", (-4, 5)) if rising else ("K$^{-1/2}$", (-4, -12))
        note(ax, words, (k[tail][1], slant[1]), offset, ha="right")
    own = toy["iwae b, own mean"]
    seen = [(a, s, e) for a, s, e in zip(k, own["snr"], own["se"], strict=True) if s is not None]
    ax.errorbar(
        *np.array(seen).T,
        fmt="D",
        mfc="white",
        color=COLOURS["iwae"],
        ms=5,
        lw=0.8,
        label="the same, mean by IWAE itself",
    )
    ax.set(xscale="log", yscale="log", xlabel="K", ylabel="|mean| / sd of the gradient")
    log_ticks(ax, x=k)
    ax.legend(fontsize=7.5, loc="upper left")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 8)


def draw_bounds(ax: Axes, results: dict) -> None:
    for cell in PUBLISHED:
        layers, objective, k = cell
        if not (found := results["cells"].get(title(cell))):
            continue
        ks = sorted(found["bounds"][0], key=int)
        values = np.array([[bounds[x] for x in ks] for bounds in found["bounds"]])
        x = [int(x) for x in ks]
        style = {"ls": "-" if layers == "1" else "--", "color": COLOURS[objective], "alpha": 0.55 if k == 50 else 1.0}
        for seed in values:
            ax.plot(x, seed, lw=0.5, **style)
        label = f"{NAMES[objective]}-{k}" + (", 2 layers" if layers == "2" else "")
        ax.plot(x, values.mean(0), marker={1: "o", 5: "s", 50: "^"}[k], ms=4.5, label=label, **style)
    ax.set(xscale="log", xlabel="K of the bound L$_K$", ylabel="nats an image")
    log_ticks(ax, x=x)
    ax.legend(loc="lower right", fontsize=8)


def draw_gains(ax: Axes, results: dict) -> None:
    places, labels = [], []
    for cell, published in PUBLISHED.items():
        layers, objective, k = cell
        found = Gain.of(results["cells"], f"{layers}L-vae-1", title(cell))
        if found is None or (objective, k) == ("vae", 1):
            continue
        at = len(places)
        places.append(at)
        name = NAMES[objective].replace(" ", "\n")
        labels.append(f"{name}-{k}" + ("" if layers == "1" else "\n2 layers"))
        ax.bar(at, found.mean, 0.6, color=COLOURS[objective], alpha=0.45)
        ax.errorbar(at, found.mean, 1.96 * found.se, color=COLOURS[objective], capsize=4, lw=1.2)
        offsets = 0.18 * (np.arange(len(found.seeds)) - (len(found.seeds) - 1) / 2)
        ax.plot(at + offsets, found.seeds, "o", color=COLOURS[objective], ms=4, mec="white", mew=0.6)
        base = PUBLISHED[layers, "vae", 1]
        for value, of, marker, label in (
            (published.nll, base.nll, "D", "paper, 3280 epochs"),
            (published.nbip, base.nbip, "v", "reproduction (nbip), 3280 epochs"),
        ):
            if value:
                label = None if label in ax.get_legend_handles_labels()[1] else label
                ax.plot(at + 0.38, float(of) - float(value), marker, color=INK, ms=5, label=label, ls="none")
    guide(ax, y=0)
    ax.set_xticks(places, labels, fontsize=9 if len(places) < 5 else 7)
    ax.set_xlim(-0.6, len(places) - 0.2)
    ax.set_ylabel("nats an image (95% interval; dots: seeds)")
    ax.grid(axis="x", visible=False)
    if ax.get_legend_handles_labels()[0]:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.22 * (high - low))
        ax.legend(fontsize=7.5, loc="upper left")
