"""Faster steps: skips the per-step work of Lightning that this run does not use; compiles networks where asked.

On a CPU core Lightning spends more than a millisecond per step on hooks that nobody has, a profiler that measures nothing and
metrics that have not changed. `NoProfiler` and `LeanLoop` spare it, and leave the work to Lightning wherever something
does ask for it: a profiler, an unusual precision or strategy, an optimiser that needs a closure, a module that
overrides how an optimiser is stepped.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import operator
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.profilers import PassThroughProfiler
from pytorch_lightning.strategies import SingleDeviceStrategy

from vae import ranks
from vae.engine.devices import SeveralDevices
from vae.engine.fused_adam import QuickStep
from vae.errors import VAEError

#: Minor versions of Lightning with which LeanLoop trains to the same bits as Lightning's own loop.
TESTED = ("2.5", "2.6")

try:  # what Lightning keeps to itself may go with any release
    from pytorch_lightning.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
    from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
except ImportError as error:
    _TrainingEpochLoop, MISSING = object, str(error)
else:
    MISSING = ""

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class NoProfiler(PassThroughProfiler):
    """Lightning enters and leaves its profiler 66 times per step, whether it measures anything or not."""

    _nothing = contextlib.nullcontext()

    def profile(self, action_name: str) -> contextlib.nullcontext:
        return self._nothing


class LeanLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch: the same calls and hooks in the same order, one after another.

    Whether that may be done, and who has which hook, is looked up once per epoch instead of at every step; what was logged is
    passed on at the steps that logged something, for which the module keeps `logged`.
    """

    #: Of a step, of a callback or the module.
    HOOKS = (
        "on_train_batch_start",
        "on_before_zero_grad",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
    )
    #: Hooks a module must not override here: LeanLoop never calls them, or ignores their result.
    UNHEARD = (
        "optimizer_step",
        "optimizer_zero_grad",
        "backward",
        "configure_gradient_clipping",
        "on_train_batch_start",
        "on_before_batch_transfer",
        "transfer_batch_to_device",
        "on_after_batch_transfer",
    )

    #: What `advance` takes of Lightning's own, besides its hooks.
    OF_LIGHTNING = (
        "_results.batch",
        "_num_ready_batches_reached",
        "restarting",
        "val_loop.restarting",
        "automatic_optimization.optim_progress.optimizer.step.increment_ready",
        "batch_progress.increment_processed",
        "trainer._logger_connector._first_loop_iter",
        "trainer._logger_connector.on_batch_end",
        "trainer._logger_connector.should_update_logs",
        "trainer._logger_connector.update_train_step_metrics",
        "trainer.fit_loop._skip_backward",
        "trainer.lightning_module._current_fx_name",
        "_skip_next_val",
        "_batches_that_stepped",
        "update_lr_schedulers",
    )

    def on_run_start(self, data_fetcher: _DataFetcher) -> None:
        super().on_run_start(data_fetcher)
        trainer, module = self.trainer, self.trainer.lightning_module
        try:
            operator.attrgetter(*self.OF_LIGHTNING)(self)
            self._plain = self._is_plain(data_fetcher)
        except AttributeError as error:
            self._plain = False
            _leave_to_lightning(str(error))
        if self._plain:
            self._optimizer = QuickStep(trainer.optimizers[0])
        self._scheduled = bool(trainer.strategy.lr_scheduler_configs)
        self._sharing = ranks.sharing if trainer.world_size > 1 else contextlib.nullcontext
        self._hooks = {}
        for name in self.HOOKS:
            of_callbacks = [
                functools.partial(getattr(callback, name), trainer, module)
                for callback in trainer.callbacks
                if _has_own(callback, name, pl.Callback)
            ]
            of_module = [getattr(module, name)] if _has_own(module, name, pl.LightningModule) else []
            self._hooks[name] = [*of_callbacks, *of_module]

    def _is_plain(self, data_fetcher: _DataFetcher) -> bool:
        trainer, module, data = self.trainer, self.trainer.lightning_module, self.trainer.datamodule
        precision = trainer.precision_plugin
        return (
            hasattr(module, "logged")
            and isinstance(trainer.profiler, NoProfiler)
            and not isinstance(data_fetcher, _DataLoaderIterDataFetcher)
            and type(trainer.strategy) in (SingleDeviceStrategy, SeveralDevices)
            and (type(precision) is Precision or (type(precision) is MixedPrecision and precision.scaler is None))
            and trainer.accumulate_grad_batches == 1
            and not trainer.fit_loop._skip_backward
            and module.automatic_optimization
            and not isinstance(trainer.optimizers[0], torch.optim.LBFGS)
            and not any(_has_own(module, name, pl.LightningModule) for name in self.UNHEARD)
            and data is not None
            and not _has_own(data, "on_before_batch_transfer", pl.LightningDataModule)
        )

    def _call(self, name: str, *args: Any) -> None:
        if hooks := self._hooks[name]:
            self.trainer.lightning_module._current_fx_name = name
            for hook in hooks:
                hook(*args)

    def advance(self, data_fetcher: _DataFetcher) -> None:
        if not self._plain or self.restarting:
            super().advance(data_fetcher)
            return
        if self.val_loop.restarting:  # to set it looks through all loops
            self.val_loop.restarting = False
        batch, _, _ = next(data_fetcher)
        self.take(batch, data_fetcher.done)

    def take(self, batch: Any, is_last: bool) -> None:
        """Train on a batch, whose place in the epoch is the next; `is_last`: of the epoch."""
        trainer, progress, results = self.trainer, self.batch_progress, self._results
        module, data, connector = trainer.lightning_module, trainer.datamodule, trainer._logger_connector
        number = self.batch_idx + 1
        progress.is_last_batch = is_last
        batch = data.transfer_batch_to_device(batch, trainer.strategy.root_device, 0)
        batch = data.on_after_batch_transfer(batch, 0)
        progress.increment_ready()
        connector._first_loop_iter = connector._first_loop_iter is None
        results.batch, results.batch_size, results.dataloader_idx = batch, None, None

        module.logged = False
        self._call("on_train_batch_start", batch, number)
        progress.increment_started()
        outputs = self._step(batch, number)
        progress.increment_processed()
        if self._scheduled:
            self._update_schedules()
        self._call("on_train_batch_end", outputs, batch, number)
        module._current_fx_name = None
        if module.logged:
            connector.on_batch_end()
        results.batch = results.batch_size = None
        progress.increment_completed()
        if connector.should_update_logs or trainer.fast_dev_run:
            connector.update_train_step_metrics()

    def _update_schedules(self) -> None:
        self.update_lr_schedulers("step", update_plateau_schedulers=False)
        if self._num_ready_batches_reached():
            self.update_lr_schedulers("epoch", update_plateau_schedulers=False)

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        """Where nothing is due after this batch, Lightning's own would only count it."""
        trainer = self.trainer
        if (
            not self._plain
            or self._scheduled
            or self._skip_next_val
            or trainer.should_stop
            or trainer.received_sigterm
            or self._may_validate(0)
        ):
            super().on_advance_end(data_fetcher)
        else:
            self._batches_that_stepped += 1

    def _may_validate(self, more: int) -> bool:
        """Whether a validation may be due once so many more batches are taken, the end of the epoch left out."""
        trainer = self.trainer
        taken = (self.total_batch_idx if trainer.check_val_every_n_epoch is None else self.batch_idx) + 1 + more
        return (
            getattr(trainer, "_val_check_time_interval", None) is not None  # Lightning 2.6 and later
            or trainer.val_check_batch == math.inf
            or taken % trainer.val_check_batch == 0
        )

    def _step(self, batch: Any, number: int) -> dict[str, Any]:
        trainer, module = self.trainer, self.trainer.lightning_module
        optimizer, progress = trainer.optimizers[0], self.automatic_optimization.optim_progress.optimizer
        progress.step.increment_ready()
        module._current_fx_name = "training_step"
        with trainer.precision_plugin.train_step_context(), self._sharing():
            loss = module.training_step(batch, number)
        self._call("on_before_zero_grad", optimizer)
        progress.zero_grad.increment_ready()
        progress.zero_grad.increment_started()
        self._optimizer.zero_grad()
        progress.zero_grad.increment_completed()
        self._call("on_before_backward", loss)
        loss.backward()
        trainer.strategy.post_backward(loss)
        self._call("on_after_backward")
        self._call("on_before_optimizer_step", optimizer)
        if trainer.gradient_clip_val is not None:
            module.clip_gradients(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)
        self._optimizer.step()
        progress.step.increment_completed()
        return {"loss": loss.detach()}


def _has_own(owner: Any, name: str, base: type) -> bool:
    return name in vars(owner) or getattr(type(owner), name) is not getattr(base, name)


def make_lean(trainer: pl.Trainer, kind: type[LeanLoop] = LeanLoop) -> pl.Trainer:
    """The same trainer, its epochs run by `kind` where that was tried with this Lightning, or else as it is."""
    if MISSING or ".".join(pl.__version__.split(".")[:2]) not in TESTED:
        _leave_to_lightning(MISSING or f"tried with {' and '.join(TESTED)} only")
        return trainer
    loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_loop = kind(trainer, loop.min_steps, loop.max_steps)
    return trainer


@functools.cache  # said once a process
def _leave_to_lightning(reason: str) -> None:
    logging.getLogger(__name__).warning(
        f"Lightning {pl.__version__} trains by its own loop, which is slower: ours may not fit it ({reason})."
    )


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
        # any class will do for an image whose label is not known
        x, y = batch.x.to(module.device), None if batch.y is None else batch.y.clamp(min=0).to(module.device)
        # Memory that a backward pass may overwrite can be passed through once; PIWAE goes back through the decoder twice.
        # The option is of torch 2.6 and later; before, no memory was given away.
        if hasattr(torch._functorch.config, "donated_buffer"):
            torch._functorch.config.donated_buffer = False
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
