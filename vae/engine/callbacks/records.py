"""What is kept of a run's numbers: rows of a table, seconds per epoch, and the HParams tab that sorts and draws a sweep."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers.logger import Logger

from vae.engine import turns
from vae.files import write_text


class CSVLogger(Logger):
    """metrics.csv in the run's folder: a row for whatever is logged together, a column for each name, in their order.

    `step` counts from 0: what is measured after n steps is of step n - 1. Lightning's own begins the file anew when a run
    is resumed.
    """

    name = version = ""

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] = []  # of the file, once this run has one

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The run's config.yaml holds them."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {**metrics, "step": step}
        if new := set(row) - set(self._columns):
            rows = self._rows() if self._columns else []
            self._columns = sorted({*self._columns, *new})
            self._write([*rows, row])
        else:
            with self.path.open("a", newline="") as file:
                file.write(self._lines([row]))  # at once: a row is there or it is not

    def take_back(self, step: int) -> None:
        """Go on with the file that an earlier attempt left, without its rows of steps from `step` on."""
        if self.path.is_file():
            rows = [row for row in self._rows() if int(row["step"]) < step]
            self._columns = list(rows[0]) if rows else []
            if rows:
                self._write(rows)

    def _rows(self) -> list[dict[str, Any]]:
        whole, _, _ = self.path.read_text().rpartition("\n")  # a killed process may have left a part of a line
        return list(csv.DictReader(io.StringIO(whole)))

    def _write(self, rows: list[dict[str, Any]]) -> None:
        write_text(self.path, self._lines([dict(zip(self._columns, self._columns, strict=True)), *rows]))

    def _lines(self, rows: list[dict[str, Any]]) -> str:
        lines = io.StringIO()
        csv.DictWriter(lines, self._columns, lineterminator="\n").writerows(rows)
        return lines.getvalue()


def take_back(loggers: Iterable[Logger], step: int) -> None:
    """Before steps are taken again: let loggers forget what was written of them, those from `step` on.

    TensorBoard's files cannot be changed, but hide what came before such a mark.
    """
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            logger.take_back(step)
        elif isinstance(logger, pl.loggers.TensorBoardLogger):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            mark = Event(session_log=SessionLog(status=SessionLog.START))
            logger.experiment.file_writer.add_event(mark, step)


class Reporter(pl.Callback):
    """A callback with numbers of its own for metrics.json."""

    @property
    def metrics(self) -> dict[str, float]:
        """Name -> number, once training has ended."""
        raise NotImplementedError


class Stopwatch(Reporter):
    """Median seconds of a training epoch, validation and pictures left out; reported as `train/seconds_per_epoch`."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started: float | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._started = turns.seconds()

    def _stop(self) -> None:
        if self._started is not None:
            self.seconds.append(turns.seconds() - self._started)
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

    def on_test_end(self, trainer: pl.Trainer, module: Any) -> None:
        metrics = {
            name.replace("test/", "hparams/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("test/") and name != "test/loss"  # losses of different objectives do not compare
        }
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.log_hyperparams(self.settings, metrics, module.steps)
