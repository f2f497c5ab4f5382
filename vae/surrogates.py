"""What is minimised of each token, (B, L), given what its answer is worth; and how tokens and answers are averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from vae.importance import per_sequence_mean, real
from vae.precision import full_precision


def sequence_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over each sequence's tokens, mean over sequences: the policy gradient proper (REINFORCE, RLOO)."""
    return real(values, mask).sum(-1).mean()


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each sequence's tokens, mean over sequences: GRPO as published; a token of a long answer weighs less."""
    return per_sequence_mean(values, mask).mean()


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all real tokens of the batch: DAPO (Yu et al. 2025); a long answer weighs more."""
    return real(values, mask).sum() / mask.sum().clamp(min=1)


AGGREGATIONS = {"sequence_sum": sequence_sum, "sequence_mean": sequence_mean, "token_mean": token_mean}


def reinforce_loss(*, log_pi: Tensor, advantages: Tensor) -> Tensor:
    """-A log pi of each token; its gradient is the policy gradient (Williams 1992). A: (B,) or (B, L) -> (B, L)."""
    return -_per_token(advantages, log_pi) * full_precision(log_pi)


def clipped_loss(
    *,
    log_pi: Tensor,
    log_old: Tensor,
    advantages: Tensor,
    clip: float | Tensor,
    clip_high: float | Tensor | None = None,
) -> Tensor:
    """-min(w A, clip(w, 1 - clip, 1 + clip_high) A) of each token, w = pi / pi_old (Schulman et al. 2017).

    clip_high: clip unless given (DAPO's clip-higher). Shapes: log-probabilities (B, L), A (B,) or (B, L) -> (B, L).
    """
    gain = _per_token(advantages, log_pi)
    ratio = torch.exp(full_precision(log_pi) - full_precision(log_old.detach()))
    low, high = 1 - clip, 1 + (clip if clip_high is None else clip_high)
    clipped = ratio.clamp(low, high)  # type: ignore[arg-type]  # numbers or tensors, both the same
    return -torch.minimum(ratio * gain, clipped * gain)


def cispo_loss(*, log_pi: Tensor, log_ratio: Tensor, advantages: Tensor, clip_high: float | Tensor) -> Tensor:
    """-min(w, 1 + clip_high) A log pi of each token, the weight held constant (MiniMax-M1, Chen et al. 2025): (B, L).

    Where `clipped_loss` drops the gradient of a clipped token, this keeps it at the bounded weight: REINFORCE under
    truncated importance weights.
    """
    weight = full_precision(log_ratio.detach()).exp().clamp(max=1 + clip_high)
    return weight * reinforce_loss(log_pi=log_pi, advantages=advantages)


def _per_token(advantages: Tensor, log_pi: Tensor) -> Tensor:
    advantages = full_precision(advantages.detach())
    return advantages if advantages.dim() == log_pi.dim() else advantages.unsqueeze(-1)
