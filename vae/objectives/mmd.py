"""Objectives that compare the aggregate posterior with the prior by maximum mean discrepancy (Gretton et al. 2012)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vae.errors import VAEError, choose
from vae.model import VAE, VAEOutput
from vae.objectives.elbo import Objective, require_not_negative, require_something_to_steer

if TYPE_CHECKING:
    from vae.data.images import Batch

# --- kernels: squared distances (...), bandwidth in the same unit -> (...) in (0, 1], 1 at distance zero ----------------


def rbf(squares: Tensor, bandwidth: float | Tensor) -> Tensor:
    """exp(-d^2 / bandwidth): a Gaussian of variance bandwidth / 2."""
    return torch.exp(-squares / bandwidth)


def imq(squares: Tensor, bandwidth: float | Tensor) -> Tensor:
    """bandwidth / (bandwidth + d^2), the inverse multiquadratic, whose tail still feels a far outlier."""
    return bandwidth / (bandwidth + squares)


KERNELS: dict[str, Callable[[Tensor, float | Tensor], Tensor]] = {"rbf": rbf, "imq": imq}


def squared_mmd(
    a: Tensor, b: Tensor, kernel: Callable[[Tensor, float | Tensor], Tensor], bandwidth: float | Tensor, unbiased: bool
) -> Tensor:
    """MMD^2 of the distributions that a (N, D) and b (M, D) were drawn from, 0-dim.

    E k(a, a') + E k(b, b') - 2 E k(a, b). unbiased: pairs of a draw with itself are left out (Gretton et al. 2012,
    equation 3), which may come out negative; otherwise they are kept (equation 5), which may not, and is too large by
    (1 - E k) / N for each side. A single draw has no other pair and keeps its own.
    """

    def mean_kernel(u: Tensor, v: Tensor) -> Tensor:
        return kernel((u[:, None] - v[None]).square().sum(-1), bandwidth)

    def within(u: Tensor) -> Tensor:
        k, n = mean_kernel(u, u), len(u)
        return (k.sum() - k.diagonal().sum()) / (n * (n - 1)) if unbiased and n > 1 else k.mean()

    return within(a) + within(b) - 2 * mean_kernel(a, b).mean()


# --- objectives -------------------------------------------------------------------------------------------------------


class InfoVAE(Objective):
    """distortion + (1 - alpha) rate + (alpha + lambda_mmd - 1) MMD^2(q(z), p(z)); Zhao et al. 2019.

    alpha = 1 is the MMD-VAE, in which no image's posterior is held to the prior; lambda_mmd = 1 - alpha the beta-VAE.
    The schedule multiplies the weight on the rate.

    kernel: "rbf" or "imq"; bandwidth: what squared distances are compared with, None for 2 latent_dim, the mean squared
    distance of two draws of N(0, I). unbiased: see `squared_mmd`; outside training the unbiased estimate is always taken,
    for the other depends on the batch size. As many draws of the prior as images in the batch; any prior and posterior
    will do. Raises VAEError for a kernel that is unknown, options out of range, or a feedback controller at alpha = 1,
    where the rate that it steers by has no weight.
    """

    of_whole_batches = True
    unpackable = None
    alpha: Tensor
    lambda_mmd: Tensor

    def __init__(
        self,
        alpha: float = 0.0,
        lambda_mmd: float = 1000.0,
        kernel: str = "rbf",
        bandwidth: float | None = None,
        unbiased: bool = False,
        schedule: nn.Module | None = None,
    ) -> None:
        super().__init__(schedule=schedule)
        require_not_negative("objective", lambda_mmd=lambda_mmd)
        if not alpha <= 1 or not alpha + lambda_mmd >= 1:
            raise VAEError(
                f"InfoVAE weighs the rate by 1 - alpha and the MMD by alpha + lambda_mmd - 1, which must not be negative "
                f"as with objective.alpha={alpha} and objective.lambda_mmd={lambda_mmd}."
            )
        choose("objective.kernel", kernel, KERNELS)
        if bandwidth is not None and not bandwidth > 0:
            raise VAEError(
                f"objective.bandwidth={bandwidth} must be positive, or null for twice the latent dimensions."
            )
        require_something_to_steer(self.schedule, 1 - alpha, "objective.alpha=1")
        self.register_buffer("alpha", torch.tensor(float(alpha)))
        self.register_buffer("lambda_mmd", torch.tensor(float(lambda_mmd)))
        self.kernel, self.bandwidth, self.unbiased = KERNELS[kernel], bandwidth, unbiased

    def mmd(self, vae: VAE, z: Tensor, generator: torch.Generator) -> Tensor:
        """MMD^2 of codes z (B, D) and as many draws of the prior, 0-dim."""
        bandwidth = 2 * z.shape[-1] if self.bandwidth is None else self.bandwidth
        unbiased = self.unbiased or not self.training
        return squared_mmd(z, vae.prior.sample(len(z), generator), self.kernel, bandwidth, unbiased)

    def encode_and_decode(self, vae: VAE, batch: Batch, generator: torch.Generator) -> VAEOutput:
        """The pass that distortion and MMD are taken of."""
        return vae(batch.x, generator, batch.y)

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        out = self.encode_and_decode(vae, batch, generator)
        mmd = self.mmd(vae, out.z, generator)
        weight = (1 - self.alpha) * self.multiplier(step)
        loss = out.mean_distortion + weight * out.mean_rate + (self.alpha + self.lambda_mmd - 1) * mmd
        return self.named_terms(loss, out, mmd=mmd.detach(), beta=weight)


class WAE(InfoVAE):
    """distortion + lambda_mmd MMD^2(q(z), p(z)): the WAE-MMD of Tolstikhin et al. 2018, algorithm 2.

    Theirs has an IMQ kernel of bandwidth 2 latent_dim, the unbiased estimate, lambda 10 beside a squared error, which is
    the distortion of a Gaussian likelihood of sigma = sqrt(1/2), and a deterministic encoder. With `deterministic`, z is
    the posterior's mean and its variance is never trained: rate and ELBO are then logged, but mean nothing. Without, z
    is drawn, and this is the InfoVAE at alpha = 1.
    """

    def __init__(
        self,
        lambda_mmd: float = 10.0,
        kernel: str = "imq",
        bandwidth: float | None = None,
        unbiased: bool = True,
        deterministic: bool = False,
    ) -> None:
        super().__init__(1.0, lambda_mmd, kernel, bandwidth, unbiased)
        self.deterministic = deterministic

    def encode_and_decode(self, vae: VAE, batch: Batch, generator: torch.Generator) -> VAEOutput:
        if not self.deterministic:
            return super().encode_and_decode(vae, batch, generator)
        posterior = vae.encode(batch.x, batch.y)
        return vae.measure(batch.x, posterior, posterior.mean, batch.y)
