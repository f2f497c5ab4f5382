"""Data of one's own, as a user's function would give it: named in `data.source._target_`."""

import torch

from vae.data.images import Images, Splits
from vae.seeding import generator


def images(channels: int = 1, size: int = 8, floats: bool = False) -> Splits:
    """64 / 32 / 32 random images with labels 0, 1, 2, 0, ..."""
    noise = generator("own")

    def split(n: int) -> Images:
        x = torch.rand(n, channels, size, size, generator=noise)
        return Images(x if floats else (255 * x).to(torch.uint8), torch.arange(n) % 3)

    return Splits(split(64), split(32), split(32))
