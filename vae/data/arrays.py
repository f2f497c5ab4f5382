"""Images in an array on disk as a data set: .npy, .npz, .pt or .h5, mapped where the format can be."""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vae.data.images import ImageSet, Rows, Splits, is_one_hot, labels_of, pixels_of, tensor_of
from vae.data.sources import Root
from vae.data.splitting import split_rows, warn_of_duplicates
from vae.data.storage import cache_folder, cached_bits, expanded, reason, require_regular
from vae.errors import VAEError, choose

LAYOUTS = ("NCHW", "NHWC")
FEW = 4  # no image has fewer pixels a side than this, and none whose layout can be told has more channels
AT_ONCE = 1000  # images


def arrays(
    path: Root | None = None,
    layout: str | None = None,
    range: Sequence[float] = (0.0, 1.0),
    val_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    cache: Root | None = None,
) -> Splits:
    """The images `x`, or `train`, `val` and `test`, of a file, with the labels `y`, or `y_train`, `y_val` and `y_test`.

    A .npy, and a tensor in a .pt, is x. Of x, splits are held out by seed, as is a missing val or test of train
    (`split_rows`). Images are (N, H, W), (N, C, H, W) or (N, H, W, C), uint8, bool or floats.

    layout: NCHW or NHWC, where the shape does not tell. range: the least and greatest value of floats, which become 0 and
    1. .npy, .npz without compression, .pt, and .h5 without chunks are mapped, others read into memory. Nothing is
    unpickled. x uint8, or float32 in [0, 1]. Raises VAEError, in a sentence that says what to do.
    """
    if path is None:
        raise VAEError("data.source.path must say which file the images are in.")
    file = expanded(path)
    choose("data.source.layout", layout, (*LAYOUTS, None))
    if len(range) != 2 or not range[0] < range[1]:
        raise VAEError(f"data.source.range={list(range)} must be the least and the greatest value.")
    held = read(file)
    images, labels = named(file, held)
    layout = layout or _layout(file, next(iter(images.values())))
    try:
        wholes = {
            name: Array(tensor_of(x, "Images"), layout, (float(range[0]), float(range[1])))
            for name, x in images.items()
        }
        given_y = {name: labels_of(y, len(wholes[name])) for name, y in labels.items()}
    except VAEError as error:
        raise VAEError(f"{file}: {error}") from error
    rows = split_rows(
        {name: torch.arange(len(whole)) for name, whole in wholes.items()},
        _classes(given_y.get("train")),
        val_size,
        test_size,
        seed,
    )
    hashes = _checked(file, wholes, range, expanded(cache) if cache else cache_folder())
    of_split = {name: name if name in wholes else "train" for name in Splits._fields}  # where its images lie
    warn_of_duplicates(
        {name: hashes[of_split[name]][part.numpy()] for name, part in rows.items()},
        lambda split, i: f"image {int(rows[split][i])} of {of_split[split] if len(wholes) > 1 else 'x'}",
    )
    return Splits(
        *(
            Rows(wholes[home], rows[name], given_y[home][rows[name]] if home in given_y else None)
            for name, home in of_split.items()
        )
    )


def _classes(y: Tensor | None) -> Tensor | None:
    """What splits have equal shares of: class labels, one-hot or not."""
    if y is not None and is_one_hot(y):
        return y.argmax(1)
    return y if y is not None and y.ndim == 1 else None


@dataclass
class Array(ImageSet):
    """Images as a file holds them, made uint8 or float32 (N, C, H, W) a batch at a time."""

    x: Tensor
    layout: str
    range: tuple[float, float]

    def __post_init__(self) -> None:
        if self.x.layout != torch.strided or self.x.ndim == 0:
            raise VAEError("Images must be a dense tensor, (N, H, W), (N, C, H, W) or (N, H, W, C).")
        if self.x.ndim not in (3, 4):
            raise VAEError(
                f"Images are (N, C, H, W), (N, H, W, C), or (N, H, W) where they have one channel, not {tuple(self.x.shape)}."
            )
        channels, height, width = self.gather(torch.arange(min(1, len(self.x))))[0].shape[1:]
        self.shape = channels, height, width
        if not self.x.is_floating_point() and self.range != (0.0, 1.0):
            raise VAEError("data.source.range has no effect on images that are not floats: leave it out.")

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, index: Tensor) -> tuple[Tensor, None]:
        x = self.x.index_select(0, index)
        if self.layout == "NHWC" and x.ndim == 4:
            x = x.permute(0, 3, 1, 2).contiguous()
        x = pixels_of(x)
        low, high = self.range
        # the values lie in the range; it is their rounding that may pass the end
        return ((x - low) / (high - low)).clamp_(0, 1) if self.range != (0.0, 1.0) else x, None


def named(path: Path, held: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Images and labels of a file by split, all of `train` where it has x. Raises VAEError where it is neither or both."""
    whole, splits = "x" in held, [name for name in Splits._fields if name in held]
    if whole == bool(splits) or (splits and "train" not in splits):
        raise VAEError(
            f"{path} holds {', '.join(sorted(map(str, held))) or 'nothing'}: call the images x, or train and, if they are "
            "split, val and test; and their labels y, or y_train, y_val and y_test."
        )
    images = {"train": held["x"]} if whole else {name: held[name] for name in splits}
    keys = {"train": "y"} if whole else {name: f"y_{name}" for name in splits}
    labels = {name: held[key] for name, key in keys.items() if key in held}
    if (not whole and "y" in held) or 0 < len(labels) < len(images):
        raise VAEError(
            f"{path} has labels of some splits only: each of {', '.join(keys.values())} must be there, or none."
        )
    return images, labels


def _layout(path: Path, x: Any) -> str:
    shape = tuple(x.shape)
    if len(shape) != 4:
        return "NCHW"  # of one channel, or refused as images
    first, last = shape[1] <= FEW < min(shape[2:]), shape[3] <= FEW < min(shape[1:3])
    if first == last:
        raise VAEError(
            f"{path} has images {shape}, whose channels may come first or last: set data.source.layout=NCHW or NHWC."
        )
    return "NCHW" if first else "NHWC"


def _checked(path: Path, wholes: Mapping[str, Array], range: Sequence[float], store: Path) -> dict[str, np.ndarray]:
    """A hash of each image, uint64 (N,), by where it lies. Read once: kept while size and time of the file are the same.

    Raises VAEError for floats that are not finite or lie outside `range`.
    """
    facts = path.stat()
    layout = next(iter(wholes.values())).layout
    key = (str(path.resolve()), facts.st_size, facts.st_mtime_ns, layout, list(range))
    name = hashlib.blake2b(repr(key).encode(), digest_size=8).hexdigest()
    total = sum(map(len, wholes.values()))

    def build() -> np.ndarray:
        parts = []
        for split, whole in wholes.items():
            for index in torch.arange(len(whole)).split(AT_ONCE):
                x, _ = whole.gather(index)
                if x.is_floating_point():
                    _require_range(path, split if len(wholes) > 1 else "x", whole, index)
                parts += [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in x.numpy()]
        return np.frombuffer(b"".join(parts), np.uint8).reshape(total, 8)

    hashes = np.ascontiguousarray(cached_bits(store / f"arrays-{name}.hashes", (total, 8), build)).view(np.uint64)[:, 0]
    ends = np.cumsum([len(whole) for whole in wholes.values()])[:-1]
    return dict(zip(wholes, np.split(hashes, ends), strict=True))


def _require_range(path: Path, name: str, whole: Array, index: Tensor) -> None:
    x = whole.x.index_select(0, index).float()
    inside = ((x >= whole.range[0]) & (x <= whole.range[1])).flatten(1).all(1)
    if inside.all():
        return
    bad = int(inside.logical_not().nonzero()[0])
    found = x[bad]
    if not found.isfinite().all():
        raise VAEError(f"{path}: image {int(index[bad])} of {name} has values that are not finite: mend or remove it.")
    low, high = float(found.min()), float(found.max())
    raise VAEError(
        f"{path}: image {int(index[bad])} of {name} has values from {low:.8g} to {high:.8g}, outside data.source.range="
        f"{list(map(float, whole.range))}: set it to what the values mean, such as [0, 255] or [-1, 1]."
    )


# --- formats ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """What a file holds, by name: NumPy arrays or tensors, mapped where it can be. Nothing is unpickled.

    Raises VAEError for a file that is missing, damaged, of another format, or holds anything but arrays.
    """
    readers = {".npy": _npy, ".npz": _npz, ".pt": _pt, ".pth": _pt, ".h5": _h5, ".hdf5": _h5}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise VAEError(f"data.source.path={path} must end in one of {', '.join(readers)}.")
    require_regular(path)
    try:
        return readers[suffix](path)
    except (OSError, EOFError, ValueError, KeyError, RuntimeError, zipfile.BadZipFile) as error:
        raise VAEError(f"{path} cannot be read as {suffix} ({reason(error).rstrip('.')}).") from error


def _npy(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        return {"x": _mapped_npy(path, file, path.name)}


def _npz(path: Path) -> dict[str, np.ndarray]:
    held = {}
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if member.compress_type == zipfile.ZIP_STORED:
                file.seek(member.header_offset + 26)  # what the local header says of the lengths of name and extra
                lengths = np.frombuffer(file.read(4), "<u2").sum()
                file.seek(member.header_offset + 30 + int(lengths))
                held[name] = _mapped_npy(path, file, name)
            else:
                with archive.open(member) as packed:
                    held[name] = _without_objects(path, name, lambda packed=packed: np.lib.format.read_array(packed))
    return held


def _mapped_npy(path: Path, file: Any, name: str) -> np.ndarray:
    """The array whose .npy begins at the file's position, mapped."""
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"{name} is of .npy version {version}")
    shape, fortran, dtype = read_header[version](file)
    if dtype.hasobject:
        return _without_objects(path, name, None)
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _without_objects(path: Path, name: str, get: Any) -> np.ndarray:
    try:
        if get is not None:
            return get()
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
    raise VAEError(f"{path}: {name} is a pickled object, which may run code and is not read: save an array of numbers.")


def _pt(path: Path) -> dict[str, Any]:
    def load(mmap: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            held = load(mmap=zipfile.is_zipfile(path))  # the format of torch before 1.6 cannot be mapped
    except pickle.UnpicklingError as error:
        raise VAEError(
            f"{path} holds more than tensors, or is damaged, and nothing of it was unpickled: save a tensor, or a dict of "
            "tensors."
        ) from error
    held = {"x": held} if isinstance(held, Tensor) else held
    if not isinstance(held, dict) or not all(isinstance(value, Tensor) for value in held.values()):
        raise VAEError(f"{path} holds a {type(held).__name__}: save a tensor, or a dict of tensors.")
    return held


def _h5(path: Path) -> dict[str, np.ndarray]:
    try:
        import h5py
    except ImportError as error:
        raise VAEError(f"To read {path} the package h5py is needed: pip install h5py.") from error
    held: dict[str, np.ndarray | None] = {}
    with h5py.File(path, "r") as file:
        for name, data in file.items():
            if not isinstance(data, h5py.Dataset):
                continue
            if data.dtype.hasobject:
                held[name] = None
            elif data.chunks is None and data.id.get_offset() is not None:
                held[name] = np.memmap(path, data.dtype, "r", data.id.get_offset(), data.shape)
            else:
                held[name] = data[()]
    return {name: array for name, array in held.items() if array is not None}
