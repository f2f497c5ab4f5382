"""q(z|x) as a diagonal Gaussian."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vae.precision import full_precision, scaled_square

LOG_2PI = math.log(2 * math.pi)


def gaussian_log_prob(x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """log N(x; mean, exp(log_var)) of each element, in nats, with its constant; in float32 at least."""
    x, mean, log_var = full_precision(x), full_precision(mean), full_precision(log_var)
    return -0.5 * (LOG_2PI + log_var + scaled_square(x - mean, log_var))


class DiagonalGaussian(NamedTuple):
    """N(mean, diag(exp(log_var))); both (..., D). A tuple, so that function transforms see through it."""

    mean: Tensor
    log_var: Tensor

    @classmethod
    def from_parameters(cls, parameters: Tensor) -> DiagonalGaussian:
        """From an encoder's output (..., 2 * D), mean and log-variance side by side; in float32 at least."""
        return cls(*full_precision(parameters).chunk(2, dim=-1))

    def rsample(self, generator: torch.Generator, sample_shape: tuple[int, ...] = ()) -> Tensor:
        """z = mean + sigma * noise, (*sample_shape, ..., D), differentiable in both parameters; in float32 at least.

        Kingma & Welling 2014, section 2.4. The generator lives on the parameters' device.
        """
        mean, log_var = full_precision(self.mean), full_precision(self.log_var)
        noise = torch.randn((*sample_shape, *mean.shape), generator=generator, device=mean.device, dtype=mean.dtype)
        return mean + torch.exp(0.5 * log_var) * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z), (...): summed over the D dimensions, in nats."""
        return gaussian_log_prob(z, self.mean, self.log_var).sum(-1)
