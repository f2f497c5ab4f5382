"""p(z): what the aggregate posterior is held to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vae.gaussian import LOG_2PI, DiagonalGaussian
from vae.kl import gaussian_kl_to_standard_normal


class StandardNormal(nn.Module):
    """N(0, I), with its KL in closed form (Kingma & Welling 2014, appendix B)."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("origin", torch.zeros(()), persistent=False)  # knows the device and dtype

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z), (..., D) -> (...), in nats."""
        return -0.5 * (z.square() + LOG_2PI).sum(-1)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, D)."""
        shape = (n, self.latent_dim)
        return torch.randn(shape, generator=generator, device=self.origin.device, dtype=self.origin.dtype)

    def kl(self, posterior: DiagonalGaussian) -> Tensor:
        """KL(q(z|x) || p(z)) of each dimension, (..., D), in nats."""
        return gaussian_kl_to_standard_normal(posterior.mean, posterior.log_var)
