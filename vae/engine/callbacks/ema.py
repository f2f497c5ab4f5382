"""An exponential moving average of the weights: what is validated, tested, drawn and kept as the best."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from vae.engine.module import VAEModule
from vae.errors import VAEError


class EMA(pl.Callback):
    """After each step of the optimiser, average = d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) after n
    steps, so that the first weights are soon forgotten.

    The parameters of the model are averaged, not those of an objective (a discriminator), nor buffers. From the beginning of
    a validation until training goes on, the model has the averaged weights: what is measured and drawn is of them, and
    best.ckpt holds them; then the plain ones come back to the last bit. Every checkpoint has both, so that a run that is
    resumed goes on exactly. Raises VAEError for a decay outside [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not (isinstance(decay, int | float) and 0 <= decay < 1):
            raise VAEError(f"callbacks.ema.decay={decay} must be at least 0 and less than 1.")
        self.decay = decay
        self.steps = 0
        #: Those that the model does not have now: the averaged weights, or while it has these, the plain ones; by name.
        self.others: dict[str, Tensor] = {}
        #: Whether the model has the averaged weights.
        self.averaged = False

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "others": dict(self.others), "averaged": self.averaged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self.others, self.averaged = (state_dict[name] for name in ("steps", "others", "averaged"))

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        weights = dict(pl_module.vae.named_parameters())
        if not self.others:
            self.others = {name: weight.detach().clone() for name, weight in weights.items()}
        # a checkpoint brings them on the CPU
        self.others = {name: value.to(weights[name].device) for name, value in self.others.items()}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.averaged:
            self._exchange(pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.steps:  # batches were accumulated
            return
        self.steps = trainer.global_step
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            weights = [weight.detach() for weight in pl_module.vae.parameters()]
            torch._foreach_lerp_(list(self.others.values()), weights, 1 - decay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not self.averaged:
            self._exchange(pl_module)

    @torch.no_grad()
    def _exchange(self, module: VAEModule) -> None:
        for name, weight in module.vae.named_parameters():
            kept = weight.detach().clone()
            weight.copy_(self.others[name])
            self.others[name] = kept
        self.averaged = not self.averaged
