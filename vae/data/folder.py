"""A folder of images as a data set: which files are images, what its sub-folders say of splits and labels."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from vae.data.decoding import EXTENSIONS, File, decode_once, image_options
from vae.data.images import Images, Rows, Splits
from vae.data.sources import Root
from vae.data.splitting import split_rows, warn_of_duplicates
from vae.data.storage import cache_folder, expanded, reason
from vae.errors import VAEError, choose


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
    options = image_options(size, fit, channels)
    choose("data.source.on_error", on_error, ("raise", "skip"))
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


# --- what is there ----------------------------------------------------------------------------------------------------


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
