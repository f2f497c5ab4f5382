"""A run's folder: what is written there, how it is read back, and what a command that resumes may change."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
import yaml
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from vae.cli import TRANSIENT, command_line
from vae.errors import VAEError

#: Where classes that configs of earlier versions name have gone, by the beginning of their `_target_`.
MOVED = {
    "vae.checkpoints.": "vae.engine.checkpoints.",
    "vae.callbacks.": "vae.engine.callbacks.",
}


#: Classes of Lightning's that configs of earlier versions name -> what stands there now, and its options by default.
REPLACED = {
    "pytorch_lightning.callbacks.ModelCheckpoint": (
        "vae.engine.checkpoints.Best",
        {"monitor": "val/loss", "mode": "min"},
    ),
    "pytorch_lightning.loggers.CSVLogger": ("vae.engine.callbacks.records.CSVLogger", {"_partial_": True}),
}


def renewed(config: Any) -> Any:
    """`config`, plain dicts and lists, with the `_target_`s that an earlier version stored where they are today."""
    if isinstance(config, dict) and config.get("_target_") in REPLACED and config.get("filename", "best") == "best":
        target, options = REPLACED[config["_target_"]]
        return {"_target_": target, **{key: config.get(key, default) for key, default in options.items()}}
    if isinstance(config, dict):
        return {key: _renewed_target(value) if key == "_target_" else renewed(value) for key, value in config.items()}
    return [renewed(value) for value in config] if isinstance(config, list) else config


def _renewed_target(target: str) -> str:
    for old, new in MOVED.items():
        if target.startswith(old):
            return new + target.removeprefix(old)
    return target


def settings(config: DictConfig) -> dict[str, Any]:
    """The config as flat dotted keys."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        else:
            flat[prefix] = node

    walk(OmegaConf.to_container(config), "")
    return flat


def read_config(folder: Path) -> DictConfig:
    """The resolved config of a run. Raises VAEError if the folder holds none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise VAEError(f"{folder} is not a run folder: it has no config.yaml.")
    try:
        return OmegaConf.create(renewed(OmegaConf.to_container(OmegaConf.load(path))))
    except Exception as error:
        raise VAEError(f"{path} is damaged and cannot be read ({type(error).__name__}).") from error


def resumed_config(folder: Path, overrides: list[str]) -> tuple[DictConfig, list[str]]:
    """The config that a run was started with, plain `key=value` overrides of the resuming command on top; and the
    overrides that both commands named.

    Raises VAEError for an override that the run's config has no place for.
    """
    config = OmegaConf.merge(read_config(folder), {"progress_bar": True})
    stored = folder / "overrides.yaml"
    named = dict.fromkeys(OmegaConf.to_container(OmegaConf.load(stored)) if stored.is_file() else [])
    for override in overrides:
        name, _, value = override.partition("=")
        if name not in settings(config) and name not in TRANSIENT:
            raise VAEError(
                f"{override} cannot be changed on resuming: only values that {folder}/config.yaml holds can."
            )
        OmegaConf.update(config, name, yaml.safe_load(value))
        if name not in TRANSIENT:
            named = {old: None for old in named if old.partition("=")[0] != name} | {override: None}
    return config, list(named)


def read_metrics(folder: Path) -> dict[str, float]:
    """What training wrote to metrics.json; empty if the run did not finish. Raises VAEError if it is damaged."""
    return read_json(folder / "metrics.json")


def read_status(folder: Path) -> dict[str, Any]:
    """What training wrote to status.json; empty if it did not begin. Raises VAEError if it is damaged."""
    return read_json(folder / "status.json")


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise VAEError(f"{path} is damaged: it is not JSON.") from error


@contextlib.contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system releases it however the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise VAEError(f"Another process is training the run in {folder}.") from error
    try:
        yield
    finally:
        lock.release()


def continues(stored: dict[str, Any] | None, settled: dict[str, Any]) -> bool:
    """Whether training under `settled` goes on from where a run of the `stored` config was: it is the same, or longer."""
    if stored is None or settled["trainer"]["max_epochs"] < stored["trainer"]["max_epochs"]:
        return False
    longer = {**stored, "trainer": {**stored["trainer"], "max_epochs": settled["trainer"]["max_epochs"]}}
    return without_data_root(longer) == without_data_root(settled)


def without_data_root(config: dict[str, Any]) -> dict[str, Any]:
    """`config` less the folder of a data set of ours: the images are the same wherever they lie."""
    data = config.get("data", {})
    source = data.get("source", {})
    if not str(source.get("_target_")).startswith("vae.data."):
        return config
    return {**config, "data": {**data, "source": {key: value for key, value in source.items() if key != "root"}}}


def discard(folder: Path) -> None:
    """Remove what an earlier attempt at the run wrote."""
    for old in ("metrics.json", "checkpoints", "pictures"):
        path = folder / old
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for events in folder.glob("events.out.tfevents.*"):
        events.unlink()


def environment() -> dict[str, Any]:
    """What a run was made with: versions, commit, device, command line."""
    import torchvision

    try:
        here = Path(__file__).parent
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=5,
        )
        commit = git.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        commit = None
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "pytorch_lightning": pl.__version__,
        "hydra": hydra.__version__,
        "git_commit": commit,
        "device": device,
        "cores": os.cpu_count(),
        "command": command_line(),
        "date": now(),
    }


def now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
