"""The report on a search made by hand, whose history, front and pruned trials are known."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from rich.console import Console

from vae.report import print_table, read_sweep, write_report
from vae.report.search import draw_search, drawn_value, read_search
from vae.report.tables import tally

VALUES = [-30.0, None, -25.0, None, -28.0]  # trial 1 was pruned, trial 3 failed
STATES = ["finished", "pruned", "finished", "failed", "finished"]


def make_search(folder, values=VALUES, states=STATES, **others: Any):
    """A sweep's folder with a run per trial, and search.json."""
    trials = []
    for number, (value, state) in enumerate(zip(values, states, strict=True)):
        beta = float(number + 1)
        run = folder / f"objective.beta={beta}"
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump({"objective": {"beta": beta}, "seed": 0}))
        (run / "overrides.yaml").write_text(yaml.safe_dump([f"objective.beta={beta}"]))
        (run / "status.json").write_text(
            json.dumps({"state": state, "reason": "Pruned <b>." if value is None else None})
        )
        if value is not None:
            metrics = {"test/elbo": -20.0 - number, "test/rate": 5.0, "test/distortion": 15.0 + number}
            (run / "metrics.json").write_text(json.dumps(metrics))
        listed = None if value is None else list(value) if isinstance(value, tuple) else [value]
        steps = {"1": -50.0, "2": -45.5} if state == "pruned" else {}
        parameters = {"objective.beta": beta, "network": "'<i>'"}
        trials.append(
            {
                "number": number,
                "state": state,
                "values": listed,
                "steps": steps,
                "folder": run.name,
                "parameters": parameters,
            }
        )
    found = {
        "metrics": ["val/best_elbo"],
        "directions": ["maximize"],
        "sampler": "tpe",
        "pruner": "median",
        "best": [2],
    }
    found |= {"importance": {"val/best_elbo": {"objective.beta": 0.9, "network": 0.1}}, "trials": trials}
    (folder / "search.json").write_text(json.dumps({**found, **others}))
    return folder


def test_the_history_is_in_order_of_the_trials_and_the_best_so_far_never_worsens(tmp_path):
    search = read_search(read_sweep(make_search(tmp_path)))
    assert search.so_far() == [(0, -30.0), (2, -25.0), (4, -25.0)]
    assert search.tally() == "5 trials: 3 finished, 1 pruned, 1 failed"
    assert search.best_in_words() == "the best is trial 2, val/best_elbo -25, with objective.beta 3, network '<i>'"
    assert search.trials[1].last == (2, -45.5)
    assert [trial.run.name for trial in search.trials] == [f"objective.beta={n}.0" for n in range(1, 6)]


def test_least_is_best_where_it_is_to_be_minimized(tmp_path):
    search = read_search(read_sweep(make_search(tmp_path, directions=["minimize"], best=[0])))
    assert search.so_far() == [(0, -30.0), (2, -30.0), (4, -30.0)]


def test_a_pruned_run_is_neither_a_result_nor_a_failure(tmp_path):
    sweep = read_sweep(make_search(tmp_path, states=["finished", "pruned", "finished", "pruned", "finished"]))
    assert sweep.complete and sweep.failed == () and len(sweep.finished) == 3
    assert tally(sweep) == "5 runs: 3 finished, 2 pruned"
    console = Console(width=200)
    with console.capture() as said:
        print_table(sweep, console)
    assert "5 runs: 3 finished, 2 pruned" in said.get() and "Pruned" not in said.get()
    failed = read_sweep(make_search(tmp_path / "other"))
    assert not failed.complete and [run.state for run in failed.failed] == ["failed"]


def test_the_page_has_the_trials_and_their_plots_escaped_in_one_file(tmp_path):
    page = write_report(make_search(tmp_path)).read_text()
    assert "A search with tpe and median pruning, 5 trials: 3 finished, 1 pruned, 1 failed" in page
    section = page[page.index('id="search"') :].partition("</section>")[0]
    assert re.findall(r'<tr class="(\w*)">\n<td data-sort="(\d)"><a href="#run-(\d)">', section) == [
        ("best" if number == "2" else "", number, number) for number in "01234"
    ]
    assert "after epoch 2 at −45.50" in page
    assert "<i>" not in page and "<b>" not in page
    assert {path.name for path in (tmp_path / "report" / "plots").glob("search*")} == {
        "search_history.png",
        "search_importance.png",
    }
    assert "90%" in page and "(fANOVA)" in page


def test_two_metrics_have_a_front(tmp_path):
    values = [(1.0, 9.0), (2.0, 8.0), (3.0, 8.5)]
    both = {"metrics": ["val/best_rate", "val/best_distortion"], "directions": ["minimize"] * 2, "best": [0, 1]}
    folder = make_search(tmp_path, values, ["finished"] * 3, importance={}, **both)
    sweep = read_sweep(folder)
    search = read_search(sweep)
    assert search.best_in_words() == "the front of val/best_rate and val/best_distortion is trials 0, 1"
    plots = draw_search(sweep, search)
    names = ["search_history_val_best_rate", "search_history_val_best_distortion", "search_front"]
    assert [plot.name for plot in plots] == names
    assert [plot.svg.count("<a ") for plot in plots] == [3, 3, 3]  # each point leads to its run


@pytest.mark.parametrize(
    "damage",
    ["[]", "{", '{"trials": [{}]}', '{"trials": [], "metrics": 3}'],
)
@pytest.mark.slow
def test_a_damaged_summary_costs_its_section_alone(damage, tmp_path):
    make_search(tmp_path)
    (tmp_path / "search.json").write_text(damage)
    assert read_search(read_sweep(tmp_path)) is None
    assert 'id="search"' not in write_report(tmp_path).read_text()


@pytest.mark.parametrize("others", [{"best": [1]}, {"best": [7]}, {"metrics": ["a", "b"]}])
def test_a_summary_that_contradicts_itself_is_damaged(others, tmp_path):
    assert read_search(read_sweep(make_search(tmp_path, **others))) is None


def test_values_are_shown_as_they_are_typed():
    assert [drawn_value(value) for value in (0.25, 3, "'a b'", "mlp", "2")] == ["0.25", "3", "a b", "mlp", "2"]
