"""How near reconstructions are to their images: squared error, PSNR, SSIM, MS-SSIM, LPIPS, and Frechet distances.

Images lie in [0, 1] and are compared at their own size, but by Inception, which has one: nothing else is resized. A
reconstruction is cut to [0, 1].
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.data.module import ImageDataModule
from vae.errors import VAEError
from vae.evaluation.lpips import comparison
from vae.evaluation.samples import frechet_distance, in_parts, trained_classifier, training_batch
from vae.evaluation.work import no_tick
from vae.model import VAE
from vae.precision import wide
from vae.seeding import generator

WINDOW, SIGMA = 11, 1.5  # pixels; Wang et al. 2004, section III-B
K1, K2 = 0.01, 0.03
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2: exponents, the finest scale first


def mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the sub-pixels of each image, (N, C, H, W) -> (N,)."""
    return (wide(a) - wide(b)).square().flatten(1).mean(1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB, -10 log10 of its mean squared error, the peak being 1; (N,).

    Infinite for equal images.
    """
    return -10 * mean_squared_error(a, b).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each image, (N,): the mean over channels and over places where the window fits whole.

    Wang et al. 2004, equation 13: a Gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03, range 1, moments
    without Bessel's correction. Raises VAEError for images smaller than the window.
    """
    luminance, contrast = _similarities(a, b)
    return (luminance * contrast).flatten(1).mean(1)


def scales_of(image_shape: tuple[int, ...]) -> int:
    """How many of the five scales of MS-SSIM an image has: at each the window must fit whole. 0 below 11 pixels."""
    shorter = min(image_shape[-2:])
    return min(len(SCALES), (shorter // WINDOW).bit_length())


def ms_ssim(a: Tensor, b: Tensor, scales: int) -> Tensor:
    """Multi-scale structural similarity of each image, (N,): the product over scales of the mean contrast and structure
    to the scale's exponent, with the mean luminance in at the coarsest.

    Wang et al. 2003, equation 7; images are halved by the mean of 2 x 2 pixels. With fewer than the five published scales the
    exponents of those there are, divided by their sum. A negative mean counts as 0. Raises VAEError for images too small.
    """
    total_weight = 1.0 if scales == len(SCALES) else sum(SCALES[:scales])
    exponents = [weight / total_weight for weight in SCALES[:scales]]
    total = torch.ones(a.shape[:2], dtype=wide(a).dtype, device=a.device)
    for scale, exponent in enumerate(exponents):
        luminance, contrast = _similarities(a, b)
        last = scale == scales - 1
        mean = (luminance * contrast if last else contrast).mean((-2, -1))
        total = total * mean.clamp(min=0) ** exponent
        if not last:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return total.mean(1)


def _similarities(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Luminance, and contrast and structure together, at each place where the window fits, (N, C, H - 10, W - 10)."""
    if min(a.shape[-2:]) < WINDOW:
        raise VAEError(f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, not {a.shape[-2]}x{a.shape[-1]}.")
    a, b = wide(a), wide(b)
    mean_a, mean_b = _blurred(a), _blurred(b)
    var_a, var_b = _blurred(a * a) - mean_a * mean_a, _blurred(b * b) - mean_b * mean_b
    covariance = _blurred(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    return luminance, (2 * covariance + c2) / (var_a + var_b + c2)


def _blurred(x: Tensor) -> Tensor:
    steps = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    kernel = torch.exp(-0.5 * (steps / SIGMA).square())
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, WINDOW)
    x = F.conv2d(x, kernel[:, :, :, None], groups=x.shape[1])
    return F.conv2d(x, kernel[:, :, None], groups=x.shape[1])


@torch.no_grad()
def reconstruction_quality(
    vae: VAE,
    data: ImageDataModule,
    n: int = 5000,
    split: str = "test",
    seed: int = 0,
    cache: Path | None = None,
    tick: Callable[[], None] = no_tick,
    at_a_time: int = 250,
    weights: Path | None = None,
) -> dict[str, float]:
    """Means over the first n images of a split of their reconstructions at the posterior mean.

    mse; psnr in dB, the mean of each image's; ssim, and ms_ssim_sM of M scales, left out with a warning where images are
    smaller than the window; frechet_distance_nN of images and reconstructions on the classifier's features
    (`vae.evaluation.samples`) where the data have labels, pixels being drawn where the images are binary. weights: a folder of
    published weights (`vae.evaluation.lpips`), of whose files there must be one: lpips_alex, lpips_vgg, and rfid_inception_nN,
    the Frechet distance of mean images on Inception's features. Deterministic from `seed`.
    Raises VAEError for a folder without any of them.
    """
    device = next(vae.parameters()).device
    by_weights = None if weights is None else comparison(weights, data.image_shape, "reconstruction.weights")
    batch = data.examples(split, n)
    x, y = batch.x, batch.y if vae.num_classes else None
    x_parts = x.split(at_a_time)
    y_parts = y.split(at_a_time) if y is not None else [None] * len(x_parts)
    fakes = []
    for part, labels in zip(x_parts, y_parts, strict=True):
        fakes.append(vae.reconstruct(part.to(device), None if labels is None else labels.to(device)).clamp(0, 1).cpu())
    fake = torch.cat(fakes)
    found = {"mse": mean_squared_error(x, fake).mean().item(), "psnr": psnr(x, fake).mean().item()}
    scales = scales_of(data.image_shape)
    if scales:
        pairs = list(zip(x_parts, fakes, strict=True))
        found["ssim"] = torch.cat([ssim(a, b) for a, b in pairs]).mean().item()
        if scales > 1:
            found[f"ms_ssim_s{scales}"] = torch.cat([ms_ssim(a, b, scales) for a, b in pairs]).mean().item()
    else:
        _left_out(f"ssim: its window has {WINDOW}x{WINDOW} pixels, and the images {x.shape[-2]}x{x.shape[-1]}")
    if by_weights is not None:
        found |= by_weights(x, fake, device)
    if has_labels(data):
        if bool(((x == 0) | (x == 1)).all()):
            fake = torch.bernoulli(fake, generator=generator(seed, "pixels of reconstructions"))
        features = classifier_features(data, seed, cache, device, tick)
        found[f"frechet_distance_n{len(x)}"] = frechet_distance(features(x), features(fake))
    else:
        _left_out("frechet_distance: it needs a classifier, and the data have no labels")
    return found


def has_labels(data: ImageDataModule) -> bool:
    """Whether a classifier can be trained on the data."""
    return data.splits_ready().train.y is not None


def classifier_features(
    data: ImageDataModule, seed: int, cache: Path | None, device: torch.device, tick: Callable[[], None] = no_tick
) -> Callable[[Tensor], Tensor]:
    """Images (N, C, H, W) -> features (N, F) of the project's classifier of these data."""
    classifier = trained_classifier(training_batch(data, 20_000, seed), seed, cache, tick=tick).to(device)
    return in_parts(classifier.features, device)


def _left_out(what: str) -> None:
    logging.getLogger(__name__).warning(f"measures=[reconstruction] leaves out {what}.")
