"""Two worlds in which reward over-optimisation can be worked out by hand.

The Gaussian: pi_0 = N(0, I), a proxy w'x with |w| = 1, and a gold reward a w'x - b (w'x)^2 / 2. What maximises
E[proxy] - beta KL(pi || pi_0) is N(w / beta, I). With d = sqrt(KL) it has beta = 1 / (sqrt(2) d), proxy sqrt(2) d and a
gold gain of a sqrt(2) d - b d^2, which peaks at d = a / (sqrt(2) b).

The arms: a categorical pi_0, a gold reward an arm, and a proxy learnt from pairs that were compared. All is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_ndtr
from torch import Tensor

from vae.gaussian import DiagonalGaussian
from vae.kl import gaussian_kl_to_standard_normal, kl_categorical
from vae.policy import PolicyObjective, PPOClip

# --- the Gaussian -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianToy:
    """The rewards' coefficients a and b, and the dimension of x."""

    a: float
    b: float
    dim: int

    def frontier(self, distance: float) -> dict[str, float]:
        """The best that any policy does at KL = distance^2 nats; gold is the gain over pi_0."""
        return {
            "kl": distance**2,
            "proxy": math.sqrt(2) * distance,
            "gold": self.a * math.sqrt(2) * distance - self.b * distance**2,
        }

    @property
    def peak(self) -> tuple[float, float]:
        """(distance, gold gain) beyond which more of the proxy is less of the gold."""
        return self.a / (math.sqrt(2) * self.b), self.a**2 / (2 * self.b)

    def measured(self, policy: DiagonalGaussian, w: Tensor) -> dict[str, float]:
        """KL in nats, E[proxy] and the gain in E[gold] of a Gaussian policy, exactly."""
        m, variance = policy.mean @ w, policy.log_var.exp() @ w.square()
        return {
            "kl": gaussian_kl_to_standard_normal(*policy).sum().item(),
            "proxy": m.item(),
            "gold": (self.a * m - self.b * (m.square() + variance - 1) / 2).item(),
        }

    def best_of(self, n: int) -> dict[str, float]:
        """Of n draws of pi_0 the one of highest proxy; its moments by quadrature."""
        first, second = normal_maximum(n)
        return {"kl": best_of_n_kl(n), "proxy": first, "gold": self.a * first - self.b * (second - 1) / 2}


def tune(
    toy: GaussianToy, objective: PolicyObjective, steps: int, batch: int, lr: float, noise: torch.Generator
) -> dict:
    """Mean and log-variance learnt from samples and their proxy reward alone, from pi_0 on, Adam falling along a cosine.

    PPOClip takes four steps on each batch, REINFORCE one; `steps` counts them all.
    """
    w = F.normalize(torch.randn(toy.dim, generator=noise, dtype=torch.float64), dim=0)
    mean, log_var = torch.zeros(2, toy.dim, dtype=torch.float64).unbind()
    policy = DiagonalGaussian(mean.requires_grad_(), log_var.requires_grad_())
    reference = DiagonalGaussian(torch.zeros_like(mean), torch.zeros_like(mean))
    optimizer = torch.optim.Adam(policy, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    mask = torch.ones(batch, 1, dtype=torch.bool)
    uses = 4 if isinstance(objective, PPOClip) else 1
    for step in range(steps):
        if step % uses == 0:
            x = policy.rsample(noise, (batch,)).detach()
            log_old = policy.log_prob(x).detach()[:, None] if uses > 1 else None
        terms = objective(
            rewards=x @ w,
            log_pi=policy.log_prob(x)[:, None],
            log_ref=reference.log_prob(x)[:, None],
            mask=mask,
            step=step,
            log_old=log_old,
        )
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        schedule.step()
    return toy.measured(DiagonalGaussian(*(p.detach() for p in policy)), w)


GRID = np.linspace(-9.0, 12.0, 42_001)


def normal_maximum(n: int) -> tuple[float, float]:
    """E[max] and E[max^2] of n standard normals; the density of the maximum is n phi Phi^(n - 1)."""
    log_density = math.log(n) - 0.5 * (GRID**2 + math.log(2 * math.pi)) + (n - 1) * log_ndtr(GRID)
    weight = np.exp(log_density) * (GRID[1] - GRID[0])
    return float(weight @ GRID), float(weight @ GRID**2)


def best_of_n_kl(n: int) -> float:
    """KL in nats of the best of n draws from what they are drawn from: exact without ties, a bound with them."""
    return math.log(n) - (n - 1) / n


def gain_of_log_gold(distance: float, a: float, b: float) -> float:
    """E[gold] on the Gaussian's frontier for another gold, a u - b u log|u| with u = w'x, by quadrature.

    What the proxy misses grows more slowly here than the square does; pi_0 itself has E[gold] = 0 by symmetry.
    """
    u = np.linspace(-9.0, 9.0, 36_000) + math.sqrt(2) * distance  # an even number: u = 0 is not among them
    weight = np.exp(-0.5 * (u - math.sqrt(2) * distance) ** 2) / math.sqrt(2 * math.pi) * (u[1] - u[0])
    return float(weight @ (a * u - b * u * np.log(np.abs(u))))


# --- the two forms of Gao et al. --------------------------------------------------------------------------------------

FORMS = {"bon": lambda d: d**2, "rl": lambda d: d * np.log(d)}  # R = alpha d - beta FORM(d)


def fit(distance: np.ndarray, gold: np.ndarray) -> dict[str, dict[str, float]]:
    """Least squares of d (alpha - beta d) and d (alpha - beta log d), and the R^2 of each. Every d positive."""
    distance, gold = np.asarray(distance), np.asarray(gold)
    fits = {}
    for name, form in FORMS.items():
        features = np.stack([distance, -form(distance)], axis=1)
        (alpha, beta), *_ = np.linalg.lstsq(features, gold, rcond=None)
        residual = gold - features @ (alpha, beta)
        r2 = 1 - (residual**2).sum() / ((gold - gold.mean()) ** 2).sum()
        fits[name] = {"alpha": float(alpha), "beta": float(beta), "r2": float(r2)}
    return fits


def fitted(form: str, coefficients: dict[str, float], distance: np.ndarray) -> np.ndarray:
    """What a fit says at these distances."""
    return coefficients["alpha"] * distance - coefficients["beta"] * FORMS[form](distance)


# --- the arms ---------------------------------------------------------------------------------------------------------


def bradley_terry(winner: Tensor, loser: Tensor, arms: int, prior_precision: float) -> Tensor:
    """A reward an arm (arms,) from pairs that were compared, P(i beats j) = sigmoid(r_i - r_j), with a Gaussian prior."""
    reward = torch.zeros(arms, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([reward], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.softplus(reward[loser] - reward[winner]).sum() + 0.5 * prior_precision * reward.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return reward.detach()


def tilted(log_ref: Tensor, reward: Tensor, betas: Tensor) -> Tensor:
    """log of pi_0 exp(reward / beta), normalised: the optimum at each beta, (B, arms)."""
    return torch.log_softmax(log_ref + reward / betas[:, None], dim=-1)


def best_of_n_arms(log_ref: Tensor, reward: Tensor, n: int) -> Tensor:
    """log-probabilities (arms,) of the arm that the best of n draws of pi_0 is: F_k^n - F_(k-1)^n in order of reward."""
    order = reward.argsort()
    log_cdf = torch.logcumsumexp(log_ref[order], 0)
    log_cdf = log_cdf - log_cdf[-1]
    below = torch.cat([torch.full_like(log_cdf[:1], -math.inf), log_cdf[:-1]])
    log_probs = torch.empty_like(log_ref)
    log_probs[order] = n * log_cdf + torch.log(-torch.expm1(n * (below - log_cdf)))
    return log_probs


def on_arms(log_probs: Tensor, log_ref: Tensor, **rewards: Tensor) -> dict[str, Tensor]:
    """KL(pi || pi_0) in nats and the mean of each reward, of policies (..., arms)."""
    kl = kl_categorical(p_log_probs=log_probs, q_log_probs=log_ref)
    return {"kl": kl, **{name: (log_probs.exp() * reward).sum(-1) for name, reward in rewards.items()}}


def slope_errors(log_ref: Tensor, reward: Tensor, betas: Tensor, width: float = 1e-4) -> Tensor:
    """|d E[r] / d KL / beta - 1| along the frontier at each beta, by central differences in log beta."""
    ends = [on_arms(tilted(log_ref, reward, betas * math.exp(h)), log_ref, r=reward) for h in (width, -width)]
    return ((ends[0]["r"] - ends[1]["r"]) / (ends[0]["kl"] - ends[1]["kl"]) / betas - 1).abs()


@dataclass(frozen=True)
class ArmsWorld:
    """Gold rewards N(0, 1), centred under pi_0, whose logits are N(0, spread^2)."""

    log_ref: Tensor
    gold: Tensor

    @classmethod
    def draw(cls, arms: int, spread: float, noise: torch.Generator) -> ArmsWorld:
        gold, logits = torch.randn(2, arms, generator=noise, dtype=torch.float64)
        log_ref = torch.log_softmax(spread * logits, 0)
        return cls(log_ref, gold - log_ref.exp() @ gold)

    def proxy(self, comparisons: int, prior_precision: float, noise: torch.Generator) -> Tensor:
        """Learnt from pairs drawn from pi_0, of which the better wins by sigmoid of the gold difference."""
        pairs = torch.multinomial(self.log_ref.exp(), 2 * comparisons, replacement=True, generator=noise)
        i, j = pairs.view(2, comparisons)
        wins = torch.rand(comparisons, generator=noise, dtype=torch.float64) < torch.sigmoid(
            self.gold[i] - self.gold[j]
        )
        reward = bradley_terry(torch.where(wins, i, j), torch.where(wins, j, i), len(self.gold), prior_precision)
        return reward - self.log_ref.exp() @ reward
