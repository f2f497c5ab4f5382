"""Images and figures as one picture (3, H, W) in [0, 1], and as a file."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

LABELLED = 32  # bars that have room for a number each


def grid(images: Tensor, columns: int, padding: int = 1) -> Tensor:
    """Images (N, C, H, W) in [0, 1] as one picture; small ones are enlarged without smoothing, so that pixels show."""
    enlarge = max(1, 32 // images.shape[-2])
    images = as_rgb(images).repeat_interleave(enlarge, -1).repeat_interleave(enlarge, -2)
    return make_grid(images, nrow=columns, padding=padding * max(1, enlarge // 2), pad_value=0.5).cpu()


def as_rgb(images: Tensor) -> Tensor:
    """Images (N, C, H, W), cut to [0, 1], as a screen shows them, (N, 3, H', W').

    One channel is grey, three are red, green and blue, and a fourth is their opacity, before white. Of any other number
    each is a grey map of its own: side by side in rows, as near to a square as they go, what is left over half grey.
    """
    images = images.clamp(0, 1)
    channels = images.shape[1]
    if channels == 4:
        images = images[:, 3:] * images[:, :3] + (1 - images[:, 3:])
    elif channels not in (1, 3):
        columns = math.ceil(channels**0.5)
        rows = math.ceil(channels / columns)
        maps = F.pad(images, (0, 0, 0, 0, 0, rows * columns - channels), value=0.5).unflatten(1, (rows, columns))
        images = maps.permute(0, 1, 3, 2, 4).flatten(1, 2).flatten(2).unsqueeze(1)
    return images.expand(-1, 3, -1, -1)


def draw(figure: Figure) -> Tensor:
    """A matplotlib figure as an image (3, H, W) in [0, 1]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1).float() / 255


def kl_bars_on(axes: Axes, kl: Tensor, of: str) -> None:
    """Bars of KL (n,) in nats, largest first, each above its own number; more than LABELLED are counted by their rank."""
    values, order = kl.cpu().sort(descending=True, stable=True)
    axes.bar(range(1, len(values) + 1), values.numpy(), color="#3b6ea8")
    if len(values) <= LABELLED:
        axes.set_xticks(range(1, len(values) + 1), [str(i) for i in order.tolist()])
        axes.tick_params("x", labelsize=7 if len(values) > LABELLED // 2 else 9)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    xlabel = f"{of}, largest KL first" if len(values) <= LABELLED else f"rank of the {of} by KL"
    axes.set(xlabel=xlabel, ylabel="KL (nats)", title=f"rate {float(values.sum()):.2f} nats")


def to_png(picture: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1], rounded to 8 bits."""
    return Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
