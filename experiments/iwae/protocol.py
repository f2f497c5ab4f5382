"""Importance-weighted autoencoders: what K samples buy, what they cost the encoder, and how DReG pays it back.

Three papers on one bound. The signal-to-noise toy (toy.py) needs no data; the models are trained on MNIST. Which cells of
Burda et al.'s Table 1 are trained, for how long and with which seeds stands in SETTINGS: some at length, and more of them,
K = 50 and two layers among them, briefly. What is not there is shown as not yet run.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from experiments.iwae.toy import measure_toy
from vae.engine.folder import read_metrics, read_status
from vae.engine.run import load
from vae.engine.trainer import set_threads
from vae.evaluation.likelihood import ACTIVE_UNIT_THRESHOLD, log_likelihood
from vae.experiment import Context

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
BOUNDS = (1, 5, 50)  # K of L_K beside the largest


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


def cells(settings: dict) -> list[tuple[str, str, int]]:
    """(layers, objective, K) of every model that is trained, the cheap ones first."""
    of = settings["cells"].items()
    listed = [(layers, name, k) for layers, objectives in of for name, ks in objectives.items() for k in ks]
    return sorted(listed, key=lambda cell: (cell[2], cell[0]))


def title(cell: tuple[str, str, int]) -> str:
    layers, objective, k = cell
    return f"{layers}L-{objective}-{k}"


def overrides(cell: tuple[str, str, int], settings: dict) -> list[str]:
    """Of conf/experiment/iwae.yaml. The VAE with K samples averages K draws of log w, as the paper's: MIWAE of K groups of one;
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
        *chosen,
        *(["prior=two_layer", "posterior=two_layer", "model.latent_dim=100"] if layers == "2" else []),
        f"lr_schedule={schedule}",
        *([f"lr_schedule.gamma={FINAL_RATE ** (1 / epochs):.10f}"] if schedule == "exponential" else []),
        f"trainer.max_epochs={epochs}",
        f"data.batch_size={settings['batch_size']}",
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
    names = {title(cell): overrides(cell, settings) for cell in reversed(cells(settings))}  # the slowest first
    folders = context.train_grid({name + suffix: chosen for name, chosen in names.items()}, settings["seeds"])
    options = (settings["images"], settings["samples"])
    found = context.measure_grid({run: partial(measure_model, folder, *options) for run, folder in folders.items()})
    return {name: one_cell(found[name + suffix]) for name in reversed(names)}


def protocol(settings: dict) -> dict:
    return {key: settings[key] for key in ("seeds", "epochs", *SHARED)}
