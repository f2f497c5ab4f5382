"""What the entry points share: where configs lie, how folders are named, how a failure is told. Imports no torch."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import itertools
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from vae.errors import VAEError

#: conf/ lies inside the package when it was installed from a wheel, and beside it in a checkout.
CONFIGS = next(
    str(path) for path in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf") if path.is_dir()
)

TRANSIENT = {"run", "resume", "progress_bar"}  # options of a command, not of the run that it makes


def run_folder(chosen: str | None, name: str) -> str:
    """The folder of a run or sweep: the chosen one, or a new runs/NAME/TIME that no other process has."""
    if chosen:
        return chosen
    time = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in itertools.count(1):
        folder = Path("runs") / name / (time if attempt == 1 else f"{time}_{attempt}")
        try:
            folder.mkdir(parents=True)  # fails if it is there: the claim is made by whoever creates it
        except FileExistsError:
            continue
        return str(folder)


def run_name(overrides: str, number: int) -> str:
    """The folder of a run within its sweep, from what varies; a name that a file system accepts, inside the sweep."""
    name = re.sub(r"[^\w.,=+-]+", "_", overrides).strip("._") or str(number)
    if len(name) > 150:
        name = f"{name[:130]}-{hashlib.blake2b(overrides.encode(), digest_size=6).hexdigest()}"
    return name


# The interpolations that conf/train.yaml names its folders with. Registered on import, because the worker processes of a
# parallel sweep import this module but never run an entry point.
OmegaConf.register_new_resolver("run_folder", run_folder, use_cache=True, replace=True)
OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def command_line() -> str:
    """What this process was started with; in a worker process, what its parent was, if that has called this too."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None:
        words = [os.path.relpath(sys.argv[0]), *sys.argv[1:]]
    elif spec.name.startswith("joblib."):
        return os.environ.get("VAE_COMMAND", "unknown")
    else:
        words = ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    os.environ["VAE_COMMAND"] = shlex.join(["python", *words])
    return os.environ["VAE_COMMAND"]


@contextlib.contextmanager
def sentences() -> Iterator[None]:
    """Tell a VAEError as its one sentence and exit with code 1; anything else is a defect and keeps its traceback."""
    try:
        yield
    except VAEError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)


def duration(seconds: float) -> str:
    """In words, a minute begun counting as one: "9.5 s", "42 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
