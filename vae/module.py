"""The LightningModule: pairs a VAE with an objective, and nothing more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from vae.data.module import Batch
from vae.errors import VAEError
from vae.evaluation.likelihood import ELBOTotals, bits_per_dim, log_likelihood
from vae.model import VAE
from vae.objectives.elbo import Objective
from vae.seeding import generator


class VAEModule(pl.LightningModule):
    """Trains `vae` by `objective`.

    optimizer: parameters -> Optimizer; lr_schedule: optimizer -> scheduler, stepped each epoch. Every draw follows from
    the batch's seed. Terms are summed on the device and their mean is logged every `log_every_n_steps`; validation
    and test report `elbo`, `rate`, `distortion`, `bits_per_dim` and `active_units`, the test also `nll_iwK`
    with K = `nll_samples`. Raises VAEError as soon as a loss that is not finite is noticed.
    """

    def __init__(
        self,
        vae: VAE,
        objective: Objective,
        optimizer: Callable[..., torch.optim.Optimizer],
        lr_schedule: Callable[..., Any] | None = None,
        nll_samples: int = 500,
    ) -> None:
        super().__init__()
        self.vae, self.objective = vae, objective
        self.make_optimizer, self.make_lr_schedule = optimizer, lr_schedule
        self.nll_samples = nll_samples
        self.steps = 0  # batches trained on; unlike Lightning's counter, one a batch whatever the optimisers do
        self.kl_per_dimension: Tensor | None = None  # of the last validation, for pictures
        self.epoch_means = Means()  # of the training terms, over the current or last epoch
        self._since_log, self._open = Means(), Means()
        self.register_buffer("_diverged_at", torch.tensor(torch.inf), persistent=False)

    def configure_optimizers(self) -> Any:
        groups: list[dict[str, Any]] = [{"params": list(self.vae.parameters())}]
        if own := list(self.objective.parameters()):
            groups.append({"params": own, **self.objective.optimizer_options})
        optimizer = self.make_optimizer(groups)
        if self.make_lr_schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.make_lr_schedule(optimizer)}

    # --- training ---------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        self.epoch_means = Means()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        noise = generator(batch.seed, "z", device=batch.x.device)
        terms = self.objective(self.vae, batch, noise, self.steps)
        self._open.add(terms)
        self._note_divergence(terms["loss"].detach())
        self.steps += 1
        if self.steps % self.trainer.log_every_n_steps == 0:
            self._log_window()
        return terms["loss"]

    def _note_divergence(self, loss: Tensor) -> None:
        # A tensor, so that nothing waits for the device: `refuse_divergence` reads it now and then.
        here = torch.full_like(self._diverged_at, self.steps)
        first = torch.minimum(self._diverged_at, torch.where(loss.isfinite(), torch.inf, here))
        self._diverged_at = first

    def _log_window(self) -> None:
        self.refuse_divergence()
        self._end_part()
        self.log_dict(self._training_terms(self._since_log))
        self._since_log = Means()

    def _training_terms(self, means: Means) -> dict[str, Tensor]:
        terms = means.compute()
        terms["bits_per_dim"] = bits_per_dim(terms["elbo"], math.prod(self.trainer.datamodule.image_shape))
        return {f"train/{name}": value for name, value in terms.items()}

    def epoch_terms(self) -> dict[str, float]:
        """Means of the training terms over the last epoch."""
        return {name: float(value) for name, value in self._training_terms(self.epoch_means).items()}

    def _end_part(self) -> None:
        self.epoch_means.merge(self._open)
        self._since_log.merge(self._open)
        self._open = Means()

    def on_train_epoch_end(self) -> None:
        self._end_part()

    def refuse_divergence(self) -> None:
        """Raise VAEError if a training loss was not finite."""
        if self._diverged_at.isfinite():
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise VAEError(
                f"The loss stopped being finite at step {int(self._diverged_at)} (epoch {self.current_epoch}, learning "
                f"rate {rate:g}, beta {float(self.objective.beta):g}): try a smaller learning rate or gradient clipping."
            )

    # --- validation and test ----------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.refuse_divergence()  # before any checkpoint of these weights is written
        self._totals, self._terms = ELBOTotals(), Means()

    def _measure(self, batch: Batch) -> None:
        noise = generator(batch.seed, "z", device=batch.x.device)
        self._terms.add(self.objective(self.vae, batch, noise, self.steps), weight=len(batch.x))
        self._totals.update(self.vae, batch)

    def _measured(self) -> dict[str, Any]:
        """The objective's own terms, and over them what is measured alike for every objective."""
        return {**self._terms.compute(), **self._totals.compute()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        metrics = self._measured()
        if not torch.isfinite(metrics["loss"]):
            raise VAEError(
                f"The validation loss is {float(metrics['loss'])} after step {self.steps}: the run has diverged."
            )
        self.kl_per_dimension = self._totals.kl_per_dimension()
        self.log_dict({f"val/{name}": value for name, value in metrics.items()})

    def on_test_epoch_start(self) -> None:
        self._totals, self._terms = ELBOTotals(), Means()
        self._log_likelihood = Means()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch)
        if self.nll_samples:
            nll = -log_likelihood(self.vae, batch, self.nll_samples)
            self._log_likelihood.add({f"nll_iw{self.nll_samples}": nll.double().mean()}, weight=len(batch.x))

    def on_test_epoch_end(self) -> None:
        metrics = {**self._measured(), **self._log_likelihood.compute()}
        self.log_dict({f"test/{name}": value for name, value in metrics.items()})

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _running_means(self) -> list[Means]:
        return [self.epoch_means, self._since_log, self._open]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["steps"] = self.steps
        checkpoint["means"] = [means.state_dict() for means in self._running_means()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps = checkpoint["steps"]
        for means, state in zip(self._running_means(), checkpoint["means"], strict=True):
            means.load_state_dict(state)


class Means:
    """Running means of named 0-dim tensors, kept on their device: nothing waits for the numbers until `compute`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, terms: dict[str, Tensor], weight: int = 1) -> None:
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + weight * value.detach()
        self.count += weight

    def merge(self, other: Means) -> None:
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.count += other.count

    def compute(self) -> dict[str, Tensor]:
        return {name: value / self.count for name, value in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.count = dict(state["sums"]), state["count"]
