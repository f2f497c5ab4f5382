"""The policy penalty: reward minus beta KL(pi || pi_ref), what keeps a tuned language model close to where it began.

A batch is B sequences sampled from a policy pi_old, of at most L tokens: log-probabilities of the sampled tokens (B, L)
under pi, pi_ref and, where it is no longer pi, pi_old; a mask (B, L) that is true on the tokens that the policy chose and
false on all others (prompts, tool output, padding); and a reward a sequence (B,). What stands off the mask is never read,
be it NaN. Sequences that answer the same prompt stand next to each other, `group_size` of them. float16, bfloat16 and
integers are computed in float32. Log-densities of a continuous policy, which may exceed 0, are as good as
log-probabilities.

Where the penalty stands, and what its expected gradient is (w: the importance ratio pi / pi_old, see RATIOS):
    "reward"      r - beta sum_t k1_t, held constant, k1 of the policy that drew the tokens. On-policy, with REINFORCE, that
                  of E[r] - beta KL(pi || pi_ref), the KL of whole sequences (Ziegler et al. 2019; RLOO, Ahmadian et al.
                  2024). Off-policy it lacks beta KL(pi || pi_old): policies are pushed away from the one that drew.
    "reward_is"   the same with k1 of the present policy: exact wherever the ratio beside it is that of whole sequences.
    "loss_k2"     beta k2_t in each token's loss. On-policy that of the tokens' own KL(pi(.|past) || pi_ref(.|past)), pasts
                  held fixed; off-policy biased.
    "loss_k3"     beta k3_t, GRPO's (Shao et al. 2024): on-policy that of the *forward* KL(pi_ref || pi); off-policy of
                  neither.
    "loss_k1_is"  beta w k1_t } the tokens' own KL(pi || pi_ref), on-policy and off; the pasts are those that pi_old drew.
    "loss_k2_is"  beta w k2_t } k2's w is held constant. k2's and k3's gradients are then the same for each sample,
    "loss_k3_is"  beta w k3_t } w k1 grad log pi; k1's has a term of mean 0 more (Liu et al. 2025; DeepSeek-V3.2 has k3's).
    "loss_exact"  beta KL_t, from the whole next-token distributions (`vae.token_kl`): the same without the noise of the
                  token drawn (Amini et al. 2025).
k1 in the loss without its ratio is refused: on-policy its expected gradient is zero, off-policy that of -KL(pi_old || pi).
With penalty_ratio "prefix" the k1, k3 and exact penalties see how a token changes what follows as well, and their
gradient is that of the KL of whole sequences; k2, whose ratio is held, only puts each token's KL on the pasts of pi.
docs/which_kl.md has each bias and variance as a number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vae.advantages import advantages, baseline_named, penalised_reward
from vae.beta import Constant
from vae.errors import VAEError
from vae.importance import RATIOS, log_importance, ratio_k1, ratio_k2, ratio_k3, real
from vae.kl import k1, k2, k3
from vae.precision import full_precision
from vae.surrogates import AGGREGATIONS, cispo_loss, clipped_loss, reinforce_loss

# ------------------------------------------------------------------------------------------------------- penalties


def _on_policy(estimator):
    return lambda *, log_pi, log_ref, log_ratio: estimator(log_pi=log_pi, log_ref=log_ref)


PENALTIES = {
    "reward": None,
    "reward_is": None,
    "loss_k2": _on_policy(k2),
    "loss_k3": _on_policy(k3),
    "loss_k1_is": ratio_k1,
    "loss_k2_is": ratio_k2,
    "loss_k3_is": ratio_k3,
    "loss_exact": None,
}


# -------------------------------------------------------------------------------------------------------- objectives


class PolicyObjective(nn.Module):
    """What all objectives here share: reward, penalty, advantage, loss.

    beta * schedule(step) weighs the penalty; schedule is any of vae.beta. In training a controller is told, at each
    call, the KL of whole sequences in nats (k1 of the policy that drew them). penalty, baseline, aggregation,
    penalty_ratio: names in PENALTIES, BASELINES, AGGREGATIONS and RATIOS; group_size: answers to one prompt, None for the
    whole batch. Raises VAEError for a negative beta and for names that are not there, k1 in the loss among them.
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
        penalty_ratio: str = "token",
    ) -> None:
        super().__init__()
        if not beta >= 0:
            raise VAEError(f"beta={beta} must be zero or more.")
        if penalty == "loss_k1":
            raise VAEError(
                "k1 in the loss has no gradient in expectation without its importance ratio: use loss_k1_is, reward, "
                "loss_k2 or loss_k3_is."
            )
        for what, name, known in (
            ("penalty", penalty, PENALTIES),
            ("aggregation", aggregation, AGGREGATIONS),
            ("penalty_ratio", penalty_ratio, RATIOS),
        ):
            if name not in known:
                raise VAEError(f"There is no {what} {name!r}: choose among {', '.join(known)}.")
        if group_size is not None and group_size < 1:
            raise VAEError(f"group_size must be at least 1, not {group_size}.")
        self.register_buffer("beta", torch.tensor(float(beta)))
        self.schedule = Constant() if schedule is None else schedule
        self.penalty, self.baseline = penalty, baseline_named(baseline)
        self.group_size, self.aggregation = group_size, aggregation
        self.penalty_ratio = penalty_ratio

    def token_loss(self, log_pi: Tensor, log_old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
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
        weights: Tensor | None = None,
        token_kl: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """0-dim terms: "loss" (the only one with a gradient), "reward", "kl" and "kl_k3" in nats a sequence, "beta".

        log_old: of the policy that drew the tokens, where that is no longer the present one; None means it still is.
        weights: (B, L), of `importance_weights`, where the tokens were drawn by something else again (another engine, a
        temperature, top-p): they multiply the whole loss. token_kl: for penalty "loss_exact", (B, L).
        Raises VAEError for shapes that do not fit, numbers on the mask that are not finite, and a loss that is not:
        exp(log-ratio) overflows from 88 nats per token, in float32. "kl_k3", which is only looked at, may be infinite.
        """
        if not (log_pi.shape == log_ref.shape == mask.shape) or rewards.shape != log_pi.shape[:1]:
            raise VAEError("A policy batch needs log_pi, log_ref and mask of one shape (B, L), and B rewards.")
        mask, rewards = mask.bool(), full_precision(rewards.detach())
        log_pi, log_ref = real(log_pi, mask), real(log_ref.detach(), mask)
        log_old = log_pi.detach() if log_old is None else real(log_old.detach(), mask)
        for name, values in (("log_pi", log_pi), ("log_ref", log_ref), ("log_old", log_old), ("rewards", rewards)):
            if not values.isfinite().all():
                where = "" if name == "rewards" else ", and not on padding: mask out what the policy did not choose"
                raise VAEError(f"{name} is NaN or infinite{where}.")

        weight = self.beta * self.schedule(step)
        returns = rewards
        if self.penalty.startswith("reward"):
            of = log_old if self.penalty == "reward" else log_pi
            returns = penalised_reward(rewards=rewards, log_pi=of, log_ref=log_ref, mask=mask, beta=weight)
        gain = advantages(returns, baseline=self.baseline, group_size=self.group_size)
        token_loss = self.token_loss(log_pi, log_old, gain, mask)
        if self.penalty.startswith("loss") and weight > 0:  # 0 times a k3 that overflows would be NaN
            token_loss = token_loss + weight * self.token_penalty(log_pi, log_old, log_ref, mask, token_kl)
        if weights is not None:
            token_loss = weights.detach() * token_loss
        loss = AGGREGATIONS[self.aggregation](token_loss, mask)
        if not loss.isfinite():
            furthest = max((log_pi - other).detach().abs().max().item() for other in (log_old, log_ref))
            raise VAEError(
                f"The loss is not finite: pi is {furthest:.0f} nats per token away from pi_old or pi_ref, and the ratio "
                "overflows. A penalty of k2 or in the reward takes no exponential; a larger beta keeps pi nearer."
            )

        kl = k1(log_pi=log_old, log_ref=log_ref).sum(-1).mean()
        if self.training:
            self.schedule.observe(rate=kl)
        kl_k3 = k3(log_pi=log_old, log_ref=log_ref).sum(-1).mean()
        return {"loss": loss, "reward": rewards.mean(), "kl": kl, "kl_k3": kl_k3, "beta": weight.detach()}

    def token_penalty(
        self, log_pi: Tensor, log_old: Tensor, log_ref: Tensor, mask: Tensor, token_kl: Tensor | None
    ) -> Tensor:
        """The penalty in the loss of each token, in nats: (B, L)."""
        logs = {"log_pi": log_pi, "log_old": log_old, "mask": mask}
        log_ratio = log_importance(per=self.penalty_ratio, **logs)
        if self.penalty != "loss_exact":
            return PENALTIES[self.penalty](log_pi=log_pi, log_ref=log_ref, log_ratio=log_ratio)
        if token_kl is None or token_kl.shape != log_pi.shape:
            raise VAEError("The penalty loss_exact needs token_kl (B, L), of vae.token_kl.")
        # the token itself was averaged over: its own ratio would only add noise
        return (log_ratio - log_importance(**logs)).exp() * real(token_kl, mask)


class Reinforce(PolicyObjective):
    """-A log pi, summed over each sequence, with the penalty in the reward and the leave-one-out baseline (RLOO).

    The gradient is unbiased for E[reward] - beta KL(pi || pi_ref) of whole sequences (not with baseline "mean", which
    scales it, nor "group_normalized", nor with another aggregation). On-policy: raises VAEError if given log_old.
    """

    def __init__(
        self,
        beta: float = 0.05,
        schedule: nn.Module | None = None,
        penalty: str = "reward",
        baseline: str = "leave_one_out",
        group_size: int | None = None,
        aggregation: str = "sequence_sum",
        penalty_ratio: str = "token",
    ) -> None:
        super().__init__(beta, schedule, penalty, baseline, group_size, aggregation, penalty_ratio)

    def forward(self, *, log_old: Tensor | None = None, **batch: Tensor | int) -> dict[str, Tensor]:
        if log_old is not None:
            raise VAEError(
                "REINFORCE takes each sample once, from the present policy: log_old is for PPOClip and GRPO."
            )
        return super().forward(**batch)

    def token_loss(self, log_pi: Tensor, log_old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return reinforce_loss(log_pi=log_pi, advantages=advantages)


class PPOClip(PolicyObjective):
    """The clipped surrogate (Schulman et al. 2017) on the advantage of whole sequences, several steps per batch.

    clip: how far the ratio to the policy that drew the sample may pay; clip_high: upwards, where that differs (DAPO).
    ratio: whose ratio is clipped, a name in RATIOS; one of whole answers stands at each of their tokens, and wants the
    aggregation "sequence_mean". The penalty is that of the present policy; "reward" is that of the one
    that drew, as TRL has it. There is no critic: all tokens share their sequence's advantage, penalty included. One
    that is trained on `token_rewards` hands its advantages of single tokens to `clipped_loss`.
    Raises VAEError unless 0 < clip < 1 and clip_high > 0.
    """

    clip: Tensor
    clip_high: Tensor

    def __init__(
        self,
        beta: float = 0.05,
        schedule: nn.Module | None = None,
        penalty: str = "reward_is",
        baseline: str = "leave_one_out",
        group_size: int | None = None,
        aggregation: str = "token_mean",
        clip: float = 0.2,
        clip_high: float | None = None,
        ratio: str = "token",
        penalty_ratio: str = "token",
    ) -> None:
        super().__init__(beta, schedule, penalty, baseline, group_size, aggregation, penalty_ratio)
        clip_high = clip if clip_high is None else clip_high
        if not (0 < clip < 1 and clip_high > 0):
            raise VAEError(f"Need 0 < clip < 1 and clip_high > 0, got clip={clip}, clip_high={clip_high}.")
        if ratio not in RATIOS:
            raise VAEError(f"There is no ratio {ratio!r}: choose among {', '.join(RATIOS)}.")
        self.ratio = ratio
        self.register_buffer("clip", torch.tensor(float(clip)))
        self.register_buffer("clip_high", torch.tensor(float(clip_high)))

    def token_loss(self, log_pi: Tensor, log_old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        ratio = log_importance(log_pi=log_pi, log_old=log_old, mask=mask, per=self.ratio)
        return clipped_loss(
            log_pi=ratio,
            log_old=torch.zeros_like(ratio),
            advantages=advantages,
            clip=self.clip,
            clip_high=self.clip_high,
        )


class GRPO(PPOClip):
    """Group-normalised advantages, the clipped surrogate, w k3 in the loss, means of sequence means.

    penalty "loss_k3" makes it that of Shao et al. 2024, biased; aggregation "token_mean" and clip_high 0.28 DAPO's.
    """

    def __init__(
        self,
        group_size: int,
        beta: float = 0.04,
        schedule: nn.Module | None = None,
        penalty: str = "loss_k3_is",
        baseline: str = "group_normalized",
        aggregation: str = "sequence_mean",
        clip: float = 0.2,
        clip_high: float | None = None,
        ratio: str = "token",
        penalty_ratio: str = "token",
    ) -> None:
        super().__init__(
            beta, schedule, penalty, baseline, group_size, aggregation, clip, clip_high, ratio, penalty_ratio
        )


class DrGRPO(GRPO):
    """GRPO without its two normalisations: advantages keep their scale, and no token weighs less in a long answer.

    Liu et al. 2025, "Understanding R1-Zero-like training", who divide the sum over tokens by a constant length, which
    is left to the learning rate.
    """

    def __init__(
        self,
        group_size: int,
        beta: float = 0.0,
        *,
        baseline: str = "mean",
        aggregation: str = "sequence_sum",
        **options: Any,
    ) -> None:
        super().__init__(group_size, beta, baseline=baseline, aggregation=aggregation, **options)


class GSPO(GRPO):
    """GRPO on one ratio a sequence, the geometric mean of its tokens', clipped as a whole (Zheng et al. 2025)."""

    def __init__(
        self,
        group_size: int,
        beta: float = 0.0,
        *,
        clip: float = 3e-4,
        clip_high: float = 4e-4,
        ratio: str = "geometric",
        **options: Any,
    ) -> None:
        super().__init__(group_size, beta, clip=clip, clip_high=clip_high, ratio=ratio, **options)


class CISPO(GRPO):
    """GRPO's advantages on REINFORCE under a bounded weight, so that clipped tokens still teach (Chen et al. 2025).

    The weight is at most 1 + clip_high; there is no lower bound.
    """

    def __init__(
        self,
        group_size: int,
        beta: float = 0.0,
        *,
        clip_high: float = 4.0,
        aggregation: str = "token_mean",
        **options: Any,
    ) -> None:
        super().__init__(group_size, beta, clip_high=clip_high, aggregation=aggregation, **options)

    def token_loss(self, log_pi: Tensor, log_old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        log_ratio = log_importance(log_pi=log_pi, log_old=log_old, mask=mask, per=self.ratio)
        return cispo_loss(log_pi=log_pi, log_ratio=log_ratio, advantages=advantages, clip_high=self.clip_high)
