"""Modules whose tensors others stand in for, or that a pass leaves as they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Template:
    """A module that can hold other tensors than its own, as `torch.func.functional_call` lets it, in a tenth of the time."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        places: dict[int, list[tuple[dict[str, Any], str]]] = {}
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        places.setdefault(id(tensor), []).append((tensors, name))
        known = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.own = [known[name] for name in names]
        self.places = [places[id(tensor)] for tensor in self.own]

    @contextmanager
    def holding(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Hold these in place of its own, in the order of the names."""
        try:
            self._put(tensors)
            yield
        finally:
            self._put(self.own)

    def _put(self, tensors: Sequence[Tensor]) -> None:
        for places, tensor in zip(self.places, tensors, strict=True):
            for where, name in places:
                where[name] = tensor


@contextmanager
def untouched(buffers: Iterable[Tensor]) -> Iterator[None]:
    """Let a pass that only looks, of a model that counts its passes, leave these as they were."""
    before = [(buffer, buffer.clone()) for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
