"""The Lightning Trainer that a config describes, and what a run asks of it."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from vae.engine import turns
from vae.engine.build import instantiate
from vae.engine.callbacks.progress import Progress
from vae.engine.callbacks.records import HyperParameters
from vae.engine.checkpoints import CheckpointIO
from vae.engine.folder import settings, usable_cores
from vae.engine.lean import Compile, LeanLoop, NoProfiler, make_lean
from vae.engine.loggers import LoggedRun, make_loggers
from vae.engine.packing import PackedLoop
from vae.errors import VAEError, choose, whole
from vae.objectives.elbo import Objective

#: Weights in 32 bits; steps in 32 or, where that is safe, fewer. Lightning's names, its older ones too.
PRECISIONS = (None, "32-true", "32", 32, "bf16-mixed", "bf16", "16-mixed", "16", 16)

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


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


def trainer_options(config: DictConfig) -> dict[str, Any]:
    """The options of Lightning's Trainer that a config names; the CPU stands in for a GPU that is not there.

    Raises VAEError for what a run cannot use: several devices or processes, and other precisions than PRECISIONS.
    """
    options = OmegaConf.to_container(config.trainer, resolve=True)
    for name in ("max_epochs", "max_steps"):
        whole(f"trainer.{name}", options.get(name), least=-1, optional=True)
    for name in ("log_every_n_steps", "check_val_every_n_epoch", "accumulate_grad_batches"):
        whole(f"trainer.{name}", options.get(name), optional=True)
    clip = options.get("gradient_clip_val")
    if clip is not None and not (isinstance(clip, int | float) and 0 <= clip < math.inf):
        raise VAEError(f"trainer.gradient_clip_val={clip} must be a number of at least 0, or null.")
    choose("trainer.accelerator", options.get("accelerator"), ACCELERATORS)
    devices, strategy = options.get("devices", 1), options.get("strategy", "auto")
    one = len(devices) == 1 if isinstance(devices, list) else devices in (1, "1")
    if not one or options.get("num_nodes", 1) != 1:
        named = f"devices={devices}" if not one else f"num_nodes={options['num_nodes']}"
        raise VAEError(
            f"trainer.{named}: a run uses one device. trainer.devices=1 takes the first, [1] the second GPU."
        )
    if strategy not in ("auto", "single_device"):
        raise VAEError(f"trainer.strategy={strategy}: a run uses one device in one process; leave the strategy out.")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise VAEError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: several processes were started, as by torchrun, and a run uses one. "
            "Start it without a launcher, or unset WORLD_SIZE."
        )
    if options.get("precision") not in PRECISIONS:
        raise VAEError(
            f"trainer.precision={options['precision']} is not supported: choose 32-true, bf16-mixed or 16-mixed."
        )
    if options["accelerator"] == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        logging.getLogger(__name__).warning("trainer.accelerator=gpu: there is no GPU here, so the CPU is used.")
        options["accelerator"] = "cpu"
    return options


def build_trainer(
    config: DictConfig, folder: Path | None = None, overrides: tuple[str, ...] = (), progress_bar: bool = False
) -> pl.Trainer:
    """A Lightning Trainer; with `folder=None` one that only measures and writes nothing."""
    quiet_lightning()
    options = trainer_options(config)
    if folder is None:
        outputs: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    else:
        outputs = {
            "callbacks": [
                *([Progress()] if progress_bar else []),
                *([Compile(config.compile)] if config.get("compile") else []),
                *(instantiate(callback) for callback in config.callbacks.values() if callback is not None),
                HyperParameters(compared(config, overrides)),
                LoggedRun(settings(config)),
            ],
            "logger": make_loggers(config, folder) or False,
        }
        for callback in outputs["callbacks"]:
            if isinstance(callback, pl.callbacks.ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(folder / "checkpoints")  # Lightning would follow where the logger writes
    options.setdefault("profiler", NoProfiler())
    # Lightning's Slurm environment would save checkpoints of its own on a signal, and requeue the job itself.
    plugins = [CheckpointIO(), LightningEnvironment()]
    try:
        trainer = pl.Trainer(**options, **outputs, default_root_dir=folder, plugins=plugins, enable_progress_bar=False)
    except (TypeError, ValueError, MisconfigurationException) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise VAEError(f"trainer: Lightning does not take these options: {why}.") from error
    if folder is not None:
        stay_inside(folder, trainer)
    return make_lean(trainer, LeanLoop if turns.CURRENT is None else PackedLoop)


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


def warn_of_unreached_weight(objective: Objective, steps: float) -> None:
    """Say so where a schedule has not ended when a run of so many steps has: validation and test use its end."""
    schedule = objective.schedule
    if schedule.learns or steps == math.inf:
        return
    last, end = (float(schedule(step)) for step in (steps - 1, math.inf))
    if not math.isclose(last, end, rel_tol=1e-3, abs_tol=1e-6):
        logging.getLogger(__name__).warning(
            f"objective.schedule ({type(schedule).__name__}) stands at {last:.4g} in the last of {steps:,} training steps "
            f"and ends on {end:.4g}, which validation and test use: train for longer, or let it end sooner."
        )


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


def set_threads(threads: int | str) -> None:
    """Threads of this process's arithmetic. `auto` is one: two on cores that another process works on take ten times as
    long, one is never slow for networks of this size, and numbers are then the same on every machine of a kind."""
    threads = 1 if threads == "auto" else threads
    if not isinstance(threads, int) or threads < 1:
        raise VAEError(f"threads={threads} must be `auto` or a whole number of at least 1.")
    if threads > usable_cores():
        logging.getLogger(__name__).warning(
            f"threads={threads} is more than the {usable_cores()} cores that this process may use: steps will be slower."
        )
    torch.set_num_threads(threads)
