"""The Lightning Trainer that a config describes, and what a run asks of it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf

from vae.engine.build import instantiate
from vae.engine.callbacks.progress import Progress
from vae.engine.callbacks.records import HyperParameters
from vae.engine.checkpoints import CheckpointIO
from vae.engine.folder import settings
from vae.engine.lean import Compile, NoProfiler, make_lean
from vae.errors import VAEError


def quiet_lightning() -> None:
    """Leave out what Lightning says at every start of a run; called where a Trainer is made, never on import."""
    # Importing Lightning on a machine without CUDA sets this, and each Adam step then looks for the driver: 60 us a step.
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # what it says of devices is in environment.json
    for noise in (
        ".*smaller than the logging interval.*",
        ".*does not have many workers.*",
        ".*`isinstance.treespec, LeafSpec.`.*",
        ".*Checkpoint directory.*exists.*",
        ".*logs directory.*exists and is not empty.*",
    ):
        warnings.filterwarnings("ignore", noise)


def build_trainer(
    config: DictConfig, folder: Path | None = None, overrides: tuple[str, ...] = (), progress_bar: bool = False
) -> pl.Trainer:
    """A Lightning Trainer; with `folder=None` one that only measures and writes nothing."""
    quiet_lightning()
    options = OmegaConf.to_container(config.trainer, resolve=True)
    if options["accelerator"] == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        logging.getLogger(__name__).warning("trainer.accelerator=gpu: there is no GPU here, so the CPU is used.")
        options["accelerator"] = "cpu"
    if folder is None:
        outputs: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    else:
        outputs = {
            "callbacks": [
                *([Progress()] if progress_bar else []),
                *([Compile(config.compile)] if config.get("compile") else []),
                *(instantiate(callback) for callback in config.callbacks.values() if callback is not None),
                HyperParameters(compared(config, overrides)),
            ],
            "logger": instantiate(config.logger)(save_dir=folder) if config.logger else False,
        }
    options.setdefault("profiler", NoProfiler())
    trainer = pl.Trainer(
        **options, **outputs, default_root_dir=folder, plugins=[CheckpointIO()], enable_progress_bar=False
    )
    if folder is not None:
        stay_inside(folder, trainer)
    return make_lean(trainer)


def stay_inside(folder: Path, trainer: pl.Trainer) -> None:
    """Raises VAEError where a checkpoint or a logger's files would be written outside the run's folder."""
    places = {
        "callbacks": [
            Path(saved.dirpath or folder / "checkpoints", saved.filename or "")
            for saved in trainer.callbacks
            if isinstance(saved, pl.callbacks.ModelCheckpoint)
        ],
        "logger": [Path(logger.log_dir) for logger in trainer.loggers if getattr(logger, "log_dir", None)],
    }
    for group, paths in places.items():
        for path in paths:
            if not path.resolve().is_relative_to(folder.resolve()):
                raise VAEError(f"{group}: {path} is outside the run's folder, {folder}, and would not be kept with it.")


def compared(config: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings that runs are told apart by: the usual four, and what the command set. Few, since TensorBoard's
    HParams tab shows five unless asked for more; a group is shown by the name of its class."""
    flat = settings(config)
    chosen = {}
    for name in (
        "model.latent_dim",
        "objective.beta",
        "optimizer.lr",
        "seed",
        *(o.partition("=")[0] for o in overrides),
    ):
        group = f"{name}.source._target_" if name == "data" else f"{name}._target_"
        if name in flat:
            chosen[name] = flat[name]
        elif group in flat:
            chosen[name] = str(flat[group]).rsplit(".", 1)[-1]
    return chosen


def set_threads(threads: int | str, jobs: int = 1) -> None:
    """Threads of this process's arithmetic; `auto` shares the cores among `jobs` side by side (-1: one a core)."""
    if threads == "auto":
        cores = os.cpu_count() or 1
        threads = max(1, cores // (jobs if jobs > 0 else cores))
    if not isinstance(threads, int) or threads < 1:
        raise VAEError(f"threads={threads} must be `auto` or a whole number of at least 1.")
    torch.set_num_threads(threads)
