"""`python -m vae.reproduce NAME [--quick]`: rerun a paper's experiment and hold it to the paper's claims.

An experiment is a folder `experiments/NAME/` of the checkout with an `experiment.py` that defines

    PAPER = "Lucas et al. 2019, ..."                 a literal, one line
    CLAIM = "..."                                    a literal, one sentence
    SETTINGS = {"quick": {...}, "full": {...}}       optional: the numbers that decide what is measured, seeds among them
    measure(context: Context) -> dict                the heavy part; what it returns can be written as JSON
    claims(results: dict) -> list[Claim]             pure, from what `measure` returned and nothing else
    table(results: dict) -> Table                    the paper's numbers beside ours
    figure(results: dict) -> matplotlib Figure

`measure` is not run again while its results are there and the settings are those they were made with: SETTINGS of the
form, and conf/experiment/NAME.yaml (for the quick form NAME_quick.yaml too), where there are such files. Everything else
is made anew from results.json at each call, so that a verdict can be recomputed anywhere: figure.png, verdicts.json, and
the part of the experiment's README.md between the lines <!-- full --> and <!-- /full --> (or quick). What takes hours can be
a part of its own (`Context.part`), which is not measured again when only the settings of others change. Imports no torch.
"""

from __future__ import annotations

import argparse
import ast
import base64
import datetime
import importlib
import json
import math
import os
import platform
import re
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from vae.cli import CONFIGS, command_line, sentences
from vae.errors import VAEError
from vae.files import write_atomically, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

FORMS = ("quick", "full")
FIGURE_BYTES = 300_000  # figures are committed
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


# --- what an experiment is made of ----------------------------------------------------------------------------------


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
            self.say(f"{name}: {'trained before' if before == seconds else 'trained'}, {_duration(seconds)}")
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
        self.parts[name] = {"settings": stamp, "seconds": round(seconds, 1), **_surroundings()}
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
        self.say(f"{name}: measured, {_duration(seconds)}")
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
                self.say(f"{name}: measured, {_duration(piece['seconds'])}")
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

    from vae.run import read_status, train

    if not any(override.startswith("threads=") for override in overrides):
        overrides = [*overrides, "threads=1"]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", overrides)
    found, started = read_status(folder), time.monotonic()
    train(config, folder, overrides, resume=True, progress_bar=False)
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


# --- running one ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """experiments/NAME of a checkout. outputs: the folder that stands for the checkout where files are written."""

    name: str
    checkout: Path = Path()
    outputs: Path | None = None

    def __post_init__(self) -> None:
        if not (self.checkout / "experiments" / self.name / "experiment.py").is_file():
            known = ", ".join(names(self.checkout))
            raise VAEError(
                f"There is no experiment {self.name!r} here: choose from {known}."
                if known
                else "There is no experiments/ folder here: experiments belong to the source code, not to the installed "
                "package; clone the repository and run this in its root."
            )

    def results_folder(self, form: str) -> Path:
        return (self.outputs or self.checkout) / "experiments" / self.name / "results" / form

    def scratch(self, form: str) -> Path:
        return (self.outputs or self.checkout) / "runs" / "experiments" / (self.name + ("-quick" * (form == "quick")))

    def module(self) -> ModuleType:
        """experiments.NAME.experiment, imported from the checkout."""
        path = str(self.checkout.resolve())
        if path not in sys.path:
            sys.path.insert(0, path)
            importlib.invalidate_caches()
        return importlib.import_module(f"experiments.{self.name}.experiment")

    def literal(self, constant: str) -> str:
        """PAPER or CLAIM, without importing what `measure` needs."""
        tree = ast.parse((self.checkout / "experiments" / self.name / "experiment.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == constant for t in node.targets):
                return ast.literal_eval(node.value)
        raise VAEError(f"experiments/{self.name}/experiment.py does not say its {constant}.")

    def settings(self, form: str) -> dict[str, Any]:
        """What the results depend on: SETTINGS of the form, and the configs of that name."""
        stamp: dict[str, Any] = {"settings": getattr(self.module(), "SETTINGS", {}).get(form, {})}
        for name in (self.name, f"{self.name}_quick")[: 2 if form == "quick" else 1]:
            path = Path(CONFIGS) / "experiment" / f"{name}.yaml"
            if path.is_file():
                stamp[f"conf/experiment/{name}.yaml"] = yaml.safe_load(path.read_text())
        return as_json(stamp)


def names(checkout: Path = Path()) -> list[str]:
    """The experiments of a checkout."""
    return sorted(path.parent.name for path in checkout.glob("experiments/*/experiment.py"))


def reproduce(
    experiment: Experiment, form: str = "full", jobs: int = 1, again: bool = False, console: Console | None = None
) -> list[Claim]:
    """Measure what is missing, draw the figure, print the table and the verdicts; returns the claims.

    again: measure anew from the trained runs, although results are there.
    """
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    folder, module = experiment.results_folder(form), experiment.module()
    console.rule(f"{experiment.name} ({form})", align="left")
    console.print(f"{experiment.literal('PAPER')}\n{experiment.literal('CLAIM')}", highlight=False)

    record = _measured(experiment, form, jobs, again, console)
    results = record["results"]
    _draw(module, results, folder / "figure.png")
    claims = module.claims(results)
    verdicts = {"claims": [asdict(claim) for claim in claims], "held": sum(c.holds for c in claims), "of": len(claims)}
    made = {key: record[key] for key in ("date", "device", "seconds")}
    write_json(folder / "verdicts.json", as_json({**verdicts, **made}))
    if experiment.outputs is None:
        fill_readme(experiment, form)

    module.table(results).print(console)
    for claim in claims:
        console.print(
            f"[{'bold green]pass' if claim.holds else 'bold red]MISS'}[/] "
            + escape(f"{claim.name}: {claim.measured} (target: {claim.target})"),
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"{verdicts['held']} of {verdicts['of']} claims hold. Measured on {record['device']}, {record['date'][:10]}, "
        f"in {_duration(record['seconds'])}. Results and figure: {folder}",
        highlight=False,
        soft_wrap=True,
    )
    return claims


def _measured(experiment: Experiment, form: str, jobs: int, again: bool, console: Console) -> dict[str, Any]:
    """What results.json holds, made first if it is missing or its settings are no longer those of the code."""
    path, stamp = experiment.results_folder(form) / "results.json", experiment.settings(form)
    committed = json.loads(path.read_text()) if path.is_file() and not again else {}
    if committed:
        if committed["settings"] == stamp:
            return committed
        console.print("The settings have changed since this was measured: measuring again.")
    scratch = experiment.scratch(form)
    if again:
        for piece in scratch.glob("pieces/*.json"):
            piece.unlink()
    context = Context(
        quick=form == "quick",
        folder=scratch,
        jobs=jobs,
        settings=stamp["settings"],
        stamp=stamp,
        committed=committed,
        say=lambda line: console.print(f"  {line}", style="dim", highlight=False, soft_wrap=True),
    )
    scratch.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results = as_json(experiment.module().measure(context))
    seconds = time.monotonic() - started + context.reused_seconds
    flags = " --quick" * (form == "quick") + f" --jobs {jobs}"
    record = {
        "command": f"python -m vae.reproduce {experiment.name}{flags}",
        "seconds": round(seconds, 1),
        **_surroundings(),
        "settings": stamp,
        **({"parts": context.parts} if context.parts else {}),
        "results": results,
    }
    write_text(path, _compact(record))
    return json.loads(path.read_text())


def _compact(value: Any) -> str:
    """Indented JSON with each list of numbers on a line of its own, so that curves can be committed and compared."""
    number = r"-?(?:[\d.eE+-]+|NaN|Infinity)"
    return re.sub(
        rf"\[\n\s+({number}(?:,\n\s+{number})*)\n\s*\]",
        lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]",
        json.dumps(value, indent=1) + "\n",
    )


def _surroundings() -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({os.cpu_count()} cores)"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _draw(module: ModuleType, results: dict[str, Any], path: Path) -> None:
    """figure.png, at the finest resolution that keeps it within FIGURE_BYTES."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(STYLE):
        figure = module.figure(results)
        for dpi in (150, 120, 100, 80):
            write_atomically(path, lambda file, dpi=dpi: figure.savefig(file, format="png", dpi=dpi))
            if path.stat().st_size <= FIGURE_BYTES:
                break
        plt.close(figure)


def verdict_table(claims: list[Claim]) -> Table:
    rows = [("pass" if claim.holds else "MISS", claim.name, claim.measured, claim.target) for claim in claims]
    return Table(("verdict", "claim", "measured", "target"), rows, numbers=False)


# --- all of them ----------------------------------------------------------------------------------------------------


def overview(checkout: Path = Path()) -> Table:
    """Every experiment with its last verdicts, in both forms, and what they cost."""
    rows = []
    for name in names(checkout):
        experiment = Experiment(name, checkout)
        rows.append((name, *(_last(experiment.results_folder(form)) for form in FORMS), experiment.literal("PAPER")))
    return Table(("experiment", "quick", "full", "paper"), rows)


def _last(folder: Path) -> str:
    try:
        verdicts = json.loads((folder / "verdicts.json").read_text())
    except FileNotFoundError:
        return "not yet run"
    return f"{verdicts['held']} of {verdicts['of']}, {_duration(verdicts['seconds'])}"


def _duration(seconds: float) -> str:
    """ "42 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def main(arguments: Sequence[str] | None = None, checkout: Path = Path()) -> int:
    """0 if every claim of every experiment named holds, otherwise 1."""
    parser = argparse.ArgumentParser(prog="python -m vae.reproduce", description="Rerun papers' experiments.")
    parser.add_argument("names", nargs="*", metavar="name", help="folders in experiments/, or `all`")
    parser.add_argument("--list", action="store_true", help="all experiments, with their last verdicts and cost")
    parser.add_argument("--quick", action="store_true", help="the smallest form that decides the main claim")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs side by side, a thread each (default 2)")
    parser.add_argument("--again", action="store_true", help="measure anew; trained runs are kept")
    parser.add_argument("--markdown", action="store_true", help="print what is there as Markdown tables, for a README")
    options = parser.parse_args(arguments)
    if bool(options.names) == options.list:
        parser.error("give the name of an experiment, or `all`, or --list")
    command_line()  # for the processes that runs may be given to
    from rich.console import Console

    console = Console()
    with sentences():
        if options.jobs < 1:
            raise VAEError(f"--jobs {options.jobs} must be at least 1.")
        if options.list:
            table = overview(checkout)
            if not table.rows:
                Experiment("", checkout)  # raises the sentence that says where experiments are
            print(table.markdown(), end="") if options.markdown else table.print(console)
            return 0
        form, chosen = (
            "quick" if options.quick else "full",
            names(checkout) if options.names == ["all"] else options.names,
        )
        experiments = [Experiment(name, checkout) for name in chosen or [""]]  # all known before the first is begun
        if options.markdown:
            print("\n".join(markdown(experiment, form) for experiment in experiments), end="")
            return 0
        try:
            held = [_held(experiment, form, options.jobs, options.again, console) for experiment in experiments]
        except KeyboardInterrupt:
            console.print("Interrupted. What was measured is kept: the same command goes on from there.")
            return 130
    if len(held) > 1:
        console.print(f"All claims hold in {sum(held)} of {len(held)} experiments.", highlight=False)
    return 0 if all(held) else 1


def _held(experiment: Experiment, form: str, jobs: int, again: bool, console: Console) -> bool:
    """Whether all claims hold. An experiment that cannot be run is told in a sentence, and the next has its turn with
    the threads that this one began with."""
    import torch

    threads = torch.get_num_threads()
    try:
        return all(claim.holds for claim in reproduce(experiment, form, jobs, again, console))
    except VAEError as error:
        print(f"Error: {error}", file=sys.stderr)
        return False
    finally:
        torch.set_num_threads(threads)


def markdown(experiment: Experiment, form: str) -> str:
    """The table and the verdicts of finished results. Raises VAEError where there are none."""
    path = experiment.results_folder(form) / "results.json"
    if not path.is_file():
        raise VAEError(f"{path} does not exist: run the experiment first.")
    record, module = json.loads(path.read_text()), experiment.module()
    made = f"`{record['command']}`, {record['device']}, {record['date'][:10]}, {_duration(record['seconds'])}.\n"
    earlier: dict[str, list[tuple[str, float]]] = {}
    for name, part in record.get("parts", {}).items():
        if (day := part["date"][:10]) != record["date"][:10]:
            earlier.setdefault(day, []).append((f"`{name}`", part["seconds"]))
    for day, parts in earlier.items():
        names, seconds = zip(*parts, strict=True)
        made = made.replace(".\n", f"; of it {', '.join(names)} on {day}, {_duration(sum(seconds))}.\n")
    verdicts = verdict_table(module.claims(record["results"])).markdown()
    return "\n".join([module.table(record["results"]).markdown(), verdicts, made])


def fill_readme(experiment: Experiment, form: str) -> None:
    """Write the form's table and verdicts between the lines <!-- FORM --> and <!-- /FORM --> of the experiment's README,
    if it has them, so that its numbers are those of the results."""
    path = experiment.checkout / "experiments" / experiment.name / "README.md"
    text = path.read_text() if path.is_file() else ""
    before, start, rest = text.partition(f"<!-- {form} -->\n")
    _, end, after = rest.partition(f"<!-- /{form} -->\n")
    if start and end:
        write_text(path, f"{before}{start}\n{markdown(experiment, form)}\n{end}{after}")


if __name__ == "__main__":
    from vae.reproduce import main as entry  # not __main__'s own: worker processes must find the functions by name

    sys.exit(entry())
