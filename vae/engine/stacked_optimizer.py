"""One step of an optimiser for many runs at once, to the same numbers as a step of each run's own.

Adam and AdamW, which a rate for every element is all the same to, step over the stack as torch's own does over a run;
any other optimiser takes the step of each run by itself, on the run's own tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vae.engine.fused_adam import MOMENTS, VARIANTS, fused_adam, is_decoupled

if TYPE_CHECKING:
    from vae.engine.padding import Stacking
    from vae.engine.stack import Member

#: Options of a parameter group that runs of one stack may differ in.
RATES = ("lr", "initial_lr", "weight_decay")


class StackedOptimizer:
    """Steps of the optimisers of `members` over stacked parameters (K, ...) by name.

    The state of each run's own optimiser is kept in step: moments are stacked as weights are, counts are set by `end`.
    """

    def __init__(self, members: Sequence[Member], parameters: dict[str, Tensor], stacking: Stacking) -> None:
        self.stacking, self.names = stacking, list(parameters)
        self.optimizers = [member.optimizer for member in members]
        self.own = [[member.both.get_parameter(name) for name in parameters] for member in members]
        self.stack = list(parameters.values())
        first = self.optimizers[0]
        group_of = {id(p): number for number, group in enumerate(first.param_groups) for p in group["params"]}
        self.groups = [group_of[id(p)] for p in self.own[0]]  # of each parameter; all of a run are in its optimiser
        self.together = type(first) in (torch.optim.Adam, torch.optim.AdamW) and not any(
            group.get(variant) for group in first.param_groups for variant in VARIANTS
        )
        self.state: dict[int, dict[str, Tensor]] = {}
        if self.together:
            for place in range(len(self.stack)):
                if self.own[0][place] in first.state:
                    self._stack_state(place)

    def _stack_state(self, place: int) -> None:
        """Take over what the runs' optimisers know of a parameter, or begin it."""
        states = [optimizer.state[own[place]] for optimizer, own in zip(self.optimizers, self.own, strict=True)]
        group, stack = self.optimizers[0].param_groups[self.groups[place]], self.stack[place]
        if not states[0]:
            fused = bool(group.get("fused"))  # as torch counts
            dtype = torch.float64 if torch.get_default_dtype() == torch.float64 and not fused else torch.float32
            device = stack.device if fused else torch.device("cpu")
            for state, own in zip(states, self.own, strict=True):
                state["step"] = torch.zeros((), dtype=dtype, device=device)
                state.update({name: torch.zeros_like(own[place]) for name in MOMENTS})
        together = {"step": states[0]["step"].clone().to(torch.float32).to(stack.device)}
        for name in MOMENTS:
            together[name] = self.stacking.together(self.names[place], [state[name] for state in states])
        self.state[place] = together

    def begin(self) -> None:
        """Look at the rates of all runs, which a schedule may have changed since the last step."""
        if not self.together:
            return
        self.rates = []
        for number, group in enumerate(self.optimizers[0].param_groups):
            found = {name: [float(o.param_groups[number][name]) for o in self.optimizers] for name in RATES[::2]}
            self.rates.append({"betas": group["betas"], "eps": group["eps"], **found})

    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Gradients (K, ...) of each parameter, None where the loss does not depend on it."""
        if not self.together:
            self._one_by_one(gradients)
            return
        for number, rates in enumerate(self.rates):
            places = [
                place
                for place, gradient in enumerate(gradients)
                if gradient is not None and self.groups[place] == number
            ]
            for place in places:
                if place not in self.state:
                    self._stack_state(place)
            if places:
                self._adam(places, [gradients[place] for place in places], rates)

    @torch.no_grad()
    def _adam(self, places: list[int], gradients: list[Any], rates: dict[str, Any]) -> None:
        parameters = [self.stack[place] for place in places]
        lr, decay = ([*dict.fromkeys(rates[name])] for name in RATES[::2])
        decoupled = is_decoupled(self.optimizers[0], self.optimizers[0].param_groups[self.groups[places[0]]])
        one_rate = len(lr) == len(decay) == 1
        if one_rate:
            targets, options = parameters, {"lr": lr[0], "weight_decay": decay[0]}
        else:  # an update of rate 1, taken by each run at its own
            if any(decay):
                self._decay(parameters, gradients, rates, decoupled)
            targets, options = [torch.zeros_like(p) for p in parameters], {"lr": 1.0, "weight_decay": 0.0}
        state = [self.state[place] for place in places]
        torch._foreach_add_([s["step"] for s in state], 1)
        fused_adam(targets, gradients, state, decoupled, betas=rates["betas"], eps=rates["eps"], **options)
        if not one_rate:
            for parameter, update in zip(parameters, targets, strict=True):
                parameter.addcmul_(update, self._of_runs(rates["lr"], parameter))

    def _decay(self, parameters: list[Tensor], gradients: list[Tensor], rates: dict[str, Any], decoupled: bool) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            decay = rates["weight_decay"]
            if decoupled:
                kept = [1 - lr * d for lr, d in zip(rates["lr"], decay, strict=True)]
                parameter.mul_(self._of_runs(kept, parameter))
            else:
                gradient.addcmul_(parameter, self._of_runs(decay, parameter))

    @staticmethod
    def _of_runs(numbers: list[float], like: Tensor) -> Tensor:
        return torch.tensor(numbers, dtype=like.dtype, device=like.device).view(-1, *[1] * (like.ndim - 1))

    def _one_by_one(self, gradients: Sequence[Tensor | None]) -> None:
        for name, gradient, of_runs in zip(self.names, gradients, zip(*self.own, strict=True), strict=True):
            apart = [None] * len(of_runs) if gradient is None else self.stacking.apart(name, gradient)
            for parameter, own in zip(of_runs, apart, strict=True):
                parameter.grad = own
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.stacking.take_over()

    def end(self) -> None:
        """Bring each run's own count of steps up to date."""
        for optimizer in self.optimizers:
            optimizer._opt_called = True  # type: ignore[attr-defined]  # its schedule would warn that it never steps
        for place, together in self.state.items():
            count = float(together["step"])
            for optimizer, own in zip(self.optimizers, self.own, strict=True):
                optimizer.state[own[place]]["step"].fill_(count)
