"""What the KL term does: an autoencoder, a VAE and two heavy weights on the KL, alike but for that weight.

Without the KL the decoder is good where images are encoded, and the prior draws from elsewhere.
With too much of it there is nothing left to decode.
"""

from __future__ import annotations

import functools
import statistics
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vae.engine.folder import read_config, read_metrics
from vae.engine.run import load
from vae.evaluation.decomposition import aggregate_log_prob, elbo_decomposition
from vae.evaluation.samples import frechet_distance, in_parts, trained_classifier, training_batch
from vae.experiment import Claim, Context, Table, pack_images, spread, unpack_images
from vae.gaussian import DiagonalGaussian
from vae.kl import kl_gaussian_full
from vae.seeding import generator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


# --- measuring ------------------------------------------------------------------------------------------------------


def measure(context: Context) -> dict[str, Any]:
    """Every weight and seed at 16 latents; one seed of each weight at 2, for the picture."""
    settings = context.settings
    betas, seeds = settings["betas"], settings["seeds"]
    cells = [(beta, NUMBERS, seed) for beta in betas for seed in seeds] + [(beta, MAP, seeds[0]) for beta in betas]
    names = {cell: f"beta={cell[0]},latents={cell[1]},seed={cell[2]}" for cell in cells}
    config = "experiment=what_the_kl_term_does" + "_quick" * context.quick
    folders = context.train_many(
        {
            name: [config, f"objective.beta={beta}", f"model.latent_dim={latents}", f"seed={seed}"]
            for (beta, latents, seed), name in names.items()
        }
    )
    classifiers = context.folder / "classifiers"
    train_classifier(classifiers, next(iter(folders.values())))
    how = functools.partial(
        measure_run, classifiers, images=settings["images"], draws=settings["draws"], samples=settings["samples"]
    )
    found = context.cached_many(
        {name: functools.partial(how, folders[name], pictures=cell[2] == seeds[0]) for cell, name in names.items()}
    )
    config = read_config(next(iter(folders.values())))
    return {
        "runs": {str(beta): [found[names[beta, NUMBERS, seed]] for seed in seeds] for beta in betas},
        "maps": {str(beta): found[names[beta, MAP, seeds[0]]] for beta in betas},
        "epochs": config.trainer.max_epochs,
        "limit": config.data.limit,
    }


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


# --- what the results say -------------------------------------------------------------------------------------------


def values(results: dict[str, Any], beta: str, key: str) -> list[float]:
    """One a seed; of the Frechet distances by the name of what was decoded."""
    return [run[key] if key in run else run["frechet"][key] for run in results["runs"][beta]]


def in_order(results: dict[str, Any], key: str, betas: Sequence[str]) -> bool:
    """Strictly rising along `betas`, in every seed."""
    found = [values(results, beta, key) for beta in betas]
    return all(a < b for less, more in pairwise(found) for a, b in zip(less, more, strict=True))


def claims(results: dict[str, Any]) -> list[Claim]:
    """In every seed, not of means alone."""
    betas = list(results["runs"])
    rising, falling, heavy = betas, betas[::-1], betas[-1]

    def words(key: str, digits: int, chosen: Sequence[str] = betas) -> str:
        return ", ".join(f"{spread(values(results, beta, key), digits)} (β = {beta})" for beta in chosen)

    ratios = {
        key: min(a / b for a, b in zip(values(results, "0", key), values(results, "1", key), strict=True))
        for key in ("moment_kl", "marginal_kl")
    }
    return [
        Claim(
            "the autoencoder reconstructs best",
            all(in_order(results, "distortion", ["0", beta]) for beta in betas[1:]),
            words("distortion", 1) + " nats",
            "the least distortion at β = 0",
        ),
        Claim(
            "its prior samples are worse than the VAE's",
            in_order(results, "prior", ["1", "0"]),
            "Frechet distance " + words("prior", 1, betas[:2]),
            "more at β = 0 than at 1",
        ),
        Claim(
            "the VAE's prior samples are the best",
            all(in_order(results, "prior", ["1", beta]) for beta in betas if beta != "1"),
            "Frechet distance " + words("prior", 1),
            "the least at β = 1",
        ),
        Claim(
            "without the KL, the aggregate posterior's moments are far from the prior's",
            ratios["moment_kl"] > 10,
            f"{ratios['moment_kl']:.0f} times as far as at β = 1 (the least of the seeds)",
            "more than 10 times",
        ),
        Claim(
            "and so is the mixture over the test images",
            ratios["marginal_kl"] > 10,
            f"{ratios['marginal_kl']:.0f} times as far as at β = 1 (the least of the seeds)",
            "more than 10 times",
        ),
        Claim(
            "KL(q(z) || p(z)) falls as β rises",
            in_order(results, "marginal_kl", falling),
            words("marginal_kl", 2) + " nats",
            "in this order",
        ),
        Claim(
            "and so does the KL of its moments alone",
            in_order(results, "moment_kl", falling),
            words("moment_kl", 3) + " nats",
            "in this order",
        ),
        Claim(
            f"β = {heavy} switches latents off",
            in_order(results, "active_units", [heavy, "1"]),
            words("active_units", 1) + f" of {NUMBERS} active",
            f"fewer at β = {heavy} than at 1",
        ),
        Claim(
            "each step up in β costs reconstruction",
            in_order(results, "distortion", rising),
            words("distortion", 1) + " nats",
            "in this order",
        ),
    ]


def table(results: dict[str, Any]) -> Table:
    columns = (
        "β",
        "distortion",
        "rate",
        "active units",
        "KL(q(z) || p(z))",
        "KL of its moments",
        "Frechet: prior",
        "fitted Gaussian",
        "aggregate posterior",
        "2 latents: prior's mass where q(z) < p(z)/10",
    )
    keys = {
        "distortion": 1,
        "rate": 1,
        "active_units": 1,
        "marginal_kl": 2,
        "moment_kl": 3,
        "prior": 1,
        "fitted Gaussian": 1,
        "aggregate posterior": 1,
    }
    rows = [
        (
            beta,
            *(spread(values(results, beta, key), digits) for key, digits in keys.items()),
            f"{100 * results['maps'][beta]['empty']:.1f} %",
        )
        for beta in results["runs"]
    ]
    first = results["runs"]["1"]
    floor = statistics.fmean(values(results, "1", "training images"))
    return Table(
        columns,
        rows,
        f"{NUMBERS} latents, {results['epochs']} epochs, {len(first)} seed{'s' * (len(first) > 1)}; nats a test image; "
        f"the Frechet distance of training images is {floor:.2f}",
    )


# --- picture --------------------------------------------------------------------------------------------------------

DARK, SOURCES = "#1d2127", {"prior": "#d55e00", "fitted Gaussian": "#b98600", "aggregate posterior": "#0072b2"}
KINDS = {"0": "autoencoder", "1": "VAE"}


def figure(results: dict[str, Any]) -> Figure:
    """A column for each weight; the numbers below."""
    import matplotlib.pyplot as plt

    betas = list(results["runs"])
    picture = plt.figure(figsize=(11, 10.6))
    above, below = picture.subfigures(2, 1, height_ratios=[3.5, 1])
    axes = above.subplots(4, len(betas), height_ratios=[1.1, 1, 0.42, 0.42])
    for column, beta in enumerate(betas):
        draw_map(axes[0, column], results["maps"][beta])
        axes[0, column].set_title(f"β = {beta}, {KINDS.get(beta, 'a heavy KL')}")
        shown, plane_of = results["runs"][beta][0]["pictures"], results["maps"][beta]["pictures"]["plane"]
        draw_images(axes[1, column], plane_of, GRID, extent=REACH)
        draw_images(axes[2, column], shown["samples"], 9)
        draw_images(axes[3, column], shown["paths"], PATH)
    for row, label in enumerate(
        (
            "2 latents: $q(z)$ of test images\n(axes differ)",
            f"2 latents: the decoded plane,\n±{REACH} sd of the prior",
            f"{NUMBERS} latents:\nprior samples",
            f"{NUMBERS} latents:\n0 to 2, 7 to 1, 5 to 3",
        )
    ):
        axes[row, 0].set_ylabel(label, color=DARK)
    left, middle, right = below.subplots(1, 3)
    draw_frechet(left, results)
    draw_distances(middle, results)
    draw_cost(right, results)
    return picture


def draw_map(ax: Axes, run: dict[str, Any]) -> None:
    """Draws of q(z|x), the prior's circles of 1 and 2 standard deviations."""
    from matplotlib.patches import Circle

    points, labels = torch.tensor(run["pictures"]["codes"]), run["pictures"]["labels"]
    ax.scatter(points[:, 0], points[:, 1], c=labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=4, lw=0)
    for radius, style in ((1, "-"), (2, "--")):
        ax.add_patch(Circle((0, 0), radius, fill=False, color=DARK, lw=1.2, ls=style))
    reach = max(3.0, 1.05 * points.abs().max().item())
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    ax.text(
        0.03,
        0.03,
        f"{100 * run['empty']:.0f} % of prior draws: q(z) < p(z)/10",
        transform=ax.transAxes,
        fontsize=8,
        bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1},
    )


def draw_images(ax: Axes, packed: dict[str, Any], columns: int, extent: float | None = None) -> None:
    """Images side by side, ink dark on white; with the prior's circles where they are a plane's."""
    from matplotlib.patches import Circle

    images = unpack_images(packed)
    n, height, width = images.shape
    sheet = images.reshape(n // columns, columns, height, width).transpose(0, 2, 1, 3).reshape(-1, columns * width)
    # images stand for the points at their centres
    edge = None if extent is None else extent * columns / (columns - 1)
    box = None if edge is None else (-edge, edge, -edge, edge)
    ax.imshow(1 - sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=box)
    if edge is not None:
        for radius, style in ((1, "-"), (2, "--")):
            ax.add_patch(Circle((0, 0), radius, fill=False, color="#d55e00", lw=1, ls=style))
    ax.set(xticks=[], yticks=[])
    ax.grid(visible=False)


def draw_frechet(ax: Axes, results: dict[str, Any]) -> None:
    betas = list(results["runs"])
    for place, (source, colour) in enumerate(SOURCES.items()):
        for number, beta in enumerate(betas):
            found, x = values(results, beta, source), number + 0.26 * (place - 1)
            ax.bar(x, statistics.fmean(found), 0.24, color=colour, label=source if number == 0 else None)
            if len(found) > 1:
                ax.plot([x] * len(found), found, ".", color=DARK, ms=3)
    floor = statistics.fmean(values(results, "1", "training images"))
    ax.axhline(floor, color=DARK, lw=1, ls=":", label="training images")
    ax.set_xticks(range(len(betas)), betas)
    ax.grid(axis="x", visible=False)
    heights = [found for beta in betas for source in SOURCES for found in values(results, beta, source)]
    ax.set_yscale("log")
    ax.set_ylim(0.5 * min(*heights, floor), 40 * max(heights))  # room for the legend
    ax.legend(fontsize=7.5, title="codes drawn from", title_fontsize=7.5, ncols=2, loc="upper center")
    ax.set(xlabel="β", ylabel="Frechet distance to test images", title="Samples, by their codes")


def draw_lines(ax: Axes, results: dict[str, Any], keys: dict[str, str]) -> None:
    betas = list(results["runs"])
    for key, label in keys.items():
        means = [statistics.fmean(values(results, beta, key)) for beta in betas]
        (line,) = ax.plot(range(len(betas)), means, "o-", ms=4, label=label)
        for number, beta in enumerate(betas):
            found = values(results, beta, key)
            ax.plot([number] * len(found), found, ".", color=line.get_color(), ms=4, alpha=0.6)
    ax.set_xticks(range(len(betas)), betas)


def draw_distances(ax: Axes, results: dict[str, Any]) -> None:
    images = results["runs"]["1"][0]["images"]
    draw_lines(ax, results, {"marginal_kl": f"mixture over {images:,} images", "moment_kl": "its moments alone"})
    ax.legend(fontsize=7.5)
    ax.set(yscale="log", xlabel="β", ylabel="KL to N(0, I), nats", title="Aggregate posterior to prior")


def draw_cost(ax: Axes, results: dict[str, Any]) -> None:
    draw_lines(ax, results, {"distortion": "distortion"})
    betas = list(results["runs"])
    for number, beta in enumerate(betas):
        active = statistics.fmean(values(results, beta, "active_units"))
        at = statistics.fmean(values(results, beta, "distortion"))
        ax.annotate(f"{active:.3g} active", (number, at), (-5, 5), textcoords="offset points", ha="right", fontsize=8)
    ax.margins(x=0.25, y=0.15)
    ax.set(xlabel="β", ylabel="distortion, nats a test image", title=f"Distortion, active units of {NUMBERS}")
