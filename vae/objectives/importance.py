"""Importance-weighted bounds on log p(x), and the estimators of their gradients.

With weights w_i = p(x, z_i) / q(z_i|x) at K draws of z, log 1/K sum_i w_i is a lower bound on log p(x) in expectation,
which never falls with K and is the ELBO at K = 1 (Burda et al. 2016). Here there are M groups of K draws each, and the
loss *is* the bound: whatever is done to the gradient, the value that is minimised and logged stays minus the bound.

The gradient that reaches the encoder, with w~ the weights of a group normalised to sum to one (`estimator`):
    reparameterised        sum_i w~_i   [d log w_i/dz_i dz_i/dphi - d log q(z_i)/dphi]   Burda et al. 2016
    sticking_the_landing   sum_i w~_i    d log w_i/dz_i dz_i/dphi                        Roeder et al. 2017
    dreg                   sum_i w~_i^2  d log w_i/dz_i dz_i/dphi                        Tucker et al. 2019
The first and the last are unbiased; sticking_the_landing only at K = 1, which it shares with dreg. Both of these are
exactly zero at the exact posterior, and dreg's signal-to-noise ratio does not fall with K.

Any weight beta on the KL is allowed, log w = log p(x|z) + beta (log p(z) - log q(z|x)), for which dreg weighs by
(1 - beta) w~ + beta w~^2; only at beta = 1 is the loss a bound on log p(x). `iw_bound` always is: at beta = 1.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from vae.errors import VAEError, choose, whole
from vae.gaussian import DiagonalGaussian
from vae.model import VAE, Posterior
from vae.objectives.elbo import Objective
from vae.precision import full_precision

if TYPE_CHECKING:
    from vae.data.images import Batch

ESTIMATORS = ("reparameterised", "sticking_the_landing", "dreg")


def log_mean_exp(values: Tensor, dim: int) -> Tensor:
    """log of the mean of exp(values) over a dimension; in float32 at least."""
    return full_precision(values).logsumexp(dim) - math.log(values.shape[dim])


class Densities(NamedTuple):
    """What the weights are made of, all (M, K, B) in nats: log p(x|z), log p(z), log q(z|x)."""

    log_likelihood: Tensor
    log_prior: Tensor
    log_q: Tensor

    def log_weights(self, beta: Tensor | float = 1.0) -> Tensor:
        """log p(x|z) + beta (log p(z) - log q(z|x)), (M, K, B)."""
        return self.log_likelihood + beta * (self.log_prior - self.log_q)


class MIWAE(Objective):
    """The mean over `groups` = M of log-mean-exps over `samples` = K weights; Rainforth et al. 2018, section 5.

    M = 1 is the IWAE, K = 1 the VAE with M draws of z, its KL estimated. estimator: of the gradient, one of ESTIMATORS.
    Any prior and posterior will do. Terms: `iw_bound`, the bound on log p(x) in nats; "elbo" is the ELBO as ever, from
    the same draws. Raises VAEError for less than one group or sample, or an unknown estimator.
    """

    paddable = True

    def __init__(
        self,
        groups: int,
        samples: int,
        estimator: str = "reparameterised",
        beta: float = 1.0,
        schedule: nn.Module | None = None,
    ) -> None:
        super().__init__(beta, schedule)
        whole("objective.groups", groups)
        whole("objective.samples", samples)
        choose("objective.estimator", estimator, ESTIMATORS)
        self.groups, self.samples, self.estimator = groups, samples, estimator

    @property
    def unpackable(self) -> str | None:  # type: ignore[override]
        return "objective.estimator=dreg puts a hook on the codes" if self.estimator == "dreg" else None

    def bound(self, log_w: Tensor) -> Tensor:
        """What is maximised of each image, (M, K, B) -> (B,)."""
        return log_mean_exp(log_w, dim=1).mean(0)

    def path_factor(self, log_w: Tensor, beta: Tensor) -> Tensor:
        """dreg: what multiplies the gradient of `bound` with respect to z, (M, K, B)."""
        return dreg_factor(log_w.softmax(1), beta)

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        beta = self.weight(step)
        posterior = vae.encode(batch.x, batch.y)
        z = posterior.rsample(generator, (self.groups, self.samples))
        out = vae.measure(batch.x, posterior, z, batch.y)
        log_q = self.log_q(vae, batch, posterior, z)
        densities = Densities(-out.distortion, vae.prior.log_prob(z), log_q)
        log_w = densities.log_weights(beta)
        self.reweigh(z, log_w, beta)
        bound = self.bound(densities.log_weights().detach()).mean()
        return self.named_terms(-self.bound(log_w).mean(), out, iw_bound=bound, beta=beta)

    def log_q(self, vae: VAE, batch: Batch, posterior: Posterior, z: Tensor) -> Tensor:
        """log q(z|x), (M, K, B); without gradient to the parameters of q unless the estimator is reparameterised."""
        if self.estimator == "reparameterised":
            return posterior.log_prob(z)
        if isinstance(posterior, DiagonalGaussian):
            return DiagonalGaussian(*(parameter.detach() for parameter in posterior)).log_prob(z)
        frozen = {f"vae.{name}": value.detach() for name, value in vae.named_parameters()}
        return torch.func.functional_call(_LogPosterior(vae), frozen, (batch.x, z, batch.y))

    def reweigh(self, z: Tensor, log_w: Tensor, beta: Tensor) -> None:
        """dreg: multiply the gradient on its way from the weights through z to the encoder, and nothing else."""
        if self.estimator == "dreg" and z.requires_grad:
            factor = self.path_factor(log_w.detach(), beta).unsqueeze(-1)
            z.register_hook(lambda gradient: factor * gradient)


def dreg_factor(weights: Tensor, beta: Tensor | float = 1.0) -> Tensor:
    """Path weight over model weight of the doubly reparameterised gradient, from normalised weights w~: beta w~ + 1 - beta.

    Where -beta d log q/dphi stands under the expectation of w~, reparameterising once more turns it into
    beta (w~^2 - w~) d log w/dz dz/dphi; Tucker et al. 2019 at beta = 1.
    """
    return beta * weights + (1 - beta)


class _LogPosterior(nn.Module):
    """(x, z, y) -> log q(z|x) as one call, so that its parameters can be replaced in all of it."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: Tensor, z: Tensor, y: Tensor | None) -> Tensor:
        return self.vae.encode(x, y).log_prob(z)


class IWAE(MIWAE):
    """log 1/K sum_i w_i with K = `samples`; Burda et al. 2016, equation 8."""

    paddable = True

    def __init__(
        self,
        samples: int = 50,
        estimator: str = "reparameterised",
        beta: float = 1.0,
        schedule: nn.Module | None = None,
    ) -> None:
        super().__init__(1, samples, estimator, beta, schedule)


class CIWAE(IWAE):
    """mix ELBO + (1 - mix) IWAE, from the same K draws; Rainforth et al. 2018, section 5 (mix is their beta, 0.05).

    The ELBO is taken as the mean of log w. Raises VAEError unless 0 <= mix <= 1.
    """

    paddable = True
    mix: Tensor

    def __init__(
        self,
        samples: int = 64,
        mix: float = 0.05,
        estimator: str = "reparameterised",
        beta: float = 1.0,
        schedule: nn.Module | None = None,
    ) -> None:
        super().__init__(samples, estimator, beta, schedule)
        if not 0 <= mix <= 1:
            raise VAEError(f"objective.mix={mix}, the share of the ELBO, must lie between 0 and 1.")
        self.register_buffer("mix", torch.tensor(float(mix)))

    def bound(self, log_w: Tensor) -> Tensor:
        return self.mix * log_w.mean((0, 1)) + (1 - self.mix) * super().bound(log_w)

    def path_factor(self, log_w: Tensor, beta: Tensor) -> Tensor:
        weights = log_w.softmax(1)
        of_elbo, of_iwae = self.mix / self.samples, (1 - self.mix) * weights
        model = of_elbo + of_iwae
        path = of_elbo + of_iwae * dreg_factor(weights, beta)
        # Where the model's weight is zero no gradient arrives, whatever multiplies it.
        return path / torch.where(model > 0, model, 1.0)


class PIWAE(MIWAE):
    """The model (decoder, prior) climbs the IWAE bound of all M K draws, the encoder MIWAE(M, K).

    Rainforth et al. 2018, section 5. The loss is minus the former, which is also `iw_bound`.
    """

    unpackable = "it takes a gradient of its own within each step"

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        beta = self.weight(step)
        posterior = vae.encode(batch.x, batch.y)
        z = posterior.rsample(generator, (self.groups, self.samples))
        log_q = self.log_q(vae, batch, posterior, z)
        differentiable = torch.is_grad_enabled() and z.requires_grad
        cut = z.detach().requires_grad_(differentiable)  # the model's gradient ends here

        out = vae.measure(batch.x, posterior, cut, batch.y)
        model = Densities(-out.distortion, vae.prior.log_prob(cut), log_q.detach())
        loss = -self.bound_of_all(model.log_weights(beta)).mean()
        if differentiable:
            log_joint = model.log_likelihood + beta * model.log_prior
            log_w = as_function_of_z(log_joint, cut, z) - beta * log_q
            self.reweigh(z, log_w, beta)
            encoder_loss = -self.bound(log_w).mean()
            loss = loss + encoder_loss - encoder_loss.detach()
        bound = self.bound_of_all(model.log_weights().detach()).mean()
        return self.named_terms(loss, out, iw_bound=bound, beta=beta)

    def bound_of_all(self, log_w: Tensor) -> Tensor:
        """The IWAE bound of M K weights, (M, K, B) -> (B,)."""
        return log_mean_exp(log_w.flatten(0, 1), dim=0)


def as_function_of_z(values: Tensor, cut: Tensor, z: Tensor) -> Tensor:
    """`values` computed from `cut`, a detached copy of z, with their gradient to z and to nothing else.

    Shapes: values (...), cut and z (..., D).
    """
    (path,) = torch.autograd.grad(values.sum(), cut, retain_graph=True)
    return values.detach() + ((z - z.detach()) * path).sum(-1)
