"""Every estimator of KL(pi || pi_ref) in every place that trainers put it: value, reward or loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from experiments.kl_estimators_off_policy.enumeration import Policies, World
from vae.importance import log_importance, ratio_k1, ratio_k2, ratio_k3, real, sequence_kl_loss
from vae.kl import k1, k2, k3


class Answers(NamedTuple):
    """All answers of a world: log-probabilities (N, L) with their gradient, mask, next-token KL (N, L)."""

    log_pi: Tensor
    log_ref: Tensor
    log_old: Tensor
    mask: Tensor
    token_kl: Tensor

    @classmethod
    def of(cls, world: World, policies: Policies) -> Answers:
        logs = [world.log_probs(logits) for logits in (policies.pi, policies.ref, policies.old)]
        return cls(*logs, world.mask, world.token_kl(policies.pi, policies.ref))

    def log_ratio(self, per: str) -> Tensor:
        return log_importance(log_pi=self.log_pi, log_old=self.log_old, mask=self.mask, per=per)

    def sum(self, tokens: Tensor) -> Tensor:
        return real(tokens, self.mask).sum(-1)


class Estimator(NamedTuple):
    """of: answers -> what is logged (a value) or descended (a reward's surrogate, a loss), (N,). used: by whom."""

    name: str
    place: str
    of: Callable[[Answers], Tensor]
    used: str
    in_vae: str = ""


def _plain(estimator: Callable[..., Tensor]) -> Callable[[Answers], Tensor]:
    return lambda a: a.sum(estimator(log_pi=a.log_pi, log_ref=a.log_ref))


def _ratio(estimator: Callable[..., Tensor], per: str) -> Callable[[Answers], Tensor]:
    return lambda a: a.sum(estimator(log_pi=a.log_pi, log_ref=a.log_ref, log_ratio=a.log_ratio(per)))


def _in_reward(estimator: Callable[..., Tensor], per: str, present: bool) -> Callable[[Answers], Tensor]:
    """The cost of a whole answer by the estimator, of the present policy or of the one that drew, held constant, under the
    surrogate that policy gradients descend: w cost."""

    def surrogate(a: Answers) -> Tensor:
        cost = a.sum(estimator(log_pi=a.log_pi if present else a.log_old, log_ref=a.log_ref)).detach()
        weight = a.log_ratio(per).exp()
        # one ratio an answer is counted once, a token's ratio at each token
        return cost * (weight[:, 0] if per == "sequence" else a.sum(weight))

    return surrogate


def _reward_to_go(a: Answers) -> Tensor:
    """k1 of this token and of those after it, the future weighed by its own ratios: the score of each token times the cost
    that it can change."""
    weight = a.log_ratio("sequence").detach().exp()
    cost = real(k1(log_pi=a.log_pi, log_ref=a.log_ref), a.mask).detach()
    return a.sum(weight * cost.flip(-1).cumsum(-1).flip(-1) * a.log_pi)


ESTIMATORS = [
    Estimator("k1", "value", _plain(k1), "TRL's PPO (objective/kl) and RLOO", "k1"),
    Estimator("k2", "value", _plain(k2), "", "k2"),
    Estimator("k3", "value", _plain(k3), "TRL's GRPO, verl, SkyRL", "k3"),
    Estimator("w k1, w of a token", "value", _ratio(ratio_k1, "token"), "", "ratio_k1"),
    Estimator("w k3, w of a token", "value", _ratio(ratio_k3, "token"), "", "ratio_k3"),
    Estimator("w k1, w of the prefix", "value", _ratio(ratio_k1, "prefix"), "", "ratio_k1"),
    Estimator("w k3, w of the prefix", "value", _ratio(ratio_k3, "prefix"), "", "ratio_k3"),
    Estimator("sum of exact next-token KLs", "value", lambda a: a.sum(a.token_kl), "", "token_kl"),
    Estimator(
        "exact next-token KLs, w of the past",
        "value",
        lambda a: sequence_kl_loss(token_kl=a.token_kl, log_pi=a.log_pi, mask=a.mask, log_old=a.log_old),
        "Amini et al. 2025 (on-policy)",
        "sequence_kl_loss",
    ),
    Estimator(
        "k1 of the sampler, w of a token",
        "reward",
        _in_reward(k1, "token", False),
        "InstructGPT; PPO in TRL, OpenRLHF, verl",
        "reward",
    ),
    Estimator("k1 of pi, w of a token", "reward", _in_reward(k1, "token", True), "", "reward_is"),
    Estimator(
        "k1 of the sampler, w of the answer", "reward", _in_reward(k1, "sequence", False), "TRL's RLOO", "reward"
    ),
    Estimator("k1 of pi, w of the answer", "reward", _in_reward(k1, "sequence", True), "", "reward_is"),
    Estimator("k1 of pi to go, w of the answer", "reward", _reward_to_go, "MiniLLM (on-policy)", "distillation_reward"),
    Estimator("k3 of pi, w of the answer", "reward", _in_reward(k3, "sequence", True), "", ""),
    Estimator("k1", "loss", _plain(k1), "", ""),
    Estimator("k2", "loss", _plain(k2), "REINFORCE++ in OpenRLHF, SkyRL; verl's k3+", "loss_k2"),
    Estimator("k3", "loss", _plain(k3), "GRPO (Shao et al. 2024); TRL, verl, SkyRL by default", "loss_k3"),
    Estimator("w k1, w of a token", "loss", _ratio(ratio_k1, "token"), "", "loss_k1_is"),
    Estimator("w k2, w of a token, held", "loss", _ratio(ratio_k2, "token"), "Liu et al. 2025", "loss_k2_is"),
    Estimator(
        "w k2, w of a token, not held",
        "loss",
        lambda a: a.sum(a.log_ratio("token").exp() * k2(log_pi=a.log_pi, log_ref=a.log_ref)),
        "",
        "",
    ),
    Estimator(
        "w k3, w of a token",
        "loss",
        _ratio(ratio_k3, "token"),
        "DeepSeek-V3.2; TRL's GRPO with use_bias_correction_kl",
        "loss_k3_is",
    ),
    Estimator(
        "w k3, w of a token, held",
        "loss",
        lambda a: a.sum(ratio_k3(log_pi=a.log_pi, log_ref=a.log_ref, log_ratio=a.log_ratio("token").detach())),
        "",
        "",
    ),
    Estimator("exact next-token KL", "loss", lambda a: a.sum(a.token_kl), "GKD (on-policy distillation)", "loss_exact"),
    Estimator("w k1, w of the prefix", "loss", _ratio(ratio_k1, "prefix"), "", "loss_k1_is, prefix"),
    Estimator("w k2, w of the prefix, held", "loss", _ratio(ratio_k2, "prefix"), "", "loss_k2_is, prefix"),
    Estimator("w k3, w of the prefix", "loss", _ratio(ratio_k3, "prefix"), "", "loss_k3_is, prefix"),
    Estimator(
        "exact next-token KL, w of the past",
        "loss",
        lambda a: sequence_kl_loss(token_kl=a.token_kl, log_pi=a.log_pi, mask=a.mask, log_old=a.log_old),
        "Amini et al. 2025 (on-policy)",
        "loss_exact, prefix",
    ),
]
