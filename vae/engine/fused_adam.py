"""torch's fused Adam and AdamW without what torch looks up at every step: a thirtieth of the step of a small network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as of_torch

MOMENTS = ("exp_avg", "exp_avg_sq")
#: Variants that are left to torch's own step.
VARIANTS = ("amsgrad", "maximize", "capturable", "differentiable")


class QuickStep:
    """`step` and `zero_grad` of an optimiser, to the same bits.

    A fused Adam or AdamW that nothing else listens to is stepped by the kernel that torch would call. Every other optimiser,
    the first step of all, and a step in which a parameter has no gradient are torch's own.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._groups: list[tuple[dict[str, Any], list[Tensor], list[dict[str, Tensor]]]] = []
        self._seen: Any = None  # the state that was last looked at; a checkpoint brings another
        self._known: Any = None  # the state that `_groups` are of, if its steps can be taken here

    def _is_known(self) -> bool:
        """Whether the optimiser is still what was looked at: no other state, no group that joined, nobody who listens."""
        optimizer = self.optimizer
        return (
            self._known is optimizer.state
            and len(self._groups) == len(optimizer.param_groups)
            and not (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
            and not (of_torch._global_optimizer_pre_hooks or of_torch._global_optimizer_post_hooks)
        )

    def zero_grad(self) -> None:
        if not self._is_known():
            self.optimizer.zero_grad()
            return
        for _, parameters, _ in self._groups:
            for parameter in parameters:
                parameter.grad = None

    def step(self) -> None:
        if self._is_known() and self._kernel():
            return
        self.optimizer.step()
        if self._seen is not self.optimizer.state:
            self._look()

    @torch.no_grad()
    def _kernel(self) -> bool:
        """Take a step, unless it must be torch's own."""
        gradients: list[list[Any]] = [[p.grad for p in parameters] for _, parameters, _ in self._groups]
        if any(g is None for group in gradients for g in group):
            return False
        self._steps.add_(1)
        for (group, parameters, states), of_group in zip(self._groups, gradients, strict=True):
            rates = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            fused_adam(parameters, of_group, states, is_decoupled(self.optimizer, group), **rates)
        return True

    def _look(self) -> None:
        """Whether the next steps may be taken here, now that torch's own has made the state."""
        optimizer = self.optimizer
        self._seen = optimizer.state
        if not _is_plain(optimizer):
            return
        self._groups = [
            (group, group["params"], [optimizer.state.get(p, {}) for p in group["params"]])
            for group in optimizer.param_groups
        ]
        all_states = [state for _, _, states in self._groups for state in states]
        kinds = {(p.device, p.dtype) for _, parameters, _ in self._groups for p in parameters}
        if all(all_states) and len(kinds) == 1:
            self._known = optimizer.state
            self._steps = count_together(all_states)


def _is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's own fused Adam or AdamW in its plain form."""
    own = vars(optimizer).get("step")  # put there by torch's schedules, which count the steps, or by someone else
    return (
        type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        and (own is None or hasattr(own, "_wrapped_by_lr_sched"))
        and all(
            group["fused"] and isinstance(group["lr"], float) and not any(group.get(name) for name in VARIANTS)
            for group in optimizer.param_groups
        )
    )


def is_decoupled(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the weight decay is AdamW's."""
    return type(optimizer) is torch.optim.AdamW or bool(group.get("decoupled_weight_decay"))


@torch.no_grad()
def count_together(states: Sequence[dict[str, Tensor]]) -> Tensor:
    """Make the "step" of each state a view of one tensor, which is returned: one addition then counts a step of all."""
    steps = torch.stack([state["step"] for state in states])
    for state, view in zip(states, steps.unbind(), strict=True):
        state["step"] = view
    return steps


def fused_adam(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[dict[str, Tensor]],
    decoupled: bool,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """The kernel that torch.optim.Adam and AdamW call where fused=True, on parameters of one device and type. In place.

    Each state's "step" already counts this step.
    """
    kernel: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        parameters,
        gradients,
        *([state[name] for state in states] for name in MOMENTS),
        [],
        [state["step"] for state in states],
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=None,
    )
