"""Numbers beside the curves: seconds an epoch, and the HParams tab that sorts and draws a sweep."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytorch_lightning as pl


class Stopwatch(pl.Callback):
    """Median seconds of a training epoch, validation and pictures left out; reported as `train/seconds_per_epoch`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started: float | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._started = time.perf_counter()

    def _stop(self) -> None:
        if self._started is not None:
            self.seconds.append(time.perf_counter() - self._started)
            self._started = None

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stop()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stop()

    @property
    def metrics(self) -> dict[str, float]:
        return {"train/seconds_per_epoch": statistics.median(self.seconds)} if self.seconds else {}


class HyperParameters(pl.Callback):
    """Writes the run's settings and final test metrics to TensorBoard's HParams tab."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = {k: v if isinstance(v, int | float | bool | str) else str(v) for k, v in settings.items()}

    def on_test_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        metrics = {
            name.replace("test/", "hparams/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("test/") and name != "test/loss"  # losses of different objectives do not compare
        }
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.log_hyperparams(self.settings, metrics)
