"""per_image-SPLIT.npz of a run's folder: what each image of a split got from the tested weights.

`elbo`, `rate` and `nll_iwK`, each (images,) float32 in nats, in the split's order; `images` and `weights`, digests of the
pixels that were measured and of the model. Of a model that sums its label out, `elbo_given_label` and `rate_given_label`.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np


def per_image_path(folder: Path, split: str) -> Path:
    return folder / f"per_image-{split}.npz"


def read_per_image(folder: Path, split: str) -> dict[str, np.ndarray]:
    """The arrays by name; empty where the file is absent, damaged, or holds anything but what it should."""
    try:
        with np.load(per_image_path(folder, split), allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return {}
    digests = [found.get(name) for name in ("images", "weights")]
    numbers = [values for name, values in found.items() if name not in ("images", "weights")]
    if any(digest is None or digest.shape != () or digest.dtype.kind != "U" for digest in digests):
        return {}
    if any(values.ndim != 1 or values.dtype.kind != "f" or values.shape != numbers[0].shape for values in numbers):
        return {}
    return found
