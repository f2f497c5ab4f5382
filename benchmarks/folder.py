"""`python benchmarks/folder.py`: what a folder of images costs, the first time and after it.

First pass: photographs of mixed sizes (JPEG, made here) decoded into the cache file, against one pass of torchvision's
ImageFolder through a DataLoader with as many workers, resizing to the same shape and leaving uint8 alone. Both find their
files in the system's cache. Later epochs: batches from the mapped file against the same images in memory, with nothing
done to them, and as training steps of the default model. All take turns; medians, and quartiles of the ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

from vae.cli import CONFIGS
from vae.data.decoding import Options, decode_once
from vae.data.folder import folder, list_files
from vae.data.images import Images, Splits
from vae.data.module import ImageDataModule
from vae.engine.build import build
from vae.engine.folder import environment
from vae.files import write_json
from vae.seeding import generator

SIZE, BATCH = 64, 128


def make_photographs(root: Path, images: int) -> None:
    """JPEGs of 300 to 500 pixels a side in ten sub-folders: smooth colours under a little noise."""
    noise = np.random.default_rng(0)
    for i in range(images):
        width, height = map(int, noise.integers(300, 501, 2))
        smooth = Image.fromarray(noise.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((width, height))
        grainy = np.asarray(smooth, np.int16) + noise.integers(-12, 13, (height, width, 3), dtype=np.int16)
        path = root / str(i % 10) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(ours: Callable[[], Any], theirs: Callable[[], Any], repetitions: int) -> dict[str, Any]:
    """Medians of both in seconds, and of their ratio with its quartiles; the order changes each time."""
    times = []
    for repetition in range(repetitions):
        if repetition % 2:
            second = seconds(theirs)
            times.append((seconds(ours), second))
        else:
            times.append((seconds(ours), seconds(theirs)))
    ratios = [a / b for a, b in times]
    quartiles = statistics.quantiles(ratios, n=4)
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return {"ours_s": first, "theirs_s": second, "ratio": quartiles[1], "ratio_quartiles": [quartiles[0], quartiles[2]]}


def first_pass(root: Path, workers: int, repetitions: int) -> dict[str, Any]:
    def ours() -> None:
        with tempfile.TemporaryDirectory() as store:
            decode_once(root, list_files(root), Options((SIZE, SIZE), "crop", 3), store=Path(store), workers=workers)

    def theirs() -> None:
        as_bytes = Compose([Resize(SIZE), CenterCrop(SIZE), PILToTensor()])
        for _ in DataLoader(ImageFolder(str(root), as_bytes), BATCH, num_workers=workers):
            pass

    return in_turn(ours, theirs, repetitions)


def later_epochs(root: Path, repetitions: int) -> dict[str, dict[str, Any]]:
    mapped = folder(root, size=SIZE)
    held = Splits(*(Images(*split.gather(torch.arange(len(split)))) for split in mapped))
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", ["data=folder", f"data.source.path={root}", f"data.source.size={SIZE}"])
    module = build(config)[1]
    optimizer = module.make_optimizer(module.vae.parameters())

    def epoch(splits: Splits, train: bool) -> Callable[[], None]:
        data = ImageDataModule(lambda: splits, batch_size=BATCH)
        data.setup()

        def run() -> None:
            for step, loaded in enumerate(data.train_dataloader()):
                batch = data.prepare(loaded, training=True)
                if train:
                    loss = module.objective(module.vae, batch, generator(batch.seed), step)["loss"]
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

        run()  # warm
        return run

    return {
        "batches": in_turn(epoch(mapped, False), epoch(held, False), 10 * repetitions),
        "training": in_turn(epoch(mapped, True), epoch(held, True), repetitions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads of ours, processes of theirs")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "folder.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = {**environment(), "load": os.getloadavg()[0], "images": options.images, "workers": options.workers}
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as cache:
        os.environ["VAE_CACHE_DIR"] = cache
        make_photographs(Path(root), options.images)
        results = {
            "environment": facts,
            "first_pass": first_pass(Path(root), options.workers, options.repetitions),
            "later_epochs": later_epochs(Path(root), options.repetitions),
        }
    write_json(options.out, results)
    for name, found in {"first pass": results["first_pass"], **results["later_epochs"]}.items():
        low, high = found["ratio_quartiles"]
        print(
            f"{name}: {found['ours_s']:.3f} s, {found['theirs_s']:.3f} s, ratio {found['ratio']:.2f} ({low:.2f}-{high:.2f})"
        )


if __name__ == "__main__":
    main()
