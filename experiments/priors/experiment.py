"""Tomczak & Welling 2018: the same VAE under N(0, I) and under a prior made of its own posteriors.

One stochastic layer of 40 latents, gated 300-300 networks, dynamic binarisation. Which priors, data sets and seeds, and
for how long, stands in SETTINGS.
"""

from __future__ import annotations

import functools
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vae.engine.folder import read_metrics, read_status
from vae.engine.run import load
from vae.evaluation.decomposition import elbo_decomposition
from vae.evaluation.likelihood import log_likelihood
from vae.experiment import Claim, Context, Gain, Table, pack_images, spread, unpack_images
from vae.seeding import generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
LONG = 100  # epochs from which absolute numbers are claimed

PUBLISHED = {  # NLL in nats, dynamic binarisation, 40 latents, 2 x 300; the table of Norouzi et al.
    "mnist": {"standard_normal": "84.45", "vampprior": "82.43"},
    "fashion_mnist": {"standard_normal": "228.70 ± 0.15", "vampprior": "227.35 ± 0.05"},
}
NAMES = {"standard_normal": "N(0, I)", "mixture": "mixture of Gaussians", "vampprior": "VampPrior"}
TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
OPTION = {"mixture": "prior.components", "vampprior": "prior.pseudo_inputs"}
AGGREGATE, DRAWS = 5000, 1000  # test images in the aggregate posterior, and how many of them z is drawn for
SHOWN = 12  # pictures in a row


# --- measuring ------------------------------------------------------------------------------------------------------


def overrides(experiment: str, data: str, prior: str, seed: int, settings: dict[str, Any]) -> list[str]:
    """Of conf/train.yaml."""
    return [
        f"experiment={experiment}",
        f"data={data}",
        f"prior={prior}",
        *([f"{OPTION[prior]}={settings['priors'][prior]}"] if prior in OPTION else []),
        f"trainer.max_epochs={settings['epochs']}",
        f"objective.schedule.steps={settings['warm_up'] * STEPS_PER_EPOCH}",
        f"seed={seed}",
    ]


def measure(context: Context) -> dict[str, Any]:
    settings, experiment = context.settings, "priors" + "_quick" * context.quick
    cells = {
        (data, prior, seed): f"{data}-{prior}-seed{seed}"
        for data in settings["data"]
        for prior in reversed(settings["priors"])  # the slowest first
        for seed in settings["seeds"]
    }
    folders = context.train_many({name: overrides(experiment, *cell, settings) for cell, name in cells.items()})
    found = context.cached_many(
        {
            name: functools.partial(measure_model, folders[name], settings["images"], settings["samples"], seed == 0)
            for (*_, seed), name in cells.items()
        }
    )

    def over_seeds(data: str, prior: str) -> dict[str, Any]:
        runs = [found[cells[data, prior, seed]] for seed in settings["seeds"]]
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


# --- what the results say -------------------------------------------------------------------------------------------


def gain(results: dict[str, Any], data: str, better: str = "vampprior", worse: str = "standard_normal") -> Gain:
    """How much lower the NLL under `better` is."""
    of_prior = results["data"][data]
    return Gain.of(of_prior[worse], of_prior[better])


def claims(results: dict[str, Any]) -> list[Claim]:
    """The thresholds were chosen before the test split was looked at; absolute numbers are claimed of long training only."""
    made = []
    for data, of_prior in results["data"].items():
        found, least = gain(results, data), 1.0 if data == "mnist" else 0.0
        paper = difference(data)
        made.append(
            Claim(
                f"{TITLES[data]}: the VampPrior is better than N(0, I)",
                found.mean >= least and found.mean > 3 * found.se and min(found.seeds) > 0,
                str(found),
                (f"at least {least:.0f}, " if least else "") + f"over 3 s.e., in every seed (paper: {paper:.2f})",
            )
        )
        plain, vamp = (of_prior[prior]["marginal_kl"] for prior in ("standard_normal", "vampprior"))
        made.append(
            Claim(
                f"{TITLES[data]}: it is nearer to the aggregate posterior",
                all(b < a for a, b in zip(plain, vamp, strict=True)),
                f"KL(q(z) || p(z)) {spread(plain)} -> {spread(vamp)} nats",
                "less, in every seed",
            )
        )
        if results["protocol"]["epochs"] >= LONG:
            ours, theirs = statistics.fmean(of_prior["standard_normal"]["nll"]), published(data, "standard_normal")
            name = f"{TITLES[data]}: NLL under N(0, I)"
            made.append(Claim(name, abs(ours - theirs) < 4, f"{ours:.2f} nats", f"{theirs:.2f} within 4"))
    return made


def published(data: str, prior: str) -> float:
    return float(PUBLISHED[data][prior].split()[0])


def difference(data: str) -> float:
    """The published gain of the VampPrior over N(0, I)."""
    return published(data, "standard_normal") - published(data, "vampprior")


def title(prior: str, protocol: dict[str, Any]) -> str:
    components = protocol["priors"][prior]
    return NAMES[prior] + (f", {components}" if prior in OPTION else "")


def table(results: dict[str, Any]) -> Table:
    protocol, rows = results["protocol"], []
    for data, of_prior in results["data"].items():
        for prior, found in of_prior.items():
            better = spread(gain(results, data, prior).seeds) if prior != "standard_normal" else ""
            rows.append(
                (
                    f"{TITLES[data]}, {title(prior, protocol)}",
                    PUBLISHED[data].get(prior, "-"),
                    *(spread(found[key]) for key in ("nll", "distortion", "rate", "marginal_kl")),
                    better,
                )
            )
    columns = ("", "paper: NLL", "ours: NLL", "distortion", "rate", "of it KL(q(z) || p(z))", "gain over N(0, I)")
    words = (
        f"Nats a test image, mean ± sd over {len(protocol['seeds'])} seeds; ours after {protocol['epochs']} epochs, "
        f"NLL = -L_{protocol['samples']} of {protocol['images']} images"
    )
    return Table(columns, rows, words)


# --- picture --------------------------------------------------------------------------------------------------------

COLOURS = {"standard_normal": "#667080", "mixture": "#009e73", "vampprior": "#0072b2"}


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    shown = list(results["data"])
    strips = [  # a column a data set, if there are two
        (data, prior, key)
        for prior, key in [
            *((prior, "samples") for prior in results["protocol"]["priors"]),
            ("vampprior", "pseudo_inputs"),
        ]
        for data in shown
    ]
    picture = plt.figure(figsize=(11, 3.9 + 0.85 * math.ceil(len(strips) / 2)))
    above, below = picture.subfigures(2, 1, height_ratios=[3.9, 0.85 * math.ceil(len(strips) / 2)])
    axes = above.subplots(1, len(shown) + 1)
    for ax, data in zip(axes, shown, strict=False):
        draw_gain(ax, results, data)
    draw_rate(axes[-1], results)
    for ax, (data, prior, key) in zip(below.subplots(math.ceil(len(strips) / 2), 2, squeeze=False).flat, strips):  # noqa: B905
        images = unpack_images(results["data"][data][prior][key])
        ax.imshow(np.concatenate(list(images), axis=1), cmap="gray", vmin=0, vmax=1)
        of = "samples from" if key == "samples" else "pseudo-inputs of"
        ax.set_title(f"{of} {NAMES[prior]}" + f", {TITLES[data]}" * (len(shown) > 1), fontsize=8, weight="normal")
    for ax in below.axes:
        ax.set_axis_off()
    return picture


def draw_gain(ax: Axes, results: dict[str, Any], data: str) -> None:
    """NLL of each prior: the seeds joined, since they share initial weights' seeds and images; the paper's at the side."""
    protocol, of_prior = results["protocol"], results["data"][data]
    places = range(len(of_prior))
    for seed in range(len(protocol["seeds"])):
        ax.plot(places, [found["nll"][seed] for found in of_prior.values()], color="#b9c0ca", lw=1, zorder=1)
    for place, (prior, found) in zip(places, of_prior.items(), strict=True):
        colour, nll = COLOURS[prior], found["nll"]
        ax.plot([place] * len(nll), nll, "o", color=colour, ms=5, zorder=3)
        if prior != "standard_normal":
            better = gain(results, data, prior)
            words = f"gain {better.mean:.2f} ± {better.se:.2f}"
            ax.annotate(
                words, (place, min(nll)), (0, -8), textcoords="offset points", ha="center", va="top", color=colour
            )
    ax.margins(x=0.6 / len(of_prior))
    low = min(min(found["nll"]) for found in of_prior.values())
    high = max(max(found["nll"]) for found in of_prior.values())
    ax.set_ylim(low - 0.55 * (high - low), high + 0.12 * (high - low))
    ax.set_xticks(
        places, [title(prior, protocol).replace(", ", ",\n") if prior in OPTION else NAMES[prior] for prior in of_prior]
    )
    ax.set_ylabel(f"-$L_{{{protocol['samples']}}}$ (nats a test image)")
    ax.set_title(f"{TITLES[data]}, NLL after {protocol['epochs']} epochs")
    ax.text(
        0.98,
        0.98,
        f"published: {difference(data):.2f} nats better\n({' to '.join(PUBLISHED[data].values())})",
        transform=ax.transAxes,
        ha="right",
        va="top",
        fontsize=8,
        color=COLOURS["vampprior"],
    )


def draw_rate(ax: Axes, results: dict[str, Any]) -> None:
    """The rate in its two parts, of every prior and data set."""
    labels, place = [], 0
    for data, of_prior in results["data"].items():
        for prior, found in of_prior.items():
            information, marginal = (statistics.fmean(found[key]) for key in ("mutual_information", "marginal_kl"))
            ax.bar(place, information, 0.65, color=COLOURS[prior])
            ax.bar(place, marginal, 0.65, bottom=information, color=COLOURS[prior], alpha=0.35)
            ax.text(place, information + marginal / 2, f"{marginal:.1f}", ha="center", va="center", fontsize=8)
            ax.text(place, information / 2, f"{information:.1f}", ha="center", va="center", fontsize=8, color="white")
            labels.append(
                NAMES[prior].replace(" of ", "\nof ")
                + ("\n" + TITLES[data].replace("-", "-\n")) * (len(results["data"]) > 1)
            )
            place += 1
        place += 0.5
    ticks = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches[::2]]
    ax.set_xticks(ticks, labels, fontsize=8)
    ax.grid(axis="x", visible=False)
    ax.set(ylabel="nats an image", title="Where the rate goes")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 1.2)
    ax.text(
        0.02,
        0.98,
        "pale: KL(q(z) || p(z))\nfull: information about the image",
        transform=ax.transAxes,
        va="top",
        fontsize=8,
    )
