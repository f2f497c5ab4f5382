"""MLflow against a server of its own and W&B offline: settings, metrics and pictures arrive, a run for each run.

The slow tests need what `pip install -e '.[mlflow,wandb]'` brings, and are skipped without.
"""

from __future__ import annotations

import functools
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
from kills import OFTEN, killed
from omegaconf import OmegaConf

from vae.engine import loggers
from vae.engine.loggers import KEPT, make_loggers, require_packages
from vae.engine.packing import Pack
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
    made = type(logger, (), {"__init__": lambda self, **options: vars(self).update(options), "log_metrics": None})
    monkeypatch.setattr(pytorch_lightning.loggers, logger, made)
    config = tiny(f"logger=[csv,{group}]")
    _, named = make_loggers(config, tmp_path / "seed=1")
    assert getattr(named, name) == "seed=1"
    assert named.save_dir == str(tmp_path / "seed=1")
    assert not hasattr(named, "reinit")
    monkeypatch.setattr("vae.engine.turns.CURRENT", object())  # where runs take turns
    assert getattr(make_loggers(config, tmp_path)[1], "reinit", None) == {"wandb": "create_new"}.get(group)
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


# --- a run that is resumed ----------------------------------------------------------------------------------------------

RESUMED = [
    *OFTEN,
    "callbacks.pictures=null",
    "trainer.max_epochs=3",
]  # a checkpoint every 3 steps, numbers every 2, of 12


class Server(pytorch_lightning.loggers.Logger):
    """Stands for W&B's: its runs are files of rows in one folder, which only grow."""

    folder: Path
    experiment = None

    def __init__(self, save_dir, name, id, project):
        super().__init__()
        known = [path.stem for path in self.folder.iterdir()]
        self.version = id or f"run{len(known)}"
        (self.folder / f"{self.version}.jsonl").touch()

    version = name = ""

    def log_hyperparams(self, *_, **__):
        pass

    def log_metrics(self, metrics, step=None):
        with (self.folder / f"{self.version}.jsonl").open("a") as rows:
            rows.write(json.dumps({**metrics, "step": step}) + "\n")

    def save(self):
        pass


@pytest.fixture
def arrived(tmp_path, monkeypatch):
    """What the runs of a server have been given: {id: rows}."""
    Server.folder = tmp_path / "server"
    Server.folder.mkdir()
    named = type("WandbLogger", (Server,), {})
    monkeypatch.setattr(pytorch_lightning.loggers, "WandbLogger", named)
    monkeypatch.setattr(loggers, "require_packages", lambda config: None)
    monkeypatch.setattr("vae.engine.run.require_packages", lambda config: None)
    return lambda: {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in Server.folder.iterdir()
    }


def test_a_resumed_run_goes_on_in_the_same_one_and_no_number_arrives_twice(tiny, tmp_path, arrived):
    config, cut = tiny(*RESUMED, "logger=wandb"), tmp_path / "cut"
    train(config, tmp_path / "whole", [], progress_bar=False)
    for moment in ((KEPT, 2, "after"), (KEPT, 4, "after"), ("best.ckpt", 1, "after"), ("metrics.json", 1, "before")):
        assert killed(config, cut, moment), moment  # before its first checkpoint, too
    assert not killed(config, cut)
    whole, resumed = arrived()["run0"], arrived()["run1"]
    assert len(arrived()) == 2
    assert [row["step"] for row in whole if "train/loss" in row] == [1, 3, 5, 7, 9, 11]
    assert [row["step"] for row in whole if "val/loss" in row] == [3, 7, 11]
    timeless = [[{k: v for k, v in row.items() if "seconds" not in k} for row in rows] for rows in (whole, resumed)]
    assert timeless[0] == timeless[1]


def test_another_run_begins_where_it_starts_anew_or_is_sent_elsewhere(tiny, tmp_path, arrived):
    for resume, runs, *more in (
        (False, ["run0"]),
        ("restart", ["run0", "run1"]),
        (True, ["run0", "run1"], "trainer.max_epochs=2"),
        (True, ["run0", "run1", "run2"], "trainer.max_epochs=3", "logger.wandb.project=another"),
        (True, ["mine", "run0", "run1", "run2"], "trainer.max_epochs=4", "+logger.wandb.id=mine"),
    ):
        train(tiny("logger=wandb", *more), tmp_path / "run", [], resume, progress_bar=False)
        assert sorted(arrived()) == runs
    assert [row["val/loss"] for row in arrived()["mine"] if "val/loss" in row]


def test_a_run_that_is_killed_before_its_first_number_has_begun(tiny, tmp_path, arrived):
    config, folder = tiny(*RESUMED, "logger=wandb", "trainer.log_every_n_steps=100"), tmp_path / "run"
    assert killed(config, folder, ("last.ckpt", 1, "before"))
    assert list(arrived().values()) == [[]]
    assert not killed(config, folder)
    assert len(arrived()) == 1


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
def test_a_resumed_run_goes_on_in_its_run_of_mlflow(tiny, tmp_path, server):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(server)
    config, folder = tiny(*RESUMED, "logger=mlflow"), tmp_path / "cut"
    train(config, tmp_path / "whole", [], progress_bar=False)
    for moment in ((KEPT, 3, "after"), ("best.ckpt", 2, "before")):
        assert killed(config, folder, moment), moment
    run_id = json.loads((folder / KEPT).read_text())["MLFlowLogger"]["id"]
    assert client.get_run(run_id).info.status == "RUNNING"
    longer = tiny(*RESUMED, "logger=mlflow", "trainer.max_epochs=4")
    assert not killed(config, folder)
    assert not killed(longer, folder)
    found = client.search_runs([client.get_experiment_by_name("vae").experiment_id])
    cut, whole = sorted(found, key=lambda run: run.info.run_name)
    assert (len(found), cut.info.run_id, cut.info.status) == (2, run_id, "FINISHED")
    assert (cut.data.params["trainer.max_epochs"], cut.data.tags["trainer.max_epochs"]) == ("3", "4")
    for name, steps in {"train/loss": 8, "val/loss": 4, "test/elbo": 2}.items():
        here, there = (client.get_metric_history(run.info.run_id, name) for run in (cut, whole))
        assert len({point.step for point in here}) == len(here) == steps, name
        pairs = [[(point.step, point.value) for point in points] for points in (here, there)]
        assert pairs[0][: len(there)] == pairs[1], name
    client.delete_run(run_id)
    client.delete_experiment(cut.info.experiment_id)
    (folder / KEPT).write_text(json.dumps({"MLFlowLogger": {"id": "gone", "which": [server, "vae", None], "last": {}}}))
    config = tiny(*RESUMED, "logger=mlflow", "trainer.max_epochs=5")
    with pytest.raises(
        VAEError, match=r"MLFlowLogger does not take the run: .*gone.*loggers\.json says which run it was"
    ):
        train(config, folder, [], resume=True, progress_bar=False)


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


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_its_run_of_wandb(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config, folder = tiny(*RESUMED, "logger=wandb"), tmp_path / "cut"

    class Interruption(pytorch_lightning.Callback):  # not a kill: W&B writes only now and then what it is given
        def on_train_batch_end(self, trainer, module, *_):
            if module.steps == 8:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, folder, [], progress_bar=False, callbacks=[Interruption()])
    train(config, folder, [], resume=True, progress_bar=False)
    found, ids = [], set()
    for kept in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in records(kept):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                found.append((row["trainer/global_step"], "train/loss" in row))
    assert ids == {json.loads((folder / KEPT).read_text())["WandbLogger"]["id"]}
    assert [step for step, trained in found if trained] == [1, 3, 5, 7, 9, 11]


@pytest.mark.slow
def test_runs_that_take_turns_are_each_its_own_in_wandb(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    jobs = [
        functools.partial(train, tiny("logger=wandb", f"seed={n}"), tmp_path / str(n), [], progress_bar=False)
        for n in range(2)
    ]
    for name, metrics in zip("01", Pack(["a", "b"]).run(jobs), strict=True):
        (kept,) = (tmp_path / name).glob("wandb/offline-run-*/*.wandb")
        found = [record.history for record in records(kept) if record.HasField("history")]
        rows = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in h.item} for h in found]
        assert [r["test/elbo"] for r in rows if "test/elbo" in r] == pytest.approx([metrics["test/elbo"]], rel=1e-6)
