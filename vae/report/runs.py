"""One run's folder -> a `Run`. Damage in a file becomes the run's state and reason; it never stops the others."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vae.files import refuse_aliases

FINISHED, PRUNED, FAILED, CUT_OFF, DAMAGED = "finished", "pruned", "failed", "cut off", "damaged"

_MARKERS = ("config.yaml", "overrides.yaml", "status.json", "metrics.json")
_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")
GREATEST = 1e100  # of a number that is reported: sums, squares and axes of larger ones would not be finite
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Run:
    """What a run's folder says. `settings`, `seed`, `data` are filled in by `read_sweep`, which sees all runs.

    name: the folder's path within the sweep, as text that can be written. state: finished, pruned (by a search), failed,
    cut off or damaged; reason: one sentence for all but the first. config: flat, "model.latent_dim" -> value. metrics: flat
    floats, in the unit their name says. settings: swept key -> value. facts: what facts.json says, nothing for a run of an
    earlier version.
    data: the label of the data set; ELBOs compare only between runs with the same label.
    """

    name: str
    folder: Path
    state: str
    reason: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    epochs: int | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seed: Any = None
    data: str = ""

    @property
    def finished(self) -> bool:
        return self.state == FINISHED


class Damaged(Exception):
    """A file cannot be read; the message is a clause that names it."""


def find_run_folders(folder: Path, depth: int = 3) -> Iterator[Path]:
    """Run folders at or below `folder`, in order of name. A run's folder holds no other run; links are not followed."""
    if any((folder / marker).exists() for marker in _MARKERS):
        yield folder
    elif depth:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.is_symlink() and not child.name.startswith(".") and child.name != "report":
                yield from find_run_folders(child, depth - 1)


def read_run(folder: Path, name: str) -> Run:
    """Everything a run's folder says. Raises nothing for what is absent or damaged: see `state` and `reason`."""
    problems: list[str] = []

    def read(reader, *names: str) -> Any:
        for path in (folder / name for name in names):
            if path.is_file():
                try:
                    return reader(path)
                except Damaged as error:
                    problems.append(str(error))
        return None

    config = read(read_mapping, "config.yaml")
    overrides = read(_read_yaml, "overrides.yaml")
    status = read(read_mapping, "status.json") or {}
    metrics = read(_read_metrics, "metrics.json")
    facts = read(read_mapping, "facts.json") or {}
    environment = {}
    try:
        if (folder / "environment.json").is_file():
            environment = read_mapping(folder / "environment.json")
    except Damaged:  # says how the numbers were made, not what they are: the run still counts
        environment = {"environment.json": "damaged"}

    state, reason = _state(status, metrics, problems)
    return Run(
        name=name,
        folder=folder,
        state=state,
        reason=reason,
        config=flatten(config or {}),
        overrides=tuple(str(item) for item in overrides) if isinstance(overrides, list) else (),
        metrics=metrics or {},
        seconds=_number(status.get("seconds")),
        epochs=_number(status.get("epochs")),
        environment=environment,
        facts=facts,
        pictures={
            path.stem: path
            for path in sorted((folder / "pictures").glob("*"))
            if path.suffix.lower() in _PICTURE_SUFFIXES and path.is_file()
        },
    )


def _state(status: dict[str, Any], metrics: dict[str, float] | None, problems: list[str]) -> tuple[str, str | None]:
    state, reason = status.get("state"), status.get("reason")
    if state == FAILED:
        return FAILED, str(reason) if reason else "It failed without saying why."
    if state == PRUNED:
        return PRUNED, str(reason) if reason else "A search ended it."
    if problems:
        return DAMAGED, "; ".join(problems) + "."
    if state not in (None, FINISHED):
        return CUT_OFF, "It was cut off, or is still running."
    if metrics is None:
        return CUT_OFF, "There is no metrics.json: it was cut off before its evaluation."
    return FINISHED, None


def flatten(nested: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"latent_dim": 2}} -> {"model.latent_dim": 2}; lists are leaves, an empty mapping is None."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = None if value == {} else _finite(value)
    return flat


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        refuse_aliases(text)
        return yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise Damaged(f"{path.name} is damaged ({_first_line(error)})") from error


def _read_json(path: Path) -> Any:
    try:
        return _writable(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise Damaged(f"{path.name} is damaged ({_first_line(error)})") from error


def read_mapping(path: Path) -> dict[str, Any]:
    value = _read_json(path) if path.suffix == ".json" else _read_yaml(path)
    if not isinstance(value, dict):
        raise Damaged(f"{path.name} is damaged (it holds no table of names and values)")
    return value


def _read_metrics(path: Path) -> dict[str, float]:
    metrics = {}
    for key, value in read_mapping(path).items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise Damaged(f"{path.name} is damaged ({key} is not a number)")
        number = math.nan if value is None else value
        if GREATEST < abs(number) < math.inf:
            raise Damaged(f"{path.name} is damaged ({key} is larger than any number)")
        metrics[key] = float(number)
    return metrics


def read_yaml(path: Path) -> Any:
    """The file's content, or None where it is absent or damaged."""
    try:
        return _read_yaml(path) if path.is_file() else None
    except Damaged:
        return None


def parse_scalar(text: str) -> Any:
    """The value that a command line's `key=text` means: 4 -> the number, mnist -> the word."""
    try:
        refuse_aliases(text)
        return _finite(yaml.load(text, Loader=_Loader))
    except (yaml.YAMLError, ValueError):
        return text


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def _number(value: Any) -> float | None:
    """`value`, if it is a number that can be counted with."""
    countable = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= GREATEST
    return value if countable else None


def _finite(value: Any) -> Any:
    """`value`, or infinity for a whole number that no float holds."""
    beyond = isinstance(value, int) and abs(value) > sys.float_info.max
    return math.copysign(math.inf, value > 0 or -1) if beyond else value


def _writable(value: Any) -> Any:
    """`value` with halves of surrogate pairs, which JSON may hold and no file or terminal takes, as their escapes."""
    if isinstance(value, dict):
        return {_writable(key): _writable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_writable(one) for one in value]
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
