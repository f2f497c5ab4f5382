"""`python docs/generate.py [--check]`: the pages that are made from the code: reference.md, papers.md, speed.md.

--check writes nothing and exits with 1 if a page is not what the code would make of it. Imports no torch.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
GROUPS = {
    "data": "Data sets",
    "network": "Networks",
    "likelihood": "Likelihoods",
    "prior": "Priors",
    "fit_prior/prior": "Priors fitted afterwards, by vae.fit_prior",
    "posterior": "Posteriors",
    "objective": "Objectives",
    "objective/schedule": "Schedules: what multiplies the weight on the KL",
    "objective/features": "Features that objective=feature compares images by",
    "regularizer": "Regularisers of any objective, for latents that are maps",
    "optimizer": "Optimizers",
    "lr_schedule": "Learning rates",
    "trainer": "Trainers",
    "logger": "Loggers",
    "callbacks": "Callbacks",
    "hydra/sweeper": "Searches",
}
MADE = "<!-- made by docs/generate.py: edit the code, then run make docs -->\n\n"


def comment(path: Path) -> str:
    """The first line's comment of a yaml, without its mark."""
    first = path.read_text().partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def target(node: dict) -> str:
    """What an option makes: the class or function of the project's or a library's."""
    source = node.get("source") or {}
    return str(source.get("_target_") or node.get("_target_") or "")


def first_sentence(dotted: str) -> str:
    """The first sentence of the docstring of one of the project's own classes or functions; "" for others."""
    module, _, name = dotted.rpartition(".")
    for path in (ROOT / f"{module.replace('.', '/')}.py", *(ROOT / module.replace(".", "/")).glob("*.py")):
        if not module.startswith("vae") or not path.is_file():
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
                text = " ".join((ast.get_docstring(node) or "").split())
                return re.split(r"(?<=[a-z0-9)|])[.:;] (?=[A-Z])", text + " ")[0].strip().rstrip(".")
    return ""


def options(node: dict) -> str:
    """An option's own settings with their defaults, as they are typed."""
    hidden = {"_target_", "_partial_", "kind", "defaults", "source", "schedule"}
    flat = {**{f"source.{k}": v for k, v in (node.get("source") or {}).items()}, **node}
    shown = [
        f"`{k}={json.dumps(v) if v is not None else 'null'}`" for k, v in flat.items() if k.split(".")[-1] not in hidden
    ]
    return ", ".join(shown).replace('"', "").replace("|", "\\|")


def reference() -> str:
    """One table per config group, from the yamls and the docstrings of what they make."""
    lines = [MADE, "# Every option\n"]
    lines.append(
        "Each option of a config group is one YAML file in `conf/` and one class or function. `group=option` chooses it, "
        "`group.setting=value` changes one of its settings: `objective=tcvae objective.beta=6`.\n"
    )
    for group, title in GROUPS.items():
        lines += [
            f"\n## {title} (`{group.removeprefix('fit_prior/')}=`)\n",
            "| option | what it is | settings and defaults |",
            "|---|---|---|",
        ]
        for path in sorted((ROOT / "conf" / group).glob("*.yaml")):
            node = yaml.safe_load(path.read_text()) or {}
            made = target(node)
            what = comment(path) or first_sentence(made) or (f"`{made}`" if made else "nothing to set")
            cell = (what[0].upper() + what[1:]).replace("|", "\\|")
            lines.append(f"| `{path.stem}` | {cell} | {options(node)} |")
    return "\n".join(lines) + "\n"


def literal(path: Path, name: str) -> str:
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and any(getattr(t, "id", None) == name for t in node.targets):
            return ast.literal_eval(node.value)
    return ""


def papers() -> str:
    """What each rerun experiment found, from its committed verdicts."""
    lines = [MADE, "# Papers, rerun\n"]
    lines.append(
        "Each experiment reruns a published one and passes a verdict on every claim. Claims are code that reads the "
        "committed results, so a verdict can be recomputed without training. "
        "`python -m vae.reproduce NAME [--quick]` computes what is missing, draws the figure and prints the paper's numbers "
        "beside ours; the exit code is 1 if a claim fails. `python -m vae.reproduce --list` lists them all.\n"
    )
    lines += ["| experiment | paper | quick form | full form |", "|---|---|---|---|"]
    missed = []
    for path in sorted(ROOT.glob("experiments/*/protocol.py")):
        name, cells = path.parent.name, []
        for form in ("quick", "full"):
            found = path.parent / "results" / form / "verdicts.json"
            if not found.is_file():
                cells.append("not run")
                continue
            verdicts = json.loads(found.read_text())
            cells.append(f"{verdicts['held']} of {verdicts['of']} claims, {verdicts['date'][:10]}")
            misses = [claim for claim in verdicts["claims"] if not claim["holds"]]
            last = name if form == "full" else f"{name}, quick form"  # of the two, the full one where it was run
        if misses:
            missed.append((last, misses))
        lines.append(f"| {name} | {literal(path, 'PAPER')} | {cells[0]} | {cells[1]} |")
    lines += ["\n## Claims that missed\n", "Each experiment's README explains its misses.\n"]
    for name, misses in missed:
        lines.append(f"\n### {name}\n\n| claim | measured | target |\n|---|---|---|")
        for claim in misses:
            lines.append("| " + " | ".join(claim[k].replace("|", "\\|") for k in ("name", "measured", "target")) + " |")
    return "\n".join(lines) + "\n"


def speed() -> str:
    """The benchmarks' own tables, as they were last written."""
    lines = [MADE, "# Speed\n"]
    lines.append(
        "Every figure is a ratio measured in one run, against a bare PyTorch loop or a peer that does the "
        "same arithmetic: from the same weights and noise the losses are the same to rounding. Their epochs "
        "take turns, each in a process of its own, since what the project sets of its process belongs to it: "
        "numbers below 1e-38 are taken as 0, which are slow, and a twentieth of Adam's moments after a "
        "thousand steps on MNIST; and freed memory is kept, which glibc otherwise returns after each step and "
        "takes again page by page. How much of a difference that is, the ratio to a bare loop whose process "
        "is settled alike tells. The cross-entropy of pixels and its gradient are taken in closed form, which is "
        "quicker than torch's on a CPU where log1p is slow. What bf16-mixed gains depends on the processor: on "
        "two others the first step took 0.584 and 1.365 of the bare loop's time. (The GPU and the peers "
        "were measured beside a bare loop in the same process, and before that.) `make bench` and "
        "`make bench-peers` measure again.\n"
    )
    for name in ("bench", "gpu", "peers"):
        text = (ROOT / "benchmarks" / "results" / f"{name}.md").read_text()
        text = re.sub(r"^# ", "## ", text, flags=re.M)
        lines.append(text)
    return "\n".join(lines) + "\n"


PAGES = {"reference.md": reference, "papers.md": papers, "speed.md": speed}


def main(check: bool = False) -> int:
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / "docs" / name, make()
        if not path.is_file() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.write_text(text)
    if stale:
        print(("Not current: " if check else "Written: ") + ", ".join(f"docs/{name}" for name in stale))
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
