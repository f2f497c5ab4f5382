"""Checkpoints: written whole or not at all, read without running code from them, resumed from the middle of an epoch."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from vae.engine import turns
from vae.engine.module import is_ending
from vae.engine.stored import read_checkpoint
from vae.errors import VAEError, whole
from vae.files import write_atomically
from vae.objectives.elbo import Objective


def load_weights(module: pl.LightningModule, path: Path) -> dict[str, Any]:
    """Put a checkpoint's weights into `module` and return the checkpoint. Raises VAEError if they are of another model."""
    content = read_checkpoint(path)
    try:
        module.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        raise VAEError(f"The checkpoint {path} is of another model than its config describes.") from error
    return content


def reached(path: Path) -> tuple[int, float]:
    """The steps that a run had made when it saved this checkpoint, and the seconds, all its attempts together."""
    saved = read_checkpoint(path)
    return saved["steps"], saved["callbacks"].get(Interruptible.__name__, {}).get("seconds", 0.0)


class CheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, through the two functions above."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        whole = {
            name: _by_themselves(content) if name in ("state_dict", "optimizer_states") else content
            for name, content in checkpoint.items()
        }
        write_atomically(Path(path), lambda file: torch.save(whole, file))

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))


def _by_themselves(content: Any) -> Any:
    """Tensors without the rest of what they are views of, such as the weights of the runs that a run is packed with: all of
    that would be saved with them."""
    if isinstance(content, torch.Tensor):
        shares = content.untyped_storage().nbytes() > content.numel() * content.element_size()
        return content.clone() if shares else content
    if isinstance(content, dict):
        whole = copy.copy(content)  # with what a state_dict carries beside its entries
        whole.update({name: _by_themselves(part) for name, part in content.items()})
        return whole
    return [_by_themselves(part) for part in content] if isinstance(content, list) else content


class Best(pl.callbacks.Checkpoint):
    """Keeps checkpoints/best.ckpt: the weights that are tested, and that every later command loads.

    They are those of the validation at which `monitor` was lowest, or highest with mode="max". With monitor=None they
    are the last that were validated, and so they are wherever the validation loss moves (`Objective.loss_moves`): see
    `choose_weights`. Raises VAEError for a monitor that is not of the validation split.
    """

    def __init__(self, monitor: str | None = "val/loss", mode: str = "min") -> None:
        if monitor is not None and not monitor.startswith("val/"):
            raise VAEError(f"callbacks.checkpoint.monitor={monitor} is not of the validation split, as val/loss is.")
        if mode not in ("min", "max"):
            raise VAEError(f"callbacks.checkpoint.mode={mode} must be min or max.")
        self.monitor, self.mode = monitor, mode
        self.score = self.loss = math.nan  # of the weights that are kept: of the monitor, and val/loss

    def state_dict(self) -> dict[str, float]:
        return {"score": self.score, "loss": self.loss}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.score, self.loss = state_dict["score"], state_dict["loss"]

    def on_load_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        for name, state in checkpoint["callbacks"].items():
            if name.startswith("ModelCheckpoint") and state["monitor"] == self.monitor == "val/loss":
                self.score = self.loss = float(state["best_model_score"])  # an earlier version's, best.ckpt being there

    def _is_better(self, score: float) -> bool:
        if self.monitor is None or math.isnan(self.score):
            return True
        return score > self.score if self.mode == "max" else score < self.score

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.monitor not in (None, *trainer.callback_metrics):
            known = ", ".join(name for name in trainer.callback_metrics if name.startswith("val/"))
            raise VAEError(f"callbacks.checkpoint.monitor={self.monitor} is not measured: choose one of {known}.")
        score = float(trainer.callback_metrics[self.monitor or "val/loss"])
        if self._is_better(score):
            self.score, self.loss = score, float(trainer.callback_metrics["val/loss"])
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "best.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Early stopping may end a run on an epoch that nobody was to validate."""
        if trainer.should_stop and module.validated != module.steps:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True


def choose_weights(trainer: pl.Trainer, objective: Objective) -> Best:
    """What keeps a run's best weights, given the one rule by which they are chosen.

    They are those with the best validation loss where that is of one objective throughout; where it moves, losses of two
    epochs do not compare, and the last weights are kept. A monitor of one's own choice is left as it is. Raises VAEError
    where early stopping would compare losses that move, and where nothing keeps the weights.
    """
    found = [callback for callback in trainer.callbacks if isinstance(callback, Best)]
    if not found:
        raise VAEError("A run needs callbacks.checkpoint, which keeps the weights that are tested and loaded.")
    if objective.loss_moves:
        for callback in trainer.callbacks:
            if getattr(callback, "monitor", None) == "val/loss" and isinstance(callback, pl.callbacks.EarlyStopping):
                raise VAEError(
                    f"{type(callback).__name__} watches val/loss, which moves: {objective.loss_moves}. Let it watch what does "
                    "not, as with callbacks.early_stopping.monitor=val/distortion."
                )
        if found[0].monitor == "val/loss":
            found[0].monitor = None
    return found[0]


class Interruptible(pl.callbacks.Checkpoint):
    """Saves checkpoints/last.ckpt once `every_n_seconds` have passed or every `every_n_steps`, and when training ends.

    So much work is lost at most. A `Checkpoint`, so that Lightning calls it after `Best`, whose state is saved too. Its
    own state is the seconds that the run has cost, earlier attempts included, and whether a callback has stopped it.
    """

    def __init__(self, every_n_seconds: float | None = 30, every_n_steps: int | None = None) -> None:
        whole("callbacks.interruptible.every_n_steps", every_n_steps, optional=True)
        if every_n_seconds is not None and not (isinstance(every_n_seconds, int | float) and every_n_seconds >= 0):
            raise VAEError(
                f"callbacks.interruptible.every_n_seconds={every_n_seconds} must be a number of at least 0, or null."
            )
        self.every_n_seconds, self.every_n_steps = every_n_seconds, every_n_steps
        self._saved, self._started = turns.moment(), turns.seconds()
        self._before, self._stopped = 0.0, False

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._before + turns.seconds() - self._started, "stopped": self._stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._before, self._stopped = state_dict["seconds"], state_dict.get("stopped", False)

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._stopped:
            trainer.should_stop = True

    def _is_due(self, module: pl.LightningModule) -> bool:
        if self.every_n_steps is not None and module.steps % self.every_n_steps == 0:
            return True
        return self.every_n_seconds is not None and turns.moment() - self._saved >= self.every_n_seconds

    def _save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:  # whose clock decides
            return
        module.refuse_divergence()
        # What stopped a run has no state that says so. A time that is up does not count: a run may be given more of it.
        timed = any(isinstance(callback, pl.callbacks.Timer) for callback in trainer.callbacks)
        self._stopped = trainer.should_stop and not timed
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")
        self._saved = turns.moment()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        # after an epoch's last batch, or the run's, validation follows at once
        before_validation = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if self._is_due(module) and not before_validation and not is_ending(trainer):
            self._save(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and (self._is_due(module) or is_ending(trainer)):
            self._save(trainer, module)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.should_stop:  # early stopping decides this late
            self._save(trainer, module)
