"""The linear VAE against probabilistic PCA, whose likelihood, rate, sigma^2 and latents are known from the eigenvalues of the
images' covariance: trained by minibatches as any VAE, then on all images at once, and held to the exact optimum."""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vae.data.module import ImageDataModule
from vae.evaluation.ppca import LinearWeights, Optimum, Spectrum, optimum, spectrum
from vae.experiment import Context
from vae.experiment_figures import pack_images
from vae.model import VAE
from vae.seeding import generator

PAPER = "Lucas, Tucker, Grosse & Norouzi 2019, Don't blame the ELBO! A linear VAE perspective on posterior collapse"
CLAIM = (
    "Trained from anywhere, the linear VAE reaches the likelihood of probabilistic PCA, its latents are the principal "
    "components, and those whose eigenvalue is below sigma^2 collapse: sigma^2 has to be learned."
)


def _model(data: str, k: int, sigma2: float | None, seeds: int, epochs: int, iterations: int) -> dict:
    return {"data": data, "k": k, "sigma2": sigma2, "seeds": seeds, "epochs": epochs, "iterations": iterations}


SETTINGS = {
    "quick": {
        "models": [_model("mnist", 10, None, 1, 15, 2500), _model("mnist", 50, 1.0, 1, 8, 500)],
        "starts": {"data": "mnist", "k": 10, "number": 4, "iterations": 1000},
    },
    "full": {
        "models": [
            _model("mnist", 10, None, 3, 15, 2500),
            _model("mnist", 50, None, 3, 15, 3000),
            _model("fashion_mnist", 10, None, 3, 15, 5000),
            _model("fashion_mnist", 50, None, 1, 15, 3000),
            _model("mnist", 50, 3.0, 1, 8, 500),
            _model("mnist", 50, 1.0, 3, 8, 500),
            _model("mnist", 50, 0.3, 1, 8, 1500),
            _model("fashion_mnist", 50, 1.0, 1, 8, 500),
        ],
        "starts": {"data": "mnist", "k": 10, "number": 20, "iterations": 1000},
    },
}
# train ELBO and rate, nats an image of the 60,000, and active latents: from the eigenvalues, computed apart from this code
PUBLISHED = {
    ("mnist", 10, None): (182.155, 21.030, 10),
    ("mnist", 50, None): (507.905, 94.401, 50),
    ("fashion_mnist", 10, None): (314.806, 23.745, 10),
    ("mnist", 50, 1.0): (-743.186, 4.334, 12),
}
COLLAPSED = (0.01, 0.01)  # KL_i < epsilon nats for a part >= 1 - delta of the images (Lucas et al., definition 1)
DRAWN = 10  # components shown


def full_batch(start: LinearWeights, values: Tensor, iterations: int, learn_sigma: bool) -> LinearWeights:
    """Ascend the ELBO of all images at once from `start` by L-BFGS; the means over images and z are exact.

    The encoder is taken in whitened coordinates (a change of variables that only speeds this up), as its gradient in
    the direction of a component is as large as the component's eigenvalue.
    """
    from scipy.optimize import minimize

    scale = values.sqrt().clamp(min=0.1)
    shapes = [part.shape for part in start]

    def weights(flat: Tensor) -> LinearWeights:
        split = flat.split([shape.numel() for shape in shapes])
        parts = [part.view(shape) for part, shape in zip(split, shapes, strict=True)]
        found = LinearWeights(*parts)
        return found._replace(
            encoder=found.encoder / scale, log_sigma2=found.log_sigma2 if learn_sigma else start.log_sigma2
        )

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        flat = torch.from_numpy(point).requires_grad_(True)
        value = -weights(flat).terms(values)["elbo"]
        (gradient,) = torch.autograd.grad(value, flat)
        return value.item(), gradient.numpy()

    begin = torch.cat([part.flatten() for part in start._replace(encoder=start.encoder * scale)])
    options = {"maxiter": iterations, "maxfun": 10 * iterations, "maxcor": 10, "ftol": 0.0, "gtol": 1e-9}
    found = minimize(loss, begin.numpy(), jac=True, method="L-BFGS-B", options=options)
    return weights(torch.from_numpy(found.x))


def random_start(n: int, k: int, noise: torch.Generator) -> LinearWeights:
    """Weights at random at scales drawn too, 0.02 to 0.2 (torch's own: decoder 0.18, encoder 0.02); sigma² 0.03 to 3."""

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=noise, dtype=torch.float64) * _log_uniform(0.02, 0.2, noise)

    log_var = torch.randn(k, generator=noise, dtype=torch.float64)
    offset = torch.randn(n, generator=noise, dtype=torch.float64) * 0.1
    shift = torch.randn(k, generator=noise, dtype=torch.float64)
    return LinearWeights(matrix(n, k), matrix(k, n), offset, shift, log_var, _log_uniform(0.03, 3.0, noise).log())


def _log_uniform(low: float, high: float, noise: torch.Generator) -> Tensor:
    share = torch.rand((), generator=noise, dtype=torch.float64)
    return low * (high / low) ** share


@cache
def training_images(data: str) -> tuple[Spectrum, Tensor]:
    """The images that a run of the experiment trains on: their spectrum, and they themselves."""
    from hydra import compose, initialize_config_dir

    from vae.cli import CONFIGS
    from vae.engine.build import instantiate

    with initialize_config_dir(CONFIGS, version_base="1.3"):
        config = compose("train", ["experiment=linear_vae_ppca", f"data={data}"])
    splits = instantiate(config.data.source)()
    return spectrum(splits.train.x), torch.cat([splits.train.x, splits.val.x])


def describe(weights: LinearWeights, data: Spectrum, best: Optimum) -> dict:
    """Where the weights are, exactly, and how their decoder's columns lie to the principal components.

    alignment: the mean |cos| of each of the `best.active` longest columns to the component it is nearest to; angle: the
    largest principal angle between their span and that of the first components, in radians.
    """
    terms = weights.terms(data.values)
    lengths = weights.decoder.norm(dim=0)
    order = lengths.argsort(descending=True)[: best.active]
    columns = (weights.decoder / lengths)[:, order]
    nearest = columns.abs().max(0)
    basis = torch.linalg.qr(columns).Q
    outside = basis[best.active :]  # the part of the span that the first components do not hold
    return {
        **{name: terms[name].item() for name in ("elbo", "rate", "distortion")},
        "gap": best.elbo - terms["elbo"].item(),
        "sigma2": weights.log_sigma2.exp().item(),
        "kl": terms["kl"].sort(descending=True).values,
        "angle": math.asin(min(1.0, torch.linalg.matrix_norm(outside, 2).item())),
        "alignment": nearest.values.mean(),
        "nearest": nearest.indices.sort().values,
    }


@torch.no_grad()
def sampled(vae: VAE, data: ImageDataModule) -> dict:
    """The same model by the library's own measure, on all training images and one z an image; and its latents that have
    not collapsed, image by image."""
    from vae.evaluation.likelihood import ELBOTotals

    totals, below, images = ELBOTotals(), 0.0, 0
    for batch in data.batches("train"):
        totals.update(vae, batch)
        below = below + (vae.prior.kl(vae.encode(batch.x)) < COLLAPSED[0]).double().sum(0)
        images += len(batch.x)
    active = int((below / images < 1 - COLLAPSED[1]).sum())
    return {"sampled_elbo": totals.compute()["elbo"], "active": active}


def pictures(weights: LinearWeights, data: Spectrum) -> dict:
    """The first principal components, and the decoder column nearest to each with its sign turned, as grey images."""
    unit = weights.decoder / weights.decoder.norm(dim=0)
    rows = []
    for number in range(DRAWN):
        component = data.components[:, number]
        column = data.components @ unit[:, unit[number].abs().argmax()]
        rows.append([component, column * torch.sign(column @ component)])
    shown = torch.stack([torch.stack(row) for row in zip(*rows, strict=True)])
    shown = 0.5 + 0.5 * shown / shown.abs().amax(-1, keepdim=True)
    side = math.isqrt(len(data.mean))
    return pack_images(shown.unflatten(-1, (side, side)))


def name_of(model: dict) -> str:
    return f"{model['data']}-k{model['k']}-" + (f"sigma2={model['sigma2']:g}" if model["sigma2"] else "learned")


def overrides(model: dict) -> list[str]:
    """Of conf/experiment/linear_vae_ppca.yaml."""
    fixed = ["likelihood=gaussian", f"likelihood.sigma={math.sqrt(model['sigma2'])!r}"] if model["sigma2"] else []
    return [
        f"data={model['data']}",
        f"model.latent_dim={model['k']}",
        f"trainer.max_epochs={model['epochs']}",
        *fixed,
    ]


def measure_model(folder: Path, model: dict, seed: int) -> dict:
    """Where the minibatches ended, where the full batch then does, and the components of one seed."""
    from vae.engine.checkpoints import load_weights
    from vae.engine.run import load

    _, data, module = load(folder)
    load_weights(module, folder / "checkpoints" / "last.ckpt")
    spectrum_, _ = training_images(model["data"])
    best = optimum(spectrum_.values, model["k"], model["sigma2"])
    minibatch = LinearWeights.of(module.vae, spectrum_)
    final = full_batch(minibatch, spectrum_.values, model["iterations"], model["sigma2"] is None)
    final.put_into(module.vae, spectrum_)
    result = {
        "optimum": best._asdict(),
        "minibatch": describe(minibatch, spectrum_, best),
        "final": {**describe(final, spectrum_, best), **sampled(module.vae, data)},
    }
    if seed == 0 and model["sigma2"] is None and model["k"] == DRAWN:
        result["pictures"] = pictures(final, spectrum_)
    return result


def measure(context: Context) -> dict:
    models = {name_of(model): model for model in context.settings["models"]}
    runs = {(name, seed): f"{name},seed={seed}" for name, model in models.items() for seed in range(model["seeds"])}
    folders = context.train_many(
        {run: [context.config, *overrides(models[name]), f"seed={seed}"] for (name, seed), run in runs.items()}
    )
    found: dict[str, list] = {name: [] for name in models}
    for (name, seed), run in runs.items():  # one after another, with all threads
        measured = partial(measure_model, folders[run], models[name], seed)
        found[name].append(context.cached(f"measured,{run}", measured))
    return {
        "models": [{**model, "seeds": found[name]} for name, model in models.items()],
        "closed_form": context.cached("closed-form", lambda: closed_forms(context.settings["models"])),
        "starts": context.cached("starts", lambda: from_anywhere(**context.settings["starts"])),
    }


def closed_forms(models: list[dict]) -> list[dict]:
    """The optimum on all 60,000 images, of every model that there is a published number for."""
    found = []
    values = {name: spectrum(training_images(name)[1]).values for name in {model["data"] for model in models}}
    for data, k, sigma2 in PUBLISHED:
        if data in values:
            best = optimum(values[data], k, sigma2)._asdict()
            found.append({"data": data, "k": k, "sigma2": sigma2, **{n: best[n] for n in ("elbo", "rate", "active")}})
    return found


def from_anywhere(data: str, k: int, number: int, iterations: int) -> dict:
    """Where the full-batch phase alone ends from so many random starts: nats below the optimum, before and after."""
    data_ = training_images(data)[0]
    best = optimum(data_.values, k)
    gaps = {"start": [], "end": []}
    for start in range(number):
        weights = random_start(len(data_.values), k, generator("random start", start))
        gaps["start"].append(best.elbo - weights.terms(data_.values)["elbo"].item())
        final = full_batch(weights, data_.values, iterations, learn_sigma=True)
        gaps["end"].append(best.elbo - final.terms(data_.values)["elbo"].item())
    return {"data": data, "k": k, **gaps}
