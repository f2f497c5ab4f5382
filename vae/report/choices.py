"""The settings of runs, and among them the option of each config group, e.g. `posterior=fsq`: a command names few of them, and
a run's config none, so that they are told by what the config holds."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vae.cli import CONFIGS
from vae.report.keys import is_operational, is_seed, leaf
from vae.report.runs import Run, flatten, parse_scalar
from vae.report.values import canonical


@cache
def options(group: str) -> dict[str, dict[str, Any]]:
    """The options of a group by name, each as flat keys of a run's config; empty for what is no group of this package."""
    folder = Path(CONFIGS, group)
    return {path.stem: _flat(path, group.replace("/", ".")) for path in sorted(folder.glob("*.yaml")) if group}


def _flat(path: Path, prefix: str) -> dict[str, Any]:
    own = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    flat: dict[str, Any] = {}
    for default in own.pop("defaults", []):
        if isinstance(default, str) and default != "_self_":  # an option of the same group, that this one starts from
            flat |= _flat(path.with_name(f"{default}.yaml"), prefix)
    added = flatten({prefix: own} if own else {})
    return {key: value for key, value in flat.items() if not key.startswith(tuple(f"{new}." for new in added))} | added


def group_of(key: str) -> str | None:
    """The group whose choice brings a class into a config: "objective/schedule" for "objective.schedule._target_"."""
    names = key.split(".")[:-1] if key.endswith("._target_") else []
    groups = ("/".join(names[:n]) for n in range(len(names), 0, -1))
    return next(filter(options, groups), None)


def option(config: dict[str, Any], group: str, exactly: bool = False) -> str | None:
    """The option of `group` that agrees with most of a flat config, or with all that it sets; None where none has its
    classes."""
    prefix = group.replace("/", ".")
    if not any(key == prefix or key.startswith(f"{prefix}.") for key in config):
        return None
    agreeing = {}
    for name, flat in options(group).items():
        classes = [key for key in {f"{prefix}._target_", *flat} if leaf(key) == "_target_"]
        others = [key for key in flat if key not in classes]
        equal = sum(config.get(key) == flat[key] for key in others)
        if all(_same(config.get(key), flat.get(key)) for key in classes) and (equal == len(others) or not exactly):
            agreeing[name] = (len(classes), equal, -len(flat))
    return max(agreeing, key=lambda name: agreeing[name], default=None)


def _same(mine: Any, theirs: Any) -> bool:
    """Whether two classes are one; those of this package have moved, and kept their names."""
    if str(mine).startswith("vae.") and str(theirs).startswith("vae."):
        return str(mine).rpartition(".")[2] == str(theirs).rpartition(".")[2]
    return mine == theirs


def named_by(run: Run) -> dict[str, str]:
    """{"model.latent_dim": "2", "data": "mnist"} from the run's override lines; deletions are left out."""
    pairs = (line.partition("=") for line in run.overrides if "=" in line and not line.startswith("~"))
    return {key.lstrip("+").split("@")[0].strip(): value.strip() for key, _, value in pairs}


def _typed(run: Run, key: str) -> Any:
    named = named_by(run).get(key)
    return None if named is None else parse_scalar(named)


def settings_of(runs: list[Run], key: str) -> list[Any]:
    """The value of a key in each run.

    Of a group that a run's command line did not name: the option that it equals, the name that another run has for the same
    settings or the same classes, the option that it is nearest to, its class.
    """
    if any(key in run.config for run in runs) and not options(key):
        return [run.config[key] if key in run.config else _typed(run, key) for run in runs]
    typed = [_typed(run, key) for run in runs]
    if "." in key:
        return typed
    prefix = key.replace("/", ".")

    def inside(run: Run, classes: bool) -> str:
        of = {name: value for name, value in run.config.items() if name.startswith(f"{prefix}.") and not is_seed(name)}
        kept = {k: v for k, v in of.items() if leaf(k) == "_target_" or not (classes or is_operational(k, [run]))}
        return canonical(kept)

    def by_others(classes: bool) -> list[Any]:
        signatures = [inside(run, classes) for run in runs]
        names: dict[str, dict[str, Any]] = {}
        for signature, value in zip(signatures, typed, strict=True):
            if value is not None:
                names.setdefault(signature, {})[canonical(value)] = value
        return [next(iter(found.values())) if len(found := names.get(s, {})) == 1 else None for s in signatures]

    ways = [
        typed,
        [option(run.config, key, exactly=True) for run in runs],
        by_others(classes=False),
        by_others(classes=True),
        [option(run.config, key) for run in runs],
        [run.config.get(f"{prefix}._target_") for run in runs],
    ]
    return [
        next((value for value in found if value is not None), None) if run.config else found[0]
        for run, found in zip(runs, zip(*ways, strict=True), strict=True)
    ]
