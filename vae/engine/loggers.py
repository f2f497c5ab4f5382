"""Lightning's loggers, one or several: made for a run's folder, given its settings and pictures, and ended with it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from vae.engine.build import instantiate


def make_loggers(config: DictConfig, folder: Path) -> list[Logger]:
    """The loggers of `config.logger`: one, with a `_target_`, or one under each key; a partial is given `save_dir`."""
    if not config.logger:
        return []
    several = [config.logger] if "_target_" in config.logger else config.logger.values()
    made = [instantiate(logger) for logger in several if logger is not None]
    return [logger(save_dir=str(folder)) if isinstance(logger, functools.partial) else logger for logger in made]


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
        _finish(trainer)


def _finish(trainer: pl.Trainer) -> None:
    for logger in trainer.loggers:
        finish = getattr(getattr(logger, "experiment", None), "finish", None)
        if finish is not None:
            finish()
