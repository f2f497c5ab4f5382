"""What every encoder and decoder shares: labels, image shapes, the output bias, dense layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.errors import VAEError, typed, whole

T = TypeVar("T")

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}


MOST_UNITS = 1_000_000  # of a layer; more are a slip of the keyboard


class ImageEncoder(nn.Module):
    """(B, C, H, W) [, y] -> (B, encoder_outputs): `trunk` turns an image into features (B, F), to which the label is
    appended before `head`, (B, F + num_classes) -> (B, encoder_outputs)."""

    def __init__(self, trunk: nn.Module, head: nn.Module, num_classes: int = 0) -> None:
        super().__init__()
        self.trunk, self.head, self.num_classes = trunk, head, num_classes

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.head(with_label(self.trunk(x), y, self.num_classes))


class Decoder(nn.Module):
    """(N, latent_dim) [, x] [, y] -> (N, P, C, H, W), the likelihood's P parameters of each pixel."""

    #: Whether forward is also given the image x (B, C, H, W), each pixel then depending on those before it.
    autoregressive: bool = False
    #: (C, H, W).
    image_shape: tuple[int, int, int]
    #: (c, h, w) of a latent that is a map, which lies in z channel after channel and row after row; None of a flat one.
    latent_shape: tuple[int, int, int] | None = None
    #: Whether encoder and decoder also take images and maps that are smaller or larger by one factor.
    any_size: bool = False

    def set_output_bias(self, bias: Tensor) -> None:
        """Start what is added to every output at bias (P, C, H, W), for instance `likelihood.bias_for_mean(mean image)`.
        A decoder that has no such bias leaves this out, and starts where it starts."""


class ImageDecoder(Decoder):
    """(N, latent_dim) [, y] -> (N, P, C, H, W): `body` maps z, the label appended, to N * P * C * H * W numbers without
    a bias of their own; `output_bias`, a trained parameter (P, C, H, W), is added to them.

    One bias per pixel is what a dense last layer has anyway, and lets every network start exactly at the mean image. In a
    convolutional one it replaces one bias per channel: P C (H W - 1) more parameters, and the constant part of the output
    is no longer the same everywhere; what depends on z stays convolutional.
    """

    def __init__(self, body: nn.Module, output_shape: tuple[int, int, int, int], num_classes: int = 0) -> None:
        super().__init__()
        self.body, self.num_classes = body, num_classes
        self.output_bias = nn.Parameter(torch.zeros(output_shape))
        # then the bias is added by the layer itself, which saves a pass over all pixels
        self._ends_dense = isinstance(body, nn.Sequential) and type(body[-1]) is nn.Linear and body[-1].bias is None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.output_bias.shape[1:])

    def set_output_bias(self, bias: Tensor) -> None:
        """Raises VAEError if the shape is not (P, C, H, W)."""
        if bias.shape != self.output_bias.shape:
            raise VAEError(
                f"The output bias is {tuple(self.output_bias.shape)}, (P, C, H, W), not {tuple(bias.shape)}."
            )
        with torch.no_grad():
            self.output_bias.copy_(bias)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        hidden = with_label(z, y, self.num_classes)
        if not self._ends_dense:
            return self.body(hidden).reshape(-1, *self.output_bias.shape) + self.output_bias
        *layers, last = self.body
        for layer in layers:
            hidden = layer(hidden)
        return F.linear(hidden, last.weight, self.output_bias.flatten()).unflatten(-1, self.output_bias.shape)


def with_label(features: Tensor, y: Tensor | None, num_classes: int) -> Tensor:
    """features (B, F), with the label appended where there are classes: (B, F + num_classes).

    y: class indices (B,) int64, or probabilities (B, num_classes). Raises VAEError if it is missing, or not expected.
    """
    if (y is None) != (num_classes == 0):
        raise VAEError(
            "A network with num_classes > 0 needs labels."
            if y is None
            else "A network without classes takes no labels."
        )
    if y is None:
        return features
    if y.ndim == 1:
        y = F.one_hot(y, num_classes)
    if y.shape != (features.shape[0], num_classes):  # not len(), which would fix the size of an exported program
        raise VAEError(f"Labels are (B,) or (B, {num_classes}) for {len(features)} images, not {tuple(y.shape)}.")
    return torch.cat([features, y.to(features.dtype)], dim=-1)


def checked_image_shape(
    image_shape: Iterable[int], latent_dim: int, params_per_pixel: int, num_classes: int
) -> tuple[int, int, int]:
    """(C, H, W); raises VAEError if that or any other size of a network makes no sense."""
    shape = tuple(image_shape)
    if len(shape) != 3 or min(shape) < 1:
        raise VAEError(f"An image shape is three positive numbers (C, H, W), not {shape}.")
    if latent_dim < 1:
        raise VAEError(f"latent_dim must be at least 1, not {latent_dim}.")
    if params_per_pixel < 1:
        raise VAEError(f"params_per_pixel must be at least 1, not {params_per_pixel}.")
    if num_classes < 0:
        raise VAEError(f"num_classes must be 0 (no labels) or more, not {num_classes}.")
    return shape


def checked_widths(widths: Iterable[int], setting: str = "A layer's width") -> tuple[int, ...]:
    """Layer widths as a tuple. Raises VAEError, which names the setting, if they are no list or one is below 1."""
    if isinstance(widths, str) or not isinstance(widths, Iterable):
        raise VAEError(f"{setting}={typed(widths)} must be a list of whole numbers.")
    widths = tuple(widths)
    for width in widths:
        whole(setting, width, most=MOST_UNITS)
    return widths


def named(kind: str, name: str, table: Mapping[str, T]) -> T:
    """table[name]; raises VAEError that lists the names there are."""
    if name not in table:
        raise VAEError(f"There is no {kind} {name!r}: choose from {', '.join(table)}.")
    return table[name]


def dense_layers(sizes: Iterable[int], activation: str = "relu") -> list[nn.Module]:
    """Linear layers between consecutive sizes, each followed by the activation; none if there is one size.

    "gated" is VampPrior's h = (A x + a) * sigmoid(B x + b) (Tomczak & Welling 2018), at twice the parameters.
    """
    sizes = checked_widths(sizes)
    nonlinearity = named("activation", activation, {**ACTIVATIONS, "gated": nn.GLU})
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, 2 * fan_out if activation == "gated" else fan_out), nonlinearity()]
    return layers


def sides(image_shape: tuple[int, int, int], halvings: int) -> list[tuple[int, int]]:
    """(H, W) before and after each of the halvings, odd sides rounded down: what a stride of 2 leaves of an image."""
    _, height, width = image_shape
    return [(height >> i, width >> i) for i in range(halvings + 1)]


def halvings_to_four(image_shape: tuple[int, int, int]) -> int:
    """How often the image can be halved with its shorter side at 4 pixels or more: 8 -> 1, 28 -> 2, 32 -> 3, 64 -> 4.

    Raises VAEError for a side below 8, of which that leaves nothing to convolve.
    """
    shorter = min(image_shape[1:])
    if shorter < 8:
        raise VAEError(
            f"A convolutional network needs images of at least 8x8 pixels, not {image_shape[1]}x{image_shape[2]}."
        )
    return shorter.bit_length() - 3
