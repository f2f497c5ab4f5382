"""How much memory a run takes while it is trained, and how much is free."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vae.engine.stack import Member
from vae.engine.template import untouched
from vae.seeding import generator

if TYPE_CHECKING:
    from vae.engine.stack import Loaded

CGROUPS = Path("/sys/fs/cgroup")
PART = 0.5  # of what is free that a pack may take: the estimate is rough, and others want some too


def bytes_of_run(member: Member, batch: Loaded) -> int:
    """What a training step of a run holds at once: weights, gradient and two moments, and what its backward pass keeps,
    twice, for its gradient is as large. Takes a loaded batch through the model."""
    device = next(member.both.parameters()).device
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    own = {p.untyped_storage().data_ptr() for p in member.both.parameters()}
    noise = generator(batch.seed, "z", device=device)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda t: t)
    with untouched(member.both.buffers()), hooks, member.context():
        member.both(member.prepared(batch, device), noise, 0, observe=False)
    weights = sum(p.numel() * p.element_size() for p in member.both.parameters())
    return 4 * weights + 2 * sum(size for place, size in kept.items() if place not in own)


def free_bytes(member: Member) -> float:
    """What a pack may take of the memory of the device that a run is on."""
    device = next(member.both.parameters()).device
    if device.type == "cuda":
        return PART * torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit: "max"
        limit = int((CGROUPS / "memory.max").read_text())
        free.append(limit - int((CGROUPS / "memory.current").read_text()))
    return PART * min(free, default=float("inf"))
