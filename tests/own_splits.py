"""Splits that no number confuses: training and test images are dark, validation images bright, or whatever is asked."""

from __future__ import annotations

import torch

from vae.data.images import Images, Splits
from vae.seeding import generator

SHADES = {"dark": 0.1, "grey": 0.5, "bright": 0.9}


def images(shade: str, n: int, seed: int = 0) -> Images:
    """n images of 4 x 4 black and white pixels, of which so many are white; y is all 0."""
    white = torch.rand(n, 1, 4, 4, generator=generator(seed, shade)) < SHADES[shade]
    return Images(white.to(torch.uint8) * 255, torch.zeros(n, dtype=torch.long))


def splits(train: str = "dark", val: str = "bright", test: str = "dark", n: int = 64) -> Splits:
    return Splits(images(train, n, 0), images(val, n // 2, 1), images(test, n // 2, 2))
