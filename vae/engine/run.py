"""A run: from its config to a trained, measured model in a folder of its own, and back from the folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from vae.cli import TRANSIENT
from vae.data.images import Splits
from vae.data.module import ImageDataModule
from vae.engine.build import build
from vae.engine.checkpoints import load_weights, seconds_before
from vae.engine.folder import (
    continues,
    discard,
    environment,
    now,
    only_process,
    read_config,
    read_json,
    read_metrics,
    read_status,
    without_data_root,
)
from vae.engine.module import Means, VAEModule
from vae.engine.trainer import build_trainer, keep_last_under_feedback, set_threads
from vae.errors import VAEError
from vae.evaluation.measures import MEASURES, check_options
from vae.evaluation.work import Work
from vae.files import is_disk_full, write_json, write_text
from vae.objectives.labels import require_labels


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
        if (
            stored
            and without_data_root(stored) == without_data_root(settled)
            and read_status(folder).get("state") == "finished"
        ):
            return best_loss(read_metrics(folder))
        last = folder / "checkpoints" / "last.ckpt"
        checkpoint = last if last.is_file() and continues(stored, settled) else None
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
    return best_loss(metrics)


def _fit_and_test(
    config: DictConfig, folder: Path, overrides: list[str], checkpoint: Path | None, progress_bar: bool
) -> tuple[dict[str, float], int]:
    data, module = build(config)
    module.progress_bar = progress_bar
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
    _check_split(split)
    return {name: value for part in _likelihood(*load(folder, **changes), split) for name, value in part.items()}


def _check_split(split: str) -> None:
    if split not in Splits._fields:
        raise VAEError(f"split={split!r} is unknown: choose train, val or test.")


def _likelihood(
    config: DictConfig, data: ImageDataModule, module: VAEModule, split: str, progress_bar: bool = False
) -> Iterator[dict[str, float]]:
    """What `evaluate` returns, what is quick first: the ELBO and what goes with it, then the importance-weighted bound."""
    require_labels(module.vae, data, split)
    trainer, samples, module.nll_samples = build_trainer(config), module.nll_samples, 0
    data.test_split = split
    trainer.test(module, data, verbose=False)
    yield {f"{split}/{name.split('/', 1)[1]}": float(value) for name, value in trainer.callback_metrics.items()}
    if not samples:
        return
    device, before, totals, module.nll_samples = trainer.strategy.root_device, module.device, Means(), samples
    module.to(device)
    loader = data.test_dataloader()
    with Work(f"nll_samples={samples}", progress_bar) as work:
        work.expect(module.nll_steps(loader))
        for loaded in loader:
            batch = data.prepare(data.transfer_batch_to_device(loaded, device, 0), training=False)
            totals.add(module.mean_nll(batch, work), weight=len(batch.x))
    module.to(before)
    yield {f"{split}/{name}": float(value) for name, value in totals.compute().items()}


def measure(folder: Path, split: str, options: dict[str, Any], **changes: Any) -> dict[str, float]:
    """The measures that `options["measures"]` names, each with its own entry of `options` as keyword arguments.

    Each is kept in evaluation-SPLIT.json as soon as it is there, beside what earlier calls measured: an interruption, or a
    measure that makes no sense for the model or the data, costs none of the others. Raises VAEError that says which those
    are, and for a measure or an option that does not exist.
    """
    names, known = options["measures"], ("likelihood", *MEASURES)
    names = [names] if isinstance(names, str) else names
    if unknown := [name for name in names if name not in known]:
        raise VAEError(f"measures={unknown} is unknown: choose from {', '.join(known)}.")
    _check_split(split)
    for name in names:
        check_options(name, options.get(name) or {})
    run, path = load(folder, **changes), folder / f"evaluation-{split}.json"
    results: dict[str, float] = {}
    refused = []
    for name in names:
        try:
            for part in _measured(name, *run, split, options):
                results |= part
                write_json(path, {**read_json(path), **part})
        except VAEError as error:
            refused.append(str(error))
        except (KeyboardInterrupt, SystemExit) as error:  # Lightning makes the second of the first
            kept = f"what was measured before is in {path}" if results else "nothing was measured"
            raise VAEError(f"Interrupted while measuring {name}: {kept}.") from error
    if refused:
        raise VAEError(" ".join(refused) + (f" What else was asked for is in {path}." if results else ""))
    return results


def _measured(
    name: str, config: DictConfig, data: ImageDataModule, module: VAEModule, split: str, options: dict[str, Any]
) -> Iterator[dict[str, float]]:
    """The parts of one measure, as they are finished."""
    show = options.get("progress_bar", False)
    if name == "likelihood":
        yield from _likelihood(config, data, module, split, show)
        return
    require_labels(module.vae, data, split)
    with Work(name, show) as work:
        found = MEASURES[name](module.vae, data, split, work, **(options.get(name) or {}))
    yield {f"{split}/{name}/{key}": value for key, value in found.items()}
