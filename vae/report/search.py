"""What a search left beside its runs, search.json: the trials in order, the best or the front, what each setting matters."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vae.report.drawing import GRID, INK, MARKERS, MUTED, NAMES, PAPER, STYLE, Plot, as_plot, new_figure, short
from vae.report.runs import Damaged, Run, read_mapping
from vae.report.sweep import Sweep
from vae.report.values import format_value, is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Trial:
    """values: one per metric, of a trial that finished; last: (epoch, value) that a pruner last saw; run: its own, if there
    is one."""

    number: int
    state: str
    values: tuple[float, ...]
    last: tuple[int, float] | None
    parameters: dict[str, Any]
    run: Run | None


@dataclass(frozen=True)
class Search:
    """metrics: what was searched by, with a direction each; best: numbers of the best trials, of two metrics the Pareto
    front's; importance: metric -> setting -> share of the variance."""

    metrics: tuple[str, ...]
    directions: tuple[str, ...]
    sampler: str
    pruner: str | None
    trials: tuple[Trial, ...]
    best: tuple[int, ...]
    importance: dict[str, dict[str, float]]

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(key for trial in self.trials for key in trial.parameters))

    @property
    def finished(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.values]

    def so_far(self) -> list[tuple[int, float]]:
        """(number, the best value of the first metric until then) of each trial that finished."""
        better = max if self.directions[0] == "maximize" else min
        found: list[tuple[int, float]] = []
        for trial in self.finished:
            value = trial.values[0]
            found.append((trial.number, better(value, found[-1][1]) if found else value))
        return found

    def tally(self) -> str:
        """ "20 trials: 15 finished, 4 pruned, 1 failed"."""
        states = [trial.state for trial in self.trials]
        kinds = [kind for kind in ("finished", "pruned", "failed", "running") if kind in states]
        count = f"{len(states)} trial{'' if len(states) == 1 else 's'}"
        return f"{count}: {', '.join(f'{states.count(kind)} {kind}' for kind in kinds)}"

    def best_in_words(self) -> str:
        """Which trials are the best, in a line."""
        if not self.best:
            return "no trial has finished"
        if len(self.metrics) > 1:
            return f"the front of {' and '.join(self.metrics)} is trials {', '.join(map(str, self.best))}"
        trial = self.trials[self.best[0]]
        settings = ", ".join(f"{key} {format_value(value)}" for key, value in trial.parameters.items())
        return f"the best is trial {trial.number}, {self.metrics[0]} {trial.values[0]:.6g}, with {settings}"


def read_search(sweep: Sweep) -> Search | None:
    """What search.json in a sweep's folder says; None where there is none, or where it is damaged."""
    path = sweep.folder / "search.json"
    try:
        found = read_mapping(path) if path.is_file() else None
        return None if found is None else _search(found, {run.name: run for run in sweep.runs})
    except (Damaged, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None


def _search(found: dict[str, Any], runs: dict[str, Run]) -> Search:
    trials = []
    for number, one in enumerate(found["trials"]):
        values = tuple(float(value) for value in one["values"] or ())
        steps = sorted((int(step), float(value)) for step, value in one["steps"].items())
        if (
            one["number"] != number
            or len(values) not in (0, len(found["metrics"]))
            or not all(map(math.isfinite, values))
        ):
            raise ValueError(number)
        last = steps[-1] if steps else None
        trials.append(Trial(number, str(one["state"]), values, last, dict(one["parameters"]), runs.get(one["folder"])))
    best = tuple(int(number) for number in found["best"])
    if any(not trials[number].values for number in best):
        raise ValueError(best)
    shares = {str(m): {str(k): float(v) for k, v in share.items()} for m, share in found["importance"].items()}
    pruner = found.get("pruner")
    return Search(
        tuple(map(str, found["metrics"])),
        tuple(map(str, found["directions"])),
        str(found["sampler"]),
        None if pruner is None else str(pruner),
        tuple(trials),
        best,
        shares,
    )


def draw_search(sweep: Sweep, search: Search) -> list[Plot]:
    """The values in order of the trials with the best until then, of two metrics their front too, and the importances."""
    import matplotlib

    plots = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        if search.finished:
            plots += [_history(sweep, search, i) for i in range(len(search.metrics))]
        if search.finished and len(search.metrics) == 2:
            plots.append(_front(sweep, search))
        if any(search.importance.values()):
            plots.append(_importance(sweep, search))
    return plots


def _history(sweep: Sweep, search: Search, i: int) -> Plot:
    from matplotlib.ticker import MaxNLocator

    fig, ax = new_figure(5.4, 3.7)
    if len(search.metrics) == 1 and search.so_far():
        steps = [*search.so_far(), (len(search.trials) - 1, search.so_far()[-1][1])]
        ax.step(*zip(*steps, strict=True), where="post", color=INK, lw=1.2, zorder=2)
    for trial in search.trials:
        if trial.values:
            _dot(ax, sweep, trial, trial.number, trial.values[i], NAMES[0], trial.number in search.best)
        elif trial.state == "pruned" and trial.last is not None and len(search.metrics) == 1:
            _dot(ax, sweep, trial, trial.number, trial.last[1], MUTED, False, MARKERS[3])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("trial")
    ax.set_ylabel(short(search.metrics[i], 40))
    ax.grid(axis="y", color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    what = "the line is the best so far" if len(search.metrics) == 1 else "the front is ringed"
    pruned = ", triangles were pruned" if any(trial.state == "pruned" for trial in search.trials) else ""
    name = "search_history" + (f"_{search.metrics[i]}" if len(search.metrics) > 1 else "")
    return as_plot(fig, sweep, name, f"{search.metrics[i]} in order of the trials; {what}{pruned}")


def _front(sweep: Sweep, search: Search) -> Plot:
    fig, ax = new_figure(5.4, 3.7)
    front = sorted(search.trials[number].values for number in search.best)
    ax.plot(*zip(*front, strict=True), color=INK, lw=1.2, zorder=2)
    for trial in search.finished:
        x, y = trial.values
        _dot(ax, sweep, trial, x, y, NAMES[0], trial.number in search.best)
    for axis, metric, direction in zip("xy", search.metrics, search.directions, strict=True):
        getattr(ax, f"set_{axis}label")(f"{short(metric, 40)}, to {direction}")
    return as_plot(fig, sweep, "search_front", "The Pareto front: what no other trial betters in both metrics")


def _importance(sweep: Sweep, search: Search) -> Plot:
    metrics = [metric for metric in search.metrics if search.importance.get(metric)]
    keys = sorted(search.importance[metrics[0]], key=lambda key: search.importance[metrics[0]][key])
    fig, ax = new_figure(5.4, max(1.6, 0.9 + 0.35 * len(keys) * len(metrics)))
    height = 0.8 / len(metrics)
    for i, metric in enumerate(metrics):
        at = [place + 0.4 - (i + 0.5) * height for place in range(len(keys))]
        shares = [search.importance[metric].get(key, 0.0) for key in keys]
        ax.barh(at, shares, height=0.9 * height, color=NAMES[i % len(NAMES)], label=short(metric, 24))
        for y, share in zip(at, shares, strict=True):
            ax.annotate(f"{share:.0%}", (share, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5)
    ax.set_yticks(range(len(keys)), [short(key, 30) for key in keys])
    ax.set_xlim(0, 1.12)
    ax.set_xlabel("share of the variance over the space (fANOVA)")
    if len(metrics) > 1:
        ax.legend(frameon=False, fontsize=8.5, loc="lower right")
    return as_plot(fig, sweep, "search_importance", "What each setting matters")


def _dot(
    ax: Axes, sweep: Sweep, trial: Trial, x: float, y: float, colour: str, ringed: bool, marker: str = MARKERS[0]
) -> None:
    edge, width = (INK, 1.6) if ringed else (PAPER, 0.8)
    size = 52 if ringed else 30
    dot = ax.scatter([x], [y], s=size, color=colour, marker=marker, edgecolors=edge, linewidths=width, zorder=4)
    if trial.run is not None:
        dot.set_urls([f"#run-{sweep.runs.index(trial.run)}"])


def drawn_value(value: Any) -> str:
    """A drawn value in a table: categories are the texts of overrides."""
    return format_value(value) if is_number(value) else str(value).strip("'\"")
