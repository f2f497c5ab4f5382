"""q(z|x) as a diagonal Gaussian."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


def gaussian_log_prob(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log N(x; mean, exp(log_var)) of each element, in nats, with its constant."""
    return -0.5 * (LOG_2PI + log_var + (x - mean).square() * torch.exp(-log_var))


class DiagonalGaussian(NamedTuple):
    """N(mean, diag(exp(log_var))); both (..., D). A tuple, so that function transforms see through it."""

    mean: Tensor
    log_var: Tensor

    @classmethod
    def from_parameters(cls, parameters: Tensor) -> DiagonalGaussian:
        """From an encoder's output (..., 2 * D), mean and log-variance side by side."""
        return cls(*parameters.chunk(2, dim=-1))

    def rsample(self, generator: torch.Generator, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """z = mean + sigma * noise, (*sample_shape, ..., D), differentiable in both parameters.

        Kingma & Welling 2014, section 2.4. The generator lives on the parameters' device.
        """
        shape = (*sample_shape, *self.mean.shape)
        noise = torch.randn(shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.log_var) * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z), (...): summed over the D dimensions, in nats."""
        return gaussian_log_prob(z, self.mean, self.log_var).sum(-1)
