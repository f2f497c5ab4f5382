"""Folders of runs that were not started as one sweep: which option of each group each run was trained with, and what the
report says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from vae.cli import CONFIGS
from vae.report import print_table, read_sweep
from vae.report.choices import group_of, option, options

GROUPS = ("data", "network", "likelihood", "prior", "posterior", "objective", "objective/schedule", "regularizer")
GROUPS += ("optimizer", "lr_schedule", "callbacks", "logger")


def make_run(folder: Path, overrides: list[str], **groups: Any) -> None:
    """A finished run on digits by the default objective, with these groups instead of or beside what it has."""
    folder.mkdir(parents=True)
    objective = {"_target_": "vae.objectives.elbo.BetaVAE", "beta": 1.0}
    config = {"data": loaded("data", "digits"), "objective": objective, "seed": 0, **groups}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "seconds": 30.0}))
    numbers = {"elbo": -100.0, "rate": 20.0, "distortion": 80.0, "nll_iw500": 98.0, "active_units": 7.0}
    (folder / "metrics.json").write_text(json.dumps({f"test/{name}": value for name, value in numbers.items()}))


def loaded(group: str, name: str) -> dict:
    return yaml.safe_load(Path(CONFIGS, group, f"{name}.yaml").read_text()) or {}


@pytest.mark.parametrize("group", GROUPS)
def test_an_option_is_told_by_what_it_sets_alone(group):
    held = {name: flat or {group: None} for name, flat in options(group).items()}
    assert len(held) > 1
    assert {name: option(flat, group, exactly=True) for name, flat in held.items()} == {name: name for name in held}
    assert option({"seed": 0}, group) is None


def test_an_option_is_told_though_a_setting_of_it_was_changed_and_a_class_of_ones_own_is_none():
    burda = {"network._target_": "vae.networks.mlp", "network.activation": "tanh", "network.init": "glorot_uniform"}
    assert option({**burda, "network.hidden": [7]}, "network") == "burda"
    assert option({**burda, "network.hidden": [7]}, "network", exactly=True) is None
    assert option({"objective._target_": "vae.objectives.BetaVAE", "objective.beta": 4}, "objective") == "beta_vae"
    assert option({"objective._target_": "mine.BetaVAE", "objective.beta": 1.0}, "objective") is None
    assert option({"posterior._target_": "mine.Posterior"}, "posterior") is None  # and not diagonal, which sets nothing


def test_the_group_of_a_class_is_the_innermost_folder_of_configs_around_it():
    assert [group_of(f"{key}._target_") for key in ("objective", "objective.schedule", "data.source", "mine")] == [
        "objective", "objective/schedule", "data", None,
    ]  # fmt: skip
    assert group_of("objective.beta") is None


def mixed(folder: Path, **more: str) -> None:
    """A default run, and others that each depart from it in one thing, as single commands make them."""
    common = {"network": loaded("network", "mlp"), "prior": loaded("prior", "standard_normal"), "posterior": {}}
    common |= {"evaluation": {"nll_samples": 500}, "trainer": {"max_epochs": 20}}
    codes = {"posterior": loaded("posterior", "fsq"), "prior": loaded("prior", "codes_categorical")}
    iwae = {"objective": {**loaded("objective", "iwae"), "beta": 1.0}}
    for name, typed, settings in (
        ("plain", [], {}),
        ("codes", ["posterior=fsq"], codes),
        ("nll", ["evaluation.nll_samples=10"], {"evaluation": {"nll_samples": 10}}),
        ("short", ["trainer.max_epochs=3"], {"trainer": {"max_epochs": 3}}),
        ("iwae", ["objective=iwae"], iwae),
    ):
        make_run(folder / name, typed, **{**common, **settings})


def test_a_folder_of_mixed_runs_names_options_as_they_are_typed_and_how_runs_were_measured_is_no_axis(tmp_path):
    mixed(tmp_path)
    sweep = read_sweep(tmp_path)
    assert sweep.swept == ("objective", "posterior", "trainer.max_epochs")
    assert {run.name: tuple(run.settings.values()) for run in sweep.runs} == {
        "plain": ("beta_vae", "diagonal", 20),
        "codes": ("beta_vae", "fsq", 20),
        "nll": ("beta_vae", "diagonal", 20),
        "short": ("beta_vae", "diagonal", 3),
        "iwae": ("iwae", "diagonal", 20),
    }
    assert sweep.in_step["prior"] == sweep.in_step["prior._target_"] == "posterior"


def test_options_that_no_command_line_named_are_named_all_the_same(tmp_path):
    for name in ("fsq", "vq", "diagonal"):
        make_run(tmp_path / name, [], posterior=loaded("posterior", name))
    make_run(tmp_path / "mine", [], posterior={"_target_": "mine.Posterior"})
    sweep = read_sweep(tmp_path)
    assert sweep.swept == ("posterior",)
    assert [sweep.describe(run) for run in sweep.runs] == [
        "posterior Posterior", "posterior diagonal", "posterior fsq", "posterior vq",
    ]  # fmt: skip


def test_what_a_run_holds_says_more_than_the_name_that_another_has_for_the_same_class(tmp_path):
    iwae = {**loaded("objective", "iwae"), **loaded("objective", "sticking_the_landing")}
    make_run(tmp_path / "a", ["objective=sticking_the_landing"], objective=iwae)
    make_run(tmp_path / "b", [], objective=loaded("objective", "iwae"))
    assert [run.settings["objective"] for run in read_sweep(tmp_path).runs] == ["iwae", "sticking_the_landing"]


def test_how_runs_were_measured_is_an_axis_of_a_sweep_over_it(tmp_path):
    for n in (5, 10):
        make_run(tmp_path / str(n), [f"evaluation.nll_samples={n}"], evaluation={"nll_samples": n})
    assert read_sweep(tmp_path).swept == ("evaluation.nll_samples",)


def printed(folder: Path, width: int) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(read_sweep(folder), console)
    return [line.rstrip() for line in console.export_text().splitlines()]


def first_column(folder: Path, width: int) -> str:
    """The words of a table's first column below its header, which is at the left and may be folded into lines."""
    lines = printed(folder, width)
    end = lines.index("", 3)
    return " ".join(" ".join(line.strip().split("  ")[0] for line in lines[3:end]).split())


def test_a_table_that_is_too_wide_has_the_settings_that_set_each_run_apart_in_one_column(tmp_path):
    mixed(tmp_path)
    wide, narrow = printed(tmp_path, 120), printed(tmp_path, 46)
    assert wide[1].split()[:3] == ["objective", "posterior", "max_epochs"]
    assert narrow[1].split() == ["settings", "ELBO", "NLL,", "K=500"]
    assert first_column(tmp_path, 46) == "max_epochs 3 nll plain posterior fsq objective iwae"
    assert not any("…" in line for line in narrow) and all(len(line) <= 46 for line in narrow[:8])
    assert "Only settings that most of the runs do not share are shown." in narrow


def test_of_a_sweep_every_setting_is_shown_however_narrow_the_terminal(tmp_path):
    for size, batch in ((2, 64), (2, 128), (16, 64)):
        typed = [f"model.latent_dim={size}", f"data.batch_size={batch}"]
        make_run(tmp_path / f"{size}-{batch}", typed, model={"latent_dim": size}, data={"batch_size": batch})
    (tmp_path / "multirun.yaml").write_text("{}")
    assert first_column(tmp_path, 50) == (
        "latent_dim 2, batch_size 64 latent_dim 2, batch_size 128 latent_dim 16, batch_size 64"
    )
    (tmp_path / "multirun.yaml").unlink()
    assert first_column(tmp_path, 50) == "2-64 batch_size 128 latent_dim 16"


def test_likelihoods_that_do_not_compare_are_told_apart_by_the_names_of_their_options(tmp_path):
    for name in ("bernoulli", "discretized_logistic", "gaussian"):
        make_run(tmp_path / name, [f"likelihood={name}"], likelihood=loaded("likelihood", name))
    make_run(tmp_path / "old", [], likelihood={"_target_": "vae.likelihoods.DiscretisedLogistic"})
    assert {run.name: run.data for run in read_sweep(tmp_path).runs} == {
        "bernoulli": "digits, likelihood bernoulli",
        "discretized_logistic": "digits, likelihood discretized_logistic",
        "gaussian": "digits, likelihood density",
        "old": "digits, likelihood discretized_logistic",
    }
