"""Numbers of single images, gathered while a split is measured and kept in the run's folder as per_image-SPLIT.npz."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vae.files import write_atomically
from vae.report.per_image import per_image_path, read_per_image


class PerImage:
    """Numbers of each image by name, in the order of the batches, and a digest of the images that they are of."""

    def __init__(self) -> None:
        self.images = 0
        self._values: dict[str, list[Tensor]] = {}
        self._digest = hashlib.blake2b(digest_size=16)

    def __reduce__(self) -> tuple[type[PerImage], tuple[()]]:
        return PerImage, ()  # a copy of a module begins anew: hashes cannot be copied with it

    def see(self, x: Tensor) -> None:
        """The next prepared images, (B, C, H, W) in [0, 1]; to 16 bits, since devices differ in the last bit of a float."""
        if not self.images:
            self._digest.update(repr(tuple(x.shape[1:])).encode())
        self.images += len(x)
        pixels = (x.detach().cpu().double() * 65535).round().to(torch.int32).numpy()
        self._digest.update(pixels.astype("<u2").tobytes())

    def add(self, values: dict[str, Tensor]) -> None:
        """Numbers (B,) of the images that come next under each name; what is on a device stays there for now."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(value.detach().float())

    def arrays(self) -> dict[str, np.ndarray]:
        """Every name that all images have a number for, (images,) float32; an interrupted measure leaves none."""
        whole = {name: torch.cat(parts) for name, parts in self._values.items()}
        return {name: values.cpu().numpy() for name, values in whole.items() if len(values) == self.images}

    def digest(self) -> str:
        return self._digest.hexdigest()


def digest_of(model: nn.Module) -> str:
    """The same for equal weights and buffers, wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_per_image(folder: Path, split: str, found: PerImage, model: nn.Module, again: bool = False) -> None:
    """Write per_image-SPLIT.npz, whole or not at all.

    again: the images were measured before. What the file has of the same images and the same weights is left as it is, so
    that it stays what metrics.json is the mean of, and what it lacks is added.
    """
    content: dict[str, Any] = {
        **found.arrays(),
        "images": np.array(found.digest()),
        "weights": np.array(digest_of(model)),
    }
    there = read_per_image(folder, split) if again else {}
    if there and all(there[name] == content[name] for name in ("images", "weights")):
        content |= there
    write_atomically(per_image_path(folder, split), lambda file: np.savez(file, **content))


def set_aside(folder: Path, model: nn.Module, step: int) -> Path | None:
    """Move what was measured of, and fitted to, other weights than the model's into a new folder, FOLDER/before-step-STEP, if
    anything was: evaluation-SPLIT.json and priors/. Which weights were tested last, per_image-test.npz tells.
    """
    tested, priors = read_per_image(folder, "test").get("weights"), folder / "priors"
    found = [*folder.glob("evaluation-*.json"), *([priors] if any(priors.glob("*")) else [])]
    if not found or (tested is not None and str(tested) == digest_of(model)):
        return None
    names = itertools.chain([f"before-step-{step}"], (f"before-step-{step}-{n}" for n in itertools.count(2)))
    place = next(place for name in names if not (place := folder / name).exists())
    place.mkdir()
    for path in found:
        path.rename(place / path.name)
    return place
