"""What the linear VAE can reach, exactly: probabilistic PCA, its rate-distortion curve, and where given weights are on it.

With a Gaussian likelihood of one sigma, a linear decoder and a linear encoder, both halves of the ELBO depend on the
images through their mean and covariance alone (Lucas et al. 2019, section 4). Float64 throughout; nats per image.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vae.errors import VAEError
from vae.model import VAE


class Spectrum(NamedTuple):
    """Of images as vectors of n pixels: their mean (n,), and their covariance's eigenvalues (n,), largest first, with
    the eigenvectors, the principal components, as columns (n, n)."""

    mean: Tensor
    values: Tensor
    components: Tensor


def spectrum(images: Tensor, at_a_time: int = 10_000) -> Spectrum:
    """Of uint8 images (N, C, H, W), scaled to [0, 1]; the covariance divides by N."""
    n = images[0].numel()
    total, squares = torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
    for part in images.flatten(1).split(at_a_time):
        x = part.double() / 255
        total += x.sum(0)
        squares += x.T @ x
    mean = total / len(images)
    values, components = torch.linalg.eigh(squares / len(images) - torch.outer(mean, mean))
    return Spectrum(mean, values.flip(0).clamp(min=0), components.flip(1))


class Optimum(NamedTuple):
    """The best that a linear VAE can do. squared_error: E ||x - W z - m||^2 an image, the noise of z included; kl: nats
    of each of the k latents, whose sum is the rate; active: how many of them are not zero."""

    elbo: float
    rate: float
    distortion: float
    squared_error: float
    sigma2: float
    active: int
    kl: list[float]


def optimum(values: Tensor, latent_dim: int, sigma2: float | None = None, beta: float = 1.0) -> Optimum:
    """The minimum of distortion + beta * rate over linear VAEs, from the covariance's eigenvalues (n,), largest first.

    Reverse water-filling: a latent whose eigenvalue exceeds beta sigma^2 carries 1/2 log(eigenvalue / (beta sigma^2))
    nats and leaves beta sigma^2 of squared error; the others carry none (Lucas et al. 2019, section 4.2; Tipping &
    Bishop 1999). sigma2=None: sigma^2 is learned, and ends as the mean of the eigenvalues beyond the first k, where beta
    is 1. Raises VAEError for a learned sigma^2 and another beta, which have no such closed form, and for k >= n.
    """
    n = len(values)
    if not 0 < latent_dim < n:
        raise VAEError(f"latent_dim={latent_dim} must be between 1 and {n - 1}, the pixels less one.")
    if sigma2 is None:
        if beta != 1:
            raise VAEError("A learned sigma^2 has this optimum at beta = 1 only.")
        sigma2 = values[latent_dim:].mean().item()
    water = beta * sigma2
    kl = 0.5 * (values[:latent_dim] / water).log().clamp(min=0)
    left = torch.minimum(values[:latent_dim], torch.tensor(water, dtype=values.dtype))
    squared_error = (left.sum() + values[latent_dim:].sum()).item()
    distortion = distortion_of(squared_error, n, sigma2)
    rate, active = kl.sum().item(), int((values[:latent_dim] > water).sum())
    return Optimum(-(distortion + rate), rate, distortion, squared_error, sigma2, active, kl.tolist())


def distortion_of(squared_error: float | Tensor, pixels: int, sigma2: float | Tensor) -> float | Tensor:
    """-E log N(x; mean, sigma^2) in nats per image, of a mean squared error summed over its pixels."""
    log_sigma2 = sigma2.log() if isinstance(sigma2, Tensor) else math.log(sigma2)
    return 0.5 * (pixels * (math.log(2 * math.pi) + log_sigma2) + squared_error / sigma2)


class LinearWeights(NamedTuple):
    """A linear VAE in the coordinates of a `Spectrum`: x ~ N(W z, sigma^2 I) + offset, q(z|x) = N(V x + shift, exp(log_var)),
    x without its mean. decoder W (n, k), encoder V (k, n), offset (n,), shift (k,), log_var (k,), log_sigma2 ()."""

    decoder: Tensor
    encoder: Tensor
    offset: Tensor
    shift: Tensor
    log_var: Tensor
    log_sigma2: Tensor

    @staticmethod
    @torch.no_grad()
    def of(vae: VAE, data: Spectrum) -> LinearWeights:
        """The weights of a VAE of `vae.networks.linear` with one sigma."""
        parts = _parts(vae)
        decoder, encoder, bias, shift, log_var, log_sigma = (part.double().cpu() for part in parts)
        return LinearWeights(
            data.components.T @ decoder,
            encoder @ data.components,
            data.components.T @ (bias.flatten() - data.mean),
            shift + encoder @ data.mean,
            log_var.clone(),
            2 * log_sigma,
        )

    @torch.no_grad()
    def put_into(self, vae: VAE, data: Spectrum) -> None:
        """Give a VAE these weights: the inverse of `of`."""
        decoder, encoder, bias, shift, log_var, log_sigma = _parts(vae)
        encoder.copy_(self.encoder @ data.components.T)
        decoder.copy_(data.components @ self.decoder)
        bias.copy_((data.components @ self.offset + data.mean).view_as(bias))
        shift.copy_(self.shift - self.encoder @ (data.components.T @ data.mean))
        log_var.copy_(self.log_var)
        log_sigma.copy_(self.log_sigma2 / 2)

    def terms(self, values: Tensor) -> dict[str, Tensor]:
        """The means over all images and all z, in closed form: elbo, distortion, rate, squared_error, each a number, and
        kl (k,). Differentiable."""
        W, V, variance = self.decoder, self.encoder, self.log_var.exp()
        spread = (V * values) @ V.T  # the covariance of the posterior means
        missed = (self.offset + W @ self.shift).square().sum()
        squared_error = (
            values.sum() - 2 * (W.T * V * values).sum() + ((W.T @ W) * (spread + torch.diag(variance))).sum() + missed
        )
        kl = 0.5 * (spread.diagonal() + self.shift.square() + variance - 1 - self.log_var)
        distortion = distortion_of(squared_error, len(values), self.log_sigma2.exp())
        rate = kl.sum()
        return {
            "elbo": -(distortion + rate),
            "distortion": distortion,
            "rate": rate,
            "squared_error": squared_error,
            "kl": kl,
        }


def _parts(vae: VAE) -> tuple[Tensor, ...]:
    """Decoder and encoder matrices, output bias, encoder bias, log-variance, log sigma. Raises VAEError for others."""
    try:
        head, body = vae.encoder.head, vae.decoder.body
        return (
            body.weight,
            head.mean.weight,
            vae.decoder.output_bias,
            head.mean.bias,
            head.log_var,
            vae.likelihood.log_sigma,
        )
    except AttributeError as error:
        raise VAEError("Only network=linear with a Gaussian likelihood of one sigma has an exact ELBO.") from error
