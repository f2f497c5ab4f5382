"""What is claimed of the inference gap's two parts, and of the measurements they rest on."""

from __future__ import annotations

import math
import statistics

from experiments.inference_gaps.protocol import NAMES, PAPER_GAPS
from vae.claims import Claim, Table, above, at_least, at_most, below, between, spread, values, within

WORDS = {
    "log_likelihood": "log p(x)",
    "elbo_local": "ELBO of the best diagonal Gaussian",
    "elbo_amortised": "ELBO of the encoder",
    "approximation_gap": "approximation gap",
    "amortisation_gap": "amortisation gap",
    "inference_gap": "inference gap",
}
GAPS = ("approximation_gap", "amortisation_gap", "inference_gap")


def pooled(seeds: list[dict], name: str) -> tuple[float, float]:
    """Mean over seeds, and half its 95% interval: that of the images, which are the same in every seed, so that seeds do not
    make it narrower; and, squares added, that of the seeds (Student's t) where there are several."""
    values = [seed[name] for seed in seeds]
    of_images = statistics.fmean(seed[f"{name}_ci95"] for seed in seeds)
    if len(values) == 1:
        return values[0], of_images
    student = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}.get(len(values), 2.3)
    of_seeds = student * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), math.hypot(of_images, of_seeds)


def share(seeds: list[dict]) -> float:
    """Of the inference gap, the encoder's; mean over seeds."""
    return statistics.fmean(seed["amortisation_gap"] / seed["inference_gap"] for seed in seeds)


def means(seeds: list[dict], key: str) -> list[float]:
    """Over images, of each seed."""
    return values(values(seeds, key), "mean")


def claims(results: dict) -> list[Claim]:
    made = exact_claims(results["exact"])
    for model, seeds in results["models"].items():
        made += model_claims(NAMES[model], seeds)
    models = results["models"]
    if {"mnist", "fashion"} <= models.keys():
        (a, of_a), (b, of_b) = (pooled(models[name], "inference_gap") for name in ("mnist", "fashion"))
        made.append(
            Claim.of(
                "Fashion's inference gap is larger than MNIST's",
                f"{b:.2f} ± {of_b:.2f} against {a:.2f} ± {of_a:.2f} nats (95%)",
                "above {:g}, 95% interval",
                above(b - a - math.hypot(of_a, of_b), 0),
            )
        )
    return made


def exact_claims(exact: dict) -> list[Claim]:
    lower, upper = exact["lower_error"], exact["upper_error"]
    return [
        Claim.of(
            "linear-Gaussian model: AIS finds the exact log p(x)",
            f"off by {exact['ais_error']:+.4f} ± {exact['ais_error_ci95']:.4f} nats (worst image {exact['ais_worst']:.3f})",
            "mean within {:g} nats",
            below(abs(exact["ais_error"]), 0.1),
        ),
        Claim.of(
            "linear-Gaussian model: the sandwich holds the exact log p(x)",
            f"from {lower:+.4f} to {upper:+.4f} nats",
            "{:g} between them (95%), at most {:g} apart",
            at_most([lower - exact["lower_error_ci95"], -upper - exact["upper_error_ci95"]], 0),
            at_most(upper - lower, 0.1),
        ),
        *(
            Claim.of(
                f"linear-Gaussian model: {WORDS[gap]}",
                f"{exact['gaps'][gap]:.3f} nats",
                "{1:.3f} within {0:g}",
                within(exact["gaps"][gap], 0.05, exact["exact_gaps"][gap]),
            )
            for gap in GAPS
        ),
    ]


def model_claims(name: str, seeds: list[dict]) -> list[Claim]:
    apart, widths, late, elsewhere = (
        values(seeds, "adding_up"),
        *(means(seeds, key) for key in ("sandwich", "second_half", "from_prior")),
    )
    gains = [(gain["mean"], gain["ci95"]) for gain in values(seeds, "flow_gain")]
    return [
        Claim.of(
            f"{name}: the two gaps add up to the whole, image by image",
            f"{max(apart):.0e}",
            "< {:g}",
            below(apart, 1e-9),
        ),
        *(above_0_claim(name, seeds, gap) for gap in ("approximation_gap", "amortisation_gap")),
        Claim.of(
            f"{name}: the encoder's share of the gap is comparable or larger",
            f"{share(seeds):.0%}",
            "at least {:words}",
            at_least(share(seeds), 1 / 3),
        ),
        *(
            Claim.of(
                f"{name}: AIS agrees with importance sampling from {words}",
                f"AIS higher by {spread(means(seeds, key))} nats",
                "{:g} to {:g} nats",
                between(means(seeds, key), -0.3, 1),
            )
            for key, words in (
                ("ais_less_importance", "the encoder's q"),
                ("ais_less_importance_of_flows", "each image's own flow"),
            )
        ),
        Claim.of(
            f"{name}: the sandwich on simulated images is narrow", spread(widths), "< {:g} nats", below(widths, 0.5)
        ),
        Claim.of(
            f"{name}: the search for the best q has ended",
            f"its second half gained {spread(late, 3)} nats",
            "within {:g} nats",
            below(map(abs, late), 0.05),
        ),
        Claim.of(
            f"{name}: a search from N(0, I) finds no better q than one from the encoder's",
            f"{spread(elsewhere, 2)} nats higher",
            "at most {:g} nats higher",
            at_most(elsewhere, 0.1),
        ),
        Claim.of(
            f"{name}: a planar flow for each image closes part of the approximation gap",
            ", ".join(f"{gain:.2f} ± {half:.2f}" for gain, half in gains) + " nats",
            "95% interval above {:g}, every seed",
            above([gain - half for gain, half in gains], 0),
        ),
    ]


def above_0_claim(name: str, seeds: list[dict], gap: str) -> Claim:
    value, half = pooled(seeds, gap)
    words, bound = f"{name}: {WORDS[gap]} above 0", above(value - half, 0)
    return Claim.of(words, f"{value:.2f} ± {half:.2f} nats", "95% interval above {:g}", bound)


def gap_rows(name: str, paper: dict[str, float], seeds: list[dict]) -> list[tuple[str, str, str]]:
    rows = []
    for key, words in WORDS.items():
        value, half = pooled(seeds, key)
        rows.append((f"{name}: {words}", f"{paper[key]:.2f}", f"{value:.2f} ± {half:.2f}"))
    of_paper = paper["amortisation_gap"] / paper["inference_gap"]
    return [*rows, (f"{name}: the encoder's share of the gap", f"{of_paper:.0%}", f"{share(seeds):.0%}")]


def table(results: dict) -> Table:
    protocol = results["protocol"]
    rows = []
    exact = results["exact"]
    for name in GAPS:
        rows.append(
            (
                f"linear-Gaussian: {WORDS[name]}",
                f"{exact['exact_gaps'][name]:.3f} (exact)",
                f"{exact['gaps'][name]:.3f}",
            )
        )
    rows.append(("linear-Gaussian: AIS less exact log p(x)", "0", f"{exact['ais_error']:+.4f}"))
    for model, seeds in results["models"].items():
        rows += gap_rows(NAMES[model], PAPER_GAPS[model], seeds)
        if trained := results.get("training", {}).get(model):
            rows += gap_rows(
                f"{NAMES[model]}, {protocol['training_images']} training images", PAPER_GAPS[model], trained
            )
        gain = statistics.fmean(means(seeds, "flow_gain"))
        rows.append((f"{NAMES[model]}: what {protocol['flow_steps']} planar maps an image gain", "-", f"{gain:.2f}"))
        for key, of in (("ais_less_importance", "the encoder's q"), ("ais_less_importance_of_flows", "the flows")):
            difference = statistics.fmean(means(seeds, key))
            words = f"{NAMES[model]}: AIS less L_{protocol['importance_samples']} from {of}"
            rows.append((words, "-", f"{difference:+.2f}"))
        elsewhere = statistics.fmean(means(seeds, "from_prior"))
        rows.append(
            (f"{NAMES[model]}: best q looked for from N(0, I), less from the encoder's", "-", f"{elsewhere:+.2f}")
        )
        width = statistics.fmean(means(seeds, "sandwich"))
        rows.append((f"{NAMES[model]}: width of the AIS sandwich, simulated images", "-", f"{width:.2f}"))
    seeds = len(protocol["seeds"])
    ours = (
        f"ours: {protocol['epochs']} epochs, {protocol['images']} test images, {seeds} seed{'s' * (seeds > 1)}, ± 95%"
    )
    return Table(("nats an image", "paper, as recalled (unconfirmed)", ours), rows)
