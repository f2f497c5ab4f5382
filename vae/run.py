"""A run: from its config to a trained, measured model in a folder of its own, and back from the folder."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
import yaml
from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from vae.build import build, instantiate
from vae.callbacks.progress import Progress
from vae.callbacks.records import HyperParameters
from vae.checkpoints import CheckpointIO, load_weights, seconds_before
from vae.cli import TRANSIENT, command_line
from vae.data.images import Splits
from vae.data.module import ImageDataModule
from vae.errors import VAEError
from vae.evaluation.measures import MEASURES
from vae.files import is_disk_full, write_json, write_text
from vae.lean import Compile, NoProfiler, make_lean
from vae.module import VAEModule
from vae.objectives.elbo import Objective

# Importing Lightning on a machine without CUDA sets this, and each Adam step then looks for the driver: 60 us a step.
os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)

logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # what it says of devices is in environment.json
for _noise in (
    ".*smaller than the logging interval.*",
    ".*does not have many workers.*",
    ".*`isinstance.treespec, LeafSpec.`.*",
    ".*Checkpoint directory.*exists.*",
    ".*logs directory.*exists and is not empty.*",
    ".*could not find the monitored key.*",  # before the first validation after resuming; later it is an error
):
    warnings.filterwarnings("ignore", _noise)


# --- training -------------------------------------------------------------------------------------------------------


def build_trainer(
    config: DictConfig, folder: Path | None = None, overrides: tuple[str, ...] = (), progress_bar: bool = False
) -> pl.Trainer:
    """A Lightning Trainer; with `folder=None` one that only measures and writes nothing."""
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


def keep_last_under_feedback(trainer: pl.Trainer, objective: Objective) -> None:
    """With a controller for the weight on the KL, losses of two epochs are of two objectives: the last weights are kept.

    Raises VAEError where early stopping would compare them.
    """
    if not objective.schedule.learns:
        return
    controller = type(objective.schedule).__name__
    for callback in trainer.callbacks:
        if getattr(callback, "monitor", None) != "val/loss":
            continue
        if not isinstance(callback, pl.callbacks.ModelCheckpoint):
            raise VAEError(
                f"{type(callback).__name__} watches val/loss, in which {controller} changes the weight on the KL: let it watch "
                "what does not change, as with callbacks.early_stopping.monitor=val/distortion."
            )
        callback.monitor = None


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


def train(
    config: DictConfig,
    folder: Path,
    overrides: list[str],
    resume: bool = False,
    progress_bar: bool = True,
    jobs: int = 1,
) -> float:
    """Train, test and record a run in `folder`; returns the best validation loss in nats.

    Writes config.yaml, environment.json, status.json, checkpoints, pictures and, last, metrics.json. Whatever ends the
    run early is written to status.json before it is raised again. With `resume`, a run of the same config that finished is
    left as it is, and one that was cut off continues from its last checkpoint; a run of another config is done anew. Where
    the data set lies does not make it another.
    `jobs` is the number of runs that share the machine. Raises VAEError if another process is training this run.
    """
    progress_bar = progress_bar and config.progress_bar
    settled = {k: v for k, v in OmegaConf.to_container(config, resolve=True).items() if k not in TRANSIENT}
    config = OmegaConf.create(settled)
    set_threads(config.threads, jobs)
    # Numbers below 1e-38, such as gradients of a mixture's components that explain no image, take a CPU many times as long.
    torch.set_flush_denormal(True)
    with only_process(folder):
        stored = OmegaConf.to_container(read_config(folder)) if resume and (folder / "config.yaml").is_file() else None
        if stored and _wherever(stored) == _wherever(settled) and read_status(folder).get("state") == "finished":
            return best_loss(read_metrics(folder))
        last = folder / "checkpoints" / "last.ckpt"
        checkpoint = last if last.is_file() and continues(stored, settled) else None
        if checkpoint is None:
            discard(folder)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
        write_text(folder / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))
        write_json(folder / "environment.json", environment())
        status = {"state": "running", "reason": None, "started": _now(), "seconds": 0.0, "epochs": 0}
        write_json(folder / "status.json", status)
        started, before = time.monotonic(), 0.0
        try:
            before = seconds_before(checkpoint) if checkpoint else 0.0
            metrics, status["epochs"] = _fit_and_test(config, folder, overrides, checkpoint, progress_bar)
            status["state"] = "finished"
        except BaseException as error:
            if is_disk_full(error) and not isinstance(error, VAEError):  # TensorBoard's writer says so in its own way
                error = VAEError(f"There is no space left on the disk to write to {folder}.")
            status["state"] = "failed"
            status["reason"] = str(error) if isinstance(error, VAEError) else f"{type(error).__name__}: {error}"
            raise error
        finally:
            status["seconds"] = before + time.monotonic() - started
            # where not even this can be written, what went wrong before is what must be told
            with contextlib.suppress(VAEError) if status["state"] == "failed" else contextlib.nullcontext():
                write_json(folder / "status.json", status)
    return best_loss(metrics)


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
    return _wherever(longer) == _wherever(settled)


def _wherever(config: dict[str, Any]) -> dict[str, Any]:
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


def _fit_and_test(
    config: DictConfig, folder: Path, overrides: list[str], checkpoint: Path | None, progress_bar: bool
) -> tuple[dict[str, float], int]:
    data, module = build(config)
    trainer = build_trainer(config, folder, tuple(overrides), progress_bar)
    if trainer.max_epochs == 0:
        raise VAEError("trainer.max_epochs=0 leaves nothing to train: ask for at least 1.")
    keep_last_under_feedback(trainer, module.objective)
    trainer.fit(module, data, ckpt_path=checkpoint)
    if trainer.interrupted:
        raise KeyboardInterrupt
    metrics = module.epoch_terms()
    for callback in trainer.callbacks:
        metrics.update(getattr(callback, "metrics", {}))
    metrics.update(_floats(trainer.callback_metrics, "val/"))

    saved = trainer.checkpoint_callback
    if saved is not None and saved.best_model_path:
        best = load_weights(module, Path(saved.best_model_path))
        metrics["val/best_loss"] = metrics["val/loss"] if saved.monitor is None else float(saved.best_model_score)
        metrics["val/best_epoch"] = float(best["epoch"])
    epochs = trainer.current_epoch
    trainer.test(module, data, verbose=False)
    metrics.update(_floats(trainer.callback_metrics, "test/"))
    write_json(folder / "metrics.json", metrics)
    return metrics, epochs


def best_loss(metrics: dict[str, float]) -> float:
    """The validation loss of the weights that were tested, in nats."""
    return metrics.get("val/best_loss", metrics["val/loss"])


def _floats(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if name.startswith(prefix)}


def set_threads(threads: int | str, jobs: int = 1) -> None:
    """Threads of this process's arithmetic; `auto` shares the cores among `jobs` side by side (-1: one a core)."""
    if threads == "auto":
        cores = os.cpu_count() or 1
        threads = max(1, cores // (jobs if jobs > 0 else cores))
    if not isinstance(threads, int) or threads < 1:
        raise VAEError(f"threads={threads} must be `auto` or a whole number of at least 1.")
    torch.set_num_threads(threads)


# --- the folder -----------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> DictConfig:
    """The resolved config of a run. Raises VAEError if the folder holds none."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise VAEError(f"{folder} is not a run folder: it has no config.yaml.")
    try:
        return OmegaConf.load(path)
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
    return _read_json(folder / "metrics.json")


def read_status(folder: Path) -> dict[str, Any]:
    """What training wrote to status.json; empty if it did not begin. Raises VAEError if it is damaged."""
    return _read_json(folder / "status.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise VAEError(f"{path} is damaged: it is not JSON.") from error


def load(folder: Path, **changes: Any) -> tuple[DictConfig, ImageDataModule, VAEModule]:
    """A run's config, data and model with its best weights. `changes` may name nll_samples, accelerator and threads."""
    config = read_config(folder)
    for name, value in changes.items():
        OmegaConf.update(
            config,
            {"nll_samples": "evaluation.nll_samples", "accelerator": "trainer.accelerator"}.get(name, name),
            value,
        )
    set_threads(config.threads)
    data, module = build(config)
    load_weights(module, folder / "checkpoints" / "best.ckpt")
    return config, data, module.eval()


def evaluate(folder: Path, split: str = "test", **changes: Any) -> dict[str, float]:
    """The metrics of a finished run, recomputed from its best checkpoint; equal to those that training wrote."""
    if split not in Splits._fields:
        raise VAEError(f"split={split!r} is unknown: choose train, val or test.")
    config, data, module = load(folder, **changes)
    trainer = build_trainer(config)
    data.test_split = split
    trainer.test(module, data, verbose=False)
    return {f"{split}/{name.split('/', 1)[1]}": float(value) for name, value in trainer.callback_metrics.items()}


def measure(folder: Path, split: str, options: dict[str, Any], **changes: Any) -> dict[str, float]:
    """The measures that `options["measures"]` names, each with its own entry of `options` as keyword arguments.

    Kept in evaluation-SPLIT.json, beside what earlier calls measured. Raises VAEError for a measure that does not exist.
    """
    known = {"likelihood": None, **MEASURES}
    if unknown := [name for name in options["measures"] if name not in known]:
        raise VAEError(f"measures={unknown} is unknown: choose from {', '.join(known)}.")
    results = {}
    if "likelihood" in options["measures"]:
        results |= evaluate(folder, split, **changes)
    if others := [name for name in options["measures"] if name != "likelihood"]:
        _, data, module = load(folder, **changes)
        for name in others:
            found = MEASURES[name](module.vae, data, split, **options[name])
            results |= {f"{split}/{name}/{key}": value for key, value in found.items()}
    path = folder / f"evaluation-{split}.json"
    write_json(path, {**_read_json(path), **results})
    return results


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
        "date": _now(),
    }


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
