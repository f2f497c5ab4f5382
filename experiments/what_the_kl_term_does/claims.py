"""What is claimed of four weights on the KL, in every seed."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from experiments.what_the_kl_term_does.protocol import NUMBERS
from vae.claims import Bound, Claim, Table, above, ordered, spread

if TYPE_CHECKING:
    from collections.abc import Sequence


def of_seeds(results: dict[str, Any], beta: str, key: str) -> list[float]:
    """Of the Frechet distances by the name of what was decoded."""
    return [run[key] if key in run else run["frechet"][key] for run in results["runs"][beta]]


def claims(results: dict[str, Any]) -> list[Claim]:
    """In every seed, not of means alone."""
    betas = list(results["runs"])
    falling, heavy = betas[::-1], betas[-1]

    def words(key: str, digits: int, chosen: Sequence[str] = betas) -> str:
        return ", ".join(f"{spread(of_seeds(results, beta, key), digits)} (β = {beta})" for beta in chosen)

    def rising(key: str, *orders: Sequence[str]) -> list[Bound]:
        return [ordered(*(of_seeds(results, beta, key) for beta in order)) for order in orders]

    def far(name: str, key: str) -> Claim:
        ratio = min(a / b for a, b in zip(*(of_seeds(results, beta, key) for beta in ("0", "1")), strict=True))
        measured = f"{ratio:.0f} times as far as at β = 1 (the least of the seeds)"
        return Claim.of(name, measured, "more than {:g} times", above(ratio, 10))

    return [
        Claim.of(
            "the autoencoder reconstructs best",
            words("distortion", 1) + " nats",
            "the least distortion at β = 0",
            *rising("distortion", *(["0", beta] for beta in betas[1:])),
        ),
        Claim.of(
            "its prior samples are worse than the VAE's",
            "Frechet distance " + words("prior", 1, betas[:2]),
            "more at β = 0 than at 1",
            *rising("prior", ["1", "0"]),
        ),
        Claim.of(
            "the VAE's prior samples are the best",
            "Frechet distance " + words("prior", 1),
            "the least at β = 1",
            *rising("prior", *(["1", beta] for beta in betas if beta != "1")),
        ),
        far("without the KL, the aggregate posterior's moments are far from the prior's", "moment_kl"),
        far("and so is the mixture over the test images", "marginal_kl"),
        Claim.of(
            "KL(q(z) || p(z)) falls as β rises",
            words("marginal_kl", 2) + " nats",
            "in this order",
            *rising("marginal_kl", falling),
        ),
        Claim.of(
            "and so does the KL of its moments alone",
            words("moment_kl", 3) + " nats",
            "in this order",
            *rising("moment_kl", falling),
        ),
        Claim.of(
            f"β = {heavy} switches latents off",
            words("active_units", 1) + f" of {NUMBERS} active",
            f"fewer at β = {heavy} than at 1",
            *rising("active_units", [heavy, "1"]),
        ),
        Claim.of(
            "each step up in β costs reconstruction",
            words("distortion", 1) + " nats",
            "in this order",
            *rising("distortion", betas),
        ),
    ]


def table(results: dict[str, Any]) -> Table:
    columns = (
        "β",
        "distortion",
        "rate",
        "active units",
        "KL(q(z) || p(z))",
        "KL of its moments",
        "Frechet: prior",
        "fitted Gaussian",
        "aggregate posterior",
        "2 latents: prior's mass where q(z) < p(z)/10",
    )
    keys = {
        "distortion": 1,
        "rate": 1,
        "active_units": 1,
        "marginal_kl": 2,
        "moment_kl": 3,
        "prior": 1,
        "fitted Gaussian": 1,
        "aggregate posterior": 1,
    }
    rows = [
        (
            beta,
            *(spread(of_seeds(results, beta, key), digits) for key, digits in keys.items()),
            f"{100 * results['maps'][beta]['empty']:.1f} %",
        )
        for beta in results["runs"]
    ]
    first = results["runs"]["1"]
    floor = statistics.fmean(of_seeds(results, "1", "training images"))
    return Table(
        columns,
        rows,
        f"{NUMBERS} latents, {results['epochs']} epochs, {len(first)} seed{'s' * (len(first) > 1)}; nats a test image; "
        f"the Frechet distance of training images is {floor:.2f}",
    )
