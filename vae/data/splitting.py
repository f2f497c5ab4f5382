"""Which images of one's own go into which split, and a warning of those that are in two."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from vae.data.images import Splits
from vae.data.sources import stratified
from vae.errors import VAEError
from vae.seeding import generator


def split_rows(
    given: Mapping[str, Tensor], y: Tensor | None, val_size: int | None, test_size: int | None, seed: int
) -> dict[str, Tensor]:
    """Rows of train, val and test: as given, or held out of `given["train"]`, each class of y (N,) with its share.

    A tenth is held out, and at most 10,000, unless a size is given. Each split lies in one fixed random order, so that its
    first n images are a fair sample. Raises VAEError where nothing can be held out, or a size is given for a split that
    is there.
    """
    train = given["train"]
    sizes = {}
    for name, size in (("test", test_size), ("val", val_size)):
        if name in given and size is not None:
            raise VAEError(f"data.source.{name}_size={size} has no effect: the data has a {name} split of its own.")
        if name not in given:
            sizes[name] = min(10_000, max(1, len(train) // 10)) if size is None else size
    rows = dict(given)
    if sizes:
        if any(not isinstance(size, int) or size < 1 for size in sizes.values()) or sum(sizes.values()) >= len(train):
            wanted = " and ".join(f"{size} for {name}" for name, size in sizes.items())
            raise VAEError(f"The data has too few images to train on, {len(train)}, for {wanted} to be held out.")
        of_train = torch.zeros(len(train)) if y is None else y[train]
        rest, *parts = stratified(of_train, list(sizes.values()), seed)
        rows |= {"train": train[rest]} | {name: train[part] for name, part in zip(sizes, parts, strict=True)}
    return {
        name: rows[name][torch.randperm(len(rows[name]), generator=generator(seed, "order", name))]
        for name in Splits._fields
    }


def warn_of_duplicates(hashes: Mapping[str, np.ndarray], name: Callable[[str, int], str]) -> None:
    """Warns of images that are in two splits. hashes: of the images of each split; name(split, i): of the i-th of them."""
    found = []
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        twice, first, second = np.intersect1d(hashes[a], hashes[b], return_indices=True)
        if len(twice):
            found.append(f"{len(twice)} of {a} and {b}, such as {name(a, int(first[0]))} and {name(b, int(second[0]))}")
    if found:
        warnings.warn(f"The same images are in two splits: {'; '.join(found)}.", stacklevel=2)
