"""Every measure of a trained run by name: what `python -m vae.evaluate 'measures=[...]'` computes.

Of a model that is given labels, each is given those of the images that it is measured on. Where the model sums its label
out (M2), what is of p(x|y) all the same is named `..._given_label`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vae.data.module import ImageDataModule
from vae.data.storage import cache_folder, expanded
from vae.errors import VAEError, typed
from vae.evaluation.ais import bdmc, log_likelihood_ais, nll_ais, ticks
from vae.evaluation.decomposition import elbo_decomposition, rows_at_a_time
from vae.evaluation.disentanglement import METRICS, Codes, evaluate, floor_and_ceiling
from vae.evaluation.gaps import LOCAL_STEPS, inference_gaps, search_ticks
from vae.evaluation.latent import latent_quality
from vae.evaluation.reconstruction import reconstruction_quality
from vae.evaluation.samples import CLASSIFIER_STEPS, sample_quality
from vae.evaluation.work import Work
from vae.gaussian import DiagonalGaussian
from vae.model import VAE
from vae.seeding import derive, generator


def named(vae: VAE, metrics: dict[str, float]) -> dict[str, float]:
    """Metrics that were measured with the true labels, named so if the model sums its label out."""
    return {f"{name}_given_label": value for name, value in metrics.items()} if vae.latent_label else metrics


def require_density(vae: VAE, measure: str) -> None:
    """Raises VAEError where the latents are codes, between which nothing can move."""
    if vae.discrete:
        raise VAEError(
            f"measures={measure} needs latents with a density, and those of this run are codes: measures=[likelihood,samples,"
            "reconstruction,latent] are there, or train with posterior=diagonal."
        )


def decomposition(vae: VAE, data: ImageDataModule, split: str, work: Work, images: int = 10_000) -> dict[str, float]:
    """Reconstruction, index-code mutual information, total correlation and dimension-wise KL, in nats."""
    batch = data.examples(split, images)
    work.expect(math.ceil(len(batch.x) / rows_at_a_time(len(batch.x) * vae.latent_dim)))
    return named(vae, elbo_decomposition(vae, batch, tick=work))


def samples(vae: VAE, data: ImageDataModule, split: str, work: Work, images: int = 5000) -> dict[str, float]:
    """Frechet distance, precision, recall, density and coverage on a small classifier's features.

    Samples of a model that is given labels have those of the images that they are compared with; where it sums its label
    out, every label is as likely as another.
    """
    batch = data.examples(split, images)
    y = batch.y if vae.num_classes else None
    if vae.latent_label:
        y = torch.randint(vae.num_classes, batch.y.shape, generator=generator(batch.seed, "labels of samples"))
    work.expect(CLASSIFIER_STEPS)
    return sample_quality(vae, data, images, split, cache=cache_folder() / "classifiers", y=y, tick=work)


def reconstruction(
    vae: VAE, data: ImageDataModule, split: str, work: Work, images: int = 5000, weights: str | None = None
) -> dict[str, float]:
    """Squared error, PSNR, SSIM, MS-SSIM and a Frechet distance of the reconstructions at the posterior mean; with a folder of
    published weights also LPIPS and an Inception distance."""
    work.expect(CLASSIFIER_STEPS)
    cache, folder = cache_folder() / "classifiers", None if weights is None else expanded(weights)
    return named(vae, reconstruction_quality(vae, data, images, split, cache=cache, tick=work, weights=folder))


def latent(vae: VAE, data: ImageDataModule, split: str, work: Work, images: int = 5000) -> dict[str, float]:
    """Scales, rank, shape, equivariance and spectrum of the latents, and the aggregate posterior against the prior."""
    work.expect(CLASSIFIER_STEPS)
    return named(vae, latent_quality(vae, data, images, split, cache=cache_folder() / "classifiers", tick=work))


def ais(
    vae: VAE,
    data: ImageDataModule,
    split: str,
    work: Work,
    images: int = 100,
    temperatures: int = 1000,
    chains: int = 16,
) -> dict[str, float]:
    """-log p(x) by annealed importance sampling, and the bidirectional sandwich on as many simulated images, in nats."""
    require_density(vae, "ais")
    batch = data.examples(split, images)
    n, labels = len(batch.x), vae.num_classes if vae.latent_label else 1
    y = batch.y if vae.num_classes else None
    work.expect(labels * ticks(n, temperatures, chains) + ticks(n, temperatures, chains, walks=2))
    found = nll_ais(vae, batch, temperatures, chains, tick=work)
    return found | named(vae, bdmc(vae, n, derive(batch.seed, "bdmc"), temperatures, chains, y=y, tick=work))


def gaps(
    vae: VAE,
    data: ImageDataModule,
    split: str,
    work: Work,
    images: int = 100,
    temperatures: int = 1000,
    chains: int = 16,
) -> dict[str, float]:
    """The inference gap and its two parts, approximation and amortisation, against log p(x) by AIS, in nats."""
    require_density(vae, "gaps")
    batch = data.examples(split, images)
    work.expect(ticks(len(batch.x), temperatures, chains) + search_ticks(len(batch.x), LOCAL_STEPS))
    bound = log_likelihood_ais(vae, batch, temperatures, chains, tick=work)
    return named(vae, inference_gaps(vae, batch, bound, steps=LOCAL_STEPS, tick=work).summary())


def disentanglement(
    vae: VAE,
    data: ImageDataModule,
    split: str,
    work: Work,
    images: int = 15_000,
    metrics: list[str] | None = None,
) -> dict[str, float]:
    """Scores of the posterior means against the generative factors, each beside its floor and ceiling on this data.

    From `images` random points of the whole factor grid, or from all of it where it is no larger. metrics: names of
    `vae.evaluation.disentanglement.METRICS`; by default all but DCI and Chen's MIG, which take minutes.
    """
    grid = getattr(data.splits_ready(), split).grid
    if grid is None:
        raise VAEError(
            "measures=disentanglement needs a run on data whose generative factors are known: data=sprites or data=dsprites."
        )
    metrics = [metrics] if isinstance(metrics, str) else list(metrics or DISENTANGLEMENT)
    if unknown := [name for name in metrics if name not in METRICS]:
        raise VAEError(f"disentanglement.metrics={unknown} is unknown: choose from {', '.join(METRICS)}.")
    index = torch.arange(len(grid))
    if len(grid) > images:
        index = torch.randperm(len(grid), generator=generator("disentanglement", images))[:images]
    codes = encode(vae, data, grid, index)
    work.expect(len(metrics))
    scores: dict[str, float] = {}
    for name in metrics:  # each has a generator of its own, whatever else is asked for
        extent = {"exclude": ("shape",)} if name == "mig_chen" and "shape" in codes.factor_names else {}
        scores |= evaluate(codes, 0, [name], **extent)
        work()
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
    "reconstruction": reconstruction,
    "latent": latent,
    "ais": ais,
    "gaps": gaps,
    "disentanglement": disentanglement,
}

#: The options that are numbers: each a whole one, at least 1 and at most this. Images beyond those of a split are not missed.
MOST = {"images": 10**9, "temperatures": 10**6, "chains": 20_000}


def check_options(name: str, options: dict[str, Any]) -> None:
    """Raises VAEError for an option that a measure does not have, or a number that makes no sense or could not end."""
    known = list(inspect.signature(MEASURES[name]).parameters)[4:] if name in MEASURES else []
    for option, value in options.items():
        if option not in known:
            raise VAEError(f"{name}.{option} is unknown.")
        if option == "weights" and not (value is None or isinstance(value, str)):
            raise VAEError(f"{name}.weights={value} must be the name of a folder, or null.")
        if option in MOST and (type(value) is not int or not 1 <= value <= MOST[option]):
            raise VAEError(f"{name}.{option}={typed(value)} must be a whole number from 1 to {MOST[option]:,}.")
