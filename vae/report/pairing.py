"""Two or three sweeps side by side: which of their runs are the same but for the sweep that they are of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae.errors import VAEError
from vae.report.choices import settings_of
from vae.report.keys import is_operational, is_seed, preference
from vae.report.runs import Run
from vae.report.sweep import Sweep, data_labels, read_sweep
from vae.report.values import canonical, format_value, sort_key

LETTERS = "ABC"


@dataclass(frozen=True)
class Row:
    """A setting. runs: of each sweep, its finished runs by seed; unfinished: seeds whose run has no result, and its state."""

    data: str
    settings: dict[str, Any]
    runs: tuple[dict[str, Run], ...]
    unfinished: tuple[dict[str, Run], ...]

    def seeds(self, other: int) -> list[str]:
        """Those that the first sweep and another have a result for."""
        return [seed for seed in self.runs[0] if seed in self.runs[other]]

    def pairs(self, other: int) -> list[tuple[Run, Run]]:
        return [(self.runs[0][seed], self.runs[other][seed]) for seed in self.seeds(other)]


@dataclass(frozen=True)
class Sides:
    """pool: all runs as one sweep, whose keys are those that any of the sweeps varies; rows: every setting, in order;
    repeats: for each sweep, runs that share settings and seed with an earlier one and are left out."""

    sweeps: tuple[Sweep, ...]
    pool: Sweep
    rows: tuple[Row, ...]
    repeats: tuple[int, ...]

    def compared(self, other: int) -> list[Row]:
        return [row for row in self.rows if row.seeds(other)]

    def name(self, index: int) -> str:
        return self.sweeps[index].folder.resolve().name

    def describe(self, row: Row) -> str:
        keys = [key for key in self.pool.swept if format_value(row.settings[key]) != row.data]
        parts = [f"{self.pool.label(key)} {format_value(row.settings[key])}" for key in keys]
        return ", ".join(([row.data] if self.pool.data_column else []) + parts) or "the only setting"


def read_sides(folders: list[str | Path]) -> Sides:
    """Read sweeps and pair their runs by settings and seed.

    Raises VAEError as `read_sweep` does; for more than three sweeps, or one three times; where a sweep has no result, where
    they have metrics of different splits, and where no run of the first has one like it in any other.
    """
    if len(folders) > len(LETTERS):
        raise VAEError(f"At most {len(LETTERS)} sweeps are set side by side, and {len(folders)} are named.")
    if len(folders) == 3 and len({Path(folder).resolve() for folder in folders}) == 1:
        raise VAEError(
            f"{str(folders[0])!r} is named three times: name it once for its report, or beside another sweep."
        )
    sweeps = tuple(read_sweep(folder) for folder in folders)
    for sweep in sweeps:
        if not sweep.finished:
            first = sweep.failed[0]
            raise VAEError(
                f"No run in {str(sweep.folder)!r} finished, so there is nothing to compare: {first.name}: {first.reason}"
            )
    if len({sweep.split for sweep in sweeps}) > 1:
        said = " and ".join(f"{sweep.split} metrics in {str(sweep.folder)!r}" for sweep in sweeps)
        raise VAEError(f"There are {said}: numbers of different splits do not compare.")
    sides = _paired(sweeps)
    others = range(1, len(sweeps))
    if not any(sides.compared(other) for other in others):
        raise VAEError(" ".join(nothing_in_common(sides, other) for other in others))
    return sides


def _paired(sweeps: tuple[Sweep, ...]) -> Sides:
    every = [run for sweep in sweeps for run in sweep.runs]
    keys = sorted(dict.fromkeys(key for sweep in sweeps for key in sweep.swept), key=preference)
    values = {key: settings_of(every, key) for key in keys}
    for i, (run, label) in enumerate(zip(every, data_labels(every), strict=True)):
        run.settings = {key: values[key][i] for key in keys}
        run.data = label
    rows: dict[tuple[str, ...], Row] = {}
    repeats = [0] * len(sweeps)
    for side, sweep in enumerate(sweeps):
        for run in sweep.runs:
            if not run.config and keys:  # nothing says which setting it was
                continue
            key = (run.data, *map(canonical, run.settings.values()))
            row = rows.setdefault(key, Row(run.data, run.settings, _empty(sweeps), _empty(sweeps)))
            place, seed = (row.runs if run.finished else row.unfinished)[side], canonical(run.seed)
            if seed in place:
                repeats[side] += 1
            place.setdefault(seed, run)
    ordered = sorted(rows.values(), key=lambda row: (row.data, [sort_key(v) for v in row.settings.values()]))
    pool = Sweep(sweeps[0].folder, tuple(every), tuple(keys), seeds=any(s.seeds for s in sweeps), split=sweeps[0].split)
    return Sides(sweeps, pool, tuple(ordered), tuple(repeats))


def _empty(sweeps: tuple[Sweep, ...]) -> tuple[dict[str, Run], ...]:
    return tuple({} for _ in sweeps)


# ---- what is in one and not in the other ----


def nothing_in_common(sides: Sides, other: int) -> str:
    """Why no run of the first sweep has one like it in another, as a sentence."""
    first, second = (str(sides.sweeps[side].folder) for side in (0, other))
    both = f"{first!r} and {second!r}"
    mine, theirs = ({row.data for row in sides.rows if row.runs[side] or row.unfinished[side]} for side in (0, other))
    if not mine & theirs:
        return (
            f"{first!r} is of {_listed(mine)} and {second!r} of {_listed(theirs)}: likelihoods compare only on the same "
            "images, prepared alike, under the same kind of likelihood."
        )
    for key in sides.pool.swept:
        values = [
            {canonical(row.settings[key]): format_value(row.settings[key]) for row in sides.rows if row.runs[side]}
            for side in (0, other)
        ]
        if not set(values[0]) & set(values[1]):
            said = [_listed(found.values()) for found in values]
            return f"{both} have no setting in common: {key} is {said[0]} in the first and {said[1]} in the second."
    shared = [row for row in sides.rows if row.runs[0] and row.runs[other]]
    if not shared:
        failed = any(row.unfinished[0] or row.unfinished[other] for row in sides.rows)
        lacking = ": what the one has failed or is missing in the other" if failed else ""
        return f"{both} have no setting in common that finished in both{lacking}."
    seeds = [
        _listed({format_value(run.seed) for row in shared for run in row.runs[side].values()}) for side in (0, other)
    ]
    return f"{both} have settings in common, but no seed: {seeds[0]} in the first and {seeds[1]} in the second."


def unpaired(sides: Sides, other: int) -> Iterator[tuple[str, str, str, str]]:
    """(sweep's letter, setting, seeds, why) of what is in one of two sweeps and has no result in the other."""
    for row in sides.rows:
        for here, there in ((0, other), (other, 0)):
            groups: dict[str, list[Run]] = {}
            for seed, run in row.runs[here].items():
                if seed not in row.runs[there]:
                    lost = row.unfinished[there].get(seed)
                    why = f"{lost.state} in {LETTERS[there]}: {lost.reason}" if lost else f"no run in {LETTERS[there]}"
                    groups.setdefault(why, []).append(run)
            for why, runs in groups.items():
                seeds = ", ".join(format_value(run.seed) for run in runs)
                yield LETTERS[here], sides.describe(row), seeds, why


def differing(sides: Sides) -> list[tuple[str, list[str]]]:
    """Settings that every run of a sweep shares and that are not the same in all sweeps, with each sweep's value."""
    configs = [[run.config for run in sweep.runs if run.config] for sweep in sides.sweeps]
    every = dict.fromkeys(key for of in configs for config in of for key in config)
    found = []
    for key in every:
        values = [{canonical(config.get(key)) for config in of} for of in configs]
        if any(len(of) != 1 for of in values) or len(set.union(*values)) == 1:
            continue
        if key not in sides.pool.swept and not is_seed(key) and not is_operational(key, list(sides.pool.runs)):
            found.append((key, [format_value(of[0].get(key)) for of in configs]))
    return found


def _listed(values: Any) -> str:
    words = sorted(map(str, values))
    return ", ".join(words[:6]) + (f" and {len(words) - 6} more" if len(words) > 6 else "")
