"""What a protocol is written with: a grid of runs, pieces that are measured once, and the course of a run."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest

from vae.experiment import Context, logged


def name_of(folder: Path) -> str:
    return folder.name


@pytest.fixture
def trained(monkeypatch):
    """What was asked to be trained, by name; nothing is."""
    runs: dict[str, list[str]] = {}

    def train_many(context, asked):
        runs.update(asked)
        return {name: context.folder / name for name in asked}

    monkeypatch.setattr(Context, "train_many", train_many)
    return runs


def test_a_grid_trains_each_cell_with_each_seed_and_gathers_what_was_measured(trained, tmp_path):
    context = Context(quick=False, folder=tmp_path, name="iwae")
    folders = context.train_grid({"free bits": ["objective=free_bits"], "plain": []}, [0, 3])
    assert trained == {
        "free_bits,seed=0": ["experiment=iwae", "objective=free_bits", "seed=0"],
        "free_bits,seed=3": ["experiment=iwae", "objective=free_bits", "seed=3"],
        "plain,seed=0": ["experiment=iwae", "seed=0"],
        "plain,seed=3": ["experiment=iwae", "seed=3"],
    }
    found = context.measure_grid({run: functools.partial(name_of, folder) for run, folder in folders.items()}, "what")
    assert found == {"free bits": ["free_bits,seed=0", "free_bits,seed=3"], "plain": ["plain,seed=0", "plain,seed=3"]}
    assert context.measured("what,free_bits,seed=3")


def test_the_quick_form_has_a_config_of_its_own_where_there_is_one(tmp_path):
    made = {(n, quick): Context(quick, tmp_path, name=n).config for n in ("iwae", "rate_control") for quick in (0, 1)}
    assert made["iwae", 0] == made["iwae", 1] == "experiment=iwae"
    assert (made["rate_control", 0], made["rate_control", 1]) == (
        "experiment=rate_control",
        "experiment=rate_control_quick",
    )


def test_pieces_measured_side_by_side_are_those_of_one_after_another(tmp_path):
    measures = {f"root-{n}": functools.partial(math.sqrt, n) for n in (9, 4)}
    alone = Context(quick=True, folder=tmp_path / "alone", jobs=1).cached_many(measures)
    said: list[str] = []
    context = Context(quick=True, folder=tmp_path / "two", jobs=2, say=said.append)
    assert list(context.cached_many(measures).items()) == list(alone.items()) == [("root-9", 3.0), ("root-4", 2.0)]
    assert context.cached_many(measures) == {name: context.cached(name, pytest.fail) for name in measures} == alone
    assert len(said) == 2


def test_the_course_of_a_run_has_the_steps_at_which_all_keys_were_logged(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train/rate,val/elbo,val/rate\n0,49,5.0,,\n0,549,,-13.5,1.25\n1,1099,4.0,-13.0,1.5\n1,1099,4.0,,\n"
    )
    assert logged(tmp_path, "val/rate", "val/elbo") == {
        "step": [549, 1099],
        "val/rate": [1.25, 1.5],
        "val/elbo": [-13.5, -13.0],
    }
    assert logged(tmp_path, "train/rate", "val/rate") == {"step": [1099], "train/rate": [4.0], "val/rate": [1.5]}
    assert logged(tmp_path, "train/beta") == {"step": [], "train/beta": []}


def test_tensorboards_events_are_read_where_there_is_no_csv(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step, value in ((9, 1.5), (19, 2.5), (19, 2.5)):  # cut off, and logged again
            writer.add_scalar("val/elbo", value, step)
        writer.add_scalar("train/elbo", 0.5, 19)
    assert logged(tmp_path, "val/elbo") == {"step": [9, 19], "val/elbo": [1.5, 2.5]}
    assert logged(tmp_path, "val/elbo", "train/elbo") == {"step": [19], "val/elbo": [2.5], "train/elbo": [0.5]}
    assert logged(tmp_path, "train/beta") == {"step": [], "train/beta": []}
