"""Networks that were trained on ImageNet, from published weights on disk: LPIPS, and Inception's features.

Nothing is downloaded. A folder holds the files as they are published, under their own names.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.data.module import ImageDataModule
from vae.data.storage import expanded
from vae.errors import VAEError, choose
from vae.evaluation.samples import frechet_distance, in_parts
from vae.objectives.feature import Features, untrained
from vae.precision import wide


class Published(NamedTuple):
    """What is published of a network that LPIPS compares by: the file of torchvision and that of lpips, (width, kernel, stride,
    padding) of the convolutions of each of its five blocks, which of these begin with a pooling of (kernel, stride), and the
    least side of an image that leaves something to compare."""

    backbone: str
    linear: str
    blocks: list[list[tuple[int, int, int, int]]]
    pooled: tuple[int, ...]
    pooling: tuple[int, int]
    least: int


NETWORKS = {
    "alex": Published(
        "alexnet-owt-7be5be79.pth",
        "alex.pth",
        [[(64, 11, 4, 2)], [(192, 5, 1, 2)], [(384, 3, 1, 1)], [(256, 3, 1, 1)], [(256, 3, 1, 1)]],
        (1, 2),
        (3, 2),
        31,
    ),
    "vgg": Published(
        "vgg16-397923af.pth",
        "vgg.pth",
        [[(width, 3, 1, 1)] * times for width, times in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))],
        (1, 2, 3, 4),
        (2, 2),
        16,
    ),
}
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1], as lpips has them
INCEPTION = "inception_v3_google-0cc3c7bd.pth"
FEW = 50  # images at a time


class LPIPS(Features):
    """sum over blocks of mean over places of sum_c w_c (f_c(a) - f_c(b))^2, f scaled to unit length over channels.

    Zhang et al. 2018, equation 1, version 0.1 of its weights. Images in [0, 1] at their own size, taken to [-1, 1] here; grey
    ones as three equal channels. weights: the folder of both files; network: alex or vgg. Raises VAEError without a folder, for
    images that are too small or neither grey nor RGB, and from `start` for a file that is missing, damaged or of another
    network.

    All weights are in the checkpoint. Where a file is another when that is loaded than when training began, a warning says so.
    """

    digest: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        weights: str | None = None,
        network: str = "alex",
        key: str = "objective.features.weights",
    ) -> None:
        super().__init__()
        published = NETWORKS[choose("objective.features.network", network, NETWORKS)]
        if weights is None:
            raise VAEError(
                f"LPIPS needs weights that are not shipped: set {key} to a folder with {published.backbone} of torchvision and "
                f"{published.linear} of lpips."
            )
        channels, height, width = image_shape
        if channels not in (1, 3):
            raise VAEError(f"LPIPS compares grey and RGB images, and these have {channels} channels.")
        if min(height, width) < published.least:
            raise VAEError(
                f"LPIPS of {network} needs images of at least {published.least}x{published.least} pixels, not {height}x{width}."
            )
        self.key, self.files = key, [expanded(weights) / name for name in (published.backbone, published.linear)]
        layers: list[nn.Module] = []
        self.taps: list[int] = []  # the last layer of each block
        inputs = 3
        with torch.random.fork_rng(devices=[]):
            for number, convolutions in enumerate(published.blocks):
                layers += [nn.MaxPool2d(*published.pooling)] if number in published.pooled else []
                for outputs, kernel, stride, padding in convolutions:
                    layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU()]
                    inputs = outputs
                self.taps.append(len(layers) - 1)
                self.register_buffer(f"w{number}", torch.zeros(inputs))
        self.network = untrained(nn.Sequential(*layers))
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        self.register_buffer("digest", torch.zeros(2, dtype=torch.int64))

    def start(self, data: ImageDataModule | None = None) -> None:
        backbone, linear = (read_weights(file, self.key) for file in self.files)
        try:
            self.network.load_state_dict({name: backbone[f"features.{name}"] for name in self.network.state_dict()})
            for number in range(len(self.taps)):
                getattr(self, f"w{number}").copy_(linear[f"lin{number}.model.1.weight"].flatten())
        except (KeyError, RuntimeError) as error:
            raise VAEError(
                f"{self.files[0]} or {self.files[1].name} beside it is not of the network that it is named after."
            ) from error
        self.digest.copy_(self.digest_of_files())

    def digest_of_files(self) -> Tensor:
        """What tells these files from others, (2,)."""
        found = [hashlib.blake2b(file.read_bytes(), digest_size=8).digest() for file in self.files]
        return torch.tensor([int.from_bytes(one, "big", signed=True) for one in found])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        kept = state_dict.get(f"{prefix}digest")
        if kept is not None and all(file.is_file() for file in self.files) and not kept.equal(self.digest_of_files()):
            logging.getLogger(__name__).warning(
                f"The LPIPS weights in {self.files[0].parent} are others than when the run began: it keeps those that it began "
                "with, which its checkpoints hold."
            )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total = a.new_zeros(len(a))
        for number, (of_a, of_b) in enumerate(zip(self.features(a), self.features(b), strict=True)):
            squares = (F.normalize(of_a, dim=1, eps=1e-10) - F.normalize(of_b, dim=1, eps=1e-10)).square()
            weight = getattr(self, f"w{number}")[:, None, None]
            total = total + (weight * squares).sum(1).mean((-2, -1))
        return total

    def features(self, x: Tensor) -> list[Tensor]:
        """Activations (N, c, h, w) at the end of each block, of images in [0, 1]."""
        h = (2 * x.expand(-1, 3, -1, -1) - 1 - self.shift) / self.scale
        found = []
        for number, layer in enumerate(self.network):
            h = layer(h)
            if number in self.taps:
                found.append(h)
        return found


def read_weights(file: Path, key: str) -> dict[str, Tensor]:
    """A published state_dict. Raises VAEError that names the file and the key that says its folder."""
    if not file.is_file():
        raise VAEError(
            f"There is no {file.name} in {file.parent}: set {key} to the folder that has it; nothing is downloaded."
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise VAEError(f"{file} is damaged or holds more than weights: it was not loaded.") from error


class Inception(nn.Module):
    """torchvision's Inception v3, (N, C, H, W) in [0, 1] -> the 2048 features before its last layer.

    Images are resized to 299 x 299, bilinear with antialiasing, and taken to [-1, 1]; grey ones as three equal channels. The
    published FIDs are of another port of the weights, so that numbers compare with one another and not with those.
    Raises VAEError for a file that is missing or is of another network.
    """

    def __init__(self, folder: Path, key: str) -> None:
        super().__init__()
        from torchvision.models import inception_v3

        weights = read_weights(folder / INCEPTION, key)
        with torch.random.fork_rng(devices=[]):
            network = inception_v3(weights=None, init_weights=False, transform_input=False)
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise VAEError(f"{folder / INCEPTION} is not of torchvision's inception_v3.") from error
        network.fc = nn.Identity()
        self.network = untrained(network).eval()

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x.expand(-1, 3, -1, -1), (299, 299), mode="bilinear", align_corners=False, antialias=True)
        return self.network(2 * x - 1)


def comparison(
    folder: Path, image_shape: tuple[int, int, int], key: str
) -> Callable[[Tensor, Tensor, torch.device], dict[str, float]]:
    """What compares images (N, C, H, W) with as many others by the networks whose files are in a folder.

    lpips_alex and lpips_vgg, the mean over pairs, left out with a warning where images are too small; rfid_inception_nN, the
    Frechet distance of both sets on Inception's features. key: the setting that names the folder. Raises VAEError where it has
    none of the files, and for one that is damaged.
    """
    there = [name for name, network in NETWORKS.items() if (folder / network.backbone).is_file()]
    if not there and not (folder / INCEPTION).is_file():
        files = ", ".join([*(f"{net.backbone} with {net.linear}" for net in NETWORKS.values()), INCEPTION])
        raise VAEError(f"{key}={folder} has none of the files of published weights that are looked for: {files}.")
    metrics: dict[str, LPIPS] = {}
    for name in there:
        try:
            metrics[f"lpips_{name}"] = LPIPS(image_shape, str(folder), name, key)
        except VAEError as error:
            logging.getLogger(__name__).warning(f"lpips_{name} is left out: {error}")
    for metric in metrics.values():
        metric.start()
    inception = Inception(folder, key) if (folder / INCEPTION).is_file() else None

    def compare(real: Tensor, fake: Tensor, device: torch.device) -> dict[str, float]:
        found = {}
        for name, metric in metrics.items():
            metric.to(device)
            parts = [metric(a.to(device), b.to(device)) for a, b in zip(real.split(FEW), fake.split(FEW), strict=True)]
            found[name] = wide(torch.cat(parts)).mean().item()
        if inception is not None:
            features = in_parts(inception.to(device), device, FEW)
            found[f"rfid_inception_n{len(real)}"] = frechet_distance(features(real), features(fake))
        return found

    return compare
