"""The convolutional autoencoder of latent diffusion, whose latent is a map: residual blocks, and attention at its bottom.

Modules have the names of diffusers' `AutoencoderKL`, so that its weights are ours: see `vae.networks.diffusers_format`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.errors import VAEError, whole
from vae.networks.base import Decoder, checked_image_shape, checked_widths, with_label

EPS = 1e-6  # of every norm


def autoencoder_kl(
    image_shape: Sequence[int],
    latent_dim: int,
    params_per_pixel: int,
    block_out_channels: Sequence[int] = (32, 64, 64),
    layers_per_block: int = 1,
    norm_num_groups: int = 8,
    mid_block_add_attention: bool = True,
    use_quant_conv: bool = True,
    weights: str | None = None,
    num_classes: int = 0,
    encoder_outputs: int | None = None,
) -> tuple[SpatialEncoder, SpatialDecoder]:
    """The first stage of latent diffusion (Rombach et al. 2022), with a latent (c, h, w).

    An image is halved once less often than there are `block_out_channels`: h = H / 2^(n - 1). c is what `latent_dim` leaves
    for each of the h w places, c = latent_dim / (h w). As in diffusers' `AutoencoderKL` the networks see pixels as 2 x - 1,
    and what the decoder says, o, is (o + 1) / 2 here, so that the parameter of a Gaussian is an image in [0, 1]. Labels are
    further channels, alike at all places. weights: a folder or safetensors file in the format of diffusers to start from.

    Raises VAEError for images that cannot be halved so often, a `latent_dim` that the places cannot share, groups that do not
    divide a width, a posterior that takes more than a mean and a log-variance, and weights of another architecture.
    """
    shape = checked_image_shape(image_shape, latent_dim, params_per_pixel, num_classes)
    widths = checked_widths(block_out_channels, "network.block_out_channels")
    whole("network.layers_per_block", layers_per_block, most=100)
    whole("network.norm_num_groups", norm_num_groups)
    if not widths:
        raise VAEError("network.block_out_channels needs at least one width.")
    if uneven := [width for width in widths if width % norm_num_groups]:
        raise VAEError(f"network.norm_num_groups={norm_num_groups} must divide every width, and not {uneven[0]}.")
    latent_shape = latent_shape_of(shape, latent_dim, len(widths) - 1)
    if encoder_outputs not in (None, latent_dim, 2 * latent_dim):
        raise VAEError(
            "network=autoencoder_kl gives a number, or a mean and a log-variance per latent: use posterior=diagonal, fsq or vq."
        )
    if weights is not None and encoder_outputs == latent_dim:
        raise VAEError("network.weights give a mean and a log-variance per latent: use posterior=diagonal.")
    options = (widths, layers_per_block, norm_num_groups, mid_block_add_attention, use_quant_conv)
    per_latent = (encoder_outputs or 2 * latent_dim) // latent_dim
    encoder = SpatialEncoder(shape[0], latent_shape, *options, num_classes=num_classes, per_latent=per_latent)
    decoder = SpatialDecoder(shape, latent_shape, params_per_pixel, *options, num_classes=num_classes)
    if weights is not None:
        from vae.networks.diffusers_format import load_weights

        load_weights(encoder, decoder, weights)
        decoder.keeps_bias = True
    return encoder, decoder


def latent_shape_of(image_shape: tuple[int, int, int], latent_dim: int, halvings: int) -> tuple[int, int, int]:
    """(c, h, w) of `latent_dim` numbers at the places that so many halvings leave. Raises VAEError where they do not fit."""
    _, height, width = image_shape
    factor = 2**halvings
    if height % factor or width % factor:
        raise VAEError(
            f"network=autoencoder_kl halves an image {halvings} times, and {height}x{width} cannot be: it takes sides that "
            f"are multiples of {factor}, such as {-(-height // factor) * factor}x{-(-width // factor) * factor}, "
            f"or fewer widths than the {halvings + 1} of network.block_out_channels."
        )
    height, width = height // factor, width // factor
    if latent_dim % (height * width):
        raise VAEError(
            f"model.latent_dim={latent_dim} cannot be shared by {height}x{width} places: network=autoencoder_kl takes a "
            f"multiple of {height * width} for these images, such as {4 * height * width} for 4 channels."
        )
    return latent_dim // (height * width), height, width


class SpatialEncoder(nn.Module):
    """(B, C, H, W) in [0, 1] [, y] -> (B, 2 c h w): the map of means, and beside it that of log-variances, each flat.

    per_latent: how many numbers each latent has; 1 where it has no log-variance.
    """

    def __init__(
        self,
        channels: int,
        latent_shape: tuple[int, int, int],
        widths: tuple[int, ...],
        layers: int,
        groups: int,
        attention: bool,
        quant_conv: bool,
        num_classes: int = 0,
        per_latent: int = 2,
    ) -> None:
        super().__init__()
        self.num_classes, outputs = num_classes, per_latent * latent_shape[0]
        #: What its sizes follow from, by the names of diffusers' config.
        self.settings: dict[str, Any] = {
            "block_out_channels": list(widths),
            "layers_per_block": layers,
            "norm_num_groups": groups,
            "mid_block_add_attention": attention,
            "use_quant_conv": quant_conv,
        }
        self.conv_in = nn.Conv2d(channels + num_classes, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownBlock(widths[max(i - 1, 0)], width, layers, groups, halves=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(widths[-1], groups, attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, padding=1)
        self.quant_conv = nn.Conv2d(outputs, outputs, 1) if quant_conv else nn.Identity()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.conv_in(with_label_maps(2 * x - 1, y, self.num_classes))
        for block in self.down_blocks:
            h = block(h)
        h = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(h))))
        return self.quant_conv(h).flatten(1)


class SpatialDecoder(Decoder):
    """(N, c h w) [, y] -> (N, P, C, H, W), of a latent that is a map (c, h, w), or one in the same proportions."""

    latent_shape: tuple[int, int, int]
    any_size = True

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        latent_shape: tuple[int, int, int],
        params_per_pixel: int,
        widths: tuple[int, ...],
        layers: int,
        groups: int,
        attention: bool,
        quant_conv: bool,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.image_shape, self.latent_shape, self.num_classes = image_shape, latent_shape, num_classes
        #: Whether the output bias is a trained one, which `set_output_bias` leaves as it is.
        self.keeps_bias = False
        self.params_per_pixel = params_per_pixel
        inputs, widths = latent_shape[0] + num_classes, widths[::-1]
        self.post_quant_conv = nn.Conv2d(inputs, inputs, 1) if quant_conv else nn.Identity()
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, attention)
        self.up_blocks = nn.ModuleList(
            UpBlock(widths[max(i - 1, 0)], width, layers + 1, groups, doubles=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], params_per_pixel * image_shape[0], 3, padding=1)

    def set_output_bias(self, bias: Tensor) -> None:
        """Start each channel's bias at the mean of that of its pixels; not where it came with trained weights."""
        if not self.keeps_bias:
            with torch.no_grad():
                self.conv_out.state_dict()["bias"].copy_(2 * bias.mean((-2, -1)).flatten() - 1)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        channels, height, width = self.latent_shape
        factor = (z.shape[-1] / (channels * height * width)) ** 0.5
        maps = z.unflatten(-1, (channels, round(height * factor), round(width * factor)))
        h = self.post_quant_conv(with_label_maps(maps, y, self.num_classes))
        h = self.mid_block(self.conv_in(h))
        for block in self.up_blocks:
            h = block(h)
        output = self.conv_out(F.silu(self.conv_norm_out(h)))
        return ((output + 1) / 2).unflatten(1, (self.params_per_pixel, self.image_shape[0]))


# --- parts ------------------------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))), (B, C, H, W) -> (B, C', H, W); the shortcut is x itself where
    C' = C, and otherwise a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs, eps=EPS), nn.GroupNorm(groups, outputs, eps=EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """x + softmax(q k' / sqrt(C)) v over the H W places, of one head, q, k and v linear in norm(x); (B, C, H, W) kept."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.to_out[0](attended).transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """A residual block, attention where it is asked for, and a residual block."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.resnets[0](x)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h)


class Resample(nn.Module):
    """A 3x3 convolution that halves a map (one row of zeros below and one column to the right of it), or one after each
    pixel has become four."""

    def __init__(self, channels: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if halves else 1, padding=0 if halves else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.halves else F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownBlock(nn.Module):
    """Residual blocks, then a halving."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, halves: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(outputs if i else inputs, outputs, groups) for i in range(layers))
        self.downsamplers = nn.ModuleList([Resample(outputs, halves=True)] if halves else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks, then a doubling."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, doubles: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(outputs if i else inputs, outputs, groups) for i in range(layers))
        self.upsamplers = nn.ModuleList([Resample(outputs, halves=False)] if doubles else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


def with_label_maps(maps: Tensor, y: Tensor | None, num_classes: int) -> Tensor:
    """maps (B, C, H, W), with a label's channels, each the same at all places, after them: (B, C + num_classes, H, W)."""
    label = with_label(maps.new_zeros(maps.shape[0], 0), y, num_classes)
    if not num_classes:
        return maps
    return torch.cat([maps, label[:, :, None, None].expand(-1, -1, *maps.shape[2:])], 1)
