"""What a latent space is like before a second model is trained on it: scales, rank, shape, equivariance, spectrum, prior."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vae.data.module import ImageDataModule
from vae.errors import VAEError
from vae.evaluation.likelihood import ACTIVE_UNIT_THRESHOLD
from vae.evaluation.reconstruction import classifier_features, has_labels
from vae.evaluation.samples import frechet_distance
from vae.evaluation.work import no_tick
from vae.maps import halved, quarter_turn, radial_power_spectrum
from vae.model import VAE
from vae.precision import wide
from vae.priors import StandardNormal
from vae.seeding import generator

MOST_CHANNELS = 64  # whose mean and standard deviation are reported one by one
MOST_DIMENSIONS = 2048  # of a covariance matrix


# --- functions of latents (N, D), or of maps (N, c, h, w) --------------------------------------------------------------


def effective_rank(x: Tensor) -> float:
    """exp(-sum p log p), p being the eigenvalues of the covariance of x (N, D) as shares of their sum.

    Roy & Vetterli 2007, definition 1, of the covariance. From 1 to D: k equal eigenvalues and otherwise zeros give k.
    """
    x = wide(x)
    values = torch.linalg.svdvals((x - x.mean(0)) / math.sqrt(len(x))).square()
    shares = values / values.sum().clamp(min=1e-300)
    return torch.exp(-torch.special.xlogy(shares, shares).sum()).item()


def gaussianity(x: Tensor) -> dict[str, float]:
    """How far each column of x (N, D), standardised, is from N(0, 1), as a mean over the columns.

    skewness: |E u^3|; excess_kurtosis: |E u^4 - 3|; ks: the largest distance of the two distribution functions
    (Kolmogorov-Smirnov). All 0 for a Gaussian, but for the noise of N draws. Columns that do not vary are left out.
    """
    x = wide(x)
    std = x.std(0, correction=0)
    x = x[:, std > 0]
    if x.shape[1] == 0:
        raise VAEError("No latent varies over these images: their shape cannot be compared with a Gaussian's.")
    u = (x - x.mean(0)) / std[std > 0]
    cdf = torch.special.ndtr(u.sort(0).values)
    steps = torch.arange(len(u), dtype=u.dtype, device=u.device)[:, None] / len(u)
    distance = torch.maximum(cdf - steps, steps + 1 / len(u) - cdf).amax(0)
    return {
        "skewness": u.pow(3).mean(0).abs().mean().item(),
        "excess_kurtosis": (u.pow(4).mean(0) - 3).abs().mean().item(),
        "ks": distance.mean().item(),
    }


def equivariance_error(
    encode: Callable[[Tensor], Tensor],
    x: Tensor,
    of_images: Callable[[Tensor], Tensor],
    of_maps: Callable[[Tensor], Tensor],
) -> float:
    """|E(t x) - t E(x)|^2 over |E(t x) - its mean per channel|^2, summed over images, channels and places.

    encode: images -> maps (N, c, h, w); of_images and of_maps: the same transformation of both. 0 where the encoder commutes
    with it, 1 where t E(x) says no more of E(t x) than a constant does (EQ-VAE, Kouzelis et al. 2025, section 3).
    """
    moved, expected = wide(encode(of_images(x))), wide(of_maps(encode(x)))
    total = (moved - moved.mean((0, 2, 3), keepdim=True)).square().sum()
    return ((moved - expected).square().sum() / total.clamp(min=1e-300)).item()


def nearest_neighbours(x: Tensor) -> Tensor:
    """The index of each row's nearest other row by Euclidean distance, (N, D) -> (N,)."""
    nearest = []
    for start in range(0, len(x), 500):
        distance = torch.cdist(x[start : start + 500], x)
        rows = torch.arange(len(distance), device=x.device)
        distance[rows, rows + start] = torch.inf
        nearest.append(distance.argmin(1))
    return torch.cat(nearest)


def gaussian_kl_to_prior(z: Tensor, diagonal: bool = False) -> float:
    """KL(N(m, S) || N(0, I)) in nats of the Gaussian that has the moments of z (N, D): 0.5 (tr S + m'm - D - log|S|).

    By the eigenvalues of S, l - 1 - log l, never negative.

    S without Bessel's correction; diagonal: its diagonal alone, the sum over dimensions. It is the marginal KL where the
    aggregate posterior is Gaussian. Infinite where S is singular.
    """
    z = wide(z)
    mean, centred = z.mean(0), z - z.mean(0)
    values = centred.square().mean(0) if diagonal else torch.linalg.svdvals(centred / math.sqrt(len(z))).square()
    if len(values) < z.shape[1]:
        return math.inf
    excess = values - 1
    return 0.5 * ((excess - excess.log1p()).sum() + mean.square().sum()).item()


# --- of a model -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def latent_quality(
    vae: VAE,
    data: ImageDataModule,
    n: int = 5000,
    split: str = "test",
    seed: int = 0,
    cache: Path | None = None,
    tick: Callable[[], None] = no_tick,
    at_a_time: int = 250,
) -> dict[str, float]:
    """All measures of the latents of the first n images of a split; z is one draw per image, the mean its posterior mean.

    mean, std of z over everything, and channelI_mean, channelI_std of up to MOST_CHANNELS channels (of a flat latent, its
    dimensions); effective_rank of the means, and effective_rank_of_channels over images and places; skewness,
    excess_kurtosis, ks of z by channel; active_units of D; prior_frechet_distance_nN, of the moments of z to those of as many
    draws of the prior; with N(0, I) dimension_wise_gaussian_kl_nN, and gaussian_kl_nN where N > D, which a Gaussian q(z)
    exceeds by about D (D + 3) / 4 N nats. What takes a covariance of D x D is left out beyond MOST_DIMENSIONS.
    Of a latent that is a map also equivariance_error_shift (by one place, circular), _rotation (by 90 degrees, of square
    images) and _scale (by 1/2, the mean of 2 x 2, of an even number of places), and power_kK, the power of the means at K
    cycles over their mean power.
    Where the data have labels, interpolated_frechet_distance_nN: images decoded half-way from each mean to its nearest
    neighbour, against the images (arXiv 2603.05630), on the classifier's features.
    """
    device = next(vae.parameters()).device
    batch = data.examples(split, n)
    x, y = batch.x, batch.y if vae.num_classes else None
    means, draws = [], []
    noise = generator(seed, "latents", device=device)
    for start in range(0, len(x), at_a_time):
        labels = None if y is None else y[start : start + at_a_time].to(device)
        posterior = vae.encode(x[start : start + at_a_time].to(device), labels)
        means.append(posterior.mean)
        draws.append(posterior.rsample(noise))
    mean, z = torch.cat(means), torch.cat(draws)
    found = statistics(mean, z, vae.latent_shape)
    prior = vae.prior.sample(len(z), generator(seed, "prior", device=device))
    found[f"prior_frechet_distance_n{len(z)}"] = frechet_distance(z, prior)
    if isinstance(vae.prior, StandardNormal):
        found[f"dimension_wise_gaussian_kl_n{len(z)}"] = gaussian_kl_to_prior(z, diagonal=True)
        if vae.latent_dim < len(z) and vae.latent_dim <= MOST_DIMENSIONS:
            found[f"gaussian_kl_n{len(z)}"] = gaussian_kl_to_prior(z)
    if vae.spatial:
        found |= _of_maps(vae, x.to(device), None if y is None else y.to(device), mean.unflatten(1, vae.latent_shape))
    if has_labels(data) and len(x) > 1:
        found |= interpolated_frechet_distance(vae, data, x, mean, y, 0.5, seed, cache, tick)
    return found


def statistics(mean: Tensor, z: Tensor, latent_shape: tuple[int, ...]) -> dict[str, float]:
    """What is known of the latents alone: posterior means and draws, each (N, D)."""
    by_channel = wide(z).reshape(len(z), latent_shape[0], -1).transpose(0, 1).flatten(1).T  # (N places, c)
    found = {"mean": wide(z).mean().item(), "std": wide(z).std(correction=0).item()}
    if latent_shape[0] <= MOST_CHANNELS:
        for i, (centre, spread) in enumerate(
            zip(by_channel.mean(0).tolist(), by_channel.std(0, correction=0).tolist(), strict=True)
        ):
            found |= {f"channel{i}_mean": centre, f"channel{i}_std": spread}
    if mean.shape[1] <= MOST_DIMENSIONS:
        found["effective_rank"] = effective_rank(mean)
    if len(latent_shape) > 1:
        places = mean.reshape(len(mean), latent_shape[0], -1).transpose(0, 1).flatten(1).T
        found["effective_rank_of_channels"] = effective_rank(places)
    found |= gaussianity(by_channel)
    found["active_units"] = float((wide(mean).var(0, correction=0) > ACTIVE_UNIT_THRESHOLD).sum())
    return found


def _of_maps(vae: VAE, x: Tensor, y: Tensor | None, maps: Tensor) -> dict[str, float]:
    """Equivariance and spectrum of a latent that is a map."""
    channels, height, width = vae.latent_shape
    factor = x.shape[-2] // height

    def encode(images: Tensor) -> Tensor:
        parts = []
        for start in range(0, len(images), 250):
            labels = None if y is None else y[start : start + 250]
            parts.append(vae.encode(images[start : start + 250], labels).mean)
        size = [side // factor for side in images.shape[-2:]]
        return torch.cat(parts).unflatten(1, (channels, *size))

    found = {
        "equivariance_error_shift": equivariance_error(encode, x, lambda t: t.roll(factor, -1), lambda t: t.roll(1, -1))
    }
    if x.shape[-2] == x.shape[-1]:
        found["equivariance_error_rotation"] = equivariance_error(encode, x, quarter_turn, quarter_turn)
    if height % 2 == 0 == width % 2:
        found["equivariance_error_scale"] = equivariance_error(encode, x, halved, halved)
    power, counts = radial_power_spectrum(maps)
    whole = (power * counts).sum() / counts.sum()
    for k, value in enumerate((power / whole.clamp(min=1e-300)).tolist()):
        found[f"power_k{k}"] = value
    return found


@torch.no_grad()
def interpolated_frechet_distance(
    vae: VAE,
    data: ImageDataModule,
    x: Tensor,
    mean: Tensor,
    y: Tensor | None = None,
    weight: float = 0.5,
    seed: int = 0,
    cache: Path | None = None,
    tick: Callable[[], None] = no_tick,
) -> dict[str, float]:
    """The Frechet distance of images x to what is decoded at (1 - weight) mean + weight nearest mean, as
    interpolated_frechet_distance_nN; at weight 0 it is the reconstructions' own. Labels stay those of x."""
    device = mean.device
    at = torch.lerp(mean, mean[nearest_neighbours(mean)], weight) if weight else mean
    images = []
    for start in range(0, len(at), 250):
        labels = None if y is None else y[start : start + 250].to(device)
        images.append(vae.mean_image(at[start : start + 250], labels).clamp(0, 1).cpu())
    fake = torch.cat(images)
    if bool(((x == 0) | (x == 1)).all()):
        fake = torch.bernoulli(fake, generator=generator(seed, "pixels of reconstructions"))
    features = classifier_features(data, seed, cache, device, tick)
    return {f"interpolated_frechet_distance_n{len(x)}": frechet_distance(features(x), features(fake))}
