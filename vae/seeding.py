"""Every random number follows from a run's seed and a name, never from what was drawn before it.

Because the draw of batch 17 of epoch 3 depends only on (seed, "train", 3, 17), a run that is stopped and resumed, or
that shares a machine with others, sees exactly the numbers it would have seen alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch


def derive(*parts: int | str) -> int:
    """A 63-bit seed from a root seed and the names of a stream, e.g. `derive(seed, "train", epoch, batch)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded by `derive(*parts)`."""
    return torch.Generator(device).manual_seed(derive(*parts))


def generators(seeds: Iterable[int], name: str, device: torch.device | str = "cpu") -> Iterator[torch.Generator]:
    """`generator(seed, name)` of each seed in turn: one generator, seeded again, so that each is used up before the next."""
    found = torch.Generator(device)
    return (found.manual_seed(derive(seed, name)) for seed in seeds)
