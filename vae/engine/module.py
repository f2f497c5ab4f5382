"""The LightningModule: pairs a VAE with an objective, and nothing more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from vae.data.images import Batch
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

    For `pytorch_lightning.Trainer`: that of the unified `lightning` package takes only modules of its own base class.
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
        self.logged = False  # anything, by this module or a callback, since the loop last looked
        self.steps = 0  # batches trained on; unlike Lightning's counter, one a batch whatever the optimisers do
        self.kl_per_dimension: Tensor | None = None  # of the last validation, for pictures
        self.epoch_means = Means()  # of the training terms, over the current or last epoch
        self._since_log = Means()
        self._open: list[dict[str, Tensor]] = []  # the terms of the steps that are in neither mean yet

    def __setattr__(self, name: str, value: Any) -> None:
        # set several times a step, and an nn.Module takes its time over each
        if name in ("_current_fx_name", "logged", "steps"):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def log(self, *args: Any, **kwargs: Any) -> None:
        self.logged = True
        super().log(*args, **kwargs)

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
        # Nothing is added up, and nothing waits for the device, until the window ends. Copies, because a term may be a
        # buffer that changes, and a captured graph writes its results to the same place each time.
        self._open.append({name: value.detach().clone() for name, value in terms.items()})
        self.steps += 1
        if self.steps % self.trainer.log_every_n_steps == 0:
            self._log_window()
        return terms["loss"]

    def _log_window(self) -> None:
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
        self.refuse_divergence()
        part = Means()
        part.sums = {name: self._noted(name).sum() for name in dict.fromkeys(n for terms in self._open for n in terms)}
        part.count = len(self._open)
        self.epoch_means.merge(part)
        self._since_log.merge(part)
        self._open = []

    def _noted(self, name: str) -> Tensor:
        """A term of the steps of this part, (steps,); a checkpoint brings some of them back on the CPU."""
        return torch.stack([terms[name].to(self.device) for terms in self._open if name in terms])

    def on_train_epoch_end(self) -> None:
        self._end_part()

    def refuse_divergence(self) -> None:
        """Raise VAEError if a training loss was not finite."""
        if self._open and not (finite := self._noted("loss").isfinite()).all():
            step = self.steps - len(self._open) + int(finite.logical_not().nonzero()[0])
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise VAEError(
                f"The loss stopped being finite at step {step} (epoch {self.current_epoch}, learning "
                f"rate {rate:g}, beta {float(self.objective.beta):g}): try a smaller learning rate or gradient clipping."
            )

    # --- validation and test ----------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.refuse_divergence()  # before any checkpoint of these weights is written
        self._totals, self._terms = ELBOTotals(), Means()

    def _measure(self, batch: Batch) -> None:
        out = self._totals.update(self.vae, batch)
        if self.objective.is_of_one_pass:
            terms = self.objective.of_pass(out, self.steps)
        else:
            noise = generator(batch.seed, "z", device=batch.x.device)
            terms = self.objective(self.vae, batch, noise, self.steps)
        self._terms.add(terms, weight=len(batch.x))

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["steps"] = self.steps
        checkpoint["means"] = [self.epoch_means.state_dict(), self._since_log.state_dict()]
        checkpoint["open"] = list(self._open)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps = checkpoint["steps"]
        for means, state in zip((self.epoch_means, self._since_log), checkpoint["means"], strict=True):
            means.load_state_dict(state)
        self._open = list(checkpoint["open"])


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
