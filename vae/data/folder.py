"""A folder of images as a data set: decoded once, in parallel, into one file that is mapped from then on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from vae.data.images import Images, Rows, Splits
from vae.data.sources import Root
from vae.data.splitting import split_rows, warn_of_duplicates
from vae.data.storage import cache_folder, expanded, locked, reason, require_regular
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


def folder(
    path: Root | None = None,
    size: int | Sequence[int] | None = None,
    fit: str = "crop",
    channels: int | str = "auto",
    labels: bool = True,
    pattern: str | None = None,
    on_error: str = "raise",
    val_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    cache: Root | None = None,
) -> Splits:
    """The images of a folder and its sub-folders: PNG, JPEG, WebP, BMP and TIFF, or the files that `pattern` names.

    Sub-folders are labels, numbered in the order of their names, where there are at least two; with labels=False only
    places. `train/`, `val/` and `test/` are the splits where they are there, labels then lie within; a missing val or test
    is held out of train (`split_rows`).

    size: int or (height, width); None keeps the size that all images have in common if it is at most 128 pixels a side,
    and otherwise is 64. fit: `crop` cuts the middle of that shape, `pad` adds black, `stretch` changes the proportions.
    channels: 1, 3 or `auto`, what all files have. Images are turned as their EXIF says, transparent ones laid on white,
    16 bits rounded to 8; of an animation the first frame is taken. pattern: such as `*.png` or `cats/*`, against the path
    from the folder. on_error: `skip` leaves out, and lists, what cannot be decoded.

    The decoded images are kept in `cache`, the user's cache folder if not given, and used again while the names, sizes
    and times of the files are the same. x uint8 (channels, *size). Raises VAEError, in a sentence that says what to do.
    """
    options = _checked(size, fit, channels, on_error)
    if path is None:
        raise VAEError("data.source.path must say which folder the images are in.")
    root = expanded(path)
    if not root.is_dir():
        raise VAEError(f"data.source.path={path} is not a folder.")
    files = list_files(root, pattern)
    layout(root, files, labels)  # report what is wrong with it before everything is decoded
    store = expanded(cache) if cache else cache_folder()
    decoded = decode_once(root, files, options, pattern, store, skip=on_error == "skip")
    if decoded.failed:
        listed = [f"{name} ({why})" for name, why in decoded.failed.items()]
        more = f", and {len(listed) - 10} more, in {decoded.path}.skipped.txt" if len(listed) > 10 else ""
        warnings.warn(f"{len(listed)} files of {root} were skipped: {', '.join(listed[:10])}{more}.", stacklevel=2)
    kept = [row for row, file in enumerate(files) if file.name not in decoded.failed]
    if not kept:
        raise VAEError(f"None of the {len(files)} images in {root} could be decoded: see {decoded.path}.skipped.txt.")
    given, y = layout(root, [files[row] for row in kept], labels)
    rows = split_rows({name: torch.tensor(part) for name, part in given.items()}, y, val_size, test_size, seed)
    whole, place = Images(decoded.x), torch.tensor(kept)
    warn_of_duplicates(
        {name: decoded.hashes[place[part].numpy()] for name, part in rows.items()},
        lambda split, i: files[kept[int(rows[split][i])]].name,
    )
    names = [files[row].name for row in kept]
    parts = (rows[n] for n in Splits._fields)
    return Splits(
        *(Rows(whole, place[part], None if y is None else y[part], [names[i] for i in part.tolist()]) for part in parts)
    )


class Options(NamedTuple):
    """How images are decoded; size (height, width) and channels as asked for, None where the files tell."""

    size: tuple[int, int] | None
    fit: str
    channels: int | None


def _checked(size: Any, fit: str, channels: int | str, on_error: str) -> Options:
    choose("data.source.fit", fit, FITS)
    choose("data.source.channels", channels, (1, 3, "auto"))
    choose("data.source.on_error", on_error, ("raise", "skip"))
    both = (size, size) if size is None or isinstance(size, int) else tuple(size)
    if size is not None and not (len(both) == 2 and all(isinstance(side, int) and side > 0 for side in both)):
        raise VAEError(f"data.source.size={size} must be a number of pixels, [height, width], or null.")
    return Options(None if size is None else both, fit, None if channels == "auto" else int(channels))


# --- what is there ----------------------------------------------------------------------------------------------------


class File(NamedTuple):
    """name: from the folder, with slashes; bytes and time of the last change, in nanoseconds, -1 of a link to nothing."""

    name: str
    bytes: int
    time: int


def list_files(root: Path, pattern: str | None = None) -> list[File]:
    """The image files of a folder and its sub-folders, by name; links are followed, names with a dot first left out.

    Raises VAEError if there are none.
    """
    found, others, seen, waiting = [], [], {os.path.realpath(root)}, [("", os.fspath(root))]
    while waiting:
        prefix, folder = waiting.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise VAEError(f"{folder} cannot be read ({reason(error)}).") from error
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if (real := os.path.realpath(entry.path)) not in seen:  # a link that leads back would never end
                    seen.add(real)
                    waiting.append((f"{name}/", entry.path))
            elif fnmatchcase(name, pattern) if pattern else name.lower().endswith(EXTENSIONS):
                try:
                    facts = entry.stat()
                    found.append(File(name, facts.st_size, facts.st_mtime_ns))
                except OSError:
                    found.append(File(name, -1, -1))
            else:
                others.append(name)
    if not found:
        what = f"match data.source.pattern={pattern}" if pattern else f"end in {', '.join(EXTENSIONS)}"
        rest = f": the {len(others)} files that it has, such as {min(others)}, do not {what}" if others else ""
        raise VAEError(f"There are no images in {root}{rest}.")
    return sorted(found)


def layout(root: Path, files: Sequence[File], labels: bool) -> tuple[dict[str, list[int]], Tensor | None]:
    """The files of each split that the sub-folders say, all as `train` if they say none, and a label of each or None.

    Raises VAEError for a layout that can be read in two ways.
    """
    paths = [file.name.split("/") for file in files]
    tops = {path[0] for path in paths if len(path) > 1}
    given: dict[str, list[int]] = {"train": list(range(len(files)))}
    if tops & set(Splits._fields):
        beside = [path for path in paths if len(path) == 1 or path[0] not in Splits._fields]
        if "train" not in tops or beside:
            what = f"{'/'.join(beside[0])} lies beside them" if beside else "there are no images in train"
            raise VAEError(
                f"Sub-folders train, val and test of {root} are its splits, and {what}: move or rename some."
            )
        given = {name: [row for row, path in enumerate(paths) if path[0] == name] for name in Splits._fields}
        for name in ("val", "test"):
            if not given[name]:
                if (root / name).is_dir():
                    raise VAEError(f"There are no images in {root / name}: fill it, or remove it to hold some out.")
                del given[name]
        paths = [path[1:] for path in paths]
    found = [path[0] if len(path) > 1 else None for path in paths]
    classes = sorted({label for row in given["train"] if (label := found[row]) is not None})
    if not labels or not set(found) - {None}:
        return given, None
    if None in found:
        raise VAEError(
            f"Sub-folders of {root} are labels, and {files[found.index(None)].name} has none: move it, or set "
            "data.source.labels=false."
        )
    if strange := sorted({str(name) for name in found} - set(classes)):
        raise VAEError(
            f"There are no training images of {strange[0]}, which val or test has: sub-folders of {root} are labels, "
            "unless data.source.labels=false."
        )
    number: dict[str | None, int] = {name: i for i, name in enumerate(classes)}
    return given, torch.tensor([number[name] for name in found]) if len(classes) > 1 else None


# --- decoded once -----------------------------------------------------------------------------------------------------


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

    def look(rows: range) -> list[tuple[File, tuple[int, int], int]]:
        seen = []
        for row in rows:
            try:
                require_regular(root / files[row].name)
                with Image.open(root / files[row].name) as image:
                    # a PNG without it would be decoded to look for it
                    turned = "exif" in image.info and image.getexif().get(ORIENTATION, 1) >= 5
                    size = (image.width, image.height) if turned else (image.height, image.width)
                    seen.append((files[row], size, 1 if image.mode in GREY_MODES else 3))
            except Exception:  # reported when it is decoded
                continue
        return seen

    looks = [entry for part in pool.map(look, _portions(len(files), 8)) for entry in part]
    channels = {number: file.name for file, _, number in reversed(looks)}
    if options.channels is None and len(channels) > 1:
        raise VAEError(
            f"{root} has grey images, such as {channels[1]}, and coloured ones, such as {channels[3]}: set "
            "data.source.channels to 1 or 3."
        )
    sizes = {size for _, size, _ in looks}
    common = sizes.pop() if len(sizes) == 1 else None
    size = common if common and max(common) <= OWN_SIZE_UP_TO else (USUAL_SIZE, USUAL_SIZE)
    return Options(options.size or size, options.fit, options.channels or next(iter(channels), 1))


def decode(path: Path, options: Options) -> np.ndarray:
    """One image as uint8 (C, H, W). Raises whatever Pillow does, VAEError and ValueError for what cannot be decoded."""
    require_regular(path)
    assert options.size is not None and options.channels is not None
    with Image.open(path) as image:
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
