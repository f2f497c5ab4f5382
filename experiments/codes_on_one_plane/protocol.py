"""FSQ, VQ and the Gaussian VAE of one network on one rate-distortion plane, in nats per image."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from vae.engine.folder import read_metrics
from vae.experiment import Context

PAPER = 'Mentzer et al. 2024, "Finite scalar quantization: VQ-VAE made simple"; van den Oord et al. 2017'
CLAIM = (
    "FSQ uses all of its codes, and VQ does not by itself. In nats, what do either's codes buy beside a Gaussian VAE's?"
)

# levels: of FSQ, whose codebook is their product; VQ has as many codes, of as many numbers. Each image has PLACES codes.
SETTINGS = {
    "quick": {"levels": [[3, 3, 3], [8, 6, 5], [10, 10, 10]], "betas": [2, 4, 8, 16, 32, 64, 128], "seeds": [0]},
    "full": {"levels": [[3, 3, 3], [8, 6, 5], [10, 10, 10]], "betas": [2, 4, 8, 16, 32, 64, 128], "seeds": [0, 1, 2]},
}
PLACES, PIXELS, SIGMA = 4, 784, 0.1
# van den Oord et al. weigh by 0.25 what is a mean over numbers, against a mean square error in units of the data's variance,
# 0.125 a pixel. In nats per image that is 0.25 * 784 * 0.125 / (2 sigma^2) / 12 = 102.
COMMITMENT = 100
PRIORS = ("uniform", "categorical", "autoregressive")
CURVES = {"gaussian": "Gaussian VAE", "realnvp": "Gaussian VAE under a learned prior"}
FAMILIES = {"fsq": "FSQ", "vq": "VQ", "vq_plain": "VQ without restarts"}
MIDDLE = 1  # of the sizes, the one at which all priors are tried
REPORTED = ("rate", "distortion", "elbo", "perplexity", "codes_used")


def posterior(family: str, levels: list[int]) -> list[str]:
    """Overrides of conf/experiment/codes_on_one_plane.yaml for a quantizer of this family."""
    if family == "fsq":
        return ["posterior=fsq", f"posterior.levels={levels}".replace(" ", "")]
    found = ["posterior=vq", f"posterior.codes={math.prod(levels)}", f"posterior.dim={len(levels)}"]
    found.append(f"posterior.commitment={COMMITMENT}")
    return [*found, "posterior.restart=0"] if family == "vq_plain" else found


def cells(settings: dict[str, Any]) -> dict[str, list[str]]:
    """{name of a point of the plane: its overrides}."""
    found = {f"gaussian-{beta:g}": [f"objective.beta={beta}"] for beta in settings["betas"]}
    found |= {f"realnvp-{beta:g}": [f"objective.beta={beta}", "prior=realnvp"] for beta in settings["betas"]}
    for place, levels in enumerate(settings["levels"]):
        for family in FAMILIES:
            for prior in PRIORS if place == MIDDLE and family != "vq_plain" else ("autoregressive",):
                name = f"{family}-{math.prod(levels)}-{prior}"
                found[name] = [*posterior(family, levels), f"prior=codes_{prior}"]
    return found


def measure(context: Context) -> dict[str, Any]:
    settings = context.settings
    folders = context.train_grid(cells(settings), settings["seeds"])
    points = context.measure_grid({run: functools.partial(point, folder) for run, folder in folders.items()})
    sizes = [math.prod(levels) for levels in settings["levels"]]
    return {"points": points, "sizes": sizes, "middle": sizes[MIDDLE], "betas": settings["betas"]}


def point(folder: Path) -> dict[str, float]:
    """Where a run stands, on the test images, in nats per image."""
    metrics = read_metrics(folder)
    return {name: metrics[f"test/{name}"] for name in REPORTED if f"test/{name}" in metrics}


def squared_error(distortion: float) -> float:
    """Of an image, summed over pixels: distortion = error / (2 sigma^2) + 784 (log sigma + log(2 pi) / 2)."""
    return 2 * SIGMA**2 * (distortion - PIXELS * (math.log(SIGMA) + 0.5 * math.log(2 * math.pi)))
