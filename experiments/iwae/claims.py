"""What is claimed of importance samples: of the toy's gradients and of models, beside Table 1."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import numpy as np

from experiments.iwae.protocol import BOUNDS, LAYERS, NAMES, PUBLISHED, title
from vae.claims import Claim, Gain, Table, above, at_least, at_most, below, ordered, spread, within

ASYMPTOTIC = 64  # K from which slopes are fitted
ROUNDING = 1e-5  # of a gradient that is 0
SETTLED = 30  # epochs before which active units say nothing: they start high and fall


def slope(toy: dict, row: str, start: int = 1) -> float:
    """Of log SNR against log K, by least squares, over K >= start."""
    points = [(k, s) for k, s in zip(toy["samples"], toy[row]["snr"], strict=True) if k >= start and s is not None]
    return float(np.polyfit(*np.log(np.array(points).T), 1)[0]) if len(points) > 1 else math.nan


def claims(results: dict) -> list[Claim]:
    made = [*toy_claims(results["toy"]), *model_claims(results)]
    if brief := results.get("briefly"):
        words = f"{brief['protocol']['epochs']} epochs"
        made += [replace(claim, name=f"{words}, {claim.name}") for claim in model_claims(brief)]
    return made


def toy_claims(toy: dict) -> list[Claim]:
    snr = {row: slope(toy, row, ASYMPTOTIC) for row in ("iwae b", "iwae mu", "dreg b")}
    resolved = [(k, a) for k, a in zip(toy["samples"], toy["agreement"], strict=True) if k > 1 and a["se"] < 0.1]
    multiples = ", ".join(f"{a['multiple']:.3f} ± {a['se']:.3f} at K = {k}" for k, a in resolved)
    at_exact = toy["at exact posterior"]
    vanishing, plain = [at_exact["dreg"], at_exact["sticking_the_landing"]], at_exact["reparameterised"]
    return [
        *(
            Claim.of(
                f"toy: SNR of {words}, IWAE",
                f"K^{snr[row]:+.2f}",
                "K^{1:+.1f}, within {0:g}",
                within(snr[row], 0.1, target),
            )
            for words, row, target in (
                ("the encoder's gradient (b)", "iwae b", -0.5),
                ("the model's gradient (mu)", "iwae mu", 0.5),
            )
        ),
        Claim.of(
            "toy: SNR of the encoder's gradient (b), DReG",
            f"K^{snr['dreg b']:+.2f}",
            ">= K^{:+.1f}",
            at_least(snr["dreg b"], 0.4),
        ),
        Claim.of(
            "toy: the IWAE and DReG gradients of b have one mean",
            f"IWAE's is {multiples} times DReG's",
            "1 within {:g} s.e.",
            below([abs(a["multiple"] - 1) / a["se"] for _, a in resolved], 3),
            below([a["rms"] for _, a in resolved], 1.5),
        ),
        Claim.of(
            "toy: at the exact posterior the DReG and path gradients vanish, the plain one does not",
            f"largest component {max(vanishing):.0e}, plain {plain:.2f}",
            "0, to rounding",
            below(vanishing, ROUNDING),
            above(plain, ROUNDING),
        ),
    ]


def model_claims(results: dict) -> list[Claim]:
    cells, trained, made = results["cells"], results["protocol"], []
    for layers, words in LAYERS.items():
        for name, worse, better, least, target in (
            ("IWAE-5 is better than the VAE", "vae-1", "iwae-5", 0.5, ">= {:.1f} nats, over {:g} s.e."),
            ("IWAE-50 is better than the VAE", "vae-1", "iwae-50", 1.0, ">= {:.1f} nats, over {:g} s.e."),
            ("IWAE-50 is better than IWAE-5", "iwae-5", "iwae-50", 0.0, "over {1:g} s.e."),
            ("DReG-5 is not worse than IWAE-5", "iwae-5", "dreg-5", -0.1, ">= {:.1f} nats"),
            ("DReG-50 is not worse than IWAE-50", "iwae-50", "dreg-50", -0.1, ">= {:.1f} nats"),
        ):
            if found := Gain.of(cells, f"{layers}L-{worse}", f"{layers}L-{better}"):
                bound = at_least(found.mean, least) if least < 0 else found.exceeds(least, 3)
                made.append(Claim.of(f"{words}: {name}", str(found), target, bound))
        if same := Gain.of(cells, f"{layers}L-vae-1", f"{layers}L-vae-5"):
            name = f"{words}: five samples do little for the VAE"
            made.append(Claim.of(name, str(same), "within {:g} nats", at_most(abs(same.mean), 0.6)))
    made.append(bounds_claim(results))
    for layers, words in LAYERS.items():
        plain, most = (cells.get(f"{layers}L-{name}") for name in ("vae-1", "iwae-50"))
        most = most or cells.get(f"{layers}L-iwae-5")
        if plain and most and trained["epochs"] >= SETTLED:
            few, many = ([sum(seed) for seed in cell["active"]] for cell in (plain, most))
            name = f"{words}: more active units with importance samples"
            order = ordered(fmean(few), fmean(many))
            made.append(Claim.of(name, f"{spread(few, 1)} -> {spread(many, 1)}", "more than the VAE", order))
    if trained["lr_schedule"] == "burda" and trained["epochs"] >= 3280:
        for (layers, objective, k), published in PUBLISHED.items():
            found = cells.get(f"{layers}L-{objective}-{k}")
            if found and published.nll:
                ours, name = fmean(found["nll"]), f"{LAYERS[layers]}: NLL of {NAMES[objective]}-{k}"
                bound = within(ours, 0.5, float(published.nll))
                made.append(Claim.of(name, f"{ours:.2f} nats", "{1:.2f} within {0:g}", bound))
    return made


def bounds_claim(results: dict) -> Claim:
    """L_1 <= L_5 <= L_50 <= L_K of every model, on the same images."""
    steps = []
    for cell in results["cells"].values():
        for bounds in cell["bounds"]:
            steps += [b - a for a, b in pairwise(bounds[k] for k in sorted(bounds, key=int))]
    names = " <= ".join(f"L_{k}" for k in (*BOUNDS, results["protocol"]["samples"]))
    return Claim.of(
        f"{names} of every model", f"smallest step {min(steps):.2f} nats", ">= {:g}", at_least(min(steps), 0)
    )


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
