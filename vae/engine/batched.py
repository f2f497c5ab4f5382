"""Layers of many networks at once, as one product of stacked matrices each: what `torch.vmap` makes several passes of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vae.likelihoods import cross_entropy

try:  # what torch.vmap is made of, which torch keeps to itself: with it a layer costs half of a public Function's overhead
    from torch._C._functorch import _add_batch_dim, get_unwrapped, is_batchedtensor, maybe_get_bdim
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
except ImportError:
    LOWERS = False
else:
    LOWERS = True

LINEAR, CROSS_ENTROPY = F.linear, F.binary_cross_entropy_with_logits


class Batched(TorchFunctionMode):
    """Within one `torch.vmap`: dense layers as one `baddbmm`, and the cross-entropy of pixels as the one operator that it is.

    The same numbers as without, to rounding. Under autocast dense layers are left as they are.
    """

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is LINEAR and not options and not torch.is_autocast_enabled(arguments[0].device.type):
            bias = arguments[2] if len(arguments) == 3 else None
            return lowered(stacked_linear, *arguments[:2], bias) if LOWERS else Linear.apply(*arguments[:2], bias)
        if function is CROSS_ENTROPY and len(arguments) == 2 and _set(options) == {"reduction": "none"}:
            return lowered(cross_entropy, *arguments) if LOWERS else CrossEntropy.apply(*arguments)
        return function(*arguments, **(options or {}))


def _set(options: dict[str, Any] | None) -> dict[str, Any]:
    """Those that are not None, as torch passes the ones that nobody gave."""
    return {name: value for name, value in (options or {}).items() if value is not None}


def lowered(function: Any, *tensors: Tensor | None) -> Tensor:
    """A function of stacks, (K, ...) each, called from within `torch.vmap` over K."""
    interpreter: Any = retrieve_current_functorch_interpreter()
    runs = interpreter.batch_size()

    def physical(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        return in_front(get_unwrapped(t), maybe_get_bdim(t), runs) if is_batchedtensor(t) else in_front(t, None, runs)

    stacks = [physical(t) for t in tensors]
    with interpreter.lower():
        out = function(*stacks)
    return _add_batch_dim(out, 0, interpreter.level())


def in_front(t: Tensor, dim: int | None, runs: int) -> Tensor:
    """t with the dimension of the runs in front, which is made where it has none."""
    if dim is None:
        return t.expand(runs, *t.shape)
    return t if dim == 0 else t.movedim(dim, 0)


# --- of stacks --------------------------------------------------------------------------------------------------------


def stacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (K, ..., I), weight (K, O, I), bias (K, O) or None -> (K, ..., O)."""
    rows = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
    out: Tensor = StackedLinear.apply(rows, weight, bias)
    return out if x.ndim == 3 else out.reshape(*x.shape[:-1], out.shape[-1])


class StackedLinear(torch.autograd.Function):
    """x (K, N, I), weight (K, O, I), bias (K, O) or None -> (K, N, O). Gradients have the layout of what they are of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            torch.bmm(gradient, weight) if needs[0] else None,
            torch.bmm(gradient.mT, x) if needs[1] else None,
            gradient.sum(1) if needs[2] else None,
        )


# --- the same by what torch makes public ------------------------------------------------------------------------------


class Linear(torch.autograd.Function):
    """F.linear, of which `torch.vmap` makes a `stacked_linear`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Nothing is kept: under `vmap` the stack's own function has the gradient."""

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *tensors: Tensor | None) -> tuple[Tensor, int]:
        stacks = [None if t is None else in_front(t, d, info.batch_size) for t, d in zip(tensors, dims, strict=True)]
        return stacked_linear(*stacks), 0  # type: ignore[arg-type]


class CrossEntropy(torch.autograd.Function):
    """F.binary_cross_entropy_with_logits, of which `torch.vmap` makes that of a stack."""

    @staticmethod
    def forward(logits: Tensor, x: Tensor) -> Tensor:
        return cross_entropy(logits, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Nothing is kept here either."""

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, int]:
        stacks = [in_front(t, d, info.batch_size) for t, d in zip(tensors, dims, strict=True)]
        return cross_entropy(*stacks), 0
