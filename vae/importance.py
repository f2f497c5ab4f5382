"""Samples of one policy, expectations of another: importance ratios and weights, and KL penalties that carry them.

Shapes: log-probabilities of sampled tokens (B, L); a mask (B, L) that is true on the tokens that the policy chose. What
stands off the mask is never read. Nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vae.errors import VAEError
from vae.kl import k1, k2, k3
from vae.precision import full_precision


def real(values: Tensor, mask: Tensor) -> Tensor:
    """values with 0 on padding, whatever stood there, and no gradient to it."""
    values = full_precision(values)
    return torch.where(mask.bool(), values, torch.zeros_like(values))


def per_sequence_mean(values: Tensor, mask: Tensor) -> Tensor:
    # A sequence without tokens has sum 0; a count of 1 makes its mean 0 and changes no other.
    return real(values, mask).sum(-1) / mask.sum(-1).clamp(min=1)


# ------------------------------------------------------------------------------------------------- importance ratios

RATIOS = ("token", "prefix", "sequence", "geometric")


def log_importance(*, log_pi: Tensor, log_old: Tensor, mask: Tensor, per: str = "token") -> Tensor:
    """log pi / pi_old at each token: (B, L), with a gradient to log_pi.

    E_old[w f] = E_pi[f] holds
        "token"      for f of this token, the past being pi_old's (PPO, GRPO);
        "prefix"     for f of all tokens up to this one: the product of their ratios;
        "sequence"   for f of the whole answer: the product over all its tokens. The noise grows with the length;
        "geometric"  for no f: its L-th root, biased, whose noise does not grow (GSPO, Zheng et al. 2025).
    Raises VAEError for another `per`.
    """
    if per not in RATIOS:
        raise VAEError(f"There is no ratio per {per!r}: choose among {', '.join(RATIOS)}.")
    log_ratio = real(full_precision(log_pi) - full_precision(log_old.detach()), mask)
    if per == "prefix":
        return log_ratio.cumsum(-1)
    if per == "sequence":
        return log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    if per == "geometric":
        return per_sequence_mean(log_ratio, mask).unsqueeze(-1).expand_as(log_ratio)
    return log_ratio


def importance_weights(
    *,
    log_pi: Tensor,
    log_old: Tensor,
    mask: Tensor,
    per: str = "token",
    cap: float = math.inf,
    beyond: str = "truncate",
) -> Tensor:
    """Ratios w = pi / pi_old without gradient, (B, L), bounded by `cap`: what a loss of another's samples is weighed by.

    beyond the cap: "truncate" to it (TIS), E_old[min(w, cap) f] = E_pi[f] - E_old[(w - cap)+ f]; "mask", weight 0
    (MIS), E_pi[f where w <= cap]. Both are biased by what they leave out, and bounded in variance for it. log_old: of the
    distribution that really drew the tokens, temperature and top-p included (`vae.token_kl.sampler_log_probs`).
    Raises VAEError for a cap that is not positive, another `per` or another `beyond`.
    """
    if not cap > 0:
        raise VAEError(f"The weights' cap must be positive, not {cap}.")
    if beyond not in ("truncate", "mask"):
        raise VAEError(f"Weights beyond the cap are 'truncate'd or 'mask'ed, not {beyond!r}.")
    weights = log_importance(log_pi=log_pi.detach(), log_old=log_old, mask=mask, per=per).exp()
    return weights.clamp(max=cap) if beyond == "truncate" else weights.masked_fill(weights > cap, 0.0)


# -------------------------------------------------------------------------------------------------- penalties in a loss


def ratio_k1(*, log_pi: Tensor, log_ref: Tensor, log_ratio: Tensor) -> Tensor:
    """w k1, the ratio w with its gradient: value and gradient unbiased for KL(pi || pi_ref); elementwise, in nats."""
    return log_ratio.exp() * k1(log_pi=log_pi, log_ref=log_ref)


def ratio_k2(*, log_pi: Tensor, log_ref: Tensor, log_ratio: Tensor) -> Tensor:
    """w k2, the ratio w held constant: biased value, unbiased gradient. With the ratio's gradient it would be neither."""
    return log_ratio.detach().exp() * k2(log_pi=log_pi, log_ref=log_ref)


def ratio_k3(*, log_pi: Tensor, log_ref: Tensor, log_ratio: Tensor) -> Tensor:
    """w k3, the ratio w with its gradient: both unbiased, never negative. With w held constant it descends the *forward*
    KL(pi_ref || pi)."""
    return log_ratio.exp() * k3(log_pi=log_pi, log_ref=log_ref)


def sequence_kl_loss(*, token_kl: Tensor, log_pi: Tensor, mask: Tensor, log_old: Tensor | None = None) -> Tensor:
    """sum_t w_t KL_t along each sampled answer, w_t the ratio of the tokens *before* t: (B,), in nats.

    token_kl: KL(pi(.|past) || pi_ref(.|past)) of the whole next-token distributions, with their gradient. Value and
    gradient are unbiased for the KL of whole sequences, and of less variance than sampled tokens': the Rao-Blackwell
    estimator of Amini et al. 2025, eq. 9 and 15. The gradient has a term for each token's own KL and, through w, one for
    how it changes what follows. log_old: of the policy that drew the answers, None if it is the present one.
    """
    log_old = log_pi.detach() if log_old is None else log_old
    log_ratio = log_importance(log_pi=log_pi, log_old=log_old, mask=mask)
    before = log_ratio.cumsum(-1) - log_ratio
    return real(before.exp() * full_precision(token_kl), mask).sum(-1)
