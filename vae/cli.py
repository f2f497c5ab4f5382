"""What the entry points share: where configs lie, how folders are named, how a failure is reported. Imports no torch."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.util
import itertools
import math
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from omegaconf import DictConfig, ListConfig, MissingMandatoryValue, OmegaConf

from vae.errors import VAEError

#: conf/ lies inside the package when it was installed from a wheel, and beside it in a checkout.
CONFIGS = next(
    str(path) for path in (Path(__file__).parent / "conf", Path(__file__).parents[1] / "conf") if path.is_dir()
)

RENAMED = re.compile(r"(?<![^+~])(data\.labelled|objective\.labelled_per_batch)(?![^=])")  # keys of the release before

#: Folders of runs and sweeps that this process has made.
CREATED: set[Path] = set()

#: What a run's folder, or a sweep's, holds before anything is trained.
BEFORE_TRAINING = {
    ".lock",
    "config.yaml",
    "environment.json",
    "multirun.yaml",
    "overrides.yaml",
    "status.json",
    "train.log",
}

TRANSIENT = {"run", "resume", "progress_bar"}  # options of a command, not of the run that it makes


def run_folder(chosen: str | None, name: str) -> str:
    """The folder of a run or sweep: the chosen one, or a new runs/NAME/TIME that no other process has.

    Raises VAEError where none can be made.
    """
    if chosen:
        return chosen
    time = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in itertools.count(1):
        folder = Path("runs") / name / (time if attempt == 1 else f"{time}_{attempt}")
        try:
            folder.mkdir(parents=True)  # fails if it is there: the claim is made by whoever creates it
        except OSError as error:
            if isinstance(error, FileExistsError) and folder.exists():
                continue
            raise VAEError(
                f"{folder} cannot be made in the current folder ({error.strerror}): name another place, as run=FOLDER."
            ) from error
        CREATED.add(folder.absolute())
        return str(folder)


def remove_unused() -> None:
    """Remove the folders that this process has made and in which nothing was trained, by it or by another."""
    from filelock import FileLock, Timeout

    for folder in CREATED:
        with contextlib.suppress(OSError, Timeout), FileLock(folder / ".lock", timeout=0):
            held = list(folder.iterdir())
            if {path.name for path in held} <= BEFORE_TRAINING:
                for path in held:
                    path.unlink()
                folder.rmdir()


def run_name(overrides: str, number: int) -> str:
    """The folder of a run within its sweep, from what varies: a name that a file system accepts, inside the sweep, and
    one that no other overrides have."""
    name = re.sub(r"[^\w.,=+-]+", "_", overrides).strip("._")
    long = len(name.encode()) > 150  # file systems allow 255 bytes
    if long or name != overrides:
        cut = name.encode()[:130].decode(errors="ignore") if long else name
        name = f"{cut}-{hashlib.blake2b(overrides.encode(), digest_size=6).hexdigest()}"
    return name if overrides else str(number)


def sweep_name(data: str, overrides: list[str]) -> str:
    """What a sweep's folder is named after: its data set or, where it goes through several, those, or else the experiments
    that it goes through. data: the one that is chosen; overrides: as they are typed, "data=mnist,digits"."""
    typed = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    for value in (typed.get("data"), typed.get("experiment")):
        if value and not re.fullmatch(r"\w+", value):
            return run_name(re.sub(r"^choice\((.*)\)$", r"\1", value.replace(" ", "")), 0)
    return data


# The interpolations that conf/train.yaml names its folders with. Registered on import, because the worker processes of a
# parallel sweep import this module but never run an entry point.
def _run_folder(chosen: str | None, name: str) -> str:
    with sentences():  # Hydra would show where it was while it asked
        return run_folder(chosen, name)


OmegaConf.register_new_resolver("run_folder", _run_folder, use_cache=True, replace=True)
OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def _sweep_name(data: str, task: ListConfig, params: DictConfig | None) -> str:
    lines = [
        f"{key}={value}" for key, value in (params or {}).items()
    ]  # the command line, which comes later, replaces them
    return sweep_name(data, lines + OmegaConf.to_container(task, resolve=False))


OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)


def resuming(resume: bool | str) -> bool | str:
    """What `resume` asks for: False, True or "restart". A job that Slurm has requeued goes on with what it had begun.

    Raises VAEError for anything else.
    """
    if resume not in (False, True, "restart"):
        raise VAEError(f"resume={resume} is unknown: choose false, true or restart.")
    return True if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else resume


def quote_run() -> None:
    """Let `run=FOLDER` on this process's command line be any folder: Hydra reads `=`, `,` and brackets otherwise."""
    from hydra.core.override_parser.overrides_parser import OverridesParser  # slow to import, and not for the report
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for place, word in enumerate(sys.argv[1:], 1):
        if not word.startswith("run="):
            continue
        try:
            override = parser.parse_override(word)
            plain = not override.is_sweep_override() and isinstance(override.value(), str | None)
        except HydraException:
            plain = False
        if not plain:
            escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), word[4:])
            sys.argv[place] = f"run='{escaped}'"


def rename_old() -> None:
    """Let options on this process's command line have the names of the release before, with a FutureWarning for each."""
    for place, word in enumerate(sys.argv[1:], 1):
        new = RENAMED.sub(lambda old: old[0].replace("labelled", "labeled"), word)
        if re.match(r"[+~]*likelihood\b", word):
            new = re.sub(r"(?<=[dD])iscretised(?=_?[lL]ogistic)", "iscretized", word)
        if new != word:
            warnings.warn(
                f"{word} is now {new}: the old name will be gone in the next release.", FutureWarning, stacklevel=2
            )
            sys.argv[place] = new


def name_extras() -> None:
    """Raises VAEError where this process's command line chooses a launcher whose package is not installed."""
    for word in sys.argv[1:]:
        if word.startswith("hydra/launcher=submitit") and not importlib.util.find_spec("submitit"):
            raise VAEError(f"{word} needs the submitit plugin: pip install 'vae[slurm]'.")


def command(module: str, **options: object) -> str:
    """A command of this package as it can be pasted into a shell."""
    return shlex.join(["python", "-m", module, *(f"{name}={value}" for name, value in options.items())])


def command_line() -> str:
    """This process's command line; in a launcher's worker, the parent's, if the parent called this first."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None:
        words = [os.path.relpath(sys.argv[0]), *sys.argv[1:]]
    elif spec.name.startswith(("joblib.", "submitit.")):
        return os.environ.get("VAE_COMMAND", "unknown")
    else:
        words = ["-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    os.environ["VAE_COMMAND"] = shlex.join(["python", *words])
    return os.environ["VAE_COMMAND"]


@contextlib.contextmanager
def sentences(configs: str = CONFIGS) -> Iterator[None]:
    """Print what the user can act on as one sentence and exit with code 1: a VAEError, what Hydra refuses, an option without
    a default that was not given; and Ctrl-C as what it is with 130, as shells have it. Anything else is a defect and keeps
    its traceback. configs: the folder of the command's config groups.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    except MissingMandatoryValue as error:
        print(f"Error: {error.full_key} has no default: say what it should be.", file=sys.stderr)
        sys.exit(1)
    except VAEError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if "hydra" not in sys.modules:  # which the report does without
            raise
        from vae.refusals import sentence

        if (said := sentence(error, configs)) is None:
            raise
        print(f"Error: {said}", file=sys.stderr)
        sys.exit(1)


def enter(main: Callable[[], object], configs: str = CONFIGS) -> None:
    """Run a command that Hydra composes the config of: `sentences`, and a command line that may be a little off.

    Where nothing was trained, the folders that were made for it are removed.
    """
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))  # Hydra wants it first
    os.environ["HYDRA_FULL_ERROR"] = "1"  # it would print its errors itself, in its own words
    try:
        with sentences(configs):
            rename_old()
            quote_run()
            name_extras()
            main()
    except SystemExit as left:
        if left.code == 1:
            remove_unused()
        raise


def duration(seconds: float) -> str:
    """In words, a minute begun counting as one: "9.5 s", "42 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
