"""An experiment is measured once, judged from its written results alone, and goes on where it was cut off."""

from __future__ import annotations

import importlib
import itertools
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml

from vae.cli import CONFIGS, duration
from vae.errors import VAEError
from vae.experiment import Context
from vae.report import page
from vae.report.runs import flatten
from vae.reproduce import FIGURE_BYTES, Experiment, _draw, first_source, main, markdown, names

CHECKOUT = Path(__file__).resolve().parent.parent
NUMBERS = itertools.count()

PROTOCOL = '''
"""Two pieces, and a diary of what was really computed."""
from pathlib import Path

DIARY = Path({diary!r})
PAPER = ("Nobody 2026, "
         "On sums")
CLAIM = "One and two is three."
SETTINGS = {{"quick": {{"second": 2}}, "full": {{"second": 20}}}}

def piece(value):
    DIARY.open("a").write(f"{{value}}\\n")
    return {{"value": value, "pair": (1, 2)}}

def measure(context):
    first = context.cached("first", lambda: piece(1))
    if DIARY.with_name("pull-the-plug").exists():
        raise KeyboardInterrupt
    second = context.cached("second", lambda: piece(context.settings["second"]))
    return {{"sum": first["value"] + second["value"], "pair": first["pair"]}}
'''
CLAIMS = """
from vae.claims import Claim, Table, within

def claims(results):
    return [Claim.of("sum", str(results["sum"]), "{1:g}", within(results["sum"], 0, 3)),
            Claim("a pair is a list", results["pair"] == [1, 2], str(results["pair"]), "[1, 2]")]

def table(results):
    return Table(("", "paper", "ours"), [("sum", "3", str(results["sum"]))])
"""
FIGURE = """
import matplotlib.pyplot as plt

def figure(results):
    fig, ax = plt.subplots()
    ax.plot([0, results["sum"]])
    return fig
"""


def write(folder: Path, diary: Path, more: str = "") -> None:
    """An experiment's three files; more: what its protocol says besides."""
    folder.mkdir(parents=True)
    (folder / "protocol.py").write_text(PROTOCOL.format(diary=str(diary)) + more)
    (folder / "claims.py").write_text(CLAIMS)
    (folder / "figure.py").write_text(FIGURE)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A checkout with one experiment in it: (its Experiment, the lines of its diary, a folder for messages to it)."""
    name = f"fake_{next(NUMBERS)}"
    diary = tmp_path / "diary"
    diary.touch()
    write(tmp_path / "experiments" / name, diary)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Experiment(name, tmp_path), lambda: diary.read_text().split(), tmp_path


def edit(experiment: Experiment, old: str, new: str) -> None:
    """Change the source of an experiment as an author would between two commands."""
    path = experiment.checkout / "experiments" / experiment.name / "protocol.py"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    module = experiment.module("protocol")
    for cached in path.parent.glob("__pycache__/*"):
        cached.unlink()
    importlib.reload(module)


def read(experiment: Experiment, name: str, form: str = "quick") -> dict:
    return json.loads((experiment.results_folder(form) / name).read_text())


def test_results_are_measured_once_and_judged_again_at_each_call(fake):
    experiment, diary, checkout = fake
    assert main([experiment.name, "--quick"], checkout) == 0
    assert diary() == ["1", "2"]
    record = read(experiment, "results.json")
    assert record["results"] == {"sum": 3, "pair": [1, 2]}
    assert record["settings"]["settings"] == {"second": 2}
    assert {"date", "device", "versions", "command", "seconds"} < set(record)
    assert (experiment.results_folder("quick") / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert main([experiment.name, "--quick"], checkout) == 0
    assert diary() == ["1", "2"]
    assert read(experiment, "results.json") == record


def test_lists_of_numbers_take_one_line_and_read_back_the_same(fake):
    experiment, _, checkout = fake
    edit(
        experiment, 'return {"sum":', 'return {"curve": [[1, -2.5e-7], [float("inf"), 4]], "words": "[ 1,  2 ]", "sum":'
    )
    main([experiment.name, "--quick"], checkout)
    assert read(experiment, "results.json")["results"]["curve"] == [[1, -2.5e-7], [float("inf"), 4]]
    assert read(experiment, "results.json")["results"]["words"] == "[ 1,  2 ]"
    assert "[1, -2.5e-07]" in (experiment.results_folder("quick") / "results.json").read_text()


def test_a_part_is_measured_again_only_if_its_own_settings_changed(fake):
    experiment, diary, checkout = fake
    edit(experiment, '"full": {"second": 20}', '"full": {"first": 1, "second": 2}')
    edit(
        experiment,
        "def measure(context):\n",
        "def measure(context):\n"
        '    parts = {key: context.part(key, [key], lambda: piece(context.settings[key])) for key in ("first", "second")}\n'
        '    return {"sum": sum(part["value"] for part in parts.values()), "pair": [1, 2], **parts}\n\n'
        "def unused(context):\n",
    )
    assert main([experiment.name], checkout) == 0
    assert diary() == ["1", "2"]
    made = read(experiment, "results.json", "full")["parts"]
    assert made["first"]["settings"]["settings"] == {"first": 1}
    edit(experiment, '"second": 2}}', '"second": 3}}')
    main([experiment.name], checkout)
    assert diary() == ["1", "2", "3"]
    record = read(experiment, "results.json", "full")
    assert (record["results"]["sum"], record["results"]["first"]) == (4, {"value": 1, "pair": [1, 2]})
    assert record["parts"]["first"] == made["first"]
    main([experiment.name, "--again"], checkout)
    assert diary() == ["1", "2", "3", "1", "3"]


def test_a_part_that_was_measured_on_another_day_says_so(fake):
    experiment, _, checkout = fake
    edit(
        experiment, "    first = context.cached(", '    context.part("old", [], lambda: 1)\n    first = context.cached('
    )
    main([experiment.name, "--quick"], checkout)
    assert "; of it" not in markdown(experiment, "quick")
    path = experiment.results_folder("quick") / "results.json"
    record = json.loads(path.read_text())
    record["parts"]["old"] |= {"date": "2026-01-02T03:04:05+00:00", "seconds": 7200.0}
    path.write_text(json.dumps(record))
    assert "; of it `old` on 2026-01-02, 2 h 00 min.\n" in markdown(experiment, "quick")


def test_a_failed_claim_is_exit_code_1_and_is_written_down(fake):
    experiment, _, checkout = fake
    assert main([experiment.name], checkout) == 1  # in the full form the sum is 21
    verdicts = read(experiment, "verdicts.json", "full")
    assert (verdicts["held"], verdicts["of"]) == (1, 2)
    assert verdicts["claims"][0] == {"name": "sum", "holds": False, "measured": "21", "target": "3"}


def test_verdicts_follow_from_results_json_alone(fake):
    experiment, diary, checkout = fake
    main([experiment.name, "--quick"], checkout)
    path = experiment.results_folder("quick") / "results.json"
    record = json.loads(path.read_text())
    record["results"]["sum"] = 4
    path.write_text(json.dumps(record))
    assert main([experiment.name, "--quick"], checkout) == 1
    assert read(experiment, "verdicts.json")["claims"][0]["measured"] == "4"
    assert diary() == ["1", "2"]


def test_a_measure_that_was_cut_off_goes_on_from_its_pieces(fake):
    experiment, diary, checkout = fake
    plug = checkout / "pull-the-plug"
    plug.touch()
    assert main([experiment.name, "--quick"], checkout) == 130
    assert diary() == ["1"]
    assert not experiment.results_folder("quick").exists()
    plug.unlink()
    assert main([experiment.name, "--quick"], checkout) == 0
    assert diary() == ["1", "2"]


def test_changed_settings_make_results_and_pieces_stale(fake):
    experiment, diary, checkout = fake
    main([experiment.name, "--quick"], checkout)
    edit(experiment, '"second": 2}', '"second": 5}')
    assert main([experiment.name, "--quick"], checkout) == 1
    assert read(experiment, "results.json")["results"]["sum"] == 6
    assert diary() == ["1", "2", "1", "5"]


def test_again_measures_anew(fake):
    experiment, diary, checkout = fake
    main([experiment.name, "--quick"], checkout)
    main([experiment.name, "--quick", "--again"], checkout)
    assert diary() == ["1", "2", "1", "2"]


def test_the_list_tells_the_last_verdicts_and_cost(fake, capsys):
    experiment, _, checkout = fake
    main([experiment.name, "--quick"], checkout)
    capsys.readouterr()
    assert main(["--list", "--markdown"], checkout) == 0
    row = capsys.readouterr().out.splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[1:6:2]] == [experiment.name, "not yet run", ""]
    assert "2 of 2, " in row and "Nobody 2026, On sums" in row


def test_the_list_fits_a_terminal_of_80_columns_and_cuts_no_name(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--list"], CHECKOUT) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[2:]] == names(CHECKOUT)  # a line each
    start = lines[0].index("quick")
    assert all(line[start - 1] == " " != line[start] for line in lines[2:])  # words: aligned to the left


def test_a_duration_is_said_alike_in_reports_and_verdicts():
    assert [duration(s) for s in (9.46, 42, 99.4, 140, 5940, 12_000)] == [
        "9.5 s",
        "42 s",
        "99 s",
        "3 min",
        "99 min",
        "3 h 20 min",
    ]
    assert page.duration is duration


def test_a_list_names_the_first_author_and_year_of_what_is_rerun():
    assert first_source("Hinton, Vinyals & Dean 2015, section 3") == "Hinton 2015"
    assert first_source("Bishop 2006, figures 10.2; Minka 2005") == "Bishop 2006"
    assert first_source("Alemi et al. 2018, Fixing a broken ELBO; Burgess et al. 2018") == "Alemi 2018"
    assert first_source("No one paper's table; as in Hoffman & Johnson 2016") == "Hoffman 2016"


def test_no_config_of_a_quick_form_is_without_effect():
    for path in sorted(Path(CONFIGS, "experiment").glob("*_quick.yaml")):
        base = path.with_name(path.name.replace("_quick", ""))
        quick, full = (flatten(yaml.safe_load(config.read_text())) for config in (path, base))
        assert any(full.get(key) != value for key, value in quick.items() if key != "defaults"), path.name


def test_all_experiments_have_their_turn_though_one_cannot_be_run(fake, capsys):
    experiment, diary, checkout = fake
    write(
        checkout / "experiments" / "a_broken_one",
        checkout / "diary",
        "import torch\nfrom vae.errors import VAEError\ndef measure(context):\n"
        "    torch.set_num_threads(torch.get_num_threads() + 1)\n    raise VAEError('The data are gone.')\n",
    )
    threads = torch.get_num_threads()
    assert main(["all", "--quick"], checkout) == 1
    assert diary() == ["1", "2"]
    assert torch.get_num_threads() == threads
    out, err = capsys.readouterr()
    assert "Error: The data are gone." in err and "All claims hold in 1 of 2 experiments." in out
    with pytest.raises(SystemExit):  # before any is begun
        main([experiment.name, "unknown", "--quick", "--again"], checkout)
    assert diary() == ["1", "2"]


def test_markdown_is_for_a_readme(fake, capsys):
    experiment, _, checkout = fake
    main([experiment.name, "--quick"], checkout)
    capsys.readouterr()
    main([experiment.name, "--quick", "--markdown"], checkout)
    out = capsys.readouterr().out
    assert out.startswith("|  | paper | ours |\n| --- | ---: | ---: |\n| sum | 3 | 3 |\n")
    assert "| pass | sum | 3 | 3 |" in out


def test_the_readme_shows_the_results_between_its_marks(fake, capsys):
    experiment, _, checkout = fake
    readme = checkout / "experiments" / experiment.name / "README.md"
    readme.write_text(
        "before\n<!-- quick -->\nan old number\n<!-- /quick -->\nafter\n<!-- full -->\nnot run\n<!-- /full -->\n"
    )
    main([experiment.name, "--quick"], checkout)
    text = readme.read_text()
    assert "| sum | 3 | 3 |" in text and "an old number" not in text
    assert text.startswith("before\n<!-- quick -->") and text.endswith(
        "after\n<!-- full -->\nnot run\n<!-- /full -->\n"
    )
    main([experiment.name, "--quick"], checkout)
    assert readme.read_text() == text


@pytest.mark.slow
def test_a_run_is_trained_once_and_is_the_same_however_many_are_side_by_side(tmp_path):
    tiny = ["data.limit=64", "data.batch_size=32", "trainer.max_epochs=1", "evaluation.nll_samples=0"]
    tiny += ["callbacks=minimal", "logger=none", "network.hidden=[4]", "model.latent_dim=2", "trainer.accelerator=cpu"]
    lines = []
    context = Context(quick=True, folder=tmp_path / "one", jobs=1, say=lines.append)
    folder = context.train([*tiny, "objective.beta=2"], "beta=2")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test/elbo"] == pytest.approx(-(metrics["test/rate"] + metrics["test/distortion"]), abs=1e-4)
    written = (folder / "metrics.json").stat().st_mtime_ns
    context.train([*tiny, "objective.beta=2"], "beta=2")
    assert (folder / "metrics.json").stat().st_mtime_ns == written
    assert [line.split(",")[0] for line in lines] == ["beta=2: trained", "beta=2: trained before"]

    pair = Context(quick=True, folder=tmp_path / "two", jobs=2)
    folders = pair.train_many({f"beta={beta}": [*tiny, f"objective.beta={beta}"] for beta in (1, 2)})
    beside = json.loads((folders["beta=2"] / "metrics.json").read_text())
    assert {k: v for k, v in beside.items() if "seconds" not in k} == {
        k: v for k, v in metrics.items() if "seconds" not in k
    }


@pytest.mark.slow
def test_a_run_of_an_experiment_is_of_one_config_from_its_start(tmp_path):
    """Where another command would go on for longer, or leave a finished run unmeasured, a published number must not."""
    tiny = ["data.limit=64", "data.batch_size=32", "lr_schedule=cosine", "threads=1", "trainer.accelerator=cpu"]
    tiny += ["callbacks=minimal", "logger=none", "network.hidden=[4]", "model.latent_dim=2"]

    def metrics(name, *overrides):
        folder = Context(quick=True, folder=tmp_path).train([*tiny, *overrides], name)
        found = json.loads((folder / "metrics.json").read_text())
        return {key: value for key, value in found.items() if "seconds" not in key}

    short = ["trainer.max_epochs=1", "evaluation.nll_samples=3"]
    longer = ["trainer.max_epochs=2", "evaluation.nll_samples=3"]
    metrics("one", *short)
    assert metrics("one", *longer) == metrics("fresh", *longer)
    assert "test/nll_iw4" in metrics("one", *longer, "evaluation.nll_samples=4")


def test_away_from_a_checkout_a_sentence_says_where_experiments_are(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["linear_vae_ppca"], tmp_path)
    assert ended.value.code == 1
    assert "clone the repository" in capsys.readouterr().err
    with pytest.raises(VAEError, match="clone the repository"):
        Experiment("linear_vae_ppca", tmp_path)


def test_an_unknown_name_is_answered_with_the_known_ones(fake):
    experiment, _, checkout = fake
    with pytest.raises(VAEError, match=f"choose from {experiment.name}"):
        Experiment("unknown", checkout)


def test_listing_does_not_wait_for_torch(fake):
    _, _, checkout = fake
    code = "import sys, vae.reproduce; vae.reproduce.main(['--list']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)


COMMITTED = [(name, form) for name in names(CHECKOUT) for form in ("quick", "full")]


@pytest.mark.parametrize(("name", "form"), COMMITTED)
def test_committed_verdicts_are_those_of_the_committed_results(name, form):
    experiment = Experiment(name, CHECKOUT)
    folder = experiment.results_folder(form)
    if not (folder / "results.json").is_file():
        pytest.skip(f"the {form} form has not been run yet")
    record = json.loads((folder / "results.json").read_text())
    claims = [asdict(claim) for claim in experiment.module("claims").claims(record["results"])]
    assert claims == json.loads((folder / "verdicts.json").read_text())["claims"]
    assert record["settings"] == experiment.settings(form), "the settings have changed since: run it again"
    readme = CHECKOUT / "experiments" / name / "README.md"
    if readme.is_file() and f"<!-- {form} -->" in readme.read_text():
        assert markdown(experiment, form) in readme.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), COMMITTED)
def test_the_figure_can_be_drawn_from_the_committed_results(name, form, tmp_path):
    experiment = Experiment(name, CHECKOUT)
    path = experiment.results_folder(form) / "results.json"
    if not path.is_file():
        pytest.skip(f"the {form} form has not been run yet")
    _draw(experiment.module("figure"), json.loads(path.read_text())["results"], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size <= FIGURE_BYTES


#: Those of one or two minutes; the others' quick forms take up to a quarter of an hour each: `make reproduce`.
SHORT = (
    "distillation_hinton2015",
    "kl_directions",
    "linear_vae_ppca",
    "rate_control",
    "reward_overoptimisation",
    "rlhf_reward_hacking",
    "what_the_kl_term_does",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_the_quick_form_bears_out_what_it_did_before(name, tmp_path, data_dir):
    from vae.reproduce import reproduce

    """One seed rounded otherwise, on another processor, may also miss what the full form misses with several."""
    results = CHECKOUT / "experiments" / name / "results"
    committed = {path.parent.name: json.loads(path.read_text())["claims"] for path in results.glob("*/verdicts.json")}
    claims = reproduce(Experiment(name, CHECKOUT, outputs=tmp_path), "quick")
    assert [claim.name for claim in claims] == [claim["name"] for claim in committed["quick"]]
    missed = {claim["name"] for of_form in committed.values() for claim in of_form if not claim["holds"]}
    assert {claim.name for claim in claims if not claim.holds} <= missed
