"""How much lower every method brings both KLs than its seed's start, and the reverse one by where the answers came from."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.on_policy_distillation.claims import DIVERGENCES, WHOLE
from vae.claims import values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"forward": "#0072b2", "jensen_shannon": "#009e73", "reverse": "#d55e00"}
MARKERS = {"text": "s", "half own": "D", "own": "o"}


def lowered(results: dict[str, Any], method: str, key: str) -> list[float]:
    """The start's KL less the method's, of each seed, in nats an answer."""
    starts = values(results["start"], key)
    return [start - end for start, end in zip(starts, values(results["methods"][method], key), strict=True)]


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8))
    for method in results["methods"]:
        where, _, divergence = method.partition(", ")
        whole = method == WHOLE
        left.plot(
            lowered(results, method, "forward"),
            lowered(results, method, "reverse"),
            "*" if whole else MARKERS[where],
            color=COLOURS["reverse" if whole else divergence],
            ms=11 if whole else 7,
            mec="white",
            ls="none",
            label=method.replace("_", "-"),
        )
    left.set(
        xlabel="KL(teacher || student) lowered by, nats an answer",
        ylabel="KL(student || teacher) lowered by",
        title="Both ways, a point a seed",
    )
    left.legend(fontsize=7.5)
    for divergence in DIVERGENCES:
        pair = [lowered(results, f"{where}, {divergence}", "reverse") for where in ("text", "own")]
        for of_seed in zip(*pair, strict=True):
            right.plot([0, 1], of_seed, "o-", color=COLOURS[divergence], ms=4, lw=0.8, alpha=0.6)
        right.annotate(
            divergence.replace("_", "-"),
            (1, fmean(pair[1])),
            (8, {"reverse": 5, "jensen_shannon": -5}.get(divergence, 0)),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=COLOURS[divergence],
        )
    whole = lowered(results, WHOLE, "reverse")
    right.plot([1] * len(whole), whole, "*", color=COLOURS["reverse"], ms=11, mec="white")
    right.annotate("of whole answers", (1, fmean(whole)), (8, 0), textcoords="offset points", va="center", fontsize=8)
    right.set_xticks([0, 1], ["given text", "its own answers"])
    right.set(xlim=(-0.2, 1.6), ylabel="KL(student || teacher) lowered by", title="What the student is taught on")
    return fig
