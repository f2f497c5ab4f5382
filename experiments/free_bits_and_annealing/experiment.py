"""Posterior collapse under an autoregressive decoder, and what KL warm-up, cyclical annealing and free bits do about it.

MNIST of 7x7 pixels, 16 latents. The decoder is MADE told z: it sees the pixels before the one it tells, and at this size
models the images about as well without z as with it. Beside it a factorised decoder, which cannot, and the same decoder
with its latents priced out, which is the autoregressive model alone.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from vae.data.sources import mnist
from vae.engine.folder import read_metrics
from vae.engine.run import load
from vae.evaluation.likelihood import log_likelihood
from vae.experiment import Claim, Context, Table, pack_images, spread, unpack_images
from vae.seeding import generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = "Bowman et al. 2016 (warm-up); Fu et al. 2019 (cyclical annealing); Kingma et al. 2016 (free bits)"
CLAIM = (
    "A decoder that can do without its latents ignores them; warm-up, cyclical annealing and free bits make it use them, "
    "at hardly any cost in likelihood."
)
FREE_NATS = 0.25  # lambda, for each of the 16 dimensions: 4 nats in all
STEPS_PER_EPOCH = 550
# warm-up is over after a quarter of the training, the four cycles after half of it: the rest is the plain objective. The
# last cycle has climbed to 1, and stays there, halfway through it
LAST_CLIMB = 7 / 8  # of the steps of the cycles
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
TITLES = {
    ALONE: "autoregressive, latents priced out (beta = 1000)",
    PLAIN: "autoregressive, plain ELBO",
    WARM_UP: "... linear warm-up, then plain",
    CYCLICAL: "... four cycles, then plain",
    FREE_BITS: f"... free bits, {FREE_NATS} nats a dimension",
    FACTORISED: "factorised decoder, plain ELBO",
}
PICTURED, DRAWS = 8, 256

# --- measuring ----------------------------------------------------------------------------------------------------------


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
    form = "experiment=free_bits_and_annealing" + "_quick" * context.quick
    runs = {
        f"{name.replace(' ', '_')},seed={seed}": [form, *overrides, f"seed={seed}"]
        for name, overrides in methods(settings).items()
        for seed in seeds
    }
    runs |= {
        f"size={size},seed={seed}": [form, f"data.source.size={size}", f"trainer.max_epochs={epochs}", f"seed={seed}"]
        for size, epochs in settings["larger"].items()
        for seed in seeds
    }
    folders = context.train_many(runs)

    def of_seeds(name: str) -> list[dict[str, Any]]:
        names = [f"{name.replace(' ', '_')},seed={seed}" for seed in seeds]
        return [context.cached(f"measured,{run}", lambda run=run: evaluate(folders[run], settings)) for run in names]

    measured = {name: of_seeds(name) for name in methods(settings)}
    nll = {name: torch.tensor([run.pop("nll_of_images") for run in found]) for name, found in measured.items()}
    return {
        "methods": measured,
        "difference": {name: paired(nll[name] - nll[PLAIN]) for name in measured},
        "larger": {
            size: [read_metrics(folders[f"size={size},seed={seed}"])["test/rate"] for seed in seeds]
            for size in settings["larger"]
        },
        "warm_up": settings["warm_up"],
        "cycles_end": settings["cycles_end"],
        "images": {
            "digit": pack_images(mnist(os.environ.get("VAE_DATA_DIR", "data")).test.x[:PICTURED] / 255),
            "as seen": pack_images(load(folders[f"plain,seed={seeds[0]}"])[1].examples("test", PICTURED).x),
            **{
                name: context.cached(
                    f"images,{name.replace(' ', '_')}",
                    lambda name=name: expected_images(folders[f"{name.replace(' ', '_')},seed={seeds[0]}"]),
                )
                for name in (PLAIN, *CURES)
            },
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
        "curve": curve(folder / "metrics.csv"),
    }


def curve(path: Path) -> dict[str, list[float]]:
    """What the CSV logger kept of each validation, against the number of training steps done."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/rate"]]
    return {
        "steps": [int(row["step"]) + 1 for row in rows],
        "rate": [round(float(row["val/rate"]), 4) for row in rows],
        "elbo": [round(float(row["val/elbo"]), 4) for row in rows],
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
    seeds, images = differences.shape
    of_seeds = differences.mean(1)
    return {
        "mean": differences.mean(),
        "se_of_seeds": of_seeds.std() / seeds**0.5 if seeds > 1 else float("nan"),
        "se_of_images": differences.mean(0).std() / images**0.5,
    }


# --- what the results say -------------------------------------------------------------------------------------------


def values(results: dict[str, Any], name: str, key: str) -> list[float]:
    """Of each seed; key "elbo" is -(distortion + rate)."""
    runs = results["methods"][name]
    return [-(run["distortion"] + run["rate"]) if key == "elbo" else run[key] for run in runs]


def at_step(results: dict[str, Any], name: str, step: int) -> list[float]:
    """Validation rate of each seed at the first validation from this step on."""
    curves = [run["curve"] for run in results["methods"][name]]
    return [next(r for s, r in zip(c["steps"], c["rate"], strict=True) if s >= step) for c in curves]


def at_full_weight(results: dict[str, Any]) -> dict[str, int]:
    """The step from which the weight of each schedule stays at 1."""
    return {WARM_UP: results["warm_up"], CYCLICAL: math.ceil(LAST_CLIMB * results["cycles_end"])}


def claims(results: dict[str, Any]) -> list[Claim]:
    """Set before any run: a rate below 0.5 is collapse and above 3 is none, ELBOs within 0.5 are equal, free bits hold 0.95
    of what they promise and 0.9 in each dimension. Set after a pilot of 1,200 steps: the rest."""

    def listed(numbers: Iterable[float]) -> str:
        return ", ".join(f"{number:.2f}" for number in numbers)

    held = []
    plain, factorised = values(results, PLAIN, "rate"), values(results, FACTORISED, "rate")
    held.append(
        Claim("the plain ELBO collapses", max(plain) < 0.5, f"rates {listed(plain)} nats", "below 0.5, every seed")
    )
    held.append(
        Claim(
            "it is the decoder's doing: a factorised one uses its latents",
            min(factorised) >= 3 * max(plain),
            f"rates {listed(factorised)} nats",
            "three times the plain ones, every seed",
        )
    )
    gain = -results["difference"][ALONE]["mean"]
    held.append(
        Claim(
            "what is left of the latents is worth nothing",
            abs(gain) <= 0.1,
            f"NLL with minus without them {gain:+.3f} nats",
            "within 0.1",
        )
    )
    for name, end in at_full_weight(results).items():
        then, now = at_step(results, name, end), values(results, name, "rate")
        held.append(
            Claim(
                f"{name}: the latents are in use when the weight has reached 1 for good",
                min(then) > 3,
                f"validation rates {listed(then)} nats at the first validation from step {end} on",
                "above 3, every seed",
            )
        )
        held.append(
            Claim(
                f"{name}: and still are at the end",
                min(now) > 3,
                f"rates {listed(now)} nats",
                "above 3, every seed",
            )
        )
        apart = abs(fmean(values(results, name, "elbo")) - fmean(values(results, PLAIN, "elbo")))
        held.append(
            Claim(f"{name}: the ELBO is the plain one's", apart <= 0.5, f"{apart:.2f} nats apart", "within 0.5")
        )
    rates = values(results, FREE_BITS, "rate")
    kl = [k for run in results["methods"][FREE_BITS] for k in run["kl"]]
    dimensions = len(results["methods"][FREE_BITS][0]["kl"])
    promised = FREE_NATS * dimensions
    held.append(
        Claim(
            "free bits hold what they promise",
            min(rates) >= 0.95 * promised,
            f"rates {listed(rates)} nats",
            f"at least 0.95 of {promised:g}, every seed",
        )
    )
    held.append(
        Claim(
            "free bits: in every dimension",
            min(kl) >= 0.9 * FREE_NATS,
            f"lowest {min(kl):.3f} nats",
            f"at least 0.9 of {FREE_NATS:g}",
        )
    )
    unused = fmean(k < 0.05 for run in results["methods"][PLAIN] for k in run["kl"])
    held.append(
        Claim("... where without them most have none", unused >= 0.5, f"{100 * unused:.0f}% below 0.05 nats", "half")
    )
    for name in CURES:
        worse = results["difference"][name]
        held.append(
            Claim(
                f"{name}: the likelihood is no worse",
                worse["mean"] <= 0.1,
                f"NLL {worse['mean']:+.3f} ± {worse['se_of_seeds']:.3f} (seeds) ± {worse['se_of_images']:.3f} (images)",
                "at most 0.1 nats above the plain one's",
            )
        )
    return held


def table(results: dict[str, Any]) -> Table:
    reported = {PLAIN: "collapses", WARM_UP: "in use; may collapse again", CYCLICAL: "in use", FREE_BITS: ">= lambda J"}
    rows = []
    for name, title in TITLES.items():
        difference = results["difference"][name]
        rows.append(
            (
                title,
                reported.get(name, ""),
                spread(values(results, name, "rate")),
                spread((-elbo for elbo in values(results, name, "elbo")), 3),
                spread(values(results, name, "nll"), 3),
                "" if name == PLAIN else f"{difference['mean']:+.3f} ± {difference['se_of_images']:.3f}",
            )
        )
    rows += [
        (f"autoregressive, plain ELBO, {size}x{size} pixels", "", spread(rates), "", "", "")
        for size, rates in results["larger"].items()
    ]
    columns = ("", "reported", "rate (nats)", "-ELBO", "NLL", "NLL - plain (± se, paired images)")
    return Table(columns, rows, "Mean ± sd over seeds")


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    colours = dict(
        zip((WARM_UP, FREE_BITS, CYCLICAL, PLAIN, FACTORISED), ["C0", "C1", "C2", "#40464f", "C3"], strict=True)
    )
    drawing, axes = plt.subplots(2, 2, figsize=(9, 6.4))
    draw_rates(axes[0, 0], results, colours)
    draw_dimensions(axes[0, 1], results, colours)
    draw_likelihoods(axes[1, 0], results, colours)
    draw_images(axes[1, 1], results)
    return drawing


def draw_rates(ax: Axes, results: dict[str, Any], colours: dict[str, str]) -> None:
    for name in (FACTORISED, WARM_UP, CYCLICAL, FREE_BITS, PLAIN):
        for number, run in enumerate(results["methods"][name]):
            label = name if number == 0 else None
            ax.plot(run["curve"]["steps"], run["curve"]["rate"], color=colours[name], lw=1.2, alpha=0.8, label=label)
    for name, end in at_full_weight(results).items():
        ax.axvline(end, color=colours[name], lw=0.9, ls=":")
    ax.axhline(0.5, color="#667080", lw=0.8, ls="--")
    ax.text(
        0.99, 0.5, "collapse", va="bottom", ha="right", fontsize=7, color="#667080", transform=ax.get_yaxis_transform()
    )
    ax.set(yscale="symlog", xlabel="training step (dotted: weight at 1 for good)", ylabel="rate, validation (nats)")
    ax.set_yscale("symlog", linthresh=1)
    ax.set_ylim(0, None)
    ax.set_yticks([0, 0.5, 1, 2, 4, 8, 16], ["0", "0.5", "1", "2", "4", "8", "16"])
    ax.minorticks_off()
    ax.set_title("Rate while training, each seed")
    ax.legend(fontsize=7, ncols=2)


def draw_dimensions(ax: Axes, results: dict[str, Any], colours: dict[str, str]) -> None:
    for name in (WARM_UP, CYCLICAL, FREE_BITS, PLAIN):
        for number, run in enumerate(results["methods"][name]):
            kl = sorted(run["kl"], reverse=True)
            label = name if number == 0 else None
            ax.plot(range(1, len(kl) + 1), kl, color=colours[name], lw=1, marker=".", ms=4, alpha=0.8, label=label)
    ax.axhline(FREE_NATS, color=colours[FREE_BITS], lw=0.9, ls=":")
    ax.set(
        xlabel="latent dimension, by KL", ylabel="KL to the prior (nats)", title="Where the rate is (dotted: lambda)"
    )
    ax.legend(fontsize=7)


def draw_likelihoods(ax: Axes, results: dict[str, Any], colours: dict[str, str]) -> None:
    """Means over seeds; each seed as a dot. The bar from NLL to -ELBO is the inference gap."""
    names = (ALONE, PLAIN, WARM_UP, CYCLICAL, FREE_BITS, FACTORISED)
    for place, name in enumerate(reversed(names)):
        nll, bound = values(results, name, "nll"), [-elbo for elbo in values(results, name, "elbo")]
        colour = colours.get(name, "#98a1ad")
        ax.plot([fmean(nll), fmean(bound)], [place, place], color=colour, lw=5, alpha=0.35, solid_capstyle="butt")
        ax.plot(nll, [place] * len(nll), "o", color=colour, ms=4)
        ax.plot(bound, [place] * len(bound), "|", color=colour, ms=10)
    ax.set_yticks(range(len(names)), reversed(names))
    ax.grid(axis="y", visible=False)
    ax.set(xlabel="nats an image: NLL (dots) to -ELBO (ticks), each seed", title="Likelihood and bound, test")
    ax.locator_params(axis="x", nbins=5)


def draw_images(ax: Axes, results: dict[str, Any]) -> None:
    rows = {name: unpack_images(packed)[:, 0] for name, packed in results["images"].items()}
    size = rows[PLAIN].shape[-1]
    for row, images in enumerate(rows.values()):
        for column, image in enumerate(images):
            left, top = column * (size + 1), row * (size + 1)
            ax.imshow(image, cmap="gray_r", vmin=0, vmax=1, extent=(left, left + size, top + size, top), zorder=2)
    ax.set_xlim(-0.5, PICTURED * (size + 1) - 0.5)
    ax.set_ylim(len(rows) * (size + 1) - 0.5, -0.5)
    ax.set_xticks([])
    ax.set_yticks([row * (size + 1) + size / 2 for row in range(len(rows))], rows)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title("What z says: E[x|z] at the z of test images")
