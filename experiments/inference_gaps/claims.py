"""What is claimed of the inference gap's two parts, and of the measurements they rest on."""

from __future__ import annotations

import math
import statistics

from experiments.inference_gaps.protocol import NAMES, PAPER_GAPS
from vae.experiment import Claim, Table, spread

WORDS = {
    "log_likelihood": "log p(x)",
    "elbo_local": "ELBO of the best diagonal Gaussian",
    "elbo_amortised": "ELBO of the encoder",
    "approximation_gap": "approximation gap",
    "amortisation_gap": "amortisation gap",
    "inference_gap": "inference gap",
}


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


def claims(results: dict) -> list[Claim]:
    made = exact_claims(results["exact"])
    for model, seeds in results["models"].items():
        made += model_claims(NAMES[model], seeds)
    models = results["models"]
    if {"mnist", "fashion"} <= models.keys():
        (a, of_a), (b, of_b) = (pooled(models[name], "inference_gap") for name in ("mnist", "fashion"))
        made.append(
            Claim(
                "Fashion's inference gap is larger than MNIST's",
                b - a > math.hypot(of_a, of_b),
                f"{b:.2f} ± {of_b:.2f} against {a:.2f} ± {of_a:.2f} nats (95%)",
                "above 0, 95% interval",
            )
        )
    return made


def exact_claims(exact: dict) -> list[Claim]:
    lower, upper = exact["lower_error"], exact["upper_error"]
    made = [
        Claim(
            "linear-Gaussian model: AIS finds the exact log p(x)",
            abs(exact["ais_error"]) < 0.1,
            f"off by {exact['ais_error']:+.4f} ± {exact['ais_error_ci95']:.4f} nats (worst image {exact['ais_worst']:.3f})",
            "mean within 0.1 nats",
        ),
        Claim(
            "linear-Gaussian model: the sandwich holds the exact log p(x)",
            lower <= exact["lower_error_ci95"] and upper >= -exact["upper_error_ci95"] and upper - lower < 0.1,
            f"from {lower:+.4f} to {upper:+.4f} nats",
            "0 between them (95%), at most 0.1 apart",
        ),
    ]
    for name in ("approximation_gap", "amortisation_gap", "inference_gap"):
        found, wanted = exact["gaps"][name], exact["exact_gaps"][name]
        made.append(
            Claim(
                f"linear-Gaussian model: {WORDS[name]}",
                abs(found - wanted) < 0.05,
                f"{found:.3f} nats",
                f"{wanted:.3f} within 0.05",
            )
        )
    return made


def model_claims(name: str, seeds: list[dict]) -> list[Claim]:
    apart = max(seed["adding_up"] for seed in seeds)
    made = [Claim(f"{name}: the two gaps add up to the whole, image by image", apart < 1e-9, f"{apart:.0e}", "< 1e-9")]
    for gap in ("approximation_gap", "amortisation_gap"):
        value, half = pooled(seeds, gap)
        made.append(
            Claim(
                f"{name}: {WORDS[gap]} above 0", value > half, f"{value:.2f} ± {half:.2f} nats", "95% interval above 0"
            )
        )
    made.append(
        Claim(
            f"{name}: the encoder's share of the gap is comparable or larger",
            share(seeds) >= 1 / 3,
            f"{share(seeds):.0%}",
            "at least a third",
        )
    )
    for key, words in (
        ("ais_less_importance", "importance sampling from the encoder's q"),
        ("ais_less_importance_of_flows", "importance sampling from each image's own flow"),
    ):
        differences = [seed[key]["mean"] for seed in seeds]
        made.append(
            Claim(
                f"{name}: AIS agrees with {words}",
                all(-0.3 <= d < 1 for d in differences),
                f"AIS higher by {spread(differences)} nats",
                "-0.3 to 1 nats",
            )
        )
    widths = [seed["sandwich"]["mean"] for seed in seeds]
    made.append(
        Claim(f"{name}: the sandwich on simulated images is narrow", max(widths) < 0.5, spread(widths), "< 0.5 nats")
    )
    late = [seed["second_half"]["mean"] for seed in seeds]
    made.append(
        Claim(
            f"{name}: the search for the best q has ended",
            max(map(abs, late)) < 0.05,
            f"its second half gained {spread(late, 3)} nats",
            "within 0.05 nats",
        )
    )
    elsewhere = [seed["from_prior"]["mean"] for seed in seeds]
    made.append(
        Claim(
            f"{name}: a search from N(0, I) finds no better q than one from the encoder's",
            max(elsewhere) < 0.1,
            f"{spread(elsewhere, 2)} nats higher",
            "at most 0.1 nats higher",
        )
    )
    gains = [(seed["flow_gain"]["mean"], seed["flow_gain"]["ci95"]) for seed in seeds]
    made.append(
        Claim(
            f"{name}: a planar flow for each image closes part of the approximation gap",
            all(gain > half for gain, half in gains),
            ", ".join(f"{gain:.2f} ± {half:.2f}" for gain, half in gains) + " nats",
            "95% interval above 0, every seed",
        )
    )
    return made


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
    for name in ("approximation_gap", "amortisation_gap", "inference_gap"):
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
        gain = statistics.fmean(seed["flow_gain"]["mean"] for seed in seeds)
        rows.append((f"{NAMES[model]}: what {protocol['flow_steps']} planar maps an image gain", "-", f"{gain:.2f}"))
        for key, of in (("ais_less_importance", "the encoder's q"), ("ais_less_importance_of_flows", "the flows")):
            difference = statistics.fmean(seed[key]["mean"] for seed in seeds)
            words = f"{NAMES[model]}: AIS less L_{protocol['importance_samples']} from {of}"
            rows.append((words, "-", f"{difference:+.2f}"))
        elsewhere = statistics.fmean(seed["from_prior"]["mean"] for seed in seeds)
        rows.append(
            (f"{NAMES[model]}: best q looked for from N(0, I), less from the encoder's", "-", f"{elsewhere:+.2f}")
        )
        width = statistics.fmean(seed["sandwich"]["mean"] for seed in seeds)
        rows.append((f"{NAMES[model]}: width of the AIS sandwich, simulated images", "-", f"{width:.2f}"))
    seeds = len(protocol["seeds"])
    ours = (
        f"ours: {protocol['epochs']} epochs, {protocol['images']} test images, {seeds} seed{'s' * (seeds > 1)}, ± 95%"
    )
    return Table(("nats an image", "paper, as recalled (unconfirmed)", ours), rows)
