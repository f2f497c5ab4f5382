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
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from vae.errors import VAEError
from vae.precision import full_precision, scaled_square

if TYPE_CHECKING:
    from typing_extensions import Unpack


# ----------------------------------------------------------------------------------------------------------- Gaussians


def gaussian_kl_to_standard_normal(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)) of each latent dimension, in nats.

    Kingma & Welling 2014, appendix B. Shapes: mean, log_var (..., D) -> (..., D); never negative.
    """
    mean, log_var = full_precision(mean), full_precision(log_var)
    return 0.5 * (mean.square() + torch.expm1(log_var) - log_var)


def kl_gaussian(*, p_mean: Tensor, p_log_var: Tensor, q_mean: Tensor, q_log_var: Tensor) -> Tensor:
    """KL(N(p_mean, exp(p_log_var)) || N(q_mean, exp(q_log_var))) of each dimension of two diagonal Gaussians, in nats.

    Finite, with its gradients, wherever the value is, however narrow q. Shapes: all (..., D), broadcast -> (..., D); sum
    the last axis for the KL of the joint distribution.
    """
    p_mean, p_log_var, q_mean, q_log_var = map(full_precision, (p_mean, p_log_var, q_mean, q_log_var))
    log_ratio = p_log_var - q_log_var
    return 0.5 * (scaled_square(p_mean - q_mean, q_log_var) + torch.expm1(log_ratio) - log_ratio)


def kl_gaussian_full(*, p_mean: Tensor, p_covariance: Tensor, q_mean: Tensor, q_covariance: Tensor) -> Tensor:
    """KL(N(p_mean, p_covariance) || N(q_mean, q_covariance)) of two Gaussians with any covariance, in nats.

    With covariances L L' and M = Lq^-1 Lp it is 1/2 (|M|^2 + |Lq^-1 (mp - mq)|^2 - D) - sum log diag M: no matrix is
    inverted, and the diagonal's terms, (m^2 - 1 - log m^2) / 2, are never negative.
    Shapes: means (..., D), covariances (..., D, D), broadcast -> (...).
    Raises VAEError where a covariance is not positive definite.
    """
    p_mean, q_mean = full_precision(p_mean), full_precision(q_mean)
    p_scale, q_scale = _cholesky("p", p_covariance), _cholesky("q", q_covariance)
    spread = torch.linalg.solve_triangular(q_scale, p_scale, upper=False).tril(-1).square().sum((-2, -1))
    shift = torch.linalg.solve_triangular(q_scale, (p_mean - q_mean).unsqueeze(-1), upper=False).square().sum((-2, -1))
    log_ratio = 2 * (p_scale.diagonal(dim1=-2, dim2=-1).log() - q_scale.diagonal(dim1=-2, dim2=-1).log())
    return 0.5 * (spread + shift + (torch.expm1(log_ratio) - log_ratio).sum(-1))


def _cholesky(side: str, covariance: Tensor) -> Tensor:
    scale, info = torch.linalg.cholesky_ex(full_precision(covariance))
    if info.any():
        raise VAEError(f"{side}_covariance is not positive definite.")
    return scale


# -------------------------------------------------------------------------------------------------------- categoricals


class Pair(TypedDict, total=False):
    """Two categoricals over the last axis, each in exactly one form: probabilities, log-probabilities or logits.

    Probabilities that are negative or do not sum to 1 are refused; log-probabilities are taken as they are. Prefer
    logits: a probability that has underflowed to 0 no longer says how small it was. Shapes: (..., K), broadcast over
    the leading axes. Raises VAEError for no form, two forms or different K.
    """

    p_probs: Tensor
    p_log_probs: Tensor
    p_logits: Tensor
    q_probs: Tensor
    q_log_probs: Tensor
    q_logits: Tensor


def kl_categorical(**pair: Unpack[Pair]) -> Tensor:
    """KL(p || q) = sum_i p_i (log p_i - log q_i) of a `Pair`, in nats: (...,).

    Summed as p_i log(p_i / q_i) - p_i + q_i, whose terms are never negative, so that neither is the sum, and digits are
    kept near p = q. (Of log-probabilities that are not normalised it is this generalised KL.) 0 log 0 = 0, and +inf
    where p has mass that q lacks; masked entries (logit -inf) get a zero gradient, never NaN.
    """
    return _kl(*_log_probs(pair))


def jensen_shannon_categorical(*, beta: float = 0.5, scaled: bool = False, **pair: Unpack[Pair]) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) of a `Pair`, m = beta p + (1 - beta) q, in nats: (...,). Always finite inside.

    beta 1/2: Jensen-Shannon (Lin 1991), symmetric, in [0, log 2], about KL(p || q) / 4 near p = q. Other beta: that of
    GKD (Agarwal et al. 2024), which tends to 0 at both ends; at the ends themselves its authors take KL(p || q) for
    beta = 0 and KL(q || p) for 1: a jump. scaled: divided by beta (1 - beta), continuous, with the same ends.
    Raises VAEError unless 0 <= beta <= 1.
    """
    if not 0 <= beta <= 1:
        raise VAEError(f"beta, the share of p in the mixture, must lie between 0 and 1, not {beta}.")
    log_p, log_q = _log_probs(pair)
    if beta in (0, 1):
        return _kl(log_p, log_q) if beta == 0 else _kl(log_q, log_p)
    log_m = _log_mixture(log_p, log_q, beta)
    value = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return value / (beta * (1 - beta)) if scaled else value


def skewed_kl_categorical(*, alpha: float = 0.1, **pair: Unpack[Pair]) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) of a `Pair`, in nats: (...,). Between 0 and -log alpha, however little q covers.

    DistiLLM (Ko et al. 2024): with p the teacher its SKL, with p the student its SRKL. alpha 0 is KL(p || q).
    Raises VAEError unless 0 <= alpha < 1.
    """
    if not 0 <= alpha < 1:
        raise VAEError(f"alpha, the share of p in what it is compared with, must be in [0, 1), not {alpha}.")
    log_p, log_q = _log_probs(pair)
    return _kl(log_p, _log_mixture(log_p, log_q, alpha) if alpha else log_q)


def alpha_divergence_categorical(*, alpha: float, **pair: Unpack[Pair]) -> Tensor:
    """(sum_i p_i^alpha q_i^(1 - alpha) - 1) / (alpha (alpha - 1)) of a `Pair`: (...,). Never negative.

    Amari's family: alpha 1 is KL(p || q) in nats, 0 is KL(q || p), both limits; 1/2 four times the squared Hellinger
    distance, 2 half of Pearson's chi^2. Below 1 it is finite where q lacks mass of p, above 0 where p lacks q's.
    """
    log_p, log_q = _log_probs(pair)
    if alpha in (0, 1):
        return _kl(log_p, log_q) if alpha == 1 else _kl(log_q, log_p)
    no_p, no_q = log_p == -math.inf, log_q == -math.inf
    log_p, log_q = log_p.masked_fill(no_p, 0.0), log_q.masked_fill(no_q, 0.0)
    p, q, d = log_p.exp(), log_q.exp(), log_q - log_p
    # Less alpha p + (1 - alpha) q, which sums to 1, each term has the divergence's sign. In units of the larger of p and
    # q, nothing overflows that should not.
    lower, higher = d.clamp(max=0.0), d.clamp(min=0.0)
    of_p = p * (torch.expm1((1 - alpha) * lower) - (1 - alpha) * torch.expm1(lower))
    of_q = q * (torch.expm1(-alpha * higher) - alpha * torch.expm1(-higher))
    terms = torch.where(d <= 0, of_p, of_q) / (alpha * (alpha - 1))
    terms = torch.where(no_p, q / alpha if alpha > 0 else torch.full_like(q, math.inf), terms.clamp(min=0.0))
    terms = torch.where(no_q, p / (1 - alpha) if alpha < 1 else torch.full_like(p, math.inf), terms)
    return terms.masked_fill(no_p & no_q, 0.0).sum(-1)


def total_variation_categorical(**pair: Unpack[Pair]) -> Tensor:
    """1/2 sum_i |p_i - q_i| of a `Pair`: (...,), in [0, 1]; at most sqrt(KL / 2) either way (Pinsker)."""
    log_p, log_q = _log_probs(pair)
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def _log_probs(pair: Pair) -> tuple[Tensor, Tensor]:
    """log p and log q, broadcast to one shape (..., K)."""
    if unknown := set(pair) - set(Pair.__annotations__):
        raise TypeError(f"{', '.join(sorted(unknown))}: two categoricals are {', '.join(Pair.__annotations__)}.")
    log_p, log_q = (
        _log_probs_of(side, *(pair.get(f"{side}_{form}") for form in ("probs", "log_probs", "logits"))) for side in "pq"
    )
    if log_p.shape[-1] != log_q.shape[-1]:
        raise VAEError(f"p has {log_p.shape[-1]} categories and q has {log_q.shape[-1]}.")
    return torch.broadcast_tensors(log_p, log_q)


def _log_probs_of(side: str, probs: Tensor | None, log_probs: Tensor | None, logits: Tensor | None) -> Tensor:
    if sum(form is not None for form in (probs, log_probs, logits)) != 1:
        raise VAEError(f"Give exactly one of {side}_probs, {side}_log_probs and {side}_logits.")
    if logits is not None:
        return torch.log_softmax(full_precision(logits), dim=-1)
    if log_probs is not None:
        return full_precision(log_probs)
    tolerance = 1e-3 if probs.dtype in (torch.float32, torch.float64) else 1e-2
    probs = full_precision(probs)
    off = (probs.detach().sum(-1) - 1).abs()
    if (off > tolerance).any() or (probs < 0).any():
        raise VAEError(
            f"{side}_probs are no probabilities: they must not be negative, and sum to 1 over the last axis (some are off "
            f"by {off.max():.3g}). Divide by their sum, or give logits."
        )
    # The gradient of log at 0 is infinite, and infinity times the zero it meets further on is NaN.
    zero = probs == 0
    return probs.masked_fill(zero, 1.0).log().masked_fill(zero, -math.inf)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), 0 < share < 1."""
    # logaddexp(-inf, -inf) is -inf, but its gradient is NaN: those entries are kept out of it.
    neither = (log_p == -math.inf) & (log_q == -math.inf)
    log_p, log_q = (log.masked_fill(neither, 0.0) for log in (log_p, log_q))
    log_m = torch.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))
    return log_m.masked_fill(neither, -math.inf)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    no_p, no_q = log_p == -math.inf, log_q == -math.inf
    # Both logs are made finite before they meet: neither -inf - -inf nor 0 * inf may arise, in values or in gradients.
    log_p, log_q = log_p.masked_fill(no_p, 0.0), log_q.masked_fill(no_q, 0.0)
    p, q, d = log_p.exp(), log_q.exp(), log_q - log_p
    small = d.clamp(max=1.0)  # beyond, p expm1(d) may overflow where q does not, and nothing cancels
    terms = torch.where(d < 1, p * (torch.expm1(small) - small).clamp(min=0.0), q - p - p * d)
    terms = torch.where(no_p, q, terms).masked_fill(no_q & ~no_p, math.inf)
    return terms.masked_fill(no_p & no_q, 0.0).sum(-1)


# ----------------------------------------------------------------------------- anything with samples and a log-density


class Samplable(Protocol):
    """A distribution that can be drawn from and evaluated; the priors and `GaussianMixture` are such."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor: ...

    def log_prob(self, x: Tensor) -> Tensor: ...


MOST_IN_VMAP = 64  # components: a block of more is slower than each mixture by itself


class GaussianMixture(NamedTuple):
    """sum_k softmax(logits)_k N(mean_k, diag exp(log_var_k)). Shapes: logits (K,), mean and log_var (K, D)."""

    logits: Tensor
    mean: Tensor
    log_var: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        """log density in nats: x (..., D) -> (...).

        The squares are expanded into matrix products, twenty times faster than a block (..., K, D) for large K; in
        float64, because the products cancel. Where they would cancel to less than 1e-6 nats, the block is made; so it is
        under torch.vmap, which takes up to MOST_IN_VMAP components.
        """
        wide = x.dtype if x.device.type == "mps" else torch.float64  # which has no float64
        z, mean, log_var = x.to(wide), self.mean.to(wide), self.log_var.to(wide)
        precision = torch.exp(-log_var)
        furthest = z.detach().abs().reshape(-1, z.shape[-1]).amax(0) if z.numel() else z.new_zeros(z.shape[-1])
        largest = (precision * (furthest + mean.abs()).square()).detach().sum(-1).amax()
        try:
            cancels = not bool(largest * torch.finfo(wide).eps < 1e-6)  # a NaN does
        except RuntimeError:  # of torch.vmap, under which no branch may look at a value
            if len(mean) > MOST_IN_VMAP:
                raise
            cancels = True
        if not cancels:
            squares = z.square() @ precision.T - 2 * z @ (precision * mean).T + (precision * mean.square()).sum(-1)
        else:
            squares = scaled_square(z.unsqueeze(-2) - mean, log_var).sum(-1)
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
    As a loss, samples held fixed: useless. E[grad k1] = E[grad log pi] = 0, no signal, only noise. With its importance
    ratio it is exact: `vae.importance.ratio_k1`. Schulman 2020, "Approximating KL divergence".
    """
    return full_precision(log_pi) - full_precision(log_ref)


def k2(*, log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """(log pi(x) - log pi_ref(x))^2 / 2 for x drawn from pi: biased, of low variance, in nats, elementwise.

    Value: never negative; its bias is of third order in the distance between pi and pi_ref.
    As a loss, samples held fixed and drawn from the present pi: the one to use.
    E[grad k2] = E[k1 grad log pi] = grad KL(pi || pi_ref), the reverse direction, exact in spite of the biased value.
    Of samples that another policy drew, biased: `vae.importance.ratio_k2`. Schulman 2020.
    """
    return 0.5 * k1(log_pi=log_pi, log_ref=log_ref).square()


def k3(*, log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """(r - 1) - log r with r = pi_ref(x) / pi(x), for x drawn from pi: unbiased, never negative, in nats, elementwise.

    Value: the one to log and to steer by near pi_ref, where its variance is small. Far from it r = exp(-k1) has a heavy
    tail: one token that pi has all but ruled out can be the whole mean, and the variance may be infinite.
    As a loss, samples held fixed and drawn from the present pi: E[grad k3] = E[(1 - r) grad log pi]
    = grad KL(pi_ref || pi), the *forward*, mass-covering direction; the two directions agree to first order in the
    distance. This is the penalty of GRPO (Shao et al. 2024). With its importance ratio it is exact for the reverse
    direction, on-policy and off: `vae.importance.ratio_k3`. Schulman 2020.
    """
    log_r = -k1(log_pi=log_pi, log_ref=log_ref)
    return torch.expm1(log_r) - log_r


# --------------------------------------------------------------------------------------------------------------- units


def nats_to_bits(nats: Tensor | float) -> Tensor | float:
    """Nats in bits: divided by log 2."""
    return nats / math.log(2)


def bits_to_nats(bits: Tensor | float) -> Tensor | float:
    """Bits in nats: multiplied by log 2."""
    return bits * math.log(2)
