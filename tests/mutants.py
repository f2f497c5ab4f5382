"""`make mutants`: plant single faults in a copy of the tree, one at a time, and see whether the tests that should notice do.

`python tests/mutants.py [WORD ...]` plants those whose file or text holds one of the words. faults.json lists them: a file,
what is replaced (its first occurrence), by what, and the tests. A forked child with its imports done runs them. Exit code 1 if
fewer than 98 in 100 are caught; a fault whose text is gone from the code counts as not caught.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAULTS = json.loads((ROOT / "tests" / "faults.json").read_text())
ENOUGH = 0.98


def copied(folder: Path) -> None:
    ignore = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "__pycache__", ".*cache", "data.nosync")
    shutil.copytree(ROOT, folder, ignore=ignore, dirs_exist_ok=True)


def tested(folder: Path, tests: str) -> int:
    """pytest's exit code for these tests, in a process of its own."""
    pid = os.fork()
    if pid == 0:
        import pytest

        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path[:0] = [str(folder), str(folder / "tests")]
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(
            int(
                pytest.main(
                    [
                        "-x",
                        "-q",
                        "-m",
                        "not browser and not slurm",
                        "-p",
                        "no:cacheprovider",
                        "-p",
                        "no:xdist",
                        *shlex.split(tests),
                    ]
                )
            )
        )
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(words: list[str]) -> int:
    # what takes seconds to import, and is nothing of ours
    import matplotlib.pyplot  # noqa: F401
    import pytest  # noqa: F401
    import pytorch_lightning  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch
    import torch.utils.tensorboard
    import torchvision  # noqa: F401
    from hydra import compose  # noqa: F401

    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() not in (ROOT, ROOT / "tests")]
    chosen = [fault for fault in FAULTS if not words or any(word in " ".join(fault.values()) for word in words)]
    caught, survivors = 0, []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copied(folder)
        for number, fault in enumerate(chosen, 1):
            path, started = folder / fault["file"], time.monotonic()
            whole = path.read_text()
            if fault["from"] not in whole:
                code, verdict = None, "GONE"
            else:
                path.write_text(whole.replace(fault["from"], fault["to"], 1))
                code = tested(folder, fault["tests"])
                path.write_text(whole)
                verdict = {1: "caught", 2: "caught", 4: "no such test", 5: "no such test"}.get(code, "SURVIVED")
            caught += verdict == "caught"
            line = f"{number:4} {verdict:12} {fault['file']}: {fault['from'].strip().splitlines()[0][:70]!r}"
            print(f"{line} ({time.monotonic() - started:.0f} s)", flush=True)
            if verdict != "caught":
                survivors.append(line)
    print(
        f"\n{caught} of {len(chosen)} faults caught, {100 * caught / max(len(chosen), 1):.1f} in 100.",
        *survivors,
        sep="\n",
    )
    return int(caught < ENOUGH * len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
