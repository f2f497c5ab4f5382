"""Files that data sets come from and caches go to: fetched, checked against their sums, unpacked, mapped."""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
from filelock import FileLock

from vae.errors import VAEError
from vae.files import write_atomically

TIMEOUT = 20  # seconds without an answer before a server counts as out of reach


def cache_folder() -> Path:
    """Where derived files may be kept: $VAE_CACHE_DIR, otherwise `vae` in the user's cache folder."""
    own = os.environ.get("VAE_CACHE_DIR")
    return expanded(own) if own else expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "vae"


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with ~ and ~user replaced. Raises VAEError for a user who does not exist."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise VAEError(f"{path} begins with the home folder of a user who does not exist.") from error


def require_regular(path: Path) -> None:
    """Raises VAEError where something else than a file is in its place: a pipe or a device would be read for ever."""
    if path.exists() and not path.is_file():
        raise VAEError(f"{path} is not a regular file.")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes `path`; the others wait and find it made."""
    name = hashlib.blake2b(str(path.absolute()).encode(), digest_size=8).hexdigest()
    lock = FileLock(cache_folder() / "locks" / f"{name}.lock")
    # Where no lock can be kept, several processes may do the same work, each on a file of its own.
    with suppress(OSError, NotImplementedError):
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def check(path: Path, md5: str) -> None:
    """Raises VAEError naming the file if it is missing, unreadable or has another MD5."""
    require_regular(path)
    try:
        with open(path, "rb") as file:
            digest = hashlib.md5(usedforsecurity=False)
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise VAEError(f"{path} cannot be read ({reason(error)}).") from error
    if digest.hexdigest() != md5:
        raise VAEError(
            f"{path} is damaged or truncated (MD5 {digest.hexdigest()}, not {md5}): delete it and it is fetched again."
        )


def fetch(path: Path, urls: Sequence[str], md5: str) -> Path:
    """`path`, downloaded from the first address that has it unless it is there; what came must have this MD5.

    Raises VAEError saying what was looked for, where, and what to do.
    """
    require_regular(path)
    if path.exists():
        return path
    with locked(path):
        if path.exists():
            return path
        failures = []
        for url in urls:
            try:
                _download(url, path, md5)
                return path
            except (OSError, HTTPException, ValueError) as error:
                failures.append(f"{url}: {reason(error)}")
    raise VAEError(
        f"{path} is not there and could not be fetched ({'; '.join(failures)}): download it where there is a network "
        "and copy it there, or set data.source.root or VAE_DATA_DIR to a folder that has it."
    )


def _download(url: str, path: Path, md5: str) -> None:
    request = urllib.request.Request(url, headers={"User-Agent": "vae"})
    # The server is asked before any folder is made, so that offline nothing is left behind.
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:

        def copy(file: IO[bytes]) -> None:
            digest = hashlib.md5(usedforsecurity=False)
            while chunk := response.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
            if digest.hexdigest() != md5:
                raise ValueError(f"what came has MD5 {digest.hexdigest()}, not {md5}")

        write_atomically(path, copy)


def reason(error: BaseException) -> str:
    """The first line of what an exception says, or its name."""
    if isinstance(getattr(error, "reason", None), BaseException):  # a URLError wraps what went wrong
        return reason(error.reason)
    text = str(getattr(error, "strerror", None) or error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def unpack(archive: Path, folder: str) -> None:
    """Unpack `folder` of a tar or zip beside the archive, each file whole; raises VAEError if the archive is damaged.

    Only regular files are written, so that no link can lead out, and a member whose path does is refused.
    """
    target = archive.parent / folder
    try:
        with tempfile.TemporaryDirectory(dir=archive.parent, prefix=f".{folder}.") as part:
            for name, content in _members(archive):
                path = PurePosixPath(name)
                if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
                    raise VAEError(f"{archive} holds {name!r}, which would be written outside its folder: not used.")
                file = Path(part) / path
                file.parent.mkdir(parents=True, exist_ok=True)
                with content, open(file, "wb") as copy:
                    shutil.copyfileobj(content, copy)
            if not target.exists():
                os.rename(Path(part) / folder, target)
            else:  # left from an earlier attempt: every file of it is made good
                shutil.copytree(Path(part) / folder, target, copy_function=os.replace, dirs_exist_ok=True)
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, shutil.Error) as error:
        raise VAEError(f"{archive} could not be unpacked ({reason(error)}).") from error


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            yield from ((info.filename, file.open(info)) for info in file.infolist() if not info.is_dir())
    else:
        with tarfile.open(archive) as file:
            yield from ((info.name, file.extractfile(info)) for info in file if info.isfile())


def cached_bits(path: Path, shape: tuple[int, int], build: Callable[[], np.ndarray]) -> np.ndarray:
    """`build()`, uint8 of this shape, kept in a file and mapped from it, so that parallel jobs share its memory.

    The file is the bytes and then their CRC-32; one of another length or sum is built again. Where it cannot be written
    (a read-only or full disk) a warning says so and the array stays in this process's memory.
    """
    bits = open_bits(path, shape)
    if bits is not None:
        return bits
    with locked(path):
        bits = open_bits(path, shape)
        if bits is not None:
            return bits
        built = np.ascontiguousarray(build())
        try:
            write_atomically(path, lambda file: file.writelines([built, zlib.crc32(built).to_bytes(4, "big")]))
        except OSError as error:
            warnings.warn(f"The cache {path} could not be written ({reason(error)}): kept in memory.", stacklevel=2)
            return built
        bits = open_bits(path, shape)
    return built if bits is None else bits


def open_bits(path: Path, shape: tuple[int, int]) -> np.memmap | None:
    """A file written by `cached_bits`, mapped; None if it is missing or damaged."""
    with suppress(OSError, ValueError):
        if path.stat().st_size == shape[0] * shape[1] + 4:
            # copy-on-write: pages are shared with other processes, and torch sees a writable array
            stored = np.memmap(path, mode="c", shape=shape)
            with open(path, "rb") as file:
                file.seek(-4, os.SEEK_END)
                if zlib.crc32(stored) == int.from_bytes(file.read(), "big"):
                    return stored
    return None
