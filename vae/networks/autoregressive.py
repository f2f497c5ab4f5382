"""Networks whose every output sees only what comes before it, and a decoder made of one: p(x|z) = prod_i p(x_i|x_<i, z)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.errors import VAEError
from vae.networks.base import (
    ACTIVATIONS,
    ImageDecoder,
    ImageEncoder,
    checked_image_shape,
    checked_widths,
    dense_layers,
    named,
    with_label,
)


class MaskedLinear(nn.Linear):
    """A linear layer with some weights held at zero; mask (out, in) of 0 and 1."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    """An autoregressive network (Germain et al. 2015): `outputs` numbers for each z_i that depend on z_1 .. z_(i-1) and
    on a context alone. z (..., D), context (..., C) or None, broadcast -> (..., outputs, D).

    Every hidden unit has a degree m in 0 .. D - 1: it sees z_1 .. z_m and is seen by the outputs of z_(m+1) onwards;
    units of degree 0 see the context alone. The last layer starts at zero, so that all outputs do.
    channels: how many numbers each z_i is made of; then z is (..., channels * D), one channel after the other.
    """

    def __init__(
        self,
        latent_dim: int,
        hidden: Sequence[int],
        outputs: int,
        context: int = 0,
        activation: str = "elu",
        channels: int = 1,
    ) -> None:
        super().__init__()
        widths = checked_widths(hidden)
        if not widths:
            raise VAEError("An autoregressive network needs a hidden layer.")
        order = torch.arange(1, latent_dim + 1)
        degrees = [order.repeat(channels), *(_hidden_degrees(width, latent_dim) for width in widths)]
        masks = [(b[:, None] >= a).float() for a, b in pairwise(degrees)]
        last = (order[:, None] > degrees[-1]).float().repeat(outputs, 1)
        self.layers = nn.ModuleList(MaskedLinear(mask) for mask in masks)
        self.last = MaskedLinear(last)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        self.context = nn.Linear(context, widths[0], bias=False) if context else None
        self.activation = named("activation", activation, ACTIVATIONS)()
        self.outputs = outputs

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.layers[0](z)
        if self.context is not None:
            h = h + self.context(context)
        for layer in self.layers[1:]:
            h = layer(self.activation(h))
        return self.last(self.activation(h)).unflatten(-1, (self.outputs, -1))


def _hidden_degrees(width: int, latent_dim: int) -> Tensor:
    """Equally many units of each degree 0 .. latent_dim - 1, or, of fewer units, degrees at equal distances."""
    units = torch.arange(width)
    return units % latent_dim if width >= latent_dim else units * latent_dim // width


class MADEDecoder(ImageDecoder):
    """p(x|z) pixel by pixel: (z, x) -> (N, P, C, H, W), where the parameters of a pixel depend on z and on the pixels of
    x above it, or left of it in its row; all channels of a pixel are predicted at once.

    z (N, latent_dim) and x (B, C, H, W) with N a multiple of B: x is met by z[0:B], z[B:2B], ... Its own output bias is
    `output_bias`, so that MADE's is left out. Raises VAEError without x: `VAE.draw_image` makes it pixel by pixel.
    """

    autoregressive = True

    def __init__(
        self,
        latent_dim: int,
        hidden: Sequence[int],
        activation: str,
        output_shape: tuple[int, int, int, int],
        num_classes: int = 0,
    ) -> None:
        params_per_pixel, channels, height, width = output_shape
        outputs = params_per_pixel * channels
        net = MADE(height * width, hidden, outputs, latent_dim + num_classes, activation, channels)
        net.last.bias = None
        super().__init__(net, output_shape, num_classes)

    def forward(self, z: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        if x is None:
            raise VAEError("An autoregressive decoder also needs x: call `vae.decode(z, x=x)`.")
        context = with_label(z, y, self.num_classes).unflatten(0, (-1, len(x)))
        return self.body(x.flatten(1), context).reshape(-1, *self.output_bias.shape) + self.output_bias


def made(
    image_shape: Sequence[int],
    latent_dim: int,
    params_per_pixel: int,
    hidden: Sequence[int] = (400,),
    decoder_hidden: Sequence[int] = (500,),
    activation: str = "relu",
    num_classes: int = 0,
    encoder_outputs: int | None = None,
) -> tuple[ImageEncoder, MADEDecoder]:
    """The encoder of `mlp`; as decoder MADE over the pixels (Germain et al. 2015), its hidden units conditioned on z.

    Such a decoder can do without z, and often does: posterior collapse (Bowman et al. 2016). Pictures are drawn one pixel
    after the other, H W passes. Raises VAEError for a size below 1 or an unknown activation.
    """
    shape = checked_image_shape(image_shape, latent_dim, params_per_pixel, num_classes)
    sizes = (math.prod(shape) + num_classes, *checked_widths(hidden))
    head = nn.Sequential(*dense_layers(sizes, activation), nn.Linear(sizes[-1], encoder_outputs or 2 * latent_dim))
    decoder = MADEDecoder(latent_dim, decoder_hidden, activation, (params_per_pixel, *shape), num_classes)
    return ImageEncoder(nn.Flatten(), head, num_classes), decoder
