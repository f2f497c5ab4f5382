"""What Hydra says of a command line that it cannot take, as one sentence that says what to type instead. Imports no torch."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Collection, Iterable
from pathlib import Path

import yaml
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

NO_NAME = re.compile(r"([\w/]+)=(?:.*,)?(null|true|false|-?\d[\d.]*)(?:,.*)?", re.IGNORECASE)
NO_OPTION = "Config group override must be a string or a list"  # how Hydra's ValueError begins


def sentence(error: Exception, configs: str) -> str | None:
    """What Hydra refuses of a command line, in words; None of any other error. configs: the folder of the command's groups."""
    if isinstance(error, InstantiationException) or not (
        isinstance(error, HydraException | InterpolationResolutionError) or str(error).startswith(NO_OPTION)
    ):
        return None
    text, cause = str(error) or str(error.__cause__), error.__cause__
    quoted = re.match(r"[^']*'(.+)'", text)  # in the first line
    named = quoted[1] if quoted else ""
    if isinstance(error, MissingConfigException) and "/" in (error.missing_cfg_file or ""):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return unknown_option(group, name, error.options or options(configs, group))
    if text.startswith("Could not override") and "Did you mean" not in text:
        return unknown_key(named, text.rpartition(" use +")[2], getattr(cause, "parent_node", None), configs)
    if text.startswith("Could not append"):
        return f"{named} is there already: leave the + out to change it."
    if text.startswith("Ambiguous value"):
        key, _, values = named.partition("=")
        return f"{named} is more than one value: add -m to sweep over them, or write '{key}=[{values}]' for a list."
    if "requires --multirun" in text:
        return f"{named} is more than one value: add -m to sweep over them."
    if "does not support sweep type" in text:
        return (
            "An interval has no end of values to sweep over: add hydra/sweeper=optuna to search it, or name the values."
        )
    if isinstance(error, OverrideParseException):
        word = error.override
        meant = (
            f"run={word}" if Path(word).is_dir() else "KEY=VALUE, with a value of spaces, commas or brackets in quotes"
        )
        return f"{word} cannot be read: write {meant}."
    if text.startswith("Error merging override "):
        text = f"{text.removeprefix('Error merging override ')}: {cause}"
    if text.startswith(NO_OPTION):
        for group, name in (found.groups() for word in sys.argv[1:] if (found := NO_NAME.fullmatch(word))):
            if known := options(configs, group):
                return unknown_option(group, name, known)
    said = re.split(r"\n\s*(?:\n|full_key:|See https:|Config search path:)", text.strip())[0]
    return " ".join(said.split()).rstrip(".:") + "."


def options(configs: str, group: str) -> list[str]:
    return sorted(path.stem for path in Path(configs, group).glob("*.yaml"))


def unknown_option(group: str, name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"{group}={name} is unknown: " + (
        f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}."
    )


def unknown_key(key: str, override: str, node: DictConfig | None, configs: str) -> str:
    """What is said of a key that is not in the config. node: of that config, wherever in it."""
    parts = re.split(r"[./]", key)
    for n in range(1, len(parts)):
        group = "/".join(parts[:n])
        files = ((name, Path(configs, group, f"{name}.yaml")) for name in options(configs, group))
        if bringing := [name for name, path in files if _brings(path, parts[n:])]:
            return f"{key} is a setting of {group}={' or '.join(bringing)}, which is not what is chosen."
    known: Iterable[str] = (
        path.relative_to(configs).as_posix() for path in Path(configs).rglob("*") if path.is_dir() and "/" in key
    )
    if node is not None and "/" not in key:
        known = _dotted(OmegaConf.to_container(node._get_root(), resolve=False), key.startswith("hydra."))
    near = closest(key, [one for one in known if not key.startswith(f"{one}.")])
    meant = f"did you mean {near}?" if near else "--help lists all keys."
    return f"{key} is unknown: {meant} (+{override} adds a new key.)"


def _brings(path: Path, parts: list[str]) -> bool:
    """Whether an option has a setting or a group of this name, a part for each level."""
    node = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    groups = [[key] for default in node.pop("defaults", []) if isinstance(default, dict) for key in default]
    for part in parts:
        if not isinstance(node, dict) or part not in node:
            return parts in groups
        node = node[part]
    return True


def _dotted(node: object, of_hydra: bool, prefix: str = "") -> list[str]:
    """All keys of a config, of groups as well as of settings; Hydra's own, or all others."""
    found = []
    for key, value in node.items() if isinstance(node, dict) else ():
        if not str(key).startswith("_") and (prefix or (key == "hydra") == of_hydra):
            found += [f"{prefix}{key}", *_dotted(value, of_hydra, f"{prefix}{key}.")]
    return found


def closest(key: str, known: Collection[str]) -> str | None:
    """The known key that was meant: one that is nearly the same, one whose last part is, or one that is about the same."""
    leaf = re.split(r"[./]", key)[-1]
    leaves = {one.rpartition(".")[2]: one for one in sorted(known, key=lambda one: (-one.count("."), one))}
    ways = (
        difflib.get_close_matches(key, known, n=1, cutoff=0.8),
        [leaves[one] for one in difflib.get_close_matches(leaf, leaves, n=1)],
        difflib.get_close_matches(key, known, n=1),
    )
    return next((found for way in ways for found in way), None)
