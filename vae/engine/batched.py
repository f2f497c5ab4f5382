"""Layers of many networks at once, as one product of stacked matrices each: what `torch.vmap` makes several passes of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LINEAR, CROSS_ENTROPY = F.linear, F.binary_cross_entropy_with_logits


class Batched(TorchFunctionMode):
    """Within `torch.vmap`: dense layers as one `baddbmm`, and the cross-entropy of pixels as the one operator that it is.

    The same numbers as without, to rounding. Under autocast dense layers are left as they are.
    """

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function is LINEAR and not options and not torch.is_autocast_enabled(arguments[0].device.type):
            return Linear.apply(*arguments, *[None] * (3 - len(arguments)))
        if function is CROSS_ENTROPY and options == {"reduction": "none"} and len(arguments) == 2:
            return CrossEntropy.apply(*arguments)
        return function(*arguments, **(options or {}))


class Linear(torch.autograd.Function):
    """F.linear of x (..., I), weight (O, I) and bias (O,) or None; of a stack, each with a dimension in front."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Nothing is kept: under `vmap` the stack's own function has the gradient."""

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        x, weight = (_in_front(t, d, info.batch_size) for t, d in zip((x, weight), dims, strict=False))
        bias = None if bias is None else _in_front(bias, dims[2], info.batch_size)
        rows = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        out = StackedLinear.apply(rows, weight, bias)
        return out.reshape(*x.shape[:-1], out.shape[-1]), 0


class StackedLinear(torch.autograd.Function):
    """x (K, N, I), weight (K, O, I), bias (K, O) or None -> (K, N, O)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (
            torch.bmm(gradient, weight) if needs[0] else None,
            torch.bmm(gradient.mT, x) if needs[1] else None,
            gradient.sum(1) if needs[2] else None,
        )


class CrossEntropy(torch.autograd.Function):
    """F.binary_cross_entropy_with_logits, pixel by pixel."""

    @staticmethod
    def forward(logits: Tensor, x: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, x, reduction="none")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        """Nothing is kept here either."""

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], logits: Tensor, x: Tensor) -> Any:
        logits, x = (_in_front(t, d, info.batch_size) for t, d in zip((logits, x), dims, strict=True))
        return F.binary_cross_entropy_with_logits(logits, x, reduction="none"), 0


def _in_front(t: Tensor, dim: int | None, size: int) -> Tensor:
    """t with the dimension of the runs in front, which is made where it has none."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
