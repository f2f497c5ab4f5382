"""Proxy, fluency and repetition against KL; KL against beta; the controller."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any

from experiments.rlhf_reward_hacking.claims import curve
from experiments.rlhf_reward_hacking.protocol import METHODS
from vae.claims import mean, values
from vae.experiment_figures import BLUE, DASHES, INK, MUTED, ORANGE, PALE, guide, level, log_ticks, note

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"REINFORCE": BLUE, "GRPO": ORANGE}


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(12, 6.8))
    panels = (
        ("reward", "proxy reward", "The proxy rises with KL ..."),
        ("nll", "judge's nats a character", "... while English is lost ..."),
        ("distinct4", "distinct-4 within an answer", "... to repetition"),
    )
    for ax, (key, label, title) in zip(axes[0], panels, strict=True):
        draw_against_kl(ax, results, key)
        ax.set(title=title, xlabel="KL(policy || reference), nats an answer", ylabel=label)
    draw_real(axes[0], results)
    axes[0, 0].legend(fontsize=8, loc="upper left")
    draw_beta(axes[1, 0], results)
    draw_controller(axes[1, 1], axes[1, 2], results)
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    return fig


def draw_against_kl(ax, results: dict[str, Any], key: str) -> None:
    """A large dot is the mean over seeds at the beta that is written beside it, small ones are the seeds."""
    for method in METHODS:
        colour = COLOURS[method]
        policies = {beta: of_seeds for beta, of_seeds in curve(results, method).items() if beta < inf}
        each = [of_seed for of_seeds in policies.values() for of_seed in of_seeds]
        x, y = ([mean(of_seeds, k) for of_seeds in policies.values()] for k in ("kl", key))
        if key == "reward":  # how the policies without a penalty went there
            for of_seed in policies[0.0]:
                ax.plot(of_seed["trace"]["kl"], of_seed["trace"][key], color=colour, lw=0.8, alpha=0.6)
        else:
            ax.plot(x, y, color=colour, lw=1)
        ax.plot(values(each, "kl"), values(each, key), "o", color=colour, ms=3, alpha=0.5)
        ax.plot(x, y, "o", color=colour, ms=6, mec="white", label=method)
        upper = (method == "REINFORCE") != (key == "distinct4")
        offset, side = ((-4, 5), "right") if upper else ((4, -11), "left")
        for beta, *at in zip(policies, x, y, strict=True):
            note(ax, f"{beta:g}", at, offset, ha=side, fontsize=7.5, color=colour)
    ax.plot(0, mean(results["reference"], key), "o", color=INK, ms=8, zorder=5, label="reference, beta infinite")
    ax.set_xscale("symlog", linthresh=0.1, linscale=0.5)
    ax.set_xlim(-0.02, 600)
    log_ticks(ax, x=(0, 0.1, 1, 10, 100))
    ax.margins(y=0.12)


def draw_real(axes, results: dict[str, Any]) -> None:
    """What real text has, as dashed lines."""
    levels = (
        (mean(results["classifiers"], "strings"), "real text on strings"),
        (results["real"]["nll"], "real text"),
        (results["real"]["distinct4"], "real text"),
    )
    for ax, (height, words) in zip(axes, levels, strict=True):
        guide(ax, y=height, lw=1, ls=DASHES, zorder=0)
        level(ax, height, words)


def predicted_kl(reference: list[dict[str, Any]], method: str, beta: float) -> float:
    """KL of the best policy if the reference's rewards are Gaussian: (sd / beta)^2 / 2; GRPO makes the sd 1."""
    sd = 1.0 if method == "GRPO" else mean(reference, "reward_sd")
    return (sd / beta) ** 2 / 2


def draw_beta(ax, results: dict[str, Any]) -> None:
    for method in METHODS:
        colour = COLOURS[method]
        policies = {beta: of_seeds for beta, of_seeds in curve(results, method).items() if 0 < beta < inf}
        ax.plot(list(policies), [mean(p, "kl") for p in policies.values()], "o", color=colour, label=method)
        betas = [0.008 * 400 ** (i / 40) for i in range(41)]
        ax.plot(betas, [predicted_kl(results["reference"], method, beta) for beta in betas], color=colour, lw=0.9)
        ax.axhline(mean(curve(results, method)[0.0], "kl"), color=colour, lw=0.9, ls=(0, (1, 2)))
    lowest = min(mean(curve(results, method)[0.0], "kl") for method in METHODS)
    level(ax, lowest, "dotted: beta 0", (0, -4), va="top")
    ax.set(
        xscale="log",
        yscale="log",
        xlim=(0.008, 3.2),
        ylim=(0.02, 1000),
        xlabel="beta",
        ylabel="KL, nats an answer",
        title="KL by beta; lines: (sd / beta)² / 2",
    )
    log_ticks(ax, x=(0.01, 0.05, 0.1, 0.5, 2), y=(0.1, 1, 10, 100))
    ax.legend(fontsize=8, loc="lower left")


def draw_controller(ax, right, results: dict[str, Any]) -> None:
    own = results["controller"]
    ax.axhspan(0.9 * own["target"], 1.1 * own["target"], color=PALE, lw=0, label="target ± 10%")
    guide(ax, y=own["target"], lw=1)
    for method, of_seeds in results["controlled"].items():
        for number, of_seed in enumerate(of_seeds):
            label = method if number == 0 else None
            ax.plot(of_seed["trace"]["kl"], color=COLOURS[method], lw=1, alpha=0.8, label=label)
            right.plot(of_seed["trace"]["beta"], color=COLOURS[method], lw=1.2, alpha=0.8)
    judged = own["updates"] - own["judged"]
    guide(ax, x=judged, ls=(0, (1, 2)))
    note(ax, "judged", (judged, 0), (3, 4), ha="left", fontsize=7.5, color=MUTED)
    ax.set(xlabel="update", ylabel="KL, nats an answer", ylim=(0, None), title="The controller holds the KL ...")
    ax.legend(fontsize=8, loc="lower center")
    right.set(xlabel="update", ylabel="beta", yscale="log", ylim=(0.02, 1), title="... by moving beta")
    log_ticks(right, y=(0.02, 0.05, 0.1, 0.2, 0.5, 1))
