"""Hydra's grammar read as a search space."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from vae.engine.samplers import from_unit
from vae.engine.space import as_text, search_space
from vae.errors import VAEError

pytest.importorskip("optuna")
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution


def space(*lines):
    return search_space(OverridesParser.create().parse_overrides(list(lines)))


@pytest.mark.parametrize(
    ("text", "drawn_from"),
    [
        ("interval(1e-4,1e-2)", FloatDistribution(1e-4, 1e-2)),
        ("interval(1,5)", FloatDistribution(1.0, 5.0)),
        ("int(interval(1,5))", IntDistribution(1, 5)),
        ("tag(log, interval(1e-4,1e-2))", FloatDistribution(1e-4, 1e-2, log=True)),
        ("tag(log, int(interval(1,100)))", IntDistribution(1, 100, log=True)),
        ("range(1,9)", IntDistribution(1, 8)),
        ("range(9)", IntDistribution(0, 8)),
        ("range(1,10,4)", IntDistribution(1, 9, step=4)),
        ("range(10,1,-4)", IntDistribution(2, 10, step=4)),
        ("tag(log, range(1,9))", IntDistribution(1, 8, log=True)),
        ("range(0.1,0.5,0.1)", FloatDistribution(0.1, 0.4, step=0.1)),
        ("choice(2,4,8)", CategoricalDistribution(["2", "4", "8"])),
        ("2,4,2", CategoricalDistribution(["2", "4"])),
        ("choice([4,2],'a b',true)", CategoricalDistribution(["[4,2]", r"a\ b", "True"])),
    ],
)
def test_the_grammar_means_what_hydra_would_try_and_all_between_where_it_is_an_interval(text, drawn_from):
    assert space(f"a.b={text}", "c=1") == {"a.b": drawn_from}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("interval(2,1)", "is empty"),
        ("range(3,1)", "is empty"),
        ("interval(0,inf)", "must be finite"),
        ("tag(log, interval(0,1))", "a logarithm needs numbers above 0"),
        ("tag(log, range(1,9,2))", "in steps of 1"),
        ("tag(log, choice(1,2))", "the only tag of a search space is log"),
        ("tag(ordered, interval(1,2))", "the only tag of a search space is log"),
        ("shuffle(range(1,9))", "nothing to shuffle"),
    ],
)
def test_what_is_no_space_is_told(text, said):
    with pytest.raises(VAEError, match=said):
        space(f"a.b={text}")


def test_a_search_over_seeds_and_over_nothing_is_refused():
    with pytest.raises(VAEError, match="the luckiest"):
        space("seed=0,1,2", "a=1,2")
    with pytest.raises(VAEError, match="nothing to search over"):
        space("seed=0", "a=1")


def test_the_order_of_the_command_line_means_nothing():
    assert list(space("b=1,2", "a=interval(0,1)")) == list(space("a=interval(0,1)", "b=1,2")) == ["a", "b"]


def test_a_value_is_written_as_a_person_would():
    assert as_text(0.1 + 2 * 0.1, FloatDistribution(0.1, 0.4, step=0.1)) == "0.3"
    assert as_text(0.1 + 2 * 0.1, FloatDistribution(0.1, 0.4)) == "0.30000000000000004"
    assert as_text("'a b'", CategoricalDistribution(["'a b'"])) == "'a b'"


@pytest.mark.parametrize(
    ("one", "low", "middle", "high"),
    [
        (FloatDistribution(1.0, 3.0), 1.0, 2.0, 3.0),
        (FloatDistribution(1e-4, 1.0, log=True), 1e-4, 1e-2, 1.0),
        (FloatDistribution(0.0, 1.0, step=0.25), 0.0, 0.5, 1.0),
        (IntDistribution(1, 9, step=4), 1, 5, 9),
        (IntDistribution(1, 3), 1, 2, 3),
        (IntDistribution(1, 100, log=True), 1, 7, 100),
        (CategoricalDistribution(["a", "b", "c"]), "a", "b", "c"),
    ],
)
def test_quantiles_go_from_the_first_value_to_the_last(one, low, middle, high):
    assert [from_unit(u, one) for u in (0.0, 0.5, 1 - 1e-12)] == (
        [low, middle, high] if isinstance(low, str) else pytest.approx([low, middle, high])
    )
