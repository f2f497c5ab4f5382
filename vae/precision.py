"""In which floating point numbers things are computed: float32 at least, the widest for sums, and squares out of range."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def widest(device: torch.device) -> torch.dtype:
    """float64, but on Apple's MPS, which has none, float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """x in these numbers: for sums over many images, and for products that cancel."""
    return x.to(widest(x.device))


def full_precision(t: Tensor) -> Tensor:
    """float16 and bfloat16 as float32, anything wider as it is: what densities and their parameters are computed in."""
    if t.dtype is torch.float32:  # by far the most often, and asked several times a step
        return t
    return t.to(torch.promote_types(t.dtype, torch.float32))


def scaled_square(difference: Tensor, log_var: Tensor) -> Tensor:
    """difference^2 exp(-log_var), elementwise, where the exponential overflows and the square underflows too.

    Where a variance is out of the exponential's range, all of it is taken to the difference, in two steps, before that is
    squared; elsewhere the difference is multiplied by exactly 1. The product does not depend on `shift`, so no gradient
    passes through that. A difference of 0 gives 0 at every finite log-variance.
    """
    limit = 0.9 * math.log(torch.finfo(log_var.dtype).max)  # 80 in float32, 639 in float64
    shift = torch.where(log_var.abs() <= limit, 0.0, -log_var).detach()
    step = torch.exp((0.25 * shift).clamp(max=limit))
    return (difference * step * step).square() * torch.exp(-(log_var + shift))
