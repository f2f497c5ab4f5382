"""Every measure of a trained run by name: what `python -m vae.evaluate measures=[...]` computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vae.data.module import ImageDataModule
from vae.data.storage import cache_folder
from vae.errors import VAEError
from vae.evaluation.ais import bdmc, log_likelihood_ais, nll_ais
from vae.evaluation.decomposition import elbo_decomposition
from vae.evaluation.disentanglement import Codes, evaluate, floor_and_ceiling
from vae.evaluation.gaps import inference_gaps
from vae.evaluation.samples import sample_quality
from vae.gaussian import DiagonalGaussian
from vae.model import VAE
from vae.seeding import derive, generator


def decomposition(vae: VAE, data: ImageDataModule, split: str, images: int = 10_000) -> dict[str, float]:
    """Reconstruction, index-code mutual information, total correlation and dimension-wise KL, in nats."""
    return elbo_decomposition(vae, data.examples(split, images))


def samples(vae: VAE, data: ImageDataModule, split: str, images: int = 5000) -> dict[str, float]:
    """Frechet distance, precision, recall, density and coverage on a small classifier's features."""
    return sample_quality(vae, data, images, split, cache=cache_folder() / "classifiers")


def ais(
    vae: VAE, data: ImageDataModule, split: str, images: int = 100, temperatures: int = 1000, chains: int = 16
) -> dict[str, float]:
    """-log p(x) by annealed importance sampling, and the bidirectional sandwich on as many simulated images, in nats."""
    batch = data.examples(split, images)
    return nll_ais(vae, batch, temperatures, chains) | bdmc(
        vae, images, derive(batch.seed, "bdmc"), temperatures, chains
    )


def gaps(
    vae: VAE, data: ImageDataModule, split: str, images: int = 100, temperatures: int = 1000, chains: int = 16
) -> dict[str, float]:
    """The inference gap and its two parts, approximation and amortisation, against log p(x) by AIS, in nats."""
    batch = data.examples(split, images)
    return inference_gaps(vae, batch, log_likelihood_ais(vae, batch, temperatures, chains)).summary()


def disentanglement(
    vae: VAE, data: ImageDataModule, split: str, images: int = 15_000, metrics: list[str] | None = None
) -> dict[str, float]:
    """Scores of the posterior means against the generative factors, each beside its floor and ceiling on this data.

    From `images` random points of the whole factor grid, or from all of it where it is no larger. metrics: names of
    `vae.evaluation.disentanglement.METRICS`; by default all but DCI and Chen's MIG, which take minutes.
    """
    grid = getattr(getattr(data.splits_ready(), split), "grid", None)
    if grid is None:
        raise VAEError("Disentanglement needs data whose generative factors are known: data=sprites or data=dsprites.")
    metrics = list(metrics or DISENTANGLEMENT)
    index = torch.arange(len(grid))
    if len(grid) > images:
        index = torch.randperm(len(grid), generator=generator("disentanglement", images))[:images]
    codes = encode(vae, data, grid, index)
    extent = {"exclude": ("shape",)} if "mig_chen" in metrics and "shape" in codes.factor_names else {}
    scores = evaluate(codes, 0, metrics, **extent)
    bounds = floor_and_ceiling(
        codes.factors,
        codes.factor_sizes,
        0,
        [name for name in metrics if name != "mig_chen"],
        latent_dim=vae.latent_dim,
        factor_names=codes.factor_names,
    )
    return scores | {name: value for name, value in bounds.items() if name.rsplit("/", 1)[0] in scores}


DISENTANGLEMENT = ("beta_vae", "factor_vae", "mig", "sap", "modularity", "explicitness", "irs", "unsupervised")


@torch.no_grad()
def encode(vae: VAE, data: ImageDataModule, grid: Any, index: torch.Tensor) -> Codes:
    """One forward pass over the grid's points `index`, for all metrics. Raises VAEError unless q(z|x) is diagonal."""
    device = next(vae.parameters()).device
    means, log_vars, kls, factors = [], [], [], []
    for part in index.split(1000):
        x, y = grid.gather(part)
        posterior = vae.encode(data.scale(x.to(device)))
        if not isinstance(posterior, DiagonalGaussian):
            raise VAEError("Disentanglement scores need a diagonal Gaussian q(z|x): use posterior=diagonal.")
        means.append(posterior.mean)
        log_vars.append(posterior.log_var)
        factors.append(y)
        if (kl := vae.prior.kl(posterior)) is not None:
            kls.append(kl)
    return Codes(
        torch.cat(means).cpu().numpy(),
        torch.cat(factors).cpu().numpy(),
        tuple(grid.factor_sizes),
        torch.cat(log_vars).cpu().numpy(),
        torch.cat(kls).mean(0).cpu().numpy().astype(np.float64) if kls else None,
        factor_names=tuple(grid.factor_names),
    )


MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    "decomposition": decomposition,
    "samples": samples,
    "ais": ais,
    "gaps": gaps,
    "disentanglement": disentanglement,
}
