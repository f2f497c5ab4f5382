"""What surrounds the runs that Hydra starts: folders before, the report of a sweep after. Imports no torch."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict

from vae.cli import CREATED, TRANSIENT, command_line, resuming, sentences
from vae.engine import launcher, packed_launcher
from vae.engine.search import sweep_directions
from vae.errors import VAEError

#: In the folder of a run that the latest sweep could not touch: why. What an earlier one made there is as it was.
REFUSED = "refused.json"


class SweepCallback(Callback):
    """Refuses to touch a folder that is in use; names a sweep's runs by what varies; reports when all have ended.

    The process exits with code 1 if a run of the sweep failed.
    """

    @sentences()
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        refuse_used_folder(config)
        refuse_nothing_to_resume(config)
        make_folder(config)

    @sentences()
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        refuse_used_folder(config)
        make_folder(config)
        for old in Path(config.hydra.sweep.dir).glob(f"*/{REFUSED}"):
            old.unlink()
        tell_direction(config)
        command_line()  # for the processes that the runs may be given to
        use_launcher(config)
        task = list(config.hydra.overrides.task)
        constant = [
            o.get_key_element() for o in OverridesParser.create().parse_overrides(task) if not o.is_sweep_override()
        ]
        with open_dict(config):
            config.hydra.overrides.hydra.append(
                f"hydra.job.config.override_dirname.exclude_keys=[{','.join([*constant, 'resume'])}]"
            )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from rich.console import Console

        from vae.report import print_table, read_sweep, write_report
        from vae.report.runs import CUT_OFF
        from vae.report.search import read_search

        folder, console = Path(config.hydra.sweep.dir), Console()
        refused = sorted(folder.glob(f"*/{REFUSED}"))

        def tell_refused() -> None:
            for path in refused:
                said = f"Not done:    {path.parent.name}: {json.loads(path.read_text())['reason']}"
                console.print(said, highlight=False, markup=False, soft_wrap=True)

        try:
            sweep = read_sweep(folder)
        except VAEError:
            if not refused:
                raise
            tell_refused()  # all of them, so that there is nothing to report
            sys.exit(1)
        page = write_report(sweep)
        print_table(sweep, console)
        found = read_search(sweep)
        if found:
            console.print(
                f"Search:      {found.tally()}; {found.best_in_words()}", highlight=False, markup=False, soft_wrap=True
            )
        console.print(f"Report:      open {page}", highlight=False, soft_wrap=True)
        console.print(f"TensorBoard: tensorboard --logdir {folder}", highlight=False, soft_wrap=True)
        tell_refused()
        if found and (elsewhere := [run for run in sweep.failed if run.state == CUT_OFF]):  # its own have all ended
            console.print(f"Another process of this search is at {len(elsewhere)} more, and writes the report again.")
            sys.exit(1 if refused or len(sweep.failed) > len(elsewhere) else 0)
        if refused or not sweep.complete:
            sys.exit(1)


#: How often a run on a cluster may meet its time limit and go on; the plugin's own, 0, gives up at the first.
TIME_LIMITS = 100


def use_launcher(config: DictConfig) -> None:
    """Let `hydra/launcher` mean this project's own of that name. Changes what it is given."""
    launcher.use()
    packed_launcher.use()
    if str(config.hydra.runtime.choices["hydra/launcher"]).startswith("submitit"):
        from vae.engine import cluster  # only now: submitit is an extra

        cluster.use()
        if not any("hydra.launcher.max_num_timeout=" in override for override in config.hydra.overrides.hydra):
            with open_dict(config):
                if "max_num_timeout" in config.hydra.launcher:
                    config.hydra.launcher.max_num_timeout = TIME_LIMITS


def refuse_used_folder(config: DictConfig) -> None:
    """Exit with a sentence if `run` names a folder that holds something and `resume` does not allow to touch it."""
    with sentences():
        if config.run and not resuming(config.resume) and Path(config.run).is_dir() and any(Path(config.run).iterdir()):
            raise VAEError(
                f"{config.run} exists already: add resume=true to go on with it or resume=restart to delete it and start "
                "anew, or choose another folder."
            )


def refuse_nothing_to_resume(config: DictConfig) -> None:
    """Exit with a sentence if `resume` is all that was asked for, of a folder that holds no run.

    An explicit command may start in an empty folder: an earlier attempt may have died before writing its config.
    """
    names = {override.partition("=")[0] for override in config.hydra.overrides.task}
    with sentences():
        if config.resume and names <= TRANSIENT and not Path(config.run or "", "config.yaml").is_file():
            raise VAEError(f"There is no run to go on with in run={config.run}: it has no config.yaml.")


def make_folder(config: DictConfig) -> None:
    """Make the folder that `run` names, as Hydra is about to; exit with a sentence where the system does not allow it."""
    folder = Path(config.run or ".")
    with sentences():
        try:
            if not folder.is_dir():
                folder.mkdir(parents=True)
                CREATED.add(folder.absolute())
        except OSError as error:
            if not folder.is_dir():  # which another process of the same search may have made meanwhile
                raise VAEError(f"run={config.run} cannot be made: {error.strerror}.") from error


def tell_direction(config: DictConfig) -> None:
    """Give `sweep_direction` to a sweeper that has a direction, as Optuna's; exit with a sentence if it says otherwise."""
    with sentences():
        directions = sweep_directions(config)
        for override in config.hydra.overrides.hydra:
            name, _, value = override.lstrip("+").partition("=")
            if name == "hydra.sweeper.direction" and re.findall(r"(?:max|min)imize", value) != directions:
                raise VAEError(f"{override}, but sweep_metric={config.sweep_metric} is to {' and '.join(directions)}.")
    if "direction" in config.hydra.sweeper:
        with open_dict(config):
            config.hydra.sweeper.direction = directions if len(directions) > 1 else directions[0]
