"""Faster steps: what Lightning does around each that nobody asked it for is left out, and networks can be compiled.

`NoProfiler` and `PlainStep` spare about a millisecond a step on a CPU core. Both leave the work to Lightning wherever
something does ask for it: a profiler, an unusual precision or strategy, an optimiser that needs a closure, a module that
overrides how an optimiser is stepped.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loops.optimization.automatic import _AutomaticOptimization
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import SingleDeviceStrategy

from vae.errors import VAEError

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class NoProfiler(PassThroughProfiler):
    """Lightning enters and leaves its profiler 66 times a step, whether it measures anything or not."""

    _nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> contextlib.nullcontext:
        return self._nothing


class PlainStep(_AutomaticOptimization):
    """Loss, zero_grad, backward, step: the same calls and hooks in the same order as Lightning's, one after another."""

    def run(self, optimizer: torch.optim.Optimizer, batch_idx: int, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        trainer, module = self.trainer, self.trainer.lightning_module
        if not self._is_plain(optimizer):
            return super().run(optimizer, batch_idx, kwargs)
        progress = self.optim_progress.optimizer
        progress.step.increment_ready()

        module._current_fx_name = "training_step"
        with trainer.precision_plugin.train_step_context():
            loss = module.training_step(*kwargs.values())
        self._hooks("on_before_zero_grad", optimizer)
        progress.zero_grad.increment_ready()
        progress.zero_grad.increment_started()
        optimizer.zero_grad()
        progress.zero_grad.increment_completed()
        self._hooks("on_before_backward", loss)
        loss.backward()
        self._hooks("on_after_backward")
        self._hooks("on_before_optimizer_step", optimizer)
        if trainer.gradient_clip_val is not None:
            module.clip_gradients(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        optimizer.step()
        module._current_fx_name = None

        progress.step.increment_completed()
        return {"loss": loss.detach()}

    def _is_plain(self, optimizer: torch.optim.Optimizer) -> bool:
        trainer, module = self.trainer, type(self.trainer.lightning_module)
        precision = trainer.precision_plugin
        own = ("optimizer_step", "optimizer_zero_grad", "backward", "configure_gradient_clipping")
        return (
            type(trainer.strategy) is SingleDeviceStrategy
            and (type(precision) is Precision or (type(precision) is MixedPrecision and precision.scaler is None))
            and trainer.accumulate_grad_batches == 1
            and not isinstance(optimizer, torch.optim.LBFGS)
            and all(getattr(module, name) is getattr(pl.LightningModule, name) for name in own)
        )

    def _hooks(self, name: str, *args: Any) -> None:
        trainer, module = self.trainer, self.trainer.lightning_module
        module._current_fx_name = name
        for callback in trainer.callbacks:
            if getattr(type(callback), name) is not getattr(pl.Callback, name):
                getattr(callback, name)(trainer, module, *args)
        if getattr(type(module), name) is not getattr(pl.LightningModule, name):
            getattr(module, name)(*args)


def make_lean(trainer: pl.Trainer) -> pl.Trainer:
    """The same trainer, its steps taken by `PlainStep`."""
    trainer.fit_loop.epoch_loop.automatic_optimization = PlainStep(trainer)
    return trainer


class Compile(pl.Callback):
    """torch.compile of the encoder and the decoder, when training begins, on the device that it uses.

    mode: one of torch.compile's, or True for its default. Where they cannot be compiled (no C++ compiler, an old GPU) the
    networks stay as they are and a warning says why. Raises VAEError for an unknown mode.
    """

    def __init__(self, mode: bool | str = True) -> None:
        self.mode = "default" if mode is True else mode
        if self.mode not in COMPILE_MODES:
            raise VAEError(f"compile={mode} is unknown: choose false, true or one of {', '.join(COMPILE_MODES)}.")

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        vae = module.vae
        batch = trainer.datamodule.examples("train", min(2, trainer.datamodule.batch_size))
        x, y = batch.x.to(module.device), None if batch.y is None else batch.y.to(module.device)
        try:
            for network in (vae.encoder, vae.decoder):
                network.compile(mode=self.mode)
            vae.decode(vae.encode(x, y).mean, y, x).sum().backward()
        except Exception as error:
            for network in (vae.encoder, vae.decoder):
                network._compiled_call_impl = None
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            logging.getLogger(__name__).warning(
                f"compile={self.mode} is not possible here ({type(error).__name__}: {reason}): training goes on without."
            )
        vae.zero_grad(set_to_none=True)
