"""A run: from its config to a trained, measured model in a folder of its own, and back from the folder."""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vae.cli import TRANSIENT, command
from vae.data.images import Splits
from vae.data.module import ImageDataModule
from vae.engine.build import build, run_length
from vae.engine.checkpoints import load_weights, read_checkpoint, seconds_before
from vae.engine.folder import (
    MEASURING,
    begins_with,
    differences,
    discard,
    environment,
    holds_training,
    now,
    only_process,
    read_config,
    read_json,
    read_metrics,
    read_status,
    refuse_foreign_checkpoint,
    refuse_other_training,
)
from vae.engine.module import VAEModule
from vae.engine.trainer import (
    build_trainer,
    keep_last_under_feedback,
    set_threads,
    trainer_options,
    warn_of_unreached_weight,
)
from vae.errors import VAEError
from vae.evaluation.measures import MEASURES
from vae.files import is_disk_full, write_json, write_text


def train(
    config: DictConfig,
    folder: Path,
    overrides: list[str],
    resume: bool | str = False,
    progress_bar: bool = True,
) -> dict[str, float]:
    """Train, test and record a run in `folder`; returns its metrics.

    Writes config.yaml, environment.json, status.json, checkpoints, pictures and, last, metrics.json. Whatever ends the
    run early is written to status.json before it is raised again.

    resume: False starts anew, for which commands ask for an empty folder; "restart" starts anew whatever is there. True
    goes on from the last checkpoint, for longer if that is asked for, and leaves a run that finished as it is; settings
    that do not change what is trained (`folder.TAKEN_OVER`) may be others. Nothing is deleted then, but for the weights of
    the same run from before its first last.ckpt.
    Raises VAEError, before anything is written, if another process is training this run, for what a run cannot use, and
    with resume=True if any other setting is not what the run was trained with.
    """
    progress_bar = progress_bar and config.progress_bar
    settled = {k: v for k, v in OmegaConf.to_container(config, resolve=True).items() if k not in TRANSIENT}
    config = OmegaConf.create(settled)
    trainer_options(config)
    set_threads(config.threads)
    # Numbers below 1e-38, such as gradients of a mixture's components that explain no image, take a CPU many times as long.
    torch.set_flush_denormal(True)
    with only_process(folder):
        last = folder / "checkpoints" / "last.ckpt"
        going_on = resume is True and holds_training(folder)
        if resume != "restart":
            refuse_foreign_checkpoint(folder)
        if going_on:
            stored = OmegaConf.to_container(read_config(folder))
            changed = differences(stored, settled)
            longer = refuse_other_training(folder, stored, changed)
            metrics = read_metrics(folder)
            if metrics and read_status(folder).get("state") == "finished":
                if not longer:
                    _say_what_had_no_effect(folder, changed)
                    return metrics
                if not last.is_file():
                    raise VAEError(
                        f"{last} is gone, so that a run that finished cannot go on: resume=restart starts anew."
                    )
        checkpoint = last if going_on and last.is_file() else None
        if checkpoint is None:
            discard(folder)
        write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
        write_text(folder / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))
        write_json(folder / "environment.json", environment())
        status = {"state": "running", "reason": None, "started": now(), "seconds": 0.0, "epochs": 0}
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
    return metrics


def _say_what_had_no_effect(folder: Path, changed: dict[str, tuple[Any, Any]]) -> None:
    measuring = [f"{name}={new}" for name, (_, new) in changed.items() if begins_with(name, MEASURING)]
    if measuring:
        logging.getLogger(__name__).warning(
            f"The run had finished, so {', '.join(measuring)} changed nothing. To measure it again: "
            f"{command('vae.evaluate', run=folder)}"
        )


def _fit_and_test(
    config: DictConfig, folder: Path, overrides: list[str], checkpoint: Path | None, progress_bar: bool
) -> tuple[dict[str, float], int]:
    data, module = build(config)
    trainer = build_trainer(config, folder, tuple(overrides), progress_bar)
    if trainer.max_epochs == 0:
        raise VAEError("trainer.max_epochs=0 leaves nothing to train: ask for at least 1.")
    keep_last_under_feedback(trainer, module.objective)
    warn_of_unreached_weight(module.objective, run_length(config.trainer, data)[0])
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


def load(folder: Path, **changes: Any) -> tuple[DictConfig, ImageDataModule, VAEModule]:
    """A run's config, data and model with its best weights. `changes` may name nll_samples, accelerator and threads.

    Where the data set is not, the model is there all the same, and asking `data` for images says what is missing.
    """
    config = read_config(folder)
    for name, value in changes.items():
        OmegaConf.update(
            config,
            {"nll_samples": "evaluation.nll_samples", "accelerator": "trainer.accelerator"}.get(name, name),
            value,
        )
    set_threads(config.threads)
    best = folder / "checkpoints" / "best.ckpt"
    try:
        data, module = build(config)
    except VAEError:
        facts = read_checkpoint(best).get(ImageDataModule.__name__) if best.is_file() else None
        if not facts:  # of an earlier version
            raise
        data, module = build(config, facts)
    load_weights(module, best)
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
    write_json(path, {**read_json(path), **results})
    return results
