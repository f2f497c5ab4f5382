"""Pictures of a latent that is a map (c, h, w): its channels as grey images, what each channel and place carries."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from vae.engine.callbacks.drawing import as_rgb, draw, grid, kl_bars_on
from vae.model import VAE

MOST_CHANNELS = 16  # in a picture


def channels_by_kl(kl: Tensor, latent_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """KL of each latent (D,) -> of each channel (c,), summed over its places, and the channels, largest first, (c,).

    Where the KL is only estimated, and so not known by latent, NaN and the channels in their own order.
    """
    if kl.numel() != math.prod(latent_shape):
        return kl.new_full(latent_shape[:1], math.nan), torch.arange(latent_shape[0], device=kl.device)
    by_channel = kl.reshape(latent_shape[0], -1).sum(1)
    return by_channel, by_channel.argsort(descending=True)


def kl_maps(kl: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
    """KL of each channel in nats, largest first, over the map of what each of its places carries; one scale for all maps."""
    by_channel, order = channels_by_kl(kl, latent_shape)
    shown, maps = order[:MOST_CHANNELS].tolist(), kl.reshape(latent_shape).cpu().numpy()
    _, height, width = latent_shape
    columns = 4 if len(shown) <= 4 else 8
    rows, gap = -(-len(shown) // columns), max(1.0, 0.15 * height)
    sheet = np.full(
        (rows * (height + 2 * int(gap)), columns * (width + int(gap))), np.nan
    )  # room above each for its name
    below = 6 * sheet.shape[0] / sheet.shape[1]
    figure = Figure(figsize=(6, 2.6 + below), dpi=120)
    part = below / (2.6 + below)
    axes = figure.add_axes((0.12, part + 0.22 * (1 - part), 0.85, 0.63 * (1 - part)))
    kl_bars_on(axes, by_channel, "channel")
    place = figure.add_axes((0, 0, 1, part))
    for i, channel in enumerate(shown):
        top = (i // columns) * (height + 2 * int(gap)) + 2 * int(gap)
        left = (i % columns) * (width + int(gap))
        sheet[top : top + height, left : left + width] = maps[channel]
        place.text(left, top - 0.7, f"{channel}: {float(by_channel[channel]):.1f}", fontsize=7)
    place.imshow(sheet, vmin=0, vmax=max(float(maps.max()), 1e-9), cmap="viridis")
    place.set_axis_off()
    return draw(figure)


def latent_maps(vae: VAE, x: Tensor, kl: Tensor, y: Tensor | None = None) -> Tensor:
    """Images x, one a row, each before the posterior mean's channels as grey maps, largest KL first.

    Half grey is 0, white and black are 3 root mean squares of the channel over these images, or 3 where that is more: a
    channel that carries nothing stays grey.
    """
    _, order = channels_by_kl(kl, vae.latent_shape)
    maps = vae.encode(x, y).mean.unflatten(-1, vae.latent_shape)[:, order[:MOST_CHANNELS]]
    reach = 3 * maps.square().mean((0, 2, 3), keepdim=True).sqrt().clamp(min=1)
    grey = F.interpolate(0.5 + maps / (2 * reach), size=x.shape[-2:], mode="nearest")
    images = as_rgb(x)
    maps_as_images = F.interpolate(as_rgb(grey.flatten(0, 1).unsqueeze(1)), size=images.shape[-2:], mode="nearest")
    rows = torch.cat([images.unsqueeze(1), maps_as_images.unflatten(0, (len(x), -1))], 1)
    return grid(rows.flatten(0, 1), rows.shape[1])


def channel_traversals(
    vae: VAE, x: Tensor, kl: Tensor, y: Tensor | None = None, columns: int = 11, reach: float = 3.0
) -> Tensor:
    """One image x (1, C, H, W) decoded while all places of one channel are moved by -reach to reach from its posterior mean; a
    row per channel, largest KL first."""
    mean = vae.encode(x, y).mean
    _, order = channels_by_kl(kl, vae.latent_shape)
    shown = order[:MOST_CHANNELS].tolist()
    z = mean.unflatten(-1, vae.latent_shape).repeat(len(shown) * columns, 1, 1, 1)
    z = z.unflatten(0, (len(shown), columns))
    steps = torch.linspace(-reach, reach, columns, device=z.device)
    for row, channel in enumerate(shown):
        z[row, :, channel] += steps[:, None, None]
    flat = z.flatten(0, 1).flatten(1)
    return grid(vae.mean_image(flat, None if y is None else y[:1].expand(len(flat))), columns)
