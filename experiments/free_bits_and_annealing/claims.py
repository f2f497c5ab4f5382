"""What is claimed of posterior collapse and of its cures."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from experiments.free_bits_and_annealing.protocol import (
    ALONE,
    CURES,
    CYCLICAL,
    FACTORISED,
    FREE_BITS,
    FREE_NATS,
    PLAIN,
    WARM_UP,
)
from vae.claims import Claim, Table, above, at_least, at_most, below, listed, spread, values

# warm-up is over after a quarter of the training, the four cycles after half of it: the rest is the plain objective. The
# last cycle has climbed to 1, and stays there, halfway through it
LAST_CLIMB = 7 / 8  # of the steps of the cycles
TITLES = {
    ALONE: "autoregressive, latents priced out (beta = 1000)",
    PLAIN: "autoregressive, plain ELBO",
    WARM_UP: "... linear warm-up, then plain",
    CYCLICAL: "... four cycles, then plain",
    FREE_BITS: f"... free bits, {FREE_NATS} nats a dimension",
    FACTORISED: "factorised decoder, plain ELBO",
}


def of_seeds(results: dict[str, Any], name: str, key: str) -> list[float]:
    """Key "elbo" is -(distortion + rate)."""
    runs = results["methods"][name]
    return [-(run["distortion"] + run["rate"]) for run in runs] if key == "elbo" else values(runs, key)


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
    plain, factorised, kept = (of_seeds(results, name, "rate") for name in (PLAIN, FACTORISED, FREE_BITS))
    gain = -results["difference"][ALONE]["mean"]
    kl, without = ([nats for run in results["methods"][name] for nats in run["kl"]] for name in (FREE_BITS, PLAIN))
    promised = FREE_NATS * len(results["methods"][FREE_BITS][0]["kl"])
    unused = fmean(nats < 0.05 for nats in without)
    return [
        Claim.of(
            "the plain ELBO collapses", f"rates {listed(plain)} nats", "below {:g}, every seed", below(plain, 0.5)
        ),
        Claim.of(
            "it is the decoder's doing: a factorised one uses its latents",
            f"rates {listed(factorised)} nats",
            "{:words} times the plain ones, every seed",
            at_least(min(factorised) / max(plain), 3),
        ),
        Claim.of(
            "what is left of the latents is worth nothing",
            f"NLL with minus without them {gain:+.3f} nats",
            "within {:g}",
            at_most(abs(gain), 0.1),
        ),
        *(claim for name, end in at_full_weight(results).items() for claim in annealing_claims(results, name, end)),
        Claim.of(
            "free bits hold what they promise",
            f"rates {listed(kept)} nats",
            f"at least {{:g}} of {promised:g}, every seed",
            at_least([rate / promised for rate in kept], 0.95),
        ),
        Claim.of(
            "free bits: in every dimension",
            f"lowest {min(kl):.3f} nats",
            f"at least {{:g}} of {FREE_NATS:g}",
            at_least([nats / FREE_NATS for nats in kl], 0.9),
        ),
        Claim.of(
            "... where without them most have none",
            f"{100 * unused:.0f}% below 0.05 nats",
            "{:words}",
            at_least(unused, 1 / 2),
        ),
        *(likelihood_claim(name, results["difference"][name]) for name in CURES),
    ]


def annealing_claims(results: dict[str, Any], name: str, end: int) -> list[Claim]:
    then, now = at_step(results, name, end), of_seeds(results, name, "rate")
    apart = abs(fmean(of_seeds(results, name, "elbo")) - fmean(of_seeds(results, PLAIN, "elbo")))
    in_use = {
        "the latents are in use when the weight has reached 1 for good": (
            then,
            f"validation rates {listed(then)} nats at the first validation from step {end} on",
        ),
        "and still are at the end": (now, f"rates {listed(now)} nats"),
    }
    return [
        *(
            Claim.of(f"{name}: {what}", words, "above {:g}, every seed", above(rates, 3))
            for what, (rates, words) in in_use.items()
        ),
        Claim.of(f"{name}: the ELBO is the plain one's", f"{apart:.2f} nats apart", "within {:g}", at_most(apart, 0.5)),
    ]


def likelihood_claim(name: str, worse: dict[str, float]) -> Claim:
    return Claim.of(
        f"{name}: the likelihood is no worse",
        f"NLL {worse['mean']:+.3f} ± {worse['se_of_seeds']:.3f} (seeds) ± {worse['se_of_images']:.3f} (images)",
        "at most {:g} nats above the plain one's",
        at_most(worse["mean"], 0.1),
    )


def table(results: dict[str, Any]) -> Table:
    reported = {PLAIN: "collapses", WARM_UP: "in use; may collapse again", CYCLICAL: "in use", FREE_BITS: ">= lambda J"}
    rows = []
    for name, title in TITLES.items():
        difference = results["difference"][name]
        rows.append(
            (
                title,
                reported.get(name, ""),
                spread(of_seeds(results, name, "rate")),
                spread((-elbo for elbo in of_seeds(results, name, "elbo")), 3),
                spread(of_seeds(results, name, "nll"), 3),
                "" if name == PLAIN else f"{difference['mean']:+.3f} ± {difference['se_of_images']:.3f}",
            )
        )
    rows += [
        (f"autoregressive, plain ELBO, {size}x{size} pixels", "", spread(rates), "", "", "")
        for size, rates in results["larger"].items()
    ]
    columns = ("", "reported", "rate (nats)", "-ELBO", "NLL", "NLL - plain (± se, paired images)")
    return Table(columns, rows, "Mean ± sd over seeds")
