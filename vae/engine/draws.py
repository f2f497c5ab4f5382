"""What a run draws in a step: noted once, drawn for each run from its own generator, and handed to many runs at once."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vae.engine.batched import Batched


class Unpackable(Exception):
    """Why runs cannot be trained as one program; the words complete "trained one after another, because ..."."""


class NoSeed:
    """Stands where a batch has its seed: there is none that all runs share."""

    def __repr__(self) -> str:
        raise Unpackable("the objective draws by the batch's seed, and not from the generator that it is given")

    __index__ = __int__ = __hash__ = __repr__  # type: ignore[assignment]


@dataclass
class Call:
    """A draw: a function of torch and what it is called with, but for the generator."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Watched(TorchFunctionMode):
    """Notes what is drawn from a generator. Raises Unpackable for what is drawn otherwise, or depends on a tensor."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator, self.calls = generator, list[Call]()

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = dict(options or {})
        if options.get("generator") is self.generator:
            rest = {name: value for name, value in options.items() if name != "generator"}
            if any(isinstance(value, Tensor) for value in (*arguments, *rest.values())):
                raise Unpackable(f"what {function.__name__} draws depends on a tensor, which differs between runs")
            self.calls.append(Call(function, arguments, rest))
        return function(*arguments, **options)

    def __enter__(self) -> Watched:
        self._before = list(_global_states())
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if any(not np.array_equal(a, b) for a, b in zip(self._before, _global_states(), strict=True)):
            raise Unpackable(
                "its objective or its networks draw from the global generator: every draw must come from the generator "
                "that an objective is given"
            )


def _global_states() -> Iterator[Any]:
    yield torch.get_rng_state().numpy()
    if torch.cuda.is_available():
        yield torch.cuda.get_rng_state().numpy()
    yield np.random.get_state()[1]  # type: ignore[index]  # noqa: NPY002
    yield np.asarray(random.getstate()[1])


class Drawn(Batched):
    """Answers what is drawn from a generator by what was drawn before, in the same order."""

    def __init__(self, generator: torch.Generator, plan: list[Call], drawn: list[Tensor]) -> None:
        super().__init__()
        self.generator, self.left = generator, list(zip(plan, drawn, strict=True))

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if not options or options.get("generator") is not self.generator:
            return super().__torch_function__(function, types, arguments, options)
        rest = {name: value for name, value in options.items() if name != "generator"}
        if not self.left or (Call(function, arguments, rest) != self.left[0][0]):
            raise Unpackable("what it draws differs from step to step")
        return self.left.pop(0)[1]
