"""Which way round is the KL? A Gaussian fitted to a mixture both ways, a factorised one to a correlated one, and the three
Monte-Carlo estimators of KL as values and as losses. Every number has an exact answer. Seconds; nothing to download."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vae.experiment import Context
from vae.kl import GaussianMixture, k1, k2, k3, kl_gaussian_full
from vae.seeding import generator

PAPER = "Bishop 2006, figures 10.2 and 10.3; Minka 2005; Schulman 2020, Approximating KL divergence"
CLAIM = (
    "Minimising KL(p || q) covers every mode of p and KL(q || p) settles on one; as a loss, k2 descends the second and k3 "
    "the first, although both are estimates of the second."
)
SETTINGS = {form: {"seed": 0, "steps": 1500, "batch": 1000, "samples": 1_000_000} for form in ("quick", "full")}

# p = 1/2 N(-centre, sd^2) + 1/2 N(centre, sd^2), with the exact optima (mean, sd of q; KL in nats), by quadrature.
MIXTURES = {
    "far": {
        "centre": 2.0,
        "sd": 0.5,
        "forward": [(0.0, 2.0616, 0.72355)],
        "reverse": [(-1.9998, 0.5004, 0.69305), (0.0, 1.7364, 1.8712), (1.9998, 0.5004, 0.69305)],
    },
    "near": {
        "centre": 3.0,
        "sd": 1.0,
        "forward": [(0.0, 3.1623, 0.46199)],
        "reverse": [(-2.9843, 1.0234, 0.68877), (0.0, 2.7438, 0.84062), (2.9843, 1.0234, 0.68877)],
    },
}
STARTS = [(mean, sd) for sd in (0.4, 1.5, 4.0) for mean in (-4.0, -1.5, -0.2, 0.2, 1.5, 4.0)]
CORRELATIONS = (0.5, 0.9, 0.99)
SHIFTS = (0.1, 1.0)  # q = N(0, 1), p = N(shift, 1)
ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}
POSTED = {  # bias / KL, sd / KL in the post's table
    "0.1": {"k1": "0, 20", "k2": "0.002, 1.42", "k3": "0, 1.42"},
    "1.0": {"k1": "0, 2", "k2": "0.25, 1.73", "k3": "0, 1.7"},
}
DRAWN = ("near", "reverse")  # whose paths are kept for the picture
LOSS_START = (2.0, 1.6)  # mean and sd of q, from which each estimator is descended as a loss


def mixture(name: str) -> GaussianMixture:
    centre, sd = MIXTURES[name]["centre"], MIXTURES[name]["sd"]
    mean = torch.tensor([[-centre], [centre]], dtype=torch.float64)
    return GaussianMixture(torch.zeros(2, dtype=torch.float64), mean, torch.full_like(mean, 2 * math.log(sd)))


def log_normal(x: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    """log N(x; mean, exp(log_sd)^2), in nats."""
    return -0.5 * ((x - mean) * torch.exp(-log_sd)).square() - log_sd - 0.5 * math.log(2 * math.pi)


def descend(
    loss: Callable[[Tensor, Tensor], Tensor],
    starts: list[tuple[float, float]],
    steps: int,
    lr: float,
    adam: bool = True,
) -> dict:
    """Descend loss(mean, log_sd) -> (S,) from S starts at once, the learning rate falling to zero along half a cosine.

    Returns where each ended, [mean, sd], and its path in up to 60 points, most of them early.
    """
    parameters = torch.tensor(starts, dtype=torch.float64)
    parameters[:, 1] = parameters[:, 1].log()
    parameters.requires_grad_(True)
    # A short memory of squares: the first gradients, from a start far out, are a thousand times the last.
    optimizer = torch.optim.Adam([parameters], lr, betas=(0.9, 0.99)) if adam else torch.optim.SGD([parameters], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    path, kept = [], set(np.geomspace(1, steps, 60).astype(int) - 1)
    for step in range(steps):
        if step in kept:
            path.append(parameters.detach().clone())
        optimizer.zero_grad()
        loss(*parameters.unbind(-1)).sum().backward()
        optimizer.step()
        schedule.step()
    path = torch.stack([*path, parameters.detach()], 1)  # (S, T, 2)
    path[..., 1] = path[..., 1].exp()
    return {"end": path[:, -1], "path": (path * 1e3).round() / 1e3}


def forward_loss(p: GaussianMixture, batch: int, noise: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """KL(p || q) up to a constant: -E_p[log q], on samples of p. Maximum likelihood."""
    return lambda mean, log_sd: -log_normal(p.sample(batch, noise), mean, log_sd).mean(0)


def reverse_loss(p: GaussianMixture, batch: int, noise: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """KL(q || p) = E_q[log q - log p], reparameterised. Variational inference.

    The noise is spread evenly, one draw shifting all quantiles: unbiased as independent draws are, with far less variance.
    """

    def loss(mean: Tensor, log_sd: Tensor) -> Tensor:
        shift = torch.rand((), generator=noise, dtype=torch.float64)
        quantiles = (torch.arange(batch, dtype=torch.float64) + shift) / batch
        z = mean + torch.exp(log_sd) * torch.special.ndtri(quantiles).unsqueeze(-1)
        return (log_normal(z, mean, log_sd) - p.log_prob(z.unsqueeze(-1))).mean(0)

    return loss


def estimator_loss(
    estimator: Callable[..., Tensor], p: GaussianMixture, batch: int, noise: torch.Generator
) -> Callable[[Tensor, Tensor], Tensor]:
    """Mean of k1, k2 or k3 on samples of the present q, held fixed: what a policy's KL penalty in the loss does."""

    def loss(mean: Tensor, log_sd: Tensor) -> Tensor:
        with torch.no_grad():
            z = mean + torch.exp(log_sd) * torch.randn(batch, 1, generator=noise, dtype=torch.float64)
            log_ref = p.log_prob(z.unsqueeze(-1))
        return estimator(log_pi=log_normal(z, mean, log_sd), log_ref=log_ref).mean(0)

    return loss


def mean_gradient(loss: Callable[[Tensor, Tensor], Tensor], at: tuple[float, float], draws: int) -> dict[str, Tensor]:
    """The gradient of a loss in (mean, log_sd) at one point, averaged over so many draws, with its standard error."""
    here = torch.tensor([[at[0], math.log(at[1])]], dtype=torch.float64, requires_grad=True)
    drawn = torch.stack([torch.autograd.grad(loss(*here.unbind(-1)).sum(), here)[0][0] for _ in range(draws)])
    return {"mean": drawn.mean(0), "se": drawn.std(0) / math.sqrt(draws)}


def exact_gradient(direction: str, name: str, at: tuple[float, float]) -> Tensor:
    """d KL / d (mean, log_sd) of q at one point, by quadrature: KL(p || q) forward, KL(q || p) reverse."""
    here = torch.tensor([at[0], math.log(at[1])], dtype=torch.float64, requires_grad=True)
    x = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    log_p, log_q = mixture(name).log_prob(x.unsqueeze(-1)), log_normal(x, *here)
    terms = log_p.exp() * (log_p - log_q) if direction == "forward" else log_q.exp() * (log_q - log_p)
    return torch.autograd.grad(terms.sum() * (x[1] - x[0]), here)[0]


def factorised_fit(correlation: float, steps: int) -> dict[str, float]:
    """The variances of a diagonal q that minimise KL to and from a Gaussian of unit variances, and the KL attained."""
    zero = torch.zeros(2, dtype=torch.float64)
    covariance = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    directions = {
        "forward": lambda q: kl_gaussian_full(p_mean=zero, p_covariance=covariance, q_mean=zero, q_covariance=q),
        "reverse": lambda q: kl_gaussian_full(p_mean=zero, p_covariance=q, q_mean=zero, q_covariance=covariance),
    }
    fitted = {}
    for direction, divergence in directions.items():
        log_var = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([log_var], lr=0.05, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            kl = divergence(torch.diag(log_var.exp()))
            kl.backward()
            optimizer.step()
            schedule.step()
        fitted[direction] = {"variances": log_var.detach().exp(), "kl": kl.detach()}
    return fitted


def estimator_statistics(shift: float, samples: int, noise: torch.Generator) -> dict[str, dict[str, float]]:
    """Bias and sd of k1, k2, k3 on draws of q = N(0, 1) against p = N(shift, 1), each with its standard error, in nats."""
    x = torch.randn(samples, generator=noise, dtype=torch.float64)
    log_q, log_p = -0.5 * x.square(), -0.5 * (x - shift).square()
    numbers = {}
    for name, estimator in ESTIMATORS.items():
        value = estimator(log_pi=log_q, log_ref=log_p)
        sd = value.std()
        fourth = (value - value.mean()).pow(4).mean()
        numbers[name] = {
            "bias": value.mean() - shift**2 / 2,
            "bias_se": sd / math.sqrt(samples),
            "sd": sd,
            "sd_se": torch.sqrt((fourth - sd.pow(4)) / samples) / (2 * sd),  # the delta method on the variance
            "lowest": value.min(),
        }
    return numbers


def exact_statistics(shift: float) -> dict[str, tuple[float, float]]:
    """(bias, sd) of each estimator in nats, in closed form; x ~ N(0, 1) and -log r = shift^2 / 2 - shift x."""
    true = shift**2 / 2
    return {
        "k1": (0.0, shift),
        "k2": (true**2 / 2, true * math.sqrt(2 + shift**2)),
        "k3": (0.0, math.sqrt(math.expm1(shift**2) - shift**2)),
    }


def measure(context: Context) -> dict:
    seed, steps, batch, samples = (context.settings[key] for key in ("seed", "steps", "batch", "samples"))
    results: dict = {"fits": {}, "factorised": {}, "estimators": {}, "as_loss": {}}
    for name in MIXTURES:
        p = mixture(name)
        for direction, loss, lr in (("forward", forward_loss, 0.05), ("reverse", reverse_loss, 0.02)):
            noise = generator(seed, name, direction)
            fit = descend(loss(p, batch, noise), STARTS, steps, lr)
            drawn = (name, direction) == DRAWN
            results["fits"][f"{name}, {direction}"] = fit if drawn else {"end": fit["end"]}
    for correlation in CORRELATIONS:
        results["factorised"][str(correlation)] = factorised_fit(correlation, steps)
    for shift in SHIFTS:
        results["estimators"][str(shift)] = estimator_statistics(shift, samples, generator(seed, "estimators", shift))
    for name, estimator in ESTIMATORS.items():
        loss = estimator_loss(estimator, mixture("near"), 2 * batch, generator(seed, "loss", name))
        # Plain gradient descent: Adam would blow up the pure noise that k1's gradient is.
        results["as_loss"][name] = descend(loss, [LOSS_START], steps, lr=0.1, adam=False)
        results["as_loss"][name]["gradient"] = mean_gradient(loss, LOSS_START, draws=500)
    for direction in ("forward", "reverse"):
        results["as_loss"][direction] = {"gradient": exact_gradient(direction, "near", LOSS_START)}
    return results
