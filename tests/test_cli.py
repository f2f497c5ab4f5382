"""The commands as a person types them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import run
from hydra import compose, initialize_config_dir

from vae.cli import CONFIGS, command, quote_run, rename_old, resuming, run_name, sweep_name
from vae.errors import VAEError

SMALL = [
    "data.limit=64",
    "data.batch_size=32",
    "trainer.max_epochs=1",
    "evaluation.nll_samples=5",
    "network.hidden=[16]",
]
SMALL += ["callbacks=minimal", "threads=1", "trainer.accelerator=cpu"]


@pytest.mark.slow
def test_entry_points_answer_without_importing_torch(tmp_path):
    code = "import sys, vae.train, vae.evaluate, vae.engine.sweep, vae.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    shown = run("vae.train", "--cfg", "job", "objective.beta=4", cwd=tmp_path)
    assert "beta: 4" in shown.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("override", ["objective.bta=4", "data=mnits", "objective=beta_vea"])
def test_an_unknown_option_or_group_is_refused_without_a_traceback(override, tmp_path):
    done = run("vae.train", override, cwd=tmp_path)
    assert done.returncode == 1
    assert override.split("=")[override.startswith(("data", "objective=")) and 1] in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["evaluate", "fit_prior", "encode", "generate", "export"])
def test_an_option_without_a_default_that_is_not_given_is_told_in_a_sentence(name, tmp_path):
    done = run(f"vae.{name}", cwd=tmp_path)
    missing = "out" if name == "generate" else "run"
    assert done.returncode == 1 and done.stderr == f"Error: {missing} has no default: say what it should be.\n"


@pytest.mark.parametrize("word", ["~prior", "~prior.kind"])
def test_no_prior_to_fit_is_told_in_a_sentence(word, tmp_path, monkeypatch, capsys):
    from types import SimpleNamespace

    from vae.fit_prior import main

    monkeypatch.setattr("vae.engine.loading.load", lambda *_, **__: SimpleNamespace(vae=None, data=None, path=tmp_path))
    monkeypatch.setattr(sys, "argv", ["vae.fit_prior", "run=any", word])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith("Error: prior=null is unknown: choose one of gaussian, ")


def test_a_sweep_with_a_bad_run_names_folders_by_what_varies_reports_and_fails_then_resumes(tmp_path):
    command = ["-m", *SMALL, "run=sweep", "objective.beta=0.5,-1", "model.latent_dim=2,3"]
    done = run("vae.train", *command, cwd=tmp_path)
    assert done.returncode == 1
    sweep = tmp_path / "sweep"
    folders = {path.parent.name for path in sweep.glob("*/status.json")}
    assert folders == {f"model.latent_dim={d},objective.beta={b}" for d in (2, 3) for b in ("0.5", "-1")}
    assert "objective.beta=-1 must be zero or more" in done.stdout.replace("\n", "")
    rows = list(csv.DictReader((sweep / "report" / "runs.csv").open()))
    assert len(rows) == 4
    assert (sweep / "report" / "index.html").is_file()
    assert "tensorboard --logdir sweep" in done.stdout
    good = sweep / "model.latent_dim=2,objective.beta=0.5"
    stamp = (good / "metrics.json").stat().st_mtime_ns

    refused = run("vae.train", *command, cwd=tmp_path)
    assert refused.returncode == 1
    assert "exists already: add resume=true" in refused.stderr
    assert "Traceback" not in refused.stderr

    measured = run("vae.evaluate", f"run={good.relative_to(tmp_path)}", cwd=tmp_path)
    assert "test/elbo" in measured.stdout, measured.stderr

    changed = run("vae.train", *command, "optimizer.lr=0.5", "resume=true", cwd=tmp_path)
    assert changed.returncode == 1
    assert (
        changed.stdout.count("optimizer.lr is 0.001 there and 0.5 now") == 4
    )  # of two runs, when refused and at the end
    assert (good / "metrics.json").stat().st_mtime_ns == stamp

    again = run("vae.train", *command, "resume=true", cwd=tmp_path)
    assert not list(sweep.glob("*/refused.json"))
    assert "finished model.latent_dim=3,objective.beta=0.5" in again.stdout
    assert (good / "metrics.json").stat().st_mtime_ns == stamp


def test_a_sweep_all_of_whose_runs_are_refused_says_why_of_each_and_fails(tmp_path):
    done = run("vae.train", "-m", "trainer.max_epochs=-5,-6", "run=sweep", cwd=tmp_path)
    assert done.returncode == 1
    for epochs in (-5, -6):
        reason = f"trainer.max_epochs={epochs} must be a whole number of at least -1, or null."
        assert f"Not done:    trainer.max_epochs={epochs}: {reason}" in done.stdout
    assert "Warning" not in done.stderr


def test_a_run_is_trained_evaluated_again_and_resumed_by_command(tmp_path):
    done = run("vae.train", *SMALL, "run=here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = run("vae.evaluate", "run=here", cwd=tmp_path)
    elbo = json.loads((tmp_path / "here" / "metrics.json").read_text())["test/elbo"]
    assert again.stdout.count(f"{elbo:.6g}") == 2
    resumed = run("vae.train", "run=here", "resume=true", "trainer.max_epochs=2", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((tmp_path / "here" / "status.json").read_text())["epochs"] == 2
    nothing = run("vae.train", "run=nowhere", "resume=true", cwd=tmp_path)
    assert nothing.stderr == "Error: There is no run to go on with in run=nowhere: it has no config.yaml.\n"
    assert not (tmp_path / "nowhere").exists()
    refused = run("vae.evaluate", "run=here", "split=tset", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stderr == "Error: split=tset is unknown: choose one of train, val, test.\n"


def test_runs_of_different_settings_have_different_folders_that_every_file_system_takes():
    assert run_name("model.latent_dim=2,objective.beta=0.5", 3) == "model.latent_dim=2,objective.beta=0.5"
    assert run_name("", 3) == "3"
    alike = ["data=a/b", "data=a_b", "data=a:b", "data=a__b", "data=[a,b]", ".data=a_b", "\u7a3f" * 200, "\u7a3f" * 140]
    alike += ["x" * 150, "x" * 151, "x" * 152, "/", "..", "_"]
    names = [run_name(overrides, 0) for overrides in alike]
    assert len({*names}) == len(names)
    assert all(len(name.encode()) <= 255 and "/" not in name and name[0] != "." for name in names)


def test_a_sweep_is_named_after_its_data_set_or_those_that_it_goes_through(tmp_path):
    assert sweep_name("digits", ["objective.beta=1,4"]) == sweep_name("digits", ["data=digits"]) == "digits"
    assert sweep_name("digits", ["data=mnist,fashion_mnist", "seed=0,1"]) == "mnist,fashion_mnist"
    assert sweep_name("digits", ["data=choice(mnist, svhn)", "experiment=a,b"]) == "mnist,svhn"
    assert sweep_name("digits", ["data=mnist,svhn", "data=choice(kmnist)"]) == "kmnist"  # the last that is typed
    assert sweep_name("digits", ["+experiment=iwae,priors"]) == "iwae,priors"
    assert sweep_name("digits", ["data=glob(*mnist)"]).startswith("glob_mnist-")
    done = run("vae.train", "-m", *SMALL, "data=digits,arrays", cwd=tmp_path)  # of which one needs a path
    (folder,) = tmp_path.glob("runs/sweep-digits,arrays/*")
    assert {path.parent.name for path in folder.glob("*/status.json")} >= {"data=digits"}, done.stderr


@pytest.mark.parametrize(
    "folder",
    [
        "S/model.latent_dim=2,objective.beta=0.5",
        "a,b",
        "12",
        "1e3",
        "true",
        "[a]",
        "{a: b}",
        "it's",
        "a\\",
        "range(1,3)",
        "a\\'b=",
    ],
)
def test_any_folder_can_be_named_by_run(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vae.evaluate", "split=val", f"run={folder}", "measures=[ais]"])
    quote_run()
    assert sys.argv[:2] + sys.argv[3:] == ["vae.evaluate", "split=val", "measures=[ais]"]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        assert compose("evaluate", sys.argv[1:]).run == folder
    once = list(sys.argv)
    quote_run()
    assert sys.argv == once


@pytest.mark.parametrize("sweep", [[], pytest.param(["-m", "seed=0,1"], marks=pytest.mark.slow)])
def test_a_folder_that_cannot_be_made_is_told_in_a_sentence(tmp_path, sweep):
    (tmp_path / "file").write_text("kept")
    for folder, why in (("/dev/null/x", "Not a directory"), ("file", "File exists")):
        done = run("vae.train", *sweep, *SMALL, f"run={folder}", cwd=tmp_path)
        assert done.returncode == 1 and done.stderr == f"Error: run={folder} cannot be made: {why}.\n"
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("sweep", [[], pytest.param(["-m", "seed=0,1"], marks=pytest.mark.slow)])
def test_a_current_folder_that_takes_no_runs_is_told_in_a_sentence(tmp_path, sweep):
    (tmp_path / "runs").write_text("a file")
    done = run("vae.train", *sweep, *SMALL, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(f"Error: runs/{'sweep-' * bool(sweep)}digits/")
    assert done.stderr.endswith(
        " cannot be made in the current folder (Not a directory): name another place, as run=FOLDER.\n"
    )
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").symlink_to("nowhere")  # is in the way, and is not there
    assert run("vae.train", *SMALL, cwd=tmp_path).stderr.count("\n") == 1


@pytest.mark.parametrize("word", ["run=here/there", "run=null", "run='a=b'", "run=runs/${seed}", "run=a b"])
def test_what_hydra_reads_as_a_folder_is_left_to_it(word, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vae.train", word])
    quote_run()
    assert sys.argv == ["vae.train", word]


def test_options_under_their_names_of_the_release_before_are_taken_with_a_warning(monkeypatch):
    old = ["+data.labelled=20", "objective=m2", "objective.labelled_per_batch=8,16", "likelihood=discretised_logistic"]
    monkeypatch.setattr(sys, "argv", ["vae.train", *old, "likelihood=bernoulli,discretised_logistic_mixture"])
    with pytest.warns(FutureWarning, match="is now") as warned:
        rename_old()
    new = ["+data.labeled=20", "objective=m2", "objective.labeled_per_batch=8,16", "likelihood=discretized_logistic"]
    new.append("likelihood=bernoulli,discretized_logistic_mixture")
    assert sys.argv == ["vae.train", *new]
    assert len(warned) == 4
    assert "likelihood=discretised_logistic is now likelihood=discretized_logistic: " in str(warned[2].message)
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose(
            "train", ["data=digits", "objective.labeled_per_batch=8", "++data.labeled=20", *new[1:2], new[3]]
        )
    assert (config.data.labeled, config.objective.labeled_per_batch) == (20, 8)
    assert config.likelihood._target_ == "vae.likelihoods.DiscretizedLogistic"


@pytest.mark.parametrize(
    "word", ["data.labeled=20", "run=data.labelled", "data.labelled_fraction=1", "likelihood=mine_discretised", "-m"]
)
def test_what_was_never_an_old_name_is_left_as_it_is(word, monkeypatch, recwarn):
    monkeypatch.setattr(sys, "argv", ["vae.train", word])
    rename_old()
    assert sys.argv == ["vae.train", word]
    assert not recwarn.list


def test_a_command_can_be_pasted():
    import shlex

    written = command("vae.evaluate", run="my runs/it's=1,b=$2", split="val")
    assert shlex.split(written) == ["python", "-m", "vae.evaluate", "run=my runs/it's=1,b=$2", "split=val"]


def test_a_requeued_job_goes_on_whatever_it_was_first_asked(monkeypatch):
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert [resuming(value) for value in (False, True, "restart")] == [False, True, "restart"]
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert resuming("restart") == "restart"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert [resuming(value) for value in (False, True, "restart")] == [True, True, True]
    with pytest.raises(VAEError, match="resume=maybe is unknown"):
        resuming("maybe")


def test_absent_data_is_told_in_a_sentence_with_where_and_how(tmp_path):
    done = run(
        "vae.train",
        "data=frey_faces",
        cwd=tmp_path,
        VAE_DATA_DIR=str(tmp_path / "none"),
        http_proxy="http://127.0.0.1:9",
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert str(tmp_path / "none") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_parallel_jobs_give_the_same_metrics_as_one_after_another(tmp_path):
    command = ["-m", *SMALL, "seed=0,1,2,3", "data.binarize=dynamic"]
    for name, launcher in (("one", []), ("many", ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"])):
        done = run("vae.train", *command, *launcher, f"run={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    for folder in sorted(Path(tmp_path / "one").glob("seed=*")):
        one, many = (json.loads((tmp_path / n / folder.name / "metrics.json").read_text()) for n in ("one", "many"))
        assert {k: v for k, v in one.items() if "seconds" not in k} == {
            k: v for k, v in many.items() if "seconds" not in k
        }
        for name in ("one", "many"):
            recorded = json.loads((tmp_path / name / folder.name / "environment.json").read_text())["command"]
            assert recorded.startswith("python -m vae.train -m data.limit=64") and recorded.endswith(f"run={name}")


@pytest.mark.slow
def test_a_run_whose_process_the_system_kills_is_recorded_and_the_others_finish(tmp_path):
    (tmp_path / "killer.py").write_text(
        "import os, signal\nimport pytorch_lightning as pl\n\n\nclass Killer(pl.Callback):\n"
        "    def on_train_start(self, trainer, module):\n"
        "        if module.vae.latent_dim == 3:\n            os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = ["-m", *SMALL, "run=sweep", "model.latent_dim=2,3,4", "+callbacks.killer._target_=killer.Killer"]
    command += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = run("vae.train", *command, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "3 runs: 2 finished, 1 failed" in done.stdout
    assert "Traceback" not in done.stderr
    found = {path.parent.name[-1]: json.loads(path.read_text()) for path in tmp_path.glob("sweep/*/status.json")}
    assert {name: status["state"] for name, status in found.items()} == {
        "2": "finished",
        "3": "failed",
        "4": "finished",
    }
    assert "killed by the operating system" in found["3"]["reason"]


@pytest.mark.slow
def test_runs_killed_at_random_steps_and_resumed_end_bit_identical(tmp_path):
    import random
    import time

    import torch

    settings = [
        "data.batch_size=16",
        "trainer.max_epochs=40",
        "evaluation.nll_samples=5",
        "threads=1",
        "callbacks=minimal",
    ]
    settings += [
        "callbacks.interruptible.every_n_steps=7",
        "data.limit=320",
        "trainer.accelerator=cpu",
        "progress_bar=false",
    ]
    assert run("vae.train", *settings, "run=whole", cwd=tmp_path).returncode == 0
    whole = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    pick, kills = random.Random(0), 0
    for attempt in range(200):
        command = [sys.executable, "-m", "vae.train", *settings, "run=cut", "resume=true"]
        if attempt:  # then the folder holds the config
            command = [*command[:3], "run=cut", "resume=true"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
        before = last.stat().st_mtime_ns if last.is_file() else 0
        while process.poll() is None and not (last.is_file() and last.stat().st_mtime_ns > before):
            time.sleep(0.005)  # until it trains
        time.sleep(pick.random() * 0.1)  # so that it does not end before it is killed often enough
        if kills < 20 and process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        if (tmp_path / "cut" / "metrics.json").is_file():
            break
    cut = json.loads((tmp_path / "cut" / "metrics.json").read_text())
    assert kills == 20
    assert {k: v for k, v in cut.items() if "seconds" not in k} == {
        k: v for k, v in whole.items() if "seconds" not in k
    }
    one, other = (torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True) for n in ("whole", "cut"))
    assert one["global_step"] == other["global_step"] == 800
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name


@pytest.fixture
def small_disk(tmp_path):
    """A disk of a size to be chosen, or a skipped test where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mounted(kilobytes):
        umounted()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(disk)], capture_output=True
        )
        if done.returncode:
            pytest.skip("needs the right to mount a tmpfs")
        return disk

    def umounted():
        if disk.is_mount():
            subprocess.run(["umount", str(disk)], check=True)

    if shutil.which("mount") is None:
        pytest.skip("needs mount")
    yield mounted
    umounted()


@pytest.mark.slow
def test_a_full_disk_is_told_in_a_sentence_and_costs_nothing_once_there_is_space(tmp_path, small_disk):
    settings = ["threads=1", "data.limit=320", "data.batch_size=16", "evaluation.nll_samples=5", "trainer.max_epochs=8"]
    settings += ["trainer.accelerator=cpu", "callbacks.interruptible.every_n_steps=7", "network.hidden=[64]"]

    def metrics(folder):
        found = json.loads((folder / "metrics.json").read_text())
        return {name: value for name, value in found.items() if "seconds" not in name}

    assert run("vae.train", *settings, "run=whole", cwd=tmp_path).returncode == 0
    stopped_at = set()
    for kilobytes in (60, 200, 300, 380, 440):
        disk = small_disk(kilobytes)
        cut = run("vae.train", *settings, f"run={disk}/cut", cwd=tmp_path)
        assert cut.returncode == 1, kilobytes
        assert "There is no space left on the disk to write" in cut.stderr
        assert "Traceback" not in cut.stderr
        assert not list(disk.rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        stopped_at.add(str(sorted(path.name for path in disk.glob("cut/checkpoints/*"))))
        again = run("vae.train", *settings, f"run={disk}/cut", "resume=true", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert metrics(disk / "cut") == metrics(tmp_path / "whole")
    assert len(stopped_at) >= 3, stopped_at  # before the first checkpoint, and with one and both of them there
