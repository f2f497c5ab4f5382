"""The runs as a table: in the terminal, and as a CSV with every number."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vae.report.runs import Run
from vae.report.sweep import Sweep, states
from vae.report.values import format_value, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True)
class Column:
    """A number of every run. unit: what its header says below the name; better: "higher", "lower" or None if neither."""

    title: str
    unit: str
    value: Callable[[Run], float]
    show: Callable[[float], str]
    better: str | None = None
    key: bool = True


def number_columns(sweep: Sweep) -> list[Column]:
    """The columns of the run table: those everyone reads first, then any other metric of the split (`key=False`)."""
    have = list(dict.fromkeys(key for run in sweep.finished for key in run.metrics))

    def metric(key: str) -> Callable[[Run], float]:
        return lambda run: run.metrics.get(key, math.nan) if run.finished else math.nan

    known = [
        ("elbo", "ELBO", "nats", 2, "higher"),
        ("rate", "rate", "nats", 2, None),
        ("distortion", "distortion", "nats", 2, None),
        *((k, k.replace("nll_iw", "NLL, K="), "nats", 2, "lower") for k in sorted(_bounds(sweep, have), key=_natural)),
        ("bits_per_dim", "bits/dim", "bits", 3, "lower"),
        ("active_units", "active", "units", 1, None),
    ]
    columns = [
        Column(title, unit, metric(f"{sweep.split}/{name}"), lambda v, d=digits: nats(v, d), better)
        for name, title, unit, digits, better in known
        if f"{sweep.split}/{name}" in have
    ]
    columns.append(Column("time", "min:s", lambda run: math.nan if run.seconds is None else run.seconds, clock))
    taken = {f"{sweep.split}/{name}" for name, *_ in known}
    others = [
        key for key in have if key not in taken and key.startswith((f"{sweep.split}/", "train/seconds_per_epoch"))
    ]
    columns += [
        Column(key.removeprefix(f"{sweep.split}/").replace("_", " "), "", metric(key), lambda v: nats(v, 3), key=False)
        for key in others
    ]
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
    writer.writerow([_word(name) for name in header])
    for run in sweep.runs:
        words = [run.name, run.state, run.reason or "", run.data]
        settings = [run.settings.get(key) for key in sweep.swept]
        numbers = [run.seed, run.seconds, run.epochs, *(run.metrics.get(key) for key in metrics)]
        writer.writerow([*map(_word, words), *map(_cell, settings), *map(_cell, numbers)])
    return out.getvalue()


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return repr(value)
    return _word(format_value(value))


def _word(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def print_table(sweep: Sweep, console: Console) -> None:
    """The runs with their settings and key numbers, the best ELBO of each data set marked; then what failed, and why."""
    from rich.text import Text

    columns = [column for column in number_columns(sweep) if column.key]
    table = _table(sweep, columns)
    drop = [column for title in ("bits/dim", "distortion", "time") for column in columns if column.title == title]
    wide = console.options.update(max_width=10_000)
    while drop and console.measure(table, options=wide).maximum > console.width:  # the page and the CSV have them all
        columns.remove(drop.pop(0))
        table = _table(sweep, columns)
    if sweep.finished:
        console.print(table)
    for run in sweep.failed:
        console.print(Text(f"{run.state}: {printable(run.name)}: {printable(run.reason or '')}", style="red"))
    for overrides in sweep.missing:
        console.print(Text(f"missing: {printable(', '.join(overrides))}", style="red"))
    marked = "; the best ELBO is bold" if len(sweep.finished) > 1 else ""
    console.print(Text(f"{tally(sweep)}. Nats per image{marked}."), soft_wrap=True)


def _table(sweep: Sweep, columns: list[Column]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    best = {id(sweep.best(data)) for data in sweep.data_sets} if len(sweep.finished) > 1 else set()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    if sweep.data_column:
        table.add_column("data", no_wrap=True, max_width=24)
    for key in sweep.swept:
        table.add_column(Text(printable(sweep.label(key))), justify="right", no_wrap=True, max_width=24)
    if not sweep.swept:
        table.add_column("run", max_width=40, overflow="fold")
    if sweep.seeds:
        table.add_column("seed", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(Text(column.title), justify="right", no_wrap=True)
    for run in sweep.finished:
        cells = [printable(run.data)] if sweep.data_column else []
        cells += [format_value(run.settings.get(key)) for key in sweep.swept] or [printable(run.name)]
        cells += [format_value(run.seed)] if sweep.seeds else []
        cells += [column.show(column.value(run)) for column in columns]
        table.add_row(*map(Text, cells), style="bold green" if id(run) in best else None)
    return table
