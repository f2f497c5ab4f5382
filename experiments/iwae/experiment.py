"""Importance-weighted autoencoders: what K samples buy, what they cost the encoder, and how DReG pays it back.

Three papers on one bound. The signal-to-noise toy (toy.py) needs no data; the models are trained on MNIST. Which cells of
Burda et al.'s Table 1 are trained, for how long and with which seeds stands in SETTINGS: some at length, and more of them,
K = 50 and two layers among them, briefly. What is not there is shown as not yet run.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from experiments.iwae.toy import measure_toy
from vae.engine.folder import read_metrics, read_status
from vae.engine.run import load
from vae.engine.trainer import set_threads
from vae.evaluation.likelihood import ACTIVE_UNIT_THRESHOLD, log_likelihood
from vae.experiment import Claim, Context, Gain, Table, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = "Burda, Grosse & Salakhutdinov 2016 (IWAE); Rainforth et al. 2018; Tucker et al. 2019 (DReG)"
CLAIM = (
    "With K importance samples the same network reaches a higher likelihood; the encoder's gradient loses its signal to "
    "noise as 1/sqrt(K), and the doubly reparameterised estimator gives it back."
)
TOY = {"points": 1024, "dim": 20, "off": 0.01, "seed": 0, "samples": [1, 4, 16, 64, 256, 1024]}
# layers -> objective -> K. Complete: {"vae": [1, 5, 50], "iwae": [5, 50], "dreg": [1, 5, 50]} for both numbers of layers;
# the paper's own training is batch_size 20, epochs 3280, lr_schedule burda. See the README for what each costs.
SETTINGS = {
    "quick": {
        "toy": {**TOY, "budget": 1024},
        "cells": {"1": {"vae": [1], "iwae": [5], "dreg": [5]}},
        "seeds": [0, 1, 2],
        "epochs": 8,
        "batch_size": 100,
        "lr_schedule": "exponential",
        "images": 500,
        "samples": 1000,
    },
    "full": {
        "toy": {**TOY, "budget": 4096},
        "cells": {"1": {"vae": [1], "iwae": [5], "dreg": [5]}},
        "seeds": [0, 1, 2],
        "epochs": 300,
        "batch_size": 100,
        "lr_schedule": "exponential",
        "images": 1000,
        "samples": 1000,
        "briefly": {
            "cells": {"1": {"vae": [1, 5], "elbo": [1], "iwae": [5, 50], "dreg": [5]}, "2": {"vae": [1], "iwae": [5]}},
            "seeds": [0, 1, 2],
            "epochs": 30,
        },
    },
}
SHARED = ("batch_size", "lr_schedule", "images", "samples")  # by what is trained at length and what is trained briefly
FINAL_RATE = 0.1  # of the first learning rate, with lr_schedule exponential: as with the paper's stages
ASYMPTOTIC = 64  # K from which slopes are fitted
BOUNDS = (1, 5, 50)  # K of L_K beside the largest
SETTLED = 30  # epochs before which active units say nothing: they start high and fall


class Published(NamedTuple):
    """Of a cell of Table 1: NLL, and what two reproductions at full length got (nbip, xqding); nats, MNIST, dynamic."""

    nll: str
    nbip: str
    xqding: str


PUBLISHED = {  # (layers, objective, K); DReG's paper has curves only
    ("1", "vae", 1): Published("86.76", "86.35", "87.78"),
    ("1", "elbo", 1): Published("", "", ""),  # an ablation: how much is the noise of an estimated KL
    ("1", "vae", 5): Published("86.47", "86.10", "87.15"),
    ("1", "vae", 50): Published("86.35", "86.06", "87.47"),
    ("1", "iwae", 5): Published("85.54", "85.18", "85.46"),
    ("1", "iwae", 50): Published("84.78", "84.59", "84.59"),
    ("1", "dreg", 1): Published("", "86.08", ""),
    ("1", "dreg", 5): Published("", "84.90", ""),
    ("1", "dreg", 50): Published("", "84.32", ""),
    ("2", "vae", 1): Published("85.33", "84.83", "89.16"),
    ("2", "vae", 5): Published("85.01", "84.08", "91.37"),
    ("2", "vae", 50): Published("84.78", "83.89", "89.16"),
    ("2", "iwae", 5): Published("83.89", "83.48", "84.69"),
    ("2", "iwae", 50): Published("82.90", "82.82", "83.29"),
    ("2", "dreg", 5): Published("", "", ""),
    ("2", "dreg", 50): Published("", "", ""),
}
NAMES = {"vae": "VAE", "elbo": "closed-form VAE", "iwae": "IWAE", "dreg": "DReG"}
LAYERS = {"1": "1 layer", "2": "2 layers"}


# --- measuring ------------------------------------------------------------------------------------------------------


def cells(settings: dict) -> list[tuple[str, str, int]]:
    """(layers, objective, K) of every model that is trained, the cheap ones first."""
    of = settings["cells"].items()
    listed = [(layers, name, k) for layers, objectives in of for name, ks in objectives.items() for k in ks]
    return sorted(listed, key=lambda cell: (cell[2], cell[0]))


def title(cell: tuple[str, str, int]) -> str:
    layers, objective, k = cell
    return f"{layers}L-{objective}-{k}"


def overrides(experiment: str, cell: tuple[str, str, int], seed: int, settings: dict) -> list[str]:
    """Of conf/train.yaml. The VAE with K samples averages K draws of log w, as the paper's: MIWAE of K groups of one;
    "elbo" is the VAE whose KL is not drawn but in closed form."""
    layers, objective, k = cell
    if objective == "elbo":
        chosen = ["objective=beta_vae"]
    elif objective == "vae":
        chosen = ["objective=miwae", f"objective.groups={k}", "objective.samples=1"]
    else:
        chosen = [f"objective={objective}", f"objective.samples={k}"]
    epochs, schedule = settings["epochs"], settings["lr_schedule"]
    return [
        f"experiment={experiment}",
        *chosen,
        *(["prior=two_layer", "posterior=two_layer", "model.latent_dim=100"] if layers == "2" else []),
        f"lr_schedule={schedule}",
        *([f"lr_schedule.gamma={FINAL_RATE ** (1 / epochs):.10f}"] if schedule == "exponential" else []),
        f"trainer.max_epochs={epochs}",
        f"data.batch_size={settings['batch_size']}",
        f"seed={seed}",
    ]


def measure_model(folder: Path, images: int, samples: int) -> dict:
    """L_K of the first test images, with noise that every model shares, and what moves over the whole test split."""
    _, data, module = load(folder)
    batch, vae = data.examples("test", images), module.vae
    bounds = {k: log_likelihood(vae, batch, k).double() for k in (*BOUNDS, samples)}
    with torch.no_grad():
        means = vae.encode(data.examples("test", 10_000).x).mean
    active = means.double().var(0, correction=0) > ACTIVE_UNIT_THRESHOLD
    bottom = vae.encoder(batch.x[:1]).shape[-1] // 2  # latents of h1; all of them, in one layer
    metrics = read_metrics(folder)
    return {
        "nll": -bounds[samples],
        "bounds": {k: bound.mean() for k, bound in bounds.items()},
        "active": [int(part.sum()) for part in active.tensor_split([bottom]) if len(part)],
        "elbo": metrics["test/elbo"],
        "best_epoch": metrics["val/best_epoch"] + 1,
        "seconds": read_status(folder)["seconds"],
    }


def one_cell(measured: list[dict]) -> dict:
    """Of a cell's seeds: the mean over them of each image's NLL, and all the rest seed by seed."""
    own = {key: [m[key] for m in measured] for key in ("bounds", "active", "elbo", "best_epoch", "seconds")}
    nll = np.array([m["nll"] for m in measured])
    return {**own, "nll": nll.mean(1), "nll_of_images": nll.mean(0).round(3)}


def measure(context: Context) -> dict:
    settings = context.settings
    set_threads(1)
    results = {
        "toy": context.part("toy", ["toy"], lambda: context.cached("toy", lambda: measure_toy(**settings["toy"]))),
        "cells": context.part("cells", ["cells", "seeds", "epochs", *SHARED], lambda: measure_cells(context, settings)),
        "protocol": protocol(settings),
    }
    if "briefly" in settings:
        brief = {**settings, **settings["briefly"]}
        results["briefly"] = context.part(
            "briefly",
            ["briefly", *SHARED],
            lambda: {"cells": measure_cells(context, brief, f"-{brief['epochs']}epochs"), "protocol": protocol(brief)},
        )
    return results


def measure_cells(context: Context, settings: dict, suffix: str = "") -> dict:
    """Trains and measures every model of `settings`; suffix: of the runs' names."""
    experiment, seeds = "iwae" + "_quick" * context.quick, settings["seeds"]
    slowest_first = [(cell, seed) for cell in reversed(cells(settings)) for seed in seeds]
    names = {(cell, seed): f"{title(cell)}-seed{seed}{suffix}" for cell, seed in slowest_first}
    folders = context.train_many({name: overrides(experiment, *key, settings) for key, name in names.items()})
    options = (settings["images"], settings["samples"])
    found = context.cached_many({name: partial(measure_model, folder, *options) for name, folder in folders.items()})
    return {title(cell): one_cell([found[names[cell, seed]] for seed in seeds]) for cell in cells(settings)}


def protocol(settings: dict) -> dict:
    return {key: settings[key] for key in ("seeds", "epochs", *SHARED)}


# --- claims ---------------------------------------------------------------------------------------------------------


def slope(toy: dict, row: str, start: int = 1) -> float:
    """Of log SNR against log K, by least squares, over K >= start."""
    points = [(k, s) for k, s in zip(toy["samples"], toy[row]["snr"], strict=True) if k >= start and s is not None]
    return float(np.polyfit(*np.log(np.array(points).T), 1)[0]) if len(points) > 1 else math.nan


def gain(results: dict, worse: str, better: str) -> Gain | None:
    """How much lower the NLL of `better` is; None unless both were run."""
    found = results["cells"]
    if worse not in found or better not in found:
        return None
    return Gain.of(found[worse], found[better])


def claims(results: dict) -> list[Claim]:
    made = [*toy_claims(results["toy"]), *model_claims(results)]
    if brief := results.get("briefly"):
        words = f"{brief['protocol']['epochs']} epochs"
        made += [replace(claim, name=f"{words}, {claim.name}") for claim in model_claims(brief)]
    return made


def toy_claims(toy: dict) -> list[Claim]:
    def within(words: str, row: str, target: float) -> Claim:
        found = slope(toy, row, ASYMPTOTIC)
        return Claim(
            f"toy: SNR of {words}", abs(found - target) <= 0.1, f"K^{found:+.2f}", f"K^{target:+.1f}, within 0.1"
        )

    encoder = slope(toy, "dreg b", ASYMPTOTIC)
    resolved = [(k, a) for k, a in zip(toy["samples"], toy["agreement"], strict=True) if k > 1 and a["se"] < 0.1]
    apart = max((abs(a["multiple"] - 1) / a["se"] for _, a in resolved), default=math.inf)
    multiples = ", ".join(f"{a['multiple']:.3f} ± {a['se']:.3f} at K = {k}" for k, a in resolved)
    at_exact = toy["at exact posterior"]
    largest = max(at_exact["dreg"], at_exact["sticking_the_landing"])
    return [
        within("the encoder's gradient (b), IWAE", "iwae b", -0.5),
        within("the model's gradient (mu), IWAE", "iwae mu", 0.5),
        Claim("toy: SNR of the encoder's gradient (b), DReG", encoder >= 0.4, f"K^{encoder:+.2f}", ">= K^+0.4"),
        Claim(
            "toy: the IWAE and DReG gradients of b have one mean",
            apart < 3 and all(a["rms"] < 1.5 for _, a in resolved),
            f"IWAE's is {multiples} times DReG's",
            "1 within 3 s.e.",
        ),
        Claim(
            "toy: at the exact posterior the DReG and path gradients vanish, the plain one does not",
            largest < 1e-5 < at_exact["reparameterised"],
            f"largest component {largest:.0e}, plain {at_exact['reparameterised']:.2f}",
            "0, to rounding",
        ),
    ]


def model_claims(results: dict) -> list[Claim]:
    made = []
    for layers, words in LAYERS.items():

        def compare(
            name: str, worse: str, better: str, least: float, target: str, layers: str = layers, words: str = words
        ) -> None:
            found = gain(results, f"{layers}L-{worse}", f"{layers}L-{better}")
            if found is not None:
                holds = found.mean >= least and (least < 0 or found.mean > 3 * found.se)
                made.append(Claim(f"{words}: {name}", holds, str(found), target))

        compare("IWAE-5 is better than the VAE", "vae-1", "iwae-5", 0.5, ">= 0.5 nats, over 3 s.e.")
        compare("IWAE-50 is better than the VAE", "vae-1", "iwae-50", 1.0, ">= 1.0 nats, over 3 s.e.")
        compare("IWAE-50 is better than IWAE-5", "iwae-5", "iwae-50", 0.0, "over 3 s.e.")
        compare("DReG-5 is not worse than IWAE-5", "iwae-5", "dreg-5", -0.1, ">= -0.1 nats")
        compare("DReG-50 is not worse than IWAE-50", "iwae-50", "dreg-50", -0.1, ">= -0.1 nats")
        same = gain(results, f"{layers}L-vae-1", f"{layers}L-vae-5")
        if same is not None:
            made.append(
                Claim(
                    f"{words}: five samples do little for the VAE",
                    abs(same.mean) <= 0.6,
                    str(same),
                    "within 0.6 nats",
                )
            )
    made.append(bounds_claim(results))
    protocol = results["protocol"]
    for layers, words in LAYERS.items():
        plain, most = (results["cells"].get(f"{layers}L-{name}") for name in ("vae-1", "iwae-50"))
        most = most or results["cells"].get(f"{layers}L-iwae-5")
        if plain and most and protocol["epochs"] >= SETTLED:
            a, b = ([sum(seed) for seed in cell["active"]] for cell in (plain, most))
            name = f"{words}: more active units with importance samples"
            holds = statistics.fmean(b) > statistics.fmean(a)
            made.append(Claim(name, holds, f"{spread(a, 1)} -> {spread(b, 1)}", "more than the VAE"))
    if protocol["lr_schedule"] == "burda" and protocol["epochs"] >= 3280:
        for (layers, objective, k), published in PUBLISHED.items():
            found = results["cells"].get(f"{layers}L-{objective}-{k}")
            if found and published.nll:
                ours = statistics.fmean(found["nll"])
                name = f"{LAYERS[layers]}: NLL of {NAMES[objective]}-{k}"
                holds = abs(ours - float(published.nll)) <= 0.5
                made.append(Claim(name, holds, f"{ours:.2f} nats", f"{published.nll} within 0.5"))
    return made


def bounds_claim(results: dict) -> Claim:
    """L_1 <= L_5 <= L_50 <= L_K of every model, on the same images."""
    steps = []
    for cell in results["cells"].values():
        for bounds in cell["bounds"]:
            values = [bounds[k] for k in sorted(bounds, key=int)]
            steps += [b - a for a, b in pairwise(values)]
    names = " <= ".join(f"L_{k}" for k in (*BOUNDS, results["protocol"]["samples"]))
    least = min(steps)
    return Claim(f"{names} of every model", least >= 0, f"smallest step {least:.2f} nats", ">= 0")


# --- table ----------------------------------------------------------------------------------------------------------


def table(results: dict) -> Table:
    toy = results["toy"]
    rows = []
    for words, row, target in (
        ("toy, slope of log SNR: b, IWAE", "iwae b", "-1/2"),
        ("toy, slope of log SNR: A, IWAE", "iwae A", "-1/2"),
        ("toy, slope of log SNR: mu, IWAE", "iwae mu", "+1/2"),
        ("toy, slope of log SNR: b, DReG", "dreg b", "+1/2 (Tucker et al.: does not fall)"),
    ):
        ours = f"{slope(toy, row, ASYMPTOTIC):+.2f} for K >= {ASYMPTOTIC}; {slope(toy, row):+.2f} over all K"
        rows.append((words, target, "", ours, ""))
    lengths = [results, *([results["briefly"]] if "briefly" in results else [])]
    for cell, published in PUBLISHED.items():
        layers, objective, k = cell
        others = " / ".join(filter(None, (published.nbip, published.xqding)))
        ours = []
        for of in lengths:
            found = of["cells"].get(title(cell))
            units = "/".join(spread(part, 1) for part in zip(*found["active"], strict=True)) if found else ""
            ours += [spread(found["nll"]) if found else "not yet run", units]
        rows.append((f"{LAYERS[layers]}, {NAMES[objective]}-{k}: NLL", published.nll or "-", others or "-", *ours))
    rows = [(*row, *[""] * (2 * len(lengths) + 3 - len(row))) for row in rows]
    columns = ["", "paper: 3280 epochs, L_5000", "reproductions (nbip / xqding)"]
    for of in lengths:
        trained, seeds = of["protocol"], len(of["protocol"]["seeds"])
        over = f"mean ± sd over {seeds} seeds" if seeds > 1 else "one seed"
        columns += [f"ours: {trained['epochs']} epochs, L_{trained['samples']}, {over}", "our active units"]
    return Table(columns, rows)


# --- picture --------------------------------------------------------------------------------------------------------

COLOURS = {"vae": "#667080", "elbo": "#009e73", "iwae": "#0072b2", "dreg": "#d55e00"}


def figure(results: dict) -> Figure:
    import matplotlib.pyplot as plt

    lengths = [results, *([results["briefly"]] if "briefly" in results else [])]
    mosaic = [["toy", f"bounds {row}", f"gains {row}"] for row in range(len(lengths))]
    fig, axes = plt.subplot_mosaic(mosaic, figsize=(12, 4 * len(lengths)))
    draw_toy(axes["toy"], results["toy"])
    axes["toy"].set_title("The toy: signal to noise of the gradients")
    for row, of in enumerate(lengths):
        epochs = of["protocol"]["epochs"]
        draw_bounds(axes[f"bounds {row}"], of)
        axes[f"bounds {row}"].set_title(f"Bounds on log p of test images, {epochs} epochs")
        draw_gains(axes[f"gains {row}"], of)
        axes[f"gains {row}"].set_title(f"Gain over the VAE, {epochs} epochs")
    fig.get_layout_engine().set(w_pad=0.12)
    return fig


def draw_toy(ax: Axes, toy: dict) -> None:
    k = np.array(toy["samples"], float)
    lines = (
        ("dreg b", "encoder (b), DReG", "dreg", "o-", 1.0),
        ("iwae mu", "model (mu)", "vae", "s-", 0.5),
        ("iwae b", "encoder (b), IWAE", "iwae", "o-", -1.0),
    )
    for row, label, colour, style, _ in lines:
        snr = np.array([np.nan if s is None else s for s in toy[row]["snr"]])
        ax.plot(k, snr, style, color=COLOURS[colour], label=label, ms=4)
        sign = -0.5 if row == "iwae b" else 0.5
        tail = k >= ASYMPTOTIC
        guide = snr[-1] * (k[tail] / k[-1]) ** sign * (1.5 if sign > 0 else 0.67)
        ax.plot(k[tail], guide, color="#1d2127", lw=0.8, ls=":")
        corner = (k[tail][1], guide[1])
        ax.annotate(
            "K$^{1/2}$" if sign > 0 else "K$^{-1/2}$",
            corner,
            (-4, 5) if sign > 0 else (-4, -12),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    own = toy["iwae b, own mean"]
    seen = [(a, s, e) for a, s, e in zip(k, own["snr"], own["se"], strict=True) if s is not None]
    ax.errorbar(
        *np.array(seen).T,
        fmt="D",
        mfc="white",
        color=COLOURS["iwae"],
        ms=5,
        lw=0.8,
        label="the same, mean by IWAE itself",
    )
    ax.set(xscale="log", yscale="log", xlabel="K", ylabel="|mean| / sd of the gradient")
    ax.set_xticks(k, [f"{int(x)}" for x in k])
    ax.minorticks_off()
    ax.legend(fontsize=7.5, loc="upper left")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * 8)


def draw_bounds(ax: Axes, results: dict) -> None:
    for cell in PUBLISHED:
        layers, objective, k = cell
        if not (found := results["cells"].get(title(cell))):
            continue
        ks = sorted(found["bounds"][0], key=int)
        values = np.array([[bounds[x] for x in ks] for bounds in found["bounds"]])
        x = [int(x) for x in ks]
        style = {"ls": "-" if layers == "1" else "--", "color": COLOURS[objective], "alpha": 0.55 if k == 50 else 1.0}
        for seed in values:
            ax.plot(x, seed, lw=0.5, **style)
        label = f"{NAMES[objective]}-{k}" + (", 2 layers" if layers == "2" else "")
        ax.plot(x, values.mean(0), marker={1: "o", 5: "s", 50: "^"}[k], ms=4.5, label=label, **style)
    ax.set(xscale="log", xlabel="K of the bound L$_K$", ylabel="nats an image")
    ax.set_xticks(x, [str(a) for a in x])
    ax.minorticks_off()
    ax.legend(loc="lower right", fontsize=8)


def draw_gains(ax: Axes, results: dict) -> None:
    places, labels = [], []
    for cell, published in PUBLISHED.items():
        layers, objective, k = cell
        found = gain(results, f"{layers}L-vae-1", title(cell))
        if found is None or (objective, k) == ("vae", 1):
            continue
        at = len(places)
        places.append(at)
        name = NAMES[objective].replace(" ", "\n")
        labels.append(f"{name}-{k}" + ("" if layers == "1" else "\n2 layers"))
        ax.bar(at, found.mean, 0.6, color=COLOURS[objective], alpha=0.45)
        ax.errorbar(at, found.mean, 1.96 * found.se, color=COLOURS[objective], capsize=4, lw=1.2)
        offsets = 0.18 * (np.arange(len(found.seeds)) - (len(found.seeds) - 1) / 2)
        ax.plot(at + offsets, found.seeds, "o", color=COLOURS[objective], ms=4, mec="white", mew=0.6)
        base = PUBLISHED[layers, "vae", 1]
        for value, of, marker, label in (
            (published.nll, base.nll, "D", "paper, 3280 epochs"),
            (published.nbip, base.nbip, "v", "reproduction (nbip), 3280 epochs"),
        ):
            if value:
                label = None if label in ax.get_legend_handles_labels()[1] else label
                ax.plot(at + 0.38, float(of) - float(value), marker, color="#1d2127", ms=5, label=label, ls="none")
    ax.axhline(0, color="#667080", lw=0.8)
    ax.set_xticks(places, labels, fontsize=9 if len(places) < 5 else 7)
    ax.set_xlim(-0.6, len(places) - 0.2)
    ax.set_ylabel("nats an image (95% interval; dots: seeds)")
    ax.grid(axis="x", visible=False)
    if ax.get_legend_handles_labels()[0]:
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.22 * (high - low))
        ax.legend(fontsize=7.5, loc="upper left")
