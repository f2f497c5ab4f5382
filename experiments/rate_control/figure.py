"""The curve and the courses of what steers, on the linear VAE and on the MLP's."""

from __future__ import annotations

import math

import numpy as np

from experiments.rate_control.claims import HELD, LAST, controlled, steered, title
from vae.claims import mean, values
from vae.experiment_figures import DASHES, FINE, INK, PALE, guide, note

COLORS = {"geco": "C1", "control": "C2", "free_bits": "C4"}
MARKERS = {"geco": "x", "control": "+", "free_bits": "s", "capacity1000": "1"}


def color_of(method: str) -> str:
    return COLORS.get(method) or ("C3" if method == "capacity1000" else "C5")


def figure(results: dict):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(11.5, 7.0))
    draw_linear_plane(axes[0, 0], results["linear"])
    draw_linear_course(axes[0, 1], results["linear"], "rate")
    draw_linear_course(axes[0, 2], results["linear"], "weight")
    draw_mlp_plane(axes[1, 0], results["mlp"])
    draw_mlp_course(axes[1, 1], results["mlp"])
    draw_floor(axes[1, 2], results["mlp"])
    return fig


def draw_linear_plane(ax, linear: dict) -> None:
    ax.plot(linear["curve"]["rate"], linear["curve"]["squared_error"], color=INK, lw=1.2, label="exact")
    for number, beta in enumerate(linear["betas"]):
        run = linear["runs"][f"fixed-{beta:g}"]
        there = run["rate"], run["squared_error"]
        ax.plot(*there, "o", color="C0", ms=7, mfc="white", label="fixed beta" * (number == 0))
        note(ax, f"{beta:g}", there, (6, 4), ha="left", color="C0")
    for method in steered(linear["gammas"]):
        for number, beta in enumerate(linear["set_points"]):
            run = linear["runs"][f"{method}-{beta:g}"]
            ax.plot(
                run["rate"],
                run["squared_error"],
                MARKERS.get(method, "2"),
                color=color_of(method),
                ms=9,
                mew=1.8,
                zorder=4,
                label=title(method) * (number == 0),
            )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="rate (nats)",
        ylabel="squared error of an image",
        title="Linear VAE: the exact curve",
    )
    ax.legend(fontsize=7.5, loc="lower left")


def draw_linear_course(ax, linear: dict, name: str) -> None:
    beta = 10 if 10 in linear["set_points"] else linear["set_points"][0]
    for method in steered(linear["gammas"]):
        trace = linear["runs"][f"{method}-{beta:g}"]["trace"]
        if trace[name]:
            ax.plot(trace["step"], trace[name], color=color_of(method), lw=1.3, label=title(method))
    exact = linear["exact"][f"{beta:g}"]["rate"] if name == "rate" else beta
    guide(ax, y=exact, color=INK, ls=DASHES)
    label = f"set-point {exact:.3f}" if name == "rate" else f"beta = {beta:g} of the exact optimum"
    note(ax, label, (linear["steps"], exact), ha="right")
    ax.set(xlabel="step", ylabel="rate (nats)" if name == "rate" else "weight on the KL", yscale="log")
    ax.set_title("Linear VAE: steered to one point" if name == "rate" else "... and the weight that was found")
    ax.legend(fontsize=7.5, loc="lower right")


def draw_mlp_plane(ax, mlp: dict) -> None:
    for number, beta in enumerate(mlp["betas"]):
        points = values(mlp["runs"][f"fixed-{beta:g}"], "test")
        rate, distortion = mean(points, "rate"), mean(points, "distortion")
        reach = 1.6
        step = reach * 20 / math.hypot(1, beta * 0.7)
        ax.plot(
            [rate - step / 2, rate + step / 2],
            [distortion + beta * step / 2, distortion - beta * step / 2],
            color="#a9b2bf",
            lw=1.0,
            zorder=1,
            label="slope -beta" * (number == 0),
        )
        there = values(points, "rate"), values(points, "distortion")
        ax.plot(*there, "o", color="C0", ms=5, label="fixed beta" * (number == 0))
        note(ax, f"{beta:g}", (rate, distortion), (5, 5), ha="left", color="C0")
    for method in (*steered(mlp["gammas"]), "free_bits"):
        points = values(mlp["runs"][method], "test")
        style = {"color": color_of(method), "ms": 5 if method == "free_bits" else 8, "mew": 1.6, "ls": ""}
        there = values(points, "rate"), values(points, "distortion")
        ax.plot(*there, MARKERS.get(method, "2"), label=title(method), **style)
    ax.set(xlabel="rate (nats)", ylabel="distortion (nats)", title="MLP VAE: test images")
    ax.legend(fontsize=7.5)


def draw_mlp_course(ax, mlp: dict) -> None:
    for method in steered(mlp["gammas"]):
        held, _ = controlled(method)
        for number, run in enumerate(mlp["runs"][method]):
            share = np.array(run["trace"][held]) / mlp["target"][held]
            epochs = np.array(run["trace"]["step"]) / mlp["steps"]
            ax.plot(
                100 * epochs,
                share,
                color=color_of(method),
                lw=1.0,
                alpha=0.8,
                label=f"{title(method)}: {held}" * (number == 0),
            )
    ax.axhspan(1 - HELD, 1 + HELD, color=PALE, lw=0, zorder=0)
    guide(ax, x=100 * (1 - LAST), ls=FINE)
    ax.set(ylim=(0.7, 1.3), xlim=(0, 100), xlabel="training (%)", ylabel="over the set-point")
    ax.set_title(f"MLP VAE: rate {mlp['target']['rate']:g}, distortion {mlp['target']['distortion']:g}")
    ax.legend(fontsize=7.5, loc="upper right")


def draw_floor(ax, mlp: dict) -> None:
    beta = mlp["free_beta"]
    place = np.arange(1, len(mlp["runs"]["free_bits"][0]["kl"]) + 1)
    shown = ((f"beta = {beta:g}", f"fixed-{beta:g}", "C0"), (f"free bits, beta = {beta:g}", "free_bits", "C4"))
    for label, key, color in shown:
        for number, run in enumerate(mlp["runs"][key]):
            ax.plot(place, run["kl"], "o-", color=color, ms=3.5, lw=1.0, label=label * (number == 0))
    guide(ax, y=mlp["free_nats"], color=INK, ls=DASHES)
    note(ax, f"floor {mlp['free_nats']:g}", (place[-1], mlp["free_nats"]), (0, -11), ha="right")
    ax.set(xlabel="latent, by its KL", ylabel="KL (nats), test images", title="MLP VAE: free bits")
    ax.legend(fontsize=7.5)
