"""Runs that differ in their seed alone: the mean, the spread and the number of each setting, and where numbers differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from statistics import stdev
from typing import TYPE_CHECKING

from vae.report.values import canonical

if TYPE_CHECKING:
    from vae.report.runs import Run
    from vae.report.sweep import Sweep

NAMED = 4  # settings that a sentence names


def replicates(sweep: Sweep, runs: Iterable[Run] | None = None) -> list[list[Run]]:
    """The finished runs, or these, those of one setting together."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in sweep.finished if runs is None else runs:
        groups.setdefault((run.data, *map(canonical, run.settings.values())), []).append(run)
    return list(groups.values())


def mean(values: list[float]) -> float:
    """NaN if any value is not finite: a mean of the others would hide it."""
    return math.fsum(values) / len(values) if values and all(map(math.isfinite, values)) else math.nan


def spread(values: list[float]) -> float:
    """The standard deviation over seeds, with n - 1; NaN of fewer than two values, and where one is not finite."""
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def best_runs(sweep: Sweep, data: str) -> list[Run]:
    """The run with the highest ELBO on a data set or, where seeds are swept, the runs of the setting with the highest mean.

    The best seed of the best of many settings owes something to luck. None where no ELBO is finite.
    """
    if not sweep.seeds:
        best = sweep.best(data)
        return [] if best is None else [best]
    groups = [runs for runs in replicates(sweep) if runs[0].data == data]
    scored = [(mean([sweep.value(run, "elbo") for run in runs]), runs) for runs in groups]
    return max(((m, runs) for m, runs in scored if math.isfinite(m)), key=lambda pair: pair[0], default=(0, []))[1]


def uneven(sweep: Sweep) -> str:
    """One sentence if settings differ in how many seeds finished, "" if they do not."""
    groups = replicates(sweep, [run for run in sweep.runs if run.config])
    counts = [sum(run.finished for run in runs) for runs in groups]
    if not sweep.seeds or len(set(counts)) < 2:
        return ""
    usual = max(Counter(counts).items(), key=lambda item: (item[1], item[0]))[0]
    others = [
        f"{sweep.describe(runs[0], with_seed=False)} has {n or 'none'}"
        for runs, n in zip(groups, counts, strict=True)
        if n != usual
    ]
    more = f", and {len(others) - NAMED} more" if len(others) > NAMED else ""
    return (
        f"Seeds differ in number: {counts.count(usual)} of {len(groups)} settings have {usual} finished, "
        f"{'; '.join(others[:NAMED])}{more}. Spreads are of as many seeds as a setting has."
    )
