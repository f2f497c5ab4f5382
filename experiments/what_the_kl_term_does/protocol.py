"""What the KL term does: an autoencoder, a VAE and two heavy weights on the KL, alike but for that weight.

Without the KL the decoder is good where images are encoded, and the prior draws from elsewhere.
With too much of it there is nothing left to decode.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.engine.folder import read_config, read_metrics
from vae.engine.run import load
from vae.evaluation.decomposition import aggregate_log_prob, elbo_decomposition
from vae.evaluation.samples import frechet_distance, in_parts, trained_classifier, training_batch
from vae.experiment import Context
from vae.experiment_figures import pack_images
from vae.gaussian import DiagonalGaussian
from vae.kl import kl_gaussian_full
from vae.seeding import generator

if TYPE_CHECKING:
    from vae.model import VAE

PAPER = "No one paper's table; the aggregate posterior's part of the rate as in Hoffman & Johnson 2016"
CLAIM = "Without the KL term reconstructions are best and the prior misses the codes; with too much of it, nothing is encoded."

NUMBERS, MAP = 16, 2  # latents of the models that are measured, and of those that are drawn
SETTINGS = {
    "quick": {"betas": [0, 1, 8, 40], "seeds": [0], "images": 10_000, "draws": 2000, "samples": 5000},
    "full": {"betas": [0, 1, 8, 40], "seeds": [0, 1, 2], "images": 10_000, "draws": 2000, "samples": 5000},
}
PATH = 9  # images of an interpolation, ends included
GRID = 9  # images along a side of the decoded plane
REACH = 2.5  # of the decoded plane, in the prior's standard deviations


def measure(context: Context) -> dict[str, Any]:
    """Every weight and seed at 16 latents; one seed of each weight at 2, for the picture."""
    settings, classifiers = context.settings, context.folder / "classifiers"
    betas, seeds = settings["betas"], settings["seeds"]

    def cells(latents: int) -> dict[str, list[str]]:
        return {name(b, latents): [f"objective.beta={b}", f"model.latent_dim={latents}"] for b in betas}

    folders = context.train_grid(cells(NUMBERS), seeds) | context.train_grid(cells(MAP), seeds[:1])
    first = next(iter(folders.values()))
    train_classifier(classifiers, first)
    how = partial(
        measure_run, classifiers, images=settings["images"], draws=settings["draws"], samples=settings["samples"]
    )
    found = context.measure_grid(
        {run: partial(how, folder, pictures=run[1] == seeds[0]) for run, folder in folders.items()}
    )
    config = read_config(first)
    return {
        "runs": {str(beta): found[name(beta, NUMBERS)] for beta in betas},
        "maps": {str(beta): found[name(beta, MAP)][0] for beta in betas},
        "epochs": config.trainer.max_epochs,
        "limit": config.data.limit,
    }


def name(beta: float, latents: int) -> str:
    return f"beta={beta},latents={latents}"


def train_classifier(classifiers: Path, folder: Path) -> None:
    """Once, so that the processes that measure find it."""
    _, data, _ = load(folder)
    trained_classifier(training_batch(data, 20_000, 0), 0, classifiers)


@torch.no_grad()
def measure_run(
    classifiers: Path, folder: Path, images: int, draws: int, samples: int, pictures: bool
) -> dict[str, Any]:
    """Of the test images: both halves of the ELBO, the aggregate posterior against the prior, Frechet distances."""
    _, data, module = load(folder)
    vae, test, train = module.vae, data.examples("test", images), training_batch(data, 20_000, 0)
    q = vae.encode(test.x)
    parts = elbo_decomposition(vae, test, draws)
    n, metrics = len(test.x), read_metrics(folder)
    result = {
        "distortion": metrics["test/distortion"],
        "rate": metrics["test/rate"],
        "active_units": metrics["test/active_units"],
        "posterior_sd": q.log_var.double().div(2).mean().exp().item(),
        "marginal_kl": parts[f"marginal_kl_n{n}"],
        "mutual_information": parts[f"index_code_mi_n{n}"],
        "total_correlation": parts[f"total_correlation_n{n}"],
        "dimension_wise_kl": parts[f"dimension_wise_kl_n{n}"],
        "moment_kl": moment_kl(*moments(q)),
        "images": n,
    }

    classifier = trained_classifier(train, 0, classifiers)
    features = in_parts(classifier.features, torch.device("cpu"))
    real = features(test.x[:samples])
    result["classifier_accuracy"] = classifier.accuracy(data, "test", samples)
    result["frechet"] = {"training images": frechet_distance(real, features(train.x[:samples]))}
    for source, z in codes(vae, vae.encode(train.x), samples).items():
        noise = generator("what the KL term does", "pixels")
        result["frechet"][source] = frechet_distance(
            real, features(torch.cat([vae.draw_image(part, noise) for part in z.split(1000)]))
        )
    if vae.latent_dim == MAP:
        result["empty"] = empty(vae, q, draws)
    if pictures:
        result["pictures"] = plane(vae, q, test.y) if vae.latent_dim == MAP else samples_and_paths(vae, q, test.y)
    return result


def codes(vae: VAE, q: DiagonalGaussian, n: int) -> dict[str, Tensor]:
    """n codes each, (n, D): of the prior, of the Gaussian with the aggregate posterior's moments, of itself."""
    noise = generator("what the KL term does", "codes")
    mean, covariance = moments(q)
    white = torch.randn(n, len(mean), generator=noise, dtype=mean.dtype)
    return {
        "prior": vae.prior.sample(n, noise),
        "fitted Gaussian": (mean + white @ torch.linalg.cholesky(covariance).T).float(),
        "aggregate posterior": DiagonalGaussian(q.mean[:n], q.log_var[:n]).rsample(noise),
    }


def moments(q: DiagonalGaussian) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of the equally weighted mixture of N Gaussians, exactly, in double."""
    mean = q.mean.double().mean(0)
    centred = q.mean.double() - mean
    return mean, centred.T @ centred / len(centred) + q.log_var.double().exp().mean(0).diag()


def moment_kl(mean: Tensor, covariance: Tensor) -> float:
    """KL(N(mean, covariance) || N(0, I)) in nats: of all that have these moments, the least KL to N(0, I)."""
    return kl_gaussian_full(
        p_mean=mean,
        p_covariance=covariance,
        q_mean=torch.zeros_like(mean),
        q_covariance=torch.eye(len(mean), dtype=mean.dtype),
    ).item()


def empty(vae: VAE, q: DiagonalGaussian, n: int) -> float:
    """The part of n draws of the prior where the aggregate posterior has less than a tenth of the prior's density."""
    z = vae.prior.sample(n, generator("what the KL term does", "empty"))
    return (aggregate_log_prob(z, q)[0] < vae.prior.log_prob(z) - torch.tensor(10.0).log()).double().mean().item()


def plane(vae: VAE, q: DiagonalGaussian, labels: Tensor, points: int = 1000) -> dict[str, Any]:
    """A draw of q(z|x) for some images, and the decoded plane, at half the images' size."""
    z = DiagonalGaussian(q.mean[:points], q.log_var[:points]).rsample(generator("what the KL term does", "map"))
    side = torch.linspace(-REACH, REACH, GRID)
    grid = torch.stack(torch.meshgrid(-side, side, indexing="ij"), -1).flatten(0, 1).flip(-1)  # y downwards
    return {
        "codes": [[float(f"{value:.3g}") for value in point] for point in z.tolist()],
        "labels": labels[:points].tolist(),
        "plane": pack(F.avg_pool2d(vae.mean_image(grid), 2)),
    }


def samples_and_paths(vae: VAE, q: DiagonalGaussian, labels: Tensor, samples: int = 27) -> dict[str, Any]:
    """Mean images of draws of the prior, and of straight lines between the codes of two digits."""
    z = vae.prior.sample(samples, generator("what the KL term does", "shown"))
    first = [(labels == digit).nonzero()[0].item() for digit in (0, 2, 7, 1, 5, 3)]
    start, end = q.mean[first[0::2]], q.mean[first[1::2]]
    weight = torch.linspace(0, 1, PATH).view(-1, 1)
    paths = start.unsqueeze(1) + weight * (end - start).unsqueeze(1)  # (pairs, PATH, D)
    return {"samples": pack(vae.mean_image(z)), "paths": pack(vae.mean_image(paths.flatten(0, 1)))}


def pack(images: Tensor) -> dict[str, Any]:
    """In 16 levels of grey, which halves the text that they take."""
    return pack_images((images.squeeze(1) * 15).round() / 15)
