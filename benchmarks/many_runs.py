"""`python benchmarks/many_runs.py`: what a report on many runs costs, and what a run's folder holds.

One run is trained as `data=digits` and its folder copied so often that it makes a sweep over latent size, beta and seed:
each copy with settings and numbers of its own, the run's pictures, and per-image numbers of 10,000 images, as MNIST has.
Then, each in a process of its own: `vae.report` on the sweep, `vae.runs`, and the sweep beside another like it. Seconds,
seconds of CPU time, the process's largest memory, and bytes of what was written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vae.engine.folder import environment
from vae.files import write_json
from vae.report.per_image import read_per_image

IMAGES = 10_000
LATENTS, SEEDS = (2, 3, 4, 6, 8, 10, 16, 24, 32, 50), range(5)
TASKS = {
    "report": "from vae.report.__main__ import main; main([A])",
    "frame": "import vae; table = vae.runs(A); print(len(table), 'rows')",
    "comparison": "from vae.report.__main__ import main; main([A, B])",
}


def train_one(folder: Path, *overrides: str) -> None:
    words = ["-m", "vae.train", *overrides, f"run={folder}", "progress_bar=false"]
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def copies(run: Path, sweep: Path, runs: int, shift: float = 0.0) -> None:
    """`runs` copies of a run's folder, less what no report reads, with settings and numbers of their own."""
    betas = -(-runs // (len(LATENTS) * len(SEEDS)))
    grid = itertools.product(LATENTS, [round(0.1 * 1.2**i, 4) for i in range(betas)], SEEDS)
    config = yaml.safe_load((run / "config.yaml").read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    arrays = {name: np.resize(values, IMAGES) for name, values in read_per_image(run, "test").items() if values.ndim}
    own = ("config.yaml", "overrides.yaml", "metrics.json", "per_image-*", "checkpoints", "events.*", "[0-9]*", ".lock")
    for latent_dim, beta, seed in itertools.islice(grid, runs):
        overrides = [f"model.latent_dim={latent_dim}", f"objective.beta={beta}", f"seed={seed}"]
        folder = sweep / ",".join(overrides)
        noise = random.Random(str((latent_dim, beta, seed)))
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns(*own), copy_function=os.link)
        config["model"]["latent_dim"], config["objective"]["beta"], config["seed"] = latent_dim, beta, seed
        (folder / "config.yaml").write_text(yaml.dump(config, Dumper=yaml.CSafeDumper))
        (folder / "overrides.yaml").write_text(json.dumps(overrides))
        rate = latent_dim**0.5 * 6 / (1 + beta) + noise.gauss(0, 0.1)
        distortion = 20 + 10 * beta / (1 + beta) + noise.gauss(0, 0.1) - shift
        named = {"rate": rate, "distortion": distortion, "elbo": -rate - distortion}
        made = {key: value + noise.gauss(0, 0.01) for key, value in metrics.items()}
        made |= {f"test/{name}": value for name, value in named.items()}
        (folder / "metrics.json").write_text(json.dumps(made))
        kept = {
            name: (values - values.mean() + made[f"test/{name}"]).astype(np.float32) for name, values in arrays.items()
        }
        np.savez(folder / "per_image-test.npz", images=np.array("images"), weights=np.array("weights"), **kept)


def cost(code: str, *folders: Path) -> dict[str, float]:
    """Seconds, CPU seconds and MiB of a process that runs this code, with the folders in A and B."""
    head = "".join(f"{letter} = {str(folder)!r}; " for letter, folder in zip("AB", folders, strict=False))
    peak = "; print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    before, spent = time.perf_counter(), os.times()
    done = subprocess.run([sys.executable, "-c", head + code + peak], check=True, stdout=subprocess.PIPE, text=True)
    seconds, after = time.perf_counter() - before, os.times()
    used = after.children_user + after.children_system - spent.children_user - spent.children_system
    return {"seconds": seconds, "cpu_seconds": used, "MiB": int(done.stdout.split()[-1]) / 1024}


def size(path: Path) -> dict[str, int]:
    files = [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}


def parts(run: Path) -> dict[str, dict[str, int]]:
    """Files and bytes of a run's folder: all, and its largest parts."""
    named = {"checkpoints": "checkpoints/*", "events": "events.*", "pictures": "pictures/*", "per image": "per_image-*"}
    found = {name: [path.stat().st_size for path in run.glob(pattern)] for name, pattern in named.items()}
    return {"all": size(run)} | {name: {"files": len(s), "bytes": sum(s)} for name, s in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--mnist", action="store_true", help="also what is in the folder of a run on MNIST")
    parser.add_argument("--place", type=Path, help="where the folders are made and kept, or are from before")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "many_runs.json")
    options = parser.parse_args()
    results: dict[str, Any] = {"environment": {**environment(), "load": os.getloadavg()[0], "runs": options.runs}}
    with tempfile.TemporaryDirectory() as temporary:
        place = options.place or Path(temporary)
        run, mnist, first, second = (place / name for name in ("run", "mnist", "first", "second"))
        if not run.exists():
            train_one(run, "trainer.max_epochs=50", "evaluation.nll_samples=50")
        results["folders"] = {"digits, 50 epochs": parts(run)}
        if options.mnist:
            if not mnist.exists():
                train_one(mnist, "data=mnist", "trainer.max_epochs=1", "evaluation.nll_samples=5")
            results["folders"]["mnist, 1 epoch"] = parts(mnist)
        for sweep, shift in ((first, 0.0), (second, 0.5)):
            if not sweep.exists():
                copies(run, sweep, options.runs, shift)
        results["cost"] = {
            "report": cost(TASKS["report"], first),
            "frame": cost(TASKS["frame"], first),
        }
        results["sizes"] = {
            "page": size(first / "report" / "index.html"),
            "report": size(first / "report"),
        }
        results["cost"]["comparison"] = cost(TASKS["comparison"], first, second)
        results["sizes"]["comparison"] = size(next((first / "report").glob("*/*/index.html")).parent)
    write_json(options.out, results)
    print(json.dumps({name: results[name] for name in ("cost", "sizes", "folders")}, indent=1))


if __name__ == "__main__":
    main()
