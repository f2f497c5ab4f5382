"""16 runs from the command to the report, against the bare loop training the same 16 one after another."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from clock import PARTS as CLOCKED
from pair import all_images, train_split

HERE = Path(__file__).parent
PARTS = ("data and model", *CLOCKED)  # of a run


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both ways to train 4 betas x 4 seeds, as whole processes; and where the time of the sweep goes."""
    betas, seeds = ("0.5,1", "0,1") if options.quick else ("0.5,1,2,4", "0,1,2,3")
    epochs, limit = (1, "data.limit=2000") if options.quick else (options.epochs, "data.limit=null")
    jobs = options.jobs
    common = ["data=mnist", "model.latent_dim=20", f"trainer.max_epochs={epochs}", limit]
    images = all_images(train_split(*common))
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    with tempfile.TemporaryDirectory() as temporary:
        numbers, folder = Path(temporary) / "images.npy", Path(temporary) / "sweep"
        np.save(numbers, images.numpy())
        loop = [
            sys.executable,
            HERE / "bare.py",
            numbers,
            "--epochs",
            str(epochs),
            "--seeds",
            str(len(seeds.split(","))),
        ]
        bare_seconds = seconds_of([*loop, "--betas", *betas.split(",")], environment)
        command = [sys.executable, "-m", "vae.train", "-m", "hydra/launcher=joblib", f"hydra.launcher.n_jobs={jobs}"]
        command += [*common, f"objective.beta={betas}", f"seed={seeds}", "evaluation.nll_samples=0", f"run={folder}"]
        started = time.time()
        total = seconds_of([*command, "+callbacks.clock._target_=clock.Clock"], environment)
        ended = time.time()
        parts = parts_of(folder, started, ended, jobs)
    return {
        "runs": len(betas.split(",")) * len(seeds.split(",")),
        "epochs": epochs,
        "jobs": jobs,
        "bare_seconds": bare_seconds,
        "project_seconds": total,
        "ratio": total / bare_seconds,
        "seconds": parts,
    }


def seconds_of(command: list[Any], environment: dict[str, str]) -> float:
    """Wall-clock seconds of a whole process. Raises RuntimeError with what it said if it failed."""
    start = time.perf_counter()
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return seconds


def parts_of(folder: Path, started: float, ended: float, jobs: int) -> dict[str, float]:
    """Seconds of the sweep's wall clock: parts of its runs are summed and shared out among the jobs."""
    sums = dict.fromkeys(PARTS, 0.0)
    for clock in folder.glob("*/clock.json"):
        seconds = json.loads(clock.read_text())
        whole = json.loads((clock.parent / "status.json").read_text())["seconds"]
        for part in PARTS[1:]:
            sums[part] += seconds.get(part, 0.0) / jobs
        sums["data and model"] += (whole - sum(seconds.values())) / jobs
    first = min(file.stat().st_mtime for file in folder.glob("*/overrides.yaml"))
    last = max(file.stat().st_mtime for file in folder.glob("*/status.json"))
    waiting = last - first - sum(sums.values())
    return {"start-up": first - started, **sums, "between runs": waiting, "report": ended - last}
