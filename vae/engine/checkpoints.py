"""Checkpoints: written whole or not at all, read without running code from them, resumed from the middle of an epoch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from vae.engine.stored import read_checkpoint
from vae.errors import VAEError
from vae.files import write_atomically


def load_weights(module: pl.LightningModule, path: Path) -> dict[str, Any]:
    """Put a checkpoint's weights into `module` and return the checkpoint. Raises VAEError if they are of another model."""
    content = read_checkpoint(path)
    try:
        module.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        raise VAEError(f"The checkpoint {path} is of another model than its config describes.") from error
    return content


def seconds_before(path: Path) -> float:
    """What a run had cost when it saved this checkpoint, by all its attempts together."""
    return read_checkpoint(path)["callbacks"].get(Interruptible.__name__, {}).get("seconds", 0.0)


class CheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, through the two functions above."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))


class Interruptible(pl.callbacks.Checkpoint):
    """Saves checkpoints/last.ckpt once `every_n_seconds` have passed or every `every_n_steps`, and when training ends.

    So much work is lost at most. A `Checkpoint`, so that Lightning calls it after the callback that keeps the best
    weights, whose state is saved too. Its own state is the seconds that the run has cost, earlier attempts included.
    """

    def __init__(self, every_n_seconds: float | None = 30, every_n_steps: int | None = None) -> None:
        self.every_n_seconds, self.every_n_steps = every_n_seconds, every_n_steps
        self._saved = self._started = time.monotonic()
        self._before = 0.0

    def state_dict(self) -> dict[str, float]:
        return {"seconds": self._before + time.monotonic() - self._started}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self._before = state_dict["seconds"]

    def _save_if_due(self, trainer: pl.Trainer, module: pl.LightningModule, ending: bool = False) -> None:
        due = self.every_n_steps is not None and module.steps % self.every_n_steps == 0
        due = due or (self.every_n_seconds is not None and time.monotonic() - self._saved >= self.every_n_seconds)
        if due or ending:
            module.refuse_divergence()
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
            self._saved = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:  # validation follows that one at once
            self._save_if_due(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
            last_step = 0 <= trainer.max_steps <= trainer.global_step
            self._save_if_due(trainer, module, ending=last_epoch or last_step or trainer.should_stop)
