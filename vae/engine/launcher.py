"""What to do when the system kills one of the processes that runs of a sweep are in, side by side."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_joblib_launcher import joblib_launcher

from vae.engine.search import sweep_value
from vae.files import write_json

KILLED = "Its process was killed by the operating system, probably out of memory."


class Launcher(joblib_launcher.JoblibLauncher):
    """Hydra's joblib launcher gives all runs up when the process of one is killed. Here, those that were cut off or had not
    begun go on one at a time, and one whose process is killed again is recorded as failed, with the reason."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from joblib.externals.loky.process_executor import TerminatedWorkerError  # slow to import, and seldom needed

        with contextlib.suppress(TerminatedWorkerError):
            return super().launch(job_overrides, initial_job_idx)
        log = logging.getLogger(__name__)
        log.warning("A process of the sweep was killed, probably out of memory: its runs go on one at a time.")
        self.joblib["n_jobs"] = 2  # with 1 a run would be in this very process
        ended: list[JobReturn] = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            try:
                ended += super().launch([[*overrides, "resume=true"]], number)
            except TerminatedWorkerError:
                for status in Path(str(self.config.hydra.sweep.dir)).glob("*/status.json"):
                    found = json.loads(status.read_text())
                    if found["state"] == "running":
                        write_json(status, {**found, "state": "failed", "reason": KILLED})
                        log.error(f"FAILED   {status.parent.name}: {KILLED}")
                ended.append(
                    JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=sweep_value(self.config, None))
                )
        return ended


def use() -> None:
    """Let `hydra/launcher=joblib` mean this one: Hydra takes launchers from packages named hydra_plugins only."""
    joblib_launcher.JoblibLauncher = Launcher
