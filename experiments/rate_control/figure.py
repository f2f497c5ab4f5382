"""The curve and the courses of what steers, on the linear VAE and on the MLP's."""

from __future__ import annotations

import math

import numpy as np

from experiments.rate_control.claims import LAST, controlled, mean, title

COLORS = {"geco": "C1", "control": "C2", "free_bits": "C4"}
DARK, GREY = "#1d2127", "#667080"


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
    ax.plot(linear["curve"]["rate"], linear["curve"]["squared_error"], color=DARK, lw=1.2, label="exact")
    for beta in linear["betas"]:
        run = linear["runs"][f"fixed-{beta:g}"]
        ax.plot(
            run["rate"],
            run["squared_error"],
            "o",
            color="C0",
            ms=7,
            mfc="white",
            label="fixed beta" * (beta == linear["betas"][0]),
        )
        ax.annotate(
            f"{beta:g}", (run["rate"], run["squared_error"]), (6, 4), textcoords="offset points", fontsize=8, color="C0"
        )
    for method in ("geco", "control", *(f"capacity{gamma}" for gamma in linear["gammas"])):
        for number, beta in enumerate(linear["set_points"]):
            run = linear["runs"][f"{method}-{beta:g}"]
            marker = {"geco": "x", "control": "+"}.get(method, "1" if method == "capacity1000" else "2")
            ax.plot(
                run["rate"],
                run["squared_error"],
                marker,
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
    for method in ("geco", "control", *(f"capacity{gamma}" for gamma in linear["gammas"])):
        trace = linear["runs"][f"{method}-{beta:g}"]["trace"]
        if trace[name]:
            ax.plot(trace["step"], trace[name], color=color_of(method), lw=1.3, label=title(method))
    exact = linear["exact"][f"{beta:g}"]["rate"] if name == "rate" else beta
    ax.axhline(exact, color=DARK, lw=0.8, ls=(0, (4, 2)))
    label = f"set-point {exact:.3f}" if name == "rate" else f"beta = {beta:g} of the exact optimum"
    ax.annotate(label, (linear["steps"], exact), (0, 4), textcoords="offset points", ha="right", fontsize=8)
    ax.set(xlabel="step", ylabel="rate (nats)" if name == "rate" else "weight on the KL", yscale="log")
    ax.set_title("Linear VAE: steered to one point" if name == "rate" else "... and the weight that was found")
    ax.legend(fontsize=7.5, loc="lower right")


def draw_mlp_plane(ax, mlp: dict) -> None:
    for number, beta in enumerate(mlp["betas"]):
        points = [run["test"] for run in mlp["runs"][f"fixed-{beta:g}"]]
        rate, distortion = (mean(p[name] for p in points) for name in ("rate", "distortion"))
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
        ax.plot(
            [p["rate"] for p in points],
            [p["distortion"] for p in points],
            "o",
            color="C0",
            ms=5,
            label="fixed beta" * (number == 0),
        )
        ax.annotate(f"{beta:g}", (rate, distortion), (5, 5), textcoords="offset points", fontsize=8, color="C0")
    for method in ("geco", "control", *(f"capacity{gamma}" for gamma in mlp["gammas"]), "free_bits"):
        points = [run["test"] for run in mlp["runs"][method]]
        marker = {"geco": "x", "control": "+", "free_bits": "s"}.get(method, "1" if method == "capacity1000" else "2")
        ax.plot(
            [p["rate"] for p in points],
            [p["distortion"] for p in points],
            marker,
            color=color_of(method),
            ms=8 if marker != "s" else 5,
            mew=1.6,
            ls="",
            label=title(method),
        )
    ax.set(xlabel="rate (nats)", ylabel="distortion (nats)", title="MLP VAE: test images")
    ax.legend(fontsize=7.5)


def draw_mlp_course(ax, mlp: dict) -> None:
    for method in ("geco", "control", *(f"capacity{gamma}" for gamma in mlp["gammas"])):
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
    ax.axhspan(0.98, 1.02, color="#dce0e6", lw=0, zorder=0)
    ax.axvline(100 * (1 - LAST), color=GREY, lw=0.8, ls=(0, (3, 2)))
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
    ax.axhline(mlp["free_nats"], color=DARK, lw=0.8, ls=(0, (4, 2)))
    ax.annotate(
        f"floor {mlp['free_nats']:g}",
        (place[-1], mlp["free_nats"]),
        (0, -11),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
    ax.set(xlabel="latent, by its KL", ylabel="KL (nats), test images", title="MLP VAE: free bits")
    ax.legend(fontsize=7.5)
