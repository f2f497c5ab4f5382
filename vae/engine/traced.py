"""A step as the operators that it is made of: traced once, then taken without the Python that led to them."""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vae.data.images import Batch
from vae.engine.operators import as_methods, in_place, without_aliases
from vae.engine.template import untouched

TRACED_AFTER = 128  # steps on batches of one size: tracing takes a third of a second, which as many more steps save

Outputs = list[Any]  # tensors, and None where a gradient is none
Function = Callable[..., Outputs]
#: The terms of a step, (K,) each, and a gradient for each parameter that is trained.
Result = tuple[dict[str, Tensor], list[Tensor | None]]


class Step:
    """The number of a step while one is traced: torch calculates with it, and Python cannot look at it."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def __truediv__(self, other: Any) -> Tensor:
        # as torch divides a number by a tensor
        return other.reciprocal() * self.value if isinstance(other, Tensor) else self.value / other

    def __bool__(self) -> bool:
        raise TypeError("the number of the step is looked at in Python")

    def __repr__(self) -> str:
        raise TypeError("the number of the step is looked at in Python")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return function(*(a.value if isinstance(a, Step) else a for a in arguments), **(options or {}))


def _calculates(name: str) -> Callable[..., Tensor]:
    return lambda step, *others: getattr(step.value, name)(*others)


for _names in ("add radd sub rsub mul rmul rtruediv floordiv mod", "pow rpow neg lt le gt ge eq ne"):
    for _name in _names.split():
        setattr(Step, f"__{_name}__", _calculates(f"__{_name}__"))


class Programs:
    """`of_step`, a function of a batch, what was drawn, and the step, as a traced program: one for each size of batch.

    state: the tensors that it looks at besides; buffers: those of them that it may change in place. A program is the same
    operators, and it is tried before it is used: where a step is no fixed sequence of operators there is none.
    """

    def __init__(
        self, of_step: Callable[[Batch, list[Tensor], Any], Result], state: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> None:
        self.of_step, self.state, self.buffers = of_step, list(state), list(buffers)
        self.taken: collections.Counter[int] = collections.Counter()  # steps, by the images of a batch
        self.known: dict[int, tuple[list[str], Function] | None] = {}

    def __call__(self, batch: Batch, noise: list[Tensor], step: int) -> Result | None:
        """What `of_step` returns, or None where it must be called."""
        images = batch.x.shape[1]
        if images not in self.known:
            self.taken[images] += 1
            if self.taken[images] <= TRACED_AFTER:
                return None
            self.known[images] = self._program(batch, noise, step)
        if (known := self.known[images]) is None:
            return None
        names, program = known
        outputs = program(*self._inputs(batch, noise, step))
        return dict(zip(names, outputs, strict=False)), outputs[len(names) :]

    def _inputs(self, batch: Batch, noise: list[Tensor], step: int) -> list[Tensor]:
        """What a program is called with. The step is a tensor, for a number would be a constant of the program."""
        now = torch.full((), float(step), device=batch.x.device)
        return [now, *(t for t in (batch.x, batch.y, batch.partner) if t is not None), *noise, *self.state]

    def _program(self, batch: Batch, noise: list[Tensor], step: int) -> tuple[list[str], Function] | None:
        names: list[str] = []

        def function(now: Tensor, x: Tensor, *tensors: Tensor) -> Outputs:
            rest = list(tensors[: -len(self.state)])
            y = None if batch.y is None else rest.pop(0)
            partner = None if batch.partner is None else rest.pop(0)
            terms, gradients = self.of_step(Batch(x, y, 0, partner), rest, Step(now))
            names[:] = terms
            return [*(value.detach() for value in terms.values()), *gradients]

        log, inputs = logging.getLogger(__name__), self._inputs(batch, noise, step)
        try:
            with untouched(self.buffers):
                program = traced(function, *inputs)
            with untouched(self.buffers):
                ours = [*program(*inputs), *(buffer.clone() for buffer in self.buffers)]
            with untouched(self.buffers):
                terms, gradients = self.of_step(batch, noise, step)
                theirs = [*terms.values(), *gradients, *(buffer.clone() for buffer in self.buffers)]
        except Exception as error:
            log.debug(f"A step is not traced: {type(error).__name__}: {error}")
            return None
        if not same(ours, theirs):
            log.debug("A step is not traced: the program does not lead to its numbers.")
            return None
        if batch.x.device.type == "cuda":
            try:
                with untouched(self.buffers):
                    program = replayed(program, inputs, len(self.state))
            except RuntimeError as error:
                log.debug(f"A step is no CUDA graph: {error}")
        return names, program


def traced(function: Function, *examples: Tensor) -> Function:
    """The function for tensors of these shapes: the same operators on the same numbers, and so the same bits.

    Gradients that it takes are among its operators; what it returns has none. It changes in place what the function does.
    Raises what torch raises where a Python branch looks at a value, and whatever the function does.
    """
    # Torch may move it with any release; steps are then taken as they are.
    from torch.fx.experimental.proxy_tensor import make_fx

    module = make_fx(function)(*examples)
    without_aliases(module.graph)
    in_place(module.graph)
    as_methods(module.graph)
    module.recompile()  # and nothing is left out: old torch takes what changes a buffer for dead code
    return torch.no_grad()(module.forward)


def replayed(program: Function, inputs: Sequence[Tensor], kept: int) -> Function:
    """A traced function as one launch of a CUDA graph, the last `kept` inputs being the same tensors at every call.

    What it returns is overwritten by the next call. Calls the function once. Raises what torch raises where an operator
    waits for the GPU.
    """
    varying = [tensor.clone() for tensor in inputs[: len(inputs) - kept]]
    of_graph = [*varying, *inputs[len(inputs) - kept :]]
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):  # what libraries set up at their first call must not be recorded
        program(*of_graph)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = program(*of_graph)

    def call(*tensors: Tensor) -> Outputs:
        torch._foreach_copy_(varying, tensors[: len(varying)])
        graph.replay()
        return outputs

    return call


def same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> bool:
    """Whether these are the same to within rounding, each beside its largest element, None where the other is."""
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    a, b = a.detach(), b.detach()
    if not b.is_floating_point():
        return torch.equal(a, b)
    most = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=torch.finfo(b.dtype).eps ** 0.75 * most, equal_nan=True)
