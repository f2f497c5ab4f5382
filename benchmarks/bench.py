"""`make bench`: how near to the arithmetic the project runs, and how its cost grows.

step    the project's training step, TensorBoard and progress bar on, against the bare loop of bare.py, epochs in turn
sweep   16 runs from the command to the report, against the bare loop training the same 16 one after another
growth  time and peak memory against batch, latent size, images, K of the importance bound, jobs
denormals  a step with a VampPrior as training takes it, with numbers below 1e-38 taken as 0, against one that keeps them
Writes results/bench.json, results/bench.md and a figure each of `growth` beside this file. Only ratios within one run
mean anything on another machine.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS = ("data and model", "steps", "evaluation", "pictures", "checkpoints", "rest")  # of a run

# --- one run ----------------------------------------------------------------------------------------------------------

#: name -> (net, overrides, data set, batch size, steps an epoch)
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
#: what a GPU can do more, each against the same bare loop in 32-bit floats
GPU_VARIANTS = {"": [], ", compiled": ["compile=true"], ", compiled, CUDA graphs": ["compile=reduce-overhead"]}
GPU_VARIANTS[", bf16"] = ["trainer.precision=bf16-mixed"]


def compose(*overrides: str) -> Any:
    """The training config."""
    import hydra

    from vae.cli import CONFIGS

    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        return hydra.compose("train", list(overrides))


def bare_copy(net: str, module: Any, device: Any, **options: bool) -> Any:
    """The bare loop's networks and optimiser, with the weights of the project's module."""
    import bare
    import torch

    encoder, decoder = getattr(bare, net)(module.vae.latent_dim)
    bias, *body = module.vae.decoder.parameters()  # the output's bias is the decoder's own, the bare loop's comes last
    theirs = [*module.vae.encoder.parameters(), *body, bias]
    with torch.no_grad():
        for mine, other in zip([*encoder.parameters(), *decoder.parameters()], theirs, strict=True):
            mine.copy_(other.reshape(mine.shape))
    return bare.nets(encoder, decoder, device, **options)


def all_images(images: Any) -> Any:
    """A split as one uint8 tensor, which is how the bare loop holds it."""
    import torch

    return torch.cat([images.gather(part)[0] for part in torch.arange(len(images)).split(1000)])


def largest_difference(net: str, overrides: list[str], steps: int = 20) -> float:
    """Largest relative difference of the losses of both loops over the first steps, given the same weights and noise.

    Raises RuntimeError if it is more than rounding: the two would not do the same arithmetic.
    """
    import bare
    import pytorch_lightning as pl
    import torch

    from vae.engine.build import build
    from vae.engine.trainer import build_trainer
    from vae.seeding import derive, generator

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
        import torch

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
        import pytorch_lightning as pl

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


def compare_steps(net: str, overrides: list[str], repetitions: int, device: str) -> dict[str, float]:
    """Milliseconds a training step of both loops, epochs in turn within one process; medians over the repetitions."""
    import bare
    import torch

    from vae.engine.build import build
    from vae.engine.trainer import build_trainer, set_threads

    where = [f"trainer.max_epochs={repetitions + 1}", f"trainer.accelerator={'gpu' if device == 'cuda' else 'cpu'}"]
    config = compose(
        *overrides,
        *where,
        "+trainer.limit_val_batches=1",
        "trainer.num_sanity_val_steps=0",
        "callbacks.pictures.every_n_epochs=100000",
    )
    set_threads(config.threads)
    data, module = build(config)
    model = bare_copy(net, module, device)
    images = all_images(data.splits_ready().train).to(device)
    noise = torch.Generator(device).manual_seed(0)
    dynamic = data.binarize == "dynamic"

    turns = InTurn(lambda: bare.epoch(model, images, data.batch_size, dynamic, noise))
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(config, Path(folder), progress_bar=True)
        trainer.callbacks.insert(0, turns.callback())
        trainer.fit(module, data)
    return turns.measured(math.ceil(len(images) / data.batch_size))


def step_section(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {}
    for name, (net, overrides, batch, steps) in STEPS.items():
        steps = 5 if options.quick else steps
        common = [*overrides, f"data.batch_size={batch}", f"data.limit={batch * steps}", f"threads={options.threads}"]
        difference = largest_difference(net, common, min(20, steps))
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            for variant, more in GPU_VARIANTS.items() if device == "cuda" else [("", [])]:
                try:
                    measured = compare_steps(net, [*common, *more], 2 if options.quick else 15, device)
                except Exception as error:  # one way of running that this device does not have must not end the others
                    measured = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
                label = f"{name}{variant}" + (f", {torch.cuda.get_device_name()}" if device == "cuda" else "")
                found[label] = {**measured, "largest_relative_difference_of_losses": difference}
        if torch.cuda.is_available() and net == "mlp":
            found[f"{name}, bare loop captured as one CUDA graph"] = captured_step(net, common, batch)
    return found


def captured_step(net: str, overrides: list[str], batch: int, repetitions: int = 10) -> dict[str, float]:
    """Milliseconds a step of the bare loop, and of the same step as one CUDA graph: the limit on a GPU."""
    import bare
    import torch

    from vae.engine.build import build

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


# --- a sweep ----------------------------------------------------------------------------------------------------------


def sweep_section(options: argparse.Namespace) -> dict[str, Any]:
    """Both ways to train 4 betas x 4 seeds, as whole processes; and where the time of the sweep goes."""
    import numpy as np

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


def train_split(*overrides: str) -> Any:
    from vae.engine.build import instantiate

    config = compose(*overrides)
    data = instantiate(config.data, seed=config.seed)
    return data.splits_ready().train


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


# --- growth -----------------------------------------------------------------------------------------------------------


def growth_section(options: argparse.Namespace) -> dict[str, Any]:
    """One curve each: seconds and peak bytes against what grows, of the MLP, on one thread and the CPU."""
    import torch

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
    import torch

    from vae.engine.module import VAEModule
    from vae.likelihoods import Bernoulli
    from vae.model import VAE
    from vae.networks import mlp
    from vae.objectives.elbo import BetaVAE
    from vae.priors import StandardNormal

    vae = VAE(*mlp((1, 28, 28), latent_dim, 1), StandardNormal(latent_dim), Bernoulli())
    return VAEModule(vae, BetaVAE(), functools.partial(torch.optim.Adam, lr=1e-3, fused=True))


def train_seconds(images: Any, batch: int = 128, latent_dim: int = 20) -> float:
    """An epoch of these images, by the project's module, loader and Trainer."""
    import pytorch_lightning as pl

    from vae.data.images import Images, Splits
    from vae.data.module import ImageDataModule
    from vae.engine.callbacks.records import Stopwatch

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
    from vae.data.images import Batch
    from vae.evaluation.likelihood import log_likelihood

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


def draw_growth(growth: dict[str, Any], folder: Path) -> None:
    """growth_NAME.png of each curve: time and peak memory on logarithmic axes, beside a line of slope one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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


# --- denormals --------------------------------------------------------------------------------------------------------


def denormals_section(options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds a step of the priors experiment's VampPrior on one thread, blocks of steps in turn; medians."""
    import torch

    from vae.engine.build import build

    torch.set_num_threads(1)  # the setting is a thread's own
    data, module = build(compose("experiment=priors", "prior=vampprior", "objective.schedule.steps=1000"))
    optimizer, batch = module.make_optimizer(module.parameters()), data.examples("train", data.batch_size)
    noise, taken = torch.Generator().manual_seed(0), 0
    module.train()

    def block(flush: bool, steps: int) -> float:
        nonlocal taken
        torch.set_flush_denormal(flush)
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            module.objective(module.vae, batch, noise, taken)["loss"].backward()
            optimizer.step()
            taken += 1
        return 1e3 * (time.perf_counter() - start) / steps

    steps, repetitions = (2, 2) if options.quick else (10, 15)
    block(True, 4 * steps)
    times = [(block(False, steps), block(True, steps)) for _ in range(repetitions)]
    torch.set_flush_denormal(False)
    kept, flushed = (statistics.median(ms) for ms in zip(*times, strict=True))
    ratio = statistics.median(f / k for k, f in times)
    return {"kept_ms": kept, "flushed_ms": flushed, "ratio": ratio, "repetitions": repetitions, "steps": steps}


# --- telling ----------------------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """(title, heads, rows) of every section that was measured."""
    if steps := results.get("step"):
        rows = []
        for name, row in steps.items():
            if "failed" in row:
                rows.append([name, row["failed"], "", "", ""])
                continue
            cpu = f"{row['cpu_ratio']:.3f}" if "cpu_ratio" in row else ""
            rows.append([name, f"{row['bare_ms']:.2f}", f"{row['project_ms']:.2f}", f"{row['ratio']:.3f}", cpu])
        yield "A training step", ["", "bare loop, ms", "project, ms", "ratio", "ratio of CPU time"], rows
    if peers := results.get("peers"):
        rows = [
            [
                name,
                f"{row['seconds_an_epoch']:.2f}",
                f"{row['bare_ms']:.2f}",
                f"{row['project_ms']:.2f}",
                f"{row['ratio']:.2f}",
            ]
            for name, row in peers.items()
        ]
        heads = ["", "seconds per epoch of 55,000", "bare loop, ms a step", "ms a step", "ratio"]
        yield "784-400-20 on MNIST, batch 128", heads, rows
    if sweep := results.get("sweep"):
        rows = [
            ["bare loop, one after another", f"{sweep['bare_seconds']:.1f}", ""],
            [f"project, {sweep['jobs']} jobs", f"{sweep['project_seconds']:.1f}", f"{sweep['ratio']:.3f}"],
        ]
        rows += [[f"  {part}", f"{s:.1f}", f"{s / sweep['bare_seconds']:.3f}"] for part, s in sweep["seconds"].items()]
        title = f"A sweep of {sweep['runs']} runs of {sweep['epochs']} epochs, from command to report"
        yield title, ["", "seconds", "ratio"], rows
    if growth := results.get("growth"):
        rows = []
        for name, curve in growth.items():
            first, last, exponent = curve["points"][0], curve["points"][-1], curve["exponent_at_the_end"]
            for point in (first, last):
                rows.append(
                    [
                        f"{name} = {point['value']}",
                        curve["unit"],
                        f"{point['seconds']:.3f}",
                        f"{point['bytes'] / 2**20:.0f}",
                        "",
                    ]
                )
            rows[-1][-1] = f"{exponent['seconds']:.2f}, {exponent['bytes']:.2f}"
        yield "How cost grows", ["", "of what", "seconds", "MiB added", "exponent of time, memory"], rows

    if denormals := results.get("denormals"):
        row = [f"{denormals['kept_ms']:.1f}", f"{denormals['flushed_ms']:.1f}", f"{denormals['ratio']:.2f}"]
        heads = ["", "kept, ms", "taken as 0, ms", "ratio"]
        yield (
            "Numbers below 1e-38 in a training step, one thread",
            heads,
            [["VampPrior, 500 pseudo-inputs, batch 100", *row]],
        )


def conditions(options: argparse.Namespace, load: float, section: str = "") -> dict[str, Any]:
    """What a section is measured on; load: before its start."""
    from vae.engine.folder import environment

    threads = 1 if section in ON_ONE_THREAD else getattr(options, "threads", "auto")
    return {**environment(), "threads": 1 if threads == "auto" else threads, "load": load}


def markdown(results: dict[str, Any]) -> str:
    """The tables, each with what it was measured on."""
    lines = []
    for section, facts in results["environments"].items():
        for title, heads, rows in tables({section: results[section]}):
            lines += [f"**{title}**", "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
            lines += [f"| {' | '.join(cell.strip() for cell in row)} |" for row in rows]
            lines += [
                "",
                f"Measured {facts['date']} on {facts['device']}, {facts['cores']} cores, {facts['threads']} threads a process, "
                f"torch {facts['torch']}, pytorch-lightning {facts['pytorch_lightning']}, Python {facts['python']}, commit "
                f"{facts['git_commit']}. Load before the start: {facts['load']:.2f} processes.",
                "",
            ]
    return "\n".join(lines)


def write_results(out: Path, name: str, results: dict[str, Any]) -> dict[str, Any]:
    """NAME.json and NAME.md: these sections beside what is there of others, all of which are returned."""
    from vae.files import write_json, write_text

    path = out / f"{name}.json"
    whole = json.loads(path.read_text()) if path.is_file() else {"environments": {}}
    environments = {**whole["environments"], **results["environments"]}
    whole = {**whole, **results, "environments": environments}
    write_json(path, whole)
    write_text(out / f"{name}.md", markdown(whole))
    return whole


def show(results: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for title, heads, rows in tables(results):
        table = Table(title=title, title_justify="left")
        for column, head in enumerate(heads):
            table.add_column(head, justify="right" if column else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


# growth is the first, because it forks, which is best done before any thread has been started
SECTIONS = {"growth": growth_section, "step": step_section, "sweep": sweep_section, "denormals": denormals_section}


ON_ONE_THREAD = ("growth", "denormals")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"some of {', '.join(SECTIONS)}; all unless said")
    parser.add_argument("--threads", default="auto", help="of a single run; auto: one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs of the sweep side by side")
    parser.add_argument("--epochs", type=int, default=5, help="of each run of the sweep")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything works")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}: choose from {', '.join(SECTIONS)}")

    results: dict[str, Any] = {"environments": {}}
    for name in (name for name in SECTIONS if name in (options.sections or SECTIONS)):
        print(f"{name} ...", flush=True)
        start, load = time.perf_counter(), os.getloadavg()[0]
        results[name] = SECTIONS[name](options)
        results["environments"][name] = conditions(options, load, name)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)

    show(write_results(options.out, "bench", results))
    if "growth" in results:
        draw_growth(results["growth"], options.out)
    print(f"Written to {options.out}/bench.json and bench.md; sections that were not run now stand there as they were.")


if __name__ == "__main__":
    main()
