"""What is claimed of codes in use, of what priors save, and of the Gaussian VAE at the same rate."""

from __future__ import annotations

import math
from itertools import pairwise, product
from statistics import fmean

from experiments.codes_on_one_plane.protocol import CURVES, FAMILIES, PLACES, PRIORS, squared_error
from vae.claims import Claim, Table, above, at_least, at_most, listed, ordered, spread, values

USED = 0.95  # "nearly 100%" of the codes (Mentzer et al. 2024, figure 3)
EXACT = 1e-3  # nats: of what holds but for rounding
NEAR = 0.10  # how much larger FSQ's squared error may be than VQ's at the largest codebook


def of(results: dict, family: str, size: int, key: str, prior: str = "autoregressive") -> list[float]:
    """A number of a quantizer in each seed."""
    return values(results["points"][f"{family}-{size}-{prior}"], key)


def usage(results: dict, family: str, size: int) -> list[float]:
    """The part of the codes that the test images use, in each seed."""
    return [used / size for used in of(results, family, size, "codes_used")]


def gaussian_at(results: dict, rate: float, seed: int, under: str = "gaussian") -> float:
    """The Gaussian VAE's distortion at this rate, on the chord between the betas beside it, which alternating between the two
    models attains; nan beyond the first and last."""
    curve = sorted(
        (
            results["points"][f"{under}-{beta:g}"][seed]["rate"],
            results["points"][f"{under}-{beta:g}"][seed]["distortion"],
        )
        for beta in results["betas"]
    )
    for (low, first), (high, second) in pairwise(curve):
        if low <= rate <= high:
            return first + (second - first) * (rate - low) / (high - low)
    return math.nan


def gaps(results: dict, family: str, size: int, under: str = "gaussian") -> list[float]:
    """How much higher a quantizer's distortion is than the Gaussian VAE's at its rate, in each seed, in nats."""
    points = results["points"][f"{family}-{size}-autoregressive"]
    return [p["distortion"] - gaussian_at(results, p["rate"], seed, under) for seed, p in enumerate(points)]


def claims(results: dict) -> list[Claim]:
    sizes, middle = results["sizes"], results["middle"]
    largest = sizes[-1]
    used = {family: [usage(results, family, size) for size in sizes] for family in FAMILIES}
    found = [
        Claim.of(
            "FSQ uses nearly all of its codes, at every size",
            ", ".join(f"{min(part):.1%} of {size}" for part, size in zip(used["fsq"], sizes, strict=True)),
            "at least {:.0%}",
            at_least([share for part in used["fsq"] for share in part], USED),
        ),
        Claim.of(
            "VQ without restarts uses fewer codes than FSQ at the largest size, in every seed",
            f"{max(used['vq_plain'][-1]):.1%} against {min(used['fsq'][-1]):.1%} of {largest}",
            "fewer",
            ordered(used["vq_plain"][-1], used["fsq"][-1]),
        ),
        Claim.of(
            "VQ with restarts uses no more codes than FSQ, at every size",
            ", ".join(f"{max(part):.1%} of {size}" for part, size in zip(used["vq"], sizes, strict=True)),
            "at most FSQ's",
            at_most(
                [a - b for vq, fsq in zip(used["vq"], used["fsq"], strict=True) for a, b in zip(vq, fsq, strict=True)],
                0,
            ),
        ),
    ]
    for family in ("fsq", "vq"):
        found += prior_claims(results, family, middle)
    for family in ("fsq", "vq"):
        distortions = [of(results, family, size, "distortion") for size in sizes]
        found.append(
            Claim.of(
                f"{FAMILIES[family]}: more codes, less distortion, in every seed",
                listed([fmean(part) for part in distortions], ".1f") + f" nats at {listed(sizes, 'g')} codes",
                "in this order",
                ordered(*distortions[::-1]),
            )
        )
    errors = [[squared_error(d) for d in of(results, family, largest, "distortion")] for family in ("fsq", "vq")]
    found.append(
        Claim.of(
            f"FSQ reconstructs as well as VQ at {largest} codes",
            f"squared error {fmean(errors[0]):.2f} against {fmean(errors[1]):.2f}",
            "at most {:.0%} more",
            at_most([a / b - 1 for a, b in zip(*errors, strict=True)], NEAR),
        )
    )
    for under, family in product(CURVES, ("fsq", "vq")):
        apart = [gaps(results, family, size, under) for size in sizes]
        found.append(
            Claim.of(
                f"At the rate of {FAMILIES[family]}'s codes a {CURVES[under]} has the lower distortion, at every size",
                f"lower by {listed([fmean(part) for part in apart], '.1f')} nats at {listed(sizes, 'g')} codes",
                "above {:g}",
                above([gap for part in apart for gap in part], 0),
            )
        )
    return found


def prior_claims(results: dict, family: str, size: int) -> list[Claim]:
    name, exact = FAMILIES[family], PLACES * math.log(size)
    rates = {prior: of(results, family, size, "rate", prior) for prior in PRIORS}
    distortions = [of(results, family, size, "distortion", prior) for prior in PRIORS]
    moved = max(max(part) - min(part) for part in zip(*distortions, strict=True))
    return [
        Claim.of(
            f"{name}: under a uniform prior the rate is {PLACES} log {size}",
            f"{fmean(rates['uniform']):.4f} nats",
            f"{exact:.4f} within {{:g}}",
            at_most([abs(rate - exact) for rate in rates["uniform"]], EXACT),
        ),
        Claim.of(
            f"{name}: the prior moves the rate and leaves the distortion",
            f"distortions at most {moved:.4f} nats apart",
            "at most {:g}",
            at_most(moved, EXACT),
        ),
        Claim.of(
            f"{name}: a learned prior is cheaper than a uniform one, one that sees other codes cheaper still, in every seed",
            f"{listed([fmean(rates[prior]) for prior in PRIORS])} nats",
            "falling",
            ordered(rates["autoregressive"], rates["categorical"], rates["uniform"]),
        ),
    ]


def table(results: dict) -> Table:
    rows = []
    for name, points in results["points"].items():
        family, size, *prior = name.split("-")
        title = (
            f"{CURVES[family]}, beta = {size}" if family in CURVES else f"{FAMILIES[family]}, {size} codes, {prior[0]}"
        )
        numbers = [spread(values(points, key)) for key in ("rate", "distortion", "elbo")]
        errors = spread([squared_error(point["distortion"]) for point in points])
        used = (
            [spread(values(points, "perplexity"), 0), f"{fmean(usage_of(points, int(size))):.1%}"]
            if prior
            else ["", ""]
        )
        rows.append((title, *numbers, errors, *used))
    return Table(
        ("test images", "rate", "distortion", "ELBO", "squared error", "perplexity", "codes used"),
        rows,
        "Nats per image, mean ± sd over seeds; squared error summed over pixels",
    )


def usage_of(points: list[dict], size: int) -> list[float]:
    return [used / size for used in values(points, "codes_used")]
