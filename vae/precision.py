"""The widest floating point numbers that a device has."""

from __future__ import annotations

import torch
from torch import Tensor


def widest(device: torch.device) -> torch.dtype:
    """float64, but on Apple's MPS, which has none, float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(x: Tensor) -> Tensor:
    """x in these numbers: for sums over many images, and for products that cancel."""
    return x.to(widest(x.device))
