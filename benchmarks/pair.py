"""The project and the bare loop side by side: the same networks and images in both, and their epochs in turn.

A bare loop has a process of its own, for what the project sets of its process (`settle_process`) is part of the project; a
second one, whose process is settled alike, tells how much of the difference that is.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import time
from typing import Any

import bare
import hydra
import pytorch_lightning as pl
import torch

from vae.cli import CONFIGS
from vae.engine.build import instantiate
from vae.engine.trainer import settle_process


def compose(*overrides: str) -> Any:
    """The training config."""
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        return hydra.compose("train", list(overrides))


def train_split(*overrides: str) -> Any:
    config = compose(*overrides)
    data = instantiate(config.data, seed=config.seed)
    return data.splits_ready().train


def all_images(images: Any) -> Any:
    """A split as one uint8 tensor, which is how the bare loop holds it."""
    return torch.cat([images.gather(part)[0] for part in torch.arange(len(images)).split(1000)])


def bare_copy(net: str, module: Any, device: Any, **options: bool) -> Any:
    """The bare loop's networks and optimiser, with the weights of the project's module."""
    encoder, decoder = getattr(bare, net)(module.vae.latent_dim)
    bias, *body = module.vae.decoder.parameters()  # the output's bias is the decoder's own, the bare loop's comes last
    theirs = [*module.vae.encoder.parameters(), *body, bias]
    with torch.no_grad():
        for mine, other in zip([*encoder.parameters(), *decoder.parameters()], theirs, strict=True):
            mine.copy_(other.reshape(mine.shape))
    return bare.nets(encoder, decoder, device, **options)


class BareLoop:
    """The bare loop in a process of its own; a call is an epoch of it, and returns (seconds, CPU seconds)."""

    def __init__(
        self,
        net: str,
        latent_dim: int,
        images: Any,
        batch_size: int,
        dynamic: bool,
        device: str = "cpu",
        settled: bool = False,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        options = (net, latent_dim, images, batch_size, dynamic, device, settled, torch.get_num_threads())
        self.process = context.Process(target=_serve, args=(other, *options), daemon=True)
        self.process.start()

    def __call__(self) -> tuple[float, float]:
        self.pipe.send("an epoch")
        times: tuple[float, float] = self.pipe.recv()
        return times

    def close(self) -> None:
        self.process.terminate()


def _serve(
    pipe: Any,
    net: str,
    latent_dim: int,
    images: Any,
    batch_size: int,
    dynamic: bool,
    device: str,
    settled: bool,
    threads: int,
) -> None:
    (settle_process if settled else torch.set_num_threads)(threads)
    model, images = bare.nets(*getattr(bare, net)(latent_dim), device), images.to(device)
    noise = torch.Generator(device).manual_seed(0)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            start = now()
            bare.epoch(model, images, batch_size, dynamic, noise)
            end = now()
            pipe.send((end[0] - start[0], end[1] - start[1]))


def now() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


class InTurn:
    """Epochs of the bare loop and of another, one after the other; what both took, warm-up left out.

    Call `bare_turn` before and `end` after each of the other's epochs. Times are (seconds, CPU seconds of the process).
    """

    def __init__(self, bare_loop: BareLoop, settled: BareLoop | None = None) -> None:
        self.bare_loop, self.settled_loop = bare_loop, settled
        self.bare: list[tuple[float, float]] = []
        self.settled: list[tuple[float, float]] = []
        self.other: list[tuple[float, float]] = []

    def bare_turn(self) -> None:
        self.bare.append(self.bare_loop())
        if self.settled_loop is not None:
            self.settled.append(self.settled_loop())
        self.since = now()

    def end(self) -> None:
        end = now()
        self.other.append((end[0] - self.since[0], end[1] - self.since[1]))

    def callback(self) -> Any:
        """Takes turns with a Lightning Trainer. Its validation, which happens within an epoch, is no part of training."""
        turns = self

        class Turns(pl.Callback):
            def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
                turns.bare_turn()

            def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
                turns.end()

        return Turns()

    def measured(self, steps: int) -> dict[str, Any]:
        """Medians over the epochs, in milliseconds a step, and of the ratios of neighbouring epochs. Ends the bare loops."""
        # the first epoch warms up
        bare, settled, other = (times[1:] for times in (self.bare, self.settled, self.other))
        ratios = sorted(o[0] / b[0] for b, o in zip(bare, other, strict=True))
        found = {
            "bare_ms": 1e3 * statistics.median(b[0] for b in bare) / steps,
            "project_ms": 1e3 * statistics.median(o[0] for o in other) / steps,
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "cpu_ratio": statistics.median(o[1] / b[1] for b, o in zip(bare, other, strict=True)),
            "repetitions": len(other),
            "steps": steps,
        }
        if settled:
            found["settled_ratio"] = statistics.median(o[1] / s[1] for s, o in zip(settled, other, strict=True))
        for loop in (self.bare_loop, self.settled_loop):
            if loop is not None:
                loop.close()
        return found
