"""Images as the Latents tab takes them in and sends them out."""

from __future__ import annotations

import base64
import io

import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from vae.data.decoding import upright
from vae.engine.callbacks.drawing import as_rgb, to_png
from vae.errors import VAEError

MOST_PIXELS = 50_000_000  # of an uploaded image
THUMBNAIL = 32  # pixels of the longer side


def opened(content: bytes, shape: tuple[int, int, int]) -> Image.Image:
    """An image file as a model of images `shape` (C, H, W) takes it: its channels, cut and scaled to its size.

    Raises VAEError for what is no image, has too many pixels, and for models of other than 1 or 3 channels.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise VAEError(f"Images of {channels} channels cannot be uploaded: 1 and 3 can.")
    try:
        file = Image.open(io.BytesIO(content))
        if file.width * file.height <= MOST_PIXELS:
            image = upright(file, channels)
            return image if image.size == (width, height) else ImageOps.fit(image, (width, height))
    except Exception as error:
        raise VAEError("This is no image that can be read: PNG, JPEG, WebP, BMP and TIFF can.") from error
    raise VAEError(f"The image has more than {MOST_PIXELS // 1_000_000} million pixels.")


def thumbnails(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, 3, h, w), the longer side THUMBNAIL pixels."""
    x = as_rgb(x)
    scale = THUMBNAIL / max(x.shape[-2:])
    return F.interpolate(x, size=[max(1, round(side * scale)) for side in x.shape[-2:]], mode="nearest")


def png(picture: Tensor) -> bytes:
    """(3, H, W) in [0, 1] as a PNG file."""
    file = io.BytesIO()
    to_png(picture).save(file, "PNG")
    return file.getvalue()


def url(picture: Tensor) -> str:
    """(3, H, W) in [0, 1] as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def gif(images: Tensor) -> bytes:
    """Images (N, C, H, W) there and back, ten a second, small ones enlarged."""
    scale, file = max(1, 128 // max(images.shape[-2:])), io.BytesIO()
    frames = [to_png(image) for image in as_rgb(images).repeat_interleave(scale, -1).repeat_interleave(scale, -2)]
    frames += frames[-2:0:-1]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=100, loop=0)
    return file.getvalue()
