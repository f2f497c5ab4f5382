"""What a run asks of its trainer: one device, a precision that works, threads, a schedule that ends in time, loggers."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning.loggers import MLFlowLogger, TensorBoardLogger
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment

from vae.beta import Constant, Cosine, Cyclical, Linear, Schedule
from vae.engine.build import build, run_length
from vae.engine.callbacks.progress import Progress
from vae.engine.folder import environment, usable_cores
from vae.engine.loggers import log_picture
from vae.engine.run import train
from vae.engine.trainer import set_threads, trainer_options, warn_of_unreached_weight
from vae.errors import VAEError
from vae.objectives.elbo import BetaVAE


@pytest.mark.parametrize(
    "override",
    [
        "trainer.devices=[0,1]",
        "trainer.devices=-1",
        "trainer.devices=auto",
        "+trainer.num_nodes=2",
        "+trainer.strategy=ddp",
        "+trainer.strategy=ddp_spawn",
        "trainer.precision=bf16-true",
        "trainer.precision=16-true",
        "trainer.precision=64-true",
    ],
)
def test_what_a_run_cannot_use_is_refused_before_anything_is_written(override, tiny, tmp_path):
    name = override.lstrip("+").replace("[", r"\[").replace(",", ", ?")
    with pytest.raises(VAEError, match=name):
        train(tiny(override), tmp_path / "run", [], progress_bar=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("override", ["trainer.devices=[0]", "trainer.precision=bf16-mixed", "+trainer.strategy=auto"])
def test_what_a_run_can_use_is_not_refused(override, tiny):
    trainer_options(tiny(override))


def test_one_of_several_processes_started_from_outside_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    trainer_options(tiny())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(VAEError, match="WORLD_SIZE=2: several processes were started"):
        train(tiny(), tmp_path / "run", [], progress_bar=False)
    assert not (tmp_path / "run").exists()


# --- threads ----------------------------------------------------------------------------------------------------------


def test_auto_is_one_thread_and_what_was_chosen_is_recorded():
    before = torch.get_num_threads()
    try:
        set_threads(2)
        assert environment()["threads"] == 2
        set_threads("auto")
        assert environment()["threads"] == 1
        for wrong in (0, -1, 1.5, "many", None):
            with pytest.raises(VAEError, match=f"threads={wrong} must be"):
                set_threads(wrong)
    finally:
        torch.set_num_threads(before)


FAULTS = """
import resource, torch
from vae.engine.trainer import settle_process

def step():
    blocks = [torch.ones(4_000_000) for _ in range(4)]

settle_process(1)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library frees in another way")
def test_memory_that_a_step_frees_is_the_next_ones_unless_the_user_says_otherwise():
    def faults(**variables):
        environment = {**os.environ, **variables}
        found = subprocess.run(
            [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True
        )
        return int(found.stdout)

    assert faults() < 100
    assert faults(MALLOC_TRIM_THRESHOLD_="1000000", MALLOC_MMAP_THRESHOLD_="1000000") > 10_000  # of 156,250 pages


def test_more_threads_than_the_process_may_use_are_warned_of(monkeypatch, caplog):
    monkeypatch.setattr("vae.engine.trainer.usable_cores", lambda: 1)
    before = torch.get_num_threads()
    set_threads(1)
    assert not caplog.records
    set_threads(2)
    torch.set_num_threads(before)
    assert "threads=2 is more than the 1 cores" in caplog.text


def test_only_the_cores_that_a_process_may_use_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr("vae.engine.folder.CGROUPS", tmp_path)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert usable_cores() == 16
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores() == 16
    (tmp_path / "cpu.max").write_text("650000 100000\n")
    assert usable_cores() == 7
    (tmp_path / "cpu").mkdir()
    for name, value in (("quota", 300000), ("period", 100000)):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(f"{value}\n")
    assert usable_cores() == 3
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert usable_cores() == 2


# --- the length of a run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["trainer.max_epochs=3"], (6, 3)),
        (["trainer.max_epochs=3", "trainer.max_steps=5"], (5, 3)),
        (["trainer.max_epochs=-1", "trainer.max_steps=5"], (5, 3)),
        (["trainer.max_epochs=null", "trainer.max_steps=4"], (4, 2)),
        (["trainer.max_epochs=-1"], (math.inf, math.inf)),
        (["trainer.max_epochs=3", "+trainer.limit_train_batches=1"], (3, 3)),
        (["trainer.max_epochs=3", "+trainer.limit_train_batches=0.5"], (3, 3)),
        (["trainer.max_epochs=9", "trainer.max_steps=3", "+trainer.accumulate_grad_batches=2"], (6, 3)),
    ],
)
def test_a_runs_length_in_batches_and_epochs(options, expected, tiny):
    config = tiny(*options)
    assert run_length(config.trainer, build(config)[0]) == expected


class Late(Schedule):
    """A schedule of one's own."""

    def forward(self, step):
        return torch.tensor(3.0 if step > 1e9 else 0.25)


@pytest.mark.parametrize(
    ("schedule", "last", "end"),
    [
        (Linear(steps=20), 0.45, 1),
        (Linear(steps=20, start=1, end=0.5), 0.775, 0.5),
        (Cosine(steps=18), 0.5, 1),
        (Cyclical(steps=24, cycles=1), 0.75, 1),
        (Late(), 0.25, 3),
        (Linear(steps=9), None, None),
        (Cyclical(steps=10, cycles=1, ramp=0.5), None, None),
        (Constant(0.3), None, None),
    ],
)
def test_a_weight_that_training_does_not_reach_is_told_with_both_numbers(schedule, last, end, caplog):
    """A run of ten steps, whose last is step 9."""
    warn_of_unreached_weight(BetaVAE(schedule=schedule), 10)
    if last is None:
        assert not caplog.records
    else:
        assert f"stands at {last:g} in the last of 10 training steps and ends on {end:g}, which" in caplog.text


def test_a_run_says_that_its_warm_up_is_longer_than_it_is(tiny, tmp_path, caplog):
    options = ["objective/schedule=linear", "objective.schedule.steps=10"]
    train(tiny(*options), tmp_path, [], progress_bar=False)
    assert "objective.schedule (Linear) stands at 0.1 in the last of 2 training steps" in caplog.text


# --- loggers ----------------------------------------------------------------------------------------------------------


class Notes(Logger):
    """A logger that writes elsewhere and is told pictures as W&B's is."""

    made: list[Notes] = []

    def __init__(self, save_dir, elsewhere):
        super().__init__()
        self.given, self.elsewhere = save_dir, elsewhere
        self.settings, self.metrics, self.pictures, self.ended = {}, {}, {}, 0
        Notes.made.append(self)

    name = "notes"
    version = "1"

    @property
    def save_dir(self):
        return self.elsewhere

    @property
    @rank_zero_experiment
    def experiment(self):
        return self

    def log_hyperparams(self, params, *args, **kwargs):
        self.settings |= params

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics

    def log_image(self, key, images, step=None):
        self.pictures[key, step] = images[0].size

    def finish(self):
        self.ended += 1


def test_loggers_of_ones_own_get_settings_metrics_and_pictures_each_run_its_own(tiny, tmp_path):
    notes = {"_target_": f"{__name__}.Notes", "_partial_": True, "elsewhere": str(tmp_path / "elsewhere")}
    Notes.made.clear()
    for seed in (0, 1):
        folder = tmp_path / f"seed={seed}"
        config = tiny(f"seed={seed}", "callbacks=default", "logger=[tensorboard,csv]", "trainer.log_every_n_steps=1")
        config.logger = {"notes": notes, **OmegaConf.to_container(config.logger)}
        found = train(config, folder, [], progress_bar=False)
        logger = Notes.made[-1]
        assert logger.given == str(folder)
        assert (logger.settings["seed"], logger.settings["model.latent_dim"]) == (seed, 3)
        assert logger.metrics["test/elbo"] == found["test/elbo"]
        assert logger.pictures["samples", 2] == (274, 274)  # 8 images of 32 pixels a side, 2 between
        assert logger.ended == 1
        assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
        rows = list(csv.DictReader((folder / "metrics.csv").open()))
        assert float(next(row["test/elbo"] for row in rows if row["test/elbo"])) == pytest.approx(found["test/elbo"])
        assert list(folder.glob("events.out.tfevents.*"))
    assert len(Notes.made) == 2
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(("steps", "total"), [(math.inf, None), (5, 10)])
def test_a_bar_counts_the_batches_of_a_run_and_does_without_where_nothing_ends_it(steps, total):
    bar = Progress()
    trainer = SimpleNamespace(estimated_stepping_batches=steps, accumulate_grad_batches=2)
    bar.on_train_start(trainer, SimpleNamespace(steps=3))
    assert (bar.bar.total, bar.bar.n) == (total, 3)
    bar.bar.close()


@pytest.mark.parametrize(("steps", "epoch"), [(1, 1), (4, 1), (5, 2), (8, 2)])
def test_a_bar_counts_epochs_from_one_and_the_last_once(steps, epoch, monkeypatch):
    shown = []
    monkeypatch.setattr("tqdm.auto.tqdm.set_postfix", lambda bar, values, **_: shown.append(values))
    trainer = SimpleNamespace(estimated_stepping_batches=8, accumulate_grad_batches=1, log_every_n_steps=1)
    trainer.callback_metrics, trainer.num_training_batches = {"train/loss": 2.5}, 4
    bar = Progress()
    bar.on_train_start(trainer, SimpleNamespace(steps=0))
    bar.on_train_batch_end(trainer, SimpleNamespace(steps=steps))
    bar.on_train_end(trainer, SimpleNamespace(steps=steps))
    assert shown == 2 * [{"epoch": epoch, "loss": "2.50"}]


def test_a_run_whose_time_is_up_before_its_first_step_is_told_in_a_sentence(tiny, tmp_path):
    with pytest.raises(
        VAEError, match=r"^The run ended before its first step: give it more than trainer\.max_time=00:00:00:00\.$"
    ):
        train(tiny("+trainer.max_time='00:00:00:00'"), tmp_path, [], progress_bar=False)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_a_checkpoint_of_ones_own_lies_in_the_runs_folder_wherever_a_logger_writes(tiny, tmp_path):
    mine = "++callbacks.mine._target_=pytorch_lightning.callbacks.ModelCheckpoint"
    config = tiny(mine, "++callbacks.mine.filename=mine")
    config.logger = {
        "notes": {"_target_": f"{__name__}.Notes", "_partial_": True, "elsewhere": str(tmp_path / "elsewhere")}
    }
    train(config, tmp_path / "run", [], progress_bar=False)
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last.ckpt", "mine.ckpt"}
    assert not (tmp_path / "elsewhere").exists()


def test_a_logger_alone_and_one_that_fails_with_its_run_is_ended_too(tiny, tmp_path):
    Notes.made.clear()
    config = tiny("optimizer.lr=1e30", "logger=none", "trainer.max_epochs=3")
    config.logger = {"_target_": f"{__name__}.Notes", "save_dir": "own", "elsewhere": None}
    with pytest.raises(VAEError, match=r"stopped being finite|has diverged"):
        train(config, tmp_path, [], progress_bar=False)
    assert [(logger.given, logger.ended) for logger in Notes.made] == [("own", 1)]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_a_picture_reaches_each_kind_of_logger_as_it_takes_them(tmp_path):
    picture, told = torch.rand(3, 4, 6), []
    experiment = SimpleNamespace(
        add_image=lambda name, image, step: told.append((name, tuple(image.shape), step)),
        log_image=lambda run, image, artifact_file: told.append((run, image.size, artifact_file)),
    )

    class Board(TensorBoardLogger):
        experiment = None

    class Flow(MLFlowLogger):
        experiment, run_id = None, "r"

        def __init__(self):
            pass

    board, flow = Board(tmp_path), Flow()
    Board.experiment = Flow.experiment = experiment
    for logger in (board, flow, SimpleNamespace()):
        log_picture(logger, "samples", picture, 7)
    assert told == [("samples", (3, 4, 6), 7), ("r", (6, 4), "pictures/samples/7.png")]
