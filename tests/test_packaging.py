"""What pyproject.toml says of the package: what it needs, what is in its wheel, which version it is."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vae
from vae.engine.folder import environment

ROOT = Path(__file__).parents[1]
if sys.version_info >= (3, 11):
    import tomllib

    PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
else:
    import tomli

    PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())

NEEDED = PROJECT["project"]["dependencies"]
FOR_TESTS = PROJECT["project"]["optional-dependencies"]["dev"]
#: Of modules that are not called as what they come with.
DISTRIBUTIONS = {
    "hydra": "hydra-core",
    "hydra_plugins": "hydra-joblib-launcher",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
EXTRAS = [needs for name, needs in PROJECT["project"]["optional-dependencies"].items() if name != "dev"]


def names(requirements):
    return {re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def sources(folder):
    """Python files below a folder, but for those of the environment that `make bench-peers` makes there."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    return [path for path in paths if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def imported(*folders):
    """Distributions that Python files below `folders` import from, wherever in the file, each with one such file."""
    ours = {
        "vae",
        "experiments",
        "benchmarks",
        "tomllib",  # of Python's own from 3.11 on
        *(path.stem for folder in ("tests", "benchmarks") for path in sources(folder)),
    }
    found = {}
    for path in (path for folder in folders for path in sources(folder)):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for module in {module.partition(".")[0] for module in modules} - ours - sys.stdlib_module_names:
                found[DISTRIBUTIONS.get(module, module.replace("_", "-"))] = path.relative_to(ROOT).as_posix()
    return found


def test_whatever_is_imported_is_declared_and_nothing_else_is():
    offered = names(NEEDED) | {name for extra in EXTRAS for name in names(extra)}
    assert {name: path for name, path in imported("vae", "experiments").items() if name not in offered} == {}
    assert names(NEEDED) - set(imported("vae")) == set()
    declared = offered | names(FOR_TESTS) | {"pythae"}  # which benchmarks/peers.py installs for itself
    assert {name: path for name, path in imported("tests", "benchmarks").items() if name not in declared} == {}


def test_the_least_torch_and_the_least_torchvision_are_of_one_release_and_neither_is_capped():
    """torchvision names the one torch that it was built with: a cap on either could leave pip none that go together."""
    bounds = {re.match(r"[\w-]+", r)[0]: r for r in NEEDED}
    torch, torchvision = (re.fullmatch(rf"{name}>=(\d+)\.(\d+)", bounds[name]) for name in ("torch", "torchvision"))
    assert (torch[1], torchvision[1]) == ("2", "0")
    assert int(torchvision[2]) == int(torch[2]) + 15


@pytest.mark.parametrize("needed", NEEDED)
def test_each_dependency_has_a_lower_bound_which_the_installed_version_keeps(needed):
    name, bounds = re.fullmatch(r"([\w-]+)(>=[\d.]+(?:,<[\d.]+)?)", needed).groups()

    def numbers(version):
        return [int(part) for part in re.match(r"[\d.]*\d", version)[0].split(".")]

    installed = numbers(importlib.metadata.version(name))
    for bound in bounds.split(","):
        assert installed >= numbers(bound[2:]) if bound.startswith(">=") else installed < numbers(bound[1:])


def test_the_version_is_said_in_one_place_and_told_by_every_run():
    assert "version" in PROJECT["project"]["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", vae.__version__)
    assert environment()["vae"] == vae.__version__
    assert f"\nversion: {vae.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{vae.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return next(folder.glob("vae-*.whl"))


def test_the_wheel_holds_the_package_and_its_configs_but_none_that_need_a_checkout(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vae").rglob("*") if path.is_file()}
    expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "hydra_plugins").rglob("*.py")}
    expected |= {f"vae/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    expected = {name for name in expected if "__pycache__" not in name and not name.startswith("vae/conf/experiment/")}
    expected |= {f"vae/conf/experiment/{name}.yaml" for name in ("digits_sweep", "spatial_latents")}
    assert {name for name in files if ".dist-info/" not in name} == expected
    assert "vae/py.typed" in files
    assert f"vae-{vae.__version__}" in wheel.name


@pytest.mark.slow
def test_an_installed_wheel_trains_and_offers_nothing_that_it_cannot_do(wheel, tmp_path):
    site, here = tmp_path / "site", tmp_path / "here"
    zipfile.ZipFile(wheel).extractall(site)  # which is all that installing one of pure Python does
    here.mkdir()

    def run(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=here, env=environment, capture_output=True, text=True, timeout=300
        )

    small = [
        "data.limit=64",
        "data.batch_size=32",
        "trainer.max_epochs=1",
        "evaluation.nll_samples=5",
        "callbacks=minimal",
    ]
    trained = run("vae.train", *small, "threads=1", "trainer.accelerator=cpu", "run=run", "progress_bar=false")
    assert trained.returncode == 0, trained.stderr
    assert (here / "run" / "metrics.json").is_file()
    assert f'"vae": "{vae.__version__}"' in (here / "run" / "environment.json").read_text()
    assert "\nexperiment: digits_sweep, spatial_latents\n" in run("vae.train", "--help").stdout
    paper = run("vae.train", "experiment=rate_control")
    assert paper.returncode == 1
    options = "choose one of digits_sweep, spatial_latents."
    assert paper.stderr == f"Error: experiment=rate_control is unknown: {options}\n"
    for arguments in (["--list"], ["rate_control", "--quick"]):
        refused = run("vae.reproduce", *arguments)
        assert refused.returncode == 1
        assert refused.stderr.startswith("Error: There is no experiments/ folder here")
        assert "clone the repository" in refused.stderr


UNTYPED = next(set(rule["module"]) for rule in PROJECT["tool"]["mypy"]["overrides"] if rule.get("ignore_errors"))


def test_the_list_of_modules_whose_types_are_not_checked_only_shrinks():
    assert len(UNTYPED) <= 37  # lower this with it


@pytest.mark.slow
def test_each_module_whose_types_are_not_checked_still_has_findings(tmp_path):
    pytest.importorskip("mypy")
    config = (ROOT / "pyproject.toml").read_text().replace("ignore_errors = true", "ignore_errors = false")
    (tmp_path / "pyproject.toml").write_text(config)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file",
        tmp_path / "pyproject.toml",
        "--cache-dir",
        tmp_path / "cache",
    ]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    paths = {line.partition(":")[0] for line in found.splitlines() if ": error:" in line}
    assert {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths} >= UNTYPED
