"""Files that are whole or absent: written to a temporary name, then renamed."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from vae.errors import VAEError


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Call `write(file)` on a temporary neighbour of `path` and rename it; on any failure `path` is left as it was.

    Raises VAEError if the disk is full.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if is_disk_full(error):
            raise VAEError(f"There is no space left on the disk to write {path}.") from error
        raise


def named(setting: str, value: object) -> Path:
    """The file or folder that a command's `setting=value` names. Raises VAEError where it names none, as null does."""
    if value is None or isinstance(value, bool) or not str(value):
        raise VAEError(f"{setting}={'null' if value is None else value} must be the name of a file or folder.")
    return Path(str(value))


def new_folder(setting: str, value: object) -> Path:
    """A folder for a command to write to, which it need not find. Raises VAEError if there is anything in it."""
    folder = named(setting, value)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise VAEError(f"{setting}={folder} exists already and is not an empty folder: choose another.")
    return folder


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left below `folder`, where nobody else may be writing."""
    for temporary in folder.rglob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def refuse_aliases(text: str) -> None:
    """Raises yaml.YAMLError for YAML with aliases: what runs write has none, and a few lines of them may unfold without end."""
    if "*" not in text:
        return
    import yaml  # not for those who only write

    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases, which no run writes")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")
