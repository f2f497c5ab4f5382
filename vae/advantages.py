"""What a sampled answer is worth: its reward, less the penalty on the KL where that is part of it, less a baseline.

Shapes as in `vae.policy`: rewards (B,), log-probabilities and masks (B, L); answers to one prompt stand next to each other.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from vae.errors import VAEError
from vae.importance import per_sequence_mean, real
from vae.kl import k1
from vae.precision import full_precision


def penalised_reward(
    *, rewards: Tensor, log_pi: Tensor, log_ref: Tensor, mask: Tensor, beta: float | Tensor, per: str = "sequence"
) -> Tensor:
    """rewards - beta KL by k1 of each sequence, in the reward's units, without gradient: (B,).

    per: "sequence" sums k1 over the tokens, an estimate of KL(pi || pi_ref) of whole sequences; "token" averages it over
    them, so that beta does not depend on the length. log_pi: of the policy that drew the tokens.
    Raises VAEError for another `per`.
    """
    token_kl = k1(log_pi=log_pi.detach(), log_ref=log_ref.detach())
    if per not in ("sequence", "token"):
        raise VAEError(f"The penalty is taken per 'sequence' or per 'token', not {per!r}.")
    kl = real(token_kl, mask).sum(-1) if per == "sequence" else per_sequence_mean(token_kl, mask)
    return rewards - beta * kl


def token_rewards(*, rewards: Tensor, log_pi: Tensor, log_ref: Tensor, mask: Tensor, beta: float | Tensor) -> Tensor:
    """-beta k1 at each real token, plus the sequence's reward at its last one: what a critic learns from, (B, L).

    Sums to `penalised_reward` over a sequence; 0 on padding (Ziegler et al. 2019; TRL's PPO). No gradient.
    """
    mask, rewards = mask.bool(), full_precision(rewards)
    penalty = -beta * real(k1(log_pi=log_pi.detach(), log_ref=log_ref.detach()), mask)
    real_tokens_left = mask.long().flip(-1).cumsum(-1).flip(-1)
    return penalty + torch.where(mask & (real_tokens_left == 1), rewards.unsqueeze(-1), torch.zeros_like(penalty))


def no_baseline(returns: Tensor) -> Tensor:
    """The returns as they are."""
    return returns


def mean_baseline(returns: Tensor) -> Tensor:
    """Less the group's mean. Each return is in its own baseline, so that K of them shrink the gradient by (K - 1) / K."""
    return returns - returns.mean(-1, keepdim=True)


def leave_one_out(returns: Tensor) -> Tensor:
    """Less the mean of the others in the group: unbiased (Kool et al. 2019; RLOO)."""
    k = returns.shape[-1]
    return returns - (returns.sum(-1, keepdim=True) - returns) / (k - 1)


def group_normalized(returns: Tensor) -> Tensor:
    """Less the group's mean, divided by its standard deviation (with K - 1); 0 in a group of equals. GRPO.

    Returns are equal if they differ by less than a millionth of the largest: that is rounding, which divided by itself
    would come out at full size. TRL adds 1e-4 to the deviation instead.
    """
    span = returns.amax(-1, keepdim=True) - returns.amin(-1, keepdim=True)
    equal = span <= 1e-6 * returns.abs().amax(-1, keepdim=True)
    # in units of the span, so that the squares of tiny returns do not vanish
    scaled = (returns - returns.mean(-1, keepdim=True)) / span.masked_fill(equal, 1.0)
    deviation = scaled.std(-1, keepdim=True).masked_fill(equal, 1.0)
    return (scaled / deviation).masked_fill(equal, 0.0)


BASELINES = {
    "none": no_baseline,
    "mean": mean_baseline,
    "leave_one_out": leave_one_out,
    "group_normalized": group_normalized,
}


def baseline_named(name: str) -> str:
    """A baseline's name. That of the release before is accepted, with a FutureWarning. Raises VAEError if unknown."""
    if name == "group_normalised":
        warnings.warn("The baseline group_normalised is now group_normalized.", FutureWarning, stacklevel=3)
        name = "group_normalized"
    if name not in BASELINES:
        raise VAEError(f"There is no baseline {name!r}: choose among {', '.join(BASELINES)}.")
    return name


def advantages(returns: Tensor, *, baseline: str, group_size: int | None = None) -> Tensor:
    """Returns (B,) less a baseline named in BASELINES, within consecutive groups of `group_size` (None: all one group).

    Raises VAEError for an unknown baseline, a batch that is not whole groups, or a group of one where others are needed.
    """
    baseline = baseline_named(baseline)
    size = len(returns) if group_size is None else group_size
    if len(returns) % size:
        raise VAEError(f"{len(returns)} sequences are not whole groups of {size}.")
    if size < 2 and baseline != "none":
        raise VAEError(f"The baseline {baseline!r} needs groups of at least two sequences.")
    return BASELINES[baseline](full_precision(returns).reshape(-1, size)).flatten()
