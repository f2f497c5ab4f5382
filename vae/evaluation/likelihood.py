"""How well a model explains images: the ELBO and its halves, the importance-weighted likelihood, active units."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vae.codes import CodePosterior, histogram, usage
from vae.evaluation.work import no_tick
from vae.model import VAE, VAEOutput
from vae.precision import wide
from vae.seeding import generator

if TYPE_CHECKING:
    from vae.data.images import Batch

MOST_SAMPLES = 10_000_000  # of an importance-weighted bound: more would not end, and would change nothing
ACTIVE_UNIT_THRESHOLD = 1e-2  # Burda et al. 2016, section 5: Cov_x(E_q[z|x]) > 10^-2


def bits_per_dim(elbo: float | Tensor, pixels: int) -> float | Tensor:
    """-elbo / (pixels * ln 2), for an ELBO in nats per image of so many sub-pixels."""
    return -elbo / (pixels * math.log(2))


class ELBOTotals:
    """Running sums of ELBO terms over batches; `compute` gives the means over all images seen, in nats per image.

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
        """Add a prepared batch, with one z per image; returns its pass through the model."""
        out = vae(batch.x, generator(batch.seed, "z", device=batch.x.device), batch.y)
        mean = out.posterior.mean
        self.images += len(batch.x)
        self._add(distortion=out.distortion, rate=out.rate, kl=out.kl, mean=mean, mean_square=wide(mean).square())
        if isinstance(out.posterior, CodePosterior):
            self._add(codes=histogram(out.posterior.indices, out.posterior.number)[None])
        self.pixels = batch.x[0].numel()
        return out

    def kl_per_dimension(self) -> Tensor:
        """Mean KL of each latent dimension, (D,), or of each code, (m,), in nats; a single entry where it is only estimated."""
        return self.sums["kl"] / self.images

    def compute(self) -> dict[str, float]:
        """elbo, rate and distortion (nats per image), bits_per_dim = -elbo / (pixels * ln 2), active_units; of codes also
        perplexity and codes_used, over all images."""
        distortion, rate = (self.sums[name].item() / self.images for name in ("distortion", "rate"))
        variance = self.sums["mean_square"] / self.images - (self.sums["mean"] / self.images).square()
        return {
            "elbo": -(distortion + rate),
            "distortion": distortion,
            "rate": rate,
            "bits_per_dim": bits_per_dim(-(distortion + rate), self.pixels),
            "active_units": float((variance > ACTIVE_UNIT_THRESHOLD).sum()),
            **{
                name: value.item()
                for name, value in (usage(self.sums["codes"]) if "codes" in self.sums else {}).items()
            },
        }


def parts_of(samples: int, images: int, max_decodes: int = 20_000) -> list[int]:
    """`samples` draws of z for each of so many images, as many at a time as are decoded together."""
    step = max(1, min(samples, max_decodes // images))
    return [min(step, samples - start) for start in range(0, samples, step)]


@torch.no_grad()
def log_likelihood(
    vae: VAE, batch: Batch, samples: int, max_decodes: int = 20_000, tick: Callable[[], None] = no_tick
) -> Tensor:
    """The importance-weighted bound L_K on log p(x) of each image, (B,), in nats, with K = `samples`.

    Burda et al. 2016, equation 8: log of the mean of K weights p(x, z) / q(z|x). At most `max_decodes` latent vectors
    are decoded at a time, so that memory does not grow with K. Of a model that is given labels, it is of p(x|y).
    """
    noise = generator(batch.seed, "importance", device=batch.x.device)
    total = None
    for draws in parts_of(samples, len(batch.x), max_decodes):
        part = vae.log_weights(batch.x, noise, draws, batch.y).logsumexp(0)
        total = part if total is None else torch.logaddexp(total, part)
        tick()
    return total - math.log(samples)


def by_label(log_prob: Callable[[Batch], Tensor], vae: VAE, batch: Batch) -> dict[str, Tensor]:
    """What `log_prob` says of a batch, (B,), under "": log p(x), or log p(x|y) of a model that is given labels.

    Where the model sums its label out, "" is log p(x) = log 1/K sum_y p(x|y), from every label in turn, and log p(x|y) at
    the true one stands under "_given_label". A lower bound on each log p(x|y) gives one on log p(x).
    """
    if not vae.latent_label:
        return {"": log_prob(batch)}
    labels = range(vae.num_classes)
    of_labels = torch.stack([log_prob(batch._replace(y=torch.full_like(batch.y, label))) for label in labels])
    return {"": of_labels.logsumexp(0) - math.log(len(labels)), "_given_label": of_labels.gather(0, batch.y[None])[0]}


def nll(vae: VAE, batch: Batch, samples: int, tick: Callable[[], None] = no_tick) -> dict[str, Tensor]:
    """nll_iwK, minus the bound of `log_likelihood` with K = `samples`, of each image, (B,), in nats; as in `by_label`."""
    bounds = by_label(lambda batch: log_likelihood(vae, batch, samples, tick=tick), vae, batch)
    return {f"nll_iw{samples}{given}": -bound for given, bound in bounds.items()}
