"""A linear-Gaussian VAE in which every gap has a closed form: x|z ~ N(W z + m, s I), W's columns not orthogonal.

The exact posterior is N(M W'(x - m) / s, M), M = (W'W / s + I)^-1, with correlations that a diagonal q cannot have. The
best diagonal q has its mean and the precisions of its diagonal; the encoder here is that q, moved and widened.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vae.data.images import Batch
from vae.evaluation.ais import half_interval, log_likelihood_ais, sandwich
from vae.evaluation.gaps import inference_gaps
from vae.kl import kl_gaussian_full
from vae.likelihoods import Gaussian
from vae.model import VAE
from vae.networks import linear
from vae.priors import StandardNormal
from vae.seeding import derive, generator

SHAPE, LATENTS, VARIANCE = (1, 8, 8), 5, 0.25
SHIFT, STRETCH = 0.15, 1.3  # what the encoder is off by: each mean, and each standard deviation as a factor


class ExactModel(NamedTuple):
    """The VAE, and what is known of it: W (pixels, D), m (pixels,), the posterior's precision (D, D)."""

    vae: VAE
    weight: Tensor
    mean: Tensor
    precision: Tensor

    @property
    def diagonal(self) -> Tensor:
        """Variances of the best diagonal q, (D,)."""
        return 1 / self.precision.diagonal()

    def draw(self, n: int, seed: int) -> Batch:
        noise = generator(seed, "images")
        x = self.vae.likelihood.sample(self.vae.decode(self.vae.prior.sample(n, noise)), noise)
        return Batch(x, None, derive(seed, "exact"))

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of each image, in nats."""
        covariance = self.weight @ self.weight.T + VARIANCE * torch.eye(len(self.mean), dtype=torch.float64)
        return torch.distributions.MultivariateNormal(self.mean, covariance).log_prob(x.flatten(1))

    def gaps(self) -> dict[str, float]:
        """In nats; the same for every image, since the posterior's covariance and the encoder's error are."""
        zero, covariance = torch.zeros(LATENTS, dtype=torch.float64), torch.linalg.inv(self.precision)

        def divergence(shift: float, stretch: float) -> float:
            own = torch.diag(self.diagonal * stretch**2)
            return kl_gaussian_full(p_mean=zero + shift, p_covariance=own, q_mean=zero, q_covariance=covariance).item()

        approximation, inference = divergence(0.0, 1.0), divergence(SHIFT, STRETCH)
        return {
            "approximation_gap": approximation,
            "amortisation_gap": inference - approximation,
            "inference_gap": inference,
        }


@torch.no_grad()
def exact_model(seed: int) -> ExactModel:
    noise = generator(seed, "exact model")
    pixels = math.prod(SHAPE)
    weight = torch.randn(pixels, LATENTS, generator=noise, dtype=torch.float64) / math.sqrt(pixels)
    weight = weight + 0.6 * weight.roll(1, 1)  # neighbouring latents overlap
    mean = torch.rand(pixels, generator=noise, dtype=torch.float64)
    precision = weight.T @ weight / VARIANCE + torch.eye(LATENTS, dtype=torch.float64)

    encoder, decoder = linear(SHAPE, LATENTS, params_per_pixel=1)
    vae = VAE(encoder, decoder, StandardNormal(LATENTS), Gaussian(math.sqrt(VARIANCE))).double().requires_grad_(False)
    vae.likelihood.log_sigma.fill_(0.5 * math.log(VARIANCE))  # in double precision to the last bit
    decoder.body.weight.copy_(weight)
    decoder.set_output_bias(mean.view(1, *SHAPE))
    head = encoder.head
    head.mean.weight.copy_(torch.linalg.solve(precision, weight.T) / VARIANCE)
    head.mean.bias.copy_(SHIFT - head.mean.weight @ mean)
    head.log_var.copy_(2 * math.log(STRETCH) - precision.diagonal().log())
    return ExactModel(vae, weight, mean, precision)


def measure_exact(
    seed: int, images: int, temperatures: int, chains: int, leapfrogs: int, steps: int, samples: int, elbo_samples: int
) -> dict:
    """AIS, its sandwich and all three gaps, beside what they should be."""
    model = exact_model(seed)
    batch = model.draw(images, seed)
    truth = model.log_prob(batch.x)
    error = log_likelihood_ais(model.vae, batch, temperatures, chains, leapfrogs) - truth
    both = sandwich(model.vae, images, seed, temperatures, chains, leapfrogs)
    simulated = model.log_prob(both.x)
    gaps = inference_gaps(model.vae, batch, truth, steps, samples, elbo_samples=elbo_samples)
    return {
        "log_likelihood": truth.mean(),
        "ais_error": error.mean(),
        "ais_error_ci95": half_interval(error),
        "ais_worst": error.abs().max(),
        "lower_error": (both.lower - simulated).mean(),
        "lower_error_ci95": half_interval(both.lower - simulated),
        "upper_error": (both.upper - simulated).mean(),
        "upper_error_ci95": half_interval(both.upper - simulated),
        "gaps": gaps.summary(),
        "exact_gaps": model.gaps(),
    }
