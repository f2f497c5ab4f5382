"""Images held in memory and gathered by batch: the form that every data set takes, checked before anything is trained."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vae.errors import VAEError

if TYPE_CHECKING:
    from vae.data.sprites import FactorGrid


class ImageSet:
    """A split of a data set, addressed by index. A set of one's own defines `shape`, `__len__` and `gather`;
    one that is not read at random also `sequential`, `batches`, `shuffled` and `glance`."""

    #: (C, H, W).
    shape: tuple[int, int, int]
    #: Labels or factors of all images, int64 (N, ...), where they are held in memory; None where there are none.
    y: Tensor | None = None
    #: What each image is called, where it has a name, such as that of its file.
    names: Sequence[str] | None = None
    #: Whether images are read from disk one by one, and are therefore worth worker processes and not worth a look at all.
    streaming: bool = False
    #: Whether images are read in the order in which they lie, so that a process takes a stretch of an epoch's order.
    sequential: bool = False
    #: The whole grid of generative factors that the split is of, where they are known.
    grid: FactorGrid | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images of these rows, index (B,) -> (x (B, C, H, W), y int64 (B, ...) or None): x uint8, or float32 in [0, 1]; y a
        class label (B,) or, for data with known generative factors, their class indices (B, F)."""
        raise NotImplementedError

    def subset(self, index: Tensor) -> ImageSet:
        """The split of these rows alone."""
        return Images(*self.gather(index))

    def batches(self, indices: Sequence[Tensor], workers: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """`gather` of each of these; images that are read from disk, by so many processes, ahead of their turn."""
        if self.streaming:
            return iter(DataLoader(_Gather(self), sampler=indices, batch_size=None, num_workers=workers))
        return map(self.gather, indices)

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """The rows in an order for one epoch of training, int64 (N,)."""
        return torch.randperm(len(self), generator=generator)

    def glance(self, n: int) -> Tensor:
        """Up to n rows from all over the split that cost little to read, int64."""
        return torch.linspace(0, len(self) - 1, min(n, len(self))).long()


class _Gather(Dataset):
    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.images.gather(index)


@dataclass
class Images(ImageSet):
    """A split held whole in memory: x uint8, or float32 in [0, 1], (N, C, H, W); y int64 (N, ...) or None.

    NumPy arrays are taken as tensors, bool as black and white, other floats as float32, (N, H, W) as one channel;
    labels of any type that holds whole numbers as int64, (N, 1) as (N,). Raises VAEError, saying what to do, for
    anything else. The values are looked at by `accepted`.
    """

    x: Tensor
    y: Tensor | None = None
    shape: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.x = pixels_of(self.x)
        self.y = None if self.y is None else labels_of(self.y, len(self.x))
        self.shape = tuple(self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.x)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        # index_select is an order of magnitude faster than x[index] for small images
        return self.x.index_select(0, index), None if self.y is None else self.y.index_select(0, index)

    def subset(self, index: Tensor) -> Images:
        return Images(*self.gather(index))


@dataclass
class Rows(ImageSet):
    """Some images of a larger set, by row: nothing is copied, so that they may lie in a mapped file."""

    whole: ImageSet
    rows: Tensor  # int64 (n,)
    y: Tensor | None = None
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.shape = self.whole.shape

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.whole.gather(self.rows[index])[0], None if self.y is None else self.y[index]

    def subset(self, index: Tensor) -> Rows:
        names = None if self.names is None else [self.names[i] for i in index.tolist()]
        return Rows(self.whole, self.rows[index], None if self.y is None else self.y[index], names)


class Splits(NamedTuple):
    """Train, validation and test; fixed by seed, so that every run of a sweep sees the same ones."""

    train: ImageSet
    val: ImageSet
    test: ImageSet


class Batch(NamedTuple):
    """x: uint8 or float32 (B, C, H, W) as loaded, float in [0, 1] once prepared; y: int64 (B, ...) or None; seed: of
    every draw; partner: like x, images that share most of their factors with those of x, where an objective asked."""

    x: Tensor
    y: Tensor | None
    seed: int
    partner: Tensor | None = None

    @property
    def size(self) -> int:
        return len(self.x)


@dataclass
class Unread:
    """A batch that is still to be gathered, so that those of several runs can be at once."""

    images: ImageSet
    index: Tensor  # int64 (B,)
    seed: int

    @property
    def size(self) -> int:
        return len(self.index)

    def read(self) -> Batch:
        return Batch(*self.images.gather(self.index), self.seed)


Loaded = Batch | Unread


# --- what is taken for images and labels ------------------------------------------------------------------------------


def pixels_of(x: Any) -> Tensor:
    """Images as uint8, or as float32, (N, C, H, W). Raises VAEError, saying what to do, for what is none."""
    x = tensor_of(x, "Images")
    if x.ndim == 3:
        x = x.unsqueeze(1)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise VAEError(f"Images are (N, C, H, W), or (N, H, W) where they have one channel, not {tuple(x.shape)}.")
    _, first, height, last = x.shape
    if first > 4 and last < min(first, height) and (last <= 4 or first == height):
        raise VAEError(f"Images {tuple(x.shape)} look like channels last, (N, H, W, C): give x.permute(0, 3, 1, 2).")
    if x.dtype == torch.bool:
        return x.to(torch.uint8) * 255
    if x.is_floating_point():
        return x.float()
    if x.dtype != torch.uint8:
        raise VAEError(
            f"Images are uint8 from 0 to 255 or float32 from 0 to 1, not {_name(x)}: convert them, by x.to(torch.uint8) "
            "if they hold 0 to 255."
        )
    return x


def labels_of(y: Any, images: int) -> Tensor:
    """Labels of so many images as int64, (N,) or (N, F). Raises VAEError where they are none."""
    y = tensor_of(y, "Labels")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 0 or len(y) != images:
        raise VAEError(f"There are {len(y) if y.ndim else 1} labels for {images} images: each image needs one.")
    if y.is_complex() or (y.is_floating_point() and not torch.equal(y, y.round())):  # NaN is not equal to itself
        raise VAEError(
            f"Labels are whole numbers from 0, or -1 where none is known, and some of these {_name(y)} are not."
        )
    return y.long()


def tensor_of(values: Any, what: str) -> Tensor:
    """A tensor on the memory of an array, if it can be. Raises VAEError for what holds no numbers."""
    if isinstance(values, Tensor):
        return values.detach()
    try:
        array = np.ascontiguousarray(values)  # torch cannot share one that is flipped
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a read-only array is not written to here either
            return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise VAEError(
            f"{what} must be numbers in a tensor or an array, not {type(values).__name__}"
            f"{f' of {values.dtype}' if hasattr(values, 'dtype') else ''}."
        ) from error


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


# --- what can be trained on -------------------------------------------------------------------------------------------


def accepted(splits: Splits) -> Splits:
    """What a source returned, with one-hot labels as the classes they stand for, and floats of only 0 and 1 as uint8.

    Raises VAEError, in a sentence that says what to do, for what cannot be trained on: an empty split, splits that differ
    in shape or type, floats outside [0, 1], labels below -1. Warns of uint8 images whose pixels are all 0 or 1.
    """
    splits = Splits(*splits)
    for name, split in zip(Splits._fields, splits, strict=True):
        if len(split) == 0:
            raise VAEError(f"The {name} split has no images: train, val and test need at least one each.")
    first = [split.gather(torch.zeros(1, dtype=torch.long)) for split in splits]
    for name, (x, y) in zip(Splits._fields, first, strict=True):
        for what, of_split, of_train in (
            ("images", (_name(x), *x.shape[1:]), (_name(first[0][0]), *first[0][0].shape[1:])),
            ("labels", *(None if labels is None else tuple(labels.shape[1:]) for labels in (y, first[0][1]))),
        ):
            if of_split != of_train and None not in (of_split, of_train):
                raise VAEError(f"The {what} of the {name} split are {of_split}, those of the train split {of_train}.")
    if first[0][0].dtype == torch.float32:
        binary = [_checked_floats(split, name) for name, split in zip(Splits._fields, splits, strict=True)]
        if all(binary):
            splits = Splits(*(_as_uint8(split) for split in splits))
    elif first[0][0].dtype != torch.uint8:
        raise VAEError(f"gather() gives {_name(first[0][0])} images: they must be uint8, or float32 from 0 to 1.")
    elif _is_nearly_black(splits.train):
        warnings.warn(
            "The images are uint8 and every pixel is 0 or 1 of 255, which is nearly black: did you mean 0 and 255?",
            stacklevel=2,
        )
    return _with_classes(splits)


def _is_nearly_black(split: ImageSet) -> bool:
    looked_at = min(1 if split.streaming else 1000, len(split))
    return int(split.gather(torch.linspace(0, len(split) - 1, looked_at).long())[0].max()) == 1


def _checked_floats(split: ImageSet, name: str) -> bool:
    """Whether a split's floats, which must lie in [0, 1], are all 0 or 1. One that is streamed is not looked at."""
    if split.streaming:
        return False
    binary = True
    for index in torch.arange(len(split)).split(1000):
        x, _ = split.gather(index)
        inside = ((x >= 0) & (x <= 1)).flatten(1).all(1)
        if not inside.all():
            bad = int(inside.logical_not().nonzero()[0])
            low, high = float(x[bad].min()), float(x[bad].max())
            found = f"Image {int(index[bad])} of the {name} split"
            if not torch.isfinite(x[bad]).all():
                raise VAEError(f"{found} has pixels that are not finite: mend it or leave it out.")
            raise VAEError(
                f"{found} has values from {low:.8g} to {high:.8g}, and float images are from 0 to 1: scale them, such as "
                "by x / 255, or give uint8 from 0 to 255."
            )
        binary = binary and bool(((x == 0) | (x == 1)).all())
    return binary


def _as_uint8(split: ImageSet) -> ImageSet:
    """A split of floats 0 and 1 as 0 and 255 in memory: the same images in a quarter of it."""
    parts = [(split.gather(index)[0] * 255).to(torch.uint8) for index in torch.arange(len(split)).split(1000)]
    return Images(torch.cat(parts), split.y)


def _with_classes(splits: Splits) -> Splits:
    labels = [split.y for split in splits]
    for name, y in zip(Splits._fields, labels, strict=True):
        if y is not None and y.min() < -1:
            raise VAEError(
                f"The {name} split has a label {int(y.min())}: labels count from 0, and -1 is for none known."
            )
    if all(isinstance(split, Images | Rows) and is_one_hot(split.y) for split in splits):
        return Splits(*(replace(split, y=split.y.argmax(1)) for split in splits))
    return splits


def is_one_hot(y: Tensor | None) -> bool:
    return y is not None and y.ndim == 2 and bool(((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all())
