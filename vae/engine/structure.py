"""Which runs can be trained as one program: those of one structure, that differ in what is stacked and in nothing else."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from vae.engine.padding import SIZES
from vae.engine.stack import Member
from vae.engine.stacked_optimizer import RATES


def signature(member: Member, trainer: Any = None, sizes: bool = True) -> str:
    """What runs must have in common to be one program: all that is no parameter, buffer or rate. sizes: with the shapes of
    tensors, and what follows from the size of the latent.

    Kinds and plain attributes of every module, names, shapes and types of tensors, the optimiser's options, and what the
    batches are prepared by.
    """
    found: list[Any] = []
    of_every_module = set(vars(nn.Module()))
    for name, module in member.both.named_modules():
        kept = {k: v for k, v in vars(module).items() if k not in of_every_module and (sizes or k not in SIZES)}
        found.append((name, type(module), sorted((k, _plain(v)) for k, v in kept.items())))
    tensors = [*member.both.named_parameters(), *member.both.named_buffers()]
    found += [(name, tuple(t.shape) if sizes else t.ndim, t.dtype, t.device, t.requires_grad) for name, t in tensors]
    optimizer = member.optimizer
    places = {id(parameter): name for name, parameter in member.both.named_parameters()}
    found.append(type(optimizer))
    for group in optimizer.param_groups:
        options = {k: _plain(v) for k, v in group.items() if k not in (*RATES, "params")}
        found.append((sorted(options.items()), [places[id(p)] for p in group["params"]]))
    data = member.data
    found += [type(data), data.binarize, data.batch_size, data.image_shape, len(data.splits_ready().train), member.clip]
    if trainer is not None:
        found += [trainer.log_every_n_steps, trainer.precision_plugin.precision, trainer.check_val_every_n_epoch]
        found += [trainer.num_training_batches, trainer.val_check_batch, trainer.max_epochs, trainer.max_steps]
    return repr(found)


def _plain(value: Any) -> Any:
    """A value by which two can be told apart: numbers and names as they are, collections of them, anything else by what it
    is called."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
        return value
    if isinstance(value, dict):
        return sorted((str(k), _plain(v)) for k, v in value.items())
    if isinstance(value, list | tuple | set):
        return [_plain(v) for v in value]
    if isinstance(value, functools.partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, nn.Module) or not (inspect.isroutine(value) or inspect.isclass(value)):
        return f"{type(value).__module__}.{type(value).__qualname__}"
    return f"{value.__module__}.{value.__qualname__}"
