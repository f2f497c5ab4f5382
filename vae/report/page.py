"""A sweep -> report/index.html (one file, nothing from the network), report/runs.csv and report/plots/*.png."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import shlex
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vae.errors import VAEError
from vae.report.pictures import Gallery, galleries
from vae.report.plots import draw
from vae.report.runs import Run, flatten
from vae.report.sweep import Sweep, format_value, printable, read_sweep
from vae.report.tables import Column, count, csv_text, duration, nats, number_columns, tally

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """text: as shown; sort: what the column is ordered by; heat: 0..1, how deep the tint; bar: 0..1, how long."""

    text: str
    sort: float | str
    heat: float | None = None
    bar: float | None = None
    best: bool = False
    extra: bool = False


@dataclass(frozen=True)
class Row:
    index: int
    run: Run
    href: str
    best: bool
    words: list[Cell]
    numbers: list[Cell]


def write_report(folder: str | Path | Sweep) -> Path:
    """Write FOLDER/report of a sweep (or of one that `read_sweep` returned) and return its index.html.

    Each file is written beside its place and renamed into it, the page last, so that an interrupted report leaves the
    previous one whole. Raises VAEError as `read_sweep` does, and if the report cannot be written.
    """
    sweep = folder if isinstance(folder, Sweep) else read_sweep(folder)
    report = sweep.folder / "report"
    plots = draw(sweep)
    try:
        (report / "plots").mkdir(parents=True, exist_ok=True)
        drawn = {f"{plot.name}.png": plot.png for group in plots for plot in group}
        for name, png in drawn.items():
            _replace(report / "plots" / name, png)
        for stale in set((report / "plots").glob("*.png")) - {report / "plots" / name for name in drawn}:
            stale.unlink()  # of an earlier report, whose settings this one no longer has
        _replace(report / "runs.csv", csv_text(sweep).encode())
        _replace(report / "index.html", render(sweep, plots).encode())
    except OSError as error:
        raise VAEError(f"The report cannot be written to {str(report)!r}: {error.strerror or error}.") from error
    return report / "index.html"


def render(sweep: Sweep, plots: list[list[Any]]) -> str:
    """The page. Everything that comes from configs, names and files is escaped; only our own script may run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    columns = number_columns(sweep)
    shown = galleries(sweep)
    return environment.get_template("page.html.j2").render(
        sweep=sweep,
        title=printable(sweep.folder.resolve().name),
        tally=tally(sweep),
        best=[(data, run) for data in sweep.data_sets if (run := sweep.best(data))],
        columns=columns,
        rows=_rows(sweep, columns),
        plots=plots,
        galleries=shown,
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


def _rows(sweep: Sweep, columns: list[Column]) -> list[Row]:
    heat = {id(column): _relative(sweep, column) for column in columns}
    best = {id(sweep.best(data)) for data in sweep.data_sets} if len(sweep.finished) > 1 else set()
    rows = []
    for index, run in enumerate(sweep.runs):
        words = [_word(run.settings.get(key)) for key in sweep.swept]
        if sweep.seeds:
            words.append(_word(run.seed))
        numbers = []
        for column in columns:
            value, share = column.value(run), heat[id(column)].get(index)
            missing = math.isnan(value) and not (run.finished and column.title != "time")
            numbers.append(
                Cell(
                    "–" if missing else column.show(value),
                    value if math.isfinite(value) else "",
                    heat=share if column.better else None,
                    bar=_active_share(sweep, run, value) if column.title == "active" else None,
                    best=column.better is not None and share == 1.0,
                    extra=not column.key,
                )
            )
        href = "../" if run.folder == sweep.folder else f"../{quote(run.name)}/"
        rows.append(Row(index, run, href, id(run) in best, words, numbers))
    return rows


def _word(value: Any) -> Cell:
    text = format_value(value)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return Cell(text, value if numeric else text)


def _relative(sweep: Sweep, column: Column) -> dict[int, float]:
    """Where each run stands between the worst (0) and the best (1) of its data set, by rank: outliers do not flatten it."""
    shares = {}
    for data in sweep.data_sets:
        values = {
            i: v for i, run in enumerate(sweep.runs) if run.data == data and math.isfinite(v := column.value(run))
        }
        levels = sorted(set(values.values()), reverse=column.better == "lower")
        if len(levels) > 1:
            shares |= {i: levels.index(value) / (len(levels) - 1) for i, value in values.items()}
    return shares


def _active_share(sweep: Sweep, run: Run, active: float) -> float | None:
    size = run.config.get("model.latent_dim")
    return min(1.0, active / size) if isinstance(size, int) and size > 0 and math.isfinite(active) else None


def _shared(sweep: Sweep) -> list[tuple[str, str]]:
    """Settings that every run with a config has in common."""
    configs = [run.config for run in sweep.runs if run.config]
    first = configs[0] if configs else {}
    same = [key for key in first if all(key in config and config[key] == first[key] for config in configs)]
    return [(printable(key), format_value(first[key])) for key in same]


def _made(sweep: Sweep) -> list[tuple[str, list[tuple[str, int]]]]:
    """Each entry of the runs' environment.json with its values and how many runs had each, the commonest first."""
    found: dict[str, Counter[str]] = {}
    for run in sweep.runs:
        for key, value in run.environment.items():
            if isinstance(value, dict):
                value = ", ".join(f"{name} {format_value(item)}" for name, item in flatten(value).items())
            elif isinstance(value, list):
                value = shlex.join(map(str, value))
            text = printable(value if isinstance(value, str) else format_value(value))
            found.setdefault(printable(key), Counter())[text] += 1
    first = ("command", "git", "commit", "device", "hardware", "cpu", "gpu")

    def order(key: str) -> int:
        return next((i for i, word in enumerate(first) if word in key.lower()), len(first))

    return [(key, found[key].most_common()) for key in sorted(found, key=order)]


def _thumb(shown: list[Gallery]) -> int:
    """Width of a picture, in pixels, with which the widest shelf just fills the page."""
    across = max((len(shelf.columns) or 4 for gallery in shown for shelf in gallery.shelves), default=4)
    return max(150, min(320, 960 // across - 14)) // 10 * 10


# ---- files ----


def _replace(path: Path, content: bytes) -> None:
    """Write beside `path` and rename over it: readers see the old file or the new one, never half of one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
