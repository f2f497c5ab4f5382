"""A sweep -> report/index.html (one file, nothing from the network), report/runs.csv, report/means.csv where
seeds are swept, and report/plots/*.png."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vae.cli import duration
from vae.errors import VAEError
from vae.files import write_atomically, write_text
from vae.report.pictures import Gallery, chosen, galleries
from vae.report.plots import draw
from vae.report.priors import fitted_priors
from vae.report.runs import Run, flatten
from vae.report.search import Search, draw_search, drawn_value, read_search
from vae.report.seeds import best_runs, mean, replicates, spread, uneven
from vae.report.sweep import Sweep, read_sweep
from vae.report.tables import Column, count, csv_text, means_csv, nats, number_columns, tally
from vae.report.values import format_value, printable

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """text: as shown; sort: what its column is ordered by, "" stays last; spread: of the seeds; heat: 0..1, how deep the
    tint, or None; bar: 0..1, how long, or None."""

    text: str
    sort: float | str
    spread: str = ""
    heat: float | None = None
    bar: float | None = None
    kind: str = ""


@dataclass(frozen=True)
class Row:
    """A run, or the mean of runs that differ in their seed alone. index: of the first run in the sweep."""

    runs: list[Run]
    index: int
    best: bool
    words: list[Cell]
    numbers: list[Cell]

    @property
    def run(self) -> Run:
        return self.runs[0]


def write_report(folder: str | Path | Sweep) -> Path:
    """Write FOLDER/report of a sweep (or of one that `read_sweep` returned) and return its index.html.

    Each file is written beside its place and renamed into it, the page last, so that an interrupted report leaves the
    previous one whole. Raises VAEError as `read_sweep` does, and if the report cannot be written.
    """
    sweep = folder if isinstance(folder, Sweep) else read_sweep(folder)
    report = sweep.folder / "report"
    plots, search = draw(sweep), read_search(sweep)
    of_search = draw_search(sweep, search) if search else []
    try:
        drawn = {report / "plots" / f"{plot.name}.png": plot.png for group in [*plots, of_search] for plot in group}
        for path, png in drawn.items():
            write_atomically(path, lambda file, png=png: file.write(png))
        for stale in set((report / "plots").glob("*.png")) - set(drawn):
            stale.unlink()  # of an earlier report, whose settings this one no longer has
        write_text(report / "runs.csv", csv_text(sweep))
        if sweep.seeds:
            write_text(report / "means.csv", means_csv(sweep))
        else:
            (report / "means.csv").unlink(missing_ok=True)
        write_text(report / "index.html", render(sweep, plots, search, of_search))
    except OSError as error:
        raise VAEError(f"The report cannot be written to {str(report)!r}: {error.strerror or error}.") from error
    return report / "index.html"


def render(sweep: Sweep, plots: list[list[Any]], search: Search | None = None, of_search: Sequence[Any] = ()) -> str:
    """The page. Everything that comes from configs, names and files is escaped; only our own script may run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    columns = number_columns(sweep)
    averaged = [column for column in columns if column.key and column.title != "time"]
    shown = galleries(sweep)
    return environment.get_template("page.html.j2").render(
        sweep=sweep,
        title=printable(sweep.folder.resolve().name),
        tally=tally(sweep),
        best=[_best(sweep, runs) for data in sweep.data_sets if (runs := best_runs(sweep, data))],
        uneven=uneven(sweep),
        columns=columns,
        rows=_rows(sweep, columns, [[run] for run in sweep.runs]),
        means=_rows(sweep, averaged, replicates(sweep)) if sweep.seeds else [],
        averaged=averaged,
        link=lambda run: (
            "../" if run.folder == sweep.folder else f"../{quote(os.fsencode(run.folder.relative_to(sweep.folder)))}/"
        ),
        plots=plots,
        search=search,
        of_search=of_search,
        drawn_value=drawn_value,
        galleries=shown,
        priors=fitted_priors(sweep),
        pictured=(len(chosen(sweep)), sum(bool(run.pictures) for run in sweep.runs)),
        thumb=_thumb(shown),
        shared=_shared(sweep),
        made=_made(sweep),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        bounds=[column.title for column in columns if column.title.startswith("NLL")],
        count=count,
        duration=duration,
        format_value=format_value,
        nats=nats,
        printable=printable,
    )


# ---- what the page shows ----


@dataclass(frozen=True)
class Best:
    """text: its ELBO, or the mean with the seeds' spread; over: "" or how many seeds that is of."""

    run: Run
    index: int
    text: str
    over: str


def _best(sweep: Sweep, runs: list[Run]) -> Best:
    elbos = [sweep.value(run, "elbo") for run in runs]
    sd = spread(elbos)
    text = nats(mean(elbos)) + (f" ± {nats(sd)}" if math.isfinite(sd) else "")
    return Best(
        runs[0], sweep.places[id(runs[0])], text, f", the mean of {count(len(runs), 'seed')}" if sweep.seeds else ""
    )


def _rows(sweep: Sweep, columns: list[Column], groups: list[list[Run]]) -> list[Row]:
    """A row for each group of runs: its settings, and the mean of each number with the seeds' standard deviation."""
    means = {column: [mean([column.value(run) for run in runs]) for runs in groups] for column in columns}
    ranks = {column: _ranks([runs[0].data for runs in groups], means[column], column.better) for column in columns}
    rows = []
    for i, runs in enumerate(groups):
        words = [_word(runs[0].settings.get(key)) for key in sweep.swept]
        if sweep.seeds:
            one = len(runs) == 1 and len(groups) == len(sweep.runs)
            words.append(_word(runs[0].seed) if one else Cell(str(len(runs)), len(runs)))
        numbers = []
        for column in columns:
            value, values = means[column][i], [column.value(run) for run in runs]
            sd = spread(values)
            numbers.append(
                Cell(
                    column.shown(value, runs),
                    value if math.isfinite(value) else "",
                    f"± {column.show(sd)}" if math.isfinite(sd) else "",
                    heat=ranks[column][i] if column.better else None,
                    bar=_active_share(runs[0], value) if column.title == "active" else None,
                    kind="" if column.key else "extra",
                )
            )
        best = any(c.title == "ELBO" and ranks[c][i] == 1 for c in columns)
        rows.append(Row(runs, sweep.places[id(runs[0])], best, words, numbers))
    return rows


def _word(value: Any) -> Cell:
    text = format_value(value)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(text, value if numeric else text)


def _ranks(sets: list[str], values: list[float], better: str | None) -> list[float | None]:
    """Where each value stands between the worst (0) and the best (1) of its data set. By rank, which outliers leave be."""
    ranks: list[float | None] = [None] * len(values)
    for data in set(sets):
        mine = [i for i, value in enumerate(values) if sets[i] == data and math.isfinite(value)]
        levels = {v: n for n, v in enumerate(sorted({values[i] for i in mine}, reverse=better == "lower"))}
        for i in mine if len(levels) > 1 else ():
            ranks[i] = levels[values[i]] / (len(levels) - 1)
    return ranks


def _active_share(run: Run, active: float) -> float | None:
    size = run.config.get("model.latent_dim")
    return min(1.0, active / size) if isinstance(size, int) and size > 0 and math.isfinite(active) else None


def _shared(sweep: Sweep) -> list[tuple[str, str]]:
    """Settings that every run with a config has in common."""
    configs = [run.config for run in sweep.runs if run.config]
    first = configs[0] if configs else {}
    same = [key for key in first if all(key in config and config[key] == first[key] for config in configs)]
    return [(printable(key), format_value(first[key])) for key in same]


def _made(sweep: Sweep) -> list[tuple[str, list[tuple[str, int]]]]:
    """Each entry of the runs' environment.json with its values and how many runs had each, the commonest first.

    Version numbers that all runs share make one entry; of many different values the first and the last are shown.
    """
    found: dict[str, Counter[str]] = {}
    for run in sweep.runs:
        for key, value in flatten(run.environment).items():
            if isinstance(value, list):
                value = shlex.join(map(str, value))
            text = printable(value) if isinstance(value, str) else format_value(value)
            found.setdefault(printable(key.removeprefix("versions.")), Counter())[text] += 1
    versions = [key for key, n in found.items() if len(n) == 1 and re.match(r"\d+\.\d+", next(iter(n)))]
    entries = {key: values.most_common() for key, values in found.items() if key not in versions}
    for key, values in entries.items():
        if len(values) > 3:
            texts = sorted(found[key])
            entries[key] = [(f"{texts[0]} to {texts[-1]}, {len(texts)} values", values[0][1])]
    if versions:
        entries["versions"] = [(", ".join(f"{key} {next(iter(found[key]))}" for key in versions), len(sweep.runs))]
    first = ("command", "commit", "device", "versions")
    return sorted(
        entries.items(), key=lambda entry: next((i for i, w in enumerate(first) if w in entry[0]), len(first))
    )


def _thumb(shown: list[Gallery]) -> int:
    """Width of a picture, in pixels, with which the widest shelf just fills the page."""
    across = max((len(shelf.columns) or 4 for gallery in shown for shelf in gallery.shelves), default=4)
    return max(150, min(320, 960 // across - 14)) // 10 * 10
