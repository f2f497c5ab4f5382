"""What is claimed of the rate-distortion curve and of what steers along it."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from experiments.rate_control.protocol import CONVERGED, PUBLISHED, nats_above
from vae.experiment import Claim, Table, spread

LAST = 0.2  # the part of training over which a set-point has to be held

NAMES = {"geco": "GECO", "control": "ControlVAE", "free_bits": "free bits"}


def title(method: str) -> str:
    return NAMES.get(method) or f"capacity, gamma {method.removeprefix('capacity')}"


def log_mean(a: float, b: float) -> float:
    """Between the betas at the ends of a piece of the curve: minus its mean slope, where each nat halves the error alike.

    Under reverse water-filling with the same latents in use it is exact: R = c - a/2 log beta, D = d + a/2 beta.
    """
    return (b - a) / math.log(b / a)


def slopes(mlp: dict, split: str) -> list[tuple[float, list[float]]]:
    """Of each pair of neighbouring betas: their log-mean, and -dD/dR over it in each seed, which theory says is 1."""
    found = []
    for low, high in pairwise(mlp["betas"]):
        ratios = []
        for a, b in zip(mlp["runs"][f"fixed-{low:g}"], mlp["runs"][f"fixed-{high:g}"], strict=True):
            slope = (b[split]["distortion"] - a[split]["distortion"]) / (b[split]["rate"] - a[split]["rate"])
            ratios.append(-slope / log_mean(low, high))
        found.append((log_mean(low, high), ratios))
    return found


def mean(values) -> float:
    return float(np.mean(list(values)))


def last_part(trace: dict, steps: int, name: str) -> list[float]:
    """The windows of the last fifth of training."""
    return [value for step, value in zip(trace["step"], trace[name], strict=True) if step >= (1 - LAST) * steps]


def largest_error(trace: dict, steps: int, name: str, target: float) -> float:
    return max(abs(value / target - 1) for value in last_part(trace, steps, name))


def controlled(method: str) -> tuple[str, str]:
    """The quantity that a method holds, and the one that then follows."""
    return ("distortion", "rate") if method == "geco" else ("rate", "distortion")


def claims(results: dict) -> list[Claim]:
    of_ablations = ablation_claims(results["ablations"], results["mlp"]) if "ablations" in results else []
    return [*linear_claims(results["linear"]), *mlp_claims(results["mlp"]), *of_ablations]


def error_of(run: dict, exact: dict) -> float:
    """The larger relative error of the two coordinates."""
    return max(abs(run[name] / exact[name] - 1) for name in ("rate", "squared_error"))


def linear_claims(linear: dict) -> list[Claim]:
    made = []
    for beta, (rate, error, active) in PUBLISHED.items():
        ours = linear["published"][str(beta)]
        made.append(
            Claim(
                f"linear, closed form at beta = {beta}",
                abs(ours["rate"] - rate) < 6e-3
                and abs(ours["squared_error"] - error) < 6e-5
                and ours["active"] == active,
                f"R = {ours['rate']:.3f}, squared error {ours['squared_error']:.4f}, {ours['active']} latents",
                f"{rate:.3f}, {error:.4f}, {active}",
            )
        )

    errors = [error_of(linear["runs"][f"fixed-{b:g}"], linear["exact"][f"{b:g}"]) for b in linear["betas"]]
    made.append(
        Claim(
            "linear: training at a fixed beta ends on the exact curve",
            max(errors) < 0.01,
            f"rate and squared error at most {max(errors):.2%} off, {len(errors)} betas",
            "within 1%",
        )
    )
    for beta in linear["set_points"]:
        exact = linear["exact"][f"{beta:g}"]
        for method in ("geco", "control", *(f"capacity{gamma}" for gamma in linear["gammas"])):
            run = linear["runs"][f"{method}-{beta:g}"]
            set_point = (
                f"squared error {exact['squared_error']:.4f}" if method == "geco" else f"rate {exact['rate']:.3f}"
            )
            made.append(
                Claim(
                    f"linear: {title(method)}, told {set_point}, settles on the exact curve",
                    error_of(run, exact) < 0.01,
                    f"R = {run['rate']:.3f}, squared error {run['squared_error']:.4f}",
                    f"{exact['rate']:.3f}, {exact['squared_error']:.4f} within 1%",
                )
            )
            if run["trace"]["weight"]:
                weight = mean(last_part(run["trace"], linear["steps"], "weight"))
                made.append(
                    Claim(
                        f"linear: {title(method)}, told {set_point}, finds the weight",
                        abs(weight / beta - 1) < 0.05,
                        f"{weight:.2f}",
                        f"{beta:g} within 5%",
                    )
                )
    made.append(floor_claim("linear", linear["runs"]["free_bits"]["kl"], linear))
    return made


def floor_claim(kind: str, kl: list[float], settings: dict) -> Claim:
    floor = len(kl) * settings["free_nats"]
    return Claim(
        f"{kind}: free bits put a floor under the rate and under every latent",
        sum(kl) >= 0.95 * floor and min(kl) >= 0.9 * settings["free_nats"],
        f"rate {sum(kl):.2f}, least latent {min(kl):.3f} nats",
        f"rate >= {0.95 * floor:g}, every latent >= {0.9 * settings['free_nats']:g}",
    )


def mlp_claims(mlp: dict) -> list[Claim]:
    runs, betas, target, made = mlp["runs"], mlp["betas"], mlp["target"], []
    seeds = range(len(runs["free_bits"]))
    points = [[runs[f"fixed-{beta:g}"][seed]["test"] for beta in betas] for seed in seeds]
    ordered = all(a["rate"] > b["rate"] and a["distortion"] < b["distortion"] for p in points for a, b in pairwise(p))
    rates = [mean(p[i]["rate"] for p in points) for i in range(len(betas))]
    made.append(
        Claim(
            "MLP: the rate falls and the distortion rises with beta, in every seed",
            ordered,
            f"R = {rates[0]:.1f} to {rates[-1]:.1f} nats at beta {betas[0]:g} to {betas[-1]:g}",
            "in this order",
        )
    )
    elbos = {beta: mean(p[i]["elbo"] for p in points) for i, beta in enumerate(betas)}
    best = max(elbos, key=elbos.get)
    made.append(
        Claim(
            "MLP: the ELBO is best at beta = 1",
            elbos[1] > elbos[best] - 0.3,
            f"{elbos[1]:.2f}, best {elbos[best]:.2f} at beta = {best:g}",
            "within 0.3 nats of the best",
        )
    )
    for split in ("train", "test"):
        ratios = [mean(ratios) for _, ratios in slopes(mlp, split)]
        made.append(
            Claim(
                f"MLP: the slope of the curve is -beta, {split} images",
                all(abs(ratio - 1) < 0.25 for ratio in ratios),
                "-dD/dR over beta: " + ", ".join(f"{ratio:.2f}" for ratio in ratios),
                "1 within 25%, between each two betas",
            )
        )
    for method in ("geco", "control", *(f"capacity{gamma}" for gamma in mlp["gammas"])):
        held, _ = controlled(method)
        off = max(largest_error(run["trace"], mlp["steps"], held, target[held]) for run in runs[method])
        made.append(
            Claim(
                f"MLP: {title(method)} holds its set-point, {held} {target[held]:g}",
                off < 0.02,
                f"at most {off:.2%} off in any window",
                "within 2% over the last fifth of the steps",
            )
        )
        made.append(follows_beta(method, runs[method], mlp, f"MLP: {title(method)}"))
        if runs[method][0]["trace"]["weight"]:
            weight = mean(mean(last_part(run["trace"], mlp["steps"], "weight")) for run in runs[method])
            made.append(
                Claim(
                    f"MLP: {title(method)} finds the weight",
                    abs(weight / mlp["set_point"] - 1) < 0.25,
                    f"{weight:.3f}",
                    f"{mlp['set_point']:g} within 25%",
                )
            )
    least = min(runs["free_bits"], key=lambda run: min(run["kl"]))
    made.append(floor_claim("MLP", least["kl"], mlp))
    without = [mean(nats < 0.05 for nats in run["kl"]) for run in runs[f"fixed-{mlp['free_beta']:g}"]]
    made.append(
        Claim(
            f"MLP: without them, at the same beta = {mlp['free_beta']:g}, half the latents collapse",
            min(without) >= 0.5,
            f"{min(without):.0%} below 0.05 nats",
            "at least 50%",
        )
    )
    return made


def follows_beta(method: str, runs: list[dict], mlp: dict, name: str) -> Claim:
    """That what is not held ends where it does under the fixed weight of the set-point."""
    _, follows = controlled(method)
    there = mean(run["last_epoch"][follows] for run in runs)
    fixed = mean(run["last_epoch"][follows] for run in mlp["runs"][f"fixed-{mlp['set_point']:g}"])
    return Claim(
        f"{name} ends where beta = {mlp['set_point']:g} does",
        abs(there / fixed - 1) < 0.02,
        f"{follows} {there:.2f}",
        f"{fixed:.2f} within 2%",
    )


def ablation_claims(ablations: dict, mlp: dict) -> list[Claim]:
    """The thresholds are those that were missed."""
    chosen, error = ablations["settings"], error_of(ablations["linear"][0], ablations["exact"][0])
    geco, capacity = ablations["mlp"]
    return [
        Claim(
            f"ablation, linear: beta = {chosen['beta']:g} ends on the exact curve after {chosen['steps']} steps",
            error < 0.01,
            f"rate and squared error at most {error:.3%} off",
            "within 1%",
        ),
        follows_beta("geco", geco, mlp, f"ablation, MLP: GECO from a weight of {chosen['geco_from']} on"),
        follows_beta("capacity", capacity, mlp, f"ablation, MLP: a capacity, gamma {chosen['small_gamma']},"),
    ]


def table(results: dict) -> Table:
    linear, mlp = results["linear"], results["mlp"]
    rows = []
    controllers = ("geco", "control", *(f"capacity{gamma}" for gamma in linear["gammas"]))
    for beta in sorted({*linear["betas"], *linear["set_points"]}):
        exact = linear["exact"][f"{beta:g}"]
        there = f"{exact['rate']:.3f} / {exact['squared_error']:.4f}"
        rows_of = {f"fixed beta = {beta:g}": f"fixed-{beta:g}"} if beta in linear["betas"] else {}
        rows_of |= {title(m): f"{m}-{beta:g}" for m in controllers if beta in linear["set_points"]}
        for name, key in rows_of.items():
            run = linear["runs"][key]
            weight = run["trace"]["weight"]
            found = f"{mean(last_part(run['trace'], linear['steps'], 'weight')):.3f}" if weight else ""
            here = f"{run['rate']:.3f} / {run['squared_error']:.4f}"
            if key.startswith("fixed") and (above := nats_above(run, exact, beta)) > CONVERGED:
                here += f" (not converged: {above:.2f} nats above the optimum)"
            rows.append((f"linear: {name}", there, here, f"{beta:g}", found))
    for beta in mlp["betas"]:
        rows.append(_mlp_row(f"MLP: beta = {beta:g}", mlp["runs"][f"fixed-{beta:g}"], f"{beta:g}", ""))
    set_point = mlp["set_point"]
    for method in ("geco", "control", *(f"capacity{gamma}" for gamma in mlp["gammas"]), "free_bits"):
        runs = mlp["runs"][method]
        weight = ""
        if runs[0]["trace"]["weight"]:
            weight = spread((mean(last_part(run["trace"], mlp["steps"], "weight")) for run in runs), 3)
        expected = mlp["free_beta"] if method == "free_bits" else set_point
        rows.append(_mlp_row(f"MLP: {title(method)}", runs, f"{expected:g}", weight))
    if ablations := results.get("ablations"):
        chosen = ablations["settings"]
        of_linear = {"fixed beta": chosen["beta"], f"capacity, gamma {chosen['gamma']}": chosen["set_point"]}
        for (words, beta), *points in zip(of_linear.items(), ablations["exact"], ablations["linear"], strict=True):
            numbers = [f"{point['rate']:.3f} / {point['squared_error']:.4f}" for point in points]
            rows.append((f"ablation, linear: {words}, {chosen['steps']} steps", *numbers, f"{beta:g}", ""))
        of_mlp = (f"GECO from a weight of {chosen['geco_from']} on", f"capacity, gamma {chosen['small_gamma']}")
        for words, runs in zip(of_mlp, ablations["mlp"], strict=True):
            rows.append(_mlp_row(f"ablation, MLP: {words}", runs, f"{set_point:g}", ""))
    return Table(
        (
            "rate, nats / linear: squared error, MLP: distortion in nats on test images",
            "exact",
            "ours",
            "beta",
            "weight found",
        ),
        rows,
        "Mean ± sd over seeds",
    )


def _mlp_row(name: str, runs: list[dict], beta: str, weight: str) -> tuple[str, ...]:
    there = " / ".join(spread((run["test"][name] for run in runs), 2) for name in ("rate", "distortion"))
    return (name, "", there, beta, weight)
