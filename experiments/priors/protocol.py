"""Tomczak & Welling 2018: the same VAE under N(0, I) and under a prior made of its own posteriors.

One stochastic layer of 40 latents, gated 300-300 networks, dynamic binarisation. Which priors, data sets and seeds, and
for how long, stands in SETTINGS.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from vae.engine.folder import read_metrics, read_status
from vae.engine.run import load
from vae.evaluation.decomposition import elbo_decomposition
from vae.evaluation.likelihood import log_likelihood
from vae.experiment import Context
from vae.experiment_figures import pack_images
from vae.seeding import generator

PAPER = 'Tomczak & Welling 2018, "VAE with a VampPrior"; numbers of Norouzi et al. 2020 (Exemplar VAE), one layer of 40 latents'
CLAIM = "A prior that is a mixture of the encoder's posteriors at learned pseudo-inputs gives a higher likelihood than N(0, I)."

# priors: how many components each has. warm_up: epochs over which the KL's weight rises from 0 to 1. samples: K of the
# NLL, on the first `images` test images. Tomczak & Welling: 500 pseudo-inputs, up to 2000 epochs, warm_up 100, K = 5000.
SETTINGS = {
    "quick": {
        "data": ["mnist"],
        "priors": {"standard_normal": 1, "mixture": 100, "vampprior": 100},
        "seeds": [0, 1, 2],
        "epochs": 6,
        "warm_up": 2,
        "images": 500,
        "samples": 500,
    },
    "full": {
        "data": ["mnist", "fashion_mnist"],
        "priors": {"standard_normal": 1, "vampprior": 500},
        "seeds": [0, 1, 2],
        "epochs": 60,
        "warm_up": 12,
        "images": 1000,
        "samples": 1000,
    },
}
STEPS_PER_EPOCH = 550  # 55,000 images, 100 a step

PUBLISHED = {  # NLL in nats, dynamic binarisation, 40 latents, 2 x 300; the table of Norouzi et al.
    "mnist": {"standard_normal": "84.45", "vampprior": "82.43"},
    "fashion_mnist": {"standard_normal": "228.70 ± 0.15", "vampprior": "227.35 ± 0.05"},
}
PLAIN, VAMP = "standard_normal", "vampprior"
NAMES = {PLAIN: "N(0, I)", "mixture": "mixture of Gaussians", VAMP: "VampPrior"}
TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
OPTION = {"mixture": "prior.components", "vampprior": "prior.pseudo_inputs"}
AGGREGATE, DRAWS = 5000, 1000  # test images in the aggregate posterior, and how many of them z is drawn for
SHOWN = 12  # pictures in a row


def overrides(data: str, prior: str, settings: dict[str, Any]) -> list[str]:
    """Of conf/experiment/priors.yaml."""
    return [
        f"data={data}",
        f"prior={prior}",
        *([f"{OPTION[prior]}={settings['priors'][prior]}"] if prior in OPTION else []),
        f"trainer.max_epochs={settings['epochs']}",
        f"objective.schedule.steps={settings['warm_up'] * STEPS_PER_EPOCH}",
    ]


def measure(context: Context) -> dict[str, Any]:
    settings = context.settings
    slowest_first = reversed(settings["priors"])
    cells = {f"{d}-{prior}": overrides(d, prior, settings) for prior in slowest_first for d in settings["data"]}
    options = (settings["images"], settings["samples"])
    found = context.measure_grid(
        {
            (cell, seed): functools.partial(measure_model, folder, *options, pictures=seed == 0)
            for (cell, seed), folder in context.train_grid(cells, settings["seeds"]).items()
        }
    )

    def over_seeds(data: str, prior: str) -> dict[str, Any]:
        runs = found[f"{data}-{prior}"]
        nll = torch.tensor([run["nll_of_images"] for run in runs], dtype=torch.float64)
        pictures = {key: run[key] for run in runs for key in ("samples", "pseudo_inputs") if key in run}
        numbers = {key: [run[key] for run in runs] for key in runs[0] if isinstance(runs[0][key], float)}
        return {**numbers, "nll": nll.mean(1), "nll_of_images": (nll.mean(0) * 1e3).round() / 1e3, **pictures}

    kept = ("seeds", "epochs", "warm_up", "images", "samples", "priors")
    return {
        "data": {d: {prior: over_seeds(d, prior) for prior in settings["priors"]} for d in settings["data"]},
        "protocol": {key: settings[key] for key in kept},
    }


def measure_model(folder: Path, images: int, samples: int, pictures: bool) -> dict[str, Any]:
    """-L_K of the first test images, with noise that every model shares; where the rate goes; pictures if asked for."""
    _, data, module = load(folder)
    vae, batch = module.vae, data.examples("test", images)
    parts = elbo_decomposition(vae, data.examples("test", AGGREGATE), DRAWS)
    metrics = read_metrics(folder)
    found = {
        "nll_of_images": -log_likelihood(vae, batch, samples).double(),
        "elbo": metrics["test/elbo"],
        "distortion": metrics["test/distortion"],
        "rate": metrics["test/rate"],
        "active_units": metrics["test/active_units"],
        "mutual_information": parts[f"index_code_mi_n{AGGREGATE}"],
        "marginal_kl": parts[f"marginal_kl_n{AGGREGATE}"],
        "best_epoch": metrics["val/best_epoch"] + 1,
        "seconds": float(read_status(folder)["seconds"]),
    }
    if pictures:
        with torch.no_grad():
            found["samples"] = pack_images(vae.sample(SHOWN, generator("samples"))[:, 0])
            if hasattr(vae.prior, "pseudo_inputs"):
                found["pseudo_inputs"] = pack_images(vae.prior.pseudo_inputs()[:SHOWN, 0])
    return found
