"""Objectives that single out the total correlation of the aggregate posterior q(z) = 1/N sum_n q(z|x_n).

The rate splits into three (Hoffman & Johnson 2016; Chen et al. 2018, equation 2), for any prior that factorises:

    E KL(q(z|x) || p(z)) =  KL(q(z, n) || q(z) p(n))    index-code mutual information
                          + KL(q(z) || prod_j q(z_j))   total correlation
                          + sum_j KL(q(z_j) || p(z_j))  dimension-wise KL

beta-TC-VAE estimates log q(z) from the batch, FactorVAE the density ratio q(z) / prod_j q(z_j) by a discriminator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.errors import VAEError, choose
from vae.gaussian import DiagonalGaussian, gaussian_log_prob
from vae.model import VAE
from vae.objectives.elbo import Objective, require_gaussian_posterior, require_kl_per_dimension, require_not_negative
from vae.precision import full_precision

if TYPE_CHECKING:
    from vae.data.images import Batch
    from vae.data.module import ImageDataModule

# --- the aggregate posterior from a minibatch -------------------------------------------------------------------------

SAMPLINGS = ("weighted", "stratified")


class LogDensities(NamedTuple):
    """log q(z|x), log q(z) and log prod_j q(z_j) of each z, (B,), in nats."""

    conditional: Tensor
    aggregate: Tensor
    marginals: Tensor

    @property
    def mutual_information(self) -> Tensor:
        """Mean of log q(z|x) - log q(z), 0-dim."""
        return (self.conditional - self.aggregate).mean()

    @property
    def total_correlation(self) -> Tensor:
        """Mean of log q(z) - log prod_j q(z_j), 0-dim."""
        return (self.aggregate - self.marginals).mean()


def log_densities(log_q: Tensor, log_importance: Tensor) -> LogDensities:
    """The three log-densities of z_n ~ q(z|x_n), with q(z) = sum_m importance[n, m] q(z|x_m).

    log_q: log q(z_n, j | x_m), (z_n, x_m, D), from `pairwise_log_prob`; log_importance: (B, B) of row z_n and column x_m,
    from `log_importance_weights`. It enters once into log q(z) and once into each log q(z_j), and never a dimension at a
    time into what is then summed over dimensions.
    """
    joint = log_q.sum(-1)
    aggregate = (joint + log_importance).logsumexp(1)
    marginals = (log_q + log_importance.unsqueeze(-1)).logsumexp(1).sum(-1)
    return LogDensities(joint.diagonal(), aggregate, marginals)


def pairwise_log_prob(posterior: DiagonalGaussian, z: Tensor) -> Tensor:
    """log q(z_n, j | x_m) in nats: posterior of x_m and z_n, both (B, D) -> (z_n, x_m, D)."""
    return gaussian_log_prob(z[:, None], posterior.mean[None], posterior.log_var[None])


def log_importance_weights(
    batch_size: int, dataset_size: int, sampling: str, device: torch.device | None = None
) -> Tensor:
    """Log-weights (B, B) with which the posteriors of a batch of B estimate q(z) at each other's z; N = dataset_size.

    weighted (Chen et al. 2018, equation 3): the mean over the batch, 1 / B everywhere. Theirs is 1 / (N B), whose logs
    are lower by log N: a constant that no gradient sees, left out so that the loss stays on the ELBO's scale. Of the
    mean, z's own image has 1/B, of q(z) only 1/N.

    stratified (Chen et al. 2018, appendix C): 1/N for z's own image, on the diagonal, and the rest, 1 - 1/N, for the
    others. They give (N - B + 1) / (N (B - 1)) to one of the others and 1 / (B - 1) to the rest; averaged over which
    one that is, each has (N - 1) / (N (B - 1)). So it is as unbiased, of less variance, and exact at B = N. A batch of one
    has no others: its own weight is 1.
    """
    if sampling == "weighted" or batch_size == 1:
        return torch.full((batch_size, batch_size), -math.log(batch_size), device=device)
    others = math.log((dataset_size - 1) / (dataset_size * (batch_size - 1))) if dataset_size > 1 else -math.inf
    return torch.full((batch_size, batch_size), others, device=device).fill_diagonal_(-math.log(dataset_size))


class BetaTCVAE(Objective):
    """distortion + alpha MI + beta TC + gamma DW, the three parts of the rate; Chen et al. 2018, equation 4.

    Computed as distortion + gamma rate + (alpha - gamma) MI + (beta - gamma) TC with the rate in closed form, which has
    the same mean and less variance, and is the VAE exactly at alpha = beta = gamma = 1 (Locatello et al. 2019: gamma = 1
    and alpha = 1). The schedule multiplies all three weights.

    sampling: "weighted" or "stratified", see `log_importance_weights`; dataset_size: N, by default the number of training
    images. Needs a diagonal Gaussian
    posterior and a prior that factorises.

    Terms: mutual_information, total_correlation, dimension_wise_kl, which add up to the rate; by stratified weights
    whatever the loss has, since in a small batch weighted ones find hardly any information or correlation.
    """

    of_whole_batches = True
    unpackable = None
    paddable = True  # the weights of a row add up to 1, so that what such a dimension adds to each density cancels
    alpha: Tensor
    gamma: Tensor

    def __init__(
        self,
        dataset_size: int | None = None,
        beta: float = 6.0,
        alpha: float = 1.0,
        gamma: float = 1.0,
        sampling: str = "weighted",
        schedule: nn.Module | None = None,
    ) -> None:
        super().__init__(beta, schedule)
        require_not_negative("objective", alpha=alpha, gamma=gamma)
        choose("objective.sampling", sampling, SAMPLINGS)
        if dataset_size is not None and dataset_size < 1:
            raise VAEError(f"objective.dataset_size={dataset_size} must be at least 1.")
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("gamma", torch.tensor(float(gamma)))
        self.dataset_size, self.sampling = dataset_size, sampling

    def setup(self, vae: VAE, data: ImageDataModule) -> None:
        require_gaussian_posterior(self, vae, data)
        require_kl_per_dimension(self, vae, data)
        if self.dataset_size is None:
            self.dataset_size = len(data.splits_ready().train)

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        out = vae(batch.x, generator, batch.y)
        log_q = pairwise_log_prob(out.posterior, out.z)
        parts = self.parts(log_q, self.sampling)
        penalty = (
            self.gamma * out.mean_rate
            + (self.alpha - self.gamma) * parts.mutual_information
            + (self.beta - self.gamma) * parts.total_correlation
        )
        loss = out.mean_distortion + self.multiplier(step) * penalty

        shown = self.parts(log_q.detach(), "stratified")
        terms = self.named_terms(
            loss,
            out,
            mutual_information=shown.mutual_information,
            total_correlation=shown.total_correlation,
            beta=self.weight(step),
        )
        return {**terms, "dimension_wise_kl": terms["rate"] - shown.mutual_information - shown.total_correlation}

    def parts(self, log_q: Tensor, sampling: str) -> LogDensities:
        """What mutual information and total correlation are the means of, estimated with these importance weights."""
        assert self.dataset_size is not None, "setup() comes first"
        weights = log_importance_weights(len(log_q), self.dataset_size, sampling, log_q.device)
        return log_densities(log_q, weights)


# --- the density ratio ------------------------------------------------------------------------------------------------


def permute_dimensions(z: Tensor, generator: torch.Generator) -> Tensor:
    """Each latent dimension of z (B, D) shuffled over the batch by itself: draws of prod_j q(z_j).

    Kim & Mnih 2018, algorithm 1.
    """
    order = torch.rand(z.shape, generator=generator, device=z.device).argsort(0)
    return z.gather(0, order)


def discriminator(latent_dim: int, hidden: Sequence[int]) -> nn.Sequential:
    """z (B, D) -> the logit that it was drawn from q(z), not from prod_j q(z_j), (B, 1); leaky ReLU of slope 0.2."""
    sizes = (latent_dim, *hidden)
    layers = [layer for fan in pairwise(sizes) for layer in (nn.Linear(*fan), nn.LeakyReLU(0.2))]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 1))


class FactorVAE(Objective):
    """distortion + beta rate + gamma TC, with TC the mean logit of a discriminator; Kim & Mnih 2018, equation 2.

    A discriminator that tells q(z) from prod_j q(z_j) perfectly well has the log-ratio of both as its logit, whose mean
    under q(z) is TC. One backward pass trains both: the VAE's loss sees the discriminator's parameters detached, the
    discriminator's cross-entropy sees z detached. The second is logged as `discriminator_loss` (log 2 when it cannot
    tell) and its value is left out of "loss", which is the VAE's alone. That holds the TC that the discriminator of the
    moment sees, so that it moves (`loss_moves`) and the last weights are tested.

    separate_batches: the paper draws a second batch for the permuted codes; here the first half of each batch makes the
    real codes and the second half the permuted ones, while all of it trains the VAE. False permutes the same codes, as
    Locatello et al. 2019 do; so does a batch of one. The discriminator has an optimiser's options of its own (Adam
    1e-4, betas 0.5, 0.9) and any prior and posterior will do.
    """

    loss_moves = "the discriminator that judges the total correlation is another each epoch"
    of_whole_batches = True  # of few codes, permuted ones are hardly told from real ones
    unpackable = "its discriminator has an optimiser's options of its own"
    gamma: Tensor

    def __init__(
        self,
        gamma: float = 35.0,
        beta: float = 1.0,
        hidden: Sequence[int] = (1000,) * 6,
        discriminator_lr: float = 1e-4,
        discriminator_betas: Sequence[float] = (0.5, 0.9),
        separate_batches: bool = True,
        schedule: nn.Module | None = None,
    ) -> None:
        super().__init__(beta, schedule)
        require_not_negative("objective", gamma=gamma)
        self.register_buffer("gamma", torch.tensor(float(gamma)))
        self.hidden = tuple(hidden)
        self.optimizer_options = {"lr": discriminator_lr, "betas": tuple(discriminator_betas)}
        self.separate_batches = separate_batches

    def setup(self, vae: VAE, data: ImageDataModule | None = None) -> None:
        self.discriminator = discriminator(vae.latent_dim, self.hidden)

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        out = vae(batch.x, generator, batch.y)
        weight = self.weight(step)

        fixed = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        total_correlation = full_precision(torch.func.functional_call(self.discriminator, fixed, out.z)).mean()
        loss = out.mean_distortion + weight * out.mean_rate + self.gamma * total_correlation

        own = self.discriminator_loss(out.z.detach(), generator)
        return self.named_terms(
            loss + own - own.detach(),
            out,
            total_correlation=total_correlation.detach(),
            discriminator_loss=own.detach(),
            beta=weight,
        )

    def discriminator_loss(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Cross-entropy in nats, 0-dim, of telling codes z (B, D) from permuted ones, half of each."""
        real, other = z.tensor_split(2) if self.separate_batches and len(z) > 1 else (z, z)
        of_real = F.softplus(-full_precision(self.discriminator(real))).mean()
        of_permuted = F.softplus(full_precision(self.discriminator(permute_dimensions(other, generator)))).mean()
        return 0.5 * (of_real + of_permuted)
