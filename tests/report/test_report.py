"""The report against sweeps made by hand, whose best run, swept keys, means and failures are known."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from rich.console import Console

from vae.errors import VAEError
from vae.report import print_table, read_sweep, write_report
from vae.report.__main__ import main
from vae.report.pictures import chosen, galleries
from vae.report.plots import curves_along, draw
from vae.report.priors import fitted_priors
from vae.report.tables import nats
from vae.report.values import format_value, is_number


def config(**overrides: Any) -> dict[str, Any]:
    """A resolved config as training writes it, with dotted overrides."""
    nested: dict[str, Any] = {
        "data": {
            "_target_": "vae.data.module.ImageDataModule",
            "source": {"_target_": "sources.digits"},
            "binarize": "none",
        },
        "network": {"_target_": "vae.networks.mlp", "hidden": [400, 400]},
        "likelihood": {"_target_": "vae.likelihoods.Bernoulli"},
        "model": {"latent_dim": 16},
        "objective": {"_target_": "vae.objectives.BetaVAE", "beta": 1.0},
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.001},
        "seed": 0,
        "run": None,
    }
    for dotted, value in overrides.items():
        *path, leaf = dotted.split(".")
        place = nested
        for name in path:
            place = place[name]
        place[leaf] = value
    return nested


def make_run(
    folder: Path,
    *,
    rate: float = 20.0,
    distortion: float = 80.0,
    state: str = "finished",
    reason: str | None = None,
    overrides: list[str] | None = None,
    metrics: dict[str, float] | None = None,
    picture: bool = False,
    **settings: Any,
) -> Path:
    """A run folder as the contract has it; settings are dotted config keys."""
    folder.mkdir(parents=True)
    if overrides is None:
        overrides = [f"{key}={value}" for key, value in settings.items() if not isinstance(value, dict)]
    (folder / "config.yaml").write_text(yaml.safe_dump(config(**settings)))
    (folder / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    status = {"state": state, "reason": reason, "seconds": 30.0, "started": "2026-01-01T10:00:00", "epochs": 5}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "environment.json").write_text(
        json.dumps({"command": ["python", "-m", "vae.train"], "git_commit": "abc123"})
    )
    if state == "finished":
        found = {"rate": rate, "distortion": distortion, "elbo": -rate - distortion, "nll_iw500": rate + distortion - 2}
        found |= {"active_units": 7.0, "bits_per_dim": 0.2}
        (folder / "metrics.json").write_text(json.dumps({f"test/{k}": v for k, v in found.items()} | (metrics or {})))
    if picture:
        (folder / "pictures").mkdir()
        Image.effect_noise((240, 240), 60).save(folder / "pictures" / "samples.png")
        Image.effect_noise((240, 60), 60).save(folder / "pictures" / "reconstructions.png")
    return folder


def make_grid(sweep: Path, **options: Any) -> None:
    """beta x latent size, 2 x 3; the best ELBO, -90, is at latent_dim 8, beta 1."""
    elbos = {(2, 1): -110, (2, 4): -120, (8, 1): -90, (8, 4): -101, (32, 1): -91, (32, 4): -100.5}
    for (size, beta), elbo in elbos.items():
        values = {"model.latent_dim": size, "objective.beta": beta}
        name = ",".join(f"{key}={value}" for key, value in values.items())
        make_run(sweep / name, rate=20 / beta, distortion=-elbo - 20 / beta, **values, **options)


def write_multirun(sweep: Path, params: dict[str, str] | None = None, task: list[str] | None = None) -> None:
    sweeper = {"_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper", "params": params}
    document = {"hydra": {"sweeper": sweeper, "overrides": {"task": task or []}}}
    (sweep / "multirun.yaml").write_text(yaml.safe_dump(document))


def rows_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "report" / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the plots out of a page whose words are what is tested: they are most of its time."""
    monkeypatch.setattr("vae.report.page.draw", lambda sweep: [])


class Page(HTMLParser):
    """What a browser would see: elements with attributes, the table of runs as text, and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th") and self.tables:
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page_of(sweep: Path) -> Page:
    return Page((sweep / "report" / "index.html").read_text())


# ---- what a sweep is ----


def test_swept_keys_are_those_whose_values_differ_without_paths_and_seeds(tmp_path):
    for i, (beta, lr, seed) in enumerate(itertools.product([1, 4], [0.001, 0.01], [0, 1])):
        values = {"objective.beta": beta, "optimizer.lr": lr, "seed": seed}
        make_run(tmp_path / f"job-{i}", overrides=[], **values, **{"data.root": f"/tmp/{i}", "run": f"runs/job-{i}"})
    sweep = read_sweep(tmp_path)
    assert sweep.swept == ("optimizer.lr", "objective.beta")
    assert sweep.seeds and sweep.beta == "objective.beta" and sweep.latent_size is None
    assert [run.settings["objective.beta"] for run in sweep.runs] == [1, 1, 4, 4, 1, 1, 4, 4]


def test_a_group_choice_is_one_key_and_what_it_brings_is_in_step(tmp_path):
    conv = {"_target_": "vae.networks.conv", "channels": [32, 64]}
    make_run(tmp_path / "a", overrides=["network=mlp"])
    make_run(tmp_path / "b", overrides=["network=conv"], network=conv)
    sweep = read_sweep(tmp_path)
    assert sweep.swept == ("network",)
    assert [run.settings["network"] for run in sweep.runs] == ["conv", "mlp"]
    assert set(sweep.in_step) == {"network._target_", "network.hidden", "network.channels"}


def test_a_group_that_is_empty_in_some_runs_is_shown_as_it_was_typed(tmp_path):
    for name, group in (("none", {}), ("equivariance", {"_target_": "vae.objectives.regularizers.Equivariance"})):
        make_run(tmp_path / name, overrides=[f"regularizer={name}"], regularizer=group)
    sweep = read_sweep(tmp_path)
    assert sweep.swept == ("regularizer",)
    assert [sweep.describe(run) for run in sweep.runs] == ["regularizer equivariance", "regularizer none"]


def test_a_value_that_follows_from_another_is_not_a_second_axis(tmp_path):
    for size in (2, 8):
        for beta in (1, 4):
            values = {
                "model.latent_dim": size,
                "network": {"_target_": "mlp", "latent_dim": size},
                "objective.beta": beta,
            }
            make_run(tmp_path / f"{size}-{beta}", overrides=[], **values)
    sweep = read_sweep(tmp_path)
    assert sweep.swept == ("model.latent_dim", "objective.beta")
    assert sweep.in_step == {"network.latent_dim": "model.latent_dim"}


def test_keys_with_the_same_last_name_are_told_apart(tmp_path):
    make_run(
        tmp_path / "a", **{"optimizer": {"lr": 1}, "objective": {"beta": 1, "lr": 5}}, overrides=["optimizer.lr=1"]
    )
    make_run(
        tmp_path / "b", **{"optimizer": {"lr": 2}, "objective": {"beta": 1, "lr": 5}}, overrides=["optimizer.lr=2"]
    )
    make_run(
        tmp_path / "c", **{"optimizer": {"lr": 1}, "objective": {"beta": 1, "lr": 6}}, overrides=["optimizer.lr=1"]
    )
    sweep = read_sweep(tmp_path)
    assert [sweep.label(key) for key in sweep.swept] == ["objective.lr", "optimizer.lr"]


def test_likelihoods_that_do_not_compare_get_their_own_label(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", **{"data.binarize": "dynamic"})
    make_run(tmp_path / "c", **{"likelihood._target_": "vae.likelihoods.Gaussian"})
    make_run(tmp_path / "d", **{"data.source": {"_target_": "sources.mnist"}})
    labels = {run.name: run.data for run in read_sweep(tmp_path).runs}
    assert labels["a"] == "digits, binarize none, likelihood bernoulli"
    assert labels["b"] == "digits, binarize dynamic, likelihood bernoulli"
    assert labels["c"] == "digits, binarize none, likelihood density"
    assert labels["d"] == "mnist"


def test_combinations_that_hydra_was_asked_for_and_have_no_run_are_missing(tmp_path):
    make_grid(tmp_path)
    write_multirun(tmp_path, {"optimizer.lr": "0.1,0.2"})
    assert read_sweep(tmp_path).missing == ()  # not one run is of this sweep: another command line made them
    # the command line replaces the config's values, and what does not vary says nothing
    write_multirun(
        tmp_path, {"model.latent_dim": "2,8,32,64", "objective.beta": "9"}, ["objective.beta=1,4", "resume=true"]
    )
    sweep = read_sweep(tmp_path)
    assert sweep.missing == (
        ("model.latent_dim=64", "objective.beta=1"),
        ("model.latent_dim=64", "objective.beta=4"),
    )
    assert not sweep.failed and not sweep.complete


# ---- what the report says ----


def test_the_best_run_and_all_numbers_are_in_the_table_and_the_csv(tmp_path):
    make_grid(tmp_path)
    assert write_report(tmp_path) == tmp_path / "report" / "index.html"
    rows = rows_of(tmp_path)
    best = max(rows, key=lambda row: float(row["test/elbo"]))
    assert (best["model.latent_dim"], best["objective.beta"], float(best["test/elbo"])) == ("8", "1", -90.0)
    assert [row["state"] for row in rows] == ["finished"] * 6

    header, *body = page_of(tmp_path).tables[0]
    assert [name.strip() for name in header[1:5]] == ["latent_dim", "beta", "ELBOnats", "ratenats"]
    assert [row[1:4] for row in body if "★" in row[0]] == [["8", "1", "−90.00"]]
    assert "−90.00 nats" in re.sub(r"\s+", " ", page_of(tmp_path).text)
    assert sorted(path.name for path in (tmp_path / "report" / "plots").glob("*")) == [
        "active_units_against_model.latent_dim.png",
        "active_units_against_objective.beta.png",
        "elbo_against_model.latent_dim.png",
        "elbo_against_objective.beta.png",
        "rate_distortion.png",
    ]


@pytest.mark.slow
def test_rate_distortion_has_a_curve_for_each_latent_size_in_order_of_beta(tmp_path):
    make_grid(tmp_path)
    sweep = read_sweep(tmp_path)
    curves, hue = curves_along(sweep, list(sweep.runs), sweep.beta)
    assert hue == "model.latent_dim"
    assert [curve.settings for curve in curves] == [{"model.latent_dim": size} for size in (2, 8, 32)]
    assert [[value for value, _ in curve.points] for curve in curves] == [[1, 4]] * 3
    (plane,), *_ = draw(sweep)
    assert {"latent_dim 2", "latent_dim 8", "latent_dim 32", "best ELBO"} <= set(
        re.findall(r">([^<>]+)</text>", plane.svg)
    )
    assert len(re.findall(r'<a href="#run-\d+"><title>', plane.svg)) == 6


def test_seeds_are_averaged_and_their_spread_is_told(undrawn, tmp_path):
    for seed, elbo in enumerate([-100, -101, -105]):
        make_run(tmp_path / f"a{seed}", distortion=-elbo - 20, **{"objective.beta": 1, "seed": seed})
        make_run(tmp_path / f"b{seed}", distortion=-elbo, **{"objective.beta": 4, "seed": seed})
    write_report(tmp_path)
    means, every = page_of(tmp_path).tables[:2]
    assert len(every) == 1 + 6
    assert [cell.strip() for cell in means[1][1:4]] == ["1", "3", "−102.00 ± 2.65"]
    assert [cell.strip() for cell in means[2][1:4]] == ["4", "3", "−122.00 ± 2.65"]
    sweep = read_sweep(tmp_path)
    assert sweep.swept == ("objective.beta",)
    (curve,), hue = curves_along(sweep, list(sweep.runs), "objective.beta")
    assert hue is None and [[run.seed for run in group] for _, group in curve.points] == [[0, 1, 2]] * 2


def make_seeds(folder: Path, elbos: dict[int, list[float]]) -> None:
    """{beta: an ELBO for each seed}."""
    for beta, values in elbos.items():
        for seed, elbo in enumerate(values):
            make_run(folder / f"{beta}-{seed}", distortion=-elbo - 20, **{"objective.beta": beta, "seed": seed})


def printed(sweep: Path) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(read_sweep(sweep), console)
    return console.export_text()


def test_where_seeds_are_swept_the_best_is_a_setting_by_its_mean_with_spread_and_n(undrawn, tmp_path):
    make_seeds(tmp_path, {1: [-100, -101, -105], 4: [-90, -110, -124]})  # the best run is not of the best setting
    write_report(tmp_path)
    text = re.sub(r"\s+", " ", page_of(tmp_path).text)
    assert "The best test ELBO is −102.00 ± 2.65 nats per image, the mean of 3 seeds, with beta 1" in text
    assert [row[1:3] for row in page_of(tmp_path).tables[0] if "★" in row[0]] == [["1", "3"]]
    assert "Seeds differ" not in text
    with (tmp_path / "report" / "means.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["objective.beta"], row["n"], float(row["test/elbo"])) for row in rows] == [
        ("1", "3", -102),
        ("4", "3", -108),
    ]
    assert float(rows[0]["test/elbo sd"]) == pytest.approx(7**0.5) and rows[0]["test/rate sd"] == "0.0"
    terminal = printed(tmp_path)
    assert re.search(r"beta +n +ELBO", terminal) and re.search(r" 1 +3 +−102\.00 ± 2\.65 +20\.00 ± 0\.00", terminal)
    assert "means over seeds ± one standard deviation" in terminal


def test_a_report_says_which_settings_have_fewer_seeds_and_a_single_one_has_no_spread(undrawn, tmp_path):
    make_seeds(tmp_path, {1: [-100, -102], 2: [-99, -100], 4: [-120]})
    make_run(tmp_path / "8-0", state="failed", reason="no", **{"objective.beta": 8, "seed": 0})
    write_report(tmp_path)
    sentence = "Seeds differ in number: 2 of 4 settings have 2 finished, beta 4 has 1; beta 8 has none."
    assert sentence in re.sub(r"\s+", " ", page_of(tmp_path).text) and sentence in printed(tmp_path)
    assert [cell.strip() for cell in page_of(tmp_path).tables[0][3][1:4]] == ["4", "1", "−120.00"]
    with (tmp_path / "report" / "means.csv").open(newline="") as file:
        assert [row["test/elbo sd"] for row in csv.DictReader(file)] == [repr(2**0.5), repr(0.5**0.5), ""]


def test_a_report_on_one_seed_has_no_means_and_removes_those_of_an_earlier_one(undrawn, tmp_path):
    make_seeds(tmp_path, {1: [-100], 4: [-90]})
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "means.csv").write_text("of before")
    write_report(tmp_path)
    assert not (tmp_path / "report" / "means.csv").exists()


def test_a_point_that_is_a_mean_tells_mean_spread_and_number(tmp_path):
    make_seeds(tmp_path, {1: [-100, -102], 4: [-90, -94]})
    (plane,), (against, _) = draw(read_sweep(tmp_path))
    assert plane.title == "Rate and distortion, means of 2 seeds; points are labelled by beta"
    assert against.title == "ELBO against beta, means of 2 seeds"
    titles = re.findall(r"<title>(.*?)</title>", plane.svg, re.DOTALL)
    assert titles == [
        "beta 1, mean of 2 seeds\nelbo −101.00 ± 1.41, rate 20.00 ± 0.00, distortion 81.00 ± 1.41",
        "beta 4, mean of 2 seeds\nelbo −92.00 ± 2.83, rate 20.00 ± 0.00, distortion 72.00 ± 2.83",
    ]


@pytest.mark.slow
def test_data_sets_are_never_drawn_together_and_each_has_its_best(tmp_path):
    for name, offset in {"mnist": 0, "fashion_mnist": 140}.items():
        for beta in (1, 4):
            values = {"data.source": {"_target_": f"vae.data.sources.{name}"}, "objective.beta": beta}
            overrides = [f"data={name}", f"objective.beta={beta}"]
            make_run(tmp_path / f"{name}-{beta}", distortion=80 + offset + beta, overrides=overrides, **values)
    sweep = read_sweep(tmp_path)
    assert sweep.data_sets == ("fashion_mnist", "mnist")
    assert {data: sweep.best(data).name for data in sweep.data_sets} == {
        "fashion_mnist": "fashion_mnist-1",
        "mnist": "mnist-1",
    }
    for plot in itertools.chain(*draw(sweep)):
        runs = {sweep.runs[int(i)].data for i in re.findall(r'href="#run-(\d+)"', plot.svg)}
        assert len(runs) == 1
    assert sweep.swept == ("data", "objective.beta")


@pytest.mark.parametrize("settings", [{}, {"optimizer._target_": "torch.optim.SGD"}, {"objective.beta": 0}])
@pytest.mark.slow
def test_a_sweep_over_nothing_a_name_or_one_number_with_zero_is_reported(tmp_path, settings):
    make_run(tmp_path / "a", picture=True)
    make_run(tmp_path / "b", picture=True, **settings)
    sweep = read_sweep(tmp_path)
    assert sweep.swept == tuple(settings)
    write_report(tmp_path)
    assert page_of(tmp_path).count("img") == 4 + 1  # the fifth is the empty one of the dialog


def test_a_single_run_is_reported_in_its_own_folder(tmp_path):
    run = make_run(tmp_path / "only", picture=True)
    page = write_report(run)
    assert page == run / "report" / "index.html"
    assert [row["run"] for row in rows_of(run)] == ["only"]
    assert "Its test ELBO is −100.00 nats" in re.sub(r"\s+", " ", page_of(run).text)


# ---- what goes wrong ----


def test_failed_cut_off_and_damaged_runs_are_listed_with_reasons_and_the_rest_is_reported(undrawn, tmp_path):
    make_grid(tmp_path)
    make_run(tmp_path / "nan", state="failed", reason="The loss became nan at step 412.", **{"objective.beta": 9})
    make_run(tmp_path / "killed", state="running", **{"objective.beta": 10})
    (make_run(tmp_path / "unevaluated", **{"objective.beta": 11}) / "metrics.json").unlink()
    (make_run(tmp_path / "torn", **{"objective.beta": 12}) / "metrics.json").write_text('{"test/elbo": -1')
    (make_run(tmp_path / "wrong", **{"objective.beta": 13}) / "metrics.json").write_text('{"test/elbo": "good"}')
    (make_run(tmp_path / "unread", **{"objective.beta": 14}) / "config.yaml").write_text("{a: [")
    sweep = read_sweep(tmp_path)
    states = {run.name: (run.state, run.reason) for run in sweep.failed}
    assert states["nan"] == ("failed", "The loss became nan at step 412.")
    assert states["killed"] == ("cut off", "It was cut off, or is still running.")
    assert states["unevaluated"][0] == "cut off"
    assert states["torn"][0] == "damaged" and "metrics.json is damaged" in states["torn"][1]
    assert states["wrong"] == ("damaged", "metrics.json is damaged (test/elbo is not a number).")
    assert states["unread"][0] == "damaged" and "config.yaml is damaged" in states["unread"][1]
    assert len(sweep.finished) == 6 and not sweep.complete
    assert sweep.beta == "objective.beta" and sweep.numeric("objective.beta")

    write_report(tmp_path)
    failures = page_of(tmp_path).tables[-1]
    assert ["nan", "failedafter 5 epochs", "The loss became nan at step 412."] in failures
    assert len(failures) == 1 + 6
    assert {row["run"]: row["state"] for row in rows_of(tmp_path)}["torn"] == "damaged"


def test_a_metric_that_is_not_finite_is_shown_and_left_out_of_plots_and_of_the_best(undrawn, tmp_path):
    make_grid(tmp_path)
    make_run(tmp_path / "blown", metrics={"test/elbo": float("nan")}, **{"objective.beta": 4, "model.latent_dim": 64})
    sweep = read_sweep(tmp_path)
    assert sweep.best("digits").settings == {"model.latent_dim": 8, "objective.beta": 1}
    blown = next(i for i, run in enumerate(sweep.runs) if run.name == "blown")
    elbo_plots = [plot for plot in itertools.chain(*draw(sweep)) if plot.name.startswith("elbo")]
    assert len(elbo_plots) == 2 and all(f"#run-{blown}" not in plot.svg for plot in elbo_plots)
    write_report(tmp_path)
    assert "nan" in next(row for row in page_of(tmp_path).tables[0] if row[1] == "64")


def test_a_metric_that_a_run_does_not_have_is_a_dash_and_not_nan(undrawn, tmp_path):
    make_run(tmp_path / "a", metrics={"test/nll_iw7": 3.0}, **{"objective.beta": 1})
    make_run(tmp_path / "b", **{"objective.beta": 2})
    write_report(tmp_path)
    row = next(row for row in page_of(tmp_path).tables[0] if row[1] == "2")
    assert "–" in row and "nan" not in row
    assert "–" in printed(tmp_path) and "nan" not in printed(tmp_path)


def test_a_run_that_left_nothing_but_its_overrides_is_cut_off_with_its_settings(tmp_path):
    make_grid(tmp_path)
    early = tmp_path / "early"
    early.mkdir()
    (early / "overrides.yaml").write_text("- model.latent_dim=64\n- objective.beta=4\n")
    sweep = read_sweep(tmp_path)
    (early,) = sweep.failed
    assert (early.state, early.settings) == ("cut off", {"model.latent_dim": 64, "objective.beta": 4})
    assert sweep.data_sets == ("digits",) and not sweep.data_column


def test_a_sweep_in_which_every_run_failed_still_says_why(tmp_path):
    make_run(tmp_path / "a", state="failed", reason="Out of memory.")
    make_run(tmp_path / "b", state="failed", reason="Out of disk.")
    write_report(tmp_path)
    assert "Out of memory." in page_of(tmp_path).text and "No run has a finite ELBO." in page_of(tmp_path).text


@pytest.mark.parametrize(
    "prepare, sentence",
    [
        (lambda folder: None, "No runs in "),
        (lambda folder: folder.rmdir(), "There is no folder "),
        (
            lambda folder: (make_run(folder / "a") / "metrics.json").write_text("{"),
            "No run in .* metrics.json is damaged",
        ),
    ],
)
def test_nothing_to_report_is_one_sentence_and_exit_code_1(tmp_path, capsys, prepare, sentence):
    folder = tmp_path / "sweep"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(VAEError, match=sentence):
        write_report(folder)
    with pytest.raises(SystemExit, match="1"):
        main([str(folder)])
    out, err = capsys.readouterr()
    assert out.strip() == "" and re.match("Error: " + sentence, err) and len(err.strip().splitlines()) == 1
    assert not (folder / "report").exists()


def test_an_unreadable_picture_is_said_so(tmp_path):
    run = make_run(tmp_path / "a", picture=True)
    picture = run / "pictures" / "samples.png"
    picture.write_bytes(picture.read_bytes()[:500])
    write_report(tmp_path)
    page = page_of(tmp_path)
    assert "unreadable" in page.text and page.count("img") == 1 + 1


def test_a_failed_write_leaves_the_previous_report_whole(undrawn, tmp_path, monkeypatch):
    make_run(tmp_path / "old")
    page = write_report(tmp_path)
    before = page.read_bytes()
    make_run(tmp_path / "new", **{"objective.beta": 100})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vae.files.os.fsync", full)
    with pytest.raises(VAEError, match="no space left on the disk to write"):
        write_report(tmp_path)
    assert page.read_bytes() == before
    assert not list((tmp_path / "report").rglob(".*"))


# ---- trust ----


EVIL = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$\\frac{1$",
    "&lt;",
    "]]>--><svg onload=alert(1)>",
]


def test_what_comes_from_names_configs_and_reasons_is_escaped(tmp_path):
    for i, text in enumerate(EVIL):
        values = {"optimizer._target_": text, "network.hidden": text, f"model.{text.replace('.', '')}": 1}
        run = make_run(tmp_path / f"run-{i}", picture=True, overrides=[f"optimizer._target_={text}"], **values)
        (run / "environment.json").write_text(json.dumps({text: text}))
    make_run(tmp_path / EVIL[0], state="failed", reason=EVIL[0])  # its slash makes two folders
    make_run(tmp_path / "odd<b>", metrics={"test/<b>": 1.0})
    write_report(tmp_path)
    html = (tmp_path / "report" / "index.html").read_text()
    page = Page(html)
    assert page.count("script") == 1 and page.count("b") == 0
    assert "alert" not in html[html.rindex("<script>") :]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert all(
        attrs.get("src", "data:") in (None, "data:") or attrs["src"].startswith("data:image/") for _, attrs in page.tags
    )
    for text in EVIL:
        assert text in page.text
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert all(link.startswith(("#", "../", "runs.csv")) for link in links)
    assert "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", html) and "https://" not in html


def test_a_spreadsheet_runs_no_formula_of_a_config(undrawn, tmp_path):
    make_run(tmp_path / "=1+1", **{"optimizer._target_": '=HYPERLINK("x")'})
    make_run(tmp_path / "b", **{"optimizer._target_": "-2"}, rate=-1.5)
    write_report(tmp_path)
    rows = {row["run"]: row for row in rows_of(tmp_path)}
    assert rows["'=1+1"]["optimizer._target_"] == '\'=HYPERLINK("x")'
    assert rows["b"]["test/rate"] == "-1.5"


def test_control_characters_do_not_reach_the_terminal(tmp_path):
    make_run(tmp_path / "a", **{"optimizer._target_": "\x1b[31m[bold]x"})
    make_run(tmp_path / "b", state="failed", reason="\x1b]0;title\x07")
    console = Console(width=200, record=True, force_terminal=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(read_sweep(tmp_path), console)
    text = console.export_text()
    assert "\x1b" not in text and "\x07" not in text
    assert "\\x1b[31m[bold]x" in text


def test_what_is_measured_given_labels_has_a_label_of_its_own(tmp_path):
    for name, facts in {"a": {}, "b": {"num_classes": 10}, "c": {"num_classes": 10, "latent_label": True}}.items():
        (make_run(tmp_path / name) / "facts.json").write_text(json.dumps({"data": "digits"} | facts))
    given = {run.name: run.data for run in read_sweep(tmp_path).runs}
    assert given == {"a": "digits, given no labels", "b": "digits, given labels", "c": "digits, given no labels"}


# ---- form ----


def test_the_terminal_table_marks_the_best_and_counts(tmp_path):
    make_grid(tmp_path)
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_table(read_sweep(tmp_path), console)
    text = console.export_text()
    assert re.search(r"8 +1 +−90\.00 +20\.00 +70\.00 +88\.00 +0\.200 +7 +0:30", text)
    assert "6 runs: 6 finished." in text


@pytest.mark.slow
def test_pictures_of_a_page_with_sixteen_runs_stay_within_eight_megabytes(tmp_path):
    noise = Image.merge("RGB", [Image.effect_noise((500, 500), 80) for _ in range(3)])  # what compresses worst
    noise.save(tmp_path / "noise.png", compress_level=1)
    assert (tmp_path / "noise.png").stat().st_size > 600_000
    for i in range(16):
        folder = make_run(tmp_path / "sweep" / str(i)) / "pictures"
        folder.mkdir()
        for kind in ("samples", "reconstructions", "traversals"):
            (folder / f"{kind}.png").hardlink_to(tmp_path / "noise.png")
    shown = galleries(read_sweep(tmp_path / "sweep"))
    sizes = [len(p.uri) for g in shown for shelf in g.shelves for _, row in shelf.rows for p in row]
    assert len(sizes) == 48 and sum(sizes) < 6_500_000


def test_of_too_many_pictures_a_choice_is_shown_with_the_best_among_them_and_the_page_says_so(
    undrawn, tmp_path, monkeypatch
):
    monkeypatch.setattr("vae.report.pictures.TOTAL_BYTES", 120_000)  # ten at 12,000 each, two of a run: five runs
    for beta, seed in itertools.product(range(1, 13), (0, 1)):
        elbo = -50.0 if (beta, seed) == (4, 1) else -100 - beta
        values = {"objective.beta": beta, "seed": seed}
        make_run(tmp_path / f"{beta}-{seed}", distortion=-elbo - 20, picture=True, **values)
    sweep = read_sweep(tmp_path)
    assert [run.name for run in chosen(sweep)] == ["1-0", "4-0", "5-0", "9-0", "12-0"]  # beta 4 has the best mean
    write_report(sweep)
    assert "Of 24 runs with pictures 5 are shown" in re.sub(r"\s+", " ", page_of(tmp_path).text)
    monkeypatch.setattr("vae.report.pictures.TOTAL_BYTES", 48 * 12_000)
    assert len(chosen(sweep)) == 24


def test_pictures_stand_in_a_table_of_beta_across_and_the_rest_down_each_row_of_one_seed(tmp_path):
    for beta, seed in itertools.product((1, 4), (0, 1, 2)):
        if (beta, seed) != (1, 0):
            make_run(tmp_path / f"{beta}-{seed}", picture=True, **{"objective.beta": beta, "seed": seed})
    (shelf,) = galleries(read_sweep(tmp_path))[0].shelves
    assert shelf.columns == ("beta 1", "beta 4")
    assert [[p and p.run.name for p in row] for _, row in shelf.rows] == [[None, "4-0"], ["1-1", "4-1"], ["1-2", "4-2"]]


def test_values_are_written_as_a_person_would():
    assert [format_value(v) for v in (1.0, 0.25, 1e-05, True, None, [400, 200], "torch.optim.Adam", "a\nb")] == [
        "1", "0.25", "1e-05", "true", "none", "[400, 200]", "Adam", "a\\nb",
    ]  # fmt: skip


def test_numbers_have_a_true_minus_but_none_before_zero():
    assert [nats(v) for v in (-1.234, -0.0, -0.001, 12, float("nan"), float("-inf"))] == [
        "−1.23", "0.00", "0.00", "12.00", "nan", "−inf",
    ]  # fmt: skip
    assert [nats(v, 1) for v in (7.0, 7.3, -10.0)] == ["7", "7.3", "−10"]


def test_importing_the_report_imports_neither_torch_nor_matplotlib():
    code = "import sys, vae.report; sys.exit(bool({'torch', 'matplotlib', 'hydra'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_facts_say_which_likelihoods_compare_whatever_their_classes_are_called(undrawn, tmp_path):
    for name, discrete in (("Mine", False), ("Gaussian", False), ("Gaussish", True)):
        folder = make_run(tmp_path / name, **{"likelihood": {"_target_": f"my.{name}"}, "seed": len(name)})
        facts = {"data": "photos", "likelihood": name, "discrete": discrete, "image_shape": [1, 8, 8]}
        (folder / "facts.json").write_text(json.dumps(facts))
    assert sorted(set(read_sweep(tmp_path).data_sets)) == ["photos, likelihood density", "photos, likelihood gaussish"]


BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{k: *a{n - 1}, l: *a{n - 1}}}\n" for n in range(1, 60))
RECURSIVE = "model: &a\n  latent_dim: 2\n  again: *a\n"


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("metrics.json", '{"test/elbo": 1' + "0" * 400 + "}", "test/elbo is larger than any number"),
        ("metrics.json", '{"test/elbo": 1e101}', "test/elbo is larger than any number"),
        ("config.yaml", RECURSIVE, "config.yaml is damaged (it has aliases"),
        ("config.yaml", BOMB, "config.yaml is damaged (it has aliases"),
        ("overrides.yaml", "- &a [*a]\n", "overrides.yaml is damaged (it has aliases"),
        ("status.json", '{"state": "failed", "reason": "\\ud800", "seconds": 1' + "0" * 400 + "}", "\\ud800"),
        ("facts.json", "[1, 2", "facts.json is damaged"),
        ("metrics.json", "\0\0\0", "metrics.json is damaged"),
    ],
)
def test_a_run_with_a_damaged_file_is_listed_and_the_others_are_reported(undrawn, tmp_path, file, content, reason):
    make_grid(tmp_path)
    folder = make_run(tmp_path / "odd")
    (folder / file).write_text(content)
    write_report(read_sweep(tmp_path))
    (odd,) = read_sweep(tmp_path).failed
    assert odd.state == ("failed" if file == "status.json" else "damaged") and reason in odd.reason
    assert len(rows_of(tmp_path)) == 7


def test_numbers_and_words_that_no_float_or_file_holds_are_reported_as_they_are(undrawn, tmp_path):
    make_grid(tmp_path)
    huge = "1" + "0" * 400
    odd = make_run(tmp_path / "odd")
    (odd / "config.yaml").write_text(f"seed: -{huge}\nmodel: {{latent_dim: {huge}}}\nnote: '&a [*a]'\n")
    (odd / "overrides.yaml").write_text("- note=&a [*a]\n")
    (odd / "metrics.json").write_text('{"test/elbo": -Infinity, "test/rate": 1e100, "\\ud800": 1}')
    write_report(read_sweep(tmp_path))
    found = next(run for run in read_sweep(tmp_path).runs if run.name == "odd")
    assert found.finished and found.settings["model.latent_dim"] == math.inf and found.metrics["\\ud800"] == 1


@pytest.mark.parametrize(
    "swept",
    [
        "shuffle(range(0,1e9))",
        "sort(range(0,1,1e-9))",
        "range(0,1e9)",
        "glob(*)",
        "range(0,1000000000)",
        "choice(1,2",
        "interval(0,1)",
    ],
)
def test_a_sweep_whose_grid_cannot_be_listed_is_reported_without_what_is_missing(undrawn, tmp_path, swept):
    make_grid(tmp_path)
    write_multirun(tmp_path, {"objective.beta": swept})
    assert read_sweep(tmp_path).missing == ()


def test_a_folder_whose_name_is_not_text_is_reported_and_linked(undrawn, tmp_path):
    make_grid(tmp_path)
    make_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff")))
    write_report(read_sweep(tmp_path))
    page = (tmp_path / "report" / "index.html").read_text()
    assert "run-%FF/" in page and "run-\\udcff" in page


def test_a_number_is_what_a_float_holds():
    assert all(is_number(value) for value in (0, -3, 0.5, 1e308, 10**308))
    assert not any(is_number(value) for value in (True, None, "1", math.nan, math.inf, -math.inf, 10**309, -(10**400)))


# ---- priors fitted afterwards ----

OWN = {"rate": 20.0, "elbo": -100.0, "nll_iw50": 97.0, "decomposition/marginal_kl_n1000": 3.0}
OWN |= {"samples/frechet_distance_n500": 41.0, "active_units": 7.0}
FITTED = {"rate": 18.5, "elbo": -98.5, "nll_iw50": 96.25, "decomposition/marginal_kl_n1000": 1.5}
FITTED |= {"samples/frechet_distance_n500": 30.0, "samples/recall_k3_n500": 0.5}


def run_with_priors(folder: Path, names: tuple[str, ...] = ("gaussian",), **settings) -> Path:
    run = make_run(folder, picture=True, **settings)
    for i, name in enumerate(names):
        place = run / "priors" / name
        place.mkdir(parents=True)
        log_prob = {"train": -14.5, "val": -14.75 - i, "val_of_own_prior": -15.25}
        (place / "config.json").write_text(json.dumps({"prior": "gaussian", "log_prob": log_prob}))
        Image.effect_noise((80, 80), 60).save(place / "samples.png")
    measured = {f"test/{key}": value for key, value in OWN.items()}
    measured |= {f"test/priors/{names[0]}/{key}": value for key, value in FITTED.items()} if names else {}
    (run / "evaluation-test.json").write_text(json.dumps(measured))
    return run


def test_each_prior_has_a_row_beside_that_of_training(undrawn, tmp_path):
    run_with_priors(
        tmp_path / "a", ("gaussian", "later"), **{"objective.beta": 1, "prior": {"_target_": "StandardNormal"}}
    )
    make_run(tmp_path / "b", **{"objective.beta": 4})
    found = fitted_priors(read_sweep(tmp_path))
    assert found.columns == [
        "log p(z), validation",
        "rate",
        "ELBO",
        "NLL, K=50",
        "marginal KL, N=1000",
        "Frechet distance, N=500",
    ]
    assert [(row.name, row.first) for row in found.rows] == [
        ("N(0, I), of training", True),
        ("gaussian", False),
        ("later", False),
    ]
    own, gaussian, later = ([row.values[column] for column in found.columns] for row in found.rows)
    assert own == [-15.25, 20, -100, 97, 3, 41] and gaussian == [-14.75, 18.5, -98.5, 96.25, 1.5, 30]
    assert later[0] == -15.75 and all(map(math.isnan, later[1:]))
    page = Page(write_report(tmp_path).read_text())
    table = next(table for table in page.tables if "prior" in table[0])
    assert [row[1] for row in table[1:]] == ["N(0, I), of training", "gaussian", "later"]
    assert table[2][2:] == ["−14.75", "18.50", "−98.50", "96.25", "1.50", "30.00"]
    assert table[3][2:] == ["−15.75", *["–"] * 5]
    shown = [attributes for tag, attributes in page.tags if tag == "img" and attributes["alt"].startswith("Samples: ")]
    assert [attributes["alt"] for attributes in shown][:3] == [
        "Samples: N(0, I), of training",
        "Samples: gaussian",
        "Samples: later",
    ]


def test_without_one_there_is_no_section(undrawn, tmp_path):
    run_with_priors(tmp_path / "a", ())
    assert fitted_priors(read_sweep(tmp_path)) is None
    assert 'id="priors"' not in write_report(tmp_path).read_text()


def test_what_is_damaged_counts_as_absent(undrawn, tmp_path):
    run = run_with_priors(tmp_path / "a", ("gaussian", "other"))
    (run / "priors" / "other" / "config.json").write_text("{")
    (run / "priors" / "gaussian" / "samples.png").write_text("no picture")
    (run / "priors" / "half").mkdir()
    found = fitted_priors(read_sweep(tmp_path))
    assert [row.name for row in found.rows][1:] == ["gaussian"] and found.rows[1].samples.uri is None
    (run / "evaluation-test.json").write_text(
        '{"test/priors/gaussian/rate": "much", "test/priors/gaussian/elbo": 1e999}'
    )
    assert fitted_priors(read_sweep(tmp_path)).columns == ["log p(z), validation"]
    (run / "priors" / "gaussian" / "config.json").write_text('{"log_prob": {"val": "<b>"}}')
    assert math.isnan(fitted_priors(read_sweep(tmp_path)).rows[1].values["log p(z), validation"])
    write_report(tmp_path)
