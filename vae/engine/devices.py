"""One run on several devices of this machine: its processes ("ranks"), how they are started, agree and end together.

Rank 0 is the process that was asked for the run, and alone writes. It starts the others as `python -m vae.engine.rank`, not its
own command line again, so that a run of a sweep, of a notebook or of a test does the same. They meet by a store that rank 0
serves on the loopback address, and end with it, however it ends. `vae.ranks` says how a batch is shared out.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn

from vae import ranks
from vae.data.images import Splits
from vae.data.module import ImageDataModule
from vae.errors import VAEError

HOST = "127.0.0.1"
PATIENCE = timedelta(hours=1)  # of ranks that wait for rank 0 to draw pictures, or for a slow disk
DOWNLOADING = timedelta(days=7)  # while rank 0 may be


class SeveralDevices(DDPStrategy):
    """Data-parallel training in which a rank's work is its rows of each batch, see `vae.ranks`.

    DDP without its wrapper, whose mean of gradients is right only where a loss is a mean over images. The processes are
    there already, and have met.
    """

    def __init__(self) -> None:
        super().__init__(cluster_environment=_Started())

    def _configure_launcher(self) -> None:
        self._launcher = None

    def setup_distributed(self) -> None:
        self.set_world_ranks()

    def configure_ddp(self) -> None:
        assert self.model is not None
        ranks.copy_from_first(self.model)

    def barrier(self, *_: Any, **__: Any) -> None:
        """None: rank 0 writes checkpoints at times of its own, and nobody reads what it is still writing."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with ranks.sharing():
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        with ranks.sharing():
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        with ranks.sharing():
            return super().test_step(*args, **kwargs)

    def post_backward(self, closure_loss: Tensor) -> None:
        module = self.lightning_module
        assert module is not None
        if not module.trainer.fit_loop._should_accumulate():
            ranks.average_gradients(module.parameters())


class _Started(LightningEnvironment):
    """Where this process stands among those that `Crew` started."""

    creates_processes_externally = True

    def local_rank(self) -> int:
        return ranks.rank()

    def node_rank(self) -> int:
        return 0

    def teardown(self) -> None:
        """Nothing was set."""


def refuse_what_depends_on_rows(module: nn.Module) -> None:
    """Raises VAEError for layers whose result for an image depends on the rows that its rank has."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd):
            raise VAEError(
                f"trainer.devices: {name} is a {type(layer).__name__}, which would treat an image by the device that holds it: "
                "use trainer.devices=1."
            )


class Crew:
    """The ranks of a run as one of them sees it: `rank` of `world`; with a world of one, every method does nothing."""

    def __init__(
        self, rank: int = 0, world: int = 1, store: dist.TCPStore | None = None, backend: str = "gloo"
    ) -> None:
        self.rank, self.world, self.store, self.backend = rank, world, store, backend
        self.others: list[tuple[subprocess.Popen[str], IO[str]]] = []  # with what each said on its standard error

    @property
    def first(self) -> bool:
        return self.rank == 0

    def tell(self, news: str) -> None:
        """Let ranks that `wait` for this go on."""
        if self.store is not None and self.first:
            self.store.set(news, "")

    def wait(self, news: str) -> None:
        """On a rank above 0: until rank 0 tells."""
        if self.store is not None and not self.first:
            self.store.wait([news], DOWNLOADING)

    def meet(self, data: ImageDataModule) -> None:
        """Wait for all ranks, and make them a process group. Raises VAEError where one has other data than the others."""
        if self.store is None:
            return
        self.store.set(f"data {self.rank}", json.dumps(digest(data)))
        for other in range(self.world):
            while not self.store.check([f"data {other}"]):
                self.refuse_the_dead()
                time.sleep(0.02)
        refuse_unequal([json.loads(self.store.get(f"data {other}")) for other in range(self.world)])
        dist.init_process_group(self.backend, store=self.store, rank=self.rank, world_size=self.world, timeout=PATIENCE)

    def refuse_the_dead(self, patience: float = 0.0) -> None:
        """Raises VAEError where a process that rank 0 started has ended, or does so within so many seconds."""
        until = time.monotonic() + patience
        while True:
            for rank, (process, said) in enumerate(self.others, 1):
                if process.poll() is not None:
                    said.seek(0)
                    raise VAEError(_epitaph(rank, process.returncode, said.read()))
            if time.monotonic() >= until:
                return
            time.sleep(0.05)

    def start(self, work: dict[str, Any]) -> None:
        """Start the other ranks, and give each the work on its standard input, which stays open as long as rank 0 lives."""
        path = os.pathsep.join([entry or os.getcwd() for entry in sys.path])
        for rank in range(1, self.world):
            said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `end`
            process = subprocess.Popen(
                [sys.executable, "-m", "vae.engine.rank"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=said,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
            self.others.append((process, said))
            assert process.stdin is not None and self.store is not None
            told = {**work, "rank": rank, "world": self.world, "port": self.store.port, "backend": self.backend}
            process.stdin.write(json.dumps(told) + "\n")
            process.stdin.flush()

    def end(self, patience: float) -> None:
        """Leave the group; let the others end within so many seconds, or end them."""
        if self.store is not None and dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # what went wrong before counts
                dist.destroy_process_group()
        until = time.monotonic() + patience
        for process, said in self.others:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            said.close()


@contextlib.contextmanager
def crew(world: int, backend: str, config: DictConfig, folder: Path, checkpoint: Path | None) -> Iterator[Crew]:
    """The ranks of a run, on rank 0: started, and ended with the context. Raises VAEError where one of them did not last."""
    if world == 1:
        yield Crew()
        return
    store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=PATIENCE)
    group = Crew(0, world, store, backend)
    patience = 0.0
    try:
        group.start(
            {
                "config": OmegaConf.to_container(config),
                "folder": str(folder),
                "checkpoint": checkpoint and str(checkpoint),
            }
        )
        yield group
        patience = 20.0
    except RuntimeError as error:
        if re.search(r"gloo|nccl|connection|socket|peer", str(error), re.IGNORECASE):
            group.refuse_the_dead(patience=5.0)
        raise
    finally:
        group.end(patience)


def _epitaph(rank: int, code: int, said: str) -> str:
    """Why a rank has ended, in one sentence."""
    lines = [line for line in said.strip().splitlines() if line.strip()]
    if code < 0:
        why = f"was killed by signal {-code}"
    else:
        why = f"ended with code {code}" + (f" ({lines[-1].removeprefix('Error: ').rstrip('.')})" if lines else "")
    return f"The process of device {rank} {why}: resume=true goes on from the run's last checkpoint, if there is one."


# --- the same data everywhere -------------------------------------------------------------------------------------------


def digest(data: ImageDataModule) -> dict[str, list[Any]]:
    """Of each split, how many images there are, their shape, and a hash of some of them with all labels."""
    found = {}
    for name in Splits._fields:
        split = getattr(data.splits_ready(), name)
        some = torch.linspace(0, len(split) - 1, min(len(split), 4 if split.streaming else 64)).long()
        hashed = hashlib.blake2b(digest_size=8)
        for values in (*split.gather(some), split.y):
            if values is not None:
                hashed.update(values.contiguous().numpy().tobytes())
        found[name] = [len(split), list(split.shape), hashed.hexdigest()]
    return found


def refuse_unequal(digests: list[dict[str, list[Any]]]) -> None:
    """Raises VAEError where ranks differ in their data. digests: of each rank, in its order."""
    for rank, theirs in enumerate(digests):
        for split, (images, shape, hashed) in theirs.items():
            expected = digests[0][split]
            if [images, shape, hashed] != expected:
                has = (
                    f"{images} images of shape {tuple(shape)}, not {expected[0]} of {tuple(expected[1])}"
                    if [images, shape] != expected[:2]
                    else "other pixels or labels"
                )
                raise VAEError(
                    f"Device {rank} has other data than device 0: in the {split} split {has}. All devices of a run need the "
                    "same files, unchanged while it starts."
                )
