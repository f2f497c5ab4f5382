"""Time and peak memory against batch, latent size, images, K of the importance bound, and jobs."""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pair import all_images, train_split

from vae.data.images import Batch, Images, Splits
from vae.data.module import ImageDataModule
from vae.engine.callbacks.records import Stopwatch
from vae.engine.module import VAEModule
from vae.evaluation.likelihood import log_likelihood
from vae.likelihoods import Bernoulli
from vae.model import VAE
from vae.networks import mlp
from vae.objectives.elbo import BetaVAE
from vae.priors import StandardNormal


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One curve each: seconds and peak bytes against what grows, of the MLP, on one thread and the CPU."""
    torch.set_num_threads(1)
    # The process has imported and run everything once before it is forked, so that no point pays for that.
    images = all_images(train_split("data=mnist"))
    train_seconds(images[:256])
    bound_seconds(images[:1], 1)
    many = images[torch.arange(1000 if options.quick else 300_000) % len(images)]

    def values(*all_of_them: int) -> tuple[int, ...]:
        return all_of_them[:2] if options.quick else all_of_them

    def curve(unit: str, grown: tuple[int, ...], point: Callable[[int], dict[str, float]]) -> dict[str, Any]:
        points = [{"value": value, **point(value)} for value in grown]
        exponents = {
            of: math.log(points[-1][of] / points[-2][of]) / math.log(grown[-1] / grown[-2])
            for of in ("seconds", "bytes")
        }
        return {"unit": unit, "points": points, "exponent_at_the_end": exponents}

    return {
        "batch": curve(
            "20 training steps",
            values(32, 128, 512, 2048, 8192),
            lambda batch: alone(lambda: train_seconds(many[: 20 * batch], batch)),
        ),
        "latent_dim": curve(
            "50 training steps at batch 128",
            values(2, 8, 32, 128, 512),
            lambda latent: alone(lambda: train_seconds(many[: 50 * 128], latent_dim=latent)),
        ),
        "images": curve(
            "an epoch at batch 500",
            values(600, 1000, 10_000, 50_000, 300_000),
            lambda n: alone(lambda: train_seconds(many[:n].clone(), 500)),
        ),
        "K": curve(
            "the importance-weighted bound of 100 images",
            values(1, 10, 100, 1000, 5000),
            lambda k: alone(lambda: bound_seconds(images[:100], k)),
        ),
        "jobs": curve(
            "as many runs of 100 steps at batch 128 side by side",
            values(1, 2, 4, 8),
            lambda n: side_by_side([lambda: train_seconds(many[: 100 * 128])] * n),
        ),
    }


def mlp_module(latent_dim: int) -> Any:
    """The untrained module of `data=mnist`, made without the data."""
    vae = VAE(*mlp((1, 28, 28), latent_dim, 1), StandardNormal(latent_dim), Bernoulli())
    return VAEModule(vae, BetaVAE(), functools.partial(torch.optim.Adam, lr=1e-3, fused=True))


def train_seconds(images: Any, batch: int = 128, latent_dim: int = 20) -> float:
    """An epoch of these images, by the project's module, loader and Trainer."""
    splits = Splits(Images(images), Images(images[:10]), Images(images[:10]))
    data = ImageDataModule(lambda: splits, batch_size=min(batch, len(images)), binarize="dynamic")
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    watch = Stopwatch()
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, limit_val_batches=0, callbacks=[watch], **quiet)
    trainer.fit(mlp_module(latent_dim), data)
    return watch.seconds[0]


def bound_seconds(images: Any, samples: int) -> float:
    """The importance-weighted bound of these images."""
    vae, batch = mlp_module(20).vae, Batch(images.float() / 255, None, 0)
    start = time.perf_counter()
    log_likelihood(vae, batch, samples)
    return time.perf_counter() - start


def alone(function: Callable[[], float]) -> dict[str, float]:
    """The seconds that `function` returns, run in a process of its own, and the peak memory that it added."""
    receiver, process = started(function)
    try:
        seconds, memory = receiver.recv()
    except EOFError as error:
        raise RuntimeError("A measured process ended without a result.") from error
    finally:
        process.join()
    return {"seconds": seconds, "bytes": memory}


def side_by_side(functions: list[Callable[[], float]]) -> dict[str, float]:
    """Wall-clock seconds until the last of them has ended, each in a process of its own, and the sum of their memory."""
    start = time.perf_counter()
    begun = [started(function) for function in functions]
    memory = sum(receiver.recv()[1] for receiver, _ in begun)
    for _, process in begun:
        process.join()
    return {"seconds": time.perf_counter() - start, "bytes": memory}


def started(function: Callable[[], float]) -> tuple[Any, Any]:
    """A forked process, and the pipe's end at which (seconds, peak bytes above what it began with) will arrive."""
    context = multiprocessing.get_context("fork")  # what was imported and loaded is shared, and not counted
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        before = peak_bytes()
        seconds = function()
        sender.send((seconds, peak_bytes() - before))

    process = context.Process(target=child)
    process.start()
    sender.close()
    return receiver, process


def peak_bytes() -> int:
    """The largest resident size of this process so far; a forked one begins with what it is then."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def draw(growth: dict[str, Any], folder: Path) -> None:
    """growth_NAME.png of each curve: time and peak memory on logarithmic axes, beside a line of slope one."""
    for name, curve in growth.items():
        figure = Figure(figsize=(8, 3.2), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        x = [point["value"] for point in curve["points"]]
        for axes, of, scale, label in (
            (figure.add_subplot(1, 2, 1), "seconds", 1, "seconds"),
            (figure.add_subplot(1, 2, 2), "bytes", 1 / 2**20, "peak memory added (MiB)"),
        ):
            y = [scale * point[of] for point in curve["points"]]
            axes.loglog(x, y, "o-", color="#3b6ea8", label="measured")
            axes.loglog(x, [y[-1] * value / x[-1] for value in x], ":", color="grey", label="proportional")
            axes.set(xlabel=name, ylabel=label, ylim=(min(y) / 2, max(y) * 2))
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
        figure.suptitle(f"{curve['unit']}, against {name}", fontsize=10)
        figure.savefig(folder / f"growth_{name}.png")
