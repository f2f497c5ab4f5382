"""Where the time of a run goes: a callback that a benchmarked command adds by `+callbacks.clock._target_=clock.Clock`."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from vae.engine.callbacks.pictures import Pictures

PARTS = ("steps", "evaluation", "pictures", "checkpoints", "rest")


class Clock(pl.Callback):
    """Seconds from the trainer's making to the end of the test, each counted once; written to clock.json of the run.

    A part that happens within another (a checkpoint during validation) is taken out of the outer one.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._inside = ["rest"]
        self._since = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now

    def enter(self, part: str) -> None:
        self._tick()
        self._inside.append(part)

    def leave(self) -> None:
        self._tick()
        self._inside.pop()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return call

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            trainer.save_checkpoint = self.timed("checkpoints", trainer.save_checkpoint)
            for callback in trainer.callbacks:
                if isinstance(callback, Pictures):
                    callback.on_validation_epoch_end = self.timed("pictures", callback.on_validation_epoch_end)
                    callback.on_test_end = self.timed("pictures", callback.on_test_end)

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.enter("steps")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.leave()

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.enter("evaluation")

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.leave()

    def on_test_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.enter("evaluation")

    def on_test_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.leave()

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if stage == "test":
            self._tick()
            (Path(trainer.default_root_dir) / "clock.json").write_text(json.dumps(self.seconds))
