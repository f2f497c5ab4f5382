"""Fits and landscapes of both directions, the estimators as values and as losses."""

from __future__ import annotations

import math

import numpy as np

from experiments.kl_directions.claims import nearest
from experiments.kl_directions.protocol import ESTIMATORS, MIXTURES, SHIFTS, exact_statistics
from vae.experiment_figures import BLUE, GREEN, INK, ORANGE, SKY, log_ticks, note

GREY, FORWARD, REVERSE, BROAD = "#c9ced6", ORANGE, BLUE, SKY
COLOURS = {"k1": GREEN, "k2": REVERSE, "k3": FORWARD}


def density(x: np.ndarray, mean: float, sd: float) -> np.ndarray:
    return np.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))


def reverse_landscape(name: str, means: np.ndarray, sds: np.ndarray) -> np.ndarray:
    """KL(q || p) in nats by quadrature, (sds, means)."""
    noise = np.linspace(-7, 7, 1401)
    weight = density(noise, 0, 1) * (noise[1] - noise[0])
    z = means[None, :, None] + sds[:, None, None] * noise
    centre, sd = MIXTURES[name]["centre"], MIXTURES[name]["sd"]
    log_p = np.logaddexp(-0.5 * ((z - centre) / sd) ** 2, -0.5 * ((z + centre) / sd) ** 2)
    log_p -= math.log(2 * sd * math.sqrt(2 * math.pi))
    return -0.5 * math.log(2 * math.pi * math.e) - np.log(sds)[:, None] - (weight * log_p).sum(-1)


def draw_fits(ax, name: str, results: dict) -> None:
    p = MIXTURES[name]
    x = np.linspace(-7, 7, 800)
    ax.fill_between(x, 0.5 * (density(x, p["centre"], p["sd"]) + density(x, -p["centre"], p["sd"])), color=GREY, lw=0)
    mean, sd = results["fits"][f"{name}, forward"]["end"][0]
    ax.plot(x, density(x, mean, sd), color=FORWARD, label="KL(p || q): covers both")
    ends = results["fits"][f"{name}, reverse"]["end"]
    for number, optimum in enumerate(p["reverse"]):
        end = next(end for end in ends if nearest(end, p["reverse"])[1] == optimum)
        broad = optimum[0] == 0
        label = {0: "KL(q || p): picks one", 1: "its broad local minimum"}.get(number)
        style = {"color": BROAD, "ls": (0, (3, 1.5))} if broad else {"color": REVERSE}
        ax.plot(x, density(x, *end), **style, label=label)
    ax.set(xlim=(-7, 7), ylim=(0, None), yticks=[], xlabel="x")
    ax.grid(False)
    ax.spines["left"].set_visible(False)


def draw_landscape(ax, name: str, results: dict) -> None:
    means, sds = np.linspace(-5, 5, 121), np.geomspace(0.3, 5, 80)
    levels = [0.75, 0.8, 0.9, 1.05, 1.3, 1.7, 2.3, 3.2, 4.5, 6.5, 9.5]
    kl = reverse_landscape(name, means, sds)
    ax.contourf(means, sds, kl, levels=[0, *levels, 1e3], cmap="Blues_r", alpha=0.75, norm="log", vmin=0.5, vmax=14)
    for path in results["fits"][f"{name}, reverse"]["path"]:
        ax.plot(*np.array(path).T, color=INK, lw=0.8)
        ax.plot(*path[0], "o", color=INK, ms=2.5)
    for mean, sd, divergence in MIXTURES[name]["reverse"]:
        ax.plot(mean, sd, "*", color="white", mec=INK, mew=0.8, ms=11, zorder=5)
        note(ax, f"{divergence:.3f}", (mean, sd), (0, -13), zorder=6, color="white")
    mean, sd, _ = MIXTURES[name]["forward"][0]
    ax.plot(mean, sd, "D", color=FORWARD, mec="white", ms=6, zorder=5)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8}
    note(ax, "optimum of KL(p || q)", (mean, sd), (0, 7), bbox=box)
    ax.set(xlim=(-5, 5), ylim=(0.3, 5), yscale="log", xlabel="mean of q", ylabel="sd of q")
    log_ticks(ax, y=(0.3, 0.5, 1, 2, 4))
    ax.grid(False)


def draw_factorised(ax, results: dict) -> None:
    rho = 0.9
    angle = np.linspace(0, 2 * np.pi, 200)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    root = np.linalg.cholesky(np.array([[1, rho], [rho, 1]]))
    for radius in (1, 2):
        ax.fill(*(radius * root @ circle), color=GREY, alpha=0.55, lw=0)
        for direction, colour in (("forward", FORWARD), ("reverse", REVERSE)):
            scale = np.sqrt(results["factorised"][str(rho)][direction]["variances"])[:, None]
            ax.plot(*(radius * scale * circle), color=colour, lw=1.6 if radius == 1 else 0.9)
    note(ax, "KL(p || q)", (-1.41, 1.41), (-3, 3), ha="right", color=FORWARD)
    note(ax, "KL(q || p)", (0.62, -0.62), (4, -6), ha="left", color=REVERSE)
    ax.set(ylim=(-2.3, 2.3), xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    ax.set_aspect("equal", adjustable="datalim")


def draw_estimators(ax, results: dict) -> None:
    """bias / KL and sd / KL, ours on the exact value."""
    offsets = {"k1": -0.3, "k2": 0.0, "k3": 0.3}
    for place, shift in enumerate(SHIFTS):
        true = shift**2 / 2
        for name, (bias, sd) in exact_statistics(shift).items():
            at = place + offsets[name]
            ours = results["estimators"][str(shift)][name]
            ax.bar(at, sd / true, 0.26, color=COLOURS[name], alpha=0.35)
            ax.plot(at, ours["sd"] / true, "o", color=COLOURS[name], ms=4, label=name if place == 0 else None)
            text = f"{ours['sd'] / true:.2f}\nbias {100 * bias / true:.2g}%"
            note(ax, text, (at, sd / true), (0, 5), fontsize=6.5, linespacing=1.3)
    ax.set(xticks=[0, 1], yscale="log", ylim=(0.9, 60), ylabel="sd of one draw / KL")
    ax.set_xticklabels([f"KL = {shift**2 / 2:g}" for shift in SHIFTS])
    log_ticks(ax, y=(1, 2, 5, 10, 20, 50))
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper right", ncols=3)


def draw_losses(ax, results: dict) -> None:
    means, sds = np.linspace(-1.5, 4.5, 100), np.linspace(0.6, 4.0, 80)
    kl = reverse_landscape("near", means, sds)
    ax.contour(means, sds, kl, levels=[0.7, 0.75, 0.8, 0.85, 0.95, 1.1, 1.4], colors=GREY, linewidths=0.7)
    words = {"k1": "k1: no gradient, noise", "k2": "k2: to min KL(q || p)", "k3": "k3: to min KL(p || q)"}
    for name in ESTIMATORS:
        fit = results["as_loss"][name]
        path = np.array(fit["path"][0])
        ax.plot(*path.T, color=COLOURS[name], marker=".", ms=3, lw=1.2, label=words[name])
        ax.plot(*fit["end"][0], "o", color=COLOURS[name], ms=6, mec="white", zorder=4)
    for mean, sd, _ in [*MIXTURES["near"]["forward"], *MIXTURES["near"]["reverse"][1:]]:
        ax.plot(mean, sd, "*", color="white", mec=INK, mew=0.8, ms=12, zorder=3)
    ax.set(xlim=(-1.5, 4.5), ylim=(0.6, 4.0), xlabel="mean of q", ylabel="sd of q")
    ax.grid(False)
    ax.legend(loc="lower left", fontsize=8)


def figure(results: dict):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(12, 7), gridspec_kw={"width_ratios": [1.05, 1.05, 1]})
    draw_fits(axes[0, 0], "far", results)
    axes[0, 0].set_title("One Gaussian for two modes, both ways")
    axes[0, 0].legend(loc="upper center", bbox_to_anchor=(0.5, 0.98), fontsize=8)
    axes[0, 0].set_ylim(0, 1.15)
    draw_landscape(axes[0, 1], "near", results)
    axes[0, 1].set_title("KL(q || p), modes ±3: 18 starts, three minima")
    draw_factorised(axes[0, 2], results)
    axes[0, 2].set_title("Factorised q, correlation 0.9")
    draw_fits(axes[1, 0], "near", results)
    axes[1, 0].set_title("Broader modes: the same three fits")
    axes[1, 0].set_ylim(0, 0.47)
    draw_losses(axes[1, 1], results)
    axes[1, 1].set_title("k1, k2, k3 as losses, from one start")
    draw_estimators(axes[1, 2], results)
    axes[1, 2].set_title("k1, k2, k3 as values: dots on exact bars")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    return fig
