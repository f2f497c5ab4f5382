"""Errors by temperature, soft targets, and the repair of the bias."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from experiments.distillation_hinton2015.protocol import HARD
from vae.claims import mean, values
from vae.experiment_figures import guide

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    picture, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.6), width_ratios=[1.15, 1.15, 1])
    temperatures = [int(t) for t in results["soft"]]
    place = range(len(temperatures))
    for name, runs, colour in (("labels alone", results[HARD], "C1"), ("teacher", results["teacher"], "C2")):
        left.axhline(mean(runs, "test"), color=colour)
        left.text(len(place) - 0.55, mean(runs, "test"), name, color=colour, ha="right", va="bottom")
        if len(runs) > 1:
            seeds = values(runs, "test")
            left.axhspan(min(seeds), max(seeds), color=colour, alpha=0.12, lw=0)
    left.plot(place, [mean(runs, "test") for runs in results["soft"].values()], color="C0", marker="o", label="mean")
    if len(results["teacher"]) > 1:
        for i, runs in zip(place, results["soft"].values(), strict=True):
            left.plot([i] * len(runs), [run["test"] for run in runs], ".", color="C0", alpha=0.45, mew=0)
    left.text(
        place[-1],
        mean(results["soft"][str(temperatures[-1])], "test"),
        "soft targets ",
        color="C0",
        ha="right",
        va="bottom",
    )
    left.set_xticks(place, temperatures)
    left.set(
        xlim=(-0.5, len(place) - 0.5),
        xlabel="temperature T",
        ylabel="errors of 10,000",
        title="Students' test errors",
    )

    left.margins(y=0.12)

    width = 0.27
    for i, (t, colour) in enumerate((("1", "C1"), ("4", "C4"), ("20", "C0"))):
        targets = [fmean(run["targets_of_3"][t][digit] for run in results["teacher"]) for digit in range(10)]
        middle.bar([d + (i - 1) * width for d in range(10)], targets, width, color=colour, label=f"T = {t}", bottom=0)
    middle.set(yscale="log", xlabel="class", ylabel="mean probability", title="What the teacher says of a 3")
    middle.set_xticks(range(10))
    middle.set_ylim(top=8)
    middle.legend(loc="upper right", ncols=3, columnspacing=1)

    for number, run in enumerate(results["no 3s"]):
        curve, first = run["curve"], number == 0
        right.plot(curve["bias"], curve["test"], color="C0", alpha=0.8, label="all test images" if first else None)
        right.plot(curve["bias"], curve["on_classes"], color="C1", alpha=0.8, label="the 1,010 3s" if first else None)
        label = "chosen on validation" if first else None
        right.plot(run["bias"], run["repaired"], "o", color="C0", label=label)
        right.plot(run["bias"], run["repaired_on_classes"], "o", color="C1")
    guide(right, x=0)
    top = 1.9 * max(run["test"] for run in results["no 3s"])
    right.set(xlim=(-1, 6), ylim=(0, top), xlabel="added to the bias of the 3s", ylabel="errors", title="Never saw a 3")
    right.legend(loc="upper center")
    return picture
