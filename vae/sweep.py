"""What surrounds the runs of a Hydra sweep: names before it, the report after it. Imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict


class SweepCallback(Callback):
    """Names each run's folder by what varies; when all have ended, writes the report and prints the table.

    The process exits with code 1 if a run failed.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        task = list(config.hydra.overrides.task)
        constant = [
            o.get_key_element() for o in OverridesParser.create().parse_overrides(task) if not o.is_sweep_override()
        ]
        with open_dict(config):
            config.hydra.overrides.hydra.append(
                f"hydra.job.config.override_dirname.exclude_keys=[{','.join(constant)}]"
            )

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from rich.console import Console

        from vae.report import print_table, read_sweep, write_report

        folder = Path(config.hydra.sweep.dir)
        sweep = read_sweep(folder)
        page = write_report(folder)
        console = Console()
        print_table(sweep, console)
        console.print(f"Report:      open {page}", highlight=False, soft_wrap=True)
        console.print(f"TensorBoard: tensorboard --logdir {folder}", highlight=False, soft_wrap=True)
        if sweep.failed:
            sys.exit(1)
