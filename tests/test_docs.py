"""README and docs: pages are current, pictures are of the sweep they are said to be, every snippet runs."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from commands import run
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object
from omegaconf import OmegaConf

from vae.cli import CONFIGS
from vae.engine.fitted_priors import fit_prior
from vae.engine.measuring import measure
from vae.engine.per_image import set_aside
from vae.engine.run import load, train

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def snippets(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of tiny digits, in the folder of a sweep."""
    folder = tmp_path_factory.mktemp("sweep") / "model.latent_dim=3"
    small = ["data.limit=64", "data.batch_size=32", "trainer.max_epochs=1", "evaluation.nll_samples=5", "threads=1"]
    small += [
        "trainer.accelerator=cpu",
        "callbacks=minimal",
        "logger=none",
        "network.hidden=[16]",
        "model.latent_dim=3",
    ]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", small)
    train(config, folder, small, progress_bar=False)
    return folder


def test_generated_pages_are_what_the_code_makes_of_them():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = [name for name, make in generate.PAGES.items() if (ROOT / "docs" / name).read_text() != make()]
    assert not stale, "run `make docs`"


def test_the_pictures_are_of_the_sweep_that_the_readme_runs():
    swept = yaml.safe_load((ROOT / "conf" / "experiment" / "digits_sweep.yaml").read_text())["hydra"]["sweeper"][
        "params"
    ]
    grid = product(*[[f"{key}={value}" for value in str(values).split(",")] for key, values in swept.items()])
    made = json.loads((ROOT / "docs" / "pictures.json").read_text())
    assert sorted(made["runs"]) == sorted(",".join(run) for run in grid)
    assert {made["reconstructions"], made["latent_grid"]} <= set(made["runs"])


@pytest.mark.parametrize("page", ["README.md", "docs/first_steps.md"])
def test_the_snippets_that_load_a_run_do(page, finished, monkeypatch):
    pytest.importorskip("pandas")
    for code in snippets(ROOT / page, "python"):
        if "vae.load" in code:
            names = {"FOLDER": str(finished), "SWEEP": str(finished.parent)}
            exec(code, names)
            assert names["images"].shape == (16, 1, 8, 8)
            if "table" in names:
                assert names["table"].loc[0, "test/elbo"] == names["elbo"]
            if "pictures" in names:
                assert names["pictures"].shape == (2, 11, 1, 8, 8) and len(names["line"]) == 8


def written(page: Path, folder: Path) -> list[str]:
    """The files that a page's snippets name in their first line, written below a folder."""
    files = []
    for code in (*snippets(page, "python"), *snippets(page, "yaml")):
        first = code.partition("\n")[0]
        if match := re.fullmatch(r"# ([\w/]+\.(?:py|yaml))", first):
            path = folder / match[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code)
            files.append(match[1])
    return files


@pytest.mark.parametrize(
    ("page", "choice", "loss"),
    [
        ("README.md", "objective=squared", lambda m: m["val/distortion"] + m["val/rate"] ** 2),
        ("docs/extending.md", "objective=squared", lambda m: m["val/distortion"] + m["val/rate"] ** 2),
        ("docs/own_data.md", "data=noise", lambda m: m["val/distortion"] + m["val/rate"]),
    ],
)
def test_a_part_of_ones_own_trains_as_the_page_says(page, choice, loss, tmp_path, monkeypatch):
    assert len(written(ROOT / page, tmp_path)) == 2
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny = ["trainer.max_epochs=1", "network.hidden=[8]", "model.latent_dim=2", "evaluation.nll_samples=2", "threads=1"]
    tiny += [
        "callbacks=minimal",
        "logger=none",
        "trainer.accelerator=cpu",
        choice,
    ]
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", [f"hydra.searchpath=[file://{tmp_path}/mine]", *tiny], return_hydra_config=True)
    config = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    metrics = train(config, tmp_path / "run", tiny, progress_bar=False)
    assert metrics["val/loss"] == pytest.approx(loss(metrics), rel=0.02)
    assert metrics["test/beta"] == 1.0


def test_the_page_lists_what_is_in_a_runs_folder_and_nothing_else(tmp_path):
    folder, small = tmp_path / "run", ["data.limit=64", "trainer.max_epochs=1", "evaluation.nll_samples=5", "threads=1"]
    command = [*small, "trainer.accelerator=cpu", "logger=[tensorboard,csv]", f"hydra.run.dir={folder}"]
    assert run("vae.train", *command, cwd=tmp_path).returncode == 0
    measure(folder, "val", {"measures": "decomposition"})
    _, data, module = load(folder)
    fit_prior(module.vae, data, folder, "gaussian")
    there = {path.name for path in folder.iterdir()}
    assert set_aside(folder, torch.nn.Linear(1, 1), 2) is not None  # as of other weights
    there |= {path.name for path in folder.iterdir()}

    page = (ROOT / "docs" / "first_steps.md").read_text()
    table = page.partition("## What is in a run's folder")[2].partition("\n## ")[0]
    names = [name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall("`(.*?)/?`", row)]
    patterns = {name.replace("SPLIT", "*").replace("STEP", "*[0-9]"): name for name in names}
    assert not {name for name in there if not any(fnmatch(name, pattern) for pattern in patterns)}
    missing = {name for pattern, name in patterns.items() if not any(fnmatch(found, pattern) for found in there)}
    assert missing == {"loggers.json", "wandb"}  # of other loggers


def test_every_link_to_a_file_leads_to_one():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def settings_of(node: object, prefix: str) -> set[str]:
    """The dotted keys of a config of group `prefix`, with the parameters of what its `_target_` names."""
    keys = set()
    if isinstance(node, dict):
        if target := node.get("_target_"):
            keys |= {f"{prefix}.{name}" for name in inspect.signature(get_object(target)).parameters}
        for key, value in node.items():
            keys |= {f"{prefix}.{key}"} | settings_of(value, f"{prefix}.{key}")
    return keys


def known_settings() -> tuple[set[str], set[str]]:
    """Every `group.key` that composes with some option of its group, and every `group=option`."""
    keys = {f".trainer.{name}" for name in inspect.signature(pl.Trainer).parameters}
    options = set()
    for path in Path(CONFIGS).rglob("*.yaml"):
        place = path.relative_to(CONFIGS)  # vae.fit_prior has a folder with its own group `prior`
        group = (place.relative_to("fit_prior") if place.is_relative_to("fit_prior") else place).parent.as_posix()
        options.add(f"{group}={path.stem}")
        if group != "experiment":
            prefix = "" if group == "." else f".{group.replace('/', '.')}"
            keys |= settings_of(yaml.safe_load(path.read_text()), prefix)
    return {key.removeprefix(".") for key in keys}, options


def test_every_setting_that_a_sentence_or_a_page_names_exists():
    """`group.key` and `group=option` in every string of the code but docstrings, and in the commands of the pages."""
    keys, options = known_settings()
    groups = {option.partition("=")[0] for option in options} - {"."}
    first = "|".join(
        ({group.split("/")[0] for group in groups} | {key.split(".")[0] for key in keys if "." in key}) - {"hydra"}
    )
    texts = {}
    for path in sorted((ROOT / "vae").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                texts[f"{path.name}:{node.lineno}"] = node.value
    for page in PAGES:
        for number, line in enumerate(re.findall(r"^python -m vae\.\w+ (.*?)(?: {2,}#.*)?$", page.read_text(), re.M)):
            texts[f"{page.name}:{number}"] = line
    named, missing = 0, []
    for place, text in texts.items():
        found = re.findall(rf"(?<![\w./])((?:{first})(?:\.[a-z]\w*)+)\b(?!\.)", text)
        wrong = [key for key in found if key not in keys and not key.endswith((".safetensors", ".py"))]
        for group, chosen in re.findall(rf"(?<![\w.])({'|'.join(groups)})=(\w+(?:,\w+)*)\b(?![.(])", text):
            found += [f"{group}={option}" for option in chosen.split(",")]
        wrong += [one for one in found if "=" in one and one not in options | {"objective=squared", "data=noise"}]
        named += len(found)
        missing += [f"{place}: {one}" for one in wrong]
    assert named > 90 and not missing


def test_the_weights_that_are_not_to_be_searched_by_the_elbo_and_their_terms_exist():
    table = (
        (ROOT / "docs" / "sweeps.md").read_text().partition("### A weight on something")[2].partition("\n\nOn the")[0]
    )
    source = "".join(path.read_text() for path in (ROOT / "vae" / "objectives").glob("*.py"))
    rows = re.findall(r"^\| (`.*?) \| .*? \| (.*?) \|$", table, re.M)
    keys, terms = (
        set(re.findall(pattern, " ".join(cells)))
        for pattern, cells in zip((r"`(\w+\.\w+)`", r"`val/(\w+)`"), zip(*rows, strict=True), strict=True)
    )
    assert (
        keys <= known_settings()[0]
        and {"objective.lambda_feature", "regularizer.weight", "objective.lambda_od"} <= keys
    )
    assert all(re.search(rf'\b{term}=|"{term}"', source) for term in terms) and {"feature", "spectrum"} <= terms


def test_every_work_that_the_code_cites_is_on_the_page_of_citations():
    page = (ROOT / "docs" / "citations.md").read_text()
    cited = set()
    for path in (*(ROOT / "vae").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml")):
        for author, year in re.findall(
            r"(?<!, )\b([A-Z][a-z]+)(?: et al\.| & [A-Z][a-z]+) ((?:19|20)\d\d)", path.read_text()
        ):
            cited.add((author, year))
    assert len(cited) > 40
    missing = [f"{a} {y}" for a, y in sorted(cited) if not re.search(rf"\| [^|]*{a}[^|]* {y}", page)]
    assert not missing


def test_the_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.slow
def test_the_site_builds_without_a_dead_link(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "api" / "index.html").stat().st_size > 100_000
