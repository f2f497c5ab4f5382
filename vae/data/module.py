"""A data set's splits as a run sees them: limited, scaled and binarised, each batch from its own seed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from vae.data.images import Batch, Images, ImageSet, Rows, Splits, Unread, accepted
from vae.data.loader import BatchLoader, EpochSampler
from vae.data.pairs import partners_of
from vae.errors import VAEError, choose, whole
from vae.likelihoods import Likelihood
from vae.seeding import derive, generator, generators

BINARIZATIONS = ("none", "threshold", "static", "dynamic")


class ImageDataModule(pl.LightningDataModule):
    """A data set's three splits as a LightningDataModule.

    source: called without arguments, returns `Splits`. binarize: `none` (pixels in [0, 1]), `threshold` (at one half),
    `static` (one Bernoulli draw per image, fixed by `split_seed`) or `dynamic` (a fresh draw each training batch; whatever
    is measured, training images too, has one seeded draw, so that every run is measured on the same pixels). seed: of the
    training order and draws. limit: keep only the first so many images of each split. labeled: train with the labels of
    so many training images, equally many per class, and -1 for the others; what is measured has them all. Raises VAEError for
    an option that makes no sense and images that `accepted` refuses. Warns where a batch would be larger than the training
    split, and takes all of it.
    """

    def __init__(
        self,
        source: Callable[[], Splits],
        batch_size: int = 128,
        eval_batch_size: int = 500,
        binarize: str = "none",
        seed: int = 0,
        split_seed: int = 0,
        num_workers: int = 0,
        limit: int | None = None,
        labeled: int | None = None,
    ) -> None:
        super().__init__()
        choose("data.binarize", binarize, BINARIZATIONS)
        for name, size in {"batch_size": batch_size, "eval_batch_size": eval_batch_size}.items():
            whole(f"data.{name}", size)
        for name, size in {"limit": limit, "labeled": labeled}.items():
            whole(f"data.{name}", size, optional=True)
        whole("data.num_workers", num_workers, least=0)
        whole("seed", seed, least=0)
        whole("data.split_seed", split_seed, least=0)
        self.source, self.batch_size, self.eval_batch_size = source, batch_size, eval_batch_size
        self.binarize, self.seed, self.split_seed = binarize, seed, split_seed
        self.num_workers, self.limit, self.labeled = num_workers, limit, labeled
        self.splits: Splits | None = None
        self._train_measured: Images | None = None
        self._train_labels: Tensor | None = None  # before some were withheld
        self.changed_factors: int | str | None = None  # of partners, where an objective asked for them
        self.labeled_per_batch = 0
        self.test_split = "test"  # `vae.evaluate` may point it at another split

    def setup(self, stage: str | None = None) -> None:
        if self.splits is not None:
            return
        splits = accepted(self.source())
        self._all_labels = [split.y for split in splits]
        if self.limit is not None:
            splits = Splits(*(_first(split, self.limit) for split in splits))
        if self.batch_size > len(splits.train):
            warnings.warn(
                f"data.batch_size={self.batch_size} is larger than the training split, which has {len(splits.train)} images: "
                "each step takes all of them.",
                stacklevel=2,
            )
            self.batch_size = len(splits.train)
        if self.labeled is not None:
            self._train_labels = splits.train.y
            classes = self._count_classes()
            splits = splits._replace(train=partly_labelled(splits.train, self.labeled, classes, self.split_seed))
        draw_once = {"static": (True, True, True), "dynamic": (False, True, True)}.get(self.binarize, (False,) * 3)
        self.splits = Splits(
            *(
                binarized_once(split, derive(self.split_seed, "binarize", name)) if once else split
                for name, split, once in zip(Splits._fields, splits, draw_once, strict=True)
            )
        )

    def splits_ready(self) -> Splits:
        """The three splits, loaded on first use."""
        self.setup()
        return self.splits

    def measured(self, split: str) -> ImageSet:
        """A split's images as they are measured: the training images too have one draw of their pixels (under
        binarize=dynamic that on which binarize=static would train), and the labels that training did not see."""
        images = getattr(self.splits_ready(), split)
        if split != "train" or (self.binarize != "dynamic" and self.labeled is None):
            return images
        if self._train_measured is None:
            if self.binarize == "dynamic":
                images = binarized_once(images, derive(self.split_seed, "binarize", "train"))
            if self.labeled is not None:
                images = Images(images.x, self._train_labels)
            self._train_measured = images
        return self._train_measured

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.splits_ready().train.shape

    @property
    def num_classes(self) -> int:
        """Number of class labels, `limit` or not. Raises VAEError if the images carry none, or not all that it takes."""
        self.setup()
        return self._count_classes()

    def _count_classes(self) -> int:
        for name, y in zip(Splits._fields, self._all_labels, strict=True):
            if y is None or y.ndim != 1:
                has = "has none" if y is None else f"has {y.shape[1]} labels per image, which are no classes"
                raise VAEError(f"This needs class labels, and the {name} split of the data {has}.")
            if name != "train" and y.min() < 0 <= y.max():
                raise VAEError(f"The {name} split has images without a label: only training images may be without.")
        found = torch.cat(self._all_labels).unique()
        classes = len(found[found >= 0])
        if classes == 0:
            raise VAEError("No image has a label: all are -1.")
        if int(found[-1]) != classes - 1:
            raise VAEError(
                f"Class labels count from 0 without a gap, and {classes} of them end at {int(found[-1])}: "
                "np.unique(y, return_inverse=True)[1] renumbers them."
            )
        return classes

    @property
    def labelled_fraction(self) -> float:
        """The part of the training images whose label is known. Raises VAEError if the images carry none."""
        self.setup()
        self._count_classes()
        return float((self.splits.train.y >= 0).double().mean())

    def require_fit(self, likelihood: Likelihood) -> None:
        """Raises VAEError where a probability mass would be asked for that of pixels of any value in [0, 1]."""
        x, _ = self.splits_ready().train.gather(torch.zeros(1, dtype=torch.long))
        if likelihood.discrete and x.is_floating_point() and self.binarize == "none":
            raise VAEError(
                f"{type(likelihood).__name__} is for pixels of fixed values, and these images are floats: use the "
                "likelihood of a density, such as likelihood=continuous_bernoulli or gaussian_optimal, or "
                "data.binarize=dynamic, or give uint8 images."
            )

    def add_labelled(self, n: int) -> None:
        """Let n labelled images, or all if there are fewer, join every training batch. Raises VAEError for shards."""
        if n and self.splits_ready().train.sequential:
            raise VAEError("Shards are read in order, so that no labelled images of theirs can join every batch.")
        self.labeled_per_batch = n

    def add_partners(self, changed_factors: int | str) -> None:
        """Give every image a partner in which so many factors, or a `random` number, differ.

        Raises VAEError for data without factors, and for a number that makes no sense.
        """
        partners_of(self.splits_ready().train, changed_factors)
        self.changed_factors = changed_factors

    def train_mean(self) -> Tensor:
        """Mean training image in [0, 1], (C, H, W), over at most 10,000 of them (500 where each is read from a file)."""
        train = self.splits_ready().train
        index = train.glance(500 if train.streaming else 10_000)
        total = sum(self.scale(train.gather(part)[0]).double().sum(0) for part in index.split(1000))
        return (total / len(index)).float()

    def random_images(self, n: int, seed: int) -> Tensor:
        """n training images (n, C, H, W) in [0, 1], in an order of the seed's; from the first again where there are fewer."""
        train = self.splits_ready().train
        order = torch.randperm(len(train), generator=generator(seed, "pseudo-inputs"))
        return self.scale(train.gather(order[torch.arange(n) % len(train)])[0])

    def scale(self, x: Tensor) -> Tensor:
        """uint8, or float in [0, 1] -> float in [0, 1], thresholded at one half if the data is."""
        if self.binarize == "threshold":
            return (x >= (0.5 if x.is_floating_point() else 128)).float()
        return as_floats(x)

    def prepare(self, batch: Batch, training: bool) -> Batch:
        """Scale and, where it is drawn afresh, binarise a loaded batch on the device it is on."""
        x, partner = (None if images is None else self.scale(images) for images in (batch.x, batch.partner))
        if self.binarize == "dynamic" and training:
            x = bernoulli(x, generator(batch.seed, "binarize", device=x.device))
        return batch._replace(x=x, partner=partner)

    def prepare_many(self, batch: Batch, seeds: Sequence[int]) -> Batch:
        """Training batches of several runs at once, x (K, B, C, H, W): each as `prepare` makes it by its own seed."""
        x, partner = (None if images is None else self.scale(images) for images in (batch.x, batch.partner))
        if self.binarize == "dynamic":
            noise = torch.empty_like(x)
            for of_run, own in zip(noise, generators(seeds, "binarize", x.device), strict=True):
                torch.rand(of_run.shape, generator=own, out=of_run)
            x = noise.lt_(x)
        return batch._replace(x=x, partner=partner)

    def share(self, other: ImageDataModule) -> None:
        """Take the splits of another module of the same options but for the seed, which the splits do not depend on."""
        self.splits, self._all_labels = other.splits, other._all_labels
        self._train_labels = other._train_labels

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """As Lightning's, which looks through any collection, but knowing what a batch holds."""
        if isinstance(batch, Unread):
            batch = batch.read()
        x, y, partner = (t if t is None else t.to(device, non_blocking=True) for t in (batch.x, batch.y, batch.partner))
        return batch._replace(x=x, y=y, partner=partner)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.prepare(batch, training=self.trainer.training)

    def _loader(self, split: str, shuffle: bool, batch_size: int) -> BatchLoader:
        images = getattr(self.splits_ready(), split) if shuffle else self.measured(split)
        # Evaluation noise follows from the split alone: every run and every method meets the same draws.
        seed = self.seed if shuffle else self.split_seed
        guests = (
            ((images.y >= 0).nonzero()[:, 0], self.labeled_per_batch) if shuffle and self.labeled_per_batch else None
        )
        sampler = EpochSampler(len(images), batch_size, seed, shuffle, guests, images)
        partners = None if self.changed_factors is None else partners_of(images, self.changed_factors)
        return BatchLoader(images, sampler, split, self.num_workers, partners)

    def train_dataloader(self) -> BatchLoader:
        return self._loader("train", True, self.batch_size)

    def val_dataloader(self) -> BatchLoader:
        return self._loader("val", False, self.eval_batch_size)

    def test_dataloader(self) -> BatchLoader:
        return self._loader(self.test_split, False, self.eval_batch_size)

    def batches(self, split: str) -> Iterator[Batch]:
        """The prepared batches of a split, in the order and with the draws that every evaluation of it has."""
        return (self.prepare(batch, training=False) for batch in self._loader(split, False, self.eval_batch_size))

    def examples(self, split: str, n: int) -> Batch:
        """The first n prepared images of a split, as evaluation sees them."""
        images = self.measured(split)
        x, y = images.gather(torch.arange(min(n, len(images))))
        return self.prepare(Batch(x, y, derive(self.split_seed, "examples")), training=False)


def bernoulli(probability: Tensor, generator: torch.Generator) -> Tensor:
    """A draw of 0. or 1. for each element; 0 and 1 stay what they are."""
    noise = torch.rand(probability.shape, generator=generator, device=probability.device, dtype=probability.dtype)
    return noise.lt_(probability)  # in place: ten times faster than a boolean tensor that is then converted


def as_floats(x: Tensor) -> Tensor:
    """Pixels as floats in [0, 1], from uint8 or as they are."""
    return x if x.is_floating_point() else x / 255


def binarized_once(split: ImageSet, seed: int) -> Images:
    """The split with one Bernoulli draw of each pixel, kept as uint8 0 and 255."""
    if not isinstance(split, Images | Rows):
        raise VAEError("data.binarize=static and dynamic need a data set held in memory: use none or threshold here.")
    noise = generator(seed)
    parts = [
        (bernoulli(as_floats(split.gather(index)[0]), noise) * 255).to(torch.uint8)
        for index in torch.arange(len(split)).split(5000)
    ]
    return Images(torch.cat(parts), split.y)


def partly_labelled(split: ImageSet, labelled: int, classes: int, seed: int) -> ImageSet:
    """The split with the labels of `labelled` images, equally many per class, and -1 for the others.

    Warns where a class has fewer. Raises VAEError if the labels cannot be shared equally.
    """
    if not isinstance(split, Images | Rows):
        raise VAEError("data.labeled needs a data set in memory.")
    if labelled % classes:
        raise VAEError(f"data.labeled={labelled} must be a multiple of the number of classes, {classes}.")
    order = torch.randperm(len(split), generator=generator(seed, "labelled"))
    kept = [order[split.y[order] == c][: labelled // classes] for c in range(classes)]
    if short := {c: len(members) for c, members in enumerate(kept) if len(members) < labelled // classes}:
        warnings.warn(
            f"data.labeled={labelled} asks for the labels of {labelled // classes} images of each class, and there are "
            f"only {', '.join(f'{n} of class {c}' for c, n in short.items())}: {sum(map(len, kept))} are kept.",
            stacklevel=2,
        )
    y = torch.full_like(split.y, -1)
    y[torch.cat(kept)] = split.y[torch.cat(kept)]
    return replace(split, y=y)


def _first(split: ImageSet, n: int) -> ImageSet:
    index = torch.arange(min(n, len(split)))
    return split.subset(index)
