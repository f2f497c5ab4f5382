"""Latents tab: how long a slider's request takes, from latents to the PNG in its answer, for several networks.

`python benchmarks/latents.py` writes benchmarks/results/latents.json: milliseconds on one thread, median and 95th percentile,
and the median of what the processor spent, which other programs on the machine change little.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from vae.cli import CONFIGS
from vae.engine.folder import environment
from vae.engine.run import train
from vae.files import write_json
from vae.latents.session import Session

REQUESTS = 200
MODELS = {
    "mlp 1x28x28, 10 latents": ["network=mlp", "model.latent_dim=10", "size=1,28,28"],
    "conv 1x28x28, 10 latents": ["network=conv", "model.latent_dim=10", "size=1,28,28"],
    "conv 3x64x64, 64 latents": ["network=conv", "model.latent_dim=64", "size=3,64,64"],
    "conv 3x128x128, 512 latents": ["network=conv", "model.latent_dim=512", "size=3,128,128"],
    "mlp 3x64x64, 512 latents": ["network=mlp", "model.latent_dim=512", "size=3,64,64"],
}


def measured(folder: Path, overrides: list[str]) -> dict[str, float]:
    *settings, size = overrides
    shape = tuple(map(int, size.removeprefix("size=").split(",")))
    np.save(folder / "x.npy", np.random.default_rng(0).integers(0, 256, (40, *shape), np.uint8))
    settings += ["data=arrays", f"data.source.path={folder / 'x.npy'}", "data.source.layout=NCHW", "data.batch_size=8"]
    settings += ["trainer.max_epochs=1", "callbacks=minimal", "evaluation.nll_samples=0", "threads=1"]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", settings)
    train(config, folder / "run", settings, progress_bar=False)
    session = Session(folder / "run")
    latents = torch.randn(REQUESTS, session.vae.latent_dim, generator=torch.Generator().manual_seed(0)).tolist()
    session.decode(latents[:1])
    took, spent = [], []
    for z in latents:
        start, worked = time.perf_counter(), time.process_time()
        json.dumps(session.decode([z]))
        took.append(1000 * (time.perf_counter() - start))
        spent.append(1000 * (time.process_time() - worked))
    values = {"median_ms": np.median(took), "p95_ms": np.quantile(took, 0.95), "cpu_ms": np.median(spent)}
    return {name: round(float(value), 2) for name, value in values.items()}


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for name, overrides in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measured(Path(folder), overrides)
        print(name, found[name], flush=True)
    write_json(
        Path(__file__).parent / "results" / "latents.json",
        {**environment(), "load": os.getloadavg()[0], "requests": REQUESTS, "models": found},
    )


if __name__ == "__main__":
    main()
