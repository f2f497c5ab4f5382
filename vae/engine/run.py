"""A run: from its config to a trained, measured model in a folder of its own, and back from the folder."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from vae.cli import TRANSIENT, command
from vae.data.images import Splits
from vae.data.module import ImageDataModule
from vae.engine import turns
from vae.engine.build import build, build_data, run_length
from vae.engine.callbacks.records import Reporter
from vae.engine.checkpoints import choose_weights, load_weights, reached
from vae.engine.devices import Crew, crew, refuse_what_depends_on_rows
from vae.engine.folder import (
    MEASURING,
    begins_with,
    differences,
    discard,
    environment,
    facts,
    holds_training,
    images_digest,
    now,
    only_process,
    read_config,
    read_json,
    read_metrics,
    read_status,
    refuse_foreign_checkpoint,
    refuse_other_training,
    require_groups,
)
from vae.engine.loggers import KEPT, begin, require_packages
from vae.engine.module import Means, VAEModule
from vae.engine.per_image import set_aside, write_per_image
from vae.engine.search import Pruned
from vae.engine.trainer import (
    backend,
    build_trainer,
    device_count,
    quiet_lightning,
    set_threads,
    settle_process,
    trainer_options,
    warn_of_unreached_weight,
)
from vae.errors import VAEError, choose
from vae.evaluation.work import Work
from vae.files import is_disk_full, remove_leftovers, write_json, write_text
from vae.objectives.labels import require_labels

#: Why no importance-weighted bound is taken of a run whose latents are codes.
ONE_DRAW = "every draw of q(z|x) is the same codes, so that no number of them gives more than the ELBO"


def train(
    config: DictConfig,
    folder: Path,
    overrides: list[str],
    resume: bool | str = False,
    progress_bar: bool = True,
    callbacks: Sequence[pl.Callback] = (),
) -> dict[str, float]:
    """Train, test and record a run in `folder`; returns its metrics. callbacks: besides those of the config.

    Writes config.yaml, environment.json, status.json, checkpoints, pictures, per_image-test.npz and, last, metrics.json.
    Whatever ends the run early is written to status.json before it is raised again.

    resume: False starts anew, for which commands ask for an empty folder; "restart" starts anew whatever is there. True
    goes on from the last checkpoint, for longer if that is asked for, and leaves a run that finished as it is; settings
    that do not change what is trained (`folder.TAKEN_OVER`) may be others, and so may `data.source.path` if the same
    images lie there. Nothing is deleted then, but for the weights of
    the same run from before its first last.ckpt.
    Raises VAEError, before anything is written, for a group of settings that is none, for what a run cannot use, if another
    process is training this run, and with resume=True if any other setting is not what the run was trained with.
    """
    progress_bar = progress_bar and config.progress_bar
    settled = {k: v for k, v in OmegaConf.to_container(config, resolve=True).items() if k not in TRANSIENT}
    require_groups(settled)
    config = OmegaConf.create(settled)
    options = trainer_options(config)
    require_packages(config)
    settle_process(config.threads)
    with only_process(folder):
        last = folder / "checkpoints" / "last.ckpt"
        going_on = resume is True and holds_training(folder)
        if resume != "restart":
            refuse_foreign_checkpoint(folder)
        if going_on:
            stored = OmegaConf.to_container(read_config(folder))
            changed = differences(stored, settled)
            moved = "data.source.path" in changed and _only_moved(folder, config)
            if moved:
                del changed["data.source.path"]
            longer = refuse_other_training(folder, stored, changed)
            metrics = read_metrics(folder)
            if metrics and read_status(folder).get("state") == "finished":
                if not longer:
                    if moved:
                        _write_settings(folder, config, overrides)
                    _say_what_had_no_effect(folder, changed)
                    return metrics
                if not last.is_file():
                    raise VAEError(
                        f"{last} is gone, so that a run that finished cannot go on: resume=restart starts anew."
                    )
        checkpoint = last if going_on and last.is_file() else None
        if checkpoint is None:
            discard(folder)
        if resume is not True:
            (folder / KEPT).unlink(missing_ok=True)
        _write_settings(folder, config, overrides)
        write_json(folder / "environment.json", environment())
        status = {"state": "running", "reason": None, "started": now(), "seconds": 0.0, "epochs": 0}
        write_json(folder / "status.json", status)
        started, before = turns.seconds(), 0.0
        try:
            if checkpoint:
                steps, before = reached(checkpoint)
                logging.getLogger(__name__).info(f"{folder.name} goes on from step {steps:,}, its last checkpoint.")
            with crew(device_count(options), backend(options), config, folder, checkpoint) as ranks:
                metrics, status["epochs"] = _fit_and_test(
                    config, folder, overrides, checkpoint, progress_bar, callbacks, ranks
                )
            status["state"] = "finished"
        except BaseException as error:
            if is_disk_full(error) and not isinstance(error, VAEError):  # TensorBoard's writer says so in its own way
                error = VAEError(f"There is no space left on the disk to write to {folder}.")
            status["state"] = "pruned" if isinstance(error, Pruned) else "failed"
            status["reason"] = (
                str(error) if isinstance(error, VAEError | Pruned) else f"{type(error).__name__}: {error}"
            )
            if isinstance(error, KeyboardInterrupt | SystemExit):  # a cluster's job ends itself by the latter
                status["reason"] = "interrupted"
            raise error
        finally:
            status["seconds"] = before + turns.seconds() - started
            # where not even this can be written, report what went wrong before
            with contextlib.suppress(VAEError) if status["state"] == "failed" else contextlib.nullcontext():
                write_json(folder / "status.json", status)
    return metrics


def _write_settings(folder: Path, config: DictConfig, overrides: list[str]) -> None:
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config))
    write_text(folder / "overrides.yaml", OmegaConf.to_yaml(OmegaConf.create(overrides)))


def _only_moved(folder: Path, config: DictConfig) -> bool:
    """Whether images of one's own that `config` looks for in another place are those that the run was trained on."""
    return read_json(folder / "facts.json").get("images") == images_digest(build_data(config))


def _say_what_had_no_effect(folder: Path, changed: dict[str, tuple[Any, Any]]) -> None:
    measuring = [f"{name}={new}" for name, (_, new) in changed.items() if begins_with(name, MEASURING)]
    if measuring:
        logging.getLogger(__name__).warning(
            f"The run had finished, so {', '.join(measuring)} changed nothing. To measure it again: "
            f"{command('vae.evaluate', run=folder)}"
        )


def accompany(config: DictConfig, folder: Path, checkpoint: Path | None, ranks: Crew) -> None:
    """What a rank above 0 does of `train`: all but write."""
    quiet_lightning()
    settle_process(config.threads)
    ranks.wait("rank 0 has its data")  # which it may have had to download
    _fit_and_test(config, folder, [], checkpoint, False, ranks=ranks)


def _fit_and_test(
    config: DictConfig,
    folder: Path,
    overrides: list[str],
    checkpoint: Path | None,
    progress_bar: bool,
    callbacks: Sequence[pl.Callback] = (),
    ranks: Crew | None = None,
) -> tuple[dict[str, float], int]:
    ranks = Crew() if ranks is None else ranks
    if ranks.first:
        remove_leftovers(folder)
    data, module = build(config, start=checkpoint is None)
    if ranks.world > 1:
        refuse_what_depends_on_rows(module)
    ranks.tell("rank 0 has its data")
    ranks.meet(data)
    module.progress_bar = progress_bar
    trainer = build_trainer(config, folder, tuple(overrides), progress_bar, callbacks)
    for name in ("max_epochs", "max_steps", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise VAEError(f"trainer.{name}=0 leaves nothing to train: ask for at least 1.")
    if trainer.limit_val_batches == 0:  # no validation while training; what was trained is validated all the same
        trainer.limit_val_batches, trainer.check_val_every_n_epoch = 1.0, sys.maxsize
    best = choose_weights(trainer, module.objective)
    if module.vae.discrete and config.evaluation.nll_samples and ranks.first:
        logging.getLogger(__name__).info(f"evaluation.nll_samples is passed over: {ONE_DRAW}.")
    warn_of_unreached_weight(module.objective, run_length(config.trainer, data)[0])
    begin(trainer.loggers)
    if ranks.first:  # last of what is refused without training: `vae.cli.remove_unused` looks for it
        write_json(folder / "facts.json", facts(config, data, module, overrides))
    with interruptions(trainer):
        trainer.fit(module, data, ckpt_path=checkpoint)
    if not module.steps:
        raise VAEError(
            f"The run ended before its first step: give it more than trainer.max_time={config.trainer.get('max_time')}."
        )
    ranks.tell("best.ckpt is there")
    ranks.wait("best.ckpt is there")
    metrics = module.epoch_terms()
    for callback in trainer.callbacks:
        if isinstance(callback, Reporter):
            metrics.update(callback.metrics)
    metrics.update(_floats(trainer.callback_metrics, "val/"))

    metrics["val/best_loss"] = best.loss
    chosen = load_weights(module, folder / "checkpoints" / "best.ckpt")
    metrics["val/best_epoch"] = float(chosen["epoch"])
    for name, value in chosen.get("validation", {}).items():  # an earlier version's best.ckpt does not say
        if name in ("val/elbo", "val/rate", "val/distortion"):  # of the weights that are tested: what a search compares
            metrics[f"val/best_{name.removeprefix('val/')}"] = float(value)
    epochs = -(-module.steps // trainer.num_training_batches)
    with interruptions(trainer):
        trainer.test(module, data, verbose=False)
    metrics.update(_floats(trainer.callback_metrics, "test/"))
    if ranks.first:
        if (place := set_aside(folder, module.vae, module.steps)) is not None:
            logging.getLogger(__name__).warning(
                f"What was measured of the weights before, and priors fitted to them, are now in {place}: measure and fit "
                "again."
            )
        write_per_image(folder, "test", module.per_image, module.vae)
        write_json(folder / "metrics.json", metrics)
    return metrics, epochs


@contextlib.contextmanager
def interruptions(trainer: pl.Trainer) -> Iterator[None]:
    """Raises KeyboardInterrupt where Lightning, after Ctrl-C, leaves the process or goes on as if nothing were."""
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
    if trainer.interrupted:
        raise KeyboardInterrupt


def tested_weights(metrics: dict[str, float]) -> str:
    """Which weights were tested, and their validation loss: the best one or, where that moves, that of the last weights."""
    epoch = metrics["val/best_epoch"] + 1  # which is counted from 0, and from 1 in words
    return f"validation loss {metrics['val/best_loss']:.4f} nats of the tested weights, epoch {epoch:.0f}"


def _floats(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if name.startswith(prefix)}


def load(folder: Path, **changes: Any) -> tuple[DictConfig, ImageDataModule, VAEModule]:
    """A run's config, data and model with its best weights. `changes` may name nll_samples, accelerator and threads.

    Needs the data set; `vae.load` gives the model without it.
    """
    config = read_config(folder)
    for name, value in changes.items():
        OmegaConf.update(
            config,
            {"nll_samples": "evaluation.nll_samples", "accelerator": "trainer.accelerator"}.get(name, name),
            value,
        )
    set_threads(config.threads)
    data, module = build(config, start=False)
    load_weights(module, folder / "checkpoints" / "best.ckpt")
    return config, data, module.eval()


def evaluate(folder: Path, split: str = "test", **changes: Any) -> dict[str, float]:
    """The metrics of a finished run, recomputed from its best checkpoint; equal to those that training wrote."""
    _check_split(split)
    return {name: value for part in likelihood_of(*load(folder, **changes), split) for name, value in part.items()}


def _check_split(split: str) -> None:
    choose("split", split, Splits._fields)


def likelihood_of(
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
            with trainer.precision_plugin.test_step_context():
                totals.add(module.mean_nll(batch, work), weight=len(batch.x))
    module.to(before)
    yield {f"{split}/{name}": float(value) for name, value in totals.compute().items()}
