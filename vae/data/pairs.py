"""Pairs of images that differ in few of their generative factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vae.data.images import ImageSet
from vae.errors import VAEError

Partners = Callable[[Any, torch.Generator], Tensor]


def change_factors(factors: Tensor, sizes: Tensor, changed: int | str, generator: torch.Generator) -> Tensor:
    """Factors (B, F) of which `changed`, drawn at random for each row, take another value, uniform among the others.

    sizes (F,): how many values each has; one with a single value never changes. changed: how many, or "random" for
    1, 2, ... up to one less than can, equally likely. Locatello et al. 2020, section 5.
    """
    can_change = sizes > 1
    if changed == "random":
        count = torch.randint(1, int(can_change.sum()), (len(factors), 1), generator=generator)
    else:
        count = torch.tensor(changed)
    lottery = torch.rand(factors.shape, generator=generator).masked_fill(~can_change, 2.0)
    chosen = lottery.argsort(-1).argsort(-1) < count
    # a shift by 1 .. size - 1 reaches each other value, and none twice
    shift = 1 + (torch.rand(factors.shape, generator=generator, dtype=torch.float64) * (sizes - 1)).long()
    return torch.where(chosen, (factors + shift) % sizes, factors)


def partners_of(images: ImageSet, changed: int | str) -> Partners:
    """A function (factors (B, F), generator) -> partners' images uint8 (B, C, H, W), for a split of a `FactorGrid`.

    Raises VAEError if the images have no such grid, or `changed` leaves nothing the same or nothing to change.
    """
    grid = images.grid
    if grid is None:
        raise VAEError("Pairs of images need data with known factors: use data=sprites or dsprites.")
    sizes = torch.tensor(grid.factor_sizes)
    varying = int((sizes > 1).sum())
    if varying < 2 or not (changed == "random" or (isinstance(changed, int) and 1 <= changed < varying)):
        raise VAEError(
            f"objective.changed_factors={changed} must be `random`, or at least 1 and fewer than the factors that vary, "
            f"{varying}."
        )
    return lambda factors, generator: grid.images(change_factors(factors, sizes, changed, generator))
