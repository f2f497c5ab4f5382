"""Sweeps whose runs are jobs of a cluster: submitit's local executor, and (marked slurm) a real Slurm."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import cluster, missing

from vae.engine.trainer import set_threads
from vae.errors import VAEError

SMALL = ["data=digits", "callbacks=minimal", "evaluation.nll_samples=10"]
LONG = ["trainer.max_epochs=100000", "callbacks.interruptible.every_n_seconds=1"]


def sweep(folder, *overrides, environment=None, launcher="submitit_local"):
    command = [
        sys.executable,
        "-m",
        "vae.train",
        "-m",
        *SMALL,
        f"hydra/launcher={launcher}",
        f"run={folder}",
        *overrides,
    ]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder.parent
    )


def status(folder):
    path = folder / "status.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def wait_for(process, what, seconds=300):
    until = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.2)


def ended(process, seconds=400):
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()


# --- without a Slurm ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_job_that_is_lost_is_a_failed_run_and_the_others_do_not_notice(tmp_path):
    folder = tmp_path / "sweep"
    process = sweep(folder, "seed=0,1", "trainer.max_epochs=2,100000", "callbacks.interruptible.every_n_steps=5")
    long = [folder / f"seed={seed},trainer.max_epochs=100000" for seed in (0, 1)]
    short = [folder / f"seed={seed},trainer.max_epochs=2" for seed in (0, 1)]
    wait_for(process, lambda: all((run / "checkpoints" / "last.ckpt").exists() for run in long))
    found = subprocess.run(["pgrep", "-f", f"submitit.core._submit {folder}"], capture_output=True, text=True).stdout
    wait_for(process, lambda: all(status(run).get("state") == "finished" for run in short))
    for pid in found.split():
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:  # of a run that has finished
            continue
    printed = ended(process)
    assert process.returncode == 1
    assert "4 runs: 2 finished, 2 failed." in printed
    for run in long:
        assert re.search(r"Its job, \d+, ended without a result: .* Its log: .*_log\.err", status(run)["reason"])
        assert Path(status(run)["reason"].rpartition("Its log: ")[2]).is_file()
    assert "vae.train -m" in json.loads((short[0] / "environment.json").read_text())["command"]


def test_threads_auto_are_those_that_slurm_gave(monkeypatch):
    import torch

    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
        monkeypatch.setattr("vae.engine.folder.os.cpu_count", lambda: 4)
        monkeypatch.setattr("vae.engine.folder.os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
        set_threads("auto")
        assert torch.get_num_threads() == 2
        monkeypatch.delenv("SLURM_CPUS_PER_TASK")
        set_threads("auto")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_a_launcher_whose_package_is_missing_is_told_in_a_sentence(monkeypatch):
    from vae.cli import name_extras

    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "hydra/launcher=submitit_slurm"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(VAEError, match=r"^hydra/launcher=submitit_slurm needs .*: pip install 'vae\[slurm\]'\.$"):
        name_extras()


# --- a real one -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if why := missing():
        pytest.skip(why)
    with cluster(tmp_path_factory.mktemp("slurm")) as here:
        yield here


def weights(folder):
    import torch

    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return saved["global_step"], saved["state_dict"]


@pytest.mark.slurm
def test_an_array_finishes_and_a_cancelled_job_is_a_failed_run_with_its_log(slurm, tmp_path):
    folder = tmp_path / "sweep"
    process = sweep(
        folder, "seed=0", "trainer.max_epochs=2,100000", environment=slurm.environment, launcher="submitit_slurm"
    )
    short, long = (folder / f"trainer.max_epochs={epochs}" for epochs in (2, 100000))
    slurm.wait_for(lambda: status(short).get("state") == "finished" and (long / "checkpoints" / "last.ckpt").exists())
    number = next(iter(slurm.asked("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i %T")))
    subprocess.run(["scancel", number], env=slurm.environment, check=True)
    printed = ended(process)
    assert (process.returncode, "2 runs: 1 finished, 1 failed." in printed) == (1, True), printed
    assert status(long)["reason"].startswith(f"Its job, {number}, ended without a result: it was cancelled, ran out")
    assert Path(status(long)["reason"].rpartition("Its log: ")[2]).is_file()


@pytest.mark.slurm
def test_a_run_whose_node_is_lost_or_that_is_preempted_goes_on_as_one_never_stopped(slurm, tmp_path):
    import torch

    folder = tmp_path / "sweep"
    settings = ["callbacks.interruptible.every_n_steps=50", "trainer.max_epochs=300", "seed=1,2"]
    process = sweep(folder, *settings, environment=slurm.environment, launcher="submitit_slurm")
    runs = [folder / f"seed={seed}" for seed in (1, 2)]
    slurm.wait_for(lambda: all((run / "checkpoints" / "last.ckpt").exists() for run in runs))
    nodes = slurm.asked("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i %N")
    lost = next(number for number, node in nodes.items() if node == "n2")
    index = int(lost.rpartition("_")[2])
    before = weights(runs[index])[0]
    slurm.kill_node("n2")
    # the other's node is wanted by something more urgent: it is preempted, waits, and goes on
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodelist=n1", "--wrap=sleep 1", "--output=/dev/null"]
    subprocess.run(urgent, env=slurm.environment, check=True, capture_output=True)
    slurm.start("n2")
    printed = ended(process, 900)
    assert (process.returncode, "2 runs: 2 finished." in printed) == (0, True), printed
    log = (runs[index] / "train.log").read_text()
    assert (found := re.search(r"goes on from step ([\d,]+)", log)), log
    assert int(found[1].replace(",", "")) >= before > 0  # nothing was lost but the steps since the last checkpoint
    for seed, run in enumerate(runs, 1):
        alone = tmp_path / f"alone{seed}"
        command = [sys.executable, "-m", "vae.train", *SMALL, *settings[:2], f"seed={seed}", f"run={alone}"]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
        (step, stopped), (same, never) = weights(run), weights(alone)
        assert step == same
        assert all(torch.equal(stopped[name], value) for name, value in never.items())


@pytest.mark.slurm
def test_runs_that_meet_their_time_limit_are_queued_again_and_go_on_from_their_last_checkpoint(slurm, tmp_path):
    folder = tmp_path / "sweep"
    limits = ["hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=20"]  # Slurm tells up to a minute earlier
    options = [*limits, "trainer.max_epochs=100000", "callbacks.interruptible.every_n_steps=50", "seed=0,1"]
    process = sweep(folder, *options, environment=slurm.environment, launcher="submitit_slurm")
    runs = [folder / f"seed={seed}" for seed in (0, 1)]

    def went_on(run):
        log = run / "train.log"
        return re.search(r"goes on from step ([\d,]+)", log.read_text() if log.is_file() else "")

    slurm.wait_for(lambda: all(map(went_on, runs)), 900)
    for run in runs:
        step = int(went_on(run)[1].replace(",", ""))
        slurm.wait_for(lambda run=run, step=step: weights(run)[0] > step)  # nothing of it was taken again
        assert step >= 50
        assert status(run)["state"] == "running"
        assert "Requeued job" in (run / "train.log").read_text()
    number = next(iter(slurm.asked("squeue", "--noheader", "--array", "--format=%i %T"))).partition("_")[0]
    subprocess.run(["scancel", number], env=slurm.environment, check=True)
    printed = ended(process)
    assert (process.returncode, "2 runs: 2 failed." in printed) == (1, True), printed


@pytest.mark.slurm
def test_a_partition_that_does_not_exist_is_told_in_a_sentence(slurm, tmp_path):
    options = ["hydra.launcher.partition=nowhere", "seed=0,1"]
    process = sweep(tmp_path / "sweep", *options, environment=slurm.environment, launcher="submitit_slurm")
    printed = ended(process)
    assert process.returncode == 1
    assert printed.splitlines()[-1].startswith(
        "Error: hydra.launcher: the queue did not take the jobs: invalid partition specified: nowhere"
    )
    assert "Traceback" not in printed
