"""The Lightning Trainer that a config describes, and what a run asks of it."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from vae import ranks
from vae.engine import turns
from vae.engine.build import instantiate
from vae.engine.callbacks.progress import Progress
from vae.engine.callbacks.records import HyperParameters
from vae.engine.checkpoints import CheckpointIO
from vae.engine.devices import SeveralDevices
from vae.engine.folder import settings, usable_cores
from vae.engine.lean import Compile, LeanLoop, NoProfiler, make_lean
from vae.engine.loggers import LoggedRun, make_loggers
from vae.engine.packing import PackedLoop
from vae.errors import VAEError, choose, whole
from vae.objectives.elbo import Objective

#: Weights in 32 bits; steps in 32 or, where that is safe, fewer. Lightning's names, its older ones too.
PRECISIONS = (None, "32-true", "32", 32, "bf16-mixed", "bf16", "16-mixed", "16", 16)

#: Of glibc's malloc.h; and the largest block, and the most of free memory, that it is to keep.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, KEPT_BYTES = -1, -3, 2**30

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
        ".*`srun` command is available.*",  # on a machine with Slurm, of every run that is started without it
        ".*when logging on epoch level in distributed setting.*",  # every rank has the number of the whole split
    ):
        warnings.filterwarnings("ignore", noise)


def trainer_options(config: DictConfig) -> dict[str, Any]:
    """The options of Lightning's Trainer that a config names; the CPU stands in for a GPU that is not there.

    Raises VAEError for what a run cannot use: several machines, strategies, and other precisions than PRECISIONS.
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
    count = device_count(options)
    if options.get("num_nodes", 1) != 1:
        raise VAEError(f"trainer.num_nodes={options['num_nodes']}: all devices of a run are of one machine.")
    strategies = ("auto", "single_device") if count == 1 else ("auto", "ddp")
    if (strategy := options.get("strategy", "auto")) not in strategies:
        raise VAEError(
            f"trainer.strategy={strategy} is not supported with {count} device{'s'[: count > 1]}: leave the strategy out."
        )
    if count > 1 and options.get("sync_batchnorm"):
        raise VAEError("trainer.sync_batchnorm: a run on several devices takes no network with batch normalisation.")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise VAEError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: several processes were started, as by torchrun, where trainer.devices=N "
            "starts its own. Start the run without a launcher, or unset WORLD_SIZE."
        )
    if options.get("precision") not in PRECISIONS:
        raise VAEError(
            f"trainer.precision={options['precision']} is not supported: choose 32-true, bf16-mixed or 16-mixed."
        )
    if options["accelerator"] == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        logging.getLogger(__name__).warning("trainer.accelerator=gpu: there is no GPU here, so the CPU is used.")
        options["accelerator"] = "cpu"
    return options


def device_count(options: dict[str, Any]) -> int:
    """How many devices, and so processes, `trainer.devices` asks for. Raises VAEError where it does not say, or there are
    fewer."""
    devices, accelerator = options.get("devices", 1), options.get("accelerator", "auto")
    count = len(devices) if isinstance(devices, list) else devices
    count = int(count) if isinstance(count, str) and count.isdecimal() else count
    if type(count) is not int or count < 1:
        raise VAEError(f"trainer.devices={devices} must be how many devices to use, or a list of GPUs such as [0,2].")
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    if count > 1 and gpus and (count > gpus or (isinstance(devices, list) and max(devices) >= gpus)):
        raise VAEError(f"trainer.devices={devices}: this machine has {gpus} GPU{'s'[: gpus > 1]}.")
    if count > 1 and not gpus and isinstance(devices, list):
        raise VAEError(
            f"trainer.devices={devices} lists GPUs, and none is used: trainer.devices={count} takes processes."
        )
    if count > 1 and not gpus and accelerator != "cpu" and torch.backends.mps.is_available():
        raise VAEError(
            f"trainer.devices={devices}: Apple's GPU is one device; trainer.accelerator=cpu takes processes."
        )
    return count


def backend(options: dict[str, Any]) -> str:
    """What the processes of several devices talk by, for torch.distributed."""
    return "cpu:gloo,cuda:nccl" if options.get("accelerator") != "cpu" and torch.cuda.is_available() else "gloo"


def build_trainer(
    config: DictConfig,
    folder: Path | None = None,
    overrides: tuple[str, ...] = (),
    progress_bar: bool = False,
    callbacks: Sequence[pl.Callback] = (),
) -> pl.Trainer:
    """A Lightning Trainer; with `folder=None` one that only measures, on one device, and writes nothing.

    Where the config asks for several devices their processes have met before (`vae.engine.devices`)."""
    quiet_lightning()
    if folder is None and (devices := config.trainer.get("devices", 1)) != 1:  # measuring takes one device, of any run
        on_gpu = config.trainer.get("accelerator") != "cpu"
        here = on_gpu and OmegaConf.is_list(devices) and devices[0] < torch.cuda.device_count()
        one = {"devices": [devices[0]] if here else 1, **({"strategy": "auto"} if "strategy" in config.trainer else {})}
        config = OmegaConf.merge(config, {"trainer": one})
    options = trainer_options(config)
    if folder is None:
        outputs: dict[str, Any] = {"logger": False, "enable_checkpointing": False}
    else:
        outputs = {
            "callbacks": [
                *([Progress()] if progress_bar else []),
                *([Compile(config.compile)] if config.get("compile") else []),
                *(
                    instantiate(callback, f"callbacks.{name}")
                    for name, callback in config.callbacks.items()
                    if callback is not None
                ),
                HyperParameters(compared(config, overrides)),
                LoggedRun(settings(config)),
                *callbacks,
            ],
            "logger": (make_loggers(config, folder) if ranks.rank() == 0 else None) or False,
        }
        for callback in outputs["callbacks"]:
            if isinstance(callback, pl.callbacks.ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(folder / "checkpoints")  # Lightning would follow where the logger writes
    options.setdefault("profiler", NoProfiler())
    # Lightning's Slurm environment would save checkpoints of its own on a signal, and requeue the job itself.
    plugins = [CheckpointIO(), LightningEnvironment()]
    several = folder is not None and device_count(options) > 1
    if several:
        options["strategy"], plugins = SeveralDevices(), [CheckpointIO()]
    try:
        trainer = pl.Trainer(**options, **outputs, default_root_dir=folder, plugins=plugins, enable_progress_bar=False)
    except (TypeError, ValueError, MisconfigurationException) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise VAEError(f"trainer: Lightning does not take these options: {why}.") from error
    if folder is not None:
        stay_inside(folder, trainer)
    if several:  # Lightning's handler of SIGTERM calls the other ranks in the middle of whatever they do
        trainer._signal_connector.register_signal_handlers = lambda: None
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
    """Say so where a schedule has not ended when a run of so many steps has: validation and test use its end; and where a
    part of the objective has not even started."""
    if objective.start_step >= steps:
        logging.getLogger(__name__).warning(
            f"objective.start_step={objective.start_step:,} is never reached in {steps:,} training steps: train for longer, or "
            "let it start sooner."
        )
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


def settle_process(threads: int | str) -> None:
    """What a process that trains sets of itself: threads, numbers below 1e-38, and what becomes of freed memory."""
    set_threads(threads)
    flush_denormals()
    keep_freed_memory()


def set_threads(threads: int | str) -> None:
    """Threads of this process's arithmetic. `auto` is what a Slurm job was given, and one elsewhere: two on cores that
    another process works on take ten times as long, one is never slow for networks of this size, and numbers are then
    the same on every machine of a kind."""
    if threads == "auto":
        threads = usable_cores() if os.environ.get("SLURM_CPUS_PER_TASK", "").isdecimal() else 1
    if not isinstance(threads, int) or threads < 1:
        raise VAEError(f"threads={threads} must be `auto` or a whole number of at least 1.")
    if threads > usable_cores():
        logging.getLogger(__name__).warning(
            f"threads={threads} is more than the {usable_cores()} cores that this process may use: steps will be slower."
        )
    torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one. Left alone it returns large blocks to the system, and takes them
    again page by page, which is a fifth and more of a convolutional network's step on a CPU.

    A process then keeps until its end what it needed at once. Nothing happens with another C library, or where the
    environment sets one of glibc's own variables for it.
    """
    if any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP")):
        return
    with contextlib.suppress(OSError, TypeError, AttributeError):  # how Windows, macOS and musl say that they have none
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)


def flush_denormals() -> None:
    """Take numbers below 1e-38 as 0: unused mixture components have such gradients, which are many times slower on a CPU.

    NumPy looks at its smallest numbers once a process, and would warn if it did so later.
    """
    for dtype in (np.float32, np.float64):
        np.finfo(dtype)
    torch.set_flush_denormal(True)
