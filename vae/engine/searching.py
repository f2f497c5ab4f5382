"""A search as Hydra's sweeper runs it: propose, launch, tell, until there are `n_trials`. Imports no torch."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from vae.cli import CONFIGS, TRANSIENT, resuming
from vae.engine.search import metrics_of, sweep_directions
from vae.engine.space import as_text, search_space
from vae.engine.study import MayDiffer, Search, Terms, Trial
from vae.engine.study_file import require_optuna
from vae.errors import VAEError, whole
from vae.refusals import sentence

log = logging.getLogger(__name__)


def search(
    config: DictConfig,
    loader: ConfigLoader,
    launcher: Launcher,
    arguments: Sequence[str],
    n_trials: int = 20,
    sampler: str = "tpe",
    sampler_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    pruner: str | None = None,
    pruner_options: Mapping[str, Any] | None = None,
    n_jobs: int | None = None,
    params: Mapping[str, str] | None = None,
    trial: int | None = None,
) -> None:
    """Search over what `arguments`, and `params` where they do not name it, say in Hydra's grammar (see `search_space`).

    n_trials: of the whole study, by all processes and attempts together; sampler, pruner: see `vae.engine.samplers`; n_jobs:
    trials proposed and launched together, by default as many as the launcher runs side by side.
    Raises VAEError, before anything is written, for options that do not exist, for settings that do not, and for a study in
    the sweep's folder that is of another search.
    """
    require_optuna()
    from optuna.exceptions import StorageInternalError

    whole("hydra.sweeper.n_trials", n_trials)
    whole("hydra.sweeper.n_jobs", n_jobs, optional=True)
    whole("hydra.sweeper.seed", seed, least=0)
    if trial is not None:
        raise VAEError(f"hydra.sweeper.trial={trial} is for the search itself to say: leave it out.")
    lines = [f"{key}={value}" for key, value in (params or {}).items()]
    parsed = OverridesParser.create(config_loader=loader).parse_overrides([*lines, *arguments])
    overrides = {override.key_or_group: override for override in parsed}  # the command line's replaces the config's
    space = search_space(list(overrides.values()))
    jobs = Jobs(config, loader, list(overrides.values()), space)
    first = jobs.first()
    if resuming(first.resume) == "restart":
        raise VAEError("resume=restart: a search is begun anew in another folder, and gone on with by resume=true.")
    folder = Path(config.hydra.sweep.dir)
    terms = terms_of(first, space, sampler, sampler_options or {}, seed, pruner, pruner_options or {})

    mine = Search(folder, terms, jobs.subdir, _may_differ)
    OmegaConf.save(config, folder / "multirun.yaml")
    most = n_jobs or side_by_side(config)
    try:
        while batch := mine.next_batch(most, n_trials):
            for proposed, result in launched(launcher, jobs, batch, folder):
                state = mine.tell(proposed.number, result)
                log.info(f"Trial {proposed.number} {state}: {result}")
            mine.summarise()
        mine.summarise(with_importance=True)
    except StorageInternalError as error:
        why = str(error.__cause__ or error).strip().splitlines()[0].rstrip(".")
        raise VAEError(f"{mine.path} cannot be read or written: {why}.") from error
    finally:
        mine.close()


def _may_differ() -> MayDiffer:
    from vae.engine.folder import TAKEN_OVER, begins_with  # imports torch: only where two searches differ
    from vae.engine.stored import is_addition

    return lambda key, there, now: begins_with(key, TAKEN_OVER) or is_addition(key, there, now)


def side_by_side(config: DictConfig) -> int:
    """How many jobs the launcher runs at a time."""
    jobs = OmegaConf.select(config, "hydra.launcher.n_jobs") or 1
    if jobs > 0:
        return int(jobs)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores + 1 + int(jobs))  # as joblib counts: -1 is all of them


def terms_of(
    first: DictConfig,
    space: Mapping[str, Any],
    sampler: str,
    sampler_options: Mapping[str, Any],
    seed: int,
    pruner: str | None,
    pruner_options: Mapping[str, Any],
) -> Terms:
    """What a search is, from its options and the config of some job. Raises VAEError for metrics that it cannot use."""
    metrics = [str(name) for name in metrics_of(first)]
    if tests := [name for name in metrics if name.startswith("test/")]:
        raise VAEError(
            f"sweep_metric={tests[0]} is of the test split, which chooses nothing: search by one of the validation split, as "
            "val/best_elbo."
        )
    pruned_by = None
    if pruner is not None:
        pruned_by = metrics[0].replace("val/best_", "val/")
        if len(metrics) > 1:
            raise VAEError(f"hydra.sweeper.pruner={pruner} needs one sweep_metric, and there are {len(metrics)}.")
        if not pruned_by.startswith("val/"):
            raise VAEError(
                f"hydra.sweeper.pruner={pruner} looks at validations, and sweep_metric={metrics[0]} is not of them."
            )
    epochs = OmegaConf.select(first, "trainer.max_epochs")
    known = isinstance(epochs, int) and epochs > 0 and "trainer.max_epochs" not in space
    return Terms(
        space=dict(space),
        metrics=metrics,
        directions=sweep_directions(first),
        sampler=sampler,
        sampler_options=OmegaConf.to_container(OmegaConf.create(dict(sampler_options))),  # type: ignore[arg-type]
        seed=seed,
        pruner=pruner,
        pruner_options=OmegaConf.to_container(OmegaConf.create(dict(pruner_options))),  # type: ignore[arg-type]
        pruned_by=pruned_by,
        epochs=epochs if known else None,
        config={
            key: value
            for key, value in _flat(OmegaConf.to_container(first)).items()
            if key.split(".")[0] not in {*TRANSIENT, "hydra"}
        },
    )


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, one in node.items() for k, v in _flat(one, f"{prefix}.{key}".lstrip(".")).items()}


class Jobs:
    """What Hydra makes of a trial: the overrides that its launcher is given, and the config and folder that follow."""

    def __init__(
        self, config: DictConfig, loader: ConfigLoader, overrides: Sequence[Override], space: Mapping[str, Any]
    ) -> None:
        self.config, self.loader, self.overrides, self.space = config, loader, overrides, space

    def lines(self, texts: Mapping[str, str]) -> list[str]:
        """Overrides of one job, with the text of each setting that is searched over."""
        keys = [(one, one.get_key_element()) for one in self.overrides]
        return [f"{key}={texts[key]}" if key in self.space else str(one.input_line) for one, key in keys]

    def texts(self, parameters: Mapping[str, Any]) -> dict[str, str]:
        return {key: as_text(value, self.space[key]) for key, value in parameters.items()}

    def composed(self, texts: Mapping[str, str]) -> DictConfig:
        """A job's config. Raises VAEError for a setting or an option that does not exist."""
        try:
            return self.loader.load_sweep_config(self.config, self.lines(texts))
        except HydraException as error:
            raise VAEError(f"The search space does not fit the config: {sentence(error, CONFIGS)}") from error

    def first(self) -> DictConfig:
        """The config of some job, after every option of the searched groups was composed once. Raises VAEError as above."""
        texts = {
            key: as_text(one.choices[0] if hasattr(one, "choices") else one.low, one) for key, one in self.space.items()
        }
        for override in self.overrides:
            key = override.get_key_element()
            if key in self.space and self.loader.get_group_options(override.key_or_group):
                for choice in getattr(self.space[key], "choices", ())[1:]:
                    self.composed({**texts, key: choice})
        return self.composed(texts)

    def subdir(self, number: int, parameters: Mapping[str, Any]) -> str:
        """The folder of a trial's run within the sweep's, as Hydra names it."""
        job = self.composed(self.texts(parameters))
        with open_dict(job):
            job.hydra.job.num = number
        return str(job.hydra.sweep.subdir)


def launched(launcher: Launcher, jobs: Jobs, batch: Sequence[Trial], folder: Path) -> list[tuple[Trial, Any]]:
    """The trials of a batch, in order, with what their runs returned: numbers; None where one was pruned; NaN where one failed.

    Trials with the same settings are one run, now and later: one that finished returns its numbers at once.
    """
    first = {trial.folder: trial for trial in reversed(batch)}
    lines = []
    for name, trial in first.items():
        wait_for(folder / name)
        quoted = QuotedString(name, Quote.single).with_quotes()
        words = jobs.lines(jobs.texts(trial.parameters))
        lines.append([*words, f"hydra.sweep.subdir={quoted}", f"hydra.sweeper.trial={trial.number}"])
    returned = launcher.launch(lines, batch[0].number)
    results = {name: result_of(job) for name, job in zip(first, returned, strict=True)}
    return [(trial, results[trial.folder]) for trial in batch]


def result_of(job: JobReturn) -> Any:
    """What a job returned; NaN where it raised something."""
    if job.status is not JobStatus.COMPLETED:
        log.error(f"FAILED   {' '.join(job.overrides or ())}: {job._return_value}")
        return float("nan")
    return job._return_value


def wait_for(folder: Path) -> None:
    """Wait while a process is training the run in this folder: one of a search that was killed may outlive it."""
    told = False
    while (folder / ".lock").is_file():
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not told:
                log.info(f"Another process is still training {folder.name}: waiting for it.")
                told = True
            time.sleep(0.5)
        else:
            lock.release()
            return
