"""`python -m vae.reproduce NAME [--quick]`: rerun a paper's experiment and hold it to the paper's claims.

An experiment is a folder `experiments/NAME/` of the checkout with three files, written with vae.experiment, vae.claims and
vae.experiment_figures:

    protocol.py    PAPER = "Lucas et al. 2019, ..."            a literal, one line
                   CLAIM = "..."                               a literal, one sentence
                   SETTINGS = {"quick": {...}, "full": {...}}  optional: the numbers that decide what is measured, seeds
                                                               among them
                   measure(context: Context) -> dict           the heavy part; what it returns can be written as JSON
    claims.py      claims(results: dict) -> list[Claim]        pure, from what `measure` returned and nothing else
                   table(results: dict) -> Table               the paper's numbers beside ours
    figure.py      figure(results: dict) -> matplotlib Figure

`measure` is not run again while its results are there and the settings are those they were made with: SETTINGS of the
form, and conf/experiment/NAME.yaml (for the quick form NAME_quick.yaml too), where there are such files. Everything else
is made anew from results.json at each call, so that a verdict can be recomputed anywhere: figure.png, verdicts.json, and
the part of the experiment's README.md between the lines <!-- full --> and <!-- /full --> (or quick). What takes hours can be
a part of its own (`Context.part`), which is not measured again when only the settings of others change. Imports no torch.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import yaml

from vae.claims import Claim, Table
from vae.cli import CONFIGS, command_line, duration, sentences
from vae.errors import VAEError
from vae.experiment import Context, as_json, surroundings
from vae.experiment_figures import STYLE
from vae.files import write_atomically, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

FORMS = ("quick", "full")
FIGURE_BYTES = 300_000  # figures are committed

# --- running one ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    """experiments/NAME of a checkout. outputs: the folder that stands for the checkout where files are written."""

    name: str
    checkout: Path = Path()
    outputs: Path | None = None

    def __post_init__(self) -> None:
        if not (self.checkout / "experiments" / self.name / "protocol.py").is_file():
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

    def module(self, part: str) -> ModuleType:
        """experiments.NAME.protocol, .claims or .figure, imported from the checkout."""
        path = str(self.checkout.resolve())
        if path not in sys.path:
            sys.path.insert(0, path)
            importlib.invalidate_caches()
        return importlib.import_module(f"experiments.{self.name}.{part}")

    def literal(self, constant: str) -> str:
        """PAPER or CLAIM, without importing what `measure` needs."""
        tree = ast.parse((self.checkout / "experiments" / self.name / "protocol.py").read_text())
        for node in tree.body:
            if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == constant for t in node.targets):
                return ast.literal_eval(node.value)
        raise VAEError(f"experiments/{self.name}/protocol.py does not say its {constant}.")

    def settings(self, form: str) -> dict[str, Any]:
        """What the results depend on: SETTINGS of the form, and the configs of that name."""
        stamp: dict[str, Any] = {"settings": getattr(self.module("protocol"), "SETTINGS", {}).get(form, {})}
        for name in (self.name, f"{self.name}_quick")[: 2 if form == "quick" else 1]:
            path = Path(CONFIGS) / "experiment" / f"{name}.yaml"
            if path.is_file():
                stamp[f"conf/experiment/{name}.yaml"] = yaml.safe_load(path.read_text())
        return as_json(stamp)


def names(checkout: Path = Path()) -> list[str]:
    """The experiments of a checkout."""
    return sorted(path.parent.name for path in checkout.glob("experiments/*/protocol.py"))


def reproduce(
    experiment: Experiment, form: str = "full", jobs: int = 1, again: bool = False, console: Console | None = None
) -> list[Claim]:
    """Measure what is missing, draw the figure, print the table and the verdicts; returns the claims.

    again: measure anew from the trained runs, although results are there.
    """
    from rich.console import Console
    from rich.markup import escape

    console = console or Console()
    folder, said = experiment.results_folder(form), experiment.module("claims")
    console.rule(f"{experiment.name} ({form})", align="left")
    console.print(f"{experiment.literal('PAPER')}\n{experiment.literal('CLAIM')}", highlight=False)

    record = _measured(experiment, form, jobs, again, console)
    results = record["results"]
    _draw(experiment.module("figure"), results, folder / "figure.png")
    claims = said.claims(results)
    verdicts = {"claims": [asdict(claim) for claim in claims], "held": sum(c.holds for c in claims), "of": len(claims)}
    made = {key: record[key] for key in ("date", "device", "seconds")}
    write_json(folder / "verdicts.json", as_json({**verdicts, **made}))
    if experiment.outputs is None:
        fill_readme(experiment, form)

    said.table(results).print(console)
    for claim in claims:
        console.print(
            f"[{'bold green]pass' if claim.holds else 'bold red]MISS'}[/] "
            + escape(f"{claim.name}: {claim.measured} (target: {claim.target})"),
            highlight=False,
            soft_wrap=True,
        )
    console.print(
        f"{verdicts['held']} of {verdicts['of']} claims hold. Measured on {record['device']}, {record['date'][:10]}, "
        f"in {duration(record['seconds'])}. Results and figure: {folder}",
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
        name=experiment.name,
        stamp=stamp,
        committed=committed,
        say=lambda line: console.print(f"  {line}", style="dim", highlight=False, soft_wrap=True),
    )
    scratch.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    results = as_json(experiment.module("protocol").measure(context))
    seconds = time.monotonic() - started + context.reused_seconds
    flags = " --quick" * (form == "quick") + f" --jobs {jobs}"
    record = {
        "command": f"python -m vae.reproduce {experiment.name}{flags}",
        "seconds": round(seconds, 1),
        **surroundings(),
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


def overview(checkout: Path = Path(), short: bool = False) -> Table:
    """Every experiment with its last verdicts, in both forms, and what they cost. short: for a terminal of 80 columns."""
    rows = []
    for name in names(checkout):
        experiment = Experiment(name, checkout)
        paper = experiment.literal("PAPER")
        last = (_last(experiment.results_folder(form)) for form in FORMS)
        rows.append((name, *last, first_source(paper) if short else paper))
    return Table(("experiment", "quick", "full", "paper"), rows, numbers=not short, fixed=3)


def first_source(paper: str) -> str:
    """ "Hinton 2015": the first author and the year of the first work that PAPER names."""
    found = re.search(r"([A-Z]\w+)(?:(?:, [A-Z]\w+)* & [A-Z]\w+| et al\.)? (\d{4})", paper)
    return f"{found[1]} {found[2]}" if found else paper


def _last(folder: Path) -> str:
    try:
        verdicts = json.loads((folder / "verdicts.json").read_text())
    except FileNotFoundError:
        return "not yet run"
    return f"{verdicts['held']} of {verdicts['of']}, {duration(verdicts['seconds'])}"


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
            table = overview(checkout, short=not options.markdown)
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
    """Whether all claims hold. An experiment that cannot be run is reported in a sentence, and the next has its turn with
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
    record, said = json.loads(path.read_text()), experiment.module("claims")
    made = f"`{record['command']}`, {record['device']}, {record['date'][:10]}, {duration(record['seconds'])}.\n"
    earlier: dict[str, list[tuple[str, float]]] = {}
    for name, part in record.get("parts", {}).items():
        if (day := part["date"][:10]) != record["date"][:10]:
            earlier.setdefault(day, []).append((f"`{name}`", part["seconds"]))
    for day, parts in earlier.items():
        names, seconds = zip(*parts, strict=True)
        made = made.replace(".\n", f"; of it {', '.join(names)} on {day}, {duration(sum(seconds))}.\n")
    verdicts = verdict_table(said.claims(record["results"])).markdown()
    return "\n".join([said.table(record["results"]).markdown(), verdicts, made])


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
