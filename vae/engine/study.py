"""A search's study: one SQLite file in the sweep's folder, which any number of processes ask for trials and tell results.

Nothing of a search is in a process. A trial that a killed process had begun is found by that process's lock, which the system
has released, and is taken over by the next one that asks: with the same parameters, in its own folder. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from vae.engine.study_file import NAME, STUDY, load_study, require_optuna, storage_of
from vae.errors import VAEError
from vae.files import write_json

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

SUMMARY = "search.json"
STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "running"}


@dataclass(frozen=True)
class Terms:
    """What a search is, besides how many trials it has and who runs them: processes that share a study agree on it.

    space: setting -> Optuna's distribution; metrics: what a run returns, with a direction each; pruned_by: the metric of
    the validations that a pruner is told, in place of the metric of the run's end; epochs: of a run, where that is known;
    config: the settings that are not searched over, flat.
    """

    space: dict[str, BaseDistribution]
    metrics: list[str]
    directions: list[str]
    sampler: str = "tpe"
    sampler_options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    pruner: str | None = None
    pruner_options: dict[str, Any] = field(default_factory=dict)
    pruned_by: str | None = None
    epochs: int | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def stored(self) -> dict[str, Any]:
        """As JSON can hold it."""
        from optuna.distributions import distribution_to_json

        plain = {name: value for name, value in vars(self).items() if name != "space"}
        space = {name: json.loads(distribution_to_json(one)) for name, one in self.space.items()}
        return json.loads(json.dumps({"space": space, **plain}, default=str))


@dataclass(frozen=True)
class Trial:
    """A trial that this process is to run. parameters: setting -> value; folder: of its run, within the sweep's."""

    number: int
    parameters: dict[str, Any]
    folder: str


#: Whether a setting may be another than the study began with: its key, and the flat configs of then and now.
MayDiffer = Callable[[str, Mapping[str, Any], Mapping[str, Any]], bool]


def differing(there: Mapping[str, Any], now: Mapping[str, Any], may: MayDiffer = lambda *_: False) -> str | None:
    """In words, the first thing in which two searches differ and which may not; None where they are one."""
    for name in ("space", "config"):
        one, two = there.get(name, {}), now.get(name, {})
        for key in sorted({*one, *two}):
            if one.get(key) != two.get(key) and not (name == "config" and may(key, one, two)):
                words = [_in_words(side.get(key), name) for side in (one, two)]
                return f"{key} is {words[0]} there and {words[1]} now"
    names = {"metrics": "sweep_metric", "directions": "sweep_direction"}
    for name in now:
        if name not in ("space", "config") and there.get(name) != now[name]:
            shown = names.get(name, f"hydra.sweeper.{name}")
            return f"{shown} is {_plain(there.get(name))} there and {_plain(now[name])} now"
    return None


def _in_words(value: Any, where: str) -> str:
    if where != "space":
        return _plain(value)
    if value is None:
        return "not searched over"
    known = {name: value["attributes"].get(name) for name in ("choices", "low", "high", "step", "log")}
    inner = ", ".join(f"{name}={_plain(one)}" for name, one in known.items() if one not in (None, False))
    return f"{value['name'].removesuffix('Distribution')}({inner})"


def _plain(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Search:
    """This process's part in a search: it asks for trials that nobody else has, and tells what they returned.

    folder: of the sweep; the study is made there, or gone on with. folder_of: names the folder of a trial's run within it.
    may_differ: gives what says of a setting whether it may; called where some do. To be closed.
    Raises VAEError for a study of another search, and for a file that holds none.
    """

    def __init__(
        self,
        folder: Path,
        terms: Terms,
        folder_of: Callable[[int, dict[str, Any]], str] = lambda number, parameters: str(number),
        may_differ: Callable[[], MayDiffer] = lambda: lambda *_: False,
    ) -> None:
        require_optuna()
        from vae.engine.samplers import make_pruner, make_sampler

        self.folder, self.terms, self.path, self.folder_of = folder, terms, folder / STUDY, folder_of
        sampler = make_sampler(terms.sampler, terms.sampler_options, terms.seed, terms.space, terms.directions)
        pruner = make_pruner(terms.pruner, terms.pruner_options, terms.epochs)
        folder.mkdir(parents=True, exist_ok=True)
        self.id = uuid.uuid4().hex[:12]
        self._alive = self._lock_of(self.id)
        with self._alone():
            if not self.path.exists():
                self._make()
            self.study = load_study(self.path, sampler=sampler, pruner=pruner)
            there = self.study.user_attrs.get("terms", {})
            if differing(there, terms.stored()) and (difference := differing(there, terms.stored(), may_differ())):
                raise VAEError(
                    f"{self.path} is of another search: {difference}. Nothing was changed: choose another folder, or ask for "
                    "what is there."
                )
            self._alive.acquire()

    def _make(self) -> None:
        """The file is whole or absent: made beside its place and renamed into it."""
        import optuna
        from optuna.study import StudyDirection

        temporary = self.folder / f".{STUDY}.tmp"
        temporary.unlink(missing_ok=True)
        storage = storage_of(temporary)
        directions = [StudyDirection[direction.upper()] for direction in self.terms.directions]
        study = optuna.create_study(study_name=NAME, storage=storage, directions=directions)
        study.set_user_attr("terms", self.terms.stored())
        storage.engine.dispose()
        temporary.replace(self.path)

    def _lock_of(self, worker: str) -> FileLock:
        return FileLock(self.folder / f".worker-{worker}.lock")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Of all processes of this search, one at a time: while trials are asked for, and while the summary is written."""
        with FileLock(self.folder / ".study.lock"):
            yield

    def close(self) -> None:
        """Let others take over what this process did not tell."""
        self._alive.release()
        Path(self._alive.lock_file).unlink(missing_ok=True)

    def trials(self, *states: str) -> list[FrozenTrial]:
        """In order of their numbers; of these states of Optuna's, or all."""
        found = self.study.get_trials(deepcopy=False)
        return [trial for trial in found if not states or trial.state.name in states]

    # ---- asking ----

    def next_batch(self, most: int, n_trials: int) -> list[Trial]:
        """Up to `most` trials to run now, side by side; none once there are `n_trials` and no orphans among them.

        Trials left by processes that died come first. New ones are proposed in batches that begin at multiples of `most`:
        a batch is proposed before any of it is told, so that a search that is killed and resumed at any moment proposes
        what an uninterrupted one does.
        """
        with self._alone():
            every = self.trials()
            orphans = [trial for trial in every if trial.state.name == "RUNNING" and self._is_orphan(trial)]
            newest = every[len(every) // most * most :]  # of a batch that was not proposed to its end, or is the last
            unfinished = bool(newest) and all(trial in orphans for trial in newest)
            older = [trial for trial in orphans if not (unfinished and trial in newest)]
            if older:
                return [self._complete(trial._trial_id) for trial in older[:most]]
            batch = [self._complete(trial._trial_id) for trial in newest] if unfinished else []
            for number in range(len(every), n_trials):
                batch.append(self._complete(self.study.ask()._trial_id))
                if (number + 1) % most == 0:
                    break
            return batch

    def _is_orphan(self, trial: FrozenTrial) -> bool:
        """Whether the process that had begun it is gone. Where none is named, it died between asking and saying so, for
        which nobody else could ask."""
        worker = trial.user_attrs.get("worker")
        if worker is None:
            return True
        if worker == self.id:
            return False
        lock = self._lock_of(worker)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
        return True

    def _complete(self, trial_id: int) -> Trial:
        """Draw what of a trial is not drawn yet, and say that it is this process's."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
        from optuna.trial import Trial as Asked

        asked = Asked(self.study, trial_id)
        for name, one in self.terms.space.items():
            if isinstance(one, CategoricalDistribution):
                asked.suggest_categorical(name, one.choices)
            elif isinstance(one, IntDistribution):
                asked.suggest_int(name, one.low, one.high, step=one.step, log=one.log)
            elif isinstance(one, FloatDistribution):
                asked.suggest_float(name, one.low, one.high, step=one.step, log=one.log)
        parameters = {name: asked.params[name] for name in self.terms.space}
        folder = self.folder_of(asked.number, parameters)
        asked.set_user_attr("folder", folder)
        asked.set_user_attr("worker", self.id)
        return Trial(asked.number, parameters, folder)

    # ---- telling ----

    def tell(self, number: int, returned: float | Sequence[float] | None) -> str:
        """Record what a trial's run returned: numbers, None where it was pruned; numbers that are not finite are of one
        that failed. Returns the trial's state."""
        from optuna.trial import TrialState

        values = None if returned is None else [returned] if isinstance(returned, int | float) else list(returned)
        if values is None:
            told = self.study.tell(number, state=TrialState.PRUNED)
        elif len(values) == len(self.terms.metrics) and all(map(math.isfinite, values)):
            told = self.study.tell(number, values)
        else:
            told = self.study.tell(number, state=TrialState.FAIL)
        return STATES[told.state.name]

    def summarise(self, with_importance: bool = False) -> dict[str, Any]:
        """Write search.json, which the report reads: the trials in order, the best and, at the end, what each setting
        matters."""
        with self._alone():
            summary = summary_of(self.study, self.terms, with_importance)
            write_json(self.folder / SUMMARY, summary)
        return summary


def summary_of(study: Study, terms: Terms, with_importance: bool = True) -> dict[str, Any]:
    """What a report shows of a search. best: the numbers of the best trials; with several metrics, of the Pareto front."""
    trials = study.get_trials(deepcopy=False)
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if len(terms.metrics) > 1:
        best = sorted(trial.number for trial in study.best_trials)
    else:
        best = [study.best_trial.number] if complete else []
    stored = terms.stored()
    return {
        **{name: stored[name] for name in ("space", "metrics", "directions", "sampler", "seed", "pruner", "pruned_by")},
        "best": best,
        "importance": {m: importance(study, i) for i, m in enumerate(terms.metrics)} if with_importance else {},
        "trials": [
            {
                "number": trial.number,
                "state": STATES[trial.state.name],
                "values": trial.values if trial.state.name == "COMPLETE" else None,
                "steps": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
                "folder": trial.user_attrs.get("folder"),
                "parameters": trial.params,
            }
            for trial in trials
        ],
    }


def importance(study: Study, metric: int) -> dict[str, float]:
    """The share of each setting in the variance of one metric over the space, by fANOVA (Hutter et al. 2014) over the trials
    that finished; nothing where there are fewer than four, or no two values."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    values = {trial.values[metric] for trial in complete}
    if len(complete) < 4 or len(values) < 2:
        return {}
    return get_param_importances(
        study, evaluator=FanovaImportanceEvaluator(n_trees=16, seed=0), target=lambda trial: trial.values[metric]
    )
