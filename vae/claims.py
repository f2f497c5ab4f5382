"""What an experiment's claims are written with: bounds whose thresholds are said once, verdicts, tables, and numbers over
seeds and over paired images. Imports no torch."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from vae.errors import VAEError

if TYPE_CHECKING:
    from rich.console import Console

# --- claims ---------------------------------------------------------------------------------------------------------


class Limit(float):
    """A threshold, as it is written in a claim's target: `{:g}`, `{:.0%}` or any other format, or `{:words}`."""

    WORDS = {1 / 3: "a third", 1 / 2: "half", 2: "two", 3: "three"}

    def __format__(self, spec: str) -> str:
        return self.WORDS[float(self)] if spec == "words" else re.sub(r"e([+-])0", r"e\1", float.__format__(self, spec))


class Bound(NamedTuple):
    """Whether numbers are as they should be, and the thresholds that decided it. Made by the functions below, from one
    number or from those of all seeds, each of which has to comply; none at all do not."""

    holds: bool
    limits: tuple[Limit, ...] = ()


def _bound(values: float | Iterable[float], complies: Callable[[float], bool], *limits: float) -> Bound:
    values = list(values) if isinstance(values, Iterable) else [values]
    return Bound(bool(values) and all(complies(value) for value in values), tuple(map(Limit, limits)))


def below(values: float | Iterable[float], limit: float) -> Bound:
    return _bound(values, lambda value: value < limit, limit)


def at_most(values: float | Iterable[float], limit: float) -> Bound:
    return _bound(values, lambda value: value <= limit, limit)


def above(values: float | Iterable[float], limit: float) -> Bound:
    return _bound(values, lambda value: value > limit, limit)


def at_least(values: float | Iterable[float], limit: float) -> Bound:
    return _bound(values, lambda value: value >= limit, limit)


def between(values: float | Iterable[float], low: float, high: float) -> Bound:
    return _bound(values, lambda value: low <= value <= high, low, high)


def within(values: float | Iterable[float], tolerance: float, of: float) -> Bound:
    """At most `tolerance` from `of`. In the target `{0}` is the tolerance, `{1}` what it is measured from."""
    return _bound(values, lambda value: abs(value - of) <= tolerance, tolerance, of)


def near(values: float | Iterable[float], share: float, of: float) -> Bound:
    """As `within`, at most that share of `of` away."""
    return _bound(values, lambda value: abs(value / of - 1) <= share, share, of)


def ordered(*rows: float | Iterable[float]) -> Bound:
    """Each row larger than the one before, in every seed where they are lists."""
    lists = [list(row) if isinstance(row, Iterable) else [row] for row in rows]
    steps = [b - a for less, more in pairwise(lists) for a, b in zip(less, more, strict=True)]
    return Bound(above(steps, 0).holds)


@dataclass(frozen=True)
class Claim:
    """One sentence that the results bear out or do not. measured, target: as a reader should see them, units included."""

    name: str
    holds: bool
    measured: str
    target: str

    @classmethod
    def of(cls, name: str, measured: str, target: str, *bounds: Bound) -> Claim:
        """Holds if all bounds do. target: a template, whose fields are filled with their thresholds in turn."""
        limits = [limit for bound in bounds for limit in bound.limits]
        return cls(name, bool(bounds) and all(bound.holds for bound in bounds), measured, target.format(*limits))


# --- tables and numbers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers, all already written as text; as many in each row as there are columns. numbers: all but
    the first column are aligned to the right. fixed: so many columns are never broken or cut in the terminal."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    numbers: bool = True
    fixed: int = 0

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise VAEError(f"Every row of the table {self.title!r} needs {len(self.columns)} cells.")

    def print(self, console: Console) -> None:
        """To the terminal."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=self.title or None,
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_edge=False,
            title_justify="left",
        )
        for number, column in enumerate(self.columns):
            table.add_column(
                Text(column), justify="right" if number and self.numbers else "left", no_wrap=self.fixed > number
            )
        for row in self.rows:
            table.add_row(*map(Text, row))
        console.print(table)

    def markdown(self) -> str:
        """For a README, the title above it."""
        rule = ["---"] + ["---:" if self.numbers else "---"] * (len(self.columns) - 1)
        head, *rows = ([cell.replace("|", "\\|") for cell in line] for line in (self.columns, *self.rows))
        lines = [head, rule, *rows]
        return (f"{self.title}:\n\n" if self.title else "") + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def values(runs: Iterable[Mapping[str, Any]], key: str) -> list[Any]:
    """That of each seed."""
    return [run[key] for run in runs]


def mean(runs: Iterable[Mapping[str, Any]], key: str) -> float:
    """Over seeds."""
    return statistics.fmean(run[key] for run in runs)


def listed(numbers: Iterable[float], spec: str = ".2f", between: str = ", ") -> str:
    return between.join(f"{number:{spec}}" for number in numbers)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """ "mean ± sd" over seeds (n - 1 in the sd), and the number alone if there is one."""
    values = list(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def mean_and_error(values: Iterable[float]) -> dict[str, float]:
    """{"mean", "se"}: of differences on the same images, or of the seeds; the error of one number is nan."""
    values = list(map(float, values))
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": statistics.fmean(values), "se": error}


class Gain(NamedTuple):
    """How much lower one model's NLL is than another's, in nats per image: the mean, its standard error over paired images,
    and the mean of each seed."""

    mean: float
    se: float
    seeds: list[float]

    @classmethod
    def of(cls, models: Mapping[str, dict[str, Any]], worse: str, better: str) -> Gain | None:
        """None unless both models are there. Each has "nll", a mean over images of each seed, and "nll_of_images", a mean
        over seeds of each image."""
        if not {worse, better} <= models.keys():
            return None
        images, seeds = (
            [a - b for a, b in zip(models[worse][key], models[better][key], strict=True)]
            for key in ("nll_of_images", "nll")
        )
        return cls(statistics.fmean(seeds), mean_and_error(images)["se"], seeds)

    def exceeds(self, least: float, errors: float) -> Bound:
        """At least so many nats, and more than so many standard errors."""
        return Bound(self.mean >= least and self.mean > errors * self.se, (Limit(least), Limit(errors)))

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.se:.2f} nats (s.e., paired images); seeds {listed(self.seeds)}"
