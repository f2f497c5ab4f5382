"""KL divergence: closed forms, both directions, Monte-Carlo estimators. Pure functions, in nats.

Every function of two distributions takes them by name, `p_...` and `q_...`, and computes
KL(p || q) = E_p[log p - log q]: p is where the average is taken, q is what p is compared with. Swapping the names is
the only way to swap the direction.

Which direction is which, for a distribution pi that is being optimised and a fixed other one:
    KL(pi || fixed)  reverse, mode-seeking    the VAE's rate, the policy penalty of RLHF
    KL(fixed || pi)  forward, mass-covering   maximum likelihood, distillation from soft targets
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vae.errors import VAEError

# ----------------------------------------------------------------------------------------------------------- Gaussians


def gaussian_kl_to_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)) of each latent dimension, in nats.

    Kingma & Welling 2014, appendix B. Shapes: mean, log_var (..., D) -> (..., D); never negative.
    """
    return 0.5 * (mean.square() + torch.expm1(log_var) - log_var)


def kl_gaussian(*, p_mean: Tensor, p_log_var: Tensor, q_mean: Tensor, q_log_var: Tensor) -> Tensor:
    """KL(N(p_mean, exp(p_log_var)) || N(q_mean, exp(q_log_var))) of each dimension of two diagonal Gaussians, in nats.

    Shapes: all (..., D), broadcast -> (..., D); sum the last axis for the KL of the joint distribution.
    """
    log_ratio = p_log_var - q_log_var
    return 0.5 * ((p_mean - q_mean).square() * torch.exp(-q_log_var) + torch.expm1(log_ratio) - log_ratio)


def kl_gaussian_full(*, p_mean: Tensor, p_covariance: Tensor, q_mean: Tensor, q_covariance: Tensor) -> Tensor:
    """KL(N(p_mean, p_covariance) || N(q_mean, q_covariance)) of two Gaussians with any covariance, in nats.

    With covariances L L': 1/2 (|Lq^-1 Lp|^2 + |Lq^-1 (mp - mq)|^2 - D) + sum log diag Lq - sum log diag Lp, so that
    no matrix is inverted. Shapes: means (..., D), covariances (..., D, D), broadcast -> (...).
    Raises VAEError where a covariance is not positive definite.
    """
    p_scale, q_scale = _cholesky("p", p_covariance), _cholesky("q", q_covariance)
    spread = torch.linalg.solve_triangular(q_scale, p_scale, upper=False).square().sum((-2, -1))
    shift = torch.linalg.solve_triangular(q_scale, (p_mean - q_mean).unsqueeze(-1), upper=False).square().sum((-2, -1))
    log_dets = q_scale.diagonal(dim1=-2, dim2=-1).log().sum(-1) - p_scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return 0.5 * (spread + shift - p_mean.shape[-1]) + log_dets


def _cholesky(side: str, covariance: Tensor) -> Tensor:
    scale, info = torch.linalg.cholesky_ex(covariance)
    if info.any():
        raise VAEError(f"{side}_covariance is not positive definite.")
    return scale


# -------------------------------------------------------------------------------------------------------- categoricals


def kl_categorical(
    *,
    p_probs: Tensor | None = None,
    p_log_probs: Tensor | None = None,
    p_logits: Tensor | None = None,
    q_probs: Tensor | None = None,
    q_log_probs: Tensor | None = None,
    q_logits: Tensor | None = None,
) -> Tensor:
    """KL(p || q) = sum_i p_i (log p_i - log q_i) of two categoricals over the last axis, in nats.

    Give each of p and q in exactly one form: probabilities, log-probabilities (both already normalised) or logits.
    0 log 0 = 0, and +inf where p has mass that q lacks; masked entries (logit -inf) get a zero gradient, never NaN.
    Prefer logits: a probability that has underflowed to 0 no longer says how small it was.
    Shapes: (..., K), broadcast over the leading axes -> (...). Raises VAEError for no form, two forms or different K.
    """
    log_p = _log_probs("p", p_probs, p_log_probs, p_logits)
    log_q = _log_probs("q", q_probs, q_log_probs, q_logits)
    return _kl_log_probs(log_p, log_q)


def jensen_shannon_categorical(
    *,
    p_probs: Tensor | None = None,
    p_log_probs: Tensor | None = None,
    p_logits: Tensor | None = None,
    q_probs: Tensor | None = None,
    q_log_probs: Tensor | None = None,
    q_logits: Tensor | None = None,
) -> Tensor:
    """Jensen-Shannon divergence 1/2 KL(p || m) + 1/2 KL(q || m), m = (p + q) / 2, in nats; symmetric, in [0, log 2].

    Lin 1991. Arguments, zeros, shapes and errors as in `kl_categorical`. Always finite; about KL(p || q) / 4 near p = q.
    """
    log_p = _log_probs("p", p_probs, p_log_probs, p_logits)
    log_q = _log_probs("q", q_probs, q_log_probs, q_logits)
    # logaddexp(-inf, -inf) is -inf, but its gradient is NaN: those entries are kept out of it.
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    log_m = torch.logaddexp(log_p.masked_fill(neither, 0.0), log_q.masked_fill(neither, 0.0)) - math.log(2)
    log_m = log_m.masked_fill(neither, -math.inf)
    return 0.5 * (_kl_log_probs(log_p, log_m) + _kl_log_probs(log_q, log_m))


def _log_probs(side: str, probs: Tensor | None, log_probs: Tensor | None, logits: Tensor | None) -> Tensor:
    if sum(form is not None for form in (probs, log_probs, logits)) != 1:
        raise VAEError(f"Give exactly one of {side}_probs, {side}_log_probs and {side}_logits.")
    if logits is not None:
        return torch.log_softmax(logits, dim=-1)
    if log_probs is not None:
        return log_probs
    # The gradient of log at 0 is infinite, and infinity times the zero it meets further on is NaN.
    zero = probs == 0
    return probs.masked_fill(zero, 1.0).log().masked_fill(zero, -math.inf)


def _kl_log_probs(log_p: Tensor, log_q: Tensor) -> Tensor:
    if log_p.shape[-1] != log_q.shape[-1]:
        raise VAEError(f"p has {log_p.shape[-1]} categories and q has {log_q.shape[-1]}.")
    log_p, log_q = torch.broadcast_tensors(log_p, log_q)
    absent = log_p == -math.inf
    uncovered = ~absent & (log_q == -math.inf)
    # Both logs are made finite before they meet: neither -inf - -inf nor 0 * inf may arise, in values or in gradients.
    log_p = log_p.masked_fill(absent, 0.0)
    log_q = log_q.masked_fill(absent | uncovered, 0.0)
    terms = (log_p.exp() * (log_p - log_q)).masked_fill(absent, 0.0)
    return terms.masked_fill(uncovered, math.inf).sum(-1)


# ----------------------------------------------------------------------------- anything with samples and a log-density


class Samplable(Protocol):
    """A distribution that can be drawn from and evaluated; the priors and `GaussianMixture` are such."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor: ...

    def log_prob(self, x: Tensor) -> Tensor: ...


class GaussianMixture(NamedTuple):
    """sum_k softmax(logits)_k N(mean_k, diag exp(log_var_k)). Shapes: logits (K,), mean and log_var (K, D)."""

    logits: Tensor
    mean: Tensor
    log_var: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """log density in nats: x (..., D) -> (...).

        The squares are expanded into matrix products, twenty times faster than a block (..., K, D) for large K; in
        float64, because the products cancel.
        """
        wide = x.dtype if x.device.type == "mps" else torch.float64  # which has no float64
        z, mean, log_var = x.to(wide), self.mean.to(wide), self.log_var.to(wide)
        precision = torch.exp(-log_var)
        squares = z.square() @ precision.T - 2 * z @ (precision * mean).T + (precision * mean.square()).sum(-1)
        of_component = -0.5 * (squares + (log_var + math.log(2 * math.pi)).sum(-1))
        return torch.logsumexp(torch.log_softmax(self.logits.to(wide), -1) + of_component, dim=-1).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws (n, D)."""
        k = torch.multinomial(torch.softmax(self.logits, -1), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.mean.shape[-1], generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean[k] + torch.exp(0.5 * self.log_var[k]) * noise


class Estimate(NamedTuple):
    """A Monte-Carlo mean and its standard error, 0-dim tensors."""

    value: Tensor
    standard_error: Tensor


def kl_monte_carlo(*, p: Samplable, q: Samplable, n: int, generator: torch.Generator) -> Estimate:
    """KL(p || q) in nats from n samples of p, for distributions without a closed form, such as Gaussian mixtures.

    The plain average of log p - log q (`k1`): unbiased, and may come out negative where the KL is within its error.
    Raises VAEError for fewer than two samples, which leave the error unknown.
    """
    if n < 2:
        raise VAEError(f"A Monte-Carlo KL needs at least two samples, not {n}.")
    x = p.sample(n, generator)
    log_ratio = p.log_prob(x) - q.log_prob(x)
    return Estimate(log_ratio.mean(), log_ratio.std() / math.sqrt(n))


# ------------------------------------------------------------------------------ estimators from samples' log-densities


def k1(*, log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """log pi(x) - log pi_ref(x) for x drawn from pi: the plain estimator of KL(pi || pi_ref), in nats, elementwise.

    Value: unbiased, of high variance, negative on every x that pi finds less likely than pi_ref does.
    In the reward (detached): the right place. E[k1 grad log pi] = grad KL(pi || pi_ref).
    As a loss, samples held fixed: useless. E[grad k1] = E[grad log pi] = 0, no signal, only noise.
    Schulman 2020, "Approximating KL divergence".
    """
    return log_pi - log_ref


def k2(*, log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """(log pi(x) - log pi_ref(x))^2 / 2 for x drawn from pi: biased, of low variance, in nats, elementwise.

    Value: never negative; its bias is of third order in the distance between pi and pi_ref.
    As a loss, samples held fixed and drawn from the present pi: the one to use.
    E[grad k2] = E[k1 grad log pi] = grad KL(pi || pi_ref), the reverse direction, exact in spite of the biased value.
    Schulman 2020.
    """
    return 0.5 * (log_pi - log_ref).square()


def k3(*, log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """(r - 1) - log r with r = pi_ref(x) / pi(x), for x drawn from pi: unbiased, never negative, in nats, elementwise.

    Value: the one to log and to steer by near pi_ref, where its variance is small. Far from it r = exp(-k1) has a heavy
    tail: one token that pi has all but ruled out can be the whole mean, and the variance may be infinite.
    As a loss, samples held fixed and drawn from the present pi: E[grad k3] = E[(1 - r) grad log pi]
    = grad KL(pi_ref || pi), the *forward*, mass-covering direction; the two directions agree to first order in the
    distance. This is the penalty of GRPO (Shao et al. 2024). Schulman 2020.
    """
    log_r = log_ref - log_pi
    return torch.expm1(log_r) - log_r


# --------------------------------------------------------------------------------------------------------------- units


def nats_to_bits(nats: Tensor | float) -> Tensor | float:
    """Nats in bits: divided by log 2."""
    return nats / math.log(2)


def bits_to_nats(bits: Tensor | float) -> Tensor | float:
    """Bits in nats: multiplied by log 2."""
    return bits * math.log(2)
