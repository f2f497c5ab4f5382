"""MLflow against a server of its own and W&B offline: settings, metrics and pictures arrive, a run for each run.

The slow tests need what `pip install -e '.[mlflow,wandb]'` brings, and are skipped without.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
import pytorch_lightning.loggers
from omegaconf import OmegaConf

from vae.engine import loggers
from vae.engine.loggers import make_loggers, require_packages
from vae.engine.run import train
from vae.errors import VAEError


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
@pytest.mark.parametrize("found", [None, types.SimpleNamespace(origin=None)])  # not there; a folder of that name
def test_a_logger_that_is_not_installed_is_a_sentence_before_anything_is_written(
    tiny, tmp_path, monkeypatch, name, found
):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda package: found)
    with pytest.raises(VAEError, match=rf"logger={name} needs {name}: pip install 'vae\[{name}\]'"):
        train(tiny(f"logger=[tensorboard,{name}]"), tmp_path / "run", [], progress_bar=False)
    assert not (tmp_path / "run").exists()
    require_packages(tiny("logger=[tensorboard,csv]"))
    require_packages(tiny("logger=none"))


@pytest.mark.parametrize(
    ("group", "logger", "name"), [("mlflow", "MLFlowLogger", "run_name"), ("wandb", "WandbLogger", "name")]
)
def test_a_run_is_called_by_its_folder_unless_it_has_a_name(tiny, tmp_path, monkeypatch, group, logger, name):
    made = type(logger, (), {"__init__": lambda self, **options: vars(self).update(options)})
    monkeypatch.setattr(pytorch_lightning.loggers, logger, made)
    config = tiny(f"logger=[csv,{group}]")
    _, named = make_loggers(config, tmp_path / "seed=1")
    assert getattr(named, name) == "seed=1"
    assert named.save_dir == str(tmp_path / "seed=1")
    config.logger[group][name] = "mine"
    assert getattr(make_loggers(config, tmp_path)[1], name) == "mine"


def test_where_mlflow_and_wandb_write_follows_from_their_own_variables(tiny, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    config = tiny("logger=[mlflow,wandb]").logger
    assert (config.mlflow.tracking_uri, config.wandb.project) == ("sqlite:///mlflow.db", "vae")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    config = OmegaConf.to_container(config, resolve=True)
    assert (config["mlflow"]["tracking_uri"], config["wandb"]["project"]) == ("http://localhost:5000", "mine")


# --- MLflow -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a real MLflow server on this machine, its runs in SQLite."""
    pytest.importorskip("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/runs.db"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    light = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # no queue of jobs beside it
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=light, start_new_session=True)
    try:
        until = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, (tmp_path / "server.log").read_text()
                time.sleep(0.5)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait()


@pytest.mark.slow
def test_a_sweep_arrives_at_an_mlflow_server(tiny, tmp_path, server):
    from mlflow.tracking import MlflowClient

    options = ["callbacks=default", "callbacks.pictures.points=16", "logger=[tensorboard,mlflow]"]
    options.append("trainer.log_every_n_steps=1")
    results = {}
    for seed in (0, 1):
        folder = tmp_path / f"seed={seed}"
        results[folder.name] = train(tiny(*options, f"seed={seed}"), folder, [], progress_bar=False)
        assert list(folder.glob("events.out.tfevents.*"))
    with pytest.raises(VAEError):
        train(tiny(*options, "optimizer.lr=1e30", "trainer.max_epochs=3"), tmp_path / "failed", [], progress_bar=False)

    client = MlflowClient(server)
    found = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("vae").experiment_id])}
    assert set(found) == {"seed=0", "seed=1", "failed"}
    assert found["failed"].info.status == "FAILED"
    for name, metrics in results.items():
        run = found[name]
        assert run.info.status == "FINISHED"
        assert run.data.params["seed"] == name[-1]
        assert (run.data.params["model.latent_dim"], run.data.params["objective.beta"]) == ("3", "1.0")
        for metric in ("test/elbo", "val/loss", "test/nll_iw5"):
            assert run.data.metrics[metric] == pytest.approx(metrics[metric], rel=1e-6)
        assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [0, 1]
        pictures = {Path(entry.path).name for entry in client.list_artifacts(run.info.run_id, "pictures")}
        assert {"samples", "reconstructions", "traversals"} <= pictures
        assert [Path(a.path).name for a in client.list_artifacts(run.info.run_id, "pictures/samples")] == ["2.png"]


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_a_sentence(tiny, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(VAEError, match=r"MLFlowLogger does not take the run: .*127\.0\.0\.1"):
        train(tiny("logger=mlflow"), tmp_path / "run", [], progress_bar=False)
    assert "does not take the run" in json.loads((tmp_path / "run" / "status.json").read_text())["reason"]


# --- W&B ----------------------------------------------------------------------------------------------------------------


def records(path):
    """The protocol buffers of a .wandb file: LevelDB's log format after a header of seven bytes, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield Record.FromString(parts)
            parts = b""


@pytest.mark.slow
def test_a_run_arrives_in_wandbs_offline_folder_each_its_own(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = ["callbacks=default", "callbacks.pictures.points=16", "logger=[csv,wandb]", "trainer.log_every_n_steps=1"]
    ids = set()
    for seed in (0, 1):
        folder = tmp_path / f"seed={seed}"
        metrics = train(tiny(*options, f"seed={seed}"), folder, [], progress_bar=False)
        (offline,) = (folder / "wandb").glob("offline-run-*")
        (kept,) = offline.glob("*.wandb")
        settings, rows = {}, []
        for record in records(kept):
            if record.HasField("run") and record.run.project:
                ids.add(record.run.run_id)
                assert (record.run.display_name, record.run.project) == (folder.name, "vae")
            items = record.run.config.update if record.HasField("run") else record.config.update
            settings |= {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            if record.HasField("history"):
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                rows.append(row)
        assert (settings["seed"], settings["model.latent_dim"]) == (seed, 3)
        for name in ("test/elbo", "val/loss"):
            assert [row[name] for row in rows if name in row] == pytest.approx([metrics[name]], rel=1e-6)
        assert len([row for row in rows if "train/loss" in row]) == 2
        images = {path.name.partition("_")[0] for path in (offline / "files" / "media" / "images").glob("*.png")}
        assert {"samples", "reconstructions", "traversals"} <= images
    assert len(ids) == 2
