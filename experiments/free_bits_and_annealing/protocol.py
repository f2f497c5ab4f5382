"""Posterior collapse under an autoregressive decoder, and what KL warm-up, cyclical annealing and free bits do about it.

MNIST of 7x7 pixels, 16 latents. The decoder is MADE told z: it sees the pixels before the one it tells, and at this size
models the images about as well without z as with it. Beside it a factorised decoder, which cannot, and the same decoder
with its latents priced out, which is the autoregressive model alone.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vae.claims import mean_and_error
from vae.data.sources import mnist
from vae.engine.folder import read_metrics
from vae.engine.run import load
from vae.evaluation.likelihood import log_likelihood
from vae.experiment import Context, logged
from vae.experiment_figures import pack_images
from vae.seeding import generator

PAPER = "Bowman et al. 2016 (warm-up); Fu et al. 2019 (cyclical annealing); Kingma et al. 2016 (free bits)"
CLAIM = (
    "A decoder that can do without its latents ignores them; warm-up, cyclical annealing and free bits make it use them, "
    "at hardly any cost in likelihood."
)
FREE_NATS = 0.25  # lambda, for each of the 16 dimensions: 4 nats in all
STEPS_PER_EPOCH = 550
SETTINGS = {
    "quick": {
        "seeds": [0, 1, 2],
        "warm_up": 3 * STEPS_PER_EPOCH,
        "cycles_end": 6 * STEPS_PER_EPOCH,
        "images": 2000,
        "samples": 100,
        "larger": {"14": 6, "28": 3},
    },
    "full": {
        "seeds": [0, 1, 2],
        "warm_up": 12 * STEPS_PER_EPOCH,
        "cycles_end": 24 * STEPS_PER_EPOCH,
        "images": 10_000,
        "samples": 500,
        "larger": {"14": 12, "28": 6},
    },
}
PLAIN, ALONE, FACTORISED = "plain", "no latents", "factorised"
WARM_UP, CYCLICAL, FREE_BITS = "warm-up", "cyclical", "free bits"
CURES = (WARM_UP, CYCLICAL, FREE_BITS)
DRAWN = (PLAIN, *CURES)
PICTURED, DRAWS = 8, 256


def methods(settings: dict[str, Any]) -> dict[str, list[str]]:
    """Overrides of each method."""
    return {
        PLAIN: [],
        ALONE: ["objective.beta=1000"],
        WARM_UP: ["objective/schedule=linear", f"objective.schedule.steps={settings['warm_up']}"],
        CYCLICAL: ["objective/schedule=cyclical", f"objective.schedule.steps={settings['cycles_end']}"],
        FREE_BITS: ["objective=free_bits", f"objective.free_nats={FREE_NATS}"],
        FACTORISED: ["network=mlp"],
    }


def measure(context: Context) -> dict[str, Any]:
    settings, seeds = context.settings, context.settings["seeds"]
    sizes = {
        f"size={size}": [f"data.source.size={size}", f"trainer.max_epochs={epochs}"]
        for size, epochs in settings["larger"].items()
    }
    folders = context.train_grid(methods(settings) | sizes, seeds)
    measured = context.measure_grid(
        {run: partial(evaluate, folders[run], settings) for run in folders if run[0] not in sizes}
    )
    nll = {name: torch.tensor([run.pop("nll_of_images") for run in found]) for name, found in measured.items()}
    pictured = context.cached_many(
        {f"images,{name}".replace(" ", "_"): partial(expected_images, folders[name, seeds[0]]) for name in DRAWN}
    )
    return {
        "methods": measured,
        "difference": {name: paired(nll[name] - nll[PLAIN]) for name in measured},
        "larger": {
            size: [read_metrics(folders[f"size={size}", seed])["test/rate"] for seed in seeds]
            for size in settings["larger"]
        },
        "warm_up": settings["warm_up"],
        "cycles_end": settings["cycles_end"],
        "images": {
            "digit": pack_images(mnist(os.environ.get("VAE_DATA_DIR", "data")).test.x[:PICTURED] / 255),
            "as seen": pack_images(load(folders[PLAIN, seeds[0]])[1].examples("test", PICTURED).x),
            **dict(zip(DRAWN, pictured.values(), strict=True)),
        },
    }


@torch.no_grad()
def evaluate(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """In nats an image, on test images that all runs share: both halves of the ELBO, each dimension's KL, the NLL of each
    image by importance samples; and the rate and ELBO of the validation images after each epoch."""
    _, data, module = load(folder)
    batch = data.examples("test", settings["images"])
    out = module.vae(batch.x, generator(batch.seed, "z"), sample_shape=(10,))
    nll = -log_likelihood(module.vae, batch, settings["samples"])
    return {
        "rate": out.rate.mean(),
        "distortion": out.distortion.mean(),
        "nll": nll.mean(),
        "kl": out.kl.mean(0),
        "nll_of_images": nll,
        "curve": curve(folder),
    }


def curve(folder: Path) -> dict[str, list[float]]:
    """What was logged of each validation, against the number of training steps done."""
    found = logged(folder, "val/rate", "val/elbo")
    return {
        "steps": [step + 1 for step in found["step"]],
        "rate": [round(rate, 4) for rate in found["val/rate"]],
        "elbo": [round(elbo, 4) for elbo in found["val/elbo"]],
    }


@torch.no_grad()
def expected_images(folder: Path) -> dict[str, Any]:
    """E[x|z] at a draw of z of each pictured test image: the mean over many draws of the pixels before each."""
    _, data, module = load(folder)
    batch = data.examples("test", PICTURED)
    z = module.vae.encode(batch.x).rsample(generator(batch.seed, "z"))
    means = module.vae.mean_image(z.repeat(DRAWS, 1), generator=generator(batch.seed, "pixels"))
    return pack_images(means.unflatten(0, (DRAWS, PICTURED)).mean(0))


def paired(differences: torch.Tensor) -> dict[str, float]:
    """Mean over seeds and images of (seeds, images), and standard errors: of seeds, and of images averaged over seeds."""
    of_seeds, of_images = (mean_and_error(differences.mean(axis)) for axis in (1, 0))
    return {"mean": differences.mean(), "se_of_seeds": of_seeds["se"], "se_of_images": of_images["se"]}
