"""The project's training step, TensorBoard and progress bar on, against the bare loop of bare.py, epochs in turn."""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bare
import pytorch_lightning as pl
import torch
from pair import BareLoop, InTurn, all_images, bare_copy, compose

from vae.engine.build import build
from vae.engine.trainer import build_trainer, settle_process
from vae.seeding import derive, generator

#: name -> (net, overrides, batch size, steps per epoch)
STEPS = {
    "mlp 784-400-20, 28x28, batch 128": ("mlp", ["data=mnist", "model.latent_dim=20"], 128, 100),
    "mlp 784-400-20, 28x28, batch 512": ("mlp", ["data=mnist", "model.latent_dim=20"], 512, 40),
    "conv (burgess), 64x64, batch 64": (
        "burgess",
        ["data=sprites", "data.source.subset={orientation:10,x:16,y:16}", "network=burgess", "model.latent_dim=10"],
        64,
        40,
    ),
}


#: what each device can do more, against the same bare loop in 32-bit floats
VARIANTS = {
    "cpu": {"": [], ", bf16-mixed": ["trainer.precision=bf16-mixed"]},
    "cuda": {
        "": [],
        ", bf16-mixed": ["trainer.precision=bf16-mixed"],
        ", compiled": ["compile=true"],
        ", compiled, CUDA graphs": ["compile=reduce-overhead"],
    },
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (net, overrides, batch, steps) in STEPS.items():
        steps = 5 if options.quick else steps
        common = [*overrides, f"data.batch_size={batch}", f"data.limit={batch * steps}", f"threads={options.threads}"]
        difference = largest_difference(net, common, min(20, steps))
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            for variant, more in VARIANTS[device].items():
                try:
                    measured = compare_steps(net, [*common, *more], 2 if options.quick else 15, device)
                    if "bf16" in variant:
                        measured["nats"] = nats_gained(common, more, 1 if options.quick else 10, device)
                except Exception as error:  # one way of running that this device does not have must not end the others
                    measured = {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
                label = f"{name}{variant}" + (f", {torch.cuda.get_device_name()}" if device == "cuda" else "")
                found[label] = {**measured, "largest_relative_difference_of_losses": difference}
        if torch.cuda.is_available() and net == "mlp":
            found[f"{name}, bare loop captured as one CUDA graph"] = captured_step(net, common, batch)
    return found


def largest_difference(net: str, overrides: list[str], steps: int = 20) -> float:
    """Largest relative difference of the losses of both loops over the first steps, given the same weights and noise.

    Raises RuntimeError if it is more than rounding: the two would not do the same arithmetic.
    """

    config = compose(*overrides, "trainer.accelerator=cpu", "callbacks=minimal", "logger=none", "trainer.max_epochs=1")
    config.trainer.max_steps = steps
    data, module = build(config)
    model = bare_copy(net, module, "cpu")
    losses: list[float] = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))

    trainer = build_trainer(config)
    trainer.limit_val_batches = 0
    trainer.callbacks.append(Recorder())
    trainer.fit(module, data)

    def noise() -> Iterator[tuple[torch.Generator, torch.Generator]]:
        for number in range(steps):
            seed = derive(config.seed, "train", 0, 0, number)
            yield generator(seed, "binarize"), generator(seed, "z")

    train = data.splits_ready().train
    order = torch.randperm(len(train), generator=generator(config.seed, "order", 0))
    images = all_images(train)
    theirs = bare.steps(model, images, order, data.batch_size, data.binarize == "dynamic", noise())
    difference = max(abs(a / float(b) - 1) for a, b in zip(losses, theirs, strict=True))
    if difference > 1e-4:
        raise RuntimeError(f"The two loops differ by {difference:.1e} in their first {steps} losses: not the same sum.")
    return difference


def compare_steps(net: str, overrides: list[str], repetitions: int, device: str) -> dict[str, float]:
    """Milliseconds a training step of both loops, epochs in turn within one process; medians over the repetitions."""
    where = [f"trainer.max_epochs={repetitions + 1}", f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}"]
    config = compose(
        *overrides,
        *where,
        "+trainer.limit_val_batches=1",
        "trainer.num_sanity_val_steps=0",
        "callbacks.pictures.every_n_epochs=100000",
    )
    settle_process(config.threads)
    data, module = build(config)
    images = all_images(data.splits_ready().train)
    what = (net, module.vae.latent_dim, images, data.batch_size, data.binarize == "dynamic", device)
    turns = InTurn(BareLoop(*what), BareLoop(*what, settled=True))
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config, Path(folder), progress_bar=True)
        trainer.callbacks.insert(0, turns.callback())
        trainer.fit(module, data)
    return turns.measured(math.ceil(len(images) / data.batch_size))


def nats_gained(overrides: list[str], more: list[str], epochs: int, device: str) -> float:
    """val/elbo with these settings less that without, in nats per image: the same seed, so many epochs of the same images."""
    elbo = []
    for settings in ([], more):
        config = compose(*overrides, *settings, f"trainer.max_epochs={epochs}", "callbacks=minimal", "logger=none")
        config.trainer.accelerator = "gpu" if device == "cuda" else "cpu"
        data, module = build(config)
        with tempfile.TemporaryDirectory() as folder:
            build_trainer(config, Path(folder)).fit(module, data)
        elbo.append(float(module.validation["val/elbo"]))
    return elbo[1] - elbo[0]


def captured_step(net: str, overrides: list[str], batch: int, repetitions: int = 10) -> dict[str, float]:
    """Milliseconds a step of the bare loop, and of the same step as one CUDA graph: the limit on a GPU."""
    data, module = build(compose(*overrides))
    images = all_images(data.splits_ready().train).cuda()
    eager, graphed = (bare_copy(net, module, "cuda", capturable=c) for c in (False, True))
    step = bare.CapturedStep(graphed, images, batch, data.binarize == "dynamic")
    noise = torch.Generator("cuda").manual_seed(0)
    times: dict[str, list[float]] = {"bare_ms": [], "project_ms": []}
    for _ in range(repetitions + 1):
        for name, run in (
            ("bare_ms", lambda: bare.epoch(eager, images, batch, data.binarize == "dynamic", noise)),
            ("project_ms", lambda: step.epoch(images)),
        ):
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start) / (len(images) // batch))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {**medians, "ratio": medians["project_ms"] / medians["bare_ms"], "repetitions": repetitions}
