"""What an experiment is written with: claims, tables, paired gains, and the context that trains and measures.

`vae.reproduce` runs experiments; an experiment imports this. Imports no torch.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import os
import platform
import re
import statistics
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vae.cli import CONFIGS
from vae.errors import VAEError
from vae.files import write_json

if TYPE_CHECKING:
    from rich.console import Console

STYLE = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": "#1d2127",
    "axes.edgecolor": "#667080",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": "cycler('color', ['0072b2', 'd55e00', '009e73', 'b3589a', 'b98600', '2f9bd6', '7a5195'])",
    "grid.color": "#dce0e6",
    "grid.linewidth": 0.6,
    "xtick.color": "#667080",
    "ytick.color": "#667080",
    "xtick.labelcolor": "#1d2127",
    "ytick.labelcolor": "#1d2127",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Claim:
    """One sentence that the results bear out or do not. measured, target: as a reader should see them, units included."""

    name: str
    holds: bool
    measured: str
    target: str


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers, all already written as text; as many in each row as there are columns. numbers: all but
    the first column are aligned to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    numbers: bool = True

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise VAEError(f"Every row of the table {self.title!r} needs {len(self.columns)} cells.")

    def print(self, console: Console) -> None:
        """To the terminal."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=self.title or None, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(Text(column), justify="right" if number and self.numbers else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        console.print(table)

    def markdown(self) -> str:
        """For a README, the title above it."""
        rule = ["---"] + ["---:" if self.numbers else "---"] * (len(self.columns) - 1)
        head, *rows = ([cell.replace("|", "\\|") for cell in line] for line in (self.columns, *self.rows))
        lines = [head, rule, *rows]
        return (f"{self.title}:\n\n" if self.title else "") + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """ "mean ± sd" over seeds (n - 1 in the sd), and the number alone if there is one."""
    values = list(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


class Gain(NamedTuple):
    """How much lower one model's NLL is than another's, in nats an image: the mean, its standard error over paired images,
    and the mean of each seed."""

    mean: float
    se: float
    seeds: list[float]

    @classmethod
    def of(cls, worse: dict[str, Any], better: dict[str, Any]) -> Gain:
        """Each has "nll", a mean over images of each seed, and "nll_of_images", a mean over seeds of each image."""
        images = [a - b for a, b in zip(worse["nll_of_images"], better["nll_of_images"], strict=True)]
        seeds = [a - b for a, b in zip(worse["nll"], better["nll"], strict=True)]
        return cls(statistics.fmean(seeds), statistics.stdev(images) / math.sqrt(len(images)), seeds)

    def __str__(self) -> str:
        words = ", ".join(f"{gain:.2f}" for gain in self.seeds)
        return f"{self.mean:.2f} ± {self.se:.2f} nats (s.e., paired images); seeds {words}"


@dataclass
class Context:
    """What `measure` is given.

    quick: the form. folder: scratch, not committed. jobs: how many processes may run side by side. settings: the form's
    SETTINGS. Trained runs and measured pieces stay in the scratch, so that an experiment that was cut off goes on.
    committed: what results.json holds, of whatever settings; parts: how the parts of these results were made.
    """

    quick: bool
    folder: Path
    jobs: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    stamp: dict[str, Any] = field(default_factory=dict)  # a piece made under another is stale
    committed: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda line: None
    reused_seconds: float = 0.0  # what the pieces, runs and parts that were found had cost

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
        path, stamp = self._piece(name), as_json(self.stamp)
        if (piece := _read_piece(path, stamp)) is not None:
            self.reused_seconds += piece["seconds"]
            return piece["value"]
        started, before = time.monotonic(), self.reused_seconds
        value = as_json(measure())
        seconds = time.monotonic() - started + self.reused_seconds - before
        write_json(path, {"settings": stamp, "seconds": round(seconds, 2), "value": value})
        self.say(f"{name}: measured, {duration(seconds)}")
        return value

    def cached_many(self, measures: dict[str, Callable[[], Any]]) -> dict[str, Any]:
        """`cached` of several pieces, `jobs` of them side by side, each in a process of its own if there are two.

        What is called must then be known to other processes by name: a module's function, or a `functools.partial` of it.
        """
        from joblib import Parallel, delayed

        jobs, stamp = min(self.jobs, len(measures)), as_json(self.stamp)
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
        stored, settled = (OmegaConf.to_container(c, resolve=True) for c in (read_config(folder), config))
        changed = differences(stored, settled)
        anew = any(begins_with(key, MEASURING) or not begins_with(key, TAKEN_OVER) for key in changed)
    found, started = read_status(folder), time.monotonic()
    train(config, folder, overrides, resume="restart" if anew else True, progress_bar=False)
    status = read_status(folder)
    before = status["seconds"] - (0.0 if status == found else time.monotonic() - started)
    return name, status["seconds"], max(0.0, before)


def pack_images(images: Any) -> dict[str, Any]:
    """Arrays or tensors in [0, 1] as 8-bit grey levels in compressed text, for results.json: a picture needs no more."""
    import numpy as np

    levels = np.rint(np.asarray(images, dtype=np.float64) * 255).clip(0, 255).astype(np.uint8)
    text = base64.b64encode(zlib.compress(levels.tobytes(), 9)).decode()
    return {"shape": list(levels.shape), "levels": text}


def unpack_images(packed: dict[str, Any]) -> Any:
    """What `pack_images` packed, as a numpy array in [0, 1]."""
    import numpy as np

    levels = np.frombuffer(zlib.decompress(base64.b64decode(packed["levels"])), np.uint8)
    return levels.reshape(packed["shape"]) / 255


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


def duration(seconds: float) -> str:
    """ "42 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
