"""What is claimed of the VampPrior, beside the published gains."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from experiments.priors.protocol import NAMES, OPTION, PLAIN, PUBLISHED, TITLES, VAMP
from vae.claims import Claim, Gain, Table, above, ordered, spread, within

LONG = 100  # epochs from which absolute numbers are claimed


def claims(results: dict[str, Any]) -> list[Claim]:
    """The thresholds were chosen before the test split was looked at; absolute numbers are claimed of long training only."""
    made = []
    for data, of_prior in results["data"].items():
        found, least = Gain.of(of_prior, PLAIN, VAMP), 1.0 if data == "mnist" else 0.0
        plain, vamp = (of_prior[prior]["marginal_kl"] for prior in (PLAIN, VAMP))
        made += [
            Claim.of(
                f"{TITLES[data]}: the VampPrior is better than N(0, I)",
                str(found),
                ("at least {0:.0f}, " if least else "")
                + f"over {{1:g}} s.e., in every seed (paper: {difference(data):.2f})",
                found.exceeds(least, 3),
                above(found.seeds, 0),
            ),
            Claim.of(
                f"{TITLES[data]}: it is nearer to the aggregate posterior",
                f"KL(q(z) || p(z)) {spread(plain)} -> {spread(vamp)} nats",
                "less, in every seed",
                ordered(vamp, plain),
            ),
        ]
        if results["protocol"]["epochs"] >= LONG:
            ours, name = fmean(of_prior[PLAIN]["nll"]), f"{TITLES[data]}: NLL under N(0, I)"
            bound = within(ours, 4, published(data, PLAIN))
            made.append(Claim.of(name, f"{ours:.2f} nats", "{1:.2f} within {0:g}", bound))
    return made


def published(data: str, prior: str) -> float:
    return float(PUBLISHED[data][prior].split()[0])


def difference(data: str) -> float:
    """The published gain of the VampPrior over N(0, I)."""
    return published(data, PLAIN) - published(data, VAMP)


def title(prior: str, protocol: dict[str, Any]) -> str:
    components = protocol["priors"][prior]
    return NAMES[prior] + (f", {components}" if prior in OPTION else "")


def table(results: dict[str, Any]) -> Table:
    protocol, rows = results["protocol"], []
    for data, of_prior in results["data"].items():
        for prior, found in of_prior.items():
            better = spread(Gain.of(of_prior, PLAIN, prior).seeds) if prior != PLAIN else ""
            rows.append(
                (
                    f"{TITLES[data]}, {title(prior, protocol)}",
                    PUBLISHED[data].get(prior, "-"),
                    *(spread(found[key]) for key in ("nll", "distortion", "rate", "marginal_kl")),
                    better,
                )
            )
    columns = ("", "paper: NLL", "ours: NLL", "distortion", "rate", "of it KL(q(z) || p(z))", "gain over N(0, I)")
    words = (
        f"Nats a test image, mean ± sd over {len(protocol['seeds'])} seeds; ours after {protocol['epochs']} epochs, "
        f"NLL = -L_{protocol['samples']} of {protocol['images']} images"
    )
    return Table(columns, rows, words)
