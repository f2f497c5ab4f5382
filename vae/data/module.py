"""Images in memory, gathered by batch; scaled and binarised on the device, each batch from its own seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vae.data.images import Batch, Images, ImageSet, Splits
from vae.data.pairs import Partners, partners_of
from vae.errors import VAEError
from vae.seeding import derive, generator

BINARIZATIONS = ("none", "threshold", "static", "dynamic")


class EpochSampler:
    """The index batches of an epoch; their order follows from (seed, epoch) alone.

    guests: (indices, n): n of these, drawn afresh, join each batch; all of them, if there are fewer.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        guests: tuple[Tensor, int] | None = None,
    ) -> None:
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.guests = guests
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch."""
        self.epoch = epoch if self.shuffle else 0

    @property
    def per_rank(self) -> int:
        # every process takes equally many images, or collective calls would wait for ever
        return self.size // self.world_size if self.shuffle else -(-(self.size - self.rank) // self.world_size)

    def __len__(self) -> int:
        return -(-self.per_rank // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        if self.shuffle:
            order = torch.randperm(self.size, generator=generator(self.seed, "order", self.epoch))
        else:
            order = torch.arange(self.size)
        batches = order[self.rank :: self.world_size][: self.per_rank].split(self.batch_size)
        if self.guests is None:
            yield from batches
            return
        indices, n = self.guests
        noise = generator(self.seed, "guests", self.epoch, self.rank)
        for batch in batches:
            yield torch.cat([batch, indices[torch.randperm(len(indices), generator=noise)[:n]]])


class BatchLoader:
    """Yields `Batch`es of a split. Resumes in the middle of an epoch through `state_dict`.

    A split in memory is gathered by index, with no worker and no collation; one that declares `streaming = True`
    goes through an ordinary `DataLoader` with `num_workers` processes. partners: makes those of a batch from its y.
    """

    def __init__(
        self,
        images: ImageSet,
        sampler: EpochSampler,
        stream: str,
        num_workers: int = 0,
        partners: Partners | None = None,
    ) -> None:
        self.images, self.sampler, self.stream, self.num_workers = images, sampler, stream, num_workers
        self.partners = partners
        self.batch_sampler = None  # Lightning looks for it wherever there is a sampler
        self._done = 0  # batches already taken from the current epoch
        self._skip = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def _gathered(self, indices: list[Tensor]) -> Iterator[tuple[Tensor, Tensor | None]]:
        if getattr(self.images, "streaming", False):
            return iter(
                DataLoader(_Gather(self.images), sampler=indices, batch_size=None, num_workers=self.num_workers)
            )
        return map(self.images.gather, indices)

    def __iter__(self) -> Iterator[Batch]:
        skip, self._skip = self._skip, 0
        self._done = skip
        indices = list(self.sampler)[skip:]
        for number, (x, y) in enumerate(self._gathered(indices), start=skip):
            self._done = number + 1
            seed = derive(self.sampler.seed, self.stream, self.sampler.epoch, self.sampler.rank, number)
            partner = None if self.partners is None else self.partners(y, generator(seed, "partners"))
            yield Batch(x, y, seed, partner)
        self._done = 0

    def state_dict(self) -> dict[str, int]:
        return {"batches_done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["batches_done"] % len(self)  # a finished epoch is followed by a whole one


class _Gather(torch.utils.data.Dataset):
    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __getitem__(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.images.gather(index)


class ImageDataModule(pl.LightningDataModule):
    """A data set's three splits as a LightningDataModule.

    source: called without arguments, returns `Splits`. binarize: `none` (pixels / 255), `threshold` (pixel >= 128),
    `static` (one Bernoulli draw an image, fixed by `split_seed`) or `dynamic` (a fresh draw each training batch; validation
    and test keep one seeded draw, so that every run is measured on the same pixels). seed: of the training order and
    draws. limit: keep only the first so many images of each split. labelled: keep the labels of so many training images,
    equally many a class, and set the others to -1. Raises VAEError for an unknown option or a batch larger than the split.
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
        labelled: int | None = None,
    ) -> None:
        super().__init__()
        if binarize not in BINARIZATIONS:
            raise VAEError(f"data.binarize={binarize!r} is unknown: choose one of {', '.join(BINARIZATIONS)}.")
        if batch_size < 1 or eval_batch_size < 1:
            raise VAEError(f"Batch sizes must be positive, not {min(batch_size, eval_batch_size)}.")
        self.source, self.batch_size, self.eval_batch_size = source, batch_size, eval_batch_size
        self.binarize, self.seed, self.split_seed = binarize, seed, split_seed
        self.num_workers, self.limit, self.labelled = num_workers, limit, labelled
        self.splits: Splits | None = None
        self.changed_factors: int | str | None = None  # of partners, where an objective asked for them
        self.labelled_per_batch = 0
        self.test_split = "test"  # `vae.evaluate` may point it at another split

    def setup(self, stage: str | None = None) -> None:
        if self.splits is not None:
            return
        splits = self.source()
        if self.limit is not None:
            splits = Splits(*(_first(split, self.limit) for split in splits))
        if self.batch_size > len(splits.train):
            raise VAEError(
                f"data.batch_size={self.batch_size} is larger than the training split, which has {len(splits.train)} images."
            )
        if self.labelled is not None:
            splits = splits._replace(train=partly_labelled(splits.train, self.labelled, self.split_seed))
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

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.splits_ready().train.shape

    @property
    def num_classes(self) -> int:
        """Number of class labels. Raises VAEError if the images carry none."""
        return int(self._class_labels().max()) + 1

    @property
    def labelled_fraction(self) -> float:
        """The part of the training images whose label is known. Raises VAEError if the images carry none."""
        return float((self._class_labels() >= 0).double().mean())

    def _class_labels(self) -> Tensor:
        labels = getattr(self.splits_ready().train, "y", None)
        if labels is None or labels.ndim != 1:
            raise VAEError("This objective or network needs class labels, and the data set has none.")
        return labels

    def add_labelled(self, n: int) -> None:
        """Let n labelled images, or all if there are fewer, join every training batch."""
        self.labelled_per_batch = n

    def add_partners(self, changed_factors: int | str) -> None:
        """Give every image a partner in which so many factors, or a `random` number, differ.

        Raises VAEError for data without factors, and for a number that makes no sense.
        """
        partners_of(self.splits_ready().train, changed_factors)
        self.changed_factors = changed_factors

    def state_dict(self) -> dict[str, Any]:
        """What a model has to know of its images. Checkpoints carry it, for `stand_in` where the data set is not."""
        labels = getattr(self.splits_ready().train, "y", None)
        one_each = labels.unique().tolist() if labels is not None and labels.ndim == 1 else None
        return {"image_shape": list(self.image_shape), "labels": one_each}

    def stand_in(self, image_shape: Sequence[int], labels: Sequence[int] | None) -> None:
        """Until `withdraw`, have black images in place of the data set's, one a label: enough to build a model by."""
        x = torch.zeros(len(labels or [0]), *image_shape, dtype=torch.uint8)
        self.splits = Splits(*[Images(x, None if labels is None else torch.tensor(labels))] * 3)

    def withdraw(self) -> None:
        """Forget the images; whoever asks for some next gets those of the data set, or what is wrong with it."""
        self.splits = None

    def train_mean(self) -> Tensor:
        """Mean training image in [0, 1], (C, H, W), over at most 10,000 of them (500 where each is read from a file)."""
        train = self.splits_ready().train
        images = 500 if getattr(train, "streaming", False) else 10_000
        index = torch.linspace(0, len(train) - 1, min(images, len(train))).long()
        total = sum(self.scale(train.gather(part)[0]).double().sum(0) for part in index.split(1000))
        return (total / len(index)).float()

    def scale(self, x: Tensor) -> Tensor:
        """uint8 -> float in [0, 1], thresholded at one half if the data is."""
        return (x >= 128).float() if self.binarize == "threshold" else x / 255

    def prepare(self, batch: Batch, training: bool) -> Batch:
        """Scale and, where it is drawn afresh, binarise a loaded batch on the device it is on."""
        x, partner = (None if images is None else self.scale(images) for images in (batch.x, batch.partner))
        if self.binarize == "dynamic" and training:
            x = bernoulli(x, generator(batch.seed, "binarize", device=x.device))
        return batch._replace(x=x, partner=partner)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """As Lightning's, which looks through any collection, but knowing what a batch holds."""
        x, y, partner = (t if t is None else t.to(device, non_blocking=True) for t in (batch.x, batch.y, batch.partner))
        return batch._replace(x=x, y=y, partner=partner)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.prepare(batch, training=self.trainer.training)

    def _loader(self, split: str, shuffle: bool, batch_size: int) -> BatchLoader:
        images = getattr(self.splits_ready(), split)
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        # Evaluation noise follows from the split alone: every run and every method meets the same draws.
        seed = self.seed if shuffle else self.split_seed
        guests = (
            ((images.y >= 0).nonzero()[:, 0], self.labelled_per_batch) if shuffle and self.labelled_per_batch else None
        )
        sampler = EpochSampler(len(images), batch_size, seed, shuffle, rank, world_size, guests)
        partners = None if self.changed_factors is None else partners_of(images, self.changed_factors)
        return BatchLoader(images, sampler, split, self.num_workers, partners)

    def train_dataloader(self) -> BatchLoader:
        return self._loader("train", True, self.batch_size)

    def val_dataloader(self) -> BatchLoader:
        return self._loader("val", False, self.eval_batch_size)

    def test_dataloader(self) -> BatchLoader:
        return self._loader(self.test_split, False, self.eval_batch_size)

    def examples(self, split: str, n: int) -> Batch:
        """The first n prepared images of a split, for pictures; as evaluation sees them."""
        images = getattr(self.splits_ready(), split)
        x, y = images.gather(torch.arange(min(n, len(images))))
        return self.prepare(Batch(x, y, derive(self.split_seed, "examples")), training=False)


def bernoulli(probability: Tensor, generator: torch.Generator) -> Tensor:
    """A draw of 0. or 1. for each element; 0 and 1 stay what they are."""
    noise = torch.rand(probability.shape, generator=generator, device=probability.device, dtype=probability.dtype)
    return noise.lt_(probability)  # in place: ten times faster than a boolean tensor that is then converted


def binarized_once(split: ImageSet, seed: int) -> Images:
    """The split with one Bernoulli draw of each pixel, kept as uint8 0 and 255."""
    if not isinstance(split, Images):
        raise VAEError("data.binarize=static and dynamic need a data set held in memory: use none or threshold here.")
    noise = generator(seed)
    parts = [(bernoulli(part.float() / 255, noise) * 255).to(torch.uint8) for part in split.x.split(5000)]
    return Images(torch.cat(parts), split.y)


def partly_labelled(split: ImageSet, labelled: int, seed: int) -> Images:
    """The split with the labels of `labelled` images, equally many a class, and -1 for the others."""
    if not isinstance(split, Images) or split.y is None or split.y.ndim != 1:
        raise VAEError("data.labelled needs a data set in memory with class labels.")
    classes = int(split.y.max()) + 1
    if labelled < classes or labelled % classes:
        raise VAEError(f"data.labelled={labelled} must be a multiple of the number of classes, {classes}.")
    order = torch.randperm(len(split), generator=generator(seed, "labelled"))
    kept = torch.cat([order[split.y[order] == c][: labelled // classes] for c in range(classes)])
    y = torch.full_like(split.y, -1)
    y[kept] = split.y[kept]
    return Images(split.x, y)


def _first(split: ImageSet, n: int) -> ImageSet:
    index = torch.arange(min(n, len(split)))
    return split.subset(index) if hasattr(split, "subset") else Images(*split.gather(index))
