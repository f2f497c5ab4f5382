"""Tar shards opened on disks and on the web, walked from their first member to their last, and counted once."""

from __future__ import annotations

import gzip
import hashlib
import json
import time
import urllib.request
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from tarfile import TarError
from typing import IO, Any, NamedTuple
from urllib.error import HTTPError, URLError

import numpy as np
from tqdm.auto import tqdm

from vae.data.decoding import EXTENSIONS
from vae.data.storage import TIMEOUT, reason, require_regular
from vae.errors import VAEError
from vae.files import write_text

TRIES = 4  # at a shard on the web, which goes on where it broke off
AT_ONCE = 8  # shards that are counted side by side
BLOCK = 512  # bytes, of a tar
MOST_PADDING = 1 << 20  # zeros after the end of a tar
VERSION = 1  # of what is kept of a count
BROKEN = (OSError, EOFError, HTTPException, TarError, ValueError, zlib.error)  # of a shard that is away or not whole


class Shard(NamedTuple):
    """name: a path or an address; images: how many; labels: int64 (images,), or None where they are not known."""

    name: str
    images: int
    labels: np.ndarray | None


def is_on_the_web(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


# --- a walk through one -----------------------------------------------------------------------------------------------


def members(shard: Shard, wanted: Callable[[int], bool]) -> Generator[tuple[str, bytes]]:
    """Name and content of the images whose position in the shard is wanted.

    A shard on the web is asked for again, a few times, when the connection breaks. Raises VAEError, naming the shard, for
    one that is away or damaged, and at its end for one that has another number of images than it should.
    """
    tries = TRIES if is_on_the_web(shard.name) else 1
    done = -1
    for attempt in range(1, tries + 1):
        select = _Images(lambda i, done=done: i > done and wanted(i))  # type: ignore[misc]
        try:
            for name, data in _walk(shard.name, select):
                done = select.found - 1
                yield name, data
        except BROKEN as error:
            if attempt < tries and not (isinstance(error, HTTPError) and error.code < 500):
                time.sleep(2**attempt / 4)
                continue
            raise _unreadable(shard.name, error) from error
        if select.found != shard.images:
            raise VAEError(
                f"{shard.name} has {select.found} images, and should have {shard.images}: it was changed or cut short, or "
                "data.source.images_per_shard is not what all shards have."
            )
        return


class _Images:
    """Says which files of a shard, told in their order, are images that are wanted: the first one of a sample can be."""

    def __init__(self, wanted: Callable[[int], bool]) -> None:
        self.wanted, self.found, self.key = wanted, 0, ""

    def __call__(self, name: str) -> bool:
        key, extension = _parts(name)
        if f".{extension}" not in EXTENSIONS or key == self.key:
            return False
        self.key = key
        self.found += 1
        return self.wanted(self.found - 1)


def _parts(name: str) -> tuple[str, str]:
    """The name of the sample that a file belongs to, and what it is of it."""
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    return (key, extension.lower()) if key is not None else (name, "")


def _walk(name: str, select: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files of a shard that are selected. Raises one of BROKEN if it is not whole."""
    from webdataset.tariterators import tar_file_iterator

    with _opened(name) as file:
        watched = _Watched(file)
        for member in tar_file_iterator(watched, select_files=select):
            yield member["fname"], member["data"]
        watched.require_end()


class _Watched:
    """A tar that is read, and the end of what was: Python takes a damaged header for the end, and no end for one too."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.last = file, b""

    def read(self, n: int) -> bytes:
        data = self.file.read(n)
        self.last = (self.last + data)[-BLOCK:]
        return data

    def require_end(self) -> None:
        rest = self.file.read(MOST_PADDING)
        if any(rest) or len(rest) == MOST_PADDING or any(self.last) or len(self.last) < BLOCK:
            raise EOFError("it does not end as a tar does")


@contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
    with ExitStack() as stack:
        file: Any
        if is_on_the_web(name):
            file = stack.enter_context(urllib.request.urlopen(_request(name), timeout=TIMEOUT))
        else:
            require_regular(Path(name))
            file = stack.enter_context(open(name, "rb"))
        if name.partition("?")[0].endswith((".tar.gz", ".tgz")):
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        yield file


def _request(name: str, method: str = "GET") -> urllib.request.Request:
    return urllib.request.Request(name, headers={"User-Agent": "vae"}, method=method)


def _unreadable(name: str, error: BaseException) -> VAEError:
    why = reason(error).split(" @ ")[0].rstrip(".")  # webdataset adds which object it read from
    if isinstance(error, FileNotFoundError | HTTPError | URLError | PermissionError):
        return VAEError(f"The shard {name} cannot be read ({why}).")
    return VAEError(f"The shard {name} is damaged or cut short ({why}): copy or write it again.")


# --- how much is in them ----------------------------------------------------------------------------------------------


def counted(names: Sequence[str], store: Path, labels: bool = True, images_per_shard: int | None = None) -> list[Shard]:
    """The shards with their numbers of images, and labels if they have any, as they were found before or are now.

    What was found is kept in the folder `store`, a file a shard, and counts while the shard's size and time, or what its
    server says of it, are the same. Raises VAEError for a shard that is not whole, or has no images, or not a label each.
    """
    if images_per_shard is not None:
        return [Shard(name, images_per_shard, None) for name in names]

    def shard(name: str) -> Shard:
        digest = hashlib.blake2b(repr((VERSION, name, labels, _facts(name))).encode(), digest_size=16).hexdigest()
        path = store / f"{digest}.json"
        with suppress(OSError, ValueError, KeyError):
            known = json.loads(path.read_text())
            return Shard(name, known["images"], None if known["y"] is None else np.array(known["y"], np.int64))
        found = _count(name, labels)
        with suppress(OSError):  # where nothing can be kept, it is counted again
            path.parent.mkdir(parents=True, exist_ok=True)
            y = None if found.labels is None else found.labels.tolist()
            write_text(path, json.dumps({"shard": name, "images": found.images, "y": y}))
        return found

    with ThreadPoolExecutor(AT_ONCE) as pool:
        work = pool.map(shard, names)
        return list(tqdm(work, "Looking into shards", len(names), unit="shard", dynamic_ncols=True, disable=None))


def _facts(name: str) -> tuple[Any, ...]:
    try:
        if not is_on_the_web(name):
            require_regular(Path(name))
            known = Path(name).stat()
            return known.st_size, known.st_mtime_ns
        with urllib.request.urlopen(_request(name, "HEAD"), timeout=TIMEOUT) as answer:
            return tuple(answer.headers.get(key) for key in ("Content-Length", "ETag", "Last-Modified"))
    except HTTPError as error:
        if error.code in (403, 405, 501):  # a server that only gives
            return ()
        raise _unreadable(name, error) from error
    except (OSError, HTTPException) as error:
        raise _unreadable(name, error) from error


def _count(name: str, with_labels: bool) -> Shard:
    keys: list[str] = []
    images = _Images(lambda _: False)

    def select(member: str) -> bool:
        before = images.found
        images(member)
        keys.extend([images.key] * (images.found - before))
        return with_labels and _parts(member)[1] == "cls"

    labels: dict[str, int] = {}
    try:
        for member, data in _walk(name, select):
            try:
                labels[_parts(member)[0]] = int(data)
            except ValueError as error:
                raise VAEError(
                    f"{member} of {name} must hold a label, a whole number, and holds {data[:20].decode(errors='replace')!r}."
                ) from error
    except BROKEN as error:
        raise _unreadable(name, error) from error
    if not keys:
        raise VAEError(f"The shard {name} has no images, whose names end in {', '.join(EXTENSIONS)}.")
    if not labels:
        return Shard(name, len(keys), None)
    if without := [key for key in keys if key not in labels]:
        raise VAEError(
            f"{without[0]} of {name} has no label in a .cls file, and others have: add it, or set data.source.labels=false."
        )
    return Shard(name, len(keys), np.array([labels[key] for key in keys], np.int64))
