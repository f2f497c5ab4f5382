"""The images that the Latents tab shows of a run: of its test split, or of the model itself where its data are not there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vae.engine.loading import LoadedRun
from vae.errors import VAEError

POINTS = 1000  # test images
DREAMED = 256  # images that stand in for them


class Examples(NamedTuple):
    """Images (N, C, H, W), the labels that the model is given, labels to colour by, and what the images are."""

    x: Tensor
    y: Tensor | None
    colours: dict[str, list[int]]
    what: str


def examples_of(run: LoadedRun) -> Examples:
    """The first POINTS test images of the run's data, or DREAMED images drawn from the model.

    Of what the config names, only this package's own classes and functions are called.
    """
    classes = run.vae.num_classes
    try:
        data = run.data
        if data.image_shape != run.image_shape:
            raise VAEError("its data set has images of another shape now")
        batch = data.examples("test", POINTS)
    except Exception as error:  # a moved folder, a missing download, a data set of one's own: the model is still here
        why = str(error).rstrip(".") if isinstance(error, VAEError) else f"{type(error).__name__}: {error}"
        y = torch.arange(DREAMED) % classes if classes else None
        x = run.sample(DREAMED, y=y)
        return Examples(
            x, y, _colours(y), f"{DREAMED} images drawn from the model, since its data are not there ({why})"
        )
    return Examples(batch.x, batch.y if classes else None, _colours(batch.y), f"{len(batch.x)} test images")


def _colours(y: Tensor | None) -> dict[str, list[int]]:
    if y is None:
        return {}
    return {"label": y.tolist()} if y.ndim == 1 else {f"factor {k}": y[:, k].tolist() for k in range(y.shape[1])}
