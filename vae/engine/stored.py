"""What earlier versions stored, read as what it means today; and weights, read without running code from them."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from vae.cli import CONFIGS
from vae.errors import VAEError

#: Where classes that configs of earlier versions name have gone, by the beginning of their `_target_`.
MOVED = {
    "vae.checkpoints.": "vae.engine.checkpoints.",
    "vae.callbacks.": "vae.engine.callbacks.",
    "vae.likelihoods.Discretised": "vae.likelihoods.Discretized",
}

#: Options that had another name in earlier versions, by the class that takes them.
RENAMED = {
    "vae.data.module.ImageDataModule": {"labelled": "labeled"},
    "vae.objectives.labels.M2": {"labelled_per_batch": "labeled_per_batch"},
}


#: Classes of Lightning's that configs of earlier versions name -> what stands there now, and its options by default.
REPLACED: dict[str, tuple[str, dict[str, Any]]] = {
    "pytorch_lightning.callbacks.ModelCheckpoint": (
        "vae.engine.checkpoints.Best",
        {"monitor": "val/loss", "mode": "min"},
    ),
    "pytorch_lightning.loggers.CSVLogger": ("vae.engine.callbacks.records.CSVLogger", {"_partial_": True}),
}


def renewed(config: Any) -> Any:
    """`config`, plain dicts and lists, with the `_target_`s and options that an earlier version stored as they are today."""
    if isinstance(config, dict) and config.get("_target_") in REPLACED and config.get("filename", "best") == "best":
        target, options = REPLACED[config["_target_"]]
        return {"_target_": target, **{key: config.get(key, default) for key, default in options.items()}}
    if isinstance(config, dict):
        if str(config.get("_target_")).startswith("vae.objectives."):
            config = {key: value for key, value in config.items() if key != "_partial_"}  # what `setup` does today
        names = RENAMED.get(str(config.get("_target_")), {})
        config = {names.get(key, key): value for key, value in config.items()}
        return {key: _renewed_target(value) if key == "_target_" else renewed(value) for key, value in config.items()}
    return [renewed(value) for value in config] if isinstance(config, list) else config


def _renewed_target(target: str) -> str:
    for old, new in MOVED.items():
        if target.startswith(old):
            return new + target.removeprefix(old)
    return target


def is_addition(key: str, stored: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a setting of `now` that `stored` (both flat) lacks says what its absence does: a newer version added it, at the
    default of what takes it, the class beside it or conf/train.yaml."""
    parent, _, name = key.rpartition(".")
    beside = f"{parent}._target_"
    if key in stored or key not in now or stored.get(beside) != now.get(beside):
        return False
    target = "pytorch_lightning.Trainer" if parent == "trainer" else now.get(beside)
    if target is None:
        return bool(OmegaConf.select(OmegaConf.load(Path(CONFIGS) / "train.yaml"), key) == now[key])
    try:
        default = inspect.signature(pkgutil.resolve_name(target)).parameters[name].default
    except (AttributeError, ImportError, KeyError, TypeError, ValueError):
        return False
    return bool((list(default) if isinstance(default, tuple) else default) == now[key])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU. Only tensors and plain values are read, so no code in the file can run.

    Raises VAEError if the file is missing, damaged, or holds anything else.
    """
    if not Path(path).is_file():
        raise VAEError(f"There is no checkpoint at {path}: train the run first.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["state_dict"]
    except Exception as error:
        raise VAEError(f"The checkpoint {path} is damaged or holds more than weights: it was not loaded.") from error
    return content
