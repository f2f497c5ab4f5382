"""The rate taken apart with the aggregate posterior q(z) = 1/N sum_n q(z|x_n) of the images at hand, computed exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vae.errors import VAEError
from vae.evaluation.work import no_tick
from vae.gaussian import DiagonalGaussian, gaussian_log_prob
from vae.model import VAE
from vae.precision import wide
from vae.priors import StandardNormal
from vae.seeding import generator

if TYPE_CHECKING:
    from vae.data.images import Batch


MAX_ELEMENTS = 2**24  # densities held at a time


def rows_at_a_time(numbers: int, max_elements: int = MAX_ELEMENTS) -> int:
    """How many z are compared with all posteriors together, which have so many means: images times latents."""
    return max(1, max_elements // numbers)


@torch.no_grad()
def elbo_decomposition(
    vae: VAE,
    batch: Batch,
    draws: int | None = None,
    images_at_a_time: int = 500,
    max_elements: int = MAX_ELEMENTS,
    tick: Callable[[], None] = no_tick,
) -> dict[str, float]:
    """The ELBO's parts in nats per image, over the N images of `batch`; N is in the keys, for the terms depend on it.

    distortion; index_code_mi = E[log q(z|x) - log q(z)], at most log N; marginal_kl = KL(q(z) || p(z)) (Hoffman &
    Johnson 2016). Where the prior factorises (the standard normal) that splits further (Chen et al. 2018,
    equation 2) into total_correlation = KL(q(z) || prod_j q(z_j)) and dimension_wise_kl = sum_j KL(q(z_j) || p(z_j)).
    The terms are averages over one z per image, of the first `draws` images (all by default), and add up to
    `rate_sampled` exactly; `rate` is the mean KL of the same images, from which that differs by the noise of z alone.
    Time: draws * N * D densities, at most max_elements of them held at a time. Raises VAEError unless q(z|x) is a
    diagonal Gaussian.
    """
    noise = generator(batch.seed, "decomposition", device=batch.x.device)
    n = len(batch.x)
    draws = n if draws is None else min(draws, n)
    posteriors, zs, rates, distortions = [], [], [], []
    for part in torch.arange(n, device=batch.x.device).split(images_at_a_time):
        out = vae(batch.x[part], noise, None if batch.y is None else batch.y[part])
        if not isinstance(out.posterior, DiagonalGaussian):
            raise VAEError("The ELBO's decomposition needs a diagonal Gaussian q(z|x): use posterior=diagonal.")
        posteriors.append(out.posterior)
        zs.append(out.z)
        distortions.append(out.distortion)
        rates.append(out.rate)
    q = DiagonalGaussian(*(torch.cat(parts) for parts in zip(*posteriors, strict=True)))
    z, distortion, rate = (torch.cat(parts)[:draws] for parts in (zs, distortions, rates))

    log_q_of_z, log_q_of_each = aggregate_log_prob(z, q, max_elements, tick)
    log_q = DiagonalGaussian(q.mean[:draws], q.log_var[:draws]).log_prob(z)
    log_p = vae.prior.log_prob(z)
    terms = {
        f"index_code_mi_n{n}": log_q - log_q_of_z,
        f"marginal_kl_n{n}": log_q_of_z - log_p,
        "rate_sampled": log_q - log_p,
        "rate": rate,
        "distortion": distortion,
    }
    if isinstance(vae.prior, StandardNormal):
        product = log_q_of_each.sum(-1)
        terms |= {f"total_correlation_n{n}": log_q_of_z - product, f"dimension_wise_kl_n{n}": product - log_p}
    return {name: wide(value).mean().item() for name, value in terms.items()}


def aggregate_log_prob(
    z: Tensor, q: DiagonalGaussian, max_elements: int = MAX_ELEMENTS, tick: Callable[[], None] = no_tick
) -> tuple[Tensor, Tensor]:
    """log q(z) and log q(z_j) of the equally weighted mixture of N Gaussians, in nats.

    Shapes: z (M, D), q (N, D) -> (M,), (M, D).
    """
    joint, marginals = [], []
    for part in z.split(rows_at_a_time(q.mean.numel(), max_elements)):
        pairs = gaussian_log_prob(part.unsqueeze(1), q.mean, q.log_var)  # (m, N, D)
        joint.append(pairs.sum(-1).logsumexp(1))
        marginals.append(pairs.logsumexp(1))
        tick()
    log_n = math.log(len(q.mean))
    return torch.cat(joint) - log_n, torch.cat(marginals) - log_n
