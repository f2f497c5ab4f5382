"""A Slurm of one controller and two workers on this machine, for tests: `with cluster(folder) as environment`.

By hand: `python tests/slurm_cluster.py FOLDER` brings it up, says how to use it, and takes it down at Ctrl-C. Needs Debian's
slurm-wlm (which brings munge), and root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdTimeout=10
KillWait=2
MinJobAge=30
SchedulerParameters=sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=60 PriorityTier=1 State=UP
PartitionName=urgent Nodes=n1,n2 MaxTime=60 PriorityTier=2 State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    for program in ("slurmctld", "slurmd", "munged", "sbatch"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None:
            return f"{program} is not installed (Debian's slurm-wlm has it)"
    return None if os.geteuid() == 0 else "daemons of Slurm are started as root"


class Cluster:
    """`environment`: of the commands that use it. `kill_node`: end a worker and all that runs on it, as a power cut does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    def start(self, name: str) -> None:
        command = ["slurmctld", "-D", "-c"] if name == "slurmctld" else ["slurmd", "-D", "-N", name]
        command[0] = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin")
        log = (self.folder / f"{name}.out").open("a")
        self.daemons[name] = subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )

    def kill_node(self, name: str) -> None:
        nodes = self.asked("squeue", "--noheader", "--format=%A %N", "--array")  # of each job's number
        jobs = {number for number, node in nodes.items() if node == name}
        ended = [self.daemons[name].pid, *children_of(self.daemons[name].pid)]
        self.daemons.pop(name).kill()
        for line in subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines():
            pid, words = line.strip().split(maxsplit=1)  # "slurmstepd: [NUMBER.STEP]", which outlives its worker
            if words.startswith("slurmstepd:") and words.partition("[")[2].partition(".")[0] in jobs:
                ended += [int(pid), *children_of(int(pid))]
        for pid in ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def asked(self, *command: str) -> dict[str, str]:
        output = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout
        return dict(line.split(maxsplit=1) for line in output.splitlines() if len(line.split(maxsplit=1)) == 2)

    def wait_for(self, what, seconds: float = 300) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, f"waited {seconds} s; see {self.folder}"
            time.sleep(0.5)


def children_of(pid: int) -> list[int]:
    output = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    found = [int(word) for word in output.split()]
    return found + [grandchild for child in found for grandchild in children_of(child)]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextlib.contextmanager
def cluster(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("state", "spool-n1", "spool-n2"):
        (folder / name).mkdir()
    host, ports = socket.gethostname().partition(".")[0], [free_port() for _ in range(3)]
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=ports))
    munge = None
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        if not Path("/etc/munge/munge.key").exists():
            subprocess.run(["mungekey", "--create"], check=True)
        Path("/run/munge").mkdir(exist_ok=True)
        munge = subprocess.Popen(["munged", "--foreground", "--force"], stdout=subprocess.DEVNULL)
    here = Cluster(folder)
    try:
        for name in ("slurmctld", "n1", "n2"):
            here.start(name)
        idle = ["sinfo", "--noheader", "--Node", "--partition=cpu", "--format=%N %T"]

        def up() -> bool:
            with contextlib.suppress(subprocess.CalledProcessError):
                return list(here.asked(*idle).values()) == ["idle", "idle"]
            return False

        here.wait_for(up, 30)
        yield here
    finally:
        subprocess.run(["scancel", "--user=root"], env=here.environment, capture_output=True)
        for name in list(here.daemons):
            if name != "slurmctld":
                here.kill_node(name)
        here.daemons["slurmctld"].kill()
        if munge:
            munge.terminate()


if __name__ == "__main__":
    with cluster(Path(sys.argv[1]).resolve()) as brought_up:
        print(f"export SLURM_CONF={brought_up.environment['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
