"""Images held in memory as uint8 and gathered by batch: the one form that every data set takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class ImageSet(Protocol):
    """A split of a data set, addressed by index.

    `shape` is (C, H, W); `gather(index (B,)) -> (x uint8 (B, C, H, W), y int64 (B, ...) or None)`, where y is a class
    label (B,) or, for data with known generative factors, their class indices (B, F).
    """

    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor | None]: ...


@dataclass
class Images:
    """A split held whole in memory: x uint8 (N, C, H, W), y int64 (N, ...) or None."""

    x: Tensor
    y: Tensor | None = None
    shape: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        if self.x.dtype != torch.uint8 or self.x.ndim != 4:
            raise TypeError(f"images are uint8 (N, C, H, W), not {self.x.dtype} {tuple(self.x.shape)}")
        self.shape = tuple(self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        # index_select is an order of magnitude faster than x[index] for small images
        return self.x.index_select(0, index), None if self.y is None else self.y.index_select(0, index)

    def subset(self, index: Tensor) -> Images:
        return Images(*self.gather(index))


class Splits(NamedTuple):
    """Train, validation and test; fixed by seed, so that every run of a sweep sees the same ones."""

    train: ImageSet
    val: ImageSet
    test: ImageSet


class Batch(NamedTuple):
    """x: uint8 (B, C, H, W) as loaded, float in [0, 1] once prepared; y: int64 (B, ...) or None; seed: of every draw;
    partner: like x, images that share most of their factors with those of x, where an objective asked for them."""

    x: Tensor
    y: Tensor | None
    seed: int
    partner: Tensor | None = None
