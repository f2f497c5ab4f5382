"""Runs of one structure trained as one program: their weights, buffers and optimisers' states stacked, run by run.

A stack of K runs has every parameter and buffer as one tensor (K, ...), of which those of the runs are views: what else
looks at a run, such as its validation or its checkpoint, finds it as if it were alone. A step is the objective under
`torch.vmap`, one backward pass and one step of an optimiser over the stack, so that the operators of a step do not grow
with the number of runs. Only what a run draws is drawn for each by itself, from its own generator as it would be alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vae.data.images import Batch, Loaded
from vae.data.module import ImageDataModule
from vae.engine.draws import Call, Drawn, NoSeed, Unpackable, Watched
from vae.engine.gathering import Gatherer
from vae.engine.stacked_optimizer import StackedOptimizer
from vae.engine.template import Template, untouched
from vae.engine.traced import Programs, Result
from vae.model import VAE
from vae.objectives.elbo import Objective
from vae.seeding import generator, generators


@dataclass
class Member:
    """What a run brings: its model, its objective, the optimiser of both, and the data that prepares its batches.

    clip: the most that the norm of its gradient may be ("norm"), or each element ("value"); None for no bound.
    context: what a step is taken in, such as autocast.
    """

    vae: VAE
    objective: Objective
    optimizer: torch.optim.Optimizer
    data: ImageDataModule
    clip: tuple[str, float] | None = None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        self.both = Both(self.vae, self.objective)

    def prepared(self, batch: Loaded, device: torch.device) -> Batch:
        """A loaded batch as a training step sees it."""
        moved = self.data.transfer_batch_to_device(batch, device, 0)
        if type(self.data) is ImageDataModule:
            return self.data.prepare(moved, training=True)
        return self.data.on_after_batch_transfer(moved, 0)


class Both(nn.Module):
    """A model and its objective as one module, whose call is a training step up to the gradient."""

    def __init__(self, vae: VAE, objective: Objective) -> None:
        super().__init__()
        self.vae, self.objective = vae, objective

    def forward(self, batch: Batch, generator: torch.Generator, step: int, observe: bool = True) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self.objective(self.vae, batch, generator, step)
        if observe:
            schedule: Any = self.objective.schedule
            schedule.observe(rate=terms["rate"], distortion=terms["distortion"])
        return terms


class Stack:
    """K runs as one program. All have one structure (`vae.engine.structure.signature`), the same device, and are at the
    same step. Raises Unpackable from `train` where the runs turn out to be different from what they would be alone, before
    anything was changed.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        first = self.members[0].both
        self.device = next(first.parameters()).device
        self.parameters = {
            name: _stacked([member.both.get_parameter(name) for member in self.members]).requires_grad_(
                parameter.requires_grad
            )
            for name, parameter in first.named_parameters()
        }
        self.buffers = {
            name: _stacked([member.both.get_buffer(name) for member in self.members])
            for name, _ in first.named_buffers()
        }
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self._state = [*self.parameters.values(), *self.buffers.values()]
        self._template = Template(first, [*self.parameters, *self.buffers])
        self.optimizer = StackedOptimizer(self.members, self.trained)
        self._plans: dict[Any, list[Call]] = {}
        self._together = Gatherer(self.members, self.device)
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in first.modules())
        self._programs = None if hooked else Programs(self._gradients, self._state, [*self.buffers.values()])
        self._tried = False
        self._failed: Exception | None = None

    def train(self, blocks: Sequence[Sequence[Loaded]], step: int) -> list[dict[str, Tensor]]:
        """Train on the loaded batches of each step, one for each run; step: how many were taken before.

        Returns the terms of each step that was taken, (K,) each, detached: of fewer than were asked for, where one cannot
        be, and then the next call raises why.
        """
        if self._failed is not None:
            raise self._failed
        found: list[dict[str, Tensor]] = []
        self.optimizer.begin()
        for number, batches in enumerate(blocks, step):
            try:
                found.append(self._step(batches, number))
            except Exception as error:
                if not found:
                    raise
                self._failed = error  # what was done is done
                break
        self.optimizer.end()
        return found

    # --- a step -----------------------------------------------------------------------------------------------------

    def _step(self, batches: Sequence[Loaded], step: int) -> dict[str, Tensor]:
        batch, plan = self._together(batches), self._plan(batches, step)
        noise = self._drawn(plan, [batch.seed for batch in batches])
        if not self._tried:
            with untouched(self.buffers.values()):
                self._try(batch, batches, noise, step)
        result = None if self._programs is None else self._programs(batch, noise, step)
        terms, gradients = result or self._gradients(batch, noise, step)
        self._clip(gradients)
        self.optimizer.step(gradients)
        return {name: value.detach().clone() for name, value in terms.items()}

    def _gradients(self, batch: Batch, noise: list[Tensor], step: Any, observe: bool = True) -> Result:
        terms = self._terms(batch, noise, step, observe)
        parameters = list(self.trained.values())
        gradients = torch.autograd.grad(terms["loss"].sum(), parameters, allow_unused=True)
        return terms, [
            None if gradient is None else _laid_out_as(parameter, gradient)
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]

    def _terms(self, batch: Batch, noise: list[Tensor], step: Any, observe: bool) -> dict[str, Tensor]:
        template, plan = self.members[0], self._plans[len(batch.x[0])]
        placeholder = torch.Generator()  # never drawn from: `Drawn` answers in its place

        def of_one(
            state: list[Tensor], x: Tensor, y: Tensor | None, partner: Tensor | None, drawn: list[Tensor]
        ) -> dict[str, Tensor]:
            one = Batch(x, y, NoSeed(), partner)  # type: ignore[arg-type]
            with Drawn(placeholder, plan, drawn), self._template.holding(state):
                return template.both(one, placeholder, step, observe)

        dims = (0, 0, None if batch.y is None else 0, None if batch.partner is None else 0, 0)
        with template.context():
            return torch.vmap(of_one, dims)(self._state, batch.x, batch.y, batch.partner, noise)

    def _clip(self, gradients: list[Tensor | None]) -> None:
        """As torch.nn.utils.clip_grad_norm_ and clip_grad_value_ do, run by run."""
        found = [gradient for gradient in gradients if gradient is not None]
        if (clip := self.members[0].clip) is None:
            return
        kind, most = clip
        if kind == "value":
            for gradient in found:
                gradient.clamp_(-most, most)
            return
        norms = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in found])
        factor = (most / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)
        for gradient in found:
            gradient.mul_(_of_runs(factor, gradient))

    # --- the batches, and what is drawn -----------------------------------------------------------------------------

    def _plan(self, batches: Sequence[Loaded], step: int) -> list[Call]:
        """What a run draws in a step on so many images, in its order: found out once, from the first."""
        images = batches[0].size
        if images not in self._plans:
            first, batch = self.members[0], batches[0]
            noise = generator(batch.seed, "z", device=self.device)
            with untouched(self.buffers.values()), Watched(noise) as watched, first.context():
                first.both(first.prepared(batch, self.device), noise, step, observe=False)
            self._plans[images] = watched.calls
        return self._plans[images]

    def _drawn(self, plan: list[Call], seeds: Sequence[int]) -> list[Tensor]:
        """The draws of a step, (K, ...) each."""
        if not plan:
            return []
        of_runs = [
            [call.function(*call.arguments, generator=noise, **call.options) for call in plan]
            for noise in generators(seeds, "z", self.device)
        ]
        return [torch.stack(draws) for draws in zip(*of_runs, strict=True)]

    # --- before it is trusted ---------------------------------------------------------------------------------------

    def _try(self, batch: Batch, batches: Sequence[Loaded], noise: list[Tensor], step: int) -> None:
        """Raises Unpackable unless loss and gradient of each run are those of the run alone, to within rounding."""
        terms, together = self._gradients(batch, noise, step, observe=False)
        exact = torch.finfo(terms["loss"].dtype).eps ** 0.5 if self.members[0].context is nullcontext else 0.1
        for number, (member, own) in enumerate(zip(self.members, batches, strict=True)):
            noise_of_own = generator(own.seed, "z", device=self.device)
            with member.context():
                loss = member.both(member.prepared(own, self.device), noise_of_own, step, observe=False)["loss"]
            parameters = [member.both.get_parameter(name) for name in self.trained]
            alone = torch.autograd.grad(loss, parameters, allow_unused=True)
            pairs = [(terms["loss"][number], loss)]
            for a, b in zip(together, alone, strict=True):
                if (a is None) != (b is None):
                    raise Unpackable("the gradient of a run in the pack is not that of the run alone")
                if a is not None and b is not None:
                    pairs.append((a[number], b))
            largest = max((float(b.abs().max()) for _, b in pairs[1:] if b.numel()), default=0.0)
            for place, (a, b) in enumerate(pairs):
                within = exact * (largest if place else float(b.detach().abs()))
                if torch.isfinite(b).all() and not torch.allclose(a, b, rtol=exact, atol=within):
                    what = "gradient" if place else "loss"
                    raise Unpackable(
                        f"the {what} of a run in the pack is not that of the run alone: a number that differs between "
                        "runs is no buffer, or a hook does not see the stack"
                    )
        self._tried = True


# --- tensors ----------------------------------------------------------------------------------------------------------


def _stacked(of_runs: Sequence[Tensor]) -> Tensor:
    """Tensors of the runs as one, (K, ...), of which they become views."""
    stack = torch.stack([value.detach() for value in of_runs])
    for value, view in zip(of_runs, stack.unbind(), strict=True):
        value.data = view
    return stack


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in the layout of its parameter, which a fused optimiser takes it to have, as `backward` makes one."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)


def _of_runs(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers (K,) to be broadcast with (K, ...)."""
    return numbers.view(-1, *[1] * (like.ndim - 1))
