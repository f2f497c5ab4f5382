"""A search's study: proposals that follow from the seed alone, whoever is killed and whenever; and whose file is whose."""

from __future__ import annotations

import math
import os
import re
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import composed

from vae.engine.searching import _may_differ, terms_of
from vae.engine.study import Search, Terms, differing, summary_of
from vae.engine.study_file import NAME, STUDY, check_file, load_study, require_optuna
from vae.errors import VAEError

optuna = pytest.importorskip("optuna")
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # noqa: E402

from vae.engine.samplers import make_pruner, make_sampler  # noqa: E402

SPACE = {"c": CategoricalDistribution(["a", "b"]), "n": IntDistribution(1, 9), "x": FloatDistribution(-2.0, 2.0)}


def terms(**others):
    return Terms(**{"space": SPACE, "metrics": ["val/loss"], "directions": ["minimize"], "seed": 3, **others})


def bowl(parameters):
    """Least, 0, at x = 0.5, whatever n and c."""
    return (parameters["x"] - 0.5) ** 2


def searched(folder, agreed, n_trials, most=1, job=bowl):
    """The parameters of all trials, in order, after this process did what was left."""
    search = Search(folder, agreed)
    try:
        while batch := search.next_batch(most, n_trials):
            for trial in batch:
                search.tell(trial.number, job(trial.parameters))
        return [trial.params for trial in search.trials()]
    finally:
        search.close()


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where there is such a folder: a study syncs the disk a dozen times per trial."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_tpe_finds_the_minimum_where_it_is_told_to_minimize_and_the_maximum_elsewhere():
    for direction, good in (("minimize", lambda x: bowl({"x": x}) < 0.25), ("maximize", lambda x: x < -1.0)):
        study = optuna.create_study(direction=direction, sampler=make_sampler("tpe", {}, 0, SPACE, [direction]))
        for _ in range(40):
            trial = study.ask(SPACE)
            study.tell(trial, bowl(trial.params))
        found = [trial.params["x"] for trial in study.trials]
        assert min(abs(x - (0.5 if direction == "minimize" else -2.0)) for x in found) < 0.05
        assert sum(map(good, found[10:])) >= 12  # of 30; by chance it would be 7.5


class Killed(BaseException):
    """Nothing of the process is left to clean up after it."""


WRITES = (
    "create_new_trial",
    "set_trial_param",
    "set_trial_state_values",
    "set_trial_user_attr",
    "set_trial_system_attr",
)


def killed_at(write, folder, agreed, n_trials, most):
    """A search whose process dies before write number `write` to the study; False where it ended before."""
    left, search = [write], Search(folder, agreed)
    storage = search.study._storage

    def counting(original):
        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*args, **kwargs)

        return counted

    for name in WRITES:
        setattr(storage, name, counting(getattr(storage, name)))
    try:
        while batch := search.next_batch(most, n_trials):
            for trial, value in [(trial, bowl(trial.parameters)) for trial in batch]:
                search.tell(trial.number, value)
    except Killed:
        search._alive.release()  # as the system does
        return True
    search.close()
    return False


@pytest.mark.parametrize(
    ("sampler", "most", "apart"),
    [
        ("tpe", 1, 4),
        pytest.param("tpe", 1, 1, marks=pytest.mark.slow),
        pytest.param("tpe", 3, 2, marks=pytest.mark.slow),
        pytest.param("nsga2", 2, 2, marks=pytest.mark.slow),
        pytest.param("qmc", 2, 3, marks=pytest.mark.slow),
    ],
)
def test_a_search_killed_before_any_write_and_resumed_proposes_what_one_does_that_was_not(
    sampler, most, apart, tmp_path
):
    options = {"tpe": {"n_startup_trials": 2}, "nsga2": {"population_size": 2}}.get(sampler, {})
    agreed = terms(sampler=sampler, sampler_options=options)
    begun = tmp_path / "begun"
    searched(begun, agreed, 2 * most)  # so that samplers that learn have learnt
    shutil.copytree(begun, tmp_path / "whole")
    n_trials = 3 * most
    whole = searched(tmp_path / "whole", agreed, n_trials, most)
    for write in range(0, 500, apart):
        folder = tmp_path / f"killed_{write}"
        shutil.copytree(begun, folder)
        if not killed_at(write, folder, agreed, n_trials, most):
            break
        assert searched(folder, agreed, n_trials, most) == whole, f"killed before write {write}"
        states = [trial.state.name for trial in load_study(folder / STUDY).get_trials(deepcopy=False)]
        assert states == ["COMPLETE"] * n_trials
    assert write >= 7 * most  # each trial's creation, three parameters, whose and where, its result


@pytest.mark.slow
def test_a_batch_that_a_kill_cut_short_is_proposed_to_its_end_before_any_of_it_is_told(tmp_path):
    assert killed_at(8, tmp_path, terms(), 6, 3)  # in the second of three
    search = Search(tmp_path, terms())
    assert [trial.number for trial in search.next_batch(3, 6)] == [0, 1, 2]
    assert [trial.number for trial in search.next_batch(3, 6)] == [3, 4, 5]
    assert search.next_batch(3, 6) == []
    search.close()


@pytest.mark.parametrize(("pruner", "epochs"), [("median", {1}), ("hyperband", {1, 3, 9})])
def test_what_is_pruned_is_worse_than_what_is_not(pruner, epochs):
    """Trials whose values are 0 to 9 in turn, the same in each of nine epochs: Hyperband has a bracket for 1, 3 and 9."""
    study = optuna.create_study(study_name=NAME, pruner=make_pruner(pruner, {}, 9))
    for number in range(40):
        trial, value = study.ask(), float(7 * number % 10)
        for epoch in range(1, 10):
            trial.report(value, epoch)
            if trial.should_prune():
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, value)
    pruned, kept = ([t.value for t in study.trials if t.state.name == state] for state in ("PRUNED", "COMPLETE"))
    assert len(pruned) >= 12
    assert {trial.last_step for trial in study.trials if trial.state.name == "PRUNED"} == epochs
    assert sum(pruned) / len(pruned) > sum(kept) / len(kept) + 2
    assert kept.count(0.0) == 4


def test_two_processes_never_have_one_trial_and_what_one_leaves_the_other_takes_over(tmp_path):
    one, two = Search(tmp_path, terms()), Search(tmp_path, terms())
    mine, yours = one.next_batch(2, 5), two.next_batch(2, 5)
    assert [trial.number for trial in mine + yours] == [0, 1, 2, 3]
    assert [trial.number for trial in one.next_batch(2, 5)] == [4]
    assert two.next_batch(2, 5) == []  # what there is, the other has
    one._alive.release()  # as when its process is killed
    left = two.next_batch(2, 5)
    assert [trial.number for trial in left] == [0, 1]
    assert [trial.parameters for trial in left] == [trial.parameters for trial in mine]
    for trial in (*left, *yours):
        two.tell(trial.number, bowl(trial.parameters))
    assert [trial.number for trial in two.next_batch(2, 5)] == [4]
    two.tell(4, 0.0)
    assert two.next_batch(2, 5) == []
    two.close()
    assert not list(tmp_path.glob(".worker-*"))


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 2)])
def test_a_search_goes_on_with_another_number_of_jobs_and_no_trial_is_left_or_run_twice(before, after, tmp_path):
    agreed = terms(sampler="random")
    assert killed_at(15, tmp_path, agreed, 7, before)
    ran = []
    done = [trial.number for trial in load_study(tmp_path / STUDY).trials if trial.state.name == "COMPLETE"]
    found = searched(tmp_path, agreed, 7, after, job=lambda parameters: ran.append(parameters) or bowl(parameters))
    assert found == proposed("random", 7)
    assert len(ran) == 7 - len(done)


def proposed(sampler, n, space=SPACE, seed=3):
    """The first n proposals of a study in memory, all trials being equally good."""
    study = optuna.create_study(sampler=make_sampler(sampler, {}, seed, space, ["minimize"]))
    for _ in range(n):
        study.tell(study.ask(space), 1.0)
    return [trial.params for trial in study.trials]


@pytest.mark.parametrize("sampler", ["tpe", "random", "qmc", "nsga2"])
def test_a_seed_proposes_the_same_and_another_otherwise_and_no_two_trials_are_alike(sampler):
    once = proposed(sampler, 14)
    assert proposed(sampler, 14) == once
    assert len({parameters["x"] for parameters in once}) == 14
    assert not {p["x"] for p in proposed(sampler, 14, seed=4)} & {p["x"] for p in once}


def test_quasi_random_trials_have_one_value_in_each_sixteenth_of_the_space():
    space = {"x": FloatDistribution(0.0, 1.0), "y": FloatDistribution(1e-4, 1.0, log=True)}
    found = proposed("qmc", 16, space)
    for units in ([p["x"] for p in found], [1 + math.log10(p["y"]) / 4 for p in found]):
        ordered = sorted(units)
        gaps = [b - a for a, b in zip(ordered, [*ordered[1:], ordered[0] + 1], strict=True)]
        assert gaps == pytest.approx([1 / 16] * 16)


def test_failed_and_pruned_trials_are_recorded_as_such_and_the_others_do_not_notice(tmp_path):
    outcomes = iter([1.0, math.nan, None, math.inf, 0.5])
    found = searched(tmp_path, terms(sampler="random"), 5, job=lambda parameters: next(outcomes))
    summary = summary_of(load_study(tmp_path / STUDY), terms(sampler="random"), False)
    states = [trial["state"] for trial in summary["trials"]]
    assert states == ["finished", "failed", "pruned", "failed", "finished"]
    assert [trial["values"] for trial in summary["trials"]] == [[1.0], None, None, None, [0.5]]
    assert summary["best"] == [4]
    assert found == proposed("random", 5)


def test_the_front_of_two_metrics_is_the_trials_that_no_other_betters_in_both():
    both = terms(metrics=["val/rate", "val/distortion"], directions=["minimize", "maximize"])
    study = optuna.create_study(directions=both.directions)
    for values in [(1.0, 1.0), (2.0, 3.0), (3.0, 2.0), (4.0, 4.0), (4.0, 3.5), (0.5, 0.0)]:
        study.tell(study.ask(SPACE), values)
    assert summary_of(study, both, False)["best"] == [0, 1, 3, 5]


def drawn(trial):
    return {
        "c": trial.suggest_categorical("c", ["a", "b"]),
        "n": trial.suggest_int("n", 1, 9),
        "x": trial.suggest_float("x", -2.0, 2.0),
    }


def test_what_matters_is_the_setting_that_the_metric_follows():
    both = terms(metrics=["val/rate", "val/distortion"], directions=["minimize", "minimize"], sampler="random")
    study = optuna.create_study(
        directions=both.directions, sampler=make_sampler("random", {}, 0, SPACE, both.directions)
    )
    study.optimize(lambda trial: (10 * bowl(p := drawn(trial)), 3.0 * p["n"] + (p["c"] == "a")), n_trials=30)
    shares = summary_of(study, both)["importance"]
    assert shares["val/rate"]["x"] > 0.8
    assert shares["val/distortion"]["n"] > 0.9
    assert all(sum(share.values()) == pytest.approx(1) for share in shares.values())


def test_a_constant_or_a_short_search_has_no_importances():
    for n, value in ((3, bowl), (5, lambda parameters: 1.0)):
        study = optuna.create_study()
        study.optimize(lambda trial, value=value: value(drawn(trial)), n_trials=n)
        assert summary_of(study, terms())["importance"] == {"val/loss": {}}


def test_any_folder_will_do(tmp_path):
    folder = tmp_path / "a b?c#d%e&f'g"
    assert len(searched(folder, terms(), 1)) == 1
    assert len(searched(folder, terms(), 2)) == 2
    assert (folder / STUDY).is_file()


OTHERS = [
    ({"space": {**SPACE, "x": FloatDistribution(-2.0, 3.0)}}, r"x is Float\(.*high=2.0\) there and .*high=3.0"),
    ({"space": {"x": SPACE["x"]}}, r"c is Categorical\(choices=\['a', 'b'\]\) there and not searched over now"),
    ({"metrics": ["val/elbo"]}, "sweep_metric is val/loss there and val/elbo now"),
    ({"directions": ["maximize"]}, "sweep_direction is minimize there and maximize now"),
    ({"sampler": "random"}, "hydra.sweeper.sampler is tpe there and random now"),
    ({"seed": 4}, "hydra.sweeper.seed is 3 there and 4 now"),
    ({"pruner": "median"}, "hydra.sweeper.pruner is null there and median now"),
    ({"config": {"data.batch_size": 64, "threads": 1}}, "data.batch_size is 32 there and 64 now"),
    ({"config": {"threads": 1}}, "data.batch_size is 32 there and null now"),
    ({"config": {"data.batch_size": 32, "threads": 2}}, "threads is 1 there and 2 now"),
]


def test_a_study_of_another_search_is_left_as_it_is(tmp_path):
    config = {"config": {"data.batch_size": 32, "threads": 1}}
    before = searched(tmp_path, terms(**config), 1)
    there = terms(**config).stored()
    assert differing(there, terms(**config).stored()) is None
    for other, said in OTHERS:
        assert re.fullmatch(said + ".*", differing(there, terms(**{**config, **other}).stored())), said
    with pytest.raises(
        VAEError, match=r"study\.db is of another search: sweep_metric is val/loss there and val/elbo now"
    ):
        Search(tmp_path, terms(**{**config, "metrics": ["val/elbo"]}))
    search = Search(tmp_path, terms(**OTHERS[-1][0]), may_differ=lambda: lambda key, *_: key == "threads")
    assert [trial.params for trial in search.trials()] == before
    search.close()


def test_a_study_goes_on_where_a_newer_version_added_a_setting_at_its_default(tmp_path):
    now = terms_of(composed(), {}, "tpe", {}, 0, None, {}).config
    added = ("optimizer.betas", "trainer.gradient_clip_val", "trainer.check_val_every_n_epoch", "compile")
    earlier = {key: value for key, value in now.items() if key not in added}
    searched(tmp_path, terms(config=earlier), 1)
    for other, said in (
        ({}, None),
        ({"optimizer.betas": [0.5, 0.9]}, "optimizer.betas is null there"),
        ({"trainer.check_val_every_n_epoch": 2}, "trainer.check_val_every_n_epoch is null there and 2 now"),
        ({"compile": True}, None),  # which is taken over
        ({"model.unknown": 1}, "model.unknown is null there and 1 now"),
        ({"callbacks.ema.decay": 0.999}, "callbacks.ema.decay is null there"),  # an option was not added to it
        ({"lr_schedule._target_": "vae.engine.lr_schedule.Cosine"}, "lr_schedule._target_ is null there"),
    ):
        agreed = terms(config={**now, **other})
        if said is None:
            Search(tmp_path, agreed, may_differ=_may_differ).close()
        else:
            with pytest.raises(VAEError, match=re.escape(said)):
                Search(tmp_path, agreed, may_differ=_may_differ)


def test_a_file_that_is_no_study_is_told_and_left(tmp_path):
    path = tmp_path / STUDY
    for content, said in (
        (b"", "no study of Optuna's"),
        (b"not a database, but a text. " * 50, "file is not a database"),
    ):
        path.write_bytes(content)
        with pytest.raises(VAEError, match=said):
            Search(tmp_path, terms())
        assert path.read_bytes() == content
    path.unlink()
    with sqlite3.connect(path) as file:
        file.execute("CREATE TABLE letters (a)")
    with pytest.raises(VAEError, match="no study of Optuna's"):
        check_file(path)
    path.unlink()
    optuna.create_study(study_name="mine", storage=f"sqlite:///{path}")
    with pytest.raises(VAEError, match="of no search of this project"):
        Search(tmp_path, terms())
    path.unlink()
    optuna.create_study(study_name=NAME, storage=f"sqlite:///{path}")
    with pytest.raises(VAEError, match=r"another search: c is not searched over there"):
        Search(tmp_path, terms())


def test_a_study_of_a_newer_optuna_is_told_with_both_versions(tmp_path):
    searched(tmp_path, terms(), 1)
    with sqlite3.connect(tmp_path / STUDY) as file:
        file.execute("UPDATE alembic_version SET version_num = 'v9.0.0.a'")
        file.execute("UPDATE version_info SET library_version = '9.0.0'")
    with pytest.raises(VAEError, match=rf"was written by Optuna 9\.0\.0, whose tables Optuna {optuna.__version__}"):
        Search(tmp_path, terms())


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"sampler": "cmaes"}, "hydra.sweeper.sampler=cmaes is unknown: choose one of tpe, random, qmc, nsga2"),
        ({"pruner": "wilcoxon"}, "hydra.sweeper.pruner=wilcoxon is unknown: choose one of null, median, hyperband"),
        ({"sampler_options": {"population": 3}}, "hydra.sweeper.sampler_options=.*population.* not of sampler=tpe"),
        ({"sampler": "nsga2", "sampler_options": {"population_size": 1}}, "population_size.* greater"),
        ({"sampler": "qmc", "sampler_options": {"scramble": True}}, "sampler_options=.*not of sampler=qmc"),
        ({"pruner": "median", "pruner_options": {"n_warm": 1}}, "pruner_options=.*not of pruner=median"),
        ({"pruner_options": {"n_warmup_steps": 1}}, "pruner_options=.*not of pruner=null"),
    ],
)
def test_an_unknown_sampler_pruner_or_option_is_told_before_anything_is_written(bad, said, tmp_path):
    with pytest.raises(VAEError, match=said):
        Search(tmp_path / "new", terms(**bad))
    assert not (tmp_path / "new").exists()


def test_without_optuna_a_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(VAEError, match=r"hydra/sweeper=optuna needs Optuna: pip install 'vae\[search\]'"):
        require_optuna()
