"""Imports run one way: a wing uses what stands below it, and no module needs itself by a way round."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: From the ground up. A name stands for that module and, if it is a package, for all that is in it.
WINGS = {
    "what all share": (
        "vae",
        "vae.errors",
        "vae.files",
        "vae.cli",
        "vae.refusals",
        "vae.seeding",
        "vae.precision",
        "vae.ranks",
    ),
    "mathematics": ("vae.kl", "vae.gaussian", "vae.beta", "vae.token_kl", "vae.importance", "vae.maps"),
    "the KL's other roles": ("vae.advantages", "vae.surrogates", "vae.policy", "vae.distillation", "vae.preferences"),
    "parts of a VAE": (
        "vae.likelihoods",
        "vae.priors",
        "vae.fitting",
        "vae.flow_matching",
        "vae.codes",
        "vae.code_priors",
        "vae.quantizers",
        "vae.flows",
        "vae.hierarchical",
        "vae.networks",
        "vae.model",
    ),
    "objectives": ("vae.objectives",),
    "data": ("vae.data",),
    "evaluation": ("vae.evaluation",),
    "report": (
        "vae.report",
    ),  # knows run folders and nothing of models: all that the engine does with it is to call it
    "engine": ("vae.engine",),
    "the Latents tab": ("vae.latents",),
    "reproduced papers": ("vae.claims", "vae.experiment", "vae.experiment_figures"),
    "entry points": (
        "vae.train",
        "vae.evaluate",
        "vae.encode",
        "vae.export",
        "vae.generate",
        "vae.fit_prior",
        "vae.reproduce",
    ),
}
PURE = (*WINGS["mathematics"], *WINGS["the KL's other roles"])


def modules(root: Path, package: str) -> dict[str, Path]:
    """Every module of a package by its dotted name; a package's own file by that of the package."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """All that a file imports, wherever in it, `from a import b` as a.b; not what only a type checker reads."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    unread = {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and node not in unread:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node not in unread:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def arrows(known: dict[str, Path]) -> dict[str, set[str]]:
    """module -> the modules among `known` that it imports."""

    def resolved(target: str) -> str:
        return target if target in known else target.rpartition(".")[0]

    return {name: {resolved(target) for target in imports(path)} & set(known) - {name} for name, path in known.items()}


def floor_of(name: str) -> int:
    """The number of the wing that a module stands in. Raises KeyError for one that stands in none."""
    for floor, wing in enumerate(WINGS.values()):
        if any(name == member or (member != "vae" and name.startswith(f"{member}.")) for member in wing):
            return floor
    raise KeyError(f"{name} stands in no wing: say in WINGS where it belongs.")


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that can be reached from themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    return [name for name in graph if name in reached(name)]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return arrows(modules(ROOT, "vae"))


def test_no_import_runs_back_up(graph):
    up = [f"{name} -> {target}" for name in graph for target in graph[name] if floor_of(target) > floor_of(name)]
    assert up == []


def test_no_module_needs_itself_by_a_way_round(graph):
    assert circles(graph) == []


def test_every_wing_has_the_modules_that_it_names(graph):
    assert {member for wing in WINGS.values() for member in wing} - set(graph) == set()


def test_the_mathematics_imports_nothing_but_torch():
    for name in PURE:
        roots = {target.partition(".")[0] for target in imports(modules(ROOT, "vae")[name])}
        assert roots - sys.stdlib_module_names <= {"torch", "vae"}, name


def test_the_package_knows_nothing_of_what_is_written_with_it():
    for name, path in modules(ROOT, "vae").items():
        roots = {target.partition(".")[0] for target in imports(path)}
        assert not roots & {"experiments", "benchmarks", "tests"}, name


def test_an_import_is_seen_wherever_it_stands_and_a_circle_through_three(tmp_path):
    (tmp_path / "vae").mkdir()
    for name, text in {
        "__init__": "",
        "kl": "def f():\n    from vae import engine",
        "engine": "import vae.train",
        "train": "from vae.kl import f\nif TYPE_CHECKING:\n    from vae.beta import g\n",
        "beta": "import torch",
    }.items():
        (tmp_path / "vae" / f"{name}.py").write_text(text)
    found = arrows(modules(tmp_path, "vae"))
    assert found == {
        "vae": set(),
        "vae.kl": {"vae.engine"},
        "vae.engine": {"vae.train"},
        "vae.train": {"vae.kl"},
        "vae.beta": set(),
    }
    assert circles(found) == ["vae.engine", "vae.kl", "vae.train"]
    assert floor_of("vae.train") > floor_of("vae.engine.run") > floor_of("vae.kl")
    with pytest.raises(KeyError, match="stands in no wing"):
        floor_of("vae.elsewhere")
