"""Kingma & Welling 2014, figure 2: the lower bound on MNIST as the latent space grows from 3 to 200 dimensions.

One network, 784-500-N_z with tanh, on one fixed binary draw of MNIST. More latents explain more, until they are
superfluous; and the superfluous ones cost nothing, on images that were not trained on either.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vae.claims import mean_and_error
from vae.engine.folder import read_config, read_metrics, read_status
from vae.engine.run import load
from vae.experiment import Context, logged
from vae.seeding import generator

if TYPE_CHECKING:
    from vae.data.module import ImageDataModule
    from vae.model import VAE

PAPER = 'Kingma & Welling 2014, "Auto-encoding variational Bayes", figure 2'
CLAIM = "The lower bound rises with the number of latents up to 20, and 200 of them, most superfluous, do not overfit."

SETTINGS = {
    "quick": {"sizes": [3, 10, 20, 200], "seeds": [0]},
    "full": {
        "sizes": [3, 5, 10, 20, 200],
        "seeds": [0, 1, 2],
        "ablations": {  # towards the reproduction's protocol, to see which difference the bound comes from
            "size": 20,
            "seed": 0,
            "changes": {
                "step 0.01": ["optimizer.lr=0.01"],
                "step 0.01, decoder from 1/2": ["optimizer.lr=0.01", "model.output_bias_from_data=false"],
            },
        },
    },
}


class Published(NamedTuple):
    """-ELBO in nats: read off the paper's figure (as recalled, unconfirmed); a reproduction's, of 3 seeds and 1.8e7 images."""

    paper: str
    others: float
    others_sd: float


PUBLISHED = {
    3: Published("~140", 141.30, 0.40),
    5: Published("~122", 124.41, 0.37),
    10: Published("~107", 107.57, 0.17),
    20: Published("~102", 100.61, 0.71),
    200: Published("~100", 99.23, 0.04),
}
PUBLISHED_AT = 1.8e7  # training images seen
COMPARED = [(3, 10), (10, 20), (20, 200)]
TOLERANCE = 1.5  # nats from the reproduction's, at its length


class Run(NamedTuple):
    size: int
    seed: int
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return ",".join(
            [f"nz={self.size}", *(change.partition(".")[2] for change in self.changes), f"seed={self.seed}"]
        )

    @property
    def overrides(self) -> list[str]:
        return [f"model.latent_dim={self.size}", *self.changes, f"seed={self.seed}"]


def measure(context: Context) -> dict[str, Any]:
    """A seed that was measured is kept as it is when others are added, though its runs be gone."""
    settings, seeds = context.settings, context.settings["seeds"]
    context.stamp = {**context.stamp, "settings": {"sizes": settings["sizes"]}}  # whatever other seeds there are
    pieces = {f"seed={seed}": [Run(size, seed) for size in settings["sizes"]] for seed in seeds}
    if ablations := settings.get("ablations"):
        changed = [Run(ablations["size"], ablations["seed"], tuple(c)) for c in ablations["changes"].values()]
        pieces |= {run.name: [run] for run in changed}
    missing = [run for piece, runs in pieces.items() if not context.measured(piece) for run in runs]
    folders = context.train_many(  # the widest, which take longest, first
        {run.name: [context.config, *run.overrides] for run in sorted(missing, reverse=True)}
    )
    found = context.cached_many(
        {
            piece: functools.partial(measure_runs, {run.size: folders.get(run.name) for run in runs})
            for piece, runs in pieces.items()
        }
    )
    of_seeds = [found[f"seed={seed}"] for seed in seeds]
    results = {
        "runs": {str(size): [piece["runs"][str(size)] for piece in of_seeds] for size in settings["sizes"]},
        "gains": {name: [piece["gains"][name] for piece in of_seeds] for name in of_seeds[0]["gains"]},
        "epochs": of_seeds[0]["epochs"],
    }
    if ablations:
        runs = dict(zip(ablations["changes"], (found[run.name]["runs"][str(run.size)] for run in changed), strict=True))
        for run in runs.values():
            run.pop("curve", None)  # not drawn
        results["ablations"] = {"size": ablations["size"], "runs": runs}
    return results


def measure_runs(folders: dict[int, Path]) -> dict[str, Any]:
    """Of runs with one seed, by latent size: each, and what the larger latent space gains on the same images."""
    found = {size: measure_run(folder) for size, folder in folders.items()}
    elbos = {size: run.pop("elbo_of_images") for size, run in found.items()}
    pairs = [(small, large) for small, large in COMPARED if {small, large} <= elbos.keys()]
    return {
        "runs": found,
        "gains": {f"{small} -> {large}": mean_and_error(elbos[large] - elbos[small]) for small, large in pairs},
        "epochs": read_config(next(iter(folders.values()))).trainer.max_epochs,
    }


def measure_run(folder: Path) -> dict[str, Any]:
    """The bound on every test image and on all that were trained on, with the best weights; and the way there."""
    config, data, module = load(folder)
    test, train = (of_images(module.vae, data, split) for split in ("test", "train"))
    metrics = read_metrics(folder)
    return {
        "elbo": test.mean(),
        "train_elbo": train.mean(),
        "rate": metrics["test/rate"],
        "active_units": metrics["test/active_units"],
        "best_epoch": metrics["val/best_epoch"] + 1,
        "seconds": read_status(folder)["seconds"],
        "curve": curve(folder, config.data.batch_size),
        "elbo_of_images": test,
    }


@torch.no_grad()
def of_images(vae: VAE, data: ImageDataModule, split: str) -> Tensor:
    """The ELBO of each image with one z, the draws being those of `vae.evaluate`: alike for every model."""
    parts = []
    for batch in data.batches(split):
        out = vae(batch.x, generator(batch.seed, "z"))
        parts.append(-(out.distortion + out.rate).double())
    return torch.cat(parts)


def curve(folder: Path, batch_size: int) -> dict[str, list[float]]:
    """ELBO after so many training images: of the validation split, and the mean over the epoch that ends there."""
    found = logged(folder, "val/elbo", "train/elbo")
    points = dict(zip(found["step"], zip(found["val/elbo"], found["train/elbo"], strict=True), strict=True))
    at = list(points)
    if len(at) > 100:  # enough for a picture
        at = sorted(
            {min(at, key=lambda step: abs(math.log((step + 1) / want))) for want in log_grid(at[0] + 1, at[-1] + 1)}
        )
    return {
        "images": [(step + 1) * batch_size for step in at],
        "validation": [round(points[step][0], 2) for step in at],
        "train": [round(points[step][1], 2) for step in at],
    }


def log_grid(first: float, last: float, points: int = 100) -> Iterator[float]:
    """From first to last, evenly in the logarithm."""
    return (first * (last / first) ** (i / (points - 1)) for i in range(points))
