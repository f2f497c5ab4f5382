"""How well a model explains images: the ELBO and its halves, the importance-weighted likelihood, active units."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vae.model import VAE, VAEOutput
from vae.precision import wide
from vae.seeding import generator

if TYPE_CHECKING:
    from vae.data.images import Batch

ACTIVE_UNIT_THRESHOLD = 1e-2  # Burda et al. 2016, section 5: Cov_x(E_q[z|x]) > 10^-2


def bits_per_dim(elbo: float | Tensor, pixels: int) -> float | Tensor:
    """-elbo / (pixels * ln 2), for an ELBO in nats an image of so many sub-pixels."""
    return -elbo / (pixels * math.log(2))


class ELBOTotals:
    """Running sums of ELBO terms over batches; `compute` gives the means over all images seen, in nats an image.

    Noise is drawn from each batch's own seed, so the same split gives the same numbers to every model.
    """

    def __init__(self) -> None:
        self.images = 0
        self.sums: dict[str, Tensor] = {}

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0) + wide(value).sum(0)

    @torch.no_grad()
    def update(self, vae: VAE, batch: Batch) -> VAEOutput:
        """Add a prepared batch, with one z an image; returns its pass through the model."""
        out = vae(batch.x, generator(batch.seed, "z", device=batch.x.device), batch.y)
        mean = out.posterior.mean
        self.images += len(batch.x)
        self._add(distortion=out.distortion, rate=out.rate, kl=out.kl, mean=mean, mean_square=wide(mean).square())
        self.pixels = batch.x[0].numel()
        return out

    def kl_per_dimension(self) -> Tensor:
        """Mean KL of each latent dimension, (D,), in nats; a single entry where the KL is only estimated."""
        return self.sums["kl"] / self.images

    def compute(self) -> dict[str, float]:
        """elbo, rate and distortion (nats an image), bits_per_dim = -elbo / (pixels * ln 2), active_units."""
        distortion, rate = (self.sums[name].item() / self.images for name in ("distortion", "rate"))
        variance = self.sums["mean_square"] / self.images - (self.sums["mean"] / self.images).square()
        return {
            "elbo": -(distortion + rate),
            "distortion": distortion,
            "rate": rate,
            "bits_per_dim": bits_per_dim(-(distortion + rate), self.pixels),
            "active_units": float((variance > ACTIVE_UNIT_THRESHOLD).sum()),
        }


@torch.no_grad()
def log_likelihood(vae: VAE, batch: Batch, samples: int, max_decodes: int = 20_000) -> Tensor:
    """The importance-weighted bound L_K on log p(x) of each image, (B,), in nats, with K = `samples`.

    Burda et al. 2016, equation 8: log of the mean of K weights p(x, z) / q(z|x). At most `max_decodes` latent vectors
    are decoded at a time, so that memory does not grow with K.
    """
    noise = generator(batch.seed, "importance", device=batch.x.device)
    step = max(1, min(samples, max_decodes // len(batch.x)))
    total = None
    for start in range(0, samples, step):
        part = vae.log_weights(batch.x, noise, min(step, samples - start), batch.y).logsumexp(0)
        total = part if total is None else torch.logaddexp(total, part)
    return total - math.log(samples)
