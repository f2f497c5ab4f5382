"""The runs as a table: in the terminal, and as a CSV with every number."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vae.report.runs import Run
from vae.report.seeds import best_runs, mean, replicates, spread, uneven
from vae.report.sweep import Sweep, states
from vae.report.values import format_value, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LEAST = 24  # characters of a terminal's line that all settings of a run are folded into


@dataclass(frozen=True)
class Column:
    """A number of every run. unit: what its header says below the name; better: "higher", "lower" or None if neither."""

    title: str
    unit: str
    value: Callable[[Run], float]
    show: Callable[[float], str]
    better: str | None = None
    key: bool = True
    there: Callable[[Run], bool] = lambda run: run.finished  # whether the run has the number, which may be nan

    def shown(self, value: float, runs: list[Run]) -> str:
        """The value of these runs in words, a dash where none of them has one."""
        return self.show(value) if any(map(self.there, runs)) else "–"


@dataclass(frozen=True)
class Measured:
    """A metric of the reported split. name: in metrics.json less the split; digits: after the point; better: as in Column;
    key: whether everyone reads it."""

    name: str
    title: str
    unit: str
    digits: int
    better: str | None
    key: bool = True


def measured(sweep: Sweep) -> list[Measured]:
    """The metrics of the split that any finished run has: those everyone reads first."""
    have = list(dict.fromkeys(key for run in sweep.finished for key in run.metrics))
    bounds = sorted(_bounds(sweep, have), key=_natural)
    known = [
        Measured("elbo", "ELBO", "nats", 2, "higher"),
        Measured("rate", "rate", "nats", 2, None),
        Measured("distortion", "distortion", "nats", 2, None),
        *(Measured(name, name.replace("nll_iw", "NLL, K="), "nats", 2, "lower") for name in bounds),
        Measured("bits_per_dim", "bits/dim", "bits", 3, "lower"),
        Measured("active_units", "active", "units", 1, None),
    ]
    known = [metric for metric in known if f"{sweep.split}/{metric.name}" in have]
    names = [key.removeprefix(f"{sweep.split}/") for key in have if key.startswith(f"{sweep.split}/")]
    taken = {metric.name for metric in known}
    return known + [Measured(name, name.replace("_", " "), "", 3, None, False) for name in names if name not in taken]


def number_columns(sweep: Sweep) -> list[Column]:
    """The columns of the run table: those everyone reads first, then any other metric of the split (`key=False`)."""
    have = list(dict.fromkeys(key for run in sweep.finished for key in run.metrics))

    def metric(key: str) -> Callable[[Run], float]:
        return lambda run: run.metrics.get(key, math.nan) if run.finished else math.nan

    def column(m: Measured) -> Column:
        key, there = f"{sweep.split}/{m.name}", lambda run: run.finished and key in run.metrics
        return Column(m.title, m.unit, metric(key), lambda v: nats(v, m.digits), m.better, m.key, there)

    known = measured(sweep)
    columns = [column(m) for m in known if m.key]
    seconds = Column("time", "min:s", lambda run: math.nan if run.seconds is None else run.seconds, clock)
    columns.append(replace(seconds, there=lambda run: run.seconds is not None))
    columns += [column(m) for m in known if not m.key]
    if "train/seconds_per_epoch" in have:
        key = "train/seconds_per_epoch"
        columns.append(Column(key.replace("_", " "), "", metric(key), lambda v: nats(v, 3), key=False))
    return columns


def _bounds(sweep: Sweep, have: list[str]) -> list[str]:
    prefix = f"{sweep.split}/"
    return [key.removeprefix(prefix) for key in have if re.fullmatch(re.escape(prefix) + r"nll_iw\d+", key)]


def _natural(name: str) -> int:
    return int(re.sub(r"\D", "", name) or 0)


def nats(value: float, digits: int = 2) -> str:
    """-74.31, with a true minus sign; "nan" and "inf" are said, never hidden."""
    if not math.isfinite(value):
        return "inf" if value == math.inf else "−inf" if value == -math.inf else "nan"
    text = f"{value:.{digits}f}"
    if digits == 1:
        text = text.removesuffix(".0")
    return text.replace("-", "−" if text.strip("-0.") else "")  # no minus before zero


def clock(seconds: float) -> str:
    """75 -> "1:15", 3675 -> "1:01:15"."""
    if not math.isfinite(seconds):
        return "nan"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def tally(sweep: Sweep) -> str:
    """ "12 runs: 10 finished, 1 failed, 1 cut off, 2 missing"."""
    by_state = states(sweep.runs)
    parts = [
        f"{by_state[state]} {state}"
        for state in ("finished", "pruned", "failed", "cut off", "damaged")
        if by_state[state]
    ]
    parts += [f"{len(sweep.missing)} missing"] if sweep.missing else []
    return f"{count(len(sweep.runs), 'run')}: {', '.join(parts)}"


def csv_text(sweep: Sweep) -> str:
    """One line per run: name, state, reason, data set, swept keys, seed, seconds, epochs and every metric in full precision.

    Words that a spreadsheet would run as a formula (they begin with = + - @) are preceded by an apostrophe.
    """
    metrics = list(dict.fromkeys(key for run in sweep.runs for key in run.metrics))
    metrics.sort(key=lambda key: (not key.startswith(f"{sweep.split}/"), key))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["run", "state", "reason", "data", *sweep.swept, "seed", "seconds", "epochs", *metrics]
    writer.writerow([csv_word(name) for name in header])
    for run in sweep.runs:
        words = [run.name, run.state, run.reason or "", run.data]
        settings = [run.settings.get(key) for key in sweep.swept]
        numbers = [run.seed, run.seconds, run.epochs, *(run.metrics.get(key) for key in metrics)]
        writer.writerow([*map(csv_word, words), *map(csv_cell, settings), *map(csv_cell, numbers)])
    return out.getvalue()


def means_csv(sweep: Sweep) -> str:
    """One line per setting: data set, swept keys, n, and of every metric the mean over seeds and the standard deviation."""
    names = list(dict.fromkeys(key for run in sweep.finished for key in run.metrics))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        map(csv_word, ["data", *sweep.swept, "n", *(f"{name}{end}" for name in names for end in ("", " sd"))])
    )
    for runs in replicates(sweep):
        settings = [runs[0].settings.get(key) for key in sweep.swept]
        values = [[run.metrics.get(name, math.nan) for run in runs] for name in names]
        numbers = [number for of in values for number in (mean(of), spread(of))]
        cells = [None if math.isnan(number) else number for number in numbers]
        writer.writerow([csv_word(runs[0].data), *map(csv_cell, [*settings, len(runs), *cells])])
    return out.getvalue()


def csv_cell(value: object) -> str:
    """A number in full precision, a word safe from spreadsheets, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    return csv_word(format_value(value))


def csv_word(text: str) -> str:
    """Words that a spreadsheet would run as a formula are preceded by an apostrophe."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def print_table(sweep: Sweep, console: Console) -> None:
    """The runs, or the means over seeds, with settings and key numbers, the best ELBO of each data set marked; then what
    failed, and why."""
    from rich.text import Text

    columns = [
        column for column in number_columns(sweep) if column.key and not (sweep.seeds and column.title == "time")
    ]
    groups = replicates(sweep) if sweep.seeds else [[run] for run in sweep.finished]
    wide = console.options.update(max_width=10_000)

    def too_wide(folded: int = 0) -> bool:
        return console.measure(_table(sweep, columns, groups, folded), options=wide).maximum > console.width

    # the page and the CSV have them all
    for title in ("bits/dim", "distortion", "time"):
        columns = [column for column in columns if column.title != title or not too_wide()]
    folded = bool(sweep.swept) and too_wide()
    for title in ("active", "rate") if folded else ():
        columns = [column for column in columns if column.title != title or not too_wide(LEAST)]
    if sweep.finished:
        console.print(_table(sweep, columns, groups, console.width if folded else 0))
    for run in sweep.failed:
        console.print(Text(f"{run.state}: {printable(run.name)}: {printable(run.reason or '')}", style="red"))
    for overrides in sweep.missing:
        console.print(Text(f"missing: {printable(', '.join(overrides))}", style="red"))
    if folded and sweep.usual:
        console.print(Text("Only settings that most of the runs do not share are shown."), soft_wrap=True)
    means = ", means over seeds ± one standard deviation" if sweep.seeds else ""
    marked = f"; the best {'mean ' if sweep.seeds else ''}ELBO is bold" if len(groups) > 1 else ""
    console.print(Text(f"{tally(sweep)}. Nats per image{means}{marked}."), soft_wrap=True)
    if sentence := uneven(sweep):
        console.print(Text(sentence), soft_wrap=True)


def _table(sweep: Sweep, columns: list[Column], groups: list[list[Run]], folded: int = 0) -> Table:
    """folded: 0 for a column of each swept key, or how wide one of them all may be."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    best = {id(runs[0]) for data in sweep.data_sets if (runs := best_runs(sweep, data))}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    if sweep.data_column:
        table.add_column("data", no_wrap=True, max_width=24)
    for key in () if folded else sweep.swept:
        table.add_column(Text(printable(sweep.label(key))), justify="right", no_wrap=True, max_width=24)
    if folded:
        table.add_column("settings", max_width=folded, overflow="fold")
    elif not sweep.swept and not sweep.seeds:
        table.add_column("run", max_width=40, overflow="fold")
    if sweep.seeds:
        table.add_column("n", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(Text(column.title), justify="right", no_wrap=True)
    for runs in groups:
        cells = [printable(runs[0].data)] if sweep.data_column else []
        if folded:
            cells.append(printable(sweep.departures(runs[0])))
        else:
            cells += [format_value(runs[0].settings.get(key)) for key in sweep.swept]
        cells += [str(len(runs))] if sweep.seeds else [] if sweep.swept else [printable(runs[0].name)]
        cells += [with_spread(column, runs) for column in columns]
        table.add_row(*map(Text, cells), style="bold green" if id(runs[0]) in best and len(groups) > 1 else None)
    return table


def with_spread(column: Column, runs: list[Run]) -> str:
    """ "−95.20 ± 0.31": the mean over runs and their standard deviation, which one run does not have."""
    values = [column.value(run) for run in runs]
    sd = spread(values)
    shown = column.shown(mean(values) if len(values) > 1 else values[0], runs)
    return f"{shown} ± {column.show(sd)}" if math.isfinite(sd) else shown
