"""What `vae.train` does with one run of a sweep."""

from __future__ import annotations

import json
import math

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from vae.cli import CONFIGS
from vae.engine.search import Pruned
from vae.engine.sweep import REFUSED
from vae.train import main

SMALL = ["data.limit=64", "data.batch_size=32", "evaluation.nll_samples=5", "threads=1", "trainer.accelerator=cpu"]
SMALL += ["callbacks=minimal", "network.hidden=[16]", "trainer.max_epochs=1"]


@pytest.fixture
def job(tmp_path):
    """Calls the entry point as a sweep's launcher does, in the folder `tmp_path`/job; returns what the sweeper is told."""

    def call(*overrides):
        with initialize_config_dir(CONFIGS, version_base="1.3"):
            config = compose("train", [*SMALL, *overrides], return_hydra_config=True)
        with open_dict(config):
            config.hydra.mode = "MULTIRUN"
            config.hydra.runtime.output_dir = str(tmp_path / "job")
            config.hydra.job.config.override_dirname.exclude_keys = [o.partition("=")[0] for o in SMALL]
        OmegaConf.set_readonly(config.hydra, True)
        HydraConfig.instance().set_config(config)
        with open_dict(config):
            del config["hydra"]
        return main.__wrapped__(config)

    yield call
    HydraConfig.instance().cfg = None


def test_a_job_of_a_sweep_that_is_started_again_goes_on_whatever_the_sweep_was_asked(job, tmp_path, monkeypatch):
    first = job("seed=1")
    assert first == json.loads((tmp_path / "job" / "metrics.json").read_text())["val/best_elbo"]
    assert OmegaConf.load(tmp_path / "job" / "overrides.yaml") == ["seed=1"]
    last = tmp_path / "job" / "checkpoints" / "last.ckpt"
    stamp = last.stat().st_mtime_ns
    assert job("seed=1") == first  # as submitit starts a requeued job: by the same overrides
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert job("seed=1", "resume=restart") == first
    assert last.stat().st_mtime_ns == stamp
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert job("seed=1", "resume=restart") == first
    assert last.stat().st_mtime_ns > stamp


def test_a_job_returns_the_metrics_that_were_asked_for_and_the_worst_where_it_fails(job, tmp_path):
    asked = ["sweep_metric=[test/elbo,val/loss]"]
    measured = job(*asked)
    found = json.loads((tmp_path / "job" / "metrics.json").read_text())
    assert measured == (found["test/elbo"], found["val/loss"])
    assert job("optimizer.lr=1e30", "resume=true", *asked) == (-math.inf, math.inf)
    assert "optimizer.lr is 0.001 there and 1e+30 now" in json.loads((tmp_path / "job" / REFUSED).read_text())["reason"]
    (tmp_path / "job" / REFUSED).unlink()
    assert job("optimizer.lr=1e30", "resume=restart", "trainer.max_epochs=3") == -math.inf
    assert json.loads((tmp_path / "job" / "status.json").read_text())["state"] == "failed"
    assert not (tmp_path / "job" / REFUSED).exists()


def test_a_run_that_a_search_prunes_returns_nothing_now_and_when_its_job_is_started_again(job, tmp_path, monkeypatch):
    def hopeless(*_, callbacks):
        assert callbacks == []  # of a search without a pruner
        raise Pruned("Pruned after epoch 3.")

    trial = ["hydra/sweeper=optuna", "hydra.sweeper.trial=1"]
    monkeypatch.setattr("vae.engine.run.train", lambda *args, progress_bar, **others: hopeless(**others))
    assert job(*trial) is None
    monkeypatch.setattr(
        "vae.engine.run.train",
        lambda *args, **others: {"val/best_loss": 1.0, "val/best_epoch": 1.0, "val/best_elbo": -1.0},
    )
    assert job(*trial) == -1.0
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "status.json").write_text('{"state": "pruned"}')
    assert job(*trial) is None
    assert job() == -1.0  # of a sweep that is no search
