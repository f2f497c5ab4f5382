"""The LightningModule: pairs a VAE with an objective, and nothing more."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from vae import ranks
from vae.data.images import Batch
from vae.data.loader import BatchLoader
from vae.engine.callbacks.records import take_back
from vae.engine.devices import SeveralDevices
from vae.engine.per_image import PerImage
from vae.errors import VAEError, whole
from vae.evaluation.likelihood import MOST_SAMPLES, ELBOTotals, bits_per_dim, nll, parts_of
from vae.evaluation.work import Work, no_tick
from vae.model import VAE, VAEOutput
from vae.objectives.elbo import Objective, SinglePass
from vae.precision import wide
from vae.seeding import generator


class VAEModule(pl.LightningModule):
    """Trains `vae` by `objective`.

    optimizer: parameters -> Optimizer; lr_schedule: optimizer -> scheduler, stepped each epoch. Every draw follows from
    the batch's seed. Terms are summed on the device and their mean over images is logged every `log_every_n_steps`; whatever
    step a run ends on is followed by a validation. Validation and test report `elbo`, `rate`, `distortion`, `bits_per_dim`
    and `active_units`, the test also `nll_iwK` with K = `nll_samples`. Of a model that sums its label out these are of p(x),
    and `elbo_given_label` and so on of p(x|y). Raises VAEError as soon as a loss that is not finite is noticed.

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
        self.nll_samples = whole("nll_samples", nll_samples, least=0, most=MOST_SAMPLES)
        self.progress_bar = False  # of the test's bound, which may be long
        self.per_image = PerImage()  # of the last test
        self.logged = False  # anything, by this module or a callback, since the loop last looked
        self.steps = 0  # batches trained on; unlike Lightning's counter, one per batch whatever the optimisers do
        self._apart: int | None = None  # epochs from one validation to the next, while a resumed run finds its place
        self.validated = 0  # `steps` at the last validation
        self.validation: dict[str, Tensor] = {}  # what it measured
        self.kl_per_dimension: Tensor | None = None  # of the last validation or test
        self.epoch_means = Means()  # of the training terms, over the current or last epoch
        self._since_log = Means()
        self._open: list[
            tuple[int, dict[str, Tensor]]
        ] = []  # images and terms of the steps that are in neither mean yet

    def __setattr__(self, name: str, value: Any) -> None:
        # set several times per step, and an nn.Module takes its time over each
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

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1 and not isinstance(self.trainer.strategy, SeveralDevices):
            raise VAEError(
                f"A Trainer of your own with {self.trainer.world_size} processes would measure the batches of one of them: "
                "give it devices=1, or start the run by `python -m vae.train trainer.devices=2`, which shares out each batch."
            )

    # --- training ---------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.trainer.callback_metrics.update(self.validation)  # early stopping may look before the next validation
        if self.steps:
            take_back(self.trainer.loggers, self.steps)

    def on_train_start(self) -> None:
        # Where a shorter run ended on a validation of its own, Lightning, seeing none due, would train one batch too many.
        apart, epoch = self.trainer.check_val_every_n_epoch, self.current_epoch + 1
        behind = self.validated == self.steps and self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        if behind and apart and epoch % apart:
            self.trainer.check_val_every_n_epoch, self._apart = 1, apart

    def on_train_epoch_start(self) -> None:
        self.epoch_means = Means()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        noise = generator(batch.seed, "z", device=batch.x.device)
        terms = self.objective(self.vae, batch, noise, self.steps)
        self.objective.schedule.observe(rate=terms["rate"], distortion=terms["distortion"])
        # Copies, because a term may be a buffer that changes, and a captured graph writes its results to the same place
        # each time.
        self.note(len(batch.x), {name: value.detach().clone() for name, value in terms.items()})
        return terms["loss"]

    def note(self, images: int, terms: dict[str, Tensor]) -> None:
        """Count a step on so many images, and keep its terms, detached and 0-dim.

        Nothing is added up, and nothing waits for the device, until the window ends.
        """
        if self._reported(images, self.trainer.datamodule.batch_size):
            self._open.append((images, terms))
        self.steps += 1
        if self.steps % self.trainer.log_every_n_steps == 0:
            self._log_window()

    def on_train_batch_end(self, *_: Any) -> None:
        if is_ending(self.trainer):
            self.trainer.check_val_every_n_epoch = self.trainer.val_check_batch = 1

    def _reported(self, images: int, whole: int) -> bool:
        """Whether the terms of so many images enter a mean over batches that have `whole`, but for the last."""
        return images >= whole or not self.objective.of_whole_batches

    def _log_window(self) -> None:
        self._end_part()
        if self._since_log.count:
            self.record(self._training_terms(self._since_log), self.steps - 1)
        self._since_log = Means()

    def _refuse_disagreement(self) -> None:
        """Raise VAEError if ranks, which all compute the loss of the whole batch, come to different ones."""
        if ranks.world_size() > 1 and self._open:
            losses = ranks.on_every_rank(self._noted("loss").mean())
            if max(losses) - min(losses) > 1e-3 * abs(losses[0]):
                raise VAEError(
                    f"At step {self.steps} the devices of this run come to different losses ({losses[0]:.6g}, "
                    f"{losses[1]:.6g}): something draws from torch's global generator, not from the one it is given. Use "
                    "trainer.devices=1."
                )

    def record(self, metrics: dict[str, Tensor], step: int) -> None:
        """Let callbacks know of metrics, and write them to the loggers at once: before a checkpoint says they are."""
        self.trainer.callback_metrics.update(metrics)  # what `log_dict` comes to, without its milliseconds
        for logger in self.trainer.loggers:
            numbers = {name: float(value) for name, value in metrics.items()}
            logger.log_metrics({**numbers, "epoch": step // self.trainer.num_training_batches}, step)
            logger.save()

    def _training_terms(self, means: Means) -> dict[str, Tensor]:
        terms = means.compute()
        terms["bits_per_dim"] = bits_per_dim(terms["elbo"], math.prod(self.trainer.datamodule.image_shape))
        return {f"train/{name}": value for name, value in terms.items()}

    def epoch_terms(self) -> dict[str, float]:
        """Means of the training terms over the images of the last epoch."""
        self._end_part()  # a run that is resumed at its end has no epoch end any more
        return {name: float(value) for name, value in self._training_terms(self.epoch_means).items()}

    def _end_part(self) -> None:
        self.refuse_divergence()
        self._refuse_disagreement()
        images = torch.tensor([images for images, _ in self._open], device=self.device)
        part = Means()
        part.sums = {name: (images * self._noted(name)).sum() for name in (self._open[0][1] if self._open else ())}
        part.count = sum(images for images, _ in self._open)
        self.epoch_means.merge(part)
        self._since_log.merge(part)
        self._open = []

    def _noted(self, name: str) -> Tensor:
        """A term of the steps of this part, (steps,); a checkpoint brings some of them back on the CPU."""
        return torch.stack([terms[name].to(self.device) for _, terms in self._open])

    def on_train_epoch_end(self) -> None:
        self._end_part()
        if self._apart:
            self.trainer.check_val_every_n_epoch, self._apart = self._apart, None

    def refuse_divergence(self) -> None:
        """Raise VAEError if a training loss was not finite."""
        if self._open and not (finite := self._noted("loss").isfinite()).all():
            step = self.steps - len(self._open) + int(finite.logical_not().nonzero()[0])
            epoch = step // self.trainer.num_training_batches + 1
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise VAEError(
                f"The loss stopped being finite at step {step} (epoch {epoch}, learning "
                f"rate {rate:g}, beta {float(self.objective.beta):g}): try a smaller learning rate or gradient clipping."
            )

    # --- validation and test ----------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.refuse_divergence()  # before any checkpoint of these weights is written
        self._totals, self._terms, self._whole = ELBOTotals(), Means(), 0

    def _measure(self, batch: Batch) -> VAEOutput:
        out = self._totals.update(self.vae, batch)
        if isinstance(self.objective, SinglePass) and self.objective.regularizer is None:
            terms = self.objective.of_pass(out, self.steps)
        else:
            noise = generator(batch.seed, "z", device=batch.x.device)
            terms = self.objective(self.vae, batch, noise, self.steps)
        if self._reported(len(batch.x), self._whole):
            self._terms.add(terms, weight=len(batch.x))
            self._whole = len(batch.x)
        return out

    def _measured(self) -> dict[str, Tensor]:
        """The objective's own terms, and over them what is measured alike for every objective."""
        self.kl_per_dimension = self._totals.kl_per_dimension()
        terms, totals = self._terms.compute(), self._totals.compute()
        if self.vae.latent_label:  # of p(x) are the objective's; one pass with the true label tells of p(x|y)
            terms["bits_per_dim"] = bits_per_dim(terms["elbo"], self._totals.pixels)
            for name in ("elbo", "distortion", "rate", "bits_per_dim"):
                totals[f"{name}_given_label"] = totals.pop(name)
        return {name: torch.as_tensor(value) for name, value in {**terms, **totals}.items()}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._measure(batch)

    def on_validation_epoch_end(self) -> None:
        metrics = self._measured()
        if not torch.isfinite(metrics["loss"]):
            raise VAEError(
                f"The validation loss is {float(metrics['loss'])} after step {self.steps}: the run has diverged."
            )
        self.validated = self.steps
        self.validation = {f"val/{name}": value for name, value in metrics.items()}
        self.record(self.validation, self.steps - 1)

    def on_test_epoch_start(self) -> None:
        self._totals, self._terms, self._whole = ELBOTotals(), Means(), 0
        self._log_likelihood, self.per_image = Means(), PerImage()
        self._work = Work(f"nll_iw{self.nll_samples}", self.progress_bar, longest=math.inf)
        self._work.expect(self.nll_steps(self.trainer.test_dataloaders))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        out, given = self._measure(batch), "_given_label" if self.vae.latent_label else ""
        self.per_image.see(batch.x)
        self.per_image.add({f"elbo{given}": -(wide(out.distortion) + wide(out.rate)), f"rate{given}": out.rate})
        if self.nll_samples:
            self._log_likelihood.add(self.mean_nll(batch, self._work), weight=len(batch.x))

    def mean_nll(self, batch: Batch, tick: Callable[[], None] = no_tick) -> dict[str, Tensor]:
        """Means over a prepared batch of what `nll` gives, in nats, as precise as the device allows, 0-dim; what it gives
        joins `per_image`."""
        values = nll(self.vae, batch, self.nll_samples, tick)
        self.per_image.add(values)
        return {name: wide(value).mean() for name, value in values.items()}

    def nll_steps(self, loader: BatchLoader) -> int:
        """How often `mean_nll` ticks over a loader, to within a batch."""
        labels = self.vae.num_classes if self.vae.latent_label else 1
        return labels * len(loader) * len(parts_of(self.nll_samples, loader.sampler.batch_size))

    def on_test_epoch_end(self) -> None:
        self._work.close()
        metrics = {**self._measured(), **self._log_likelihood.compute()}
        self.record({f"test/{name}": value for name, value in metrics.items()}, self.steps)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["steps"] = self.steps
        checkpoint["validated"], checkpoint["validation"] = self.validated, self.validation
        checkpoint["kl_per_dimension"] = self.kl_per_dimension
        checkpoint["means"] = [self.epoch_means.state_dict(), self._since_log.state_dict()]
        checkpoint["open"] = list(self._open)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.steps = checkpoint["steps"]
        for means, state in zip((self.epoch_means, self._since_log), checkpoint["means"], strict=True):
            means.load_state_dict(state)
        self._open = list(checkpoint["open"])
        if "validated" not in checkpoint:  # of an earlier version, which weighed all steps alike
            size = self.trainer.datamodule.batch_size
            self._open = [(size, terms) for terms in self._open]
            for means in (self.epoch_means, self._since_log):
                means.scale(size)
            return
        self.validated, self.validation = checkpoint["validated"], checkpoint["validation"]
        self.kl_per_dimension = checkpoint["kl_per_dimension"]


def is_ending(trainer: pl.Trainer) -> bool:
    """Whether the batch that was just trained on is the last of the run, as far as can be told before its epoch ends."""
    loop = trainer.fit_loop
    last_epoch = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    return (
        (last_epoch and loop.epoch_loop.batch_progress.is_last_batch)
        or 0 <= trainer.max_steps <= trainer.global_step
        or (trainer.should_stop and loop._can_stop_early)
    )


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

    def scale(self, factor: int) -> None:
        self.sums, self.count = {name: factor * value for name, value in self.sums.items()}, factor * self.count

    def compute(self) -> dict[str, Tensor]:
        return {name: value / self.count for name, value in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.count = dict(state["sums"]), state["count"]
