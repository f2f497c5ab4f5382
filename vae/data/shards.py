"""Images streamed from tar shards in the WebDataset layout, from disks or the web: read in order, shuffled on the way."""

from __future__ import annotations

import io
import os
import queue
import re
import threading
from collections.abc import Generator, Iterator, Sequence
from glob import glob, has_magic
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vae.data.decoding import Look, Options, decode, image_options, look_at, settled
from vae.data.images import ImageSet, Splits
from vae.data.sources import Root
from vae.data.storage import cache_folder, expanded, reason
from vae.data.tars import Shard, counted, is_on_the_web, members
from vae.errors import VAEError, whole
from vae.seeding import generator

LOOKED_AT = 64  # images whose headers tell size and channels
GLANCED_AT = 16  # shards that stand for all where only some images are wanted
AHEAD = 32  # images that each thread may have decoded before their turn

Patterns = str | Sequence[str]


def webdataset(
    path: Patterns | None = None,
    val: Patterns | None = None,
    test: Patterns | None = None,
    size: int | Sequence[int] | None = None,
    fit: str = "crop",
    channels: int | str = "auto",
    labels: bool = True,
    val_shards: int | None = None,
    test_shards: int | None = None,
    shuffle_buffer: int = 1000,
    open_shards: int = 4,
    images_per_shard: int | None = None,
    seed: int = 0,
    cache: Root | None = None,
) -> Splits:
    """Tar shards, `.tar` or `.tar.gz`, in which files of one name up to the first dot are a sample: an image and its `.cls`.

    path, val, test: a pattern such as `train-{000..099}.tar` or `train-*.tar`, a folder, an http(s) address, which may have
    braces too, or a list of these. Without val or test, `val_shards` and `test_shards` of the shards are held out by `seed`,
    a tenth and at least one unless given. size, fit, channels: as `vae.data.folder.folder` has them, and null and auto are
    settled by the first training images. labels: `.cls` holds a whole number; where no sample has one there are none.

    An epoch's order follows from its seed: the shards in a random order, `open_shards` of them side by side, and each image
    moved by up to `shuffle_buffer` places. So many images are held in memory, however many there are. Images are counted, and
    labels read, once a shard, and kept in `cache`; with `images_per_shard` nothing is counted, and there are no labels.

    Raises VAEError, in a sentence that says what to do, and for commands (`pipe:`), which are never run.
    """
    options = image_options(size, fit, channels)
    whole("data.source.shuffle_buffer", shuffle_buffer)
    whole("data.source.open_shards", open_shards)
    whole("data.source.images_per_shard", images_per_shard, optional=True)
    if path is None:
        raise VAEError("data.source.path must say which shards the images are in.")
    given = {"train": path, "val": val, "test": test}
    names = {split: shard_names(what, split) for split, what in given.items() if what is not None}
    names = hold_out_shards(names, {"val": val_shards, "test": test_shards}, seed)
    store = (expanded(cache) if cache else cache_folder()) / "shards"
    shards = {split: counted(of_split, store, labels, images_per_shard) for split, of_split in names.items()}
    every = [shard for split in Splits._fields for shard in shards[split]]
    labelled = any(shard.labels is not None for shard in every)
    if labelled and (without := [shard for shard in every if shard.labels is None]):
        raise VAEError(
            f"{without[0].name} has images without a label in a .cls file, and other shards have them: add them, or set "
            "data.source.labels=false."
        )
    if None in (options.size, options.channels):
        options = settled(shards["train"][0].name, _first_looks(shards["train"][0]), options)
    return Splits(*(Shards(shards[name], options, labelled, shuffle_buffer, open_shards) for name in Splits._fields))


# --- which shards -----------------------------------------------------------------------------------------------------


def shard_names(patterns: Patterns, split: str) -> list[str]:
    """The shards that patterns name, each once, in their order. Raises VAEError for what cannot be read."""
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise VAEError("data=webdataset needs the package webdataset: pip install 'vae[webdataset]'.") from error
    key = "data.source.path" if split == "train" else f"data.source.{split}"
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str | os.PathLike) else patterns:
        for name in [os.fspath(pattern)] if os.path.isdir(expanded(pattern)) else expand_urls(os.fspath(pattern)):
            scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", name)
            if is_on_the_web(name):
                found.append(name)
            elif scheme and scheme[1].lower() != "file":
                raise VAEError(
                    f"{key}={name} is read neither from a disk nor by http: {scheme[1]}: is refused, and no command is ever "
                    "run."
                )
            else:
                found += _local(name.removeprefix("file://").removeprefix("file:"), key)
    if not found:
        raise VAEError(f"{key}={patterns} names no shard.")
    return list(dict.fromkeys(found))


def _local(name: str, key: str) -> list[str]:
    path = expanded(name)
    if path.is_dir():
        found = sorted(str(one) for one in path.iterdir() if one.name.endswith((".tar", ".tar.gz", ".tgz")))
    elif has_magic(name):
        found = sorted(glob(str(path)))
    else:
        return [str(path)]
    if not found:
        raise VAEError(f"{key}={name} has no shards, which end in .tar, .tar.gz or .tgz.")
    return found


def hold_out_shards(names: dict[str, list[str]], held: dict[str, int | None], seed: int) -> dict[str, list[str]]:
    """The shards of each split; val and test out of train by seed where they are not given.

    Raises VAEError where there are too few, or a shard is in two splits.
    """
    for split, n in held.items():
        if split in names and n is not None:
            raise VAEError(f"data.source.{split}_shards={n} has no effect: data.source.{split} names its shards.")
        whole(f"data.source.{split}_shards", n, optional=True)
    train = names["train"]
    sizes = {split: n or max(1, len(train) // 10) for split, n in held.items() if split not in names}
    if sum(sizes.values()) >= len(train):
        wanted = " and ".join(f"{n} for {split}" for split, n in sizes.items())
        raise VAEError(
            f"There is no way to hold out {wanted} of {len(train)} shards: give data.source.val and data.source.test shards "
            "of their own, or write the data to more shards."
        )
    order = torch.randperm(len(train), generator=generator(seed, "shards")).tolist()
    split_names = dict(names)
    for split, n in sizes.items():
        split_names[split] = [train[i] for i in sorted(order[:n])]
        order = order[n:]
    split_names["train"] = [train[i] for i in sorted(order)]
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        if both := set(split_names[a]) & set(split_names[b]):
            raise VAEError(f"{min(both)} is a shard of both {a} and {b}: each shard belongs to one split.")
    return split_names


def _first_looks(shard: Shard) -> list[Look]:
    looks = []
    for position, (name, data) in enumerate(members(shard, lambda position: position < LOOKED_AT)):
        try:
            looks.append(look_at(io.BytesIO(data), name))
        except Exception as error:  # Pillow's decoders raise all kinds
            raise _undecodable(shard, name, error) from error
        if position + 1 == LOOKED_AT:
            break
    return looks


def _undecodable(shard: Shard, name: str, error: Exception) -> VAEError:
    return VAEError(f"{name} of {shard.name} cannot be decoded as an image ({reason(error).rstrip('.')}).")


# --- a split ----------------------------------------------------------------------------------------------------------


class Shards(ImageSet):
    """A split of shards: rows count through them in their order, and are read in any order at the cost of a pass."""

    streaming = True
    sequential = True

    def __init__(
        self, shards: Sequence[Shard], options: Options, labelled: bool, shuffle_buffer: int, open_shards: int
    ) -> None:
        assert options.size is not None and options.channels is not None
        self.shards, self.options = shards, options
        self.shuffle_buffer, self.open_shards = shuffle_buffer, open_shards
        self.shape = (options.channels, *options.size)
        self.y = torch.cat([torch.from_numpy(shard.labels) for shard in shards]) if labelled else None
        self.ends = np.cumsum([shard.images for shard in shards])
        self.firsts = self.ends - [shard.images for shard in shards]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def gather(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        rows, place = index.unique(return_inverse=True)
        x = next(self.batches([rows], 0))[0] if len(rows) else torch.empty(0, *self.shape, dtype=torch.uint8)
        return x[place], None if self.y is None else self.y[index]

    def glance(self, n: int) -> Tensor:
        chosen = np.unique(np.linspace(0, len(self.shards) - 1, GLANCED_AT).astype(int))
        each = -(-n // len(chosen))
        rows = [np.arange(self.firsts[i], min(self.firsts[i] + each, self.ends[i])) for i in chosen]
        return torch.from_numpy(np.concatenate(rows)[:n])

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """Shards in a random order, `open_shards` side by side; then each image is moved by less than `shuffle_buffer` places.

        An image at place i gets the key i + u, u uniform on [0, shuffle_buffer), and keys are sorted. Whoever reads in the
        old order holds at most `shuffle_buffer` images to give them out in the new one.
        """
        order = torch.randperm(len(self.shards), generator=generator).numpy()
        lanes: list[list[np.ndarray]] = [[] for _ in range(self.open_shards)]
        for i, shard in enumerate(order):
            lanes[i % self.open_shards].append(np.arange(self.firsts[shard], self.ends[shard]))
        rows = [np.concatenate(lane) for lane in lanes if lane]
        turn = np.concatenate([np.arange(len(lane)) for lane in rows])  # all first images, all second ones, ...
        side_by_side = np.concatenate(rows)[np.argsort(turn, kind="stable")]
        keys = torch.rand(len(self), generator=generator, dtype=torch.float64) * self.shuffle_buffer
        return torch.from_numpy(side_by_side)[(keys + torch.arange(len(self))).argsort(stable=True)]

    def batches(self, indices: Sequence[Tensor], workers: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The images of these rows, none of which occurs twice. Each shard is read once, by one of so many threads.

        What was read before its turn is held, which is little where the order is `shuffled` or that of the rows. The
        order of what comes out does not depend on the number of threads, and rows that are left out cost no decoding.
        """
        if not len(indices):
            return
        wanted = torch.cat(list(indices)).numpy()
        shard_of = np.searchsorted(self.ends, wanted, side="right")
        read = order_of_reading(wanted, shard_of)
        entry, entry_shard = wanted[read], shard_of[read]
        _, first = np.unique(entry_shard, return_index=True)
        turns = {int(entry_shard[i]): turn for turn, i in enumerate(np.sort(first))}
        of_thread = np.array([turns[shard] % max(1, workers) for shard in entry_shard.tolist()])
        readers = [
            _Reader(self, entry[of_thread == w], entry_shard[of_thread == w], threaded=workers > 0)
            for w in range(max(1, workers))
        ]
        held: dict[int, np.ndarray] = {}
        coming = zip(entry.tolist(), of_thread.tolist(), strict=True)
        try:
            for index in indices:
                x = np.empty((len(index), *self.shape), np.uint8)
                for place, row in enumerate(index.tolist()):
                    while row not in held:
                        next_row, thread = next(coming)
                        held[next_row] = readers[thread].get()
                    x[place] = held.pop(row)
                yield torch.from_numpy(x), None if self.y is None else self.y[index]
        finally:
            for reader in readers:
                reader.stop()

    def images(self, rows: np.ndarray, shard_of: np.ndarray) -> Generator[np.ndarray]:
        """The decoded images of these rows; those of a shard ascend, and shards may alternate."""
        streams: dict[int, Generator[tuple[str, bytes]]] = {}
        wanted = {int(shard): int(n) for shard, n in zip(*np.unique(shard_of, return_counts=True), strict=True)}
        left = dict(wanted)
        for shard in shard_of.tolist():
            if shard not in streams:
                positions = set((rows[shard_of == shard] - self.firsts[shard]).tolist())
                streams[shard] = members(self.shards[shard], positions.__contains__)
            name, data = next(streams[shard])
            try:
                image = decode(io.BytesIO(data), self.options)
            except Exception as error:  # Pillow's decoders raise all kinds
                raise _undecodable(self.shards[shard], name, error) from error
            left[shard] -= 1
            yield image
            if not left[shard]:
                stream = streams.pop(shard)
                if wanted[shard] == self.shards[shard].images:
                    next(stream, None)  # to its end, where it shows if it has more, or was cut short
                stream.close()


def order_of_reading(rows: np.ndarray, shard_of: np.ndarray) -> np.ndarray:
    """Places of rows, (n,), in the order in which they must be read to be given out in the order that they have.

    A shard is read from its first row to its last, and no further than a row that is due.
    """
    due = np.arange(len(rows))
    ascending = np.lexsort((rows, shard_of))
    for part in np.split(ascending, np.flatnonzero(np.diff(shard_of[ascending])) + 1):
        due[part] = np.minimum.accumulate(part[::-1])[::-1]  # when this or a later one of the shard is due
    return np.lexsort((rows, due))


class _Outcome(NamedTuple):
    image: np.ndarray | None
    error: BaseException | None


class _Reader:
    """Images of some rows, one after the other, read by a thread of its own if that is wanted."""

    def __init__(self, split: Shards, rows: np.ndarray, shard_of: np.ndarray, threaded: bool) -> None:
        self._images = split.images(rows, shard_of)
        self._stopped = threading.Event()
        self._queue: queue.Queue[_Outcome] | None = None
        if threaded:
            self._queue = queue.Queue(AHEAD)
            threading.Thread(target=self._read, daemon=True).start()

    def get(self) -> np.ndarray:
        if self._queue is None:
            return next(self._images)
        image, error = self._queue.get()
        if error is not None:
            raise error
        assert image is not None
        return image

    def stop(self) -> None:
        self._stopped.set()
        if self._queue is None:
            self._images.close()

    def _read(self) -> None:
        try:
            for image in self._images:
                if not self._put(_Outcome(image, None)):
                    return
        except BaseException as error:  # raised where the image is asked for
            self._put(_Outcome(None, error))

    def _put(self, outcome: _Outcome) -> bool:
        assert self._queue is not None
        while not self._stopped.is_set():
            try:
                self._queue.put(outcome, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
