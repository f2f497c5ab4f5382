"""A linear-Gaussian VAE whose posterior and likelihood are known exactly: the case that every estimator is held to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vae import networks
from vae.data.images import Batch
from vae.likelihoods import Gaussian
from vae.model import VAE
from vae.priors import StandardNormal
from vae.seeding import derive, generator


class Encoder(nn.Module):
    def __init__(self, weight: Tensor, centre: Tensor, log_var: Tensor) -> None:
        super().__init__()
        self.weight, self.log_var = nn.Parameter(weight), nn.Parameter(log_var)
        self.register_buffer("centre", centre)

    def forward(self, x: Tensor) -> Tensor:
        mean = (x.flatten(1) - self.centre) @ self.weight.T
        return torch.cat([mean, self.log_var.expand_as(mean)], -1)


class Decoder(networks.Decoder):
    def __init__(self, weight: Tensor, bias: Tensor, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight, self.bias, self.image_shape = nn.Parameter(weight), nn.Parameter(bias), shape

    def forward(self, z: Tensor) -> Tensor:
        return (z @ self.weight.T + self.bias).unflatten(-1, (1, *self.image_shape))


class LinearGaussian:
    """x ~ N(W z + m, s I), W with orthogonal columns, so that the exact posterior is diagonal."""

    def __init__(self, shape=(1, 3, 4), latent_dim: int = 3, variance: float = 0.25, dtype=torch.float64) -> None:
        noise = generator("linear-gaussian")
        n = shape[0] * shape[1] * shape[2]
        orthogonal = torch.linalg.qr(torch.randn(n, latent_dim, generator=noise, dtype=torch.float64)).Q
        self.shape, self.latent_dim, self.variance = shape, latent_dim, variance
        self.weight = (orthogonal * torch.linspace(2.0, 0.7, latent_dim)).to(dtype)
        self.mean = torch.rand(n, generator=noise, dtype=torch.float64).to(dtype)
        self.precision = self.weight.square().sum(0) / variance + 1  # of the posterior, each dimension

    def vae(self, shift: float = 0.0, stretch: float = 1.0) -> VAE:
        """The model with its exact posterior, or with one moved by `shift` and its sigma multiplied by `stretch`."""
        encoder = Encoder(
            self.weight.T / self.variance / self.precision[:, None],
            self.mean.clone(),
            -self.precision.log() + 2 * torch.tensor(stretch).log(),
        )
        encoder.centre = self.mean - shift * self.weight.sum(1)
        decoder = Decoder(self.weight.clone(), self.mean.clone(), self.shape)
        vae = VAE(encoder, decoder, StandardNormal(self.latent_dim), Gaussian(sigma=self.variance**0.5))
        return vae.to(self.weight.dtype)

    def batch(self, n: int) -> Batch:
        noise = generator("linear-gaussian data", n)
        dtype = self.weight.dtype
        z = torch.randn(n, self.latent_dim, generator=noise, dtype=dtype)
        x = z @ self.weight.T + self.mean
        x = x + self.variance**0.5 * torch.randn(x.shape, generator=noise, dtype=dtype)
        return Batch(x.unflatten(-1, self.shape), None, derive("linear-gaussian batch", n))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of each image, exactly."""
        covariance = self.weight @ self.weight.T + self.variance * torch.eye(len(self.mean), dtype=self.weight.dtype)
        return torch.distributions.MultivariateNormal(self.mean, covariance).log_prob(x.flatten(1))
