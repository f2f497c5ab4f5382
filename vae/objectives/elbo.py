"""The beta-weighted ELBO, and what every objective of the family shares."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vae.beta import Constant
from vae.codes import CodePosterior
from vae.errors import VAEError
from vae.gaussian import DiagonalGaussian
from vae.model import VAE, Halves, VAEOutput
from vae.seeding import generator

if TYPE_CHECKING:
    from vae.data.images import Batch
    from vae.data.module import ImageDataModule
    from vae.objectives.regularizers import Regularizer


class Objective(nn.Module):
    """What is minimised. Called with a VAE and a batch, it returns batch means in nats by name.

    "loss" is the only term with a gradient; "distortion", "rate" and "elbo" are always there, the ELBO at beta = 1
    whatever the weight. The weight on the KL is `beta * schedule(step)` in training; validation uses the weight that the
    schedule ends on, so that losses of different epochs can be compared. A controller has no final value: its current
    weight is used, and `loss_moves` says so.
    """

    beta: Tensor

    #: Options of the parameter group that holds the objective's own parameters, where it has any.
    optimizer_options: dict[str, object] = {}
    #: Whether encoder and decoder are given labels.
    conditional = False
    #: Whether the model that they make up sums the label out; the terms are then of p(x) outside training.
    latent_label = False
    #: Whether it makes sense where q(z|x) is a point mass on codes (posterior=fsq, vq): it takes of the model the two halves of
    #: the ELBO, and what it returns is made by `named_terms`.
    of_codes = False
    #: Whether the mean of a term depends on how many images a batch has: one smaller than the others, the last of an
    #: epoch, is then left out of what is reported. The gradient is taken of every batch.
    of_whole_batches = False
    #: Why runs that differ in numbers cannot be trained as one program (`hydra/launcher=packed`); None says that they can:
    #: each number that is state is a buffer, no Python branch looks at the value of a tensor, no hook is put on one, and
    #: every draw comes from `generator`, of a shape that no tensor's values decide.
    unpackable: str | None = "it does not say that it can be packed, by unpackable = None"
    #: Whether it may be packed with runs whose latents are of another size (`vae.engine.padding`): a latent dimension of which
    #: q(z|x) and p(z) are N(0, 1), with z = 0 and no weight on it, changes none of its terms. A subclass says so for itself.
    paddable = False
    #: What forbids that several batches make one step (`trainer.accumulate_grad_batches`), or None where they may.
    unaccumulable: str | None = None
    #: How many batches are trained on before all parts of it count.
    start_step = 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "paddable" not in vars(cls):
            cls.paddable = False

    def __init__(self, beta: float = 1.0, schedule: nn.Module | None = None) -> None:
        super().__init__()
        if not beta >= 0:
            raise VAEError(f"objective.beta={beta} must be zero or more.")
        self.register_buffer("beta", torch.tensor(float(beta)))
        self.schedule = Constant() if schedule is None else schedule
        require_something_to_steer(self.schedule, beta, "objective.beta=0")
        #: What joins the loss, where one is asked for.
        self.regularizer: Regularizer | None = None

    def __call__(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """`forward`, and what the regulariser adds to the loss, which is logged under its name."""
        terms: dict[str, Tensor] = super().__call__(vae, batch, generator, step)
        if self.regularizer is None:
            return terms
        term = self.regularizer(vae, batch, generator, step).mean()
        return {**terms, "loss": terms["loss"] + self.regularizer.weight * term, self.regularizer.name: term.detach()}

    @property
    def loss_moves(self) -> str | None:
        """Why validation losses of two epochs are of two objectives, or None where they are of one and can be compared.

        What moves chooses no weights: the last are tested then, and early stopping must not watch the loss. A schedule
        by the clock moves nothing, since validation uses what it ends on; a controller does, and so does a network that
        the objective trains against the VAE, whose verdict of one epoch is not that of another.
        """
        return f"{type(self.schedule).__name__} changes the weight on the KL" if self.schedule.learns else None

    def setup(self, vae: VAE, data: ImageDataModule) -> None:
        """Called once, before training and before weights are loaded: the place to make modules whose size follows from
        the model or the data, and to ask the data for what its batches must carry.

        Raises VAEError, in one sentence, for a model or data that the objective makes no sense with.
        """

    def start(self, vae: VAE, data: ImageDataModule) -> None:
        """Called after `setup` where training begins, and not where a checkpoint's weights replace all that is made here: the
        place for what takes long, or reads files that a run then holds itself.

        Raises VAEError, in one sentence, for what is not there.
        """

    def multiplier(self, step: int) -> Tensor:
        """What the schedule says at a training step, 0-dim; outside training, what it ends on."""
        return self.schedule(step if self.training else math.inf)

    def weight(self, step: int) -> Tensor:
        """The weight on the KL at a training step, 0-dim; outside training, where the schedule ends."""
        return self.beta * self.multiplier(step)

    def named_terms(self, loss: Tensor, out: Halves, **more: Tensor) -> dict[str, Tensor]:
        """The loss beside the two halves of the ELBO; of codes, with what their quantizer adds to it, and how many are used."""
        posterior = getattr(out, "posterior", None)
        if isinstance(posterior, CodePosterior):
            loss, more = loss + posterior.mean_commitment, {**posterior.terms(), **more}
        distortion, rate = out.mean_distortion.detach(), out.mean_rate.detach()
        return {"loss": loss, "elbo": -(distortion + rate), "distortion": distortion, "rate": rate, **more}

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        """The terms of a batch, 0-dim each. generator: of every draw; step: how many batches were trained on before."""
        raise NotImplementedError(f"{type(self).__name__} must define forward().")


class SinglePass(Objective):
    """An objective of one pass of the batch through the model, and nothing else: validation measures that same pass."""

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        return self.of_pass(vae(batch.x, generator, batch.y), step)

    def of_pass(self, out: VAEOutput, step: int) -> dict[str, Tensor]:
        """The terms, from what the model made of the batch."""
        raise NotImplementedError(f"{type(self).__name__} must define of_pass().")


class BetaVAE(SinglePass):
    """distortion + beta * rate: the negative ELBO at beta = 1 (Kingma & Welling 2014), Higgins et al. 2017 otherwise."""

    unpackable = None
    paddable = True
    of_codes = True

    def of_pass(self, out: VAEOutput, step: int) -> dict[str, Tensor]:
        weight = self.weight(step)
        loss = out.mean_distortion + weight * out.mean_rate
        return self.named_terms(loss, out, beta=weight)


# --- what an objective may refuse -------------------------------------------------------------------------------------


def require_something_to_steer(schedule: nn.Module, weight: float, setting: str) -> None:
    """Raises VAEError for a feedback controller whose output is multiplied by a weight that a setting holds at zero."""
    if weight == 0 and schedule.learns:
        raise VAEError(
            f"{type(schedule).__name__} steers the weight on the KL, which {setting} holds at 0: change that, or use "
            "objective/schedule=constant."
        )


def require_not_negative(group: str, **options: float) -> None:
    """Raises VAEError for an option of a config group that is negative or not finite."""
    for name, value in options.items():
        if not (value >= 0 and math.isfinite(value)):
            raise VAEError(f"{group}.{name}={value} must be finite and zero or more.")


def require_no_codes(objective: Objective, vae: VAE) -> None:
    """Raises VAEError where q(z|x) is a point mass on codes and the objective, or its schedule, makes no sense with them."""
    if not vae.discrete:
        return
    if not objective.of_codes:
        raise VAEError(
            f"{type(objective).__name__} makes no sense with codes, which have no density and no gradient of the rate: use "
            "objective=beta_vae or objective=cvae, or posterior=diagonal."
        )
    if objective.schedule.learns:
        raise VAEError(
            f"{type(objective.schedule).__name__} steers by the weight on the rate, from which codes do not learn: use "
            "objective/schedule=constant, and choose the rate by model.latent_dim and the number of codes."
        )


@torch.no_grad()
def pass_of_one_image(vae: VAE, data: ImageDataModule) -> VAEOutput:
    """An image through the untrained model: what kind of posterior it has, and whether its KL is exact."""
    batch = data.examples("val", 1)
    training = vae.training
    try:
        return vae.eval()(batch.x, generator("pass of one image"), batch.y)
    finally:
        vae.train(training)


def require_gaussian_posterior(objective: nn.Module, vae: VAE, data: ImageDataModule) -> None:
    """Raises VAEError unless q(z|x) is a diagonal Gaussian."""
    if not isinstance(pass_of_one_image(vae, data).posterior, DiagonalGaussian):
        raise VAEError(f"{type(objective).__name__} needs a diagonal Gaussian q(z|x): use posterior=diagonal.")


def require_kl_per_dimension(objective: nn.Module, vae: VAE, data: ImageDataModule) -> None:
    """Raises VAEError unless KL(q(z|x) || p(z)) is known in closed form for each latent dimension."""
    if pass_of_one_image(vae, data).kl.shape[-1] != vae.latent_dim:
        raise VAEError(
            f"{type(objective).__name__} needs the KL of each latent dimension in closed form: use a diagonal Gaussian "
            "posterior and prior=standard_normal."
        )
