"""Annealed importance sampling with Hamiltonian Monte Carlo: log p(x) without the encoder, between two bounds.

Wu, Burda, Salakhutdinov & Grosse 2017, "On the quantitative analysis of decoder-based generative models". Chains walk
from the prior to the posterior p(z) p(x|z)^beta, beta = 0 .. 1; their mean weight is an unbiased estimate of p(x), so
that its log is a stochastic lower bound on log p(x). On images that the model itself made, an exact posterior sample is
known; chains walked back from it give an unbiased estimate of 1 / p(x), hence an upper bound: BDMC (Grosse et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vae.data.images import Batch
from vae.errors import VAEError
from vae.evaluation.likelihood import by_label
from vae.evaluation.work import no_tick
from vae.model import VAE
from vae.precision import widest
from vae.seeding import generator

SCHEDULE_DELTA = 4.0  # beta_t is a sigmoid between -4 and 4, rescaled to [0, 1], as in the code of Wu et al. 2017
TARGET_ACCEPTANCE = 0.65  # optimal for HMC in high dimension (Neal 2011)
FIRST_STEP = 0.5  # in units of the prior's scale, where the tuning pass begins
ADAPTATION_RATE = 0.1  # of the log step size, times acceptance less its target


def sigmoid_schedule(temperatures: int) -> Tensor:
    """beta_0 = 0 < ... < beta_T = 1, (T + 1,), float64: dense at both ends. Raises VAEError for none."""
    if temperatures < 1:
        raise VAEError(f"AIS needs at least one temperature, not {temperatures}.")
    t = torch.sigmoid(SCHEDULE_DELTA * torch.linspace(-1, 1, temperatures + 1, dtype=torch.float64))
    return (t - t[0]) / (t[-1] - t[0])


class Chains(NamedTuple):
    """C chains for each of B images, and what is known where they stand: z and the gradients (C, B, D), the rest (C, B)."""

    z: Tensor
    log_prior: Tensor
    log_likelihood: Tensor
    grad_prior: Tensor
    grad_likelihood: Tensor

    def log_f(self, beta: float) -> Tensor:
        """log p(z) + beta log p(x|z): the unnormalised target at inverse temperature beta."""
        return self.log_prior + beta * self.log_likelihood

    def grad(self, beta: float) -> Tensor:
        return self.grad_prior + beta * self.grad_likelihood


@torch.enable_grad()
def chains_at(vae: VAE, x: Tensor, y: Tensor | None, z: Tensor) -> Chains:
    """Evaluate both densities and their gradients at z (C, B, D)."""
    z = z.detach().requires_grad_()
    log_prior, log_likelihood = vae.prior.log_prob(z), vae.likelihood.log_prob(vae.decode(z, y, x), x)
    (grad_prior,) = torch.autograd.grad(log_prior.sum(), z)
    (grad_likelihood,) = torch.autograd.grad(log_likelihood.sum(), z)
    return Chains(z.detach(), log_prior.detach(), log_likelihood.detach(), grad_prior, grad_likelihood)


def hmc(
    vae: VAE,
    x: Tensor,
    y: Tensor | None,
    chains: Chains,
    beta: float,
    step: Tensor,
    leapfrogs: int,
    generator: torch.Generator,
) -> tuple[Chains, Tensor]:
    """One transition that leaves p(z) p(x|z)^beta invariant, and its probability of acceptance (C, B).

    Neal 2011, Figure 2, with unit masses; step: of each image, (B,).
    """
    step = step.unsqueeze(-1)
    start = torch.randn(chains.z.shape, generator=generator, device=chains.z.device, dtype=chains.z.dtype)
    new, momentum = chains, start
    for _ in range(leapfrogs):
        momentum = momentum + 0.5 * step * new.grad(beta)
        new = chains_at(vae, x, y, new.z + step * momentum)
        momentum = momentum + 0.5 * step * new.grad(beta)
    log_ratio = new.log_f(beta) - chains.log_f(beta) - 0.5 * (momentum.square() - start.square()).sum(-1)
    probability = log_ratio.clamp(max=0).exp().nan_to_num(nan=0.0)  # a trajectory that diverged is rejected
    uniform = torch.rand(probability.shape, generator=generator, device=step.device, dtype=probability.dtype)
    accept = uniform < probability
    kept = (
        torch.where(accept if a.ndim == 2 else accept.unsqueeze(-1), a, b) for a, b in zip(new, chains, strict=True)
    )
    return Chains(*kept), probability


def tuning_temperatures(temperatures: int) -> int:
    """Of the annealing run that step sizes come from: a tenth as many, at least 100."""
    return max(100, temperatures // 10)


def tuned_steps(
    vae: VAE,
    x: Tensor,
    y: Tensor | None,
    betas: Tensor,
    chains: int,
    leapfrogs: int,
    generator: torch.Generator,
    tick: Callable[[], None] = no_tick,
) -> Tensor:
    """A step size for each temperature and image, (T + 1, B), from a shorter annealing run of its own.

    There the step of each image follows the mean acceptance of its chains towards TARGET_ACCEPTANCE. The run that
    is weighed takes these as given: adapting along the way would make a chain's moves depend on its past, and its weight
    biased.
    """
    tuning = sigmoid_schedule(tuning_temperatures(len(betas) - 1)).tolist()
    state = chains_at(vae, x, y, _draw_prior(vae, chains, len(x), generator))
    log_step = torch.full((len(x),), math.log(FIRST_STEP), device=x.device, dtype=x.dtype)
    found = [log_step]
    for beta in tuning[1:]:
        state, acceptance = hmc(vae, x, y, state, beta, log_step.exp(), leapfrogs, generator)
        log_step = log_step + ADAPTATION_RATE * (acceptance.mean(0) - TARGET_ACCEPTANCE)
        found.append(log_step)
        tick()
    nearest = torch.searchsorted(torch.tensor(tuning, dtype=betas.dtype), betas).clamp(max=len(tuning) - 1)
    return torch.stack(found)[nearest.to(x.device)].exp()


def anneal(
    vae: VAE,
    x: Tensor,
    y: Tensor | None,
    z: Tensor,
    betas: Tensor,
    steps: Tensor,
    leapfrogs: int,
    generator: torch.Generator,
    tick: Callable[[], None] = no_tick,
) -> tuple[Tensor, Tensor]:
    """Walk chains z (C, B, D), exact draws at betas[0], to betas[-1]: log weights (C, B), mean acceptance (B,).

    Neal 2001: at each temperature first the weight, p(x|z)^(beta' - beta), then an HMC transition at beta'; none at the
    last. Run with the temperatures reversed, this is the same chain backwards.
    """
    state = chains_at(vae, x, y, z)
    log_w = torch.zeros(z.shape[:2], device=z.device, dtype=widest(z.device))
    acceptance = torch.zeros(z.shape[1], device=z.device, dtype=widest(z.device))
    betas = betas.tolist()
    for t in range(1, len(betas)):
        log_w += (betas[t] - betas[t - 1]) * state.log_likelihood
        if t < len(betas) - 1:
            state, probability = hmc(vae, x, y, state, betas[t], steps[t], leapfrogs, generator)
            acceptance += probability.mean(0)
        tick()
    return log_w, acceptance / max(1, len(betas) - 2)


def _draw_prior(vae: VAE, chains: int, images: int, generator: torch.Generator) -> Tensor:
    return vae.prior.sample(chains * images, generator).unflatten(0, (chains, images))


@torch.no_grad()
def log_likelihood_ais(
    vae: VAE,
    batch: Batch,
    temperatures: int = 1000,
    chains: int = 16,
    leapfrogs: int = 10,
    max_decodes: int = 20_000,
    tick: Callable[[], None] = no_tick,
) -> Tensor:
    """A stochastic lower bound on log p(x) of each image, (B,), float64, in nats; it tightens with `temperatures`.

    Of a model that is given labels, on log p(x|y).

    Any prior, posterior and likelihood: only p(z) and p(x|z) are used, and they must be differentiable in z. Cost: about
    1.1 * temperatures * leapfrogs passes of the decoder and back for each of `chains`; `max_decodes` bounds memory.
    """
    betas = sigmoid_schedule(temperatures)
    noise = generator(batch.seed, "ais", device=batch.x.device)
    bounds = []
    for part in _parts(batch, chains, max_decodes):
        steps = tuned_steps(vae, part.x, part.y, betas, chains, leapfrogs, noise, tick)
        z = _draw_prior(vae, chains, len(part.x), noise)
        log_w, _ = anneal(vae, part.x, part.y, z, betas, steps, leapfrogs, noise, tick)
        bounds.append(log_w.logsumexp(0) - math.log(chains))
    return torch.cat(bounds)


def _parts(batch: Batch, chains: int, max_decodes: int) -> list[Batch]:
    size = max(1, max_decodes // chains)
    ys = [None] * len(batch.x) if batch.y is None else batch.y.split(size)
    return [batch._replace(x=x, y=y) for x, y in zip(batch.x.split(size), ys, strict=False)]


def ticks(images: int, temperatures: int, chains: int, walks: int = 1, max_decodes: int = 20_000) -> int:
    """How often AIS ticks that walks its chains so many times: 1 in `log_likelihood_ais`, 2 in `sandwich`."""
    parts = math.ceil(images / max(1, max_decodes // chains))
    return parts * (tuning_temperatures(temperatures) + walks * temperatures)


def nll_ais(
    vae: VAE,
    batch: Batch,
    temperatures: int = 1000,
    chains: int = 16,
    leapfrogs: int = 10,
    tick: Callable[[], None] = no_tick,
) -> dict[str, float]:
    """nll_aisT: -log p(x) by AIS with T temperatures, nats per image, with half its 95% interval over images.

    Names are those of `by_label`: where the model sums its label out, AIS is run with every label in turn.
    """
    found = by_label(
        lambda batch: log_likelihood_ais(vae, batch, temperatures, chains, leapfrogs, tick=tick), vae, batch
    )
    metrics = {}
    for given, bound in found.items():
        name = f"nll_ais{temperatures}{given}"
        metrics |= {name: -bound.mean().item(), f"{name}_ci95": half_interval(bound)}
    return metrics


class Sandwich(NamedTuple):
    """Images that the model made, x (n, C, H, W), and bounds on their log p(x), each (n,), float64, in nats."""

    x: Tensor
    lower: Tensor
    upper: Tensor


@torch.no_grad()
def sandwich(
    vae: VAE,
    n: int,
    seed: int,
    temperatures: int = 1000,
    chains: int = 16,
    leapfrogs: int = 10,
    max_decodes: int = 20_000,
    y: Tensor | None = None,
    tick: Callable[[], None] = no_tick,
) -> Sandwich:
    """AIS forwards and backwards on n images drawn from the model: lower <= log p(x) <= upper, each in expectation.

    The z that an image was decoded from is an exact sample of its posterior; from there the chains walk back to the
    prior. y: labels of the images, (n,), for a conditional model.
    """
    noise = generator(seed, "bdmc", device=next(vae.parameters()).device)
    betas = sigmoid_schedule(temperatures)
    z = vae.prior.sample(n, noise)
    x = vae.draw_image(z, noise, y)
    lower, upper = [], []
    parts = _parts(Batch(x, y, seed), chains, max_decodes)
    for part, start in zip(parts, z.split(max(1, max_decodes // chains)), strict=True):
        steps = tuned_steps(vae, part.x, part.y, betas, chains, leapfrogs, noise, tick)
        first = _draw_prior(vae, chains, len(part.x), noise)
        forward, _ = anneal(vae, part.x, part.y, first, betas, steps, leapfrogs, noise, tick)
        lower.append(forward.logsumexp(0) - math.log(chains))
        last = start.expand(chains, -1, -1)
        backward, _ = anneal(vae, part.x, part.y, last, betas.flip(0), steps.flip(0), leapfrogs, noise, tick)
        upper.append(math.log(chains) - backward.logsumexp(0))
    return Sandwich(x, torch.cat(lower), torch.cat(upper))


def bdmc(
    vae: VAE,
    n: int,
    seed: int,
    temperatures: int = 1000,
    chains: int = 16,
    leapfrogs: int = 10,
    y: Tensor | None = None,
    tick: Callable[[], None] = no_tick,
) -> dict[str, float]:
    """Mean bounds over n simulated images, and their gap: how far AIS can be off at T temperatures (T in the keys).

    y: their labels, (n,), for a conditional model; the bounds are then on log p(x|y).
    """
    both = sandwich(vae, n, seed, temperatures, chains, leapfrogs, y=y, tick=tick)
    gap = both.upper - both.lower
    return {
        f"simulated_log_likelihood_lower_ais{temperatures}": both.lower.mean().item(),
        f"simulated_log_likelihood_upper_ais{temperatures}": both.upper.mean().item(),
        f"bdmc_gap_ais{temperatures}": gap.mean().item(),
        f"bdmc_gap_ais{temperatures}_ci95": half_interval(gap),
    }


def half_interval(values: Tensor) -> float:
    """Half the 95% interval of the mean of independent values (n,): 1.96 standard errors; NaN for a single value."""
    return 1.96 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
