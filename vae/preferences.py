"""Policies from preferences between two answers, without samples or a reward model: DPO and IPO.

Both hold that a reward is implicit in a policy, beta (log pi(y) - log pi_ref(y)) = beta k1 of the whole answer, up to a
constant of the prompt: the policy is then the optimum of E[reward] - beta KL(pi || pi_ref) for that reward.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vae.errors import VAEError
from vae.kl import k1


def implicit_reward(*, log_pi: Tensor, log_ref: Tensor, beta: float) -> Tensor:
    """beta k1 of whole answers, (B,) log-probabilities summed over tokens: (B,), in the reward's units.

    Its mean over answers that pi draws is beta KL(pi || pi_ref); over those of a data set, as here, it is no KL.
    """
    return beta * k1(log_pi=log_pi, log_ref=log_ref)


def preference_loss(
    *,
    log_pi_chosen: Tensor,
    log_pi_rejected: Tensor,
    log_ref_chosen: Tensor,
    log_ref_rejected: Tensor,
    beta: float = 0.1,
    kind: str = "dpo",
) -> dict[str, Tensor]:
    """Batch means: "loss" (the only one with a gradient), "margin" of implicit rewards, "accuracy" (margin above 0).

    kind "dpo": -log sigmoid(margin) (Rafailov et al. 2023): the maximum likelihood of preferences that follow
    Bradley-Terry; its optimum is pi_ref exp(reward / beta) / Z. "ipo": (margin / beta - 1 / (2 beta))^2 (Azar et al.
    2024), which stops at a finite distance where one answer is always preferred. log-probabilities (B,) of whole answers.
    Raises VAEError unless beta > 0, for another kind, and for numbers that are not finite.
    """
    if not beta > 0:
        raise VAEError(f"beta={beta} must be positive: without it no reward is implicit.")
    if kind not in ("dpo", "ipo"):
        raise VAEError(f"Preferences are learnt by 'dpo' or 'ipo', not {kind!r}.")
    chosen = implicit_reward(log_pi=log_pi_chosen, log_ref=log_ref_chosen.detach(), beta=beta)
    rejected = implicit_reward(log_pi=log_pi_rejected, log_ref=log_ref_rejected.detach(), beta=beta)
    margin = chosen - rejected
    if not margin.isfinite().all():
        raise VAEError("A log-probability of an answer is NaN or infinite: sum over its real tokens only.")
    loss = -F.logsigmoid(margin) if kind == "dpo" else (margin / beta - 1 / (2 * beta)).square()
    margin = margin.detach()
    return {"loss": loss.mean(), "margin": margin.mean(), "accuracy": (margin > 0).float().mean()}
