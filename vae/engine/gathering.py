"""The batches of many runs as one: gathered at once, where they are of one split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vae.data.images import Batch, Images, ImageSet, Loaded, Unread
from vae.data.module import ImageDataModule

if TYPE_CHECKING:
    from vae.engine.stack import Member

HELD_PART = 0.1  # of the free memory of a GPU that a copy of the images may take


class Gatherer:
    """The loaded batches of K runs -> the prepared batch of all, (K, B, ...), on the device."""

    def __init__(self, members: Sequence[Member], device: torch.device) -> None:
        self.members, self.device = members, device
        self.plain = all(type(member.data) is ImageDataModule for member in members)
        self._split: Any = None  # that the batches are of, and what they are gathered from
        self._held: Any = None

    def __call__(self, batches: Sequence[Loaded]) -> Batch:
        if not self.plain:
            return _stack_of([m.prepared(b, self.device) for m, b in zip(self.members, batches, strict=True)])
        data = self.members[0].data
        loaded = self._at_once(batches)
        if loaded is None:
            loaded = _stack_of([batch.read() if isinstance(batch, Unread) else batch for batch in batches])
        moved = data.transfer_batch_to_device(loaded, self.device, 0)
        return data.prepare_many(moved, [batch.seed for batch in batches])

    def _at_once(self, batches: Sequence[Loaded]) -> Batch | None:
        """Batches of one split: on a GPU from a copy there, if its memory has room for one."""
        unread = [batch for batch in batches if isinstance(batch, Unread)]
        if len(unread) < len(batches) or any(batch.images is not unread[0].images for batch in unread):
            return None
        images = unread[0].images
        if self._split is not images:
            self._split, self._held = images, _held_on(self.device, images) or images
        index = torch.stack([batch.index for batch in unread])
        rows = index.flatten() if self._held is images else index.flatten().to(self.device)
        x, y = self._held.gather(rows)
        return Batch(x.unflatten(0, index.shape), None if y is None else y.unflatten(0, index.shape), 0)


def _held_on(device: torch.device, images: ImageSet) -> Images | None:
    """A copy of images in the memory of a GPU, if they are held in memory and take little of what is free there."""
    if device.type != "cuda" or type(images) is not Images:
        return None
    size = images.x.numel() * images.x.element_size()
    if size > HELD_PART * torch.cuda.mem_get_info(device)[0]:
        return None
    return Images(images.x.to(device), None if images.y is None else images.y.to(device))


def _stack_of(batches: Sequence[Batch]) -> Batch:
    """Batches as one, (K, B, ...), without a seed."""

    def together(parts: list[Tensor | None]) -> Tensor | None:
        known = [part for part in parts if part is not None]
        return torch.stack(known) if len(known) == len(parts) else None

    y, partner = together([batch.y for batch in batches]), together([batch.partner for batch in batches])
    return Batch(torch.stack([batch.x for batch in batches]), y, 0, partner)
