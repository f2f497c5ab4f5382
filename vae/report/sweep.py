"""A folder of runs -> a `Sweep`: what was varied, which runs compare with each other, what failed, what is missing."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from vae.errors import VAEError
from vae.report.choices import group_of, named_by, options, settings_of
from vae.report.keys import LATENT_SIZE, OPERATIONAL_ROOTS, how_measured, is_operational, is_seed, leaf, preference
from vae.report.missing import missing_runs
from vae.report.runs import DAMAGED, FINISHED, PRUNED, Run, find_run_folders, read_run
from vae.report.values import canonical, format_value, is_number, sort_key

#: Settings that change the pixels a likelihood is measured on.
_PIXELS = ("data.binarize", *(f"data.source.{name}" for name in ("size", "crop", "fit", "channels", "subset")))
#: Classes of this package that earlier versions, which wrote no facts.json, named as the likelihood: densities.
_DENSITIES = {
    *("Gaussian", "LearnedSigmaGaussian", "OptimalSigmaGaussian", "PixelSigmaGaussian"),
    *("Laplace", "LearnedScaleLaplace", "ContinuousBernoulli"),
}


@dataclass(frozen=True)
class Sweep:
    """The runs of one folder, in order of data set, settings and seed.

    swept: the keys whose values differ among runs, in the order in which the runs are sorted; a group choice such as
    `network=conv` counts as one key. in_step: keys that also differ but whose value follows from one swept key's.
    seeds: whether runs are replicated over `seed`. missing: the overrides of combinations that the sweep's command
    line asked for and for which there is no run. split: the split whose metrics are reported, test where any run has
    them.
    """

    folder: Path
    runs: tuple[Run, ...]
    swept: tuple[str, ...] = ()
    in_step: dict[str, str] = field(default_factory=dict)
    seeds: bool = False
    missing: tuple[tuple[str, ...], ...] = ()
    split: str = "test"

    @property
    def finished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.finished)

    @property
    def failed(self) -> tuple[Run, ...]:
        """Every run without a result: it failed, was cut off (or still runs), or its files are damaged."""
        return tuple(run for run in self.runs if not run.finished and run.state != PRUNED)

    @property
    def complete(self) -> bool:
        """Every run that was asked for finished, or was pruned by its search."""
        return not self.failed and not self.missing

    @property
    def data_sets(self) -> tuple[str, ...]:
        """Labels of sets of runs whose likelihoods compare, in order; a run that left no config adds none."""
        known = [run for run in self.runs if run.config] or self.runs
        return tuple(dict.fromkeys(run.data for run in known))

    @cached_property
    def data_column(self) -> bool:
        """Whether a table needs a column for the data set: there are several, and no swept key already says which."""
        said = any(all(format_value(run.settings[key]) == run.data for run in self.runs) for key in self.swept)
        return len(self.data_sets) > 1 and not said

    @cached_property
    def places(self) -> dict[int, int]:
        """Where each run stands in `runs`, by its id: a search through thousands of runs for each would be slow."""
        return {id(run): i for i, run in enumerate(self.runs)}

    @property
    def seconds(self) -> float:
        """Time of all runs, added up."""
        return math.fsum(run.seconds or 0.0 for run in self.runs)

    @property
    def beta(self) -> str | None:
        """The swept key that weighs the rate, if any."""
        exact = [key for key in self.swept if leaf(key) == "beta"]
        near = [key for key in self.swept if "beta" in key.split(".") and self.numeric(key)]
        return next(iter(exact + near), None)

    @property
    def latent_size(self) -> str | None:
        """The swept key that is the number of latent dimensions, if any."""
        return next((key for key in self.swept if leaf(key) == LATENT_SIZE), None)

    def value(self, run: Run, metric: str) -> float:
        """A metric of the reported split, e.g. "elbo"; NaN where the run has none."""
        return run.metrics.get(f"{self.split}/{metric}", math.nan) if run.finished else math.nan

    def best(self, data: str) -> Run | None:
        """The run with the highest ELBO on a data set."""
        scored = [run for run in self.runs if run.data == data and math.isfinite(self.value(run, "elbo"))]
        return max(scored, key=lambda run: self.value(run, "elbo"), default=None)

    def values(self, key: str, runs: tuple[Run, ...] | list[Run] | None = None) -> list[Any]:
        """The distinct values of a swept key, numbers in order and before words."""
        if runs is None:
            if key not in self._values:
                self._values[key] = self.values(key, self.runs)
            return self._values[key]
        found = {canonical(value): value for value in (run.settings.get(key) for run in runs if run.config)}
        return sorted(found.values(), key=sort_key)

    @cached_property
    def _values(self) -> dict[str, list[Any]]:
        return {}

    def numeric(self, key: str) -> bool:
        return all(is_number(value) for value in self.values(key))

    def label(self, key: str) -> str:
        """The shortest name that tells a swept key from the others: "beta" for "objective.beta"."""
        names = {
            other: re.split(r"[./]", re.sub(r"(?<=.)\.(_target_|name)$", "", other)) for other in (*self.swept, key)
        }
        mine = names.pop(key)
        lengths = (n for n in range(1, len(mine)) if all(other[-n:] != mine[-n:] for other in names.values()))
        return ".".join(mine[-next(lengths, len(mine)) :])

    @cached_property
    def usual(self) -> dict[str, Any]:
        """In a folder of runs that were not started as one sweep, what more than half of the finished have of a swept key."""
        if (self.folder / "multirun.yaml").is_file():
            return {}
        counts = {key: Counter(canonical(run.settings[key]) for run in self.finished) for key in self.swept}
        most = {key: found.most_common(1)[0] for key, found in counts.items() if found}
        return {key: value for key, (value, n) in most.items() if 2 * n > len(self.finished)}

    def departures(self, run: Run) -> str:
        """The run's settings less the usual ones, and less its seed; its name where it has no others."""
        keys = [key for key in self.swept if canonical(run.settings[key]) != self.usual.get(key)]
        parts = [f"{self.label(key)} {format_value(run.settings[key])}" for key in keys]
        return ", ".join(parts) or ("all as usual" if self.seeds else run.name)

    def describe(self, run: Run, with_data: bool = True, with_seed: bool = True) -> str:
        """The run's settings in a line, e.g. "latent_dim 10, beta 4, seed 1"; its name where nothing was varied."""
        keys = [key for key in self.swept if with_data or format_value(run.settings[key]) != run.data]
        parts = [f"{self.label(key)} {format_value(run.settings.get(key))}" for key in keys]
        if self.seeds and with_seed:
            parts.append(f"seed {format_value(run.seed)}")
        return ", ".join(parts) or (run.name if with_seed or not self.seeds else "every setting")


def read_sweep(folder: str | Path) -> Sweep:
    """Read a sweep's folder, or a single run's.

    Raises VAEError if the folder does not exist, holds no runs, or holds nothing but damaged ones.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise VAEError(f"There is no folder {str(folder)!r}.")
    try:
        folders = list(find_run_folders(folder))
    except OSError as error:
        raise VAEError(f"{error.filename!r} cannot be read: {error.strerror}.") from error
    if not folders:
        raise VAEError(f"No runs in {str(folder)!r}: no folder in it holds a config.yaml, status.json or metrics.json.")
    single = folders == [folder]
    runs = [
        read_run(path, folder.resolve().name if single else _text(path.relative_to(folder).as_posix()))
        for path in folders
    ]
    if all(run.state == DAMAGED for run in runs):
        raise VAEError(f"No run in {str(folder)!r} can be read: {runs[0].name}: {runs[0].reason}")

    swept, in_step = _swept_keys(runs)
    settings = {key: settings_of(runs, key) for key in swept}
    for i, run in enumerate(runs):
        run.settings = {key: settings[key][i] for key in swept}
        run.seed = run.config.get("seed")
    for run, label in zip(runs, data_labels(runs), strict=True):
        run.data = label
    seeds = len({canonical(run.seed) for run in runs if run.seed is not None}) > 1
    runs.sort(key=lambda run: (run.data, [sort_key(v) for v in run.settings.values()], sort_key(run.seed), run.name))
    with_results = [run for run in runs if run.state == FINISHED]
    split = next((s for s in ("test", "val") if any(f"{s}/elbo" in run.metrics for run in with_results)), "test")
    return Sweep(folder, tuple(runs), tuple(swept), in_step, seeds, missing_runs(folder, runs), split)


# ---- what was varied ----


def _swept_keys(runs: list[Run]) -> tuple[list[str], dict[str, str]]:
    """Keys that differ among the runs, and those among them that merely follow another: {follower: key}.

    What command lines named is a swept key whatever the values, if it differs; how runs were measured only if all of them
    named it. Any other key that differs is one unless a single swept key already determines it: the whole of `network.*`
    follows from `network=mlp,conv`.
    """
    runs = [run for run in runs if run.config]

    @cache
    def column(key: str) -> list[str]:
        return [canonical(value) for value in settings_of(runs, key)]

    overridden = [named_by(run) for run in runs]
    configs = [run.config for run in runs]
    every = list(dict.fromkeys(key for config in configs for key in config))
    differing = [key for key in every if len({canonical(config.get(key)) for config in configs}) > 1]
    explicit = list(dict.fromkeys(key for overrides in overridden for key in overrides))
    explicit = [key for key in explicit if key.split(".")[0] not in OPERATIONAL_ROOTS and not is_seed(key)]
    explicit = [key for key in explicit if len(set(column(key))) > 1]
    explicit = [key for key in explicit if not how_measured(key) or all(key in named for named in overridden)]
    kept = {key: column(key) for key in sorted(explicit, key=preference)}
    seeds = [canonical(run.config.get("seed")) for run in runs]
    replicated = len(set(seeds)) < len(runs)
    in_step = {}
    rest = [key for key in differing if key not in kept and not is_operational(key, runs)]
    chosen = [group for key in rest if (group := group_of(key)) and len(set(column(group))) > 1]
    rest += [group for group in dict.fromkeys(chosen) if group not in kept]
    # the finest distinctions first, so that what follows from them is seen to follow
    for key in sorted(rest, key=lambda key: (-len(set(column(key))), preference(key))):
        values = column(key)
        parent = next((other for other, theirs in kept.items() if _determines(theirs, values)), None)
        if parent is not None:
            in_step[key] = parent
        elif is_seed(key) or (replicated and _determines(seeds, values)):
            continue
        else:
            kept[key] = values
    return sorted(kept, key=preference), in_step


def _determines(given: list[str], values: list[str]) -> bool:
    """Whether equal entries of `given` always come with equal `values`."""
    seen: dict[str, str] = {}
    return all(seen.setdefault(g, v) == v for g, v in zip(given, values, strict=True))


def _text(name: str) -> str:
    """A file name as text that can be written: bytes that are no UTF-8 become escapes."""
    return name.encode(errors="backslashreplace").decode()


# ---- which runs compare ----


def data_labels(runs: list[Run]) -> list[str]:
    """The data set of each run, with what else sets its likelihoods apart: "mnist, binarize dynamic".

    A density (Gaussian) and a probability (Bernoulli) of the same images are different quantities, and so are those of
    grey and of binarised pixels; runs that differ so get different labels.
    """
    names = [_data_name(run) for run in runs]
    pixel_keys = sorted({key for run in runs for key in run.config if key.startswith(_PIXELS)})
    traits = [
        {**{key: run.config.get(key) for key in pixel_keys}, "likelihood": _measure(run), "given": _given(run)}
        if run.config
        else {}
        for run in runs
    ]
    differing = {}  # once for each name: run by run it would be quadratic in the runs
    for name in dict.fromkeys(names):
        same = [mine for other, mine in zip(names, traits, strict=True) if other == name and mine]
        keys = same[0] if same else {}
        differing[name] = [key for key in keys if len({canonical(mine.get(key)) for mine in same}) > 1]
    labels = []
    for name, mine in zip(names, traits, strict=True):
        details = [f"{leaf(key)} {format_value(mine[key])}" for key in differing[name] if key in mine]
        labels.append(", ".join([name, *details]))
    return labels


def _data_name(run: Run) -> str:
    if "data" in run.facts:
        return str(run.facts["data"])
    named = run.config.get("data.source._target_") or run.config.get("data._target_")  # of an earlier version
    return str(named).rsplit(".", 1)[-1] if named else named_by(run).get("data", "data set unknown")


def _measure(run: Run) -> str:
    """What kind of number log p(x|z) is: it compares only with its own kind."""
    kind = str(run.facts.get("likelihood") or run.config.get("likelihood._target_") or "").rsplit(".", 1)[-1]
    kind = kind.replace("Discretised", "Discretized")  # as earlier versions had it
    names = {leaf(flat["likelihood._target_"]): name for name, flat in options("likelihood").items()}
    return names.get(kind, kind.lower()) if run.facts.get("discrete", kind not in _DENSITIES) else "density"


def _given(run: Run) -> str:
    """p(x|y) of a model that is given labels is not the p(x) of one that is not."""
    return "labels" if run.facts.get("num_classes") and not run.facts.get("latent_label") else "no labels"


def states(runs: tuple[Run, ...]) -> Counter[str]:
    return Counter(run.state for run in runs)
