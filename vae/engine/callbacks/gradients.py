"""Gradients that are too large: their updates left out, and counted beside those that were clipped."""

from __future__ import annotations

import math
from typing import Any

import pytorch_lightning as pl
import torch

from vae.engine.callbacks.records import Reporter
from vae.errors import VAEError

MOST_IN_A_ROW = 100  # skipped updates, beyond which nothing is learned any more


class Gradients(Reporter):
    """Leaves out each update whose gradient has a norm above `skip_above`, or none that is finite (Child 2021, appendix).

    The norm is that of all parameters together, before `trainer.gradient_clip_val` clips it. A skipped update changes neither
    weights nor the optimiser's moments. Logged at the steps of the other training terms: `train/gradient_norm`, the largest
    since then, and over the whole run `train/skipped_updates` and `train/clipped_updates`; the counts also stand in
    metrics.json. With skip_above=null only gradients that are not finite are skipped; a loss that is not finite still ends
    the run. Waits for the device at every step.
    Raises VAEError for a threshold that is not positive, and where MOST_IN_A_ROW updates in a row were skipped.
    """

    def __init__(self, skip_above: float | None = None) -> None:
        if skip_above is not None and not (isinstance(skip_above, int | float) and 0 < skip_above < math.inf):
            raise VAEError(f"callbacks.gradients.skip_above={skip_above} must be a positive number, or null.")
        self.skip_above = math.inf if skip_above is None else skip_above
        self.skipped = self.clipped = self.in_a_row = 0
        self.largest = 0.0  # since the last record

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("skipped", "clipped", "in_a_row", "largest")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update(state_dict)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = float(torch.stack(torch._foreach_norm(gradients)).norm())
        self.largest = max(self.largest, norm) if math.isfinite(norm) else math.inf
        if norm <= self.skip_above and math.isfinite(norm):
            clip = 0 if trainer.gradient_clip_algorithm == "value" else trainer.gradient_clip_val or 0
            self.clipped += 0 < clip < norm
            self.in_a_row = 0
            return
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= MOST_IN_A_ROW:
            raise VAEError(
                f"The last {MOST_IN_A_ROW} updates were skipped, the last for a gradient of norm {norm:g} above "
                f"callbacks.gradients.skip_above={self.skip_above:g}: raise that, or try a smaller learning rate."
            )
        optimizer.zero_grad(set_to_none=True)  # parameters without a gradient are left as they are

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.steps % trainer.log_every_n_steps == 0:
            norm = {"train/gradient_norm": torch.tensor(self.largest)}
            counts = {name: torch.tensor(float(value)) for name, value in self.metrics.items()}
            pl_module.record({**norm, **counts}, pl_module.steps - 1)
            self.largest = 0.0

    @property
    def metrics(self) -> dict[str, float]:
        return {"train/skipped_updates": float(self.skipped), "train/clipped_updates": float(self.clipped)}
