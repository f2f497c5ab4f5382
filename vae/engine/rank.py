"""`python -m vae.engine.rank`: a process above 0 of a run on several devices, started by `vae.engine.devices` alone."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import warnings
from pathlib import Path

import torch.distributed as dist
from omegaconf import OmegaConf

from vae.cli import sentences
from vae.engine.devices import HOST, PATIENCE, Crew
from vae.engine.run import accompany


def end_with_rank_0() -> None:
    """Leave at once when the process at the other end of the standard input is gone."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: rank 0 decides what follows
    logging.disable(logging.ERROR)  # rank 0 says the same
    warnings.simplefilter("ignore")
    work = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_rank_0, daemon=True).start()
    store = dist.TCPStore(HOST, work["port"], is_master=False, timeout=PATIENCE)
    crew = Crew(work["rank"], work["world"], store, work["backend"])
    checkpoint = work["checkpoint"] and Path(work["checkpoint"])
    try:
        accompany(OmegaConf.create(work["config"]), Path(work["folder"]), checkpoint, crew)
    finally:
        crew.end(0.0)


if __name__ == "__main__":
    with sentences():
        main()
