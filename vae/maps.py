"""Maps (..., h, w) turned, shrunk and taken apart by frequency: what images and latents that are maps have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.precision import wide


def quarter_turn(t: Tensor, times: int = 1) -> Tensor:
    """(..., h, w) turned by 90 degrees, so many times."""
    return t.rot90(times, (-2, -1))


def shrunk(t: Tensor, factor: int) -> Tensor:
    """(N, C, H, W) -> (N, C, H / factor, W / factor), means of factor x factor."""
    return F.avg_pool2d(t, factor)


def halved(t: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H / 2, W / 2), means of 2 x 2."""
    return shrunk(t, 2)


def power_by_frequency(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean power of each map (..., h, w) at each whole spatial frequency, (..., K), and how many frequencies are there, (K,).

    |FFT|^2 / (h w), averaged over the frequencies whose distance from 0, in cycles per map's shorter side, rounds to k.
    Parseval: the sum of count times power is the sum over places of the square.
    """
    height, width = maps.shape[-2:]
    with torch.autocast(maps.device.type, enabled=False):  # a product of matrices would be narrow
        power = torch.fft.fft2(maps).abs().square() / (height * width)
        rows, columns = (torch.fft.fftfreq(side, dtype=power.dtype, device=power.device) for side in (height, width))
        radius = (rows[:, None].square() + columns.square()).sqrt() * min(height, width)
        at = F.one_hot(radius.round().long().flatten())
        counts = at.sum(0)
        return power.flatten(-2) @ (at / counts.clamp(min=1)).to(power), counts


def radial_power_spectrum(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean power at each whole spatial frequency of maps (N, c, h, w), and how many frequencies there are at each, (K,).

    `power_by_frequency` of each channel less its mean over images and places, averaged over images and channels. White noise
    has the same power at all.
    """
    maps = wide(maps)
    power, counts = power_by_frequency(maps - maps.mean((0, 2, 3), keepdim=True))
    return power.mean((0, 1)), counts
