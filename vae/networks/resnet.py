"""A small residual encoder and decoder for images of any size from 8x8, with no statistics of the batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vae.errors import VAEError
from vae.networks.base import (
    ImageDecoder,
    ImageEncoder,
    checked_image_shape,
    checked_widths,
    dense_layers,
    halvings_to_four,
    sides,
)

GROUPS = 8


def resnet(
    image_shape: Sequence[int],
    latent_dim: int,
    params_per_pixel: int,
    channels: int = 32,
    blocks: int = 1,
    dense: Sequence[int] = (256,),
    num_classes: int = 0,
    encoder_outputs: int | None = None,
) -> tuple[ImageEncoder, ImageDecoder]:
    """At each resolution down to a shorter side of 4 to 7 pixels: `blocks` residual blocks, then a halving (a 4x4
    convolution of stride 2; in the decoder nearest-neighbour upsampling and a 3x3 convolution), then dense layers.

    Channels double from `channels` at full resolution to at most four times that. SiLU; GroupNorm over 8 groups, whose
    statistics are an image's own, so that training and evaluation compute the same and a batch of one is as good as any.
    Raises VAEError for smaller images, a size below 1, or channels that 8 does not divide.
    """
    shape = checked_image_shape(image_shape, latent_dim, params_per_pixel, num_classes)
    if blocks < 1 or channels < 1 or channels % GROUPS:
        raise VAEError(f"A resnet has blocks >= 1 and channels in multiples of {GROUPS}, not {blocks} and {channels}.")
    halvings = halvings_to_four(shape)
    sizes = sides(shape, halvings)
    widths = [channels * min(2**i, 4) for i in range(halvings + 1)]
    smallest = (widths[-1], *sizes[-1])
    features = smallest[0] * smallest[1] * smallest[2]
    dense = checked_widths(dense)

    trunk: list[nn.Module] = [nn.Conv2d(shape[0], widths[0], 3, padding=1)]
    for i in range(halvings):
        trunk += [ResidualBlock(widths[i]) for _ in range(blocks)]
        trunk += [nn.Conv2d(widths[i], widths[i + 1], 4, stride=2, padding=1)]
    trunk += [ResidualBlock(widths[-1]) for _ in range(blocks)]
    trunk += [*_normalised(widths[-1]), nn.Flatten()]
    head_sizes = (features + num_classes, *dense)
    head = [*dense_layers(head_sizes, "silu"), nn.Linear(head_sizes[-1], encoder_outputs or 2 * latent_dim)]

    body_sizes = (latent_dim + num_classes, *dense[::-1])
    body = [*dense_layers(body_sizes, "silu"), nn.Linear(body_sizes[-1], features), nn.Unflatten(1, smallest)]
    body += [ResidualBlock(widths[-1]) for _ in range(blocks)]
    for i in reversed(range(halvings)):
        body += [nn.Upsample(size=sizes[i]), nn.Conv2d(widths[i + 1], widths[i], 3, padding=1)]
        body += [ResidualBlock(widths[i]) for _ in range(blocks)]
    body += [*_normalised(widths[0]), nn.Conv2d(widths[0], params_per_pixel * shape[0], 3, padding=1, bias=False)]

    encoder = ImageEncoder(nn.Sequential(*trunk), nn.Sequential(*head), num_classes)
    return encoder, ImageDecoder(nn.Sequential(*body), (params_per_pixel, *shape), num_classes)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, C, H, W) kept; starts as the identity (its last layer at zero)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, last = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.branch = nn.Sequential(*_normalised(channels), first, *_normalised(channels), last)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def _normalised(channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(GROUPS, channels), nn.SiLU()]
