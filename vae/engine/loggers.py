"""Lightning's loggers, one or several: made for a run's folder, given its settings and pictures, and ended with it.

MLflow and W&B have a run for each folder, however often it is resumed, and cannot take back what they were given: loggers.json
says which run that is and the last step at which each number arrived, so that none is given to them twice.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from vae.engine import turns
from vae.engine.build import instantiate
from vae.engine.folder import read_json
from vae.errors import VAEError
from vae.files import is_disk_full, write_json

KEPT = "loggers.json"


class Extra(NamedTuple):
    """Of a logger that needs a package of its own: the extra that brings it, which has the package's name; what it calls the
    name and the id of a run; and the options that say which run it is."""

    package: str
    name: str
    id: str
    which: tuple[str, ...]


EXTRAS = {
    "MLFlowLogger": Extra("mlflow", "run_name", "run_id", ("tracking_uri", "experiment_name", "run_id")),
    "WandbLogger": Extra("wandb", "name", "id", ("project", "entity", "id")),
}


def _nodes(config: DictConfig) -> list[Any]:
    several = [config.logger] if "_target_" in (config.logger or {}) else (config.logger or {}).values()
    return [logger for logger in several if logger is not None]


def require_packages(config: DictConfig) -> None:
    """Raises VAEError for a logger of `config.logger` whose package is not installed."""
    for logger in _nodes(config):
        extra = EXTRAS.get(str(logger.get("_target_")).rpartition(".")[2])
        if extra is None:
            continue
        package = extra.package
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a folder of that name, as W&B makes one, is no package
            raise VAEError(f"logger={package} needs {package}: pip install 'vae[{package}]'.")


def make_loggers(config: DictConfig, folder: Path) -> list[Logger]:
    """The loggers of `config.logger`: one, with a `_target_`, or one under each key. A partial is given `save_dir`, and one of
    EXTRAS the folder's name for the run, unless it has a name, and the run that earlier attempts began."""
    loggers = []
    for logger in map(instantiate, _nodes(config)):
        if isinstance(logger, functools.partial):
            options: dict[str, Any] = {"save_dir": str(folder)}
            extra, given = EXTRAS.get(logger.func.__name__), logger.keywords
            if extra is not None:
                begun = Begun(folder / KEPT, logger.func.__name__, [given.get(name) for name in extra.which])
                options[extra.name] = given.get(extra.name) or folder.name
                options[extra.id] = given.get(extra.id) or begun.id
                if extra.package == "wandb" and turns.CURRENT is not None:
                    options["reinit"] = "create_new"  # where runs take turns, each would join the first
                logger = begun.joined(logger(**options))
            else:
                logger = logger(**options)
        loggers.append(logger)
    return loggers


class Begun:
    """What of a run has arrived at one of EXTRAS, kept in a file of its folder: `id` of the run there, None before it begins,
    and `last`, the step of each number. Where the config's options `which` say another (server, project), it is another."""

    def __init__(self, path: Path, kind: str, which: list[Any]) -> None:
        self.path, self.kind, self.which = path, kind, which
        stored = read_json(path).get(kind, {})
        known = stored if stored.get("which") == which else {}
        self.id: str | None = known.get("id")
        self.last: dict[str, int] = known.get("last", {})

    def write(self) -> None:
        entry = {"id": self.id, "which": self.which, "last": self.last}
        write_json(self.path, {**read_json(self.path), self.kind: entry})

    def joined(self, logger: Any) -> Any:
        """The logger, given each number of a step once: a step that is taken again has the same."""
        give = logger.log_metrics

        def log_metrics(metrics: Mapping[str, Any], step: int | None = None) -> None:
            new = [name for name in metrics if name != "epoch" and (step is None or step > self.last.get(name, -1))]
            if new:
                give({name: value for name, value in metrics.items() if name in (*new, "epoch")}, step)
                if step is not None:
                    self.last.update(dict.fromkeys(new, step))
                    self.write()

        logger.log_metrics, logger.begun = log_metrics, self
        return logger


def begin(loggers: Iterable[Logger]) -> None:
    """Let MLflow and W&B begin the run, or go on with it. Raises VAEError, with what they say, where their server does not
    take it."""
    for logger in loggers:
        begun: Begun | None = getattr(logger, "begun", None)
        try:
            if type(logger).__name__ in EXTRAS:
                _ = logger.experiment  # type: ignore[attr-defined]
            if begun is not None and begun.id is None:
                begun.id = logger.version if isinstance(logger.version, str) else None
                begun.write()
            elif begun is not None and isinstance(logger, MLFlowLogger):
                logger.experiment.update_run(begun.id, status="RUNNING")
        except Exception as error:
            if is_disk_full(error):
                raise
            why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            lost = (
                f" {begun.path} says which run it was: without that file another begins." if begun and begun.id else ""
            )
            raise VAEError(f"{type(logger).__name__} does not take the run: {why}.{lost}") from error


def log_picture(logger: Logger, name: str, picture: Tensor, step: int) -> None:
    """An image (3, H, W) in [0, 1], the way that a logger of this kind takes it; one that takes none has the PNG only.

    TensorBoard and MLflow are asked by name; any other logger with W&B's `log_image(key, images, step)` by that.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, picture, step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, to_pil_image(picture), f"pictures/{name}/{step}.png")
    elif hasattr(logger, "log_image"):
        logger.log_image(name, [to_pil_image(picture)], step=step)


class LoggedRun(pl.Callback):
    """Gives each logger the run's settings when it starts, and ends W&B's run, which the next run of a sweep would join.

    TensorBoard is left out: its HParams tab takes few settings, together with the test metrics.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MLFlowLogger):
                _log_parameters(logger, self.settings)
            elif not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self.settings)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "test":
            _finish(trainer)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(Exception):  # of a logger that may itself be what went wrong
            _finish(trainer)


def _log_parameters(logger: MLFlowLogger, settings: dict[str, Any]) -> None:
    """MLflow refuses another value for a parameter: what a resumed run has otherwise becomes a tag."""
    there = logger.experiment.get_run(logger.run_id).data.params
    logger.log_hyperparams({name: value for name, value in settings.items() if name not in there})
    for name, value in settings.items():
        if there.get(name, str(value)[:250]) != str(value)[:250]:
            logger.experiment.set_tag(logger.run_id, name, str(value))


def _finish(trainer: pl.Trainer) -> None:
    for logger in trainer.loggers:
        finish = getattr(getattr(logger, "experiment", None), "finish", None)
        if finish is not None:
            finish()
