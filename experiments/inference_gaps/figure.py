"""The gap in two, of every model and image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from experiments.inference_gaps.claims import WORDS, pooled
from experiments.inference_gaps.protocol import NAMES, PAPER_GAPS
from vae.experiment_figures import BLUE, INK, MUTED, ORANGE, note

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

APPROXIMATION, AMORTISATION = BLUE, ORANGE


def figure(results: dict) -> Figure:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(13, 4), gridspec_kw={"width_ratios": [1.5, 1, 1]})
    draw_gaps(axes[0], results)
    axes[0].set_title("The gap, split in two")
    for ax, model in zip(axes[1:], results["models"], strict=False):
        draw_images(ax, results["models"][model])
        ax.set_title(f"{NAMES[model]}: each test image")
    fig.get_layout_engine().set(w_pad=0.12)
    return fig


def draw_gaps(ax: Axes, results: dict) -> None:
    def measured(seeds: list[dict]) -> tuple[dict, dict]:
        found = {name: pooled(seeds, name) for name in WORDS}
        return {name: value for name, (value, _) in found.items()}, {
            f"{n}_ci95": half for n, (_, half) in found.items()
        }

    bars = []
    exact = results["exact"]
    bars.append(("linear,\nexact", exact["exact_gaps"], None))
    bars.append(("linear,\nmeasured", exact["gaps"], exact["gaps"]))
    for model, seeds in results["models"].items():
        bars.append((f"{NAMES[model]},\npaper*", PAPER_GAPS[model], None))
        trained = results.get("training", {}).get(model)
        if trained:
            bars.append((f"{NAMES[model]},\ntraining", *measured(trained)))
        bars.append((f"{NAMES[model]},\n{'test' if trained else 'ours'}", *measured(seeds)))
    for at, (_, gaps, interval) in enumerate(bars):
        faint = 0.4 if interval is None else 0.95
        bottom, top = gaps["approximation_gap"], gaps["inference_gap"]
        ax.bar(at, bottom, 0.65, color=APPROXIMATION, alpha=faint)
        ax.bar(at, top - bottom, 0.65, bottom, color=AMORTISATION, alpha=faint)
        if interval is not None:
            style = {"color": INK, "lw": 1, "capsize": 3}
            ax.errorbar(at - 0.12, bottom, interval["approximation_gap_ci95"], **style)
            ax.errorbar(at + 0.12, top, interval["inference_gap_ci95"], **style)
        above = top if interval is None else top + interval["inference_gap_ci95"]
        note(ax, f"{top:.2f}", (at, above))
    ax.bar(0, 0, color=APPROXIMATION, label="approximation: the family of q")
    ax.bar(0, 0, color=AMORTISATION, label="amortisation: the encoder")
    ax.set_xticks(range(len(bars)), [label for label, _, _ in bars], fontsize=7.5)
    ax.set_ylabel("log p(x) - ELBO, nats an image (95%)")
    ax.grid(axis="x", visible=False)
    ax.set_ylim(0, ax.get_ylim()[1] * 1.2)
    ax.legend(fontsize=8, loc="upper left")
    ax.set_xlabel("* as recalled, 3280 epochs", fontsize=7.5, color=MUTED)


def draw_images(ax: Axes, seeds: list[dict]) -> None:
    x, y = (np.mean([seed["images"][gap] for seed in seeds], 0) for gap in ("approximation", "amortisation"))
    point = "an image" + f", mean of {len(seeds)} seeds" * (len(seeds) > 1)
    ax.plot(x, y, "o", ms=4, color=MUTED, alpha=0.7, mew=0, label=point)
    right, top = 1.25 * x.max(), 1.12 * y.max()
    ax.plot([0, right], [0, right], color=INK, lw=0.8, ls=":", label="equal")
    ax.plot(x.mean(), y.mean(), "D", color=INK, ms=7, mec="white", ls="none", label="mean")
    ax.set(xlim=(min(0, 1.1 * x.min()), right), ylim=(min(0, 1.1 * y.min()), top))
    ax.set(xlabel="approximation gap, nats", ylabel="amortisation gap, nats")
    ax.legend(loc="upper left", fontsize=8)
