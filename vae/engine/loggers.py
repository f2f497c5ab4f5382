"""Lightning's loggers, one or several: made for a run's folder, given its settings and pictures, and ended with it."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from vae.engine.build import instantiate
from vae.errors import VAEError
from vae.files import is_disk_full

#: A logger that needs a package of its own -> the extra that brings it, which has the package's name, and its name of a run.
EXTRAS = {"MLFlowLogger": ("mlflow", "run_name"), "WandbLogger": ("wandb", "name")}


def _nodes(config: DictConfig) -> list[Any]:
    several = [config.logger] if "_target_" in (config.logger or {}) else (config.logger or {}).values()
    return [logger for logger in several if logger is not None]


def require_packages(config: DictConfig) -> None:
    """Raises VAEError for a logger of `config.logger` whose package is not installed."""
    for logger in _nodes(config):
        package, _ = EXTRAS.get(str(logger.get("_target_")).rpartition(".")[2], (None, ""))
        if package is None:
            continue
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a folder of that name, as W&B makes one, is no package
            raise VAEError(f"logger={package} needs {package}: pip install 'vae[{package}]'.")


def make_loggers(config: DictConfig, folder: Path) -> list[Logger]:
    """The loggers of `config.logger`: one, with a `_target_`, or one under each key. A partial is given `save_dir`, and one of
    EXTRAS the folder's name for the run, unless it has a name."""
    loggers = []
    for logger in map(instantiate, _nodes(config)):
        if isinstance(logger, functools.partial):
            _, name = EXTRAS.get(logger.func.__name__, ("", ""))
            named = {name: folder.name} if name and not logger.keywords.get(name) else {}
            logger = logger(save_dir=str(folder), **named)
        loggers.append(logger)
    return loggers


def begin(loggers: Iterable[Logger]) -> None:
    """Let MLflow and W&B begin the run. Raises VAEError, with what they say, where their server does not take it."""
    for logger in loggers:
        try:
            if type(logger).__name__ in EXTRAS:
                _ = logger.experiment  # type: ignore[attr-defined]
        except Exception as error:
            if is_disk_full(error):
                raise
            why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise VAEError(f"{type(logger).__name__} does not take the run: {why}.") from error


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
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self.settings)

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "test":
            _finish(trainer)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(Exception):  # of a logger that may itself be what went wrong
            _finish(trainer)


def _finish(trainer: pl.Trainer) -> None:
    for logger in trainer.loggers:
        finish = getattr(getattr(logger, "experiment", None), "finish", None)
        if finish is not None:
            finish()
