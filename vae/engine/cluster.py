"""Sweeps on a cluster: a job of Slurm's for each run, by Hydra's submitit launcher. Imports no torch."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from omegaconf import OmegaConf, open_dict

from vae.cli import sentences
from vae.engine.search import sweep_value
from vae.errors import VAEError
from vae.files import write_json

SECONDS = 5  # between two looks at the queue
LOST = 3  # looks in a row that a job is neither in the queue nor has left a result: file systems of clusters lag


class _Launcher:
    """The plugin's launcher gives the sweep up at the first job that ends without a result, while the others go on. Here it
    waits for all, and a job that was lost is a failed run, with the reason and where its log is."""

    config: Any
    params: dict[str, Any]
    hydra_context: Any
    _EXECUTOR: str

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from hydra.core.singleton import Singleton

        log = logging.getLogger(__name__)
        with sentences():
            executor = self._executor()
            numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
            states = [Singleton.get_state()] * len(numbers)
            names = [f"job_id_for_{number}" for number in numbers]
            lists = [list(overrides) for overrides in job_overrides]
            try:
                jobs = executor.map_array(self, lists, ["hydra.sweep.dir"] * len(numbers), numbers, names, states)
            except Exception as error:  # submitit's own, with sbatch's words as its message
                lines = [line for line in str(error).splitlines() if "error:" in line]
                raise VAEError(f"hydra.launcher: the queue did not take the jobs: {_words(lines, error)}.") from error
        log.info(f"{len(jobs)} jobs were given to the queue: {jobs[0].job_id} to {jobs[-1].job_id}")
        ended: dict[int, JobReturn] = {}
        missed = dict.fromkeys(range(len(jobs)), 0)
        try:
            while len(ended) < len(jobs):
                queued = self._queued(jobs)
                for index, job in enumerate(jobs):
                    if index in ended:
                        continue
                    finished = job.paths.result_pickle.exists()
                    there = not job.done() if queued is None else job.job_id in queued
                    missed[index] = 0 if finished or there else missed[index] + 1
                    if finished or missed[index] >= LOST:
                        ended[index] = self._result(job, numbers[index], job_overrides[index])
                        log.info(f"{len(ended)} of {len(jobs)} jobs have ended")
                if len(ended) < len(jobs):
                    time.sleep(SECONDS if self._EXECUTOR == "slurm" else 0.2)
        except KeyboardInterrupt:
            if self._EXECUTOR == "slurm":
                number = jobs[0].job_id.partition("_")[0]
                log.warning(
                    f"The jobs go on without this process; scancel {number} ends them. "
                    "The same command with resume=true later takes what they finished, and writes the report."
                )
            raise
        return [ended[index] for index in range(len(jobs))]

    def _executor(self) -> Any:
        import submitit  # slow to import
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        common = set(OmegaConf.structured(BaseQueueConf).keys())
        given = {
            name: value for name, value in self.params.items() if name not in ("submitit_folder", "max_num_timeout")
        }
        timeouts = {
            f"{self._EXECUTOR}_{name}": self.params[name] for name in ("max_num_timeout",) if name in self.params
        }
        try:
            executor = submitit.AutoExecutor(cluster=self._EXECUTOR, folder=self.params["submitit_folder"], **timeouts)
            executor.update_parameters(
                **{name if name in common else f"{self._EXECUTOR}_{name}": value for name, value in given.items()}
            )
        except (RuntimeError, NameError, TypeError, ValueError) as error:
            if "srun" in str(error):
                raise VAEError(
                    "hydra/launcher=submitit_slurm: there is no Slurm here (srun is not found): start the sweep on a "
                    "machine of the cluster, or choose hydra/launcher=joblib."
                ) from error
            raise VAEError(f"hydra.launcher: submitit does not take these options: {_words([], error)}.") from error
        return executor

    def _queued(self, jobs: Sequence[Any]) -> set[str] | None:
        """The array's jobs that are in the queue, waiting or running; all of them where it cannot be asked just now, and
        None of an executor without a queue."""
        if self._EXECUTOR != "slurm":
            return None
        number = jobs[0].job_id.partition("_")[0]
        command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={number}"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            if asked.returncode == 0:
                return {line.split()[0] for line in asked.stdout.splitlines() if line.split()[1:] not in ENDED}
            if "Invalid job id" in asked.stderr:  # all have ended, some time ago
                return set()
        return {job.job_id for job in jobs}

    def _result(self, job: Any, number: int, overrides: Sequence[str]) -> JobReturn:
        """What a job returned; of one that returned nothing, a failed run."""
        why = ""
        with contextlib.suppress(Exception):  # a damaged file
            outcome, result = job._get_outcome_and_result() if job.paths.result_pickle.exists() else ("lost", "")
            if outcome == "success":
                return cast(JobReturn, result)
            why = str(result).strip().splitlines()[-1] if result else ""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):  # what the name of its folder may be made of
            config.hydra.job.id, config.hydra.job.num = job.job_id, number
        folder = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
        status: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):  # none, or damaged
            status = dict(json.loads((folder / "status.json").read_text()))
        log = job.paths.stderr if job.paths.stderr.is_file() else job.paths.stdout
        said = status.get("state") == "finished" or status.get("reason") not in (None, "interrupted")
        if not said:  # by the run itself
            reason = f"Its job, {job.job_id}, ended without a result: {why or _accounted(job)}. Its log: {log}"
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "status.json", {**status, "state": "failed", "reason": reason})
            logging.getLogger(__name__).error(f"FAILED   {folder.name}: {reason}")
        return JobReturn(overrides, status=JobStatus.COMPLETED, _return_value=sweep_value(self.config, None))


#: States of jobs that squeue still shows for some minutes, as the words after the number in its lines.
ENDED = [
    [state] for state in ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT", "BOOT_FAIL")
]


def _accounted(job: Any) -> str:
    """What Slurm's accounting knows of why, where there is one."""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["sacct", "--noheader", "--allocations", "--format=State", f"--jobs={job.job_id}"]
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if asked.returncode == 0 and asked.stdout.strip():
            return asked.stdout.strip().splitlines()[-1].strip()
    return "it was cancelled, ran out of memory, or its node was lost"


def _words(lines: Sequence[str], error: Exception) -> str:
    found = [line.partition("error:")[2].strip() for line in lines] or [str(error).strip().splitlines()[-1]]
    return "; ".join(dict.fromkeys(found)).rstrip(".")


class SlurmLauncher(_Launcher, submitit_launcher.SlurmLauncher):
    """hydra/launcher=submitit_slurm"""


class LocalLauncher(_Launcher, submitit_launcher.LocalLauncher):
    """hydra/launcher=submitit_local: processes of this machine, for trying what a cluster will do"""


def use() -> None:
    """Let Hydra's names mean these: it takes launchers from packages named hydra_plugins only."""
    submitit_launcher.SlurmLauncher, submitit_launcher.LocalLauncher = SlurmLauncher, LocalLauncher
