"""Commands as a person types them, without waiting for torch each time.

`python -m MODULE ...` takes seconds to import what it needs, and milliseconds for what most tests ask of it. So one server is
started that has imported it all and run nothing; each command is a process of its own, forked from there, with its own
folder, environment, output and exit code. One that gives its runs to joblib's processes begins anew: those start as it did.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["vae.engine.run", "vae.engine.sweep", "vae.report.sweep", "matplotlib.figure"])


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(module: str, *arguments: str, cwd: Path, **environment: str) -> Done:
    """What `python -m MODULE ARGUMENTS` in the folder `cwd` answers, with these variables besides those of the tests."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **environment}
    if any("launcher" in argument for argument in arguments):
        command = [sys.executable, "-m", module, *arguments]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
        return Done(done.returncode, done.stdout, done.stderr)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        process = SERVER.Process(target=_command, args=(module, arguments, str(cwd), environment, outputs))
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{module} {' '.join(arguments)} did not end within five minutes")
        return Done(process.exitcode, *(path.read_text() for path in outputs))


def _command(
    module: str, arguments: tuple[str, ...], cwd: str, environment: dict[str, str], outputs: list[Path]
) -> None:
    for descriptor, path in enumerate([os.devnull, *outputs]):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [cwd, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:  # joblib's workers end with their interpreter; without one they would be waited for until long idle
        if executors := sys.modules.get("joblib.externals.loky"):
            executors.get_reusable_executor().shutdown()
