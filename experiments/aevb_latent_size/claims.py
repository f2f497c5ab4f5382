"""What is claimed of the bound as latents are added, beside the paper's figure and a reproduction of it."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from experiments.aevb_latent_size.protocol import COMPARED, PUBLISHED, TOLERANCE
from vae.claims import Claim, Table, above, below, listed, mean, ordered, spread, values, within


def of_size(results: dict[str, Any], size: int, key: str = "elbo") -> list[float]:
    """That of each seed; "gap" is the training ELBO less the test ELBO."""
    runs = results["runs"][str(size)]
    return [run["train_elbo"] - run["elbo"] for run in runs] if key == "gap" else values(runs, key)


def gain(results: dict[str, Any], small: int, large: int) -> tuple[float, str]:
    """What the larger latent space gains, in nats and in words."""
    by_seed = results["gains"][f"{small} -> {large}"]
    means, error = values(by_seed, "mean"), max(values(by_seed, "se"))
    if len(means) == 1:
        return means[0], f"{means[0]:+.2f} ± {error:.2f} nats (s.e., paired images); one seed"
    words = f"{fmean(means):+.2f} ± {stdev(means):.2f} nats (sd over seeds: {listed(means, '+.2f')}; "
    return fmean(means), f"{words}each ± {error:.2f}, s.e. over paired images)"


def sizes_of(results: dict[str, Any]) -> list[int]:
    return [int(size) for size in results["runs"]]


def claims(results: dict[str, Any]) -> list[Claim]:
    """Of means over seeds; the claims of the full form's length are made only there."""
    (far, far_words), (near, near_words), (none, none_words) = (gain(results, *sizes) for sizes in COMPARED)
    most, some = (fmean(of_size(results, size, "gap")) for size in (200, 20))
    held = [
        Claim.of("10 latents are far better than 3", far_words, "over {:g}", above(far, 15)),
        Claim.of("20 are better than 10", near_words, "over {:g}", above(near, 2)),
        Claim.of("200 are neither much better nor much worse than 20", none_words, "within {:g}", below(abs(none), 4)),
        Claim.of(
            "superfluous latents do not overfit: train less test ELBO at 200 is that at 20",
            f"{most:.2f} nats at 200, {some:.2f} at 20",
            "less than {:g} more",
            below(most - some, 1),
        ),
    ]
    if results["epochs"] < 300:
        return held
    sizes = sizes_of(results)
    in_order = ordered(*(of_size(results, size) for size in sizes))
    order = listed((fmean(of_size(results, size)) for size in sizes), between=" < ")
    held.append(Claim.of("every larger latent space is better, in every seed", order, "in this order", in_order))
    kinds = {f"{size} latents": (size, results["runs"][str(size)]) for size in sizes}
    if ablations := results.get("ablations"):
        size = ablations["size"]
        kinds |= {f"{size} latents, {title}": (size, [run]) for title, run in ablations["runs"].items()}
    return [*held, *(as_reproduced(f"-ELBO of {words}", *kind) for words, kind in kinds.items())]


def as_reproduced(name: str, size: int, runs: list[dict[str, Any]]) -> Claim:
    ours = -mean(runs, "elbo")
    return Claim.of(
        name, f"{ours:.2f} nats", "{1:.2f} within {0} nats", within(ours, TOLERANCE, PUBLISHED[size].others)
    )


def table(results: dict[str, Any]) -> Table:
    kinds = {str(size): (size, results["runs"][str(size)]) for size in sizes_of(results)}
    if ablations := results.get("ablations"):
        kinds |= {
            f"{ablations['size']}, {title}": (ablations["size"], [run]) for title, run in ablations["runs"].items()
        }
    rows = []
    for name, (size, runs) in kinds.items():
        published = PUBLISHED[size]
        rows.append(
            (
                name,
                published.paper,
                f"{published.others:.2f} ± {published.others_sd:.2f}",
                spread(-run["elbo"] for run in runs),
                spread(values(runs, "rate")),
                spread(values(runs, "active_units"), 0),
                spread(run["train_elbo"] - run["elbo"] for run in runs),
            )
        )
    columns = (
        "N_z",
        "paper: -ELBO (recalled)",
        "reproduction: -ELBO",
        "ours: -ELBO",
        "of it KL",
        "active units",
        "train less test ELBO",
    )
    number = len(next(iter(results["runs"].values())))
    seeds = f"mean ± sd over {number} seeds" if number > 1 else "one seed"
    seeds += ", one where a change is named" if ablations and number > 1 else ""
    return Table(columns, rows, f"Nats a test image; ours after {results['epochs']} epochs, {seeds}")
