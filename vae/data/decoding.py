"""Image files decoded once, in parallel, into one file that is mapped from then on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from vae.data.storage import cache_folder, locked, reason, require_regular
from vae.errors import VAEError, choose
from vae.files import write_atomically, write_text

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


FITS = ("crop", "pad", "stretch")


GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")


OWN_SIZE_UP_TO = 128  # pixels a side that images of one size keep unless told otherwise; others become:


USUAL_SIZE = 64


ORIENTATION = 0x0112  # of EXIF


VERSION = 1  # of the decoding: another one does not read the files of this


log = logging.getLogger("vae.data")


class Options(NamedTuple):
    """How images are decoded; size (height, width) and channels as asked for, None where the files tell."""

    size: tuple[int, int] | None
    fit: str
    channels: int | None


def image_options(size: Any, fit: str, channels: int | str) -> Options:
    """Settings as options. Raises VAEError for what makes no sense."""
    choose("data.source.fit", fit, FITS)
    choose("data.source.channels", channels, (1, 3, "auto"))
    both = (size, size) if size is None or isinstance(size, int) else tuple(size)
    if size is not None and not (len(both) == 2 and all(isinstance(side, int) and side > 0 for side in both)):
        raise VAEError(f"data.source.size={size} must be a number of pixels, [height, width], or null.")
    return Options(None if size is None else both, fit, None if channels == "auto" else int(channels))


class File(NamedTuple):
    """name: from the folder, with slashes; bytes and time of the last change, in nanoseconds, -1 of a link to nothing."""

    name: str
    bytes: int
    time: int


class Look(NamedTuple):
    """size: (height, width) of an image as it will stand."""

    name: str
    size: tuple[int, int]
    channels: int


class Decoded(NamedTuple):
    """x: uint8 (N, C, H, W), mapped, zero where decoding failed; hashes: uint64 (N,); failed: why, by the file's name."""

    path: Path
    x: Tensor
    hashes: np.ndarray
    failed: dict[str, str]


def decode_once(
    root: Path,
    files: Sequence[File],
    options: Options,
    pattern: str | None = None,
    store: Path | None = None,
    skip: bool = False,
    workers: int | None = None,
) -> Decoded:
    """The decoded files, from the cache folder `store` if they are as they were, otherwise decoded into it.

    The cache is one file, whole or absent: pixels, hashes, a JSON that says what they are, and its length in 8 bytes. Its
    name holds what was asked for and what was there; a process that is killed leaves nothing that counts.
    """
    store = store or cache_folder()
    asked = hashlib.blake2b(
        repr((VERSION, os.path.realpath(root), options, pattern, skip)).encode(), digest_size=8
    ).hexdigest()
    there = hashlib.blake2b(repr(list(map(tuple, files))).encode(), digest_size=8).hexdigest()
    path = store / f"folder-{asked}-{there}.images"
    if decoded := open_decoded(path, len(files)):
        return decoded
    with locked(store / f"folder-{asked}"):
        if decoded := open_decoded(path, len(files)):
            return decoded
        for left in store.glob(f".folder-{asked}-*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        try:
            write_atomically(path, lambda file: _decode_into(file, root, files, options, skip, workers, path))
        except OSError as error:
            raise VAEError(
                f"The decoded images cannot be kept in {store} ({reason(error)}): set VAE_CACHE_DIR to another folder."
            ) from error
        for old in store.glob(f"folder-{asked}-*"):  # of what the folder held before
            if not old.name.startswith(path.name):
                old.unlink(missing_ok=True)
    decoded = open_decoded(path, len(files))
    if decoded is None:
        raise VAEError(f"{path}, which was just written, cannot be read: set VAE_CACHE_DIR to another folder.")
    return decoded


def open_decoded(path: Path, images: int) -> Decoded | None:
    """A file that `decode_once` wrote, mapped; None if it is missing or not whole."""
    if not path.is_file():  # to open a pipe would be to wait
        return None
    try:
        with open(path, "rb") as file:
            end = file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(), "big")
            file.seek(end - length)
            facts = json.loads(file.read(length))
            n, *shape = facts["shape"]
            pixels = n * int(np.prod(shape))
            if n != images or end - length != pixels + 8 * n:
                return None
            file.seek(pixels)
            hashes = np.frombuffer(file.read(8 * n), np.uint64)
        mapped = np.memmap(path, np.uint8, mode="r", shape=(n, *shape))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no tensor that cannot be written to; nobody writes to this one
        return Decoded(path, torch.from_numpy(mapped), hashes, facts["failed"])


def _decode_into(
    file: IO[bytes], root: Path, files: Sequence[File], options: Options, skip: bool, workers: int | None, path: Path
) -> None:
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    pool = ThreadPoolExecutor(workers)  # Pillow decodes and resizes outside Python's lock
    try:
        if options.size is None or options.channels is None:
            options = _settled(root, files, options, pool)
        assert options.size is not None and options.channels is not None
        shape = (options.channels, *options.size)
        pixels = int(np.prod(shape))
        hashes = np.zeros((len(files), 8), np.uint8)
        failed: dict[str, str] = {}

        def work(rows: range) -> int:
            for row in rows:
                name = files[row].name
                try:
                    image = decode(root / name, options).tobytes()
                except Exception as error:  # Pillow's decoders raise all kinds
                    failed[name] = reason(error).rstrip(".")
                    if not skip:
                        raise VAEError(
                            f"{root / name} cannot be decoded as an image ({failed[name]}): mend or remove it, or set "
                            "data.source.on_error=skip."
                        ) from error
                    continue
                os.pwrite(file.fileno(), image, row * pixels)
                hashes[row] = np.frombuffer(hashlib.blake2b(image, digest_size=8).digest(), np.uint8)
            return len(rows)

        bar = tqdm(total=len(files), unit="image", desc=f"Decoding {root}", dynamic_ncols=True, disable=None)
        with bar:
            for done in pool.map(work, _portions(len(files), workers)):
                bar.update(done)
    finally:
        pool.shutdown(cancel_futures=True)
    failed = dict(sorted(failed.items()))
    if failed:
        listed = "".join(f"{name}: {why}\n" for name, why in failed.items())
        write_text(path.with_name(f"{path.name}.skipped.txt"), listed.encode(errors="backslashreplace").decode())
    facts = json.dumps({"shape": (len(files), *shape), "failed": failed}).encode()
    file.seek(len(files) * pixels)
    file.writelines([hashes.tobytes(), facts, len(facts).to_bytes(8, "big")])
    log.info(f"Decoded {len(files) - len(failed)} images of {root} to {' x '.join(map(str, shape))} into {path}.")


def _portions(n: int, workers: int) -> Iterator[range]:
    step = max(1, min(64, n // (8 * workers)))
    return (range(first, min(first + step, n)) for first in range(0, n, step))


def _settled(root: Path, files: Sequence[File], options: Options, pool: ThreadPoolExecutor) -> Options:
    """The options with the size and channels that the files have, by their headers."""

    def look(rows: range) -> list[Look]:
        seen = []
        for row in rows:
            with suppress(Exception):  # reported when it is decoded
                seen.append(look_at(root / files[row].name, files[row].name))
        return seen

    return settled(str(root), [entry for part in pool.map(look, _portions(len(files), 8)) for entry in part], options)


def look_at(source: Path | IO[bytes], name: str) -> Look:
    """What the header of an image says. Raises whatever Pillow does."""
    if isinstance(source, Path):
        require_regular(source)
    with Image.open(source) as image:
        # a PNG without it would be decoded to look for it
        turned = "exif" in image.info and image.getexif().get(ORIENTATION, 1) >= 5
        size = (image.width, image.height) if turned else (image.height, image.width)
        return Look(name, size, 1 if image.mode in GREY_MODES else 3)


def settled(where: str, looks: Sequence[Look], options: Options) -> Options:
    """The options with the size and channels that these images have. Raises VAEError where some are grey, some coloured."""
    channels = {look.channels: look.name for look in reversed(looks)}
    if options.channels is None and len(channels) > 1:
        raise VAEError(
            f"{where} has grey images, such as {channels[1]}, and coloured ones, such as {channels[3]}: set "
            "data.source.channels to 1 or 3."
        )
    sizes = {look.size for look in looks}
    common = sizes.pop() if len(sizes) == 1 else None
    size = common if common and max(common) <= OWN_SIZE_UP_TO else (USUAL_SIZE, USUAL_SIZE)
    return Options(options.size or size, options.fit, options.channels or next(iter(channels), 1))


def decode(source: Path | IO[bytes], options: Options) -> np.ndarray:
    """One image as uint8 (C, H, W). Raises whatever Pillow does, VAEError and ValueError for what cannot be decoded."""
    if isinstance(source, Path):
        require_regular(source)
    assert options.size is not None and options.channels is not None
    with Image.open(source) as image:
        image = upright(image, options.channels)
    height, width = options.size
    if options.fit == "stretch":
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    else:
        fitted = ImageOps.fit if options.fit == "crop" else ImageOps.pad
        image = fitted(image, (width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if options.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def upright(image: Image.Image, channels: int) -> Image.Image:
    """Any image as mode L or RGB: turned as its EXIF says, 16 bits rounded to 8, transparent ones laid on white."""
    made_for_16_bits = image.format in ("PNG", "PPM")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and made_for_16_bits):
        image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"it has 32 bits a pixel, mode {image.mode}: save it with 8 or 16, or use data=arrays")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")
