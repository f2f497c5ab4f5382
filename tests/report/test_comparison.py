"""Sweeps side by side: made-up folders whose differences and intervals are known by hand."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vae.errors import VAEError
from vae.report.__main__ import main
from vae.report.comparison import Difference, compare
from vae.report.comparison_page import signed, verdict, write_comparison
from vae.report.intervals import Interval, over_images, over_seeds
from vae.report.pairing import differing, read_sides, unpaired
from vae.report.tables import Measured

CONFIG = {
    "data.source._target_": "vae.data.sources.digits",
    "data.binarize": "none",
    "data.limit": None,
    "network._target_": "vae.networks.mlp",
    "network.hidden": [400],
    "likelihood._target_": "vae.likelihoods.Bernoulli",
    "model.latent_dim": 2,
    "objective.beta": 1.0,
    "optimizer.lr": 0.001,
    "seed": 0,
}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in flat.items():
        *path, leaf = key.split(".")
        place = found
        for name in path:
            place = place.setdefault(name, {})
        place[leaf] = value
    return found


def make(
    folder: Path,
    elbo: float | np.ndarray,
    *,
    state: str = "finished",
    images: str | None = "same",
    k: int = 50,
    facts: dict[str, Any] | None = None,
    overrides: list[str] | None = None,
    **settings: Any,
) -> Path:
    """A run whose images have these ELBOs, a rate of 5 each and a bound that is 1 better; images=None: none are kept."""
    folder.mkdir(parents=True)
    each = np.broadcast_to(np.asarray(elbo, np.float64), (4,) if np.ndim(elbo) == 0 else np.shape(elbo))
    (folder / "config.yaml").write_text(yaml.safe_dump(nested(CONFIG | settings)))
    lines = [f"{key}={value}" for key, value in settings.items()] if overrides is None else overrides
    (folder / "overrides.yaml").write_text(yaml.safe_dump(lines))
    (folder / "status.json").write_text(json.dumps({"state": state, "reason": "The loss stopped being finite."}))
    (folder / "facts.json").write_text(
        json.dumps({"data": "digits", "likelihood": "Bernoulli", "discrete": True} | (facts or {}))
    )
    if state != "finished":
        return folder
    arrays = {"elbo": each, "rate": np.full_like(each, 5.0), f"nll_iw{k}": -each - 1}
    means = {f"test/{name}": float(values.mean()) for name, values in arrays.items()}
    (folder / "metrics.json").write_text(json.dumps(means | {"test/distortion": float(-each.mean() - 5)}))
    if images is not None:
        kept = {name: values.astype(np.float32) for name, values in arrays.items()}
        np.savez(folder / "per_image-test.npz", images=np.array(images), weights=np.array("w"), **kept)
    return folder


def sweep(folder: Path, elbos: dict[tuple[float, int], float | np.ndarray], **options: Any) -> Path:
    """{(beta, seed): elbo}."""
    for (beta, seed), elbo in elbos.items():
        make(folder / f"{beta}-{seed}", elbo, **{"objective.beta": beta, "seed": seed, **options})
    return folder


def grid(*values: float) -> dict[tuple[float, int], float]:
    """A value for each of beta 1 and 4 and, in each, of as many seeds as there are left."""
    keys = itertools.product((1.0, 4.0), range(len(values) // 2))
    return dict(zip(keys, values, strict=True))


def of(comparison, metric="elbo"):
    """(beta, difference) of every row of the first block."""
    return [(row.settings.get("objective.beta"), found[metric]) for row, found in comparison.blocks[0].rows]


@pytest.fixture
def undrawn(monkeypatch):
    monkeypatch.setattr("vae.report.comparison_page.draw", lambda comparison: [])


class Text(HTMLParser):
    def __init__(self, page: Path) -> None:
        super().__init__()
        self.text = ""
        self.feed(page.read_text())
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_data(self, data: str) -> None:
        self.text += data


# ---- the intervals ----


def test_the_interval_over_seeds_is_students_t_worked_by_hand():
    # mean 2, s = sqrt((1 + 0 + 1) / 2) = 1; t(0.975, 2) = 4.302653 from the table; 4.302653 / sqrt(3) = 2.484138
    found = over_seeds([1.0, 2.0, 3.0])
    assert (found.low, found.high, found.n) == (
        pytest.approx(2 - 2.484138, abs=1e-6),
        pytest.approx(4.484138, abs=1e-6),
        3,
    )
    # two: mean 1, s = sqrt(2), t(0.975, 1) = 12.706205, half = 12.706205
    assert over_seeds([0.0, 2.0]).high == pytest.approx(13.706205, abs=1e-6)


def test_the_interval_over_images_is_the_normal_one_worked_by_hand():
    # mean 2.5, s = sqrt(5 / 3), standard error sqrt(5 / 12) = 0.645497; times 1.959964
    found = over_images(np.array([1.0, 2.0, 3.0, 4.0]))
    assert (found.low, found.high, found.n) == (
        pytest.approx(2.5 - 1.265151, abs=1e-6),
        pytest.approx(3.765151, abs=1e-6),
        4,
    )


def test_the_interval_over_seeds_covers_the_truth_nineteen_times_in_twenty():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (2000, 4))
    covered = [(i := over_seeds(list(row))).low < 3 < i.high for row in draws]
    assert abs(np.mean(covered) - 0.95) < 0.015


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_one_difference_or_one_that_is_not_finite_has_no_interval(values):
    assert over_seeds(values) is None
    assert over_images(np.array(values)) is None


# ---- pairs and differences ----


def test_runs_are_paired_by_settings_and_seed_and_the_known_shift_is_found(tmp_path):
    a = sweep(tmp_path / "a", grid(-100, -102, -104, -110, -111, -112))
    b = sweep(tmp_path / "b", grid(-99, -100, -101, -111, -113, -115))  # +1, +2, +3 and -1, -2, -3
    (beta1, first), (beta4, second) = of(compare(read_sides([a, b])))
    assert (beta1, beta4) == (1.0, 4.0)
    assert (first.value, first.first, first.second, first.seeds) == (2.0, -102.0, -100.0, 3)
    assert (first.over_seeds.low, first.over_seeds.high) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)
    assert (second.value, second.over_seeds.high) == (-2.0, pytest.approx(-2 + 2.484138, abs=1e-6))


def test_the_mean_over_settings_is_of_each_seeds_mean(tmp_path):
    a = sweep(tmp_path / "a", grid(0, 0, 0, 0, 0, 0))
    b = sweep(tmp_path / "b", grid(1, 2, 3, 1, 0, 5))  # a seed's means over both settings: 1, 1, 4
    overall = compare(read_sides([a, b])).blocks[0].overall["elbo"]
    assert overall.value == 2.0 and overall.seeds == 3
    # s = sqrt(3), so that t s / sqrt(n) is t itself
    assert overall.over_seeds.high == pytest.approx(2 + 4.302653, abs=1e-6)


def test_a_sweep_against_itself_is_exactly_zero(undrawn, tmp_path):
    rng = np.random.default_rng(0)
    a = sweep(tmp_path / "a", {key: rng.normal(-100, 10, 50) for key in grid(0, 0, 0, 0)})
    found = compare(read_sides([a, a]))
    assert found.equal and found.notes == []
    for _, row in found.blocks[0].rows:
        for metric in ("elbo", "rate", "distortion", "nll_iw50"):
            d = row[metric]
            assert d.value == 0.0 and d.over_seeds == Interval(0, 0, 2) and d.over_images == Interval(0, 0, 50)
    assert found.blocks[0].overall["elbo"].over_images == Interval(0, 0, 50)
    assert "Every difference is exactly zero." in Text(write_comparison(found)).text


def test_swapping_the_sweeps_flips_every_sign(tmp_path):
    rng = np.random.default_rng(1)
    a, b = (sweep(tmp_path / name, {key: rng.normal(-90, 3, 20) for key in grid(0, 0, 0, 0)}) for name in "ab")
    there, back = of(compare(read_sides([a, b]))), of(compare(read_sides([b, a])))
    for (_, x), (_, y) in zip(there, back, strict=True):
        assert x.value == -y.value != 0 and (x.first, x.second) == (y.second, y.first)
        for ends in ("over_seeds", "over_images"):
            assert (getattr(x, ends).low, getattr(x, ends).high) == (-getattr(y, ends).high, -getattr(y, ends).low)


def test_the_interval_over_images_pairs_image_with_image_and_averages_seeds_first(tmp_path):
    base = np.array([-100.0, -50.0, -10.0, -80.0])  # images differ far more than the sweeps do
    shifts = {0: np.array([0.0, 2.0, 2.0, 4.0]), 1: np.array([2.0, 2.0, 4.0, 4.0])}  # means 1, 2, 3, 4
    a = sweep(tmp_path / "a", {(1.0, seed): base for seed in (0, 1)})
    b = sweep(tmp_path / "b", {(1.0, seed): base + shift for seed, shift in shifts.items()})
    found = compare(read_sides([a, b])).blocks[0].rows[0][1]
    assert (found["elbo"].over_images.low, found["elbo"].over_images.n) == (pytest.approx(2.5 - 1.265151, abs=1e-5), 4)
    assert found["nll_iw50"].over_images.high == pytest.approx(-2.5 + 1.265151, abs=1e-5)
    assert found["distortion"].over_images.high == pytest.approx(-2.5 + 1.265151, abs=1e-5)
    assert found["rate"].over_images == Interval(0, 0, 4)


def test_unequal_seeds_are_paired_where_both_have_them_and_the_report_says_so(undrawn, tmp_path):
    a = sweep(tmp_path / "a", {(1.0, 0): -10, (1.0, 1): -11, (1.0, 2): -12, (4.0, 0): -20, (4.0, 1): -20})
    b = sweep(tmp_path / "b", {(1.0, 0): -9, (1.0, 1): -10, (1.0, 2): -11, (1.0, 3): 0, (4.0, 1): -22})
    found = compare(read_sides([a, b]))
    (_, first), (_, second) = of(found)
    assert (first.seeds, first.value, first.over_seeds) == (3, 1.0, Interval(1, 1, 3))
    assert (second.seeds, second.value, second.over_seeds) == (1, -2.0, None)
    overall = found.blocks[0].overall["elbo"]  # seed 1 alone has both settings: the mean of +1 and -2
    assert (overall.value, overall.seeds, overall.over_seeds) == (-0.5, 1, None)
    assert list(unpaired(found.sides, 1)) == [
        ("B", "beta 1", "3", "no run in A"),
        ("A", "beta 4", "0", "no run in B"),
    ]
    text = Text(write_comparison(found)).text
    assert (
        "Seeds differ in number: settings that B and A share have 1 to 3 seeds in common; 1 setting with one has no"
        in text
    )


def test_three_sweeps_are_each_set_against_the_first(undrawn, tmp_path):
    a, b, c = (sweep(tmp_path / name, grid(x, x, x, x)) for name, x in {"a": -10, "b": -9, "c": -13}.items())
    found = compare(read_sides([a, b, c]))
    assert [(block.other, block.overall["elbo"].value) for block in found.blocks] == [(1, 1.0), (2, -3.0)]
    text = Text(write_comparison(found)).text
    assert "B − A, ELBO over 2 settings: +1.00 nats per image" in text and "C − A, ELBO over 2 settings: −3.00" in text
    assert write_comparison(found) == a / "report" / "against" / "b+c" / "index.html"


def test_a_key_that_one_sweep_varies_and_the_other_holds_is_matched_by_its_value(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for size, seed in itertools.product((2, 8), (0, 1)):
        make(a / f"{size}-{seed}", -size, **{"model.latent_dim": size, "seed": seed})
    for seed in (0, 1):
        make(
            b / str(seed), -7, **{"model.latent_dim": 8, "optimizer.lr": 0.01, "seed": seed}, overrides=[f"seed={seed}"]
        )
    sides = read_sides([a, b])
    ((row, found),) = compare(sides).blocks[0].rows
    assert row.settings == {"model.latent_dim": 8} and found["elbo"].value == 1.0
    assert differing(sides) == [("optimizer.lr", ["0.001", "0.01"])]


@pytest.mark.parametrize("hidden", [[400], [200]])  # the very settings, or the same class alone
def test_a_group_that_one_sweep_chooses_and_the_other_has_by_default_is_matched_by_what_it_holds(tmp_path, hidden):
    a, b = tmp_path / "a", tmp_path / "b"
    make(a / "mlp", -10, overrides=["network=mlp"])
    make(
        a / "conv", -20, overrides=["network=conv"], **{"network._target_": "vae.networks.conv", "network.hidden": None}
    )
    make(b / "only", -9, overrides=[], **{"network.hidden": hidden})
    ((row, found),) = compare(read_sides([a, b])).blocks[0].rows
    assert row.settings["network"] == "mlp" and found["elbo"].value == 1.0


def test_failed_runs_are_left_out_and_named_with_their_reason(undrawn, tmp_path):
    a = sweep(tmp_path / "a", grid(-10, -11, -20, -21))
    b = sweep(tmp_path / "b", {(1.0, 0): -9, (1.0, 1): -10, (4.0, 0): -19})
    make(b / "failed", 0, state="failed", **{"objective.beta": 4.0, "seed": 1})
    found = compare(read_sides([a, b]))
    assert [d.seeds for _, d in of(found)] == [2, 1]
    assert list(unpaired(found.sides, 1)) == [("A", "beta 4", "1", "failed in B: The loss stopped being finite.")]
    assert "failed in B: The loss stopped being finite." in Text(write_comparison(found)).text


def test_each_data_set_that_both_have_is_compared_for_itself(tmp_path):
    for name, gain in {"a": 0, "b": 1}.items():
        for data, level in {"digits": -20, "mnist": -90 + 2 * gain}.items():
            values = {"data.source._target_": f"vae.data.sources.{data}", "overrides": [f"data={data}"]}
            make(tmp_path / name / data, level + gain, facts={"data": data}, **values)
    make(
        tmp_path / "b" / "more",
        0,
        facts={"data": "kmnist"},
        **values | {"data.source._target_": "k", "overrides": ["data=kmnist"]},
    )
    found = compare(read_sides([tmp_path / "a", tmp_path / "b"]))
    assert [(block.data, block.rows[0][1]["elbo"].value) for block in found.blocks] == [("digits", 1.0), ("mnist", 3.0)]


def test_a_run_that_repeats_another_is_left_out_and_counted(tmp_path):
    a, b = sweep(tmp_path / "a", grid(-1, -2)), sweep(tmp_path / "b", grid(-1, -2))
    make(b / "z-again", -50, **{"objective.beta": 1.0, "seed": 0})
    found = compare(read_sides([a, b]))
    assert found.equal and found.notes[-1].startswith("B has 1 run with the settings and seed of another")


# ---- the same images ----


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"images": None}, "4 of 4 pairs of runs of A and B lack per-image numbers"),
        ({"images": "others"}, "4 of 4 pairs of runs of A and B were measured on other images"),
        ({"k": 10}, "Bounds of different K do not compare: A has K=50 and B K=10."),
        ({"data.limit": 4, "images": "others"}, "data.limit differs between the sweeps, so that their test images may"),
    ],
)
def test_what_cannot_be_compared_image_by_image_is_said(undrawn, tmp_path, options, sentence):
    a = sweep(tmp_path / "a", grid(-10, -11, -20, -21))
    b = sweep(tmp_path / "b", grid(-9, -10, -19, -20), **options)
    found = compare(read_sides([a, b]))
    (_, first), _ = of(found)
    assert first.value == 1.0 and first.over_seeds == Interval(1, 1, 2)
    assert (first.over_images is None) == ("images" in options)
    assert ("nll_iw50" in found.blocks[0].rows[0][1]) == ("k" not in options)
    assert any(note.startswith(sentence) for note in found.notes)
    assert sentence in Text(write_comparison(found)).text


def test_images_of_which_some_seed_has_none_have_no_interval_rather_than_one_of_the_others(tmp_path):
    a, b = sweep(tmp_path / "a", grid(-10, -11, -20, -21)), sweep(tmp_path / "b", grid(-9, -10, -19, -20))
    (b / "1.0-1" / "per_image-test.npz").unlink()
    found = compare(read_sides([a, b]))
    assert [d.over_images is None for _, d in of(found)] == [True, False]
    assert found.blocks[0].overall["elbo"].over_images is None
    assert found.notes[0].startswith("1 of 4 pairs")


def test_per_image_numbers_that_the_metrics_are_not_the_mean_of_are_left_out(tmp_path):
    a, b = sweep(tmp_path / "a", grid(-10, -11, -20, -21)), sweep(tmp_path / "b", grid(-9, -10, -19, -20))
    path = b / "1.0-0" / "per_image-test.npz"
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "elbo": arrays["elbo"] + 0.01})
    found = compare(read_sides([a, b]))
    assert of(found)[0][1].over_images is None and "In 1 of 4 pairs" in found.notes[0]


def test_one_seed_in_common_has_no_interval_over_seeds_and_the_report_says_so(tmp_path):
    a, b = sweep(tmp_path / "a", grid(-10, -20)), sweep(tmp_path / "b", grid(-9, -19))
    found = compare(read_sides([a, b]))
    assert all(d.over_seeds is None and d.over_images == Interval(1, 1, 4) for _, d in of(found))
    assert found.notes == ["B and A share one seed in each setting: one difference has no interval over seeds."]


# ---- what is refused ----


def prepared(tmp_path: Path, **options: Any) -> list[Path]:
    return [sweep(tmp_path / "a", grid(-10, -11)), sweep(tmp_path / "b", grid(-9, -10), **options)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"facts": {"data": "mnist"}},
            r"'.*a' is of digits and '.*b' of mnist: likelihoods compare only on the same images",
        ),
        ({"data.binarize": "dynamic"}, r"is of digits, binarize none and '.*b' of digits, binarize dynamic"),
        ({"facts": {"num_classes": 10}}, r"is of digits, given no labels and '.*b' of digits, given labels"),
        (
            {"objective.beta": 8.0},
            r"have no setting in common: objective.beta is 1, 4 in the first and 8 in the second",
        ),
        ({"seed": 7}, r"have settings in common, but no seed: 0 in the first and 7 in the second"),
        (
            {"state": "failed"},
            r"No run in '.*b' finished, so there is nothing to compare: 1.0-0: The loss stopped being",
        ),
    ],
)
def test_sweeps_that_do_not_compare_are_refused_in_a_sentence(tmp_path, capsys, options, sentence):
    folders = prepared(tmp_path, **options)
    with pytest.raises(SystemExit) as stop:
        main([str(folder) for folder in folders])
    error = capsys.readouterr().err
    assert stop.value.code == 1 and re.search(sentence, error) and error.count("\n") == 1
    assert not (folders[0] / "report").exists()


@pytest.mark.parametrize(
    ("folders", "sentence"),
    [
        (["a", "a", "a"], r"'.*a' is named three times"),
        (["a", "nowhere"], r"There is no folder '.*nowhere'"),
        (["a", "empty"], r"No runs in '.*empty'"),
        (["a", "b", "a", "b"], r"At most 3 sweeps are set side by side, and 4 are named"),
    ],
)
def test_folders_that_are_no_two_or_three_sweeps_are_refused_in_a_sentence(tmp_path, folders, sentence):
    prepared(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(VAEError, match=sentence):
        read_sides([tmp_path / name for name in folders])


def test_numbers_of_different_splits_are_refused(tmp_path):
    a, b = prepared(tmp_path)
    for path in b.glob("*/metrics.json"):
        path.write_text(path.read_text().replace("test/", "val/"))
    with pytest.raises(VAEError, match=r"test metrics in '.*a' and val metrics in '.*b': numbers of different splits"):
        read_sides([a, b])


def test_a_sweep_with_nothing_in_common_is_no_reason_to_leave_out_another(tmp_path):
    a, b = prepared(tmp_path, **{"objective.beta": 8.0})
    c = sweep(tmp_path / "c", grid(-8, -9))
    found = compare(read_sides([a, b, c]))
    assert [block.other for block in found.blocks] == [2]
    assert found.notes[0].startswith("B has no setting and seed in common with A")


# ---- form ----


def test_the_page_the_plots_and_the_csv_are_written_and_the_terminal_has_the_table(tmp_path, capsys):
    a, b = sweep(tmp_path / "a<b>", grid(-10, -11, -20, -21)), sweep(tmp_path / "b", grid(-9, -10, -19, -22))
    out = tmp_path / "out"
    main([str(a), str(b), "--out", str(out)])
    printed = capsys.readouterr().out
    assert re.search(r"beta 1 +2 +−10\.50 +−9\.50 +\+1\.00 +\[\+1\.00, \+1\.00\] +\[\+1\.00, \+1\.00\]", printed)
    assert sorted(path.name for path in (out / "plots").iterdir()) == ["elbo_B_digits.png", "nll_iw50_B_digits.png"]
    page = (out / "index.html").read_text()
    assert (
        "<b>" not in page
        and page.count("<svg") == 2
        and set(re.findall(r"https?://[\w.]+", page)) <= {"http://www.w3.org"}
    )
    with (out / "differences.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = next(row for row in rows if row["metric"] == "elbo")
    assert (first["objective.beta"], first["n_seeds"]) == ("1.0", "2")
    assert float(first["difference"]) == float(first["images_low"]) == 1
    assert {row["metric"] for row in rows} == {"elbo", "rate", "distortion", "nll_iw50"}


def test_the_folder_of_one_sweeps_report_is_not_for_out(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main([str(sweep(tmp_path / "a", grid(-1, -2))), "--out", str(tmp_path / "out")])
    assert "--out is for a report on several sweeps" in capsys.readouterr().err


def test_signs_and_marks():
    assert [signed(v, 2) for v in (0.0, 0.5, -0.5, 0.001, -0.001, math.nan)] == [
        "0",
        "+0.50",
        "−0.50",
        "0.00",
        "0.00",
        "nan",
    ]
    elbo, nll, rate = (
        Measured(name, name, "", 2, better) for name, better in (("e", "higher"), ("n", "lower"), ("r", None))
    )
    up = Difference(0, 0, 1.0, 3, Interval(0.5, 1.5, 3), None)
    down = Difference(0, 0, -1.0, 3, Interval(-1.5, -0.5, 3), None)
    assert [verdict(up, m) for m in (elbo, nll, rate)] == ["better", "worse", ""]
    assert [verdict(down, m) for m in (elbo, nll, rate)] == ["worse", "better", ""]
    assert verdict(Difference(0, 0, 1.0, 3, Interval(-0.1, 2.1, 3), None), elbo) == ""
