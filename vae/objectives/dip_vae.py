"""Objectives that hold the covariance of the aggregate posterior to the identity (Kumar et al. 2018)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vae.gaussian import DiagonalGaussian
from vae.model import VAE
from vae.objectives.elbo import Objective, require_gaussian_posterior, require_not_negative

if TYPE_CHECKING:
    from vae.data.images import Batch
    from vae.data.module import ImageDataModule


def covariance(values: Tensor) -> Tensor:
    """Covariance of a batch (B, D) -> (D, D), divided by B: that of one value is zero, not undefined.

    Never in a narrower type than `values` have, as a product of matrices otherwise is under autocast.
    """
    centred = values - values.mean(0)
    with torch.autocast(values.device.type, enabled=False):
        return centred.T @ centred / len(values)


class DIPVAEI(Objective):
    """distortion + beta rate + lambda_od sum_{i != j} C_ij^2 + lambda_d sum_i (C_ii - 1)^2, C = Cov[E q(z|x)].

    Kumar et al. 2018, equation 6, with C of the batch. lambda_d: None is 10 lambda_od, as Locatello et al. 2019 set it.
    Needs a diagonal Gaussian posterior. Terms: off_diagonal and diagonal, both sums of squares, without their lambda.
    """

    lambda_od: Tensor
    lambda_d: Tensor

    #: lambda_d over lambda_od where it is not given
    ratio = 10.0
    of_whole_batches = True
    unpackable = None

    def __init__(
        self,
        lambda_od: float = 10.0,
        lambda_d: float | None = None,
        beta: float = 1.0,
        schedule: nn.Module | None = None,
    ) -> None:
        super().__init__(beta, schedule)
        lambda_d = self.ratio * lambda_od if lambda_d is None else lambda_d
        require_not_negative("objective", lambda_od=lambda_od, lambda_d=lambda_d)
        self.register_buffer("lambda_od", torch.tensor(float(lambda_od)))
        self.register_buffer("lambda_d", torch.tensor(float(lambda_d)))

    def setup(self, vae: VAE, data: ImageDataModule) -> None:
        require_gaussian_posterior(self, vae, data)

    def covariance(self, posterior: DiagonalGaussian) -> Tensor:
        """What is held to the identity, (D, D)."""
        return covariance(posterior.mean)

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        out = vae(batch.x, generator, batch.y)
        weight = self.weight(step)
        c = self.covariance(out.posterior)
        variances = c.diagonal()
        diagonal = (variances - 1).square().sum()
        off_diagonal = (c - torch.diag(variances)).square().sum()
        regulariser = self.lambda_od * off_diagonal + self.lambda_d * diagonal
        return self.named_terms(
            out.mean_distortion + weight * out.mean_rate + regulariser,
            out,
            off_diagonal=off_diagonal.detach(),
            diagonal=diagonal.detach(),
            beta=weight,
        )


class DIPVAEII(DIPVAEI):
    """The same with C = Cov[E q(z|x)] + E[Cov q(z|x)], the covariance of q(z); Kumar et al. 2018, equation 7.

    lambda_d: None is lambda_od.
    """

    ratio = 1.0
    paddable = True  # the variance that is held to 1 is 1 there

    def covariance(self, posterior: DiagonalGaussian) -> Tensor:
        return covariance(posterior.mean) + torch.diag(posterior.log_var.exp().mean(0))
