"""What an experiment's protocol is written with: the context that trains and measures, over a grid of settings and seeds
where there is one, and what a run logged on its way.

`vae.reproduce` runs experiments; their claims are written with `vae.claims`, their figures with `vae.experiment_figures`.
Imports no torch.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vae.cli import CONFIGS, duration
from vae.errors import VAEError
from vae.files import write_json

if TYPE_CHECKING:
    pass


@dataclass
class Context:
    """What `measure` is given.

    quick: the form. folder: scratch, not committed. jobs: how many processes may run side by side. settings: the form's
    SETTINGS. name: the experiment's. Trained runs and measured pieces stay in the scratch, so that what was cut off goes on.
    committed: what results.json holds, of whatever settings; parts: how the parts of these results were made.
    """

    quick: bool
    folder: Path
    jobs: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    stamp: dict[str, Any] = field(default_factory=dict)  # a piece made under another is stale
    committed: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda line: None
    reused_seconds: float = 0.0  # what the pieces, runs and parts that were found had cost

    @property
    def config(self) -> str:
        """experiment=NAME, or the quick form's where conf/experiment/ has one."""
        quick = self.quick and (Path(CONFIGS) / "experiment" / f"{self.name}_quick.yaml").is_file()
        return f"experiment={self.name}" + "_quick" * quick

    def train_grid(self, cells: Mapping[str, list[str]], seeds: Iterable[int]) -> dict[tuple[str, int], Path]:
        """{(cell, seed): folder} of runs of the experiment's config, one for each cell's overrides and each seed."""
        names = {(cell, seed): f"{cell.replace(' ', '_')},seed={seed}" for cell in cells for seed in seeds}
        folders = self.train_many(
            {name: [self.config, *cells[cell], f"seed={seed}"] for (cell, seed), name in names.items()}
        )
        return {run: folders[name] for run, name in names.items()}

    def measure_grid(
        self, measures: Mapping[tuple[str, int], Callable[[], Any]], what: str = "measured"
    ) -> dict[str, list[Any]]:
        """{cell: [what was found of each seed]} by `cached_many` of {(cell, seed): how to measure it}."""
        names = {(cell, seed): f"{what},{cell.replace(' ', '_')},seed={seed}" for cell, seed in measures}
        found = self.cached_many({name: measures[run] for run, name in names.items()})
        gathered: dict[str, list[Any]] = {}
        for (cell, _), name in names.items():
            gathered.setdefault(cell, []).append(found[name])
        return gathered

    def train(self, overrides: list[str], name: str) -> Path:
        """The folder of a finished run of conf/train.yaml with these overrides, trained now unless it is there.

        One that was cut off goes on from its last checkpoint; one of another config is trained anew. One thread, unless
        the overrides say otherwise, so that the numbers do not depend on `jobs`.
        """
        return self.train_many({name: overrides})[name]

    def train_many(self, runs: dict[str, list[str]]) -> dict[str, Path]:
        """`train` of several named runs, `jobs` of them side by side, each in a process of its own if there are two."""
        from joblib import Parallel, delayed

        folders = {name: self.folder / _file_name(name) for name in runs}
        jobs = max(1, min(self.jobs, len(runs)))
        ended = Parallel(n_jobs=jobs, return_as="generator_unordered")(
            delayed(_train)(name, overrides, folders[name]) for name, overrides in runs.items()
        )
        for name, seconds, before in ended:
            self.say(f"{name}: {'trained before' if before == seconds else 'trained'}, {duration(seconds)}")
            self.reused_seconds += before / jobs
        return folders

    def part(self, name: str, depends_on: Sequence[str], measure: Callable[[], Any]) -> Any:
        """What results.json holds under this name, if it was measured with the same values of these settings; otherwise
        what `measure()` returns, as JSON gives it back. The experiment's results must hold it under the same name.

        Unlike pieces, which stay in the scratch, a part is found in a fresh clone too.
        """
        stamp = as_json({**self.stamp, "settings": {key: self.settings[key] for key in depends_on}})
        made = self.committed.get("parts", {}).get(name, {})
        if made.get("settings") == stamp:
            self.say(f"{name}: measured on {made['date'][:10]} with the same settings, kept")
            self.parts[name] = made
            self.reused_seconds += made["seconds"]
            return self.committed["results"][name]
        started, before = time.monotonic(), self.reused_seconds
        value = as_json(measure())
        seconds = time.monotonic() - started + self.reused_seconds - before
        self.parts[name] = {"settings": stamp, "seconds": round(seconds, 1), **surroundings()}
        return value

    def measured(self, name: str) -> bool:
        """Whether `cached` would find the piece of this name."""
        return _read_piece(self._piece(name), as_json(self.stamp)) is not None

    def cached(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure()` returned, now or when this was last run with the same settings. Always as JSON gives it back:
        tuples as lists, keys as strings."""
        return self.cached_many({name: measure})[name]

    def cached_many(self, measures: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """`cached` of several pieces, `jobs` of them side by side, each in a process of its own if there are two.

        What is called must then be known to other processes by name: a module's function, or a `functools.partial` of it.
        """
        from joblib import Parallel, delayed

        jobs, stamp = max(1, min(self.jobs, len(measures))), as_json(self.stamp)
        ended = Parallel(n_jobs=jobs, return_as="generator_unordered")(
            delayed(_measure_piece)(name, self._piece(name), stamp, measure) for name, measure in measures.items()
        )
        values = {}
        for name, piece, reused in ended:
            values[name] = piece["value"]
            self.reused_seconds += piece["seconds"] / jobs if reused else 0.0
            if not reused:
                self.say(f"{name}: measured, {duration(piece['seconds'])}")
        return {name: values[name] for name in measures}

    def _piece(self, name: str) -> Path:
        return self.folder / "pieces" / f"{_file_name(name)}.json"


def _read_piece(path: Path, stamp: Any) -> dict[str, Any] | None:
    """A piece that was measured under these settings."""
    piece = json.loads(path.read_text()) if path.is_file() else {"settings": None}
    return piece if piece["settings"] == stamp else None


def _measure_piece(name: str, path: Path, stamp: Any, measure: Callable[[], Any]) -> tuple[str, dict[str, Any], bool]:
    """Its name, the piece, and whether it was there. In a process of its own."""
    if (piece := _read_piece(path, stamp)) is not None:
        return name, piece, True
    started = time.monotonic()
    value = as_json(measure())
    piece = {"settings": stamp, "seconds": round(time.monotonic() - started, 2), "value": value}
    write_json(path, piece)
    return name, piece, False


def _file_name(name: str) -> str:
    if not re.fullmatch(r"[\w.,=+-]+", name) or name.startswith(".") or name == "pieces":
        raise VAEError(f"{name!r} cannot name a run or a piece: use letters, digits and any of . , = + - _")
    return name


def _train(name: str, overrides: list[str], folder: Path) -> tuple[str, float, float]:
    """Train, or find, one run; returns its name, its seconds and those of them that were spent before. In a process of its
    own."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from vae.engine.folder import MEASURING, TAKEN_OVER, begins_with, differences, read_config, read_status
    from vae.engine.run import train

    if not any(override.startswith("threads=") for override in overrides):
        overrides = [*overrides, "threads=1"]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", overrides)
    anew = False
    if (folder / "config.yaml").is_file():
        stored: Any = OmegaConf.to_container(read_config(folder), resolve=True)
        settled: Any = OmegaConf.to_container(config, resolve=True)
        changed = differences(stored, settled)
        anew = any(begins_with(key, MEASURING) or not begins_with(key, TAKEN_OVER) for key in changed)
    found, started = read_status(folder), time.monotonic()
    train(config, folder, overrides, resume="restart" if anew else True, progress_bar=False)
    status = read_status(folder)
    before = status["seconds"] - (0.0 if status == found else time.monotonic() - started)
    return name, status["seconds"], max(0.0, before)


def logged(folder: Path, *keys: str) -> dict[str, list[Any]]:
    """The course of a run: what metrics.csv, or TensorBoard's events where there is none, have under these keys, at the
    steps at which all were logged; the steps, which count from 0, under "step". A run that was cut off logs some twice."""
    if (path := folder / "metrics.csv").is_file():
        with path.open() as file:
            rows = list(csv.DictReader(file))
        found = {key: {int(row["step"]): float(row[key]) for row in rows if row.get(key)} for key in keys}
    else:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        has = events.Tags()["scalars"]
        found = {key: {e.step: e.value for e in events.Scalars(key)} if key in has else {} for key in keys}
    steps = sorted(set.intersection(*map(set, found.values())))
    return {"step": steps, **{key: [found[key][step] for step in steps] for key in keys}}


def as_json(value: Any) -> Any:
    """`value` as it would be read back; numbers and arrays of numpy and torch become Python's."""
    return json.loads(json.dumps(value, default=lambda other: other.tolist()))


def surroundings() -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({os.cpu_count()} cores)"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
