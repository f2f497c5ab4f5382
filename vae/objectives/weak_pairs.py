"""Weak supervision: pairs of images that differ in few of their generative factors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vae.errors import VAEError
from vae.gaussian import DiagonalGaussian
from vae.kl import kl_gaussian
from vae.model import VAE
from vae.objectives.elbo import Objective, require_gaussian_posterior

if TYPE_CHECKING:
    from vae.data.images import Batch
    from vae.data.module import ImageDataModule


def share_dimensions(a: DiagonalGaussian, b: DiagonalGaussian) -> tuple[DiagonalGaussian, DiagonalGaussian, Tensor]:
    """Both posteriors of each pair with the dimensions that did not change averaged, and where those are, (B, D).

    A dimension counts as unchanged where KL(a_j || b_j) lies below the middle between the pair's largest and smallest.
    The average has the mean of both means and of both variances (Hosoya 2019's GVAE); Locatello et al. 2020, section 4.
    """
    kl = kl_gaussian(p_mean=a.mean, p_log_var=a.log_var, q_mean=b.mean, q_log_var=b.log_var)
    threshold = (kl.amax(-1, keepdim=True) + kl.amin(-1, keepdim=True)) / 2
    shared = kl < threshold
    average = DiagonalGaussian((a.mean + b.mean) / 2, torch.logaddexp(a.log_var, b.log_var) - math.log(2))
    of_a, of_b = (DiagonalGaussian(*map(torch.where, (shared, shared), average, q)) for q in (a, b))
    return of_a, of_b, shared


class AdaGVAE(Objective):
    """distortion + beta rate of both images of a pair, their unchanged latents averaged; Locatello et al. 2020.

    The data makes the pairs: `changed_factors` = k of the factors of each image take another value, or "random", k drawn
    afresh for each pair from 1 to one less than there are; which ones, the model does not know. Elbo, distortion and rate
    are means over both images of a pair, with the averaged posteriors. The term `shared` is how many latents were.
    Needs data with factors and a diagonal Gaussian posterior.
    """

    unpackable = None

    def __init__(self, changed_factors: int | str = 1, beta: float = 1.0, schedule: nn.Module | None = None) -> None:
        super().__init__(beta, schedule)
        self.changed_factors = changed_factors

    def setup(self, vae: VAE, data: ImageDataModule) -> None:
        data.add_partners(self.changed_factors)
        require_gaussian_posterior(self, vae, data)

    def forward(self, vae: VAE, batch: Batch, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        if batch.partner is None:
            raise VAEError("AdaGVAE needs a partner for every image: a data module with add_partners() makes them.")
        x = torch.cat([batch.x, batch.partner])
        mean, log_var = vae.encode(x)
        pair = zip(mean.chunk(2), log_var.chunk(2), strict=True)
        a, b, shared = share_dimensions(*(DiagonalGaussian(*q) for q in pair))
        posterior = DiagonalGaussian(*map(torch.cat, zip(a, b, strict=True)))
        out = vae.measure(x, posterior, posterior.rsample(generator))
        weight = self.weight(step)
        loss = out.mean_distortion + weight * out.mean_rate
        return self.named_terms(loss, out, shared=shared.sum(-1).to(loss).mean(), beta=weight)
