"""The project and the bare loop side by side: the same data and weights in both, and their epochs in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import bare
import hydra
import pytorch_lightning as pl
import torch

from vae.cli import CONFIGS
from vae.engine.build import instantiate


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


class InTurn:
    """Epochs of the bare loop and of another, one after the other in one process; what both took, warm-up left out.

    Call `bare_turn` before and `end` after each of the other's epochs. Times are (seconds, CPU seconds of the process).
    """

    def __init__(self, bare_epoch: Callable[[], None]) -> None:
        self.bare_epoch = bare_epoch
        self.bare: list[tuple[float, float]] = []
        self.other: list[tuple[float, float]] = []

    @staticmethod
    def now() -> tuple[float, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def bare_turn(self) -> None:
        start = self.now()
        self.bare_epoch()
        self.since = self.now()
        self.bare.append((self.since[0] - start[0], self.since[1] - start[1]))

    def end(self) -> None:
        end = self.now()
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
        """Medians over the epochs, in milliseconds a step, and of the ratios of neighbouring epochs."""
        kept = list(zip(self.bare, self.other, strict=True))[1:]  # the first epoch warms up
        ratios = sorted(p[0] / b[0] for b, p in kept)
        return {
            "bare_ms": 1e3 * statistics.median(b[0] for b, _ in kept) / steps,
            "project_ms": 1e3 * statistics.median(p[0] for _, p in kept) / steps,
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "cpu_ratio": statistics.median(p[1] / b[1] for b, p in kept),
            "repetitions": len(kept),
            "steps": steps,
        }
