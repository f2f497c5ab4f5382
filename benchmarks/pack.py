"""Runs as one program against the same runs one after another: training steps and whole runs, start-up left out.

`python benchmarks/pack.py [--quick]` prints both, and the operators of a step, as JSON; and of latents of several sizes, one
padded stack against a stack for each size. One thread. Steps are taken in turn, a block of one form and then of the other,
and measured in CPU time, for others use the machine too; ratios are medians of pairs.
On a GPU it is 64 runs against one, in seconds.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pair import compose
from torch.profiler import ProfilerActivity, profile

from vae.engine import packing
from vae.engine.build import SHARED, build
from vae.engine.packing import MOST_PADDING, Pack
from vae.engine.run import train
from vae.engine.stack import Member, Stack
from vae.engine.traced import TRACED_AFTER
from vae.engine.trainer import build_trainer, settle_process

#: name -> (runs, overrides)
SETS = {
    "15 runs of the digits MLP, 64-400-16, batch 64": (15, ["data=digits", "model.latent_dim=16"]),
    "16 runs of 784-400-20, batch 128": (16, ["data=mnist", "model.latent_dim=20", "data.limit=3840"]),
}
#: Sizes of the latent, with four betas each.
LATENT_DIMS = (2, 5, 10, 20)
#: name -> (overrides, epochs of whole runs)
PADDED = {
    "16 runs of the digits MLP, latents of 2, 5, 10 and 20, batch 64": (["data=digits"], (5, 50)),
    "16 runs of 784-400-D, D = 2, 5, 10 and 20, batch 128": (["data=mnist", "data.limit=3840"], (5,)),
}
ON_GPU = "64 runs of 784-400-20, batch 128, against one"
GPU = torch.cuda.is_available()
PLAIN = [f"trainer.accelerator={'gpu' if GPU else 'cpu'}", "threads=1"]


def configs_of(runs: int, overrides: list[str], *more: str) -> list[Any]:
    """Runs that differ in beta and seed."""
    return [
        compose(*overrides, *PLAIN, *more, f"objective.beta={0.25 * 2 ** (n % 5)}", f"seed={n // 5}")
        for n in range(runs)
    ]


def now() -> float:
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def blocks_of(config: Any, steps: int) -> Callable[[], float]:
    """The project's own training of one run, by its Trainer: each call goes on for so many steps; returns their seconds."""
    import pytorch_lightning as pl
    from greenlet import getcurrent, greenlet

    class Pausing(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if module.steps % steps == 0:
                getcurrent().parent.switch()

    def fit() -> None:
        with tempfile.TemporaryDirectory() as folder:
            data, module = build(config)
            trainer = build_trainer(config, Path(folder))
            trainer.limit_val_batches = 0
            trainer.callbacks.append(Pausing())
            trainer.fit(module, data)

    run = greenlet(fit)

    def block() -> float:
        start = now()
        run.switch()
        return now() - start

    block()  # builds it all
    return block


def stack_blocks(configs: list[Any], steps: int) -> tuple[Stack, Callable[[], float]]:
    members, loaders = [], []
    shared = SHARED.set({})
    built = [build(config) for config in configs]
    SHARED.reset(shared)
    for data, module in built:
        module.train().to("cuda" if GPU else "cpu")
        members.append(Member(module.vae, module.objective, module.configure_optimizers(), data))
        loader = data.train_dataloader()
        loader.unread = True  # as a pack has it
        loaders.append(_endless(loader))
    stack, taken = Stack(members), 0

    def block() -> float:
        nonlocal taken
        start = now()
        blocks = [[next(loader) for loader in loaders] for _ in range(steps)]
        stack.train(blocks, taken)
        taken += steps
        return now() - start

    while taken <= TRACED_AFTER:
        block()
    return stack, block


def _endless(loader: Any) -> Any:
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            if batch.size == loader.sampler.batch_size:
                yield batch
        epoch += 1


def steps_in_turn(runs: int, overrides: list[str], steps: int, repetitions: int) -> dict[str, float]:
    configs = configs_of(runs, overrides, "trainer.max_epochs=100000", "logger=none", "callbacks=minimal")
    each = [blocks_of(config, steps) for config in configs]
    _, together = stack_blocks(configs, steps)
    pairs = [(sum(block() for block in each), together()) for _ in range(repetitions)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "one_after_another_ms": 1e3 * statistics.median(a for a, _ in pairs) / steps / runs,
        "packed_ms": 1e3 * statistics.median(b for _, b in pairs) / steps / runs,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "repetitions": repetitions,
    }


def padded_in_turn(overrides: list[str], steps: int, repetitions: int) -> dict[str, Any]:
    """Latents of several sizes: a stack for each, and one of all."""
    more = ["trainer.max_epochs=100000", "logger=none", "callbacks=minimal"]
    of_size = [configs_of(4, [*overrides, f"model.latent_dim={d}"], *more) for d in LATENT_DIMS]
    each = [stack_blocks(configs, steps)[1] for configs in of_size]
    _, together = stack_blocks([config for configs in of_size for config in configs], steps)
    pairs = [(sum(block() for block in each), together()) for _ in range(repetitions)]
    ratios = sorted(a / b for a, b in pairs)
    return {
        "a_stack_for_each_size_ms": 1e3 * statistics.median(a for a, _ in pairs) / steps,
        "padded_ms": 1e3 * statistics.median(b for _, b in pairs) / steps,
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "repetitions": repetitions,
    }


def against_one(runs: int, overrides: list[str], steps: int = 20, repetitions: int = 9) -> dict[str, Any]:
    """So many runs against one of them: milliseconds of a step, and seconds of complete runs."""
    configs = configs_of(runs, overrides, "trainer.max_epochs=100000", "logger=none", "callbacks=minimal")
    alone, (_, together) = blocks_of(configs[0], steps), stack_blocks(configs, steps)
    pairs = [(alone(), together()) for _ in range(repetitions)]
    step = {
        "one_ms": 1e3 * statistics.median(a for a, _ in pairs) / steps,
        "packed_ms": 1e3 * statistics.median(b for _, b in pairs) / steps,
        "ratio": statistics.median(b / a for a, b in pairs),
    }
    one, many = (whole_runs(n, overrides, 5, forms=("packed",))["packed_s"] for n in (1, runs))
    whole = {"one_s": one, "packed_s": many, "ratio": many / one}
    return {"steps": step, "whole runs": whole, "device": torch.cuda.get_device_name()}


def whole_runs(
    runs: int, overrides: list[str], epochs: int, forms: tuple[str, ...] = ("one_after_another", "packed")
) -> dict[str, float]:
    """Seconds of complete runs, with validation, checkpoints, events and the test; pictures left out."""
    found = {f"{form}_s": seconds(configs_of(runs, overrides, *whole(epochs)), form == "packed") for form in forms}
    return {**found, "ratio": found["one_after_another_s"] / found["packed_s"]} if len(forms) == 2 else found


def whole(epochs: int) -> list[str]:
    return [f"trainer.max_epochs={epochs}", "callbacks=minimal", "evaluation.nll_samples=0"]


def seconds(configs: list[Any], as_pack: bool) -> float:
    shared = SHARED.set({})
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            functools.partial(train, c, Path(folder) / str(n), [], progress_bar=False) for n, c in enumerate(configs)
        ]
        start = now()
        Pack([str(n) for n in range(len(jobs))]).run(jobs) if as_pack else [job() for job in jobs]
        found = now() - start
    SHARED.reset(shared)
    return found


def whole_padded_runs(overrides: list[str], epochs: int, repetitions: int) -> dict[str, Any]:
    """Complete runs with latents of several sizes, padded as far as they are by default and not at all, in turn."""
    pairs = []
    for _ in range(repetitions):
        pair = []
        for most in (0, MOST_PADDING):
            packing.MOST_PADDING = most
            of_size = [[*overrides, f"model.latent_dim={d}", *whole(epochs)] for d in LATENT_DIMS]
            pair.append(seconds([config for more in of_size for config in configs_of(4, more)], True))
        pairs.append(pair)
    return {
        "a_stack_for_each_size_s": statistics.median(a for a, _ in pairs),
        "padded_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "ratios": sorted(a / b for a, b in pairs),
    }


def operators(overrides: list[str], runs: int) -> int:
    """Operators of a packed step, those of drawing and of gathering a run's batch left out."""
    stack, _ = stack_blocks(configs_of(runs, overrides), 1)
    return operators_of(stack)


def operators_of(stack: Stack) -> int:
    batches = []
    for member in stack.members:
        batches.append(next(iter(member.data.train_dataloader())))
    batch, noise = stack._together(batches), stack._drawn(batches, 0)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        _, gradients = stack._gradients(batch, noise, 0)
        stack.optimizer.step(gradients)
    return sum(event.name.startswith("aten::") for event in seen.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    settle_process(1)
    found: dict[str, Any] = {}
    if GPU:
        print(json.dumps({ON_GPU: against_one(64, SETS["16 runs of 784-400-20, batch 128"][1])}, indent=1), flush=True)
        return
    steps_and_repetitions = (5, 5) if options.quick else (20, 9)
    for name, (runs, overrides) in SETS.items():
        if options.only not in name:
            continue
        found[name] = {"steps": steps_in_turn(runs, overrides, *steps_and_repetitions)}
        found[name]["operators"] = {str(n): operators(overrides, n) for n in (2, runs)}
        if not options.quick:
            found[name]["whole runs"] = whole_runs(runs, overrides, 5)
        print(json.dumps({name: found[name]}, indent=1), flush=True)
    for name, (overrides, epochs) in PADDED.items():
        if options.only in name:
            found[name] = {"steps": padded_in_turn(overrides, *steps_and_repetitions)}
            if not options.quick:
                found[name] |= {f"{n} epochs": whole_padded_runs(overrides, n, 5) for n in epochs}
            print(json.dumps({name: found[name]}, indent=1), flush=True)


if __name__ == "__main__":
    main()
