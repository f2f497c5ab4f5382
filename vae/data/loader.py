"""A split, batch by batch: the order of an epoch follows from (seed, epoch), and a loader resumes in the middle of one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vae import ranks
from vae.data.images import Batch, ImageSet, Loaded, Unread
from vae.data.pairs import Partners
from vae.seeding import derive, generator


class EpochSampler:
    """The index batches of an epoch; their order follows from (seed, epoch) alone.

    guests: (indices, n): n of these, drawn afresh, join each batch; all of them, if there are fewer. images: the split, if
    it has an order of its own.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        guests: tuple[Tensor, int] | None = None,
        images: ImageSet | None = None,
    ) -> None:
        self.images = images
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.guests = guests
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch if self.shuffle else 0

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        draw = generator(self.seed, "order", self.epoch)
        if not self.shuffle:
            order = torch.arange(self.size)
        else:
            order = torch.randperm(self.size, generator=draw) if self.images is None else self.images.shuffled(draw)
        batches = order.split(self.batch_size)
        if self.guests is None:
            yield from batches
            return
        indices, n = self.guests
        noise = generator(self.seed, "guests", self.epoch, 0)
        for batch in batches:
            yield torch.cat([batch, indices[torch.randperm(len(indices), generator=noise)[:n]]])


class BatchLoader:
    """Yields `Batch`es of a split. Resumes in the middle of an epoch through `state_dict`.

    num_workers: read ahead where a split is read from disk (`ImageSet.batches`). partners: makes those of a batch from its y.
    Where several ranks train one run, each yields whole batches, of which it reads its own rows from the disk.
    """

    def __init__(
        self,
        images: ImageSet,
        sampler: EpochSampler,
        stream: str,
        num_workers: int = 0,
        partners: Partners | None = None,
    ) -> None:
        self.images, self.sampler, self.stream, self.num_workers = images, sampler, stream, num_workers
        self.partners = partners
        self.batch_sampler = None  # Lightning looks for it wherever there is a sampler
        self.unread = False  # whether to leave gathering to who takes the batches, where the images are in memory
        self._done = 0  # batches already taken from the current epoch
        self._skip = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def _read(self, indices: list[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
        if ranks.world_size() == 1 or not self.images.streaming:
            return self.images.batches(indices, self.num_workers)
        return map(_together, self.images.batches([ranks.own(index) for index in indices], self.num_workers), indices)

    def __iter__(self) -> Iterator[Loaded]:
        skip, self._skip = self._skip, 0
        self._done = skip
        indices = list(self.sampler)[skip:]
        waits = self.unread and self._can_wait()
        found: Iterator[Any] = iter(indices) if waits else self._read(indices)
        for number, loaded in enumerate(found, start=skip):
            self._done = number + 1
            seed = derive(self.sampler.seed, self.stream, self.sampler.epoch, 0, number)
            if waits:
                yield Unread(self.images, loaded, seed)
                continue
            x, y = loaded
            partner = None if self.partners is None else self.partners(y, generator(seed, "partners"))
            yield Batch(x, y, seed, partner)
        self._done = 0

    def _can_wait(self) -> bool:
        """Whether the images are held in memory, where anyone may gather them at any time."""
        in_memory = type(self.images).batches is ImageSet.batches and not self.images.streaming
        return in_memory and self.partners is None and ranks.world_size() == 1

    def state_dict(self) -> dict[str, int]:
        return {"batches_done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["batches_done"] % len(self)  # a finished epoch is followed by a whole one


def _together(own: tuple[Tensor, Tensor | None], index: Tensor) -> tuple[Tensor, Tensor | None]:
    x, y = own
    return ranks.joined(x, len(index)), None if y is None else ranks.joined(y, len(index))
