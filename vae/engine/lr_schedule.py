"""Learning rates over the epochs of a run, beyond what torch has."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch

from vae.errors import VAEError


class Cosine(torch.optim.lr_scheduler.CosineAnnealingLR):
    """To zero along half a cosine over `epochs`, and zero ever after. Stepped each epoch.

    A run that goes on for longer than its checkpoint was made for follows the cosine of the new length from there on,
    and says so. Raises VAEError for a number of epochs that is not finite or below 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, epochs: float | None) -> None:
        if epochs is None or not (math.isfinite(epochs) and epochs >= 1):
            raise VAEError(
                "lr_schedule=cosine needs to know where it ends: set trainer.max_epochs, trainer.max_steps or "
                f"lr_schedule.epochs ({epochs} epochs are not a length)."
            )
        super().__init__(optimizer, int(epochs))

    def get_lr(self) -> list[float | torch.Tensor]:
        if self.last_epoch > self.T_max:  # torch's climbs again
            return [self.eta_min for _ in self.optimizer.param_groups]
        return super().get_lr()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "T_max": self.T_max})
        before = state_dict["T_max"]
        if before == self.T_max:
            return
        ended: list[float | torch.Tensor] = [self.eta_min for _ in self.base_lrs]
        rates = self._get_closed_form_lr() if self.last_epoch < self.T_max else ended
        logging.getLogger(__name__).warning(
            f"The learning rate was to reach zero after {before} epochs, and now after {self.T_max}: it goes on at "
            f"{rates[0]:.3g} instead of {self._last_lr[0]:.3g}, so the weights will not be those of a run of "
            f"{self.T_max} epochs from its start. lr_schedule.epochs plans for a longer run from the first command on."
        )
        self._last_lr = rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
