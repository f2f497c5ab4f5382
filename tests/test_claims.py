"""A claim's threshold stands once: it decides the verdict and is what the target shows."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from vae.claims import (
    Bound,
    Claim,
    Gain,
    Limit,
    Table,
    above,
    at_least,
    at_most,
    below,
    between,
    listed,
    mean,
    mean_and_error,
    near,
    ordered,
    spread,
    values,
    within,
)
from vae.errors import VAEError

CLAIMS = sorted(Path(__file__).resolve().parents[1].glob("experiments/*/claims.py"))


@pytest.mark.parametrize(
    ("bound", "holds", "misses"),
    [
        (lambda v: below(v, 2.0), [1.9, -5], [2.0, 2.1, math.nan]),
        (lambda v: at_most(v, 2.0), [2.0, 1.9], [2.1, math.nan]),
        (lambda v: above(v, 2.0), [2.1, math.inf], [2.0, 1.9, math.nan]),
        (lambda v: at_least(v, 2.0), [2.0, 2.1], [1.9, math.nan]),
        (lambda v: between(v, 2.0, 3.0), [2.0, 2.5, 3.0], [1.9, 3.1, math.nan]),
        (lambda v: within(v, 0.5, 2.0), [1.5, 2.0, 2.5], [1.4, 2.6, math.nan]),
        (lambda v: near(v, 0.25, 4.0), [3.0, 4.0, 5.0], [2.9, 5.1, math.nan]),
    ],
)
def test_a_bound_holds_up_to_its_threshold_and_of_every_seed(bound, holds, misses):
    assert all(bound(value).holds for value in holds)
    assert not any(bound(value).holds for value in misses)
    assert bound(holds).holds and bound(np.array(holds)).holds and bound(iter(holds)).holds
    assert not any(bound([*holds, value]).holds for value in misses)
    assert not bound([]).holds  # nothing measured bears nothing out


def test_rows_are_ordered_in_every_seed_or_not_at_all():
    assert ordered(1, 2, 3).holds and ordered([1, 5], [2, 6]).holds
    assert not ordered(1, 1).holds and not ordered([1, 5], [2, 5]).holds and not ordered([1, 5], [2, 4]).holds
    assert not ordered(1, math.nan).holds and not ordered(1).holds
    with pytest.raises(ValueError, match="zip"):  # a seed is missing
        ordered([1, 2], [3])


def test_one_number_makes_the_verdict_and_its_wording():
    for limit, holds, target in ((0.02, True, "within 2%"), (0.01, False, "within 1%")):
        assert Claim.of("curve", "1.5%", "within {:.0%}", below(0.015, limit)) == Claim("curve", holds, "1.5%", target)
    claim = Claim.of("both", "...", "{1:g} within {0}, above {2:words}", within(100, 1.5, 99.2), above(0.4, 1 / 3))
    assert (claim.holds, claim.target) == (True, "99.2 within 1.5, above a third")
    assert not Claim.of("one of two", "", "", below(1, 2), below(3, 2)).holds
    assert not Claim.of("none", "", "").holds
    assert Claim.of("a numpy number", "", "", above(np.float32(2), 1)).holds is True


def test_thresholds_are_written_as_people_do():
    assert [f"{Limit(x):g}" for x in (1e-9, 0.05, 500, 1e-06)] == ["1e-9", "0.05", "500", "1e-6"]
    assert [f"{Limit(x):words}" for x in (0.5, 1 / 3, 3)] == ["half", "a third", "three"]
    with pytest.raises(KeyError):
        f"{Limit(0.7):words}"


@pytest.mark.parametrize("path", CLAIMS, ids=lambda path: path.parent.name)
def test_no_claim_of_an_experiment_writes_a_threshold_into_its_words(path):
    """The bounds of Claim.of hold the numbers; of its target they fill the fields."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "Claim", f"{path.parent.name}, line {node.lineno}: a claim is made by Claim.of"
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "Claim.of" and len(node.args) > 3):
            continue
        limits = [
            part.value
            for bound in node.args[3:]
            for part in ast.walk(bound)
            if isinstance(part, ast.Constant) and isinstance(part.value, (int, float)) and part.value not in (0, 1, 2)
        ]
        words = ast.unparse(node.args[2])
        for limit in limits:
            assert not {f"{limit:g}", f"{limit:.0%}"} & set(words.replace("'", " ").replace('"', " ").split()), words


def test_a_gain_is_paired_by_image_and_by_seed():
    models = {
        "plain": {"nll": [90.0, 90.2], "nll_of_images": [60.0, 90.0, 120.3]},
        "better": {"nll": [89.0, 88.8], "nll_of_images": [59.0, 88.5, 119.0]},
    }
    gain = Gain.of(models, "plain", "better")
    assert gain.mean == pytest.approx(1.2) and gain.seeds == pytest.approx([1.0, 1.4])
    assert gain.se == pytest.approx(np.std([1.0, 1.5, 1.3], ddof=1) / math.sqrt(3))  # not of the images' own spread
    assert str(gain) == "1.20 ± 0.15 nats (s.e., paired images); seeds 1.00, 1.40"
    assert gain.exceeds(1.0, 3) == Bound(True, (1.0, 3.0))
    assert not gain.exceeds(1.3, 3).holds and not gain.exceeds(1.0, 9).holds
    assert Gain.of(models, "plain", "absent") is None


def test_numbers_over_seeds():
    runs = [{"rate": 1.0}, {"rate": 2.0}, {"rate": 6.0}]
    assert values(runs, "rate") == [1.0, 2.0, 6.0] and mean(runs, "rate") == 3.0
    assert mean_and_error([1.0, 3.0, 5.0]) == {"mean": 3.0, "se": pytest.approx(2 / math.sqrt(3))}
    assert math.isnan(mean_and_error([1.0])["se"])
    assert listed([1, 2.345]) == "1.00, 2.35" and listed([0.5, 1], ".0%", " < ") == "50% < 100%"


def test_spread_is_mean_and_sample_deviation():
    assert spread([1.0, 2.0, 3.0], 1) == "2.0 ± 1.0"
    assert spread([2.5]) == "2.50"


def test_a_table_with_a_short_row_is_refused():
    with pytest.raises(VAEError, match="needs 2 cells"):
        Table(("a", "b"), [("1",)])


def test_fixed_columns_are_not_cut_in_a_narrow_terminal():
    table = Table(("name", "words"), [("a_name_that_has_to_be_typed", "some words " * 9)], fixed=1)
    console = Console(width=40)
    with console.capture() as printed:
        table.print(console)
    lines = printed.get().splitlines()
    assert any("a_name_that_has_to_be_typed" in line for line in lines) and max(map(len, lines)) <= 40
