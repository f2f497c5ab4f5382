"""The policy penalty: reward minus beta KL(pi || pi_ref), what keeps a tuned language model close to where it began.

A batch is B sequences sampled from the policy, of at most L tokens: log-probabilities of the sampled tokens (B, L), a
mask (B, L) that is true on real tokens and false on padding, and a reward a sequence (B,). What stands on padding is
never read, be it NaN. Sequences that answer the same prompt stand next to each other, `group_size` of them.

Where the penalty stands makes a difference:
    "reward"   r - beta sum_t k1_t, held constant. The gradient of REINFORCE is then exactly that of
               E[r] - beta KL(pi || pi_ref), the KL of whole sequences (Ziegler et al. 2019; RLOO, Ahmadian et al. 2024).
    "loss_k2"  beta k2_t added to each token's loss. Exact for one token; for more it is the gradient of the tokens' own
               KL(pi(.|past) || pi_ref(.|past)), blind to how a token changes which pasts come next.
    "loss_k3"  beta k3_t, the penalty of GRPO (Shao et al. 2024): likewise, but of the forward KL(pi_ref || pi).
k1 in the loss is refused: its expected gradient is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vae.beta import Constant
from vae.errors import VAEError
from vae.kl import k1, k2, k3

PENALTIES = {"reward": None, "loss_k2": k2, "loss_k3": k3}


# ------------------------------------------------------------------------------------------------------ over tokens


def _real(values: Tensor, mask: Tensor) -> Tensor:
    """values with 0 on padding, whatever stood there, and no gradient to it."""
    return torch.where(mask, values, torch.zeros_like(values))


def sequence_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over each sequence's tokens, mean over sequences: the policy gradient proper (REINFORCE, RLOO)."""
    return _real(values, mask).sum(-1).mean()


def sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each sequence's tokens, mean over sequences: GRPO as published; a token of a long answer weighs less."""
    return _per_sequence_mean(values, mask).mean()


def token_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over all real tokens of the batch: DAPO (Yu et al. 2025); a long answer weighs more."""
    return _real(values, mask).sum() / mask.sum().clamp(min=1)


def _per_sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    # A sequence without tokens has sum 0; a count of 1 makes its mean 0 and changes no other.
    return _real(values, mask).sum(-1) / mask.sum(-1).clamp(min=1)


AGGREGATIONS = {"sequence_sum": sequence_sum, "sequence_mean": sequence_mean, "token_mean": token_mean}


# --------------------------------------------------------------------------------------------- penalty in the reward


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
    kl = _real(token_kl, mask).sum(-1) if per == "sequence" else _per_sequence_mean(token_kl, mask)
    return rewards - beta * kl


def token_rewards(*, rewards: Tensor, log_pi: Tensor, log_ref: Tensor, mask: Tensor, beta: float | Tensor) -> Tensor:
    """-beta k1 at each real token, plus the sequence's reward at its last one: what a critic learns from, (B, L).

    Sums to `penalised_reward` over a sequence; 0 on padding (Ziegler et al. 2019; TRL's PPO). No gradient.
    """
    penalty = -beta * _real(k1(log_pi=log_pi.detach(), log_ref=log_ref.detach()), mask)
    real_tokens_left = mask.long().flip(-1).cumsum(-1).flip(-1)
    return penalty + torch.where(mask & (real_tokens_left == 1), rewards.unsqueeze(-1), torch.zeros_like(penalty))


# ------------------------------------------------------------------------------------------------ returns -> advantages


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


def group_normalised(returns: Tensor) -> Tensor:
    """Less the group's mean, divided by its standard deviation (with K - 1); 0 in a group of equals. GRPO.

    TRL adds 1e-4 to the deviation so as not to divide by 0; here such a group is told by its equality instead.
    """
    equal = returns.amax(-1, keepdim=True) == returns.amin(-1, keepdim=True)
    deviation = returns.std(-1, keepdim=True).masked_fill(equal, 1.0)
    return ((returns - returns.mean(-1, keepdim=True)) / deviation).masked_fill(equal, 0.0)


BASELINES = {
    "none": no_baseline,
    "mean": mean_baseline,
    "leave_one_out": leave_one_out,
    "group_normalised": group_normalised,
}


def advantages(returns: Tensor, *, baseline: str, group_size: int | None = None) -> Tensor:
    """Returns (B,) less a baseline named in BASELINES, within consecutive groups of `group_size` (None: all one group).

    Raises VAEError for an unknown baseline, a batch that is not whole groups, or a group of one where others are needed.
    """
    if baseline not in BASELINES:
        raise VAEError(f"There is no baseline {baseline!r}: choose among {', '.join(BASELINES)}.")
    size = len(returns) if group_size is None else group_size
    if len(returns) % size:
        raise VAEError(f"{len(returns)} sequences are not whole groups of {size}.")
    if size < 2 and baseline != "none":
        raise VAEError(f"The baseline {baseline!r} needs groups of at least two sequences.")
    return BASELINES[baseline](returns.reshape(-1, size)).flatten()


# ---------------------------------------------------------------------------------------------------- surrogate losses


def reinforce_loss(*, log_pi: Tensor, advantages: Tensor) -> Tensor:
    """-A log pi of each token; its gradient is the policy gradient (Williams 1992). A: (B,) or (B, L) -> (B, L)."""
    return -_per_token(advantages, log_pi) * log_pi


def clipped_loss(
    *,
    log_pi: Tensor,
    log_old: Tensor,
    advantages: Tensor,
    clip: float | Tensor,
    clip_high: float | Tensor | None = None,
) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - clip, 1 + clip_high) A) of each token, ratio = pi / pi_old (Schulman et al. 2017).

    clip_high: clip unless given (DAPO's clip-higher). Shapes: log-probabilities (B, L), A (B,) or (B, L) -> (B, L).
    """
    gain = _per_token(advantages, log_pi)
    ratio = torch.exp(log_pi - log_old.detach())
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return -torch.minimum(ratio * gain, clipped * gain)


def _per_token(advantages: Tensor, log_pi: Tensor) -> Tensor:
    advantages = advantages.detach()
    return advantages if advantages.dim() == log_pi.dim() else advantages.unsqueeze(-1)


# -------------------------------------------------------------------------------------------------------- objectives


class PolicyObjective(nn.Module):
    """What Reinforce, PPOClip and GRPO share: reward, penalty, advantage, loss.

    beta * schedule(step) weighs the penalty; schedule is any of vae.beta. In training a controller is told, at each
    call, the KL of whole sequences in nats (k1 of the policy that drew them). penalty, baseline, aggregation: names in
    PENALTIES, BASELINES and AGGREGATIONS; group_size: answers to one prompt, None for the whole batch.
    Raises VAEError for a negative beta and for names that are not there, k1 in the loss among them.
    """

    beta: Tensor

    def __init__(
        self,
        beta: float,
        schedule: nn.Module | None,
        penalty: str,
        baseline: str,
        group_size: int | None,
        aggregation: str,
    ) -> None:
        super().__init__()
        if not beta >= 0:
            raise VAEError(f"beta={beta} must be zero or more.")
        if penalty == "loss_k1":
            raise VAEError("k1 in the loss has no gradient in expectation: use reward, loss_k2 or loss_k3.")
        for what, name, known in (
            ("penalty", penalty, PENALTIES),
            ("baseline", baseline, BASELINES),
            ("aggregation", aggregation, AGGREGATIONS),
        ):
            if name not in known:
                raise VAEError(f"There is no {what} {name!r}: choose among {', '.join(known)}.")
        if group_size is not None and group_size < 1:
            raise VAEError(f"group_size must be at least 1, not {group_size}.")
        self.register_buffer("beta", torch.tensor(float(beta)))
        self.schedule = Constant() if schedule is None else schedule
        self.penalty, self.baseline, self.group_size, self.aggregation = penalty, baseline, group_size, aggregation

    def token_loss(self, log_pi: Tensor, log_old: Tensor, advantages: Tensor) -> Tensor:
        """What is minimised of each token, without the penalty: (B, L)."""
        raise TypeError(f"{type(self).__name__} does not say what it minimises: it must define token_loss().")

    def forward(
        self,
        *,
        rewards: Tensor,
        log_pi: Tensor,
        log_ref: Tensor,
        mask: Tensor,
        step: int,
        log_old: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """0-dim terms: "loss" (the only one with a gradient), "reward", "kl" and "kl_k3" in nats a sequence, "beta".

        log_old: of the policy that drew the tokens, where that is no longer the present one; None means it still is.
        """
        if not (log_pi.shape == log_ref.shape == mask.shape) or rewards.shape != log_pi.shape[:1]:
            raise VAEError("A policy batch needs log_pi, log_ref and mask of one shape (B, L), and B rewards.")
        mask, rewards = mask.bool(), rewards.detach()
        log_pi, log_ref = _real(log_pi, mask), _real(log_ref.detach(), mask)
        log_old = log_pi.detach() if log_old is None else _real(log_old.detach(), mask)

        weight = self.beta * self.schedule(step)
        returns = rewards
        if self.penalty == "reward":
            returns = penalised_reward(rewards=rewards, log_pi=log_old, log_ref=log_ref, mask=mask, beta=weight)
        gain = advantages(returns, baseline=self.baseline, group_size=self.group_size)
        token_loss = self.token_loss(log_pi, log_old, gain)
        if self.penalty != "reward":
            token_loss = token_loss + weight * PENALTIES[self.penalty](log_pi=log_pi, log_ref=log_ref)
        loss = AGGREGATIONS[self.aggregation](token_loss, mask)

        kl = k1(log_pi=log_old, log_ref=log_ref).sum(-1).mean()
        if self.training:
            self.schedule.observe(rate=kl)
        kl_k3 = k3(log_pi=log_old, log_ref=log_ref).sum(-1).mean()
        return {"loss": loss, "reward": rewards.mean(), "kl": kl, "kl_k3": kl_k3, "beta": weight.detach()}


class Reinforce(PolicyObjective):
    """-A log pi, summed over each sequence, with the penalty in the reward and the leave-one-out baseline (RLOO).

    The gradient is unbiased for E[reward] - beta KL(pi || pi_ref) of whole sequences (not with baseline "mean", which
    scales it, nor "group_normalised", nor with another aggregation). On-policy: raises VAEError if given log_old.
    """

    def __init__(
        self,
        beta: float = 0.05,
        schedule: nn.Module | None = None,
        penalty: str = "reward",
        baseline: str = "leave_one_out",
        group_size: int | None = None,
        aggregation: str = "sequence_sum",
    ) -> None:
        super().__init__(beta, schedule, penalty, baseline, group_size, aggregation)

    def forward(self, *, log_old: Tensor | None = None, **batch: Tensor | int) -> dict[str, Tensor]:
        if log_old is not None:
            raise VAEError(
                "REINFORCE takes each sample once, from the present policy: log_old is for PPOClip and GRPO."
            )
        return super().forward(**batch)

    def token_loss(self, log_pi: Tensor, log_old: Tensor, advantages: Tensor) -> Tensor:
        return reinforce_loss(log_pi=log_pi, advantages=advantages)


class PPOClip(PolicyObjective):
    """The clipped surrogate (Schulman et al. 2017) on the advantage of whole sequences, several steps a batch.

    clip: how far the ratio to the policy that drew the sample may pay; clip_high: upwards, where that differs (DAPO).
    There is no critic: all tokens share their sequence's advantage, penalty included. One that is trained on
    `token_rewards` hands its advantages of single tokens to `clipped_loss`.
    Raises VAEError unless 0 < clip < 1 and clip_high > 0.
    """

    clip: Tensor
    clip_high: Tensor

    def __init__(
        self,
        beta: float = 0.05,
        schedule: nn.Module | None = None,
        penalty: str = "reward",
        baseline: str = "leave_one_out",
        group_size: int | None = None,
        aggregation: str = "token_mean",
        clip: float = 0.2,
        clip_high: float | None = None,
    ) -> None:
        super().__init__(beta, schedule, penalty, baseline, group_size, aggregation)
        clip_high = clip if clip_high is None else clip_high
        if not (0 < clip < 1 and clip_high > 0):
            raise VAEError(
                f"The ratio is clipped to (1 - {clip}, 1 + {clip_high}), which must hold 1 and no negatives."
            )
        self.register_buffer("clip", torch.tensor(float(clip)))
        self.register_buffer("clip_high", torch.tensor(float(clip_high)))

    def token_loss(self, log_pi: Tensor, log_old: Tensor, advantages: Tensor) -> Tensor:
        return clipped_loss(
            log_pi=log_pi, log_old=log_old, advantages=advantages, clip=self.clip, clip_high=self.clip_high
        )


class GRPO(PPOClip):
    """Group-normalised advantages, the clipped surrogate, k3 in the loss, means of sequence means (Shao et al. 2024).

    aggregation "token_mean" and clip_high 0.28 make it DAPO's.
    """

    def __init__(
        self,
        group_size: int,
        beta: float = 0.04,
        schedule: nn.Module | None = None,
        penalty: str = "loss_k3",
        baseline: str = "group_normalised",
        aggregation: str = "sequence_mean",
        clip: float = 0.2,
        clip_high: float | None = None,
    ) -> None:
        super().__init__(beta, schedule, penalty, baseline, group_size, aggregation, clip, clip_high)
