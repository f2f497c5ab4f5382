"""The rate-distortion plane, and the part of the codes that are used."""

from __future__ import annotations

from statistics import fmean

from experiments.codes_on_one_plane.claims import usage
from experiments.codes_on_one_plane.protocol import CURVES, FAMILIES, PRIORS
from vae.claims import mean
from vae.experiment_figures import INK, MUTED, note

MARKS = {"fsq": ("o", "C0"), "vq": ("s", "C1"), "vq_plain": ("^", "C4")}


def figure(results: dict):
    import matplotlib.pyplot as plt

    fig, (plane, used) = plt.subplots(1, 2, figsize=(10.5, 4.2), width_ratios=[1.7, 1])
    draw_plane(plane, results)
    draw_usage(used, results)
    return fig


def where(points: list[dict]) -> tuple[float, float]:
    return mean(points, "rate"), mean(points, "distortion")


def draw_plane(ax, results: dict) -> None:
    points, sizes, middle = results["points"], results["sizes"], results["middle"]
    for under, style, color in (("gaussian", "-D", INK), ("realnvp", "--d", MUTED)):
        curve = [where(points[f"{under}-{beta:g}"]) for beta in results["betas"]]
        ax.plot(*zip(*curve, strict=True), style, color=color, ms=4, lw=1.2, label=CURVES[under])
        for beta, there in zip(results["betas"], curve, strict=True) if under == "gaussian" else ():
            note(ax, f"{beta:g}", there, (5, 3), ha="left", color=INK)
    for family, (marker, color) in MARKS.items():
        line = [where(points[f"{family}-{size}-autoregressive"]) for size in sizes]
        ax.plot(
            *zip(*line, strict=True),
            "-",
            marker=marker,
            color=color,
            ms=7,
            label=f"{FAMILIES[family]}, autoregressive prior",
        )
        for size, there in zip(sizes, line, strict=True):
            if family == "fsq":
                note(ax, f"{size}", there, (-5, -11), ha="right", color=color)
    for family in ("fsq", "vq"):
        marker, color = MARKS[family]
        for prior in PRIORS[:2]:
            there = where(points[f"{family}-{middle}-{prior}"])
            ax.plot(*there, marker=marker, color=color, ms=7, mfc="white" if prior == "uniform" else color, alpha=0.6)
    ax.plot([], [], "o", color="C0", mfc="white", alpha=0.6, label="uniform prior (hollow), categorical (pale)")
    ax.set(
        xlabel="rate (nats per image)",
        ylabel="distortion (nats per image)",
        title="One network, one plane (beta, codes of FSQ at points)",
    )
    ax.legend(fontsize=7.5)


def draw_usage(ax, results: dict) -> None:
    sizes = results["sizes"]
    for family, (marker, color) in MARKS.items():
        shares = [100 * fmean(usage(results, family, size)) for size in sizes]
        ax.plot(sizes, shares, "-", marker=marker, color=color, ms=6, label=FAMILIES[family])
    ax.set(
        xscale="log", ylim=(0, 105), xlabel="codes there are", ylabel="used by test images (%)", title="Codes in use"
    )
    ax.legend(fontsize=7.5, loc="lower left")
