"""What the encoder costs: the inference gap log p(x) - ELBO, split in two.

Cremer, Li & Duvenaud 2018: approximation gap = log p(x) - L[q*], what the family of q cannot express; amortisation gap =
L[q*] - L[q], what the encoder loses against the best q* of its family for each image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vae.errors import VAEError
from vae.evaluation.ais import half_interval
from vae.evaluation.work import no_tick
from vae.gaussian import DiagonalGaussian
from vae.model import VAE, Posterior
from vae.precision import wide, widest
from vae.seeding import generator

if TYPE_CHECKING:
    from vae.data.images import Batch


LOCAL_STEPS = 1000  # of the search for each image's best q


def search_ticks(images: int, steps: int, samples: int = 20, max_decodes: int = 20_000) -> int:
    """How often `inference_gaps` ticks."""
    return steps * math.ceil(images / max(1, max_decodes // samples))


class Gaps(NamedTuple):
    """Of each image, (B,), float64, in nats: log p(x), the ELBO of the best q of the family, the encoder's ELBO."""

    log_likelihood: Tensor
    elbo_local: Tensor
    elbo_amortised: Tensor

    @property
    def approximation(self) -> Tensor:
        return self.log_likelihood - self.elbo_local

    @property
    def amortisation(self) -> Tensor:
        return self.elbo_local - self.elbo_amortised

    @property
    def inference(self) -> Tensor:
        """The sum of the other two."""
        return self.approximation + self.amortisation

    def summary(self) -> dict[str, float]:
        """Means over the images, nats per image, each with half its 95% interval under `_ci95`."""
        values = {
            "log_likelihood": self.log_likelihood,
            "elbo_local": self.elbo_local,
            "elbo_amortised": self.elbo_amortised,
            "approximation_gap": self.approximation,
            "amortisation_gap": self.amortisation,
            "inference_gap": self.inference,
        }
        metrics = {name: value.mean().item() for name, value in values.items()}
        metrics["inference_gap"] = metrics["approximation_gap"] + metrics["amortisation_gap"]  # to the last bit
        return metrics | {f"{name}_ci95": half_interval(value) for name, value in values.items()}


def inference_gaps(
    vae: VAE,
    batch: Batch,
    log_likelihood: Tensor,
    steps: int = LOCAL_STEPS,
    samples: int = 20,
    learning_rate: float = 0.02,
    elbo_samples: int = 1000,
    max_decodes: int = 20_000,
    tick: Callable[[], None] = no_tick,
) -> Gaps:
    """The gaps of each image of `batch`, given its label if the model is. `tick` is called at each of the `steps`.

    log_likelihood: log p(x), (B,), as well as it is known, such as `log_likelihood_ais`, or `log_likelihood` with K of
    some thousands; its own error goes into the approximation gap. q* is found for each image by `steps` of Adam on the
    encoder's output, from where the encoder puts it, with `samples` draws a step and a learning rate that falls linearly
    to 0. Both ELBOs are means over the same `elbo_samples` draws of noise. For a diagonal Gaussian that output is all
    there is of q; of an amortised flow or a two-layer posterior, weights that all images share stay as they are.

    The gradient is that of the path alone (Roeder et al. 2017): its noise vanishes as q nears the exact posterior.
    Raises VAEError if there is not one log-likelihood for each image.
    """
    if log_likelihood.shape != (len(batch.x),):
        raise VAEError(f"{len(batch.x)} images need as many log-likelihoods, not {tuple(log_likelihood.shape)}.")
    local, amortised = [], []
    size = max(1, max_decodes // samples)
    ys = [None] * len(batch.x) if batch.y is None else batch.y.split(size)
    for i, (x, y) in enumerate(zip(batch.x.split(size), ys, strict=False)):
        with torch.no_grad():
            start = vae.encoder(x, y) if vae.num_classes else vae.encoder(x)
        best = optimise_locally(
            vae, x, y, start, steps, samples, learning_rate, generator(batch.seed, "local", i, device=x.device), tick
        )
        for found, parameters in ((local, best), (amortised, start)):
            noise = generator(batch.seed, "gaps", i, device=x.device)  # the same for both
            found.append(elbo(vae, x, y, parameters, elbo_samples, noise, max_decodes))
    return Gaps(wide(log_likelihood), torch.cat(local), torch.cat(amortised))


@torch.enable_grad()
def optimise_locally(
    vae: VAE,
    x: Tensor,
    y: Tensor | None,
    start: Tensor,
    steps: int,
    samples: int,
    learning_rate: float,
    generator: torch.Generator,
    tick: Callable[[], None] = no_tick,
) -> Tensor:
    """The posterior's parameters (B, ...) that maximise each image's own ELBO. Adam is elementwise, so images don't mix."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        posterior = vae.posterior(parameters)
        z = posterior.rsample(generator, (samples,))
        log_w = _log_joint(vae, x, y, z) - _path_log_prob(posterior, z)
        (parameters.grad,) = torch.autograd.grad(-log_w.mean(0).sum(), parameters)
        optimizer.step()
        schedule.step()
        tick()
    return parameters.detach()


def _log_joint(vae: VAE, x: Tensor, y: Tensor | None, z: Tensor) -> Tensor:
    """log p(x, z), (S, B)."""
    return vae.likelihood.log_prob(vae.decode(z, y, x), x) + vae.prior.log_prob(z)


def _path_log_prob(posterior: Posterior, z: Tensor) -> Tensor:
    """log q(z), with a gradient to z alone where q is a diagonal Gaussian: the rest has mean zero and only adds noise."""
    if isinstance(posterior, DiagonalGaussian):
        return DiagonalGaussian(*(parameter.detach() for parameter in posterior)).log_prob(z)
    return posterior.log_prob(z)


@torch.no_grad()
def elbo(
    vae: VAE,
    x: Tensor,
    y: Tensor | None,
    parameters: Tensor,
    samples: int,
    generator: torch.Generator,
    max_decodes: int = 20_000,
) -> Tensor:
    """E_q[log p(x, z) - log q(z)] of each image, (B,), float64, at `samples` draws from q given by its parameters."""
    posterior = vae.posterior(parameters)
    step = max(1, min(samples, max_decodes // len(x)))
    total = torch.zeros(len(x), dtype=widest(x.device), device=x.device)
    for start in range(0, samples, step):
        z = posterior.rsample(generator, (min(step, samples - start),))
        total += wide(_log_joint(vae, x, y, z) - posterior.log_prob(z)).sum(0)
    return total / samples
