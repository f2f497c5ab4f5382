"""What is claimed of the two directions and of the estimators: every number has an exact answer."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from experiments.kl_directions.protocol import MIXTURES, POSTED, SHIFTS, exact_statistics
from vae.claims import Claim, Table, at_least, below, listed


def nearest(end: list[float], optima: list[tuple[float, float, float]]) -> tuple[float, tuple[float, float, float]]:
    """The optimum that is nearest to (mean, sd), and the larger of the two deviations from it."""
    return min((max(abs(end[0] - optimum[0]), abs(end[1] - optimum[1])), optimum) for optimum in optima)


def claims(results: dict) -> list[Claim]:
    losses = results["as_loss"]
    return [
        *(fit_claim(results, name, direction) for name, direction in product(MIXTURES, ("forward", "reverse"))),
        *factorised_claims(results["factorised"]),
        *estimator_claims(results["estimators"]),
        descent_claim(losses, "k2", "reverse"),
        descent_claim(losses, "k3", "forward"),
        gradient_claim("zero", losses["k1"]["gradient"], [0.0, 0.0], "k1"),
        gradient_claim("the gradient of the reverse KL", losses["k2"]["gradient"], losses["reverse"]["gradient"], "k2"),
        gradient_claim("the gradient of the forward KL", losses["k3"]["gradient"], losses["forward"]["gradient"], "k3"),
    ]


def fit_claim(results: dict, name: str, direction: str) -> Claim:
    optima = MIXTURES[name][direction]
    landed = [nearest(end, optima) for end in results["fits"][f"{name}, {direction}"]["end"]]
    worst, reached = max(deviation for deviation, _ in landed), len({optimum for _, optimum in landed})
    many = f"the {len(optima)} optima, each reached" if len(optima) > 1 else "the only optimum"
    return Claim.of(
        f"{direction} KL, {name} modes: every start ends on {many}",
        f"{reached} reached, worst deviation {worst:.4f}",
        "mean and sd within {:g}",
        below(worst, 0.01),
        at_least(reached, len(optima)),
    )


def factorised_claims(factorised: dict) -> list[Claim]:
    worst = {"forward": 0.0, "reverse": 0.0, "kl": 0.0}
    for correlation, fitted in factorised.items():
        rho2 = float(correlation) ** 2
        for direction, variance in (("forward", 1.0), ("reverse", 1 - rho2)):
            off = max(abs(v - variance) for v in fitted[direction]["variances"])
            worst[direction] = max(worst[direction], off)
            worst["kl"] = max(worst["kl"], abs(fitted[direction]["kl"] + 0.5 * math.log(1 - rho2)))
    name = "factorised q of a correlated Gaussian, {} KL: variances {}".format
    return [
        Claim.of(words, f"off by at most {worst[key]:.1e}{unit}", "within {:g}" + unit, below(worst[key], 1e-3))
        for key, words, unit in (
            ("forward", name("forward", "1"), ""),
            ("reverse", name("reverse", "1 - rho^2"), ""),
            ("kl", "both directions attain KL = -1/2 log(1 - rho^2)", " nats"),
        )
    ]


def estimator_claims(estimators: dict) -> list[Claim]:
    made = []
    for shift, numbers in estimators.items():
        errors = []
        for name, (bias, sd) in exact_statistics(float(shift)).items():
            errors += [abs(numbers[name]["bias"] - bias) / numbers[name]["bias_se"]]
            errors += [abs(numbers[name]["sd"] - sd) / numbers[name]["sd_se"]]
        made.append(
            Claim.of(
                f"bias and sd of k1, k2, k3 at KL = {float(shift) ** 2 / 2:g} are Schulman's",
                f"largest error {max(errors):.1f} standard errors",
                "{:g} standard errors",
                below(errors, 3),
            )
        )
    lowest = min(estimators[str(shift)]["k3"]["lowest"] for shift in SHIFTS)
    return [
        *made,
        Claim.of("k3 is never negative", f"lowest {lowest:.1e}", ">= {:g} on every sample", at_least(lowest, 0)),
    ]


def descent_claim(losses: dict, name: str, direction: str) -> Claim:
    end = losses[name]["end"][0]
    deviation, optimum = nearest(end, MIXTURES["near"][direction])
    return Claim.of(
        f"{name} as a loss descends to an optimum of the {direction} KL",
        f"ends at ({end[0]:.3f}, {end[1]:.3f})",
        f"({optimum[0]:.3f}, {optimum[1]:.3f}) within {{:g}}",
        below(deviation, 0.02),
    )


def gradient_claim(what: str, ours: dict, exact: list[float], name: str) -> Claim:
    errors = [abs(m - e) / se for m, e, se in zip(ours["mean"], exact, ours["se"], strict=True)]
    return Claim.of(
        f"E[grad {name}] is {what}",
        f"({listed(ours['mean'], '.4f')}), {max(errors):.1f} standard errors off",
        f"({listed(exact, '.4f')}) within {{:g}}",
        below(errors, 3),
    )


def table(results: dict) -> Table:
    rows = []
    for name, direction in product(MIXTURES, ("forward", "reverse")):
        p = MIXTURES[name]
        what = "KL(p || q)" if direction == "forward" else "KL(q || p)"
        fits = results["fits"][f"{name}, {direction}"]["end"]
        for optimum in p[direction]:
            mean, sd, kl = optimum
            here = [end for end in fits if nearest(end, p[direction])[1] == optimum]
            ours = f"{np.mean([e[0] for e in here]):.4f}, {np.mean([e[1] for e in here]):.4f} ({len(here)} starts)"
            words = f"min {what}, modes at ±{p['centre']:g}, sd {p['sd']:g}: mean, sd of q"
            rows.append((words, f"{mean:.4f}, {sd:.4f} (KL {kl:.5f})", ours))
    rows.append(("KL attained by a factorised q, rho 0.9, both ways", "0.8304", _both(results["factorised"]["0.9"])))
    for shift, numbers in results["estimators"].items():
        true = float(shift) ** 2 / 2
        for name, (bias, sd) in exact_statistics(float(shift)).items():
            exact = f"{bias / true:.4f}, {sd / true:.4f} ({POSTED[shift][name]})"
            ours = f"{numbers[name]['bias'] / true:.4f}, {numbers[name]['sd'] / true:.4f}"
            rows.append((f"{name} at KL {true:g}: bias / KL, sd / KL", exact, ours))
    return Table(("", "exact (as published)", "ours"), rows)


def _both(fitted: dict) -> str:
    return f"{fitted['forward']['kl']:.4f}, {fitted['reverse']['kl']:.4f}"
