"""Searches as a person types them: `python -m vae.train -m hydra/sweeper=optuna ...`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from commands import run
from conftest import composed
from omegaconf import OmegaConf

from vae.engine.callbacks.pruning import Pruning, pruned_already
from vae.engine.run import train
from vae.engine.search import Pruned
from vae.engine.searching import terms_of
from vae.engine.study import Search, Terms
from vae.engine.study_file import STUDY, load_study
from vae.errors import VAEError
from vae.report import read_sweep

optuna = pytest.importorskip("optuna")
from optuna.distributions import FloatDistribution  # noqa: E402

SMALL = ["data.limit=64", "data.batch_size=32", "trainer.max_epochs=1", "evaluation.nll_samples=0", "logger=none"]
SMALL += ["callbacks=minimal", "threads=1", "trainer.accelerator=cpu", "network.hidden=[8]"]
SEARCH = ["-m", "hydra/sweeper=optuna", *SMALL, "run=s"]
SPACE = ["objective.beta=tag(log, interval(0.1,10))", "model.latent_dim=int(interval(2,3))"]


def trials(folder):
    return [(trial.state.name, trial.params, trial.values) for trial in load_study(folder / STUDY).get_trials()]


@pytest.mark.slow
def test_a_search_is_reported_and_not_taken_for_another(tmp_path):
    done = run("vae.train", *SEARCH, *SPACE, "hydra.sweeper.n_trials=2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Search:      2 trials: 2 finished; the best is trial" in done.stdout
    first = trials(tmp_path / "s")
    found = json.loads((tmp_path / "s" / "search.json").read_text())
    for trial, (_, params, values) in zip(found["trials"], first, strict=True):
        metrics = json.loads((tmp_path / "s" / trial["folder"] / "metrics.json").read_text())
        assert values == [metrics["val/best_elbo"]]
        config = OmegaConf.load(tmp_path / "s" / trial["folder"] / "config.yaml")
        assert (config.objective.beta, config.model.latent_dim) == (
            params["objective.beta"],
            params["model.latent_dim"],
        )
    assert found["best"] == [max((0, 1), key=lambda i: first[i][2])]
    page = (tmp_path / "s" / "report" / "index.html").read_text()
    assert 'id="search"' in page and "A search with tpe" in page
    again = [*SEARCH, *SPACE, "hydra.sweeper.n_trials=3", "threads=2", "resume=true"]
    refused = run("vae.train", *again, "optimizer.lr=0.5", cwd=tmp_path)
    assert refused.returncode == 1
    assert "s/study.db is of another search: optimizer.lr is 0.001 there and 0.5 now" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            ["objective.bta=interval(0,1)"],
            "The search space does not fit the config: objective.bta is unknown: did you mean",
        ),
        (
            ["objective.beta=interval(0,1)", "network=choice(mlp,nope)"],
            "does not fit the config: network=nope is unknown: ",
        ),
        ([*SPACE, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0 must be a whole number of at least 1"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_a_sentence_and_leaves_no_study(asked, said, tmp_path):
    done = run("vae.train", *SEARCH, *asked, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.search(said, " ".join(done.stderr.split())), done.stderr
    assert not (tmp_path / "s" / STUDY).exists()


@pytest.mark.parametrize(
    ("asked", "pruner", "said"),
    [
        ("sweep_metric=test/elbo", None, "test/elbo is of the test split, which chooses nothing"),
        (
            "sweep_metric=[val/best_rate,val/best_distortion]",
            None,
            "does not say of each .* to maximize or to minimize",
        ),
        (
            "sweep_metric=[val/best_elbo,val/best_loss]",
            "median",
            "pruner=median needs one sweep_metric, and there are 2",
        ),
        ("sweep_metric=train/loss", "hyperband", "looks at validations, and sweep_metric=train/loss is not of them"),
    ],
)
def test_metrics_that_a_search_cannot_use_are_told(asked, pruner, said):
    known = ["sweep_direction=minimize"] if "train" in asked else []
    with pytest.raises(VAEError, match=said):
        terms_of(composed(asked, *known), {}, "tpe", {}, 0, pruner, {})


def test_the_default_is_the_elbo_at_beta_1_of_the_tested_weights_and_a_pruner_sees_it_at_each_validation():
    found = terms_of(composed("trainer.max_epochs=7"), {}, "tpe", {}, 0, "hyperband", {})
    assert (found.metrics, found.directions, found.pruned_by) == (["val/best_elbo"], ["maximize"], "val/elbo")
    assert found.epochs == 7
    assert not {"run", "resume"} & set(found.config) and found.config["trainer.max_epochs"] == 7
    searched = terms_of(composed(), {"trainer.max_epochs": None}, "tpe", {}, 0, None, {})
    assert searched.epochs is None


def test_without_optuna_the_command_says_what_to_install(tmp_path):
    (tmp_path / "optuna.py").write_text("raise ImportError('as if it were not there')\n")
    done = run("vae.train", *SEARCH, *SPACE, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == "Error: hydra/sweeper=optuna needs Optuna: pip install 'vae[search]'."


def pruned_search(folder, **others):
    """A search whose trial 0 was good after the first epoch; trials 1 and 2 are to run."""
    space = {"objective.beta": FloatDistribution(0.5, 1.5)}
    options = {"pruner": "median", "pruner_options": {"n_startup_trials": 1}, "pruned_by": "val/elbo", "epochs": 2}
    search = Search(folder, Terms(space, ["val/best_elbo"], ["maximize"], sampler="random", **{**options, **others}))
    search.next_batch(1, 3)
    good = optuna.trial.Trial(search.study, search.trials()[0]._trial_id)
    good.report(100.0, 1)
    good.report(100.0, 2)
    search.tell(0, 100.0)
    return search


def test_a_hopeless_run_is_pruned_says_so_and_what_it_told_is_not_told_again(tiny, tmp_path):
    search = pruned_search(tmp_path)
    [trial] = search.next_batch(1, 3)
    config, folder = tiny("trainer.max_epochs=2", "callbacks=default", "logger=none"), tmp_path / trial.folder
    with pytest.raises(Pruned, match=r"Pruned after epoch 1, at which val/elbo was -\d"):
        train(config, folder, [], progress_bar=False, callbacks=[Pruning(tmp_path / STUDY, trial.number)])
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "pruned" and status["reason"].startswith("Pruned after epoch 1, at which val/elbo")
    assert pruned_already(OmegaConf.create({"sweeper": {"trial": 1}}), status)
    assert not pruned_already(OmegaConf.create({"sweeper": {}}), status)
    told = search.trials()[1].intermediate_values
    assert list(told) == [1]
    assert search.tell(1, None) == "pruned"
    assert search.trials()[1].value == told[1]
    search.close()
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    again = train(config, folder, [], resume=True, progress_bar=False)  # by hand, to its end
    assert again["val/best_elbo"] >= told[1]

    run_of_it = read_sweep(tmp_path)
    assert run_of_it.complete


@pytest.mark.slow
def test_without_a_reason_no_run_is_pruned_and_it_ends_as_one_outside_a_search(tiny, tmp_path):
    search = pruned_search(tmp_path / "study", pruner_options={"n_startup_trials": 2})
    [trial] = search.next_batch(1, 3)
    config = tiny("trainer.max_epochs=2", "callbacks=default", "logger=none")
    inside = train(config, tmp_path / "inside", [], False, False, [Pruning(tmp_path / "study" / STUDY, trial.number)])
    outside = train(config, tmp_path / "outside", [], False, False)
    assert {k: v for k, v in inside.items() if "seconds" not in k} == {
        k: v for k, v in outside.items() if "seconds" not in k
    }
    told = search.trials()[1].intermediate_values
    assert list(told) == [1, 2] and max(told.values()) == inside["val/best_elbo"]
    search.close()


def test_a_run_that_is_at_its_end_is_not_pruned_however_hopeless(tiny, tmp_path):
    search = pruned_search(tmp_path / "study")
    [trial] = search.next_batch(1, 3)
    pruning = Pruning(tmp_path / "study" / STUDY, trial.number)
    metrics = train(tiny("trainer.max_epochs=1", "logger=none"), tmp_path / "run", [], False, False, [pruning])
    assert search.trials()[1].intermediate_values == {1: metrics["val/elbo"]}
    search.close()


def test_a_metric_that_no_validation_measures_is_told(tiny, tmp_path):
    search = pruned_search(tmp_path / "study", pruned_by="val/eblo")
    [trial] = search.next_batch(1, 3)
    with pytest.raises(VAEError, match=r"val/eblo is not measured by validations: choose one of .*val/elbo"):
        train(
            tiny("logger=none"), tmp_path / "run", [], False, False, [Pruning(tmp_path / "study" / STUDY, trial.number)]
        )
    search.close()


def started(tmp_path, name, *asked):
    command = [sys.executable, "-m", "vae.train", *SEARCH[:-1], f"run={name}", "resume=true", *SPACE, *asked]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_a_search_killed_in_the_middle_of_a_run_goes_on_in_its_folder_as_one_never_stopped(tmp_path):
    asked = ["hydra.sweeper.n_trials=4", "trainer.max_epochs=30", "callbacks.interruptible.every_n_steps=5"]
    asked += ["hydra.sweeper.pruner=median", "hydra.sweeper.pruner_options={n_startup_trials:1}"]
    whole = started(tmp_path, "whole", *asked)
    assert whole.wait(300) == 0, whole.stdout.read().decode()
    for _ in range(3):
        cut = started(tmp_path, "cut", *asked)
        number = len(list(tmp_path.glob("cut/*/status.json")))
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and cut.poll() is None:
            running = list(tmp_path.glob("cut/*/checkpoints/last.ckpt"))
            if len(running) > max(number - 1, 0):
                break
            time.sleep(0.02)
        os.kill(cut.pid, signal.SIGKILL)
        cut.wait()
    cut = started(tmp_path, "cut", *asked)
    assert cut.wait(300) == 0, cut.stdout.read().decode()
    assert trials(tmp_path / "cut") == trials(tmp_path / "whole")
    assert {path.parent.name for path in tmp_path.glob("cut/*/status.json")} == {
        path.parent.name for path in tmp_path.glob("whole/*/status.json")
    }


@pytest.mark.slow
def test_a_search_goes_on_for_longer_and_trains_nothing_again(tmp_path):
    for n_trials, others in ((2, []), (3, ["threads=2", "resume=true"])):
        done = run("vae.train", *SEARCH, *SPACE, f"hydra.sweeper.n_trials={n_trials}", *others, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("finished model.latent_dim") == (2 if n_trials == 2 else 1)
        assert len(trials(tmp_path / "s")) == n_trials
        if n_trials == 2:
            first = trials(tmp_path / "s")
    assert trials(tmp_path / "s")[:2] == first


@pytest.mark.slow
def test_the_same_command_started_twice_shares_the_trials(tmp_path):
    both = [started(tmp_path, "s", "hydra.sweeper.n_trials=6", "hydra.sweeper.sampler=random") for _ in range(2)]
    for process in both:
        output = process.communicate(timeout=300)[0].decode()
        assert process.returncode == 0, output
    found = trials(tmp_path / "s")
    assert [state for state, _, _ in found] == ["COMPLETE"] * 6
    assert len({str(params) for _, params, _ in found}) == 6
    summary = json.loads((tmp_path / "s" / "search.json").read_text())
    workers = {trial.user_attrs["worker"] for trial in load_study(tmp_path / "s" / STUDY).get_trials()}
    assert len(workers) == 2
    assert [trial["state"] for trial in summary["trials"]] == ["finished"] * 6


@pytest.mark.slow
def test_jobs_side_by_side_are_proposed_in_batches_and_one_that_fails_is_a_failed_trial(tmp_path):
    asked = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_trials=4"]
    asked += ["model.latent_dim=choice(2,-1)", "hydra.sweeper.sampler=random"]
    done = run("vae.train", *SEARCH, SPACE[0], *asked, cwd=tmp_path)
    found = trials(tmp_path / "s")
    assert [state for state, _, _ in found] == [
        "FAIL" if params["model.latent_dim"] == "-1" else "COMPLETE" for _, params, _ in found
    ]
    assert {state for state, _, _ in found} == {"FAIL", "COMPLETE"}
    assert done.returncode == 1
    assert "Launching" in done.stdout and done.stdout.count("is launching 2 jobs") == 2
