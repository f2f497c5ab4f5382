"""Convolutional encoders and decoders that halve the image at each layer: the nets of the disentanglement papers, and
one of the same kind for any image size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from vae.errors import VAEError
from vae.networks.base import (
    ACTIVATIONS,
    ImageDecoder,
    ImageEncoder,
    checked_image_shape,
    checked_widths,
    dense_layers,
    halvings_to_four,
    named,
    sides,
)


class Layers(NamedTuple):
    """channels and kernels of the encoder's strided convolutions, widths of the dense layers after them."""

    channels: tuple[int, ...]
    kernels: tuple[int, ...]
    dense: tuple[int, ...]


# for 64x64 images; every decoder kernel is 4
VARIANTS = {
    # Burgess et al. 2018
    "burgess": Layers((32, 32, 32, 32), (4, 4, 4, 4), (256, 256)),
    # Locatello et al. 2019, disentanglement_lib's conv_encoder: its last two kernels are 2, whatever papers print
    "dlib": Layers((32, 32, 64, 64), (4, 4, 2, 2), (256,)),
}


def burgess(
    image_shape: Sequence[int],
    latent_dim: int,
    params_per_pixel: int,
    variant: str = "burgess",
    num_classes: int = 0,
    encoder_outputs: int | None = None,
) -> tuple[ImageEncoder, ImageDecoder]:
    """The 64x64 ReLU net of Burgess et al. 2018, or ("dlib") of Locatello et al. 2019.

    As published, but for one output bias per pixel where they have one a channel (see ImageDecoder).
    Raises VAEError for images that are not 64x64, a size below 1 or an unknown variant.
    """
    shape = checked_image_shape(image_shape, latent_dim, params_per_pixel, num_classes)
    if shape[1:] != (64, 64):
        raise VAEError(f"The Burgess network is for 64x64 images, not {shape[1]}x{shape[2]}: use network=conv.")
    layers = named("variant", variant, VARIANTS)
    return _strided_pair(shape, latent_dim, params_per_pixel, layers, "relu", num_classes, encoder_outputs)


def conv(
    image_shape: Sequence[int],
    latent_dim: int,
    params_per_pixel: int,
    channels: int = 32,
    dense: Sequence[int] = (256,),
    activation: str = "relu",
    num_classes: int = 0,
    encoder_outputs: int | None = None,
) -> tuple[ImageEncoder, ImageDecoder]:
    """Images of any size from 8x8: 4x4 convolutions of stride 2 until the shorter side is 4 to 7, then dense layers.

    Channels double from `channels` to at most four times that: 28x28 -> (32, 14, 14) -> (64, 7, 7) -> 256 -> z.
    Raises VAEError for smaller images, a size below 1 or an unknown activation.
    """
    shape = checked_image_shape(image_shape, latent_dim, params_per_pixel, num_classes)
    widths = tuple(channels * min(2**i, 4) for i in range(halvings_to_four(shape)))
    layers = Layers(checked_widths(widths), (4,) * len(widths), checked_widths(dense))
    return _strided_pair(shape, latent_dim, params_per_pixel, layers, activation, num_classes, encoder_outputs)


def _strided_pair(
    shape: tuple[int, int, int],
    latent_dim: int,
    params_per_pixel: int,
    layers: Layers,
    activation: str,
    num_classes: int,
    encoder_outputs: int | None,
) -> tuple[ImageEncoder, ImageDecoder]:
    nonlinearity = named("activation", activation, ACTIVATIONS)
    widths = (shape[0], *layers.channels)
    sizes = sides(shape, len(layers.channels))
    smallest = (widths[-1], *sizes[-1])
    features = smallest[0] * smallest[1] * smallest[2]

    trunk: list[nn.Module] = []
    for i, kernel in enumerate(layers.kernels):
        # this padding leaves floor(side / 2) pixels, and kernel 4 sees each pixel of an odd side too
        trunk += [nn.Conv2d(widths[i], widths[i + 1], kernel, stride=2, padding=(kernel - 2) // 2), nonlinearity()]
    dense = (features + num_classes, *layers.dense)
    head = [*dense_layers(dense, activation), nn.Linear(dense[-1], encoder_outputs or 2 * latent_dim)]

    body = [
        *dense_layers((latent_dim + num_classes, *layers.dense[::-1], features), activation),
        nn.Unflatten(1, smallest),
    ]
    for i in reversed(range(1, len(sizes))):
        body += [_upsample(widths[i], widths[i - 1], sizes[i], sizes[i - 1]), nonlinearity()]
    body[-2:] = [_upsample(widths[1], params_per_pixel * shape[0], sizes[1], sizes[0], bias=False)]

    encoder = ImageEncoder(nn.Sequential(*trunk, nn.Flatten()), nn.Sequential(*head), num_classes)
    return encoder, ImageDecoder(nn.Sequential(*body), (params_per_pixel, *shape), num_classes)


def _upsample(
    channels_in: int, channels_out: int, small: tuple[int, int], large: tuple[int, int], bias: bool = True
) -> nn.ConvTranspose2d:
    """A 4x4 transposed convolution of stride 2 from `small` to `large`, which is twice as large or one pixel more."""
    more = (large[0] - 2 * small[0], large[1] - 2 * small[1])
    return nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1, output_padding=more, bias=bias)
