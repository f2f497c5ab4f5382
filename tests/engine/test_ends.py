"""How a run ends: whatever was trained is validated, kept and measured; one rule for the weights that are tested."""

from __future__ import annotations

import csv
import errno
import json
import logging
import math
import shutil
import signal

import pytest
import pytorch_lightning as pl
import torch

from vae.beta import GECO, AdaptiveKL, ControlVAE, Cosine, Cyclical, Linear
from vae.engine.build import build
from vae.engine.callbacks import pictures
from vae.engine.callbacks.records import CSVLogger
from vae.engine.checkpoints import Best
from vae.engine.module import VAEModule
from vae.engine.run import _fit_and_test, evaluate, train
from vae.errors import VAEError
from vae.files import remove_leftovers
from vae.objectives.adversarial import Adversarial
from vae.objectives.capacity import Capacity
from vae.objectives.dip_vae import DIPVAEI
from vae.objectives.elbo import BetaVAE
from vae.objectives.importance import IWAE
from vae.objectives.mmd import InfoVAE
from vae.objectives.total_correlation import BetaTCVAE, FactorVAE
from vae.seeding import generator


class Killed(Exception):
    pass


def trained(config, folder, **options):
    train(config, folder, [], progress_bar=False, **options)
    return without_times(json.loads((folder / "metrics.json").read_text()))


def without_times(metrics):
    return {name: value for name, value in metrics.items() if "seconds" not in name}


def checkpoint(folder, name):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def rows_of(folder, name):
    """The rows of metrics.csv that hold a metric, as numbers."""
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [{key: float(value) for key, value in row.items() if value} for row in rows if row[name]]


def stopped_at(step, monkeypatch):
    """Let training fail at a step, until the patch is undone."""
    own = VAEModule.training_step

    def training_step(self, batch, index):
        if self.steps == step:
            raise Killed
        return own(self, batch, index)

    monkeypatch.setattr(VAEModule, "training_step", training_step)


# --- ends that are no validation's ------------------------------------------------------------------------------------

QUARTERS = "data.batch_size=16"  # of 64 images: 4 steps an epoch
ENDS = {
    "max_steps in the first epoch": (["trainer.max_steps=3"], 3, 1),
    "max_steps in the second epoch": (["trainer.max_steps=5"], 5, 2),
    "no validation": (["+trainer.limit_val_batches=0"], 12, 3),
    "a validation beyond the end": (["trainer.check_val_every_n_epoch=7"], 12, 3),
    "an epoch after the last validation": (["trainer.check_val_every_n_epoch=2"], 12, 3),
    "steps after the last validation": (["+trainer.val_check_interval=3"], 12, 3),
    "a profiler": (["+trainer.profiler=simple", "trainer.max_steps=3"], 3, 1),
    "early stopping at an epoch without validation": (
        [
            "callbacks=early_stopping",
            "callbacks.early_stopping.monitor=train/loss",
            "callbacks.early_stopping.patience=1",
            "+callbacks.early_stopping.mode=max",
            "+callbacks.early_stopping.check_on_train_epoch_end=true",
            "trainer.log_every_n_steps=4",
            "trainer.check_val_every_n_epoch=7",
        ],
        8,
        2,
    ),
}


@pytest.mark.parametrize("end", ENDS)
def test_wherever_a_run_ends_its_last_weights_are_validated_kept_and_measured(end, tiny, tmp_path):
    options, steps, epochs = ENDS[end]
    found = trained(tiny("trainer.max_epochs=3", "callbacks.pictures=null", QUARTERS, *options), tmp_path)
    assert checkpoint(tmp_path, "last")["steps"] == checkpoint(tmp_path, "best")["steps"] == steps
    assert found["val/best_epoch"] == epochs - 1
    assert found["val/loss"] == found["val/best_loss"] == evaluate(tmp_path, split="val")["val/loss"]
    assert found["train/elbo"] < 0
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["epochs"]) == ("finished", epochs)


@pytest.mark.parametrize(("short", "longer"), [("trainer.max_steps=5", "trainer.max_steps=10"), ("a=3", "a=5")])
@pytest.mark.slow
def test_a_longer_run_goes_on_from_such_an_end_to_the_weights_of_one_that_was_longer_at_once(
    short, longer, tiny, tmp_path
):
    def config(length):
        length = length.replace("a=", "trainer.max_epochs=")
        return tiny("trainer.max_epochs=4", QUARTERS, "trainer.check_val_every_n_epoch=2", length)

    trained(config(short), tmp_path / "cut")
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    went_on, _ = _fit_and_test(config(longer), tmp_path / "cut", [], last, False)
    assert without_times(went_on) == trained(config(longer), tmp_path / "whole")
    for name, value in checkpoint(tmp_path / "whole", "last")["state_dict"].items():
        assert torch.equal(value, checkpoint(tmp_path / "cut", "last")["state_dict"][name]), name


@pytest.mark.parametrize("option", ["trainer.max_epochs=0", "trainer.max_steps=0", "+trainer.limit_train_batches=0"])
def test_a_run_that_would_train_nothing_is_refused(option, tiny, tmp_path):
    name = option.removeprefix("+").partition("=")[0]
    with pytest.raises(VAEError, match=f"{name}=0 leaves nothing to train"):
        train(tiny(option), tmp_path, [], progress_bar=False)


def test_a_mistake_in_the_test_costs_no_training(tiny, tmp_path, monkeypatch):
    config = tiny("trainer.max_epochs=2")
    whole = trained(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(VAEModule, "test_step", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(config, tmp_path / "cut", [], progress_bar=False)
    assert checkpoint(tmp_path / "cut", "last")["steps"] == checkpoint(tmp_path / "cut", "best")["steps"] == 4
    stopped_at(0, monkeypatch)  # nothing is trained again
    monkeypatch.setattr(VAEModule, "validation_step", lambda *_: (_ for _ in ()).throw(Killed))  # nor validated
    assert trained(config, tmp_path / "cut", resume=True) == whole
    assert json.loads((tmp_path / "cut" / "status.json").read_text())["epochs"] == 2


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_show_the_kl_of_the_validation_just_made_and_at_last_of_the_test(tiny, tmp_path, monkeypatch):
    shown, order = [], []

    def look(module, examples):
        shown.append(float(module.kl_per_dimension.sum()))
        order.append((tmp_path / "checkpoints" / "best.ckpt").is_file())  # whatever goes wrong with them, that is kept
        return {}

    monkeypatch.setattr(pictures, "all_pictures", look)
    options = ["callbacks=default", "callbacks.pictures.every_n_epochs=2", "logger=csv", "optimizer.lr=0.1"]
    found = trained(tiny(*options, "trainer.max_epochs=5"), tmp_path)
    rates = [row["val/rate"] for row in rows_of(tmp_path, "val/rate")]
    assert shown == pytest.approx([rates[1], rates[3], found["test/rate"]], rel=1e-6)
    assert len(set(rates)) == 5
    assert all(order)


def test_a_run_that_early_stopping_ends_draws_its_last_pictures_once(tiny, tmp_path, monkeypatch):
    """Of the weights that are tested: not before early stopping has decided, and then again."""
    drawn = []
    monkeypatch.setattr(
        pictures, "all_pictures", lambda module, _: drawn.append((module.trainer.state.fn, module.steps)) or {}
    )
    options = ["callbacks=early_stopping", "callbacks.pictures.every_n_epochs=1", "logger=none", "optimizer.lr=0"]
    trained(tiny(*options, "callbacks.early_stopping.patience=2", "trainer.max_epochs=9"), tmp_path)
    assert drawn == [("fit", 2), ("fit", 4), ("test", 6)]


def test_pictures_that_cannot_be_drawn_are_a_warning_and_a_full_disk_is_not(tiny, tmp_path, monkeypatch, caplog):
    def broken(*_):
        raise error

    monkeypatch.setattr(pictures, "all_pictures", broken)
    config = tiny("callbacks=default", "callbacks.pictures.every_n_epochs=1", "trainer.max_epochs=2")
    error = AssertionError("4 channels")
    with caplog.at_level(logging.WARNING):
        assert trained(config, tmp_path / "a")["test/elbo"] < 0
    assert caplog.text.count("Pictures could not be drawn (AssertionError: 4 channels).") == 2
    error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(VAEError, match="no space left on the disk"):
        train(config, tmp_path / "b", [], progress_bar=False)


# --- which weights are tested -----------------------------------------------------------------------------------------


def test_the_validation_loss_moves_with_a_controller_or_an_adversary_and_with_nothing_else():
    still = [BetaVAE(), Capacity(), BetaTCVAE(64), DIPVAEI(), InfoVAE(), IWAE()]
    still += [BetaVAE(schedule=schedule) for schedule in (Linear(5), Cosine(5), Cyclical(5))]
    assert [objective.loss_moves for objective in still] == [None] * 9
    for schedule in (GECO(1.0), ControlVAE(1.0), AdaptiveKL(1.0)):
        assert BetaVAE(schedule=schedule).loss_moves == f"{type(schedule).__name__} changes the weight on the KL"
    assert "discriminator" in FactorVAE(3, hidden=[4]).loss_moves
    assert "discriminator" in Adversarial().loss_moves


def test_beside_a_discriminator_the_last_weights_are_tested(tiny, tmp_path):
    # at first the discriminator knows nothing, and the more it learns the higher is the loss that it is part of
    factor = [
        "objective=factor_vae",
        "objective.hidden=[16]",
        "objective.gamma=1000",
        "objective.discriminator_lr=0.03",
    ]
    found = trained(tiny(*factor, "trainer.max_epochs=6", "logger=csv"), tmp_path)
    losses = [row["val/loss"] for row in rows_of(tmp_path, "val/loss")]
    assert losses.index(min(losses)) < 5
    assert found["val/best_epoch"] == 5
    assert found["val/best_loss"] == found["val/loss"] == pytest.approx(losses[-1])
    assert checkpoint(tmp_path, "best")["steps"] == checkpoint(tmp_path, "last")["steps"]


def test_early_stopping_on_the_verdict_of_a_discriminator_is_refused_in_a_sentence(tiny, tmp_path):
    with pytest.raises(VAEError, match=r"watches val/loss, which moves: the discriminator .*monitor=val/distortion"):
        train(tiny("objective=factor_vae", "callbacks=early_stopping"), tmp_path, [], progress_bar=False)


@pytest.mark.parametrize(("monitor", "mode", "choose"), [("val/elbo", "max", max), ("val/rate", "min", min)])
def test_a_monitor_of_ones_own_chooses_whatever_moves(monitor, mode, choose, tiny, tmp_path):
    moving = ["objective/schedule=geco", "objective.schedule.target=-100", "objective.schedule.eta=0.02"]
    best = [f"callbacks.checkpoint.monitor={monitor}", f"callbacks.checkpoint.mode={mode}", "optimizer.lr=0.3"]
    found = trained(tiny(*moving, *best, "logger=csv", "trainer.max_epochs=6"), tmp_path)
    rows = rows_of(tmp_path, monitor)
    chosen = [row[monitor] for row in rows].index(choose(row[monitor] for row in rows))
    assert found["val/best_epoch"] == chosen < 5
    assert found["val/best_loss"] == pytest.approx(rows[chosen]["val/loss"])


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("callbacks.checkpoint=null", "keeps the weights that are tested"),
        ("callbacks.checkpoint.monitor=test/loss", "not of the validation split"),
        ("callbacks.checkpoint.monitor=val/los", "is not measured: choose one of val/loss, "),
        ("callbacks.checkpoint.mode=low", "must be min or max"),
    ],
)
def test_a_checkpoint_that_could_not_be_tested_is_refused(option, sentence, tiny, tmp_path):
    with pytest.raises(VAEError, match=sentence):
        train(tiny(option), tmp_path, [], progress_bar=False)


def test_the_best_weights_of_a_folder_that_was_moved_are_still_the_best(tiny, tmp_path, monkeypatch):
    config = tiny("trainer.max_epochs=3", "callbacks.checkpoint.mode=max", "callbacks.interruptible.every_n_steps=1")
    whole = trained(config, tmp_path / "whole")
    assert whole["val/best_epoch"] == 0  # the loss only falls
    with monkeypatch.context() as patch:
        stopped_at(4, patch)
        with pytest.raises(Killed):
            train(config, tmp_path / "here", [], progress_bar=False)
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert trained(config, tmp_path / "there", resume=True) == whole
    assert not (tmp_path / "here").exists()


def test_the_best_loss_that_an_earlier_version_stored_is_what_the_next_is_compared_with():
    stored = {"monitor": "val/loss", "best_model_score": torch.tensor(2.5), "best_model_path": "gone/best.ckpt"}
    best = Best()
    assert best._is_better(9.0)
    best.on_load_checkpoint(None, None, {"callbacks": {"ModelCheckpoint{'monitor': 'val/loss'}": stored}})
    assert best._is_better(2.4)
    assert not best._is_better(2.6)


# --- early stopping, resumed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kill", ["before it is asked", "once it has stopped the run"])
@pytest.mark.parametrize("apart", [1, 2])
@pytest.mark.slow
def test_a_run_resumed_where_early_stopping_stops_it_ends_there(kill, apart, tiny, tmp_path, monkeypatch):
    options = ["callbacks=early_stopping", "callbacks.pictures=null", "callbacks.early_stopping.patience=1"]
    options += ["+callbacks.early_stopping.min_delta=100", "callbacks.interruptible.every_n_seconds=0", "logger=csv"]
    config = tiny(*options, "trainer.max_epochs=9", f"trainer.check_val_every_n_epoch={apart}")
    whole = trained(config, tmp_path / "whole")
    assert whole["val/best_epoch"] == 2 * apart - 1

    def stop(self, trainer):
        if trainer.current_epoch == 2 * apart - 1:
            raise Killed
        own(self, trainer)

    with monkeypatch.context() as patch:
        if kill == "before it is asked":
            own = pl.callbacks.EarlyStopping._run_early_stopping_check
            patch.setattr(pl.callbacks.EarlyStopping, "_run_early_stopping_check", stop)
        else:
            patch.setattr(VAEModule, "test_step", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            train(config, tmp_path / "cut", [], progress_bar=False)
    assert trained(config, tmp_path / "cut", resume=True) == whole
    assert checkpoint(tmp_path / "cut", "last")["steps"] == checkpoint(tmp_path / "whole", "last")["steps"]
    assert rows_of(tmp_path / "cut", "epoch") == rows_of(tmp_path / "whole", "epoch")
    assert json.loads((tmp_path / "cut" / "status.json").read_text())["epochs"] == 2 * apart


# --- training terms ---------------------------------------------------------------------------------------------------


def test_training_terms_are_means_over_images(tiny, tmp_path):
    config = tiny("data.batch_size=60", "optimizer.lr=0", "logger=csv", "trainer.log_every_n_steps=2")
    data, module = build(config)
    sums, images = {}, 0
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    for batch in loader:
        with torch.no_grad():
            terms = module.objective(module.vae, data.prepare(batch, True), generator(batch.seed, "z"), 0)
        images += len(batch.x)
        sums = {name: sums.get(name, 0) + len(batch.x) * float(value) for name, value in terms.items()}
    assert images == 64
    found = trained(config, tmp_path)
    (row,) = rows_of(tmp_path, "train/loss")
    for name, value in sums.items():
        assert found[f"train/{name}"] == pytest.approx(value / 64, rel=1e-6)
        assert row[f"train/{name}"] == pytest.approx(value / 64, rel=1e-6)


def test_a_checkpoint_of_an_earlier_version_which_counted_steps_goes_on(tiny, tmp_path, monkeypatch):
    config = tiny(QUARTERS, "trainer.log_every_n_steps=2", "callbacks.interruptible.every_n_steps=1")
    whole = trained(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopped_at(3, patch)
        with pytest.raises(Killed):
            train(config, tmp_path / "cut", [], progress_bar=False)
    last = checkpoint(tmp_path / "cut", "last")
    for name in ("validated", "validation", "kl_per_dimension"):
        del last[name]
    last["open"] = [terms for _, terms in last["open"]]
    for means in last["means"]:
        means["sums"] = {name: value / 16 for name, value in means["sums"].items()}
        means["count"] //= 16
    assert len(last["open"]) == 1 and last["means"][0]["count"] == 2
    torch.save(last, tmp_path / "cut" / "checkpoints" / "last.ckpt")
    assert trained(config, tmp_path / "cut", resume=True) == whole


# --- what is left behind ----------------------------------------------------------------------------------------------


def test_a_run_that_is_interrupted_says_so(tiny, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(VAEModule, "on_test_epoch_end", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        with pytest.raises(KeyboardInterrupt):
            train(tiny(), tmp_path, [], progress_bar=False)
    finally:
        signal.signal(signal.SIGINT, handler)  # which Lightning takes away
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", "interrupted")


def test_only_the_temporary_files_of_killed_writes_are_removed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/.last.ckpt.a1b2.tmp", ".status.json.c3.tmp"):
        (tmp_path / name).touch()
    for name in ("checkpoints/last.ckpt", "mine.tmp", ".lock"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"checkpoints/last.ckpt", "mine.tmp", ".lock"}


def test_a_table_goes_on_where_it_was_left_and_a_new_run_begins_a_new_one(tmp_path):
    first = CSVLogger(tmp_path)
    first.log_metrics({"loss": 3.0}, 1)
    first.log_metrics({"loss": 2.0}, 3)
    first.log_metrics({"elbo": -2.5}, 3)
    first.log_metrics({"loss": 1.0}, 5)
    with first.path.open("a") as file:
        file.write(",1.2")  # and was killed
    again = CSVLogger(tmp_path)
    again.take_back(5)
    again.log_metrics({"loss": 1.5, "rate": 0.5}, 5)
    assert again.path.read_text() == "elbo,loss,rate,step\n,3.0,,1\n,2.0,,3\n-2.5,,,3\n,1.5,0.5,5\n"
    new = CSVLogger(tmp_path)
    new.log_metrics({"loss": math.inf}, 0)
    assert new.path.read_text() == "loss,step\ninf,0\n"
