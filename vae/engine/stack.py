"""Runs of one structure trained as one program: their weights, buffers and optimisers' states stacked, run by run.

A stack of K runs has every parameter and buffer as one tensor (K, ...), of which those of the runs are views, or which they
are read from where their latents differ in size (`vae.engine.padding`): what else looks at a run, such as its validation or
its checkpoint, finds it as if it were alone. A step is the objective under
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
from vae.engine.padding import Stacking
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
    """K runs as one program. All have one structure (`vae.engine.structure.signature`) but for the size of the latent, are on
    the same device, and are at the same step. Raises Unpackable from `train` where the runs turn out to be different from
    what they would be alone, before anything was changed.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.stacking = Stacking([member.vae.latent_dim for member in self.members])
        self.largest = self.members[self.stacking.largest]
        first = self.largest.both
        self.device = next(first.parameters()).device
        self.parameters = {
            name: self.stacking.together(
                name, [member.both.get_parameter(name) for member in self.members]
            ).requires_grad_(parameter.requires_grad)
            for name, parameter in first.named_parameters()
        }
        self.buffers = {
            name: self.stacking.together(name, [member.both.get_buffer(name) for member in self.members])
            for name, _ in first.named_buffers()
        }
        self.trained = {name: p for name, p in self.parameters.items() if p.requires_grad}
        self._state = [*self.parameters.values(), *self.buffers.values()]
        self._template = Template(first, [*self.parameters, *self.buffers])
        self.optimizer = StackedOptimizer(self.members, self.trained, self.stacking)
        self._plans: dict[tuple[int, int], list[Call]] = {}  # by the images of a batch, and the size of the latent
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
        self.stacking.take_over()
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
        self.stacking.hand_back()
        return found

    # --- a step -----------------------------------------------------------------------------------------------------

    def _step(self, batches: Sequence[Loaded], step: int) -> dict[str, Tensor]:
        batch, noise = self._together(batches), self._drawn(batches, step)
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
        gradients = torch.autograd.grad(terms["loss"].sum(), [*self.trained.values()], allow_unused=True)
        return terms, [
            None if gradient is None else self.stacking.masked(name, _laid_out_as(parameter, gradient))
            for (name, parameter), gradient in zip(self.trained.items(), gradients, strict=True)
        ]

    def _terms(self, batch: Batch, noise: list[Tensor], step: Any, observe: bool) -> dict[str, Tensor]:
        template, plan = self.largest, self._plans[len(batch.x[0]), self.stacking.most]
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

    def _plan(self, member: Member, batch: Loaded, step: int) -> list[Call]:
        """What a run draws in a step on so many images, in its order: found out once for each size of the latent."""
        key = batch.size, member.vae.latent_dim
        if key not in self._plans:
            noise = generator(batch.seed, "z", device=self.device)
            with untouched(member.both.buffers()), Watched(noise) as watched, member.context():
                member.both(member.prepared(batch, self.device), noise, step, observe=False)
            self._plans[key] = watched.calls
        return self._plans[key]

    def _drawn(self, batches: Sequence[Loaded], step: int) -> list[Tensor]:
        """The draws of a step, (K, ...) each. Runs of one seed draw the same, but for the size of their latents."""
        plans: dict[int, list[Call]] = {}
        for latent_dim, member, batch in zip(self.stacking.latent_dims, self.members, batches, strict=True):
            if latent_dim not in plans:
                plans[latent_dim] = self._plan(member, batch, step)
        keys = [(batch.seed, latent_dim) for batch, latent_dim in zip(batches, self.stacking.latent_dims, strict=True)]
        once, drawn = [*dict.fromkeys(keys)], {}
        for key, noise in zip(once, generators([seed for seed, _ in once], "z", self.device), strict=True):
            drawn[key] = [call.function(*call.arguments, generator=noise, **call.options) for call in plans[key[1]]]
        of_runs = [drawn[key] for key in keys]
        full = of_runs[self.stacking.largest]
        if any(len(draws) != len(full) for draws in of_runs):
            raise Unpackable("how much it draws depends on the size of the latent")
        return [
            torch.stack([self.stacking.filled_up(draw, draws[self.stacking.largest].shape) for draw in draws])
            for draws in zip(*of_runs, strict=True)
        ]

    # --- before it is trusted ---------------------------------------------------------------------------------------

    def _try(self, batch: Batch, batches: Sequence[Loaded], noise: list[Tensor], step: int) -> None:
        """Raises Unpackable unless loss and gradient of each run are those of the run alone, to within rounding."""
        terms, together = self._gradients(batch, noise, step, observe=False)
        apart = [
            None if gradient is None else self.stacking.apart(name, gradient)
            for name, gradient in zip(self.trained, together, strict=True)
        ]
        exact = torch.finfo(terms["loss"].dtype).eps ** 0.5 if self.members[0].context is nullcontext else 0.1
        for number, (member, own) in enumerate(zip(self.members, batches, strict=True)):
            noise_of_own = generator(own.seed, "z", device=self.device)
            with member.context():
                loss = member.both(member.prepared(own, self.device), noise_of_own, step, observe=False)["loss"]
            parameters = [member.both.get_parameter(name) for name in self.trained]
            alone = torch.autograd.grad(loss, parameters, allow_unused=True)
            pairs = [(terms["loss"][number], loss)]
            for of_runs, of_run in zip(apart, alone, strict=True):
                if (of_runs is None) != (of_run is None):
                    raise Unpackable("the gradient of a run in the pack is not that of the run alone")
                if of_runs is not None and of_run is not None:
                    pairs.append((of_runs[number], of_run))
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


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in the layout of its parameter, which a fused optimiser takes it to have, as `backward` makes one."""
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)


def _of_runs(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers (K,) to be broadcast with (K, ...)."""
    return numbers.view(-1, *[1] * (like.ndim - 1))
