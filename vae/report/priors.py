"""What `vae.fit_prior` left in the runs' folders: each prior's numbers and samples, beside those of the prior of training."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae.report.pictures import LARGEST, SMALLEST, TOTAL_BYTES, Picture, inline
from vae.report.runs import GREATEST, Damaged, Run, read_mapping
from vae.report.sweep import Sweep
from vae.report.tables import nats
from vae.report.values import is_number, printable

#: What is shown of a run, in this order: its name in evaluation-SPLIT.json less the split and priors/NAME, and its title.
_MEASURED = (
    (r"rate", "rate"),
    (r"elbo", "ELBO"),
    (r"nll_iw(\d+)", "NLL, K={}"),
    (r"decomposition/marginal_kl_n(\d+)", "marginal KL, N={}"),
    (r"samples/frechet_distance_n(\d+)", "Frechet distance, N={}"),
)
_VAL = "log p(z), validation"
_PICTURES = TOTAL_BYTES // 4  # bytes, of all samples here


@dataclass(frozen=True)
class PriorRow:
    """A prior of a run. index: of the run in the sweep; first: whether it is that of training; values: by column, NaN where it
    was not measured."""

    run: Run
    index: int
    name: str
    first: bool
    values: dict[str, float]
    samples: Picture | None

    def text(self, column: str) -> str:
        return "–" if math.isnan(self.values[column]) else nats(self.values[column])


@dataclass(frozen=True)
class Priors:
    """The runs with fitted priors: `rows`, those of a run together and that of training first."""

    columns: list[str]
    rows: list[PriorRow]

    @property
    def runs(self) -> list[list[PriorRow]]:
        return [[row for row in self.rows if row.index == i] for i in dict.fromkeys(row.index for row in self.rows)]


def fitted_priors(sweep: Sweep) -> Priors | None:
    """None where no finished run has one. Files that are damaged count as absent."""
    found = [(run, name, values) for run in sweep.finished for name, values in _of_run(run, sweep.split)]
    if not found:
        return None
    fitted = {title for _, name, values in found if name for title in values}
    columns = sorted(fitted, key=_order)
    budget = min(LARGEST, _PICTURES // len(found))
    rows = []
    for run, name, values in found:
        path = run.folder / "priors" / name / "samples.png" if name else run.pictures.get("samples")
        label = printable(name) if name else _own(run)
        picture = None
        if path is not None and path.is_file() and budget >= SMALLEST:
            picture = Picture(run, label, *inline(path, budget))
        shown = {column: values.get(column, math.nan) for column in columns}
        rows.append(PriorRow(run, sweep.places[id(run)], label, not name, shown, picture))
    return Priors(columns, rows)


def _of_run(run: Run, split: str) -> list[tuple[str, dict[str, float]]]:
    """("", its own numbers), then (NAME, numbers) of each prior; nothing where there is none."""
    places = sorted((run.folder / "priors").glob("*/config.json"))
    configs = {path.parent.name: config for path in places if (config := _mapping(path))}
    if not configs:
        return []
    measured: dict[str, Any] = {**run.metrics, **_mapping(run.folder / f"evaluation-{split}.json")}
    own = {_VAL: _log_prob(next(iter(configs.values())), "val_of_own_prior")}
    found = [("", {**own, **_titled(measured, f"{split}/")})]
    for name, config in configs.items():
        found.append((name, {_VAL: _log_prob(config, "val"), **_titled(measured, f"{split}/priors/{name}/")}))
    return found


def _titled(measured: dict[str, Any], prefix: str) -> dict[str, float]:
    found = {}
    for pattern, title in _MEASURED:
        for key, value in measured.items():
            match = re.fullmatch(re.escape(prefix) + pattern, key)
            if match and is_number(value) and abs(value) <= GREATEST:
                found[title.format(*match.groups())] = float(value)
    return found


def _log_prob(config: dict[str, Any], which: str) -> float:
    found = config.get("log_prob")
    value: Any = found.get(which) if isinstance(found, dict) else None
    return float(value) if is_number(value) else math.nan


def _mapping(path: Path) -> dict[str, Any]:
    try:
        return read_mapping(path) if path.is_file() else {}
    except Damaged:
        return {}


def _order(title: str) -> tuple[int, int]:
    """Columns in the order of _MEASURED, log p(z) first; those of one kind by their number."""
    kinds = [_VAL, *(title.partition("{}")[0] for _, title in _MEASURED)]
    return next(i for i, kind in enumerate(kinds) if title.startswith(kind)), int(re.sub(r"\D", "", title) or 0)


def _own(run: Run) -> str:
    """What the run was trained with."""
    name = str(run.config.get("prior._target_") or "").rsplit(".", 1)[-1]
    return "N(0, I), of training" if name == "StandardNormal" else f"{printable(name)}, of training".lstrip(", ")
