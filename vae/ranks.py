"""A batch shared out over the processes ("ranks") of one run: each takes its rows through the networks, all have the result.

Every rank holds the whole batch, draws the same noise for it and computes the same loss from it, batch statistics included;
what costs, the networks, it computes for its own rows only. So an objective need not know of ranks, and one run on several
devices differs from the same on one by rounding. A step has two crossings, both differentiable: `own` cuts a rank's rows out
of what all have, `joined` puts what each has made of its rows together again. They are those of tensor parallelism (Shoeybi et
al. 2019, section 3: f and g), along the batch.

Gradients inside, between `own` and `joined`, are world-size times a rank's part, and outside those of the whole, so that the
mean over ranks of a parameter's gradient is right wherever the parameter is used: that is what `average_gradients` takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_sharing = False


def world_size() -> int:
    """How many processes train this run together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """In this context all ranks take the same steps, and models share out their work. Outside, each works for itself."""
    global _sharing
    before, _sharing = _sharing, world_size() > 1
    try:
        yield
    finally:
        _sharing = before


def are_sharing() -> bool:
    """Whether the rows of a batch are shared out now."""
    return _sharing


def sizes(n: int, world: int) -> list[int]:
    """How many of n rows each rank has, in its order: as equally as it goes."""
    return [n * (r + 1) // world - n * r // world for r in range(world)]


def own(x: Tensor, dim: int = 0) -> Tensor:
    """This rank's rows of what every rank has.

    Where there are fewer rows than ranks, those left with none take the first, whose result `joined` drops: no network is
    asked for nothing.
    """
    if not x.requires_grad:
        return _cut(x, dim)
    return _Own.apply(x, dim)


def joined(x: Tensor, n: int, dim: int = 0) -> Tensor:
    """What all ranks made of their rows of n, on every rank."""
    kept = sizes(n, world_size())[rank()]
    return _Joined.apply(x.narrow(dim, 0, kept), n, dim)


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over ranks. A parameter without one must be so on every rank."""
    average([parameter.grad for parameter in parameters if parameter.grad is not None])


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over ranks."""
    by_type: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor)
    for group in by_type.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        dist.all_reduce(flat)
        flat /= world_size()
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def on_every_rank(value: Tensor) -> list[float]:
    """What a 0-dim tensor is on each rank, in their order."""
    values = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(values, value.contiguous())
    return [float(value) for value in values]


@torch.no_grad()
def copy_from_first(module: torch.nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor, 0)


def _cut(x: Tensor, dim: int) -> Tensor:
    n, world, r = x.shape[dim], world_size(), rank()
    shares = sizes(n, world)
    start, length = (sum(shares[:r]), shares[r]) if shares[r] else (0, min(n, 1))
    return x.narrow(dim, start, length)


def _gather(x: Tensor, n: int, dim: int) -> Tensor:
    shares = sizes(n, world_size())
    rows = x.movedim(dim, 0)
    padded = rows.new_zeros(max(shares), *rows.shape[1:])  # collective calls want equal shapes
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded)
    together = torch.cat([part[:share] for part, share in zip(parts, shares, strict=True)])
    return together.movedim(0, dim).contiguous()


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int) -> Tensor:
        ctx.n, ctx.dim = x.shape[dim], dim
        return _cut(x, dim).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        kept = sizes(ctx.n, world_size())[rank()]
        return _gather(gradients[0].narrow(ctx.dim, 0, kept), ctx.n, ctx.dim) / world_size(), None


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, dim: int) -> Tensor:
        ctx.n, ctx.dim = n, dim
        return _gather(x, n, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        shares = sizes(ctx.n, world_size())
        r = rank()
        return gradients[0].narrow(ctx.dim, sum(shares[:r]), shares[r]) * world_size(), None, None
