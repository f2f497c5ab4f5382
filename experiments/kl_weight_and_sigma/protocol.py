"""What weight on the KL: beta with sigma = 1, beta = 1 with a fixed sigma, a learned sigma, or the optimal one.

(SSE / 2 + beta KL) / beta = SSE / (2 sigma^2) + KL at sigma^2 = beta, SSE being an image's summed squared error: one
objective in two scales. First in float64, step by step, then as they are trained.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vae.evaluation.likelihood import ELBOTotals
from vae.experiment import Context
from vae.experiment_figures import pack_images
from vae.likelihoods import Gaussian, Laplace, Likelihood, OptimalSigmaGaussian
from vae.objectives.elbo import BetaVAE, Objective
from vae.seeding import generator

if TYPE_CHECKING:
    from vae.data.images import Batch
    from vae.engine.module import VAEModule

PAPER = (
    "Rybkin et al. 2021, Simple and effective VAE training with calibrated decoders (sigma-VAE); "
    "the weight 1e-6 of Rombach et al. 2022"
)
CLAIM = (
    "A weight beta on the KL is a Gaussian likelihood of variance beta, and a likelihood that learns its variance finds the "
    "weight: the mean squared error of a sub-pixel."
)

SETTINGS = {
    "quick": {"betas": [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1], "seeds": [0], "start": 0.1},
    "full": {"betas": [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1], "seeds": [0, 1, 2], "start": 0.1},
}
IMAGES = 10_000  # of each split, that a model is measured on
SHOWN = 8  # pictures in a row
EXACT = {
    "images": 128,
    "steps": 50,
    "beta": 0.01,
    "sgd": 1e-3,
    "adam": 1e-3,
    "weight": 1e-6,
}  # of what is done in float64


# --- one objective in two scales, in float64 -------------------------------------------------------------------------


def untrained(config: str) -> tuple[VAEModule, Batch]:
    """A dense VAE of this config in float64, and some images; the same weights at each call."""
    module, batch = built(config)
    return copy.deepcopy(module), batch


@cache
def built(config: str) -> tuple[VAEModule, Batch]:
    from hydra import compose, initialize_config_dir

    from vae.cli import CONFIGS
    from vae.engine.build import build

    small = ["model.latent_dim=8", f"data.limit={EXACT['images']}"]
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        data, module = build(compose("train", [config, *small]))
    module.double()
    batch = data.examples("train", EXACT["images"])
    return module, batch._replace(x=batch.x.double())


def exactly(likelihood: Likelihood, beta: float, sigma: float = 1.0) -> tuple[Likelihood, Objective]:
    """Both in float64, sigma and beta included."""
    objective = BetaVAE()
    likelihood.double().log_sigma.fill_(math.log(sigma))
    objective.double().beta.fill_(beta)
    return likelihood, objective


def steps(config: str, beta: float, sigma: float, make: Callable[[Iterable], torch.optim.Optimizer]) -> Tensor:
    """All weights after EXACT["steps"] steps on the same images and noise, in one row."""
    module, batch = untrained(config)
    module.vae.likelihood, objective = exactly(Gaussian(), beta, sigma)
    networks = nn.ModuleList([module.vae.encoder, module.vae.decoder])
    optimizer = make(networks.parameters())
    for step in range(EXACT["steps"]):
        optimizer.zero_grad()
        objective(module.vae, batch, generator("exact steps", step), step)["loss"].backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(networks.parameters()).detach()


def gradient(module: VAEModule, loss: Tensor) -> Tensor:
    parameters = [*module.vae.encoder.parameters(), *module.vae.decoder.parameters()]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])


def apart(a: Tensor, b: Tensor) -> float:
    """The distance of two vectors, over the length of the first."""
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)).item()


def published(module: VAEModule, batch: Batch, power: int) -> Tensor:
    """The loss of latent diffusion without its feature and adversarial terms: |error|^power over pixels in [-1, 1], summed
    over an image's sub-pixels, plus kl_weight times the image's KL; means over images."""
    vae = module.vae
    posterior = vae.encode(batch.x)
    z = posterior.rsample(generator("exact steps", 0))
    image = vae.likelihood.mean(vae.decode(z))
    error = ((2 * image - 1) - (2 * batch.x - 1)).abs().pow(power).flatten(1).sum(1)
    return (error + EXACT["weight"] * vae.kl(posterior, z).sum(-1)).mean()


def measure_exact(config: str) -> dict[str, float]:
    """How far the two sides of each identity are apart, relative; and the sigmas that the published weight stands for."""
    beta = EXACT["beta"]
    found = {}
    start, _ = untrained(config)
    before = nn.utils.parameters_to_vector([*start.vae.encoder.parameters(), *start.vae.decoder.parameters()]).detach()
    for name in ("sgd", "adam", "adam_same_epsilon"):
        kind = torch.optim.SGD if name == "sgd" else torch.optim.Adam
        rate = EXACT["sgd" if name == "sgd" else "adam"]
        options = {"sgd": {"lr": rate * beta}, "adam": {"lr": rate, "eps": 1e-8 / beta}}.get(name, {"lr": rate})
        weighted = steps(config, beta, 1.0, partial(kind, lr=rate)) - before
        found[name] = apart(weighted, steps(config, 1.0, math.sqrt(beta), partial(kind, **options)) - before)

    module, batch = untrained(config)
    vae = module.vae.train()

    def loss(likelihood: Likelihood, beta: float, sigma: float = 1.0) -> dict[str, Tensor]:
        vae.likelihood, objective = exactly(likelihood, beta, sigma)
        return objective(vae, batch, generator("exact steps", 0), 0)

    pixels = batch.x[0].numel()
    plain = loss(Gaussian(), 0.0)["distortion"].item()
    error = (2 * plain - pixels * math.log(2 * math.pi)) / pixels  # the mean squared error of a sub-pixel
    optimal = loss(OptimalSigmaGaussian(), 1.0)
    found["optimal_gradient"] = apart(
        gradient(module, optimal["loss"]) * error, gradient(module, loss(Gaussian(), error)["loss"])
    )
    entropy = 0.5 * pixels * (math.log(2 * math.pi * error) + 1)
    found["optimal_distortion"] = abs(optimal["distortion"].item() / entropy - 1)
    scale, sigma = EXACT["weight"] / 2, math.sqrt(EXACT["weight"] / 8)
    for name, power, likelihood, spread in (("l1", 1, Laplace(), scale), ("l2", 2, Gaussian(), sigma)):
        theirs = gradient(module, published(module, batch, power))
        ours = gradient(module, loss(likelihood, 1.0, spread)["loss"])
        found[f"published_{name}"] = apart(theirs, ours * EXACT["weight"])
    return {**found, "laplace_scale": scale, "gaussian_sigma": sigma}


# --- as they are trained ----------------------------------------------------------------------------------------------


def cells(betas: list[float], start: float) -> dict[str, list[str]]:
    """What tells the runs apart. start: where a learned sigma begins."""
    return {
        **{f"beta={beta:g}": [f"objective.beta={beta:g}"] for beta in betas},
        **{f"sigma2={beta:g}": [f"likelihood.sigma={math.sqrt(beta):.9g}"] for beta in betas},
        "optimal": ["likelihood=gaussian_optimal"],
        "learned": ["likelihood=gaussian_learned", f"likelihood.sigma={start:g}"],
        "learned from 1": ["likelihood=gaussian_learned", "likelihood.sigma=1"],
    }


def measure(context: Context) -> dict[str, Any]:
    settings = context.settings
    exact = context.cached("exact", partial(measure_exact, f"experiment={context.name}_quick"))  # a dense network
    folders = context.train_grid(cells(settings["betas"], settings["start"]), settings["seeds"])
    found = measured(context, folders)
    beta = float(f"{fmean(run['sigma2'] for run in found['optimal']):.3g}")
    folders = context.train_grid({"found": [f"objective.beta={beta:g}"]}, settings["seeds"])
    return {
        "exact": {**exact, **{key: EXACT[key] for key in ("steps", "beta", "weight")}},
        "betas": settings["betas"],
        "found_beta": beta,
        "runs": found | measured(context, folders),
    }


def measured(context: Context, folders: dict[tuple[str, int], Path]) -> dict[str, list[dict[str, Any]]]:
    first = context.settings["seeds"][0]
    return context.measure_grid({run: partial(measure_run, folder, run[1] == first) for run, folder in folders.items()})


@torch.no_grad()
def measure_run(folder: Path, pictures: bool) -> dict[str, Any]:
    """Of the last weights on images of both splits, one z each, the same noise for all: the mean squared error of a
    sub-pixel, and the rate in nats an image; sigma^2 of the likelihood; the scales of the latents; a row of pictures."""
    from vae.engine.checkpoints import load_weights
    from vae.engine.run import load

    _, data, module = load(folder)
    load_weights(module, folder / "checkpoints" / "last.ckpt")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = module.vae.eval().to(device)
    result: dict[str, Any] = {"sigma2": vae.likelihood.log_sigma.double().mul(2).exp().item()}
    for split in ("train", "test"):
        totals, errors, variances, means = ELBOTotals(), [], [], []
        for batch in data.batches(split):
            batch = batch._replace(x=batch.x.to(device))
            out = totals.update(vae, batch)
            errors.append((vae.likelihood.mean(out.params) - batch.x).double().square().flatten(1).mean(1))
            variances.append(out.posterior.log_var.double().exp())
            means.append(out.posterior.mean.double())
            if totals.images >= IMAGES:
                break
        result[split] = {"mse": torch.cat(errors).mean().item(), "rate": totals.compute()["rate"]}
    result["posterior_sd"] = torch.cat(variances).mean().sqrt().item()
    result["latent_sd"] = (torch.cat(variances).mean(0) + torch.cat(means).var(0)).mean().sqrt().item()
    if pictures:
        x = data.examples("test", SHOWN).x.to(device)
        z = vae.encode(x).rsample(generator("shown", device=device))
        shown = (x, vae.likelihood.mean(vae.decode(z)), vae.sample(SHOWN, generator("samples", device=device)))
        result["pictures"] = [pack_images(images[:, 0].clamp(0, 1).cpu()) for images in shown]
    result["pixels"] = totals.pixels
    return result
