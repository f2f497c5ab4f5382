"""Fully connected encoders and decoders: any image size, any data set of the first VAE papers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vae.networks.base import ImageDecoder, ImageEncoder, checked_image_shape, checked_widths, dense_layers, named

INITS: dict[str, Callable[[Tensor], object]] = {
    "torch": lambda weight: None,  # as nn.Linear draws them: uniform, +- 1 / sqrt(fan_in), biases too
    "glorot_uniform": nn.init.xavier_uniform_,  # Burda et al. 2016; biases zero
    "he_normal": nn.init.kaiming_normal_,  # Tomczak & Welling 2018; biases zero
    "normal": lambda weight: nn.init.normal_(weight, std=0.01),  # Kingma & Welling 2014, N(0, 0.01); biases zero
}


def mlp(
    image_shape: Sequence[int],
    latent_dim: int,
    params_per_pixel: int,
    hidden: Sequence[int] = (400,),
    activation: str = "relu",
    decoder_hidden: Sequence[int] | None = None,
    decoder_activation: str | None = None,
    init: str = "torch",
    num_classes: int = 0,
    encoder_outputs: int | None = None,
) -> tuple[ImageEncoder, ImageDecoder]:
    """pixels - hidden - 2 * latent_dim, and latent_dim - decoder_hidden - pixels.

    The decoder mirrors the encoder unless told otherwise (Higgins et al. 2017: hidden (1200, 1200) relu, decoder_hidden
    (1200, 1200, 1200) tanh). Activations: base.ACTIVATIONS and "gated"; hidden=() is linear, log-variance included.
    init: "torch", "glorot_uniform", "he_normal" or "normal".

    Raises VAEError for a size below 1 or a name that is unknown.
    """
    shape = checked_image_shape(image_shape, latent_dim, params_per_pixel, num_classes)
    pixels = math.prod(shape)
    decoder_hidden = tuple(hidden)[::-1] if decoder_hidden is None else decoder_hidden

    encoder_sizes = (pixels + num_classes, *checked_widths(hidden))
    head = nn.Sequential(
        *dense_layers(encoder_sizes, activation), nn.Linear(encoder_sizes[-1], encoder_outputs or 2 * latent_dim)
    )

    decoder_sizes = (latent_dim + num_classes, *checked_widths(decoder_hidden))
    last = nn.Linear(decoder_sizes[-1], params_per_pixel * pixels, bias=False)
    body = nn.Sequential(*dense_layers(decoder_sizes, decoder_activation or activation), last)

    for layer in [*head, *body]:
        if isinstance(layer, nn.Linear):
            _initialise(layer, init)
    return ImageEncoder(nn.Flatten(), head, num_classes), ImageDecoder(body, (params_per_pixel, *shape), num_classes)


def linear(
    image_shape: Sequence[int],
    latent_dim: int,
    params_per_pixel: int,
    num_classes: int = 0,
    encoder_outputs: int | None = None,
) -> tuple[ImageEncoder, ImageDecoder]:
    """The linear VAE of Lucas et al. 2019: q(z|x) = N(V x + c, diag(s)), decoder W z + m.

    s is one vector for all x, as the posterior of probabilistic PCA has it: with a Gaussian likelihood of one sigma the
    ELBO's maximum is pPCA's likelihood, exactly. Raises VAEError for a size below 1.
    """
    shape = checked_image_shape(image_shape, latent_dim, params_per_pixel, num_classes)
    inputs = math.prod(shape) + num_classes
    if encoder_outputs == latent_dim:  # of a posterior without variances
        head: nn.Module = nn.Linear(inputs, latent_dim)
    else:
        head = ConstantVarianceLinear(inputs, (encoder_outputs or 2 * latent_dim) // 2)
    body = nn.Linear(latent_dim + num_classes, params_per_pixel * math.prod(shape), bias=False)
    return ImageEncoder(nn.Flatten(), head, num_classes), ImageDecoder(body, (params_per_pixel, *shape), num_classes)


class ConstantVarianceLinear(nn.Module):
    """features (B, F) -> (B, 2 D): a linear mean beside a log-variance that is a free vector, the same for every image."""

    def __init__(self, num_features: int, latent_dim: int) -> None:
        super().__init__()
        self.mean = nn.Linear(num_features, latent_dim)
        self.log_var = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, features: Tensor) -> Tensor:
        mean = self.mean(features)
        return torch.cat([mean, self.log_var.expand_as(mean)], dim=-1)


def _initialise(layer: nn.Linear, init: str) -> None:
    named("initialisation", init, INITS)(layer.weight)
    if init != "torch" and layer.bias is not None:
        nn.init.zeros_(layer.bias)
