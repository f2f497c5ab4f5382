"""What is claimed of the rate-distortion curve and of what steers along it."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import fmean

from experiments.rate_control.protocol import CONVERGED, PUBLISHED, nats_above
from vae.claims import Claim, Table, at_least, below, listed, mean, near, ordered, spread, values, within

ON_THE_CURVE, HELD = 0.01, 0.02  # how far off an exact point, and a set-point, may be
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


def last_part(trace: dict, steps: int, name: str) -> list[float]:
    """The windows of the last fifth of training."""
    return [value for step, value in zip(trace["step"], trace[name], strict=True) if step >= (1 - LAST) * steps]


def largest_error(trace: dict, steps: int, name: str, target: float) -> float:
    return max(abs(value / target - 1) for value in last_part(trace, steps, name))


def controlled(method: str) -> tuple[str, str]:
    """The quantity that a method holds, and the one that then follows."""
    return ("distortion", "rate") if method == "geco" else ("rate", "distortion")


def last_weight(run: dict, steps: int) -> float:
    return fmean(last_part(run["trace"], steps, "weight"))


def steered(gammas: list[float]) -> list[str]:
    """The methods that are told a set-point."""
    return ["geco", "control", *(f"capacity{gamma}" for gamma in gammas)]


def claims(results: dict) -> list[Claim]:
    of_ablations = ablation_claims(results["ablations"], results["mlp"]) if "ablations" in results else []
    return [*linear_claims(results["linear"]), *mlp_claims(results["mlp"]), *of_ablations]


def error_of(run: dict, exact: dict) -> float:
    """The larger relative error of the two coordinates."""
    return max(abs(run[name] / exact[name] - 1) for name in ("rate", "squared_error"))


def linear_claims(linear: dict) -> list[Claim]:
    errors = [error_of(linear["runs"][f"fixed-{b:g}"], linear["exact"][f"{b:g}"]) for b in linear["betas"]]
    return [
        *(closed_form_claim(beta, linear["published"][str(beta)]) for beta in PUBLISHED),
        Claim.of(
            "linear: training at a fixed beta ends on the exact curve",
            f"rate and squared error at most {max(errors):.2%} off, {len(errors)} betas",
            "within {:.0%}",
            below(errors, ON_THE_CURVE),
        ),
        *(
            claim
            for beta in linear["set_points"]
            for method in steered(linear["gammas"])
            for claim in steered_claims(linear, method, beta)
        ),
        floor_claim("linear", linear["runs"]["free_bits"]["kl"], linear),
    ]


def closed_form_claim(beta: float, ours: dict) -> Claim:
    rate, error, active = PUBLISHED[beta]
    return Claim.of(
        f"linear, closed form at beta = {beta}",
        f"R = {ours['rate']:.3f}, squared error {ours['squared_error']:.4f}, {ours['active']} latents",
        f"{rate:.3f}, {error:.4f}, {active}",
        within(ours["rate"], 6e-3, rate),  # as finely as the numbers are given
        within(ours["squared_error"], 6e-5, error),
        within(ours["active"], 0, active),
    )


def steered_claims(linear: dict, method: str, beta: float) -> list[Claim]:
    run, exact = linear["runs"][f"{method}-{beta:g}"], linear["exact"][f"{beta:g}"]
    told = f"squared error {exact['squared_error']:.4f}" if method == "geco" else f"rate {exact['rate']:.3f}"
    name = f"linear: {title(method)}, told {told}, "
    curve = Claim.of(
        name + "settles on the exact curve",
        f"R = {run['rate']:.3f}, squared error {run['squared_error']:.4f}",
        f"{exact['rate']:.3f}, {exact['squared_error']:.4f} within {{:.0%}}",
        below(error_of(run, exact), ON_THE_CURVE),
    )
    if not run["trace"]["weight"]:
        return [curve]
    weight = last_weight(run, linear["steps"])
    return [
        curve,
        Claim.of(name + "finds the weight", f"{weight:.2f}", "{1:g} within {0:.0%}", near(weight, 0.05, beta)),
    ]


def floor_claim(kind: str, kl: list[float], settings: dict) -> Claim:
    return Claim.of(
        f"{kind}: free bits put a floor under the rate and under every latent",
        f"rate {sum(kl):.2f}, least latent {min(kl):.3f} nats",
        "rate >= {:g}, every latent >= {:g}",
        at_least(sum(kl), 0.95 * len(kl) * settings["free_nats"]),
        at_least(kl, 0.9 * settings["free_nats"]),
    )


def mlp_claims(mlp: dict) -> list[Claim]:
    runs, betas = mlp["runs"], mlp["betas"]
    points = {beta: values(runs[f"fixed-{beta:g}"], "test") for beta in betas}
    rates = [mean(points[beta], "rate") for beta in (betas[0], betas[-1])]
    elbos = {beta: mean(points[beta], "elbo") for beta in betas}
    best = max(elbos, key=elbos.get)
    without = [fmean(nats < 0.05 for nats in run["kl"]) for run in runs[f"fixed-{mlp['free_beta']:g}"]]
    return [
        Claim.of(
            "MLP: the rate falls and the distortion rises with beta, in every seed",
            f"R = {rates[0]:.1f} to {rates[1]:.1f} nats at beta {betas[0]:g} to {betas[-1]:g}",
            "in this order",
            ordered(*(values(points[beta], "rate") for beta in betas[::-1])),
            ordered(*(values(points[beta], "distortion") for beta in betas)),
        ),
        Claim.of(
            "MLP: the ELBO is best at beta = 1",
            f"{elbos[1]:.2f}, best {elbos[best]:.2f} at beta = {best:g}",
            "within {:g} nats of the best",
            below(elbos[best] - elbos[1], 0.3),
        ),
        *(slope_claim(mlp, split) for split in ("train", "test")),
        *(claim for method in steered(mlp["gammas"]) for claim in set_point_claims(mlp, method)),
        floor_claim("MLP", min(values(runs["free_bits"], "kl"), key=min), mlp),
        Claim.of(
            f"MLP: without them, at the same beta = {mlp['free_beta']:g}, half the latents collapse",
            f"{min(without):.0%} below 0.05 nats",
            "at least {:.0%}",
            at_least(without, 0.5),
        ),
    ]


def slope_claim(mlp: dict, split: str) -> Claim:
    ratios = [fmean(ratios) for _, ratios in slopes(mlp, split)]
    return Claim.of(
        f"MLP: the slope of the curve is -beta, {split} images",
        "-dD/dR over beta: " + listed(ratios),
        "{1:g} within {0:.0%}, between each two betas",
        near(ratios, 0.25, 1),
    )


def set_point_claims(mlp: dict, method: str) -> list[Claim]:
    (held, _), runs, target = controlled(method), mlp["runs"][method], mlp["target"]
    off = [largest_error(run["trace"], mlp["steps"], held, target[held]) for run in runs]
    made = [
        Claim.of(
            f"MLP: {title(method)} holds its set-point, {held} {target[held]:g}",
            f"at most {max(off):.2%} off in any window",
            "within {:.0%} over the last fifth of the steps",
            below(off, HELD),
        ),
        follows_beta(method, runs, mlp, f"MLP: {title(method)}"),
    ]
    if runs[0]["trace"]["weight"]:
        weight, bound = fmean(last_weight(run, mlp["steps"]) for run in runs), mlp["set_point"]
        name = f"MLP: {title(method)} finds the weight"
        made.append(Claim.of(name, f"{weight:.3f}", "{1:g} within {0:.0%}", near(weight, 0.25, bound)))
    return made


def follows_beta(method: str, runs: list[dict], mlp: dict, name: str) -> Claim:
    """That what is not held ends where it does under the fixed weight of the set-point."""
    _, follows = controlled(method)
    there, fixed = (
        mean(values(of, "last_epoch"), follows) for of in (runs, mlp["runs"][f"fixed-{mlp['set_point']:g}"])
    )
    return Claim.of(
        f"{name} ends where beta = {mlp['set_point']:g} does",
        f"{follows} {there:.2f}",
        "{1:.2f} within {0:.0%}",
        near(there, HELD, fixed),
    )


def ablation_claims(ablations: dict, mlp: dict) -> list[Claim]:
    """The thresholds are those that were missed."""
    chosen, error = ablations["settings"], error_of(ablations["linear"][0], ablations["exact"][0])
    geco, capacity = ablations["mlp"]
    return [
        Claim.of(
            f"ablation, linear: beta = {chosen['beta']:g} ends on the exact curve after {chosen['steps']} steps",
            f"rate and squared error at most {error:.3%} off",
            "within {:.0%}",
            below(error, ON_THE_CURVE),
        ),
        follows_beta("geco", geco, mlp, f"ablation, MLP: GECO from a weight of {chosen['geco_from']} on"),
        follows_beta("capacity", capacity, mlp, f"ablation, MLP: a capacity, gamma {chosen['small_gamma']},"),
    ]


def table(results: dict) -> Table:
    linear, mlp = results["linear"], results["mlp"]
    rows = []
    for beta in sorted({*linear["betas"], *linear["set_points"]}):
        exact = linear["exact"][f"{beta:g}"]
        there = f"{exact['rate']:.3f} / {exact['squared_error']:.4f}"
        rows_of = {f"fixed beta = {beta:g}": f"fixed-{beta:g}"} if beta in linear["betas"] else {}
        rows_of |= {title(m): f"{m}-{beta:g}" for m in steered(linear["gammas"]) if beta in linear["set_points"]}
        for name, key in rows_of.items():
            run = linear["runs"][key]
            weight = run["trace"]["weight"]
            found = f"{last_weight(run, linear['steps']):.3f}" if weight else ""
            here = f"{run['rate']:.3f} / {run['squared_error']:.4f}"
            if key.startswith("fixed") and (above := nats_above(run, exact, beta)) > CONVERGED:
                here += f" (not converged: {above:.2f} nats above the optimum)"
            rows.append((f"linear: {name}", there, here, f"{beta:g}", found))
    for beta in mlp["betas"]:
        rows.append(_mlp_row(f"MLP: beta = {beta:g}", mlp["runs"][f"fixed-{beta:g}"], f"{beta:g}", ""))
    set_point = mlp["set_point"]
    for method in (*steered(mlp["gammas"]), "free_bits"):
        runs = mlp["runs"][method]
        weight = ""
        if runs[0]["trace"]["weight"]:
            weight = spread((last_weight(run, mlp["steps"]) for run in runs), 3)
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
    there = " / ".join(spread(values(values(runs, "test"), half)) for half in ("rate", "distortion"))
    return (name, "", there, beta, weight)
