"""Kingma & Welling 2014, figure 2: the lower bound on MNIST as the latent space grows from 3 to 200 dimensions.

One network, 784-500-N_z with tanh, on one fixed binary draw of MNIST. More latents explain more, until they are
superfluous; and the superfluous ones cost nothing, on images that were not trained on either.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vae.engine.folder import read_config, read_metrics, read_status
from vae.engine.run import load
from vae.experiment import Claim, Context, Table, spread
from vae.seeding import generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vae.data.module import ImageDataModule
    from vae.model import VAE

PAPER = 'Kingma & Welling 2014, "Auto-encoding variational Bayes", figure 2'
CLAIM = "The lower bound rises with the number of latents up to 20, and 200 of them, most superfluous, do not overfit."

SETTINGS = {
    "quick": {"sizes": [3, 10, 20, 200], "seeds": [0]},
    "full": {
        "sizes": [3, 5, 10, 20, 200],
        "seeds": [0, 1, 2],
        "ablations": {  # towards the reproduction's protocol, to see which difference the bound comes from
            "size": 20,
            "seed": 0,
            "changes": {
                "step 0.01": ["optimizer.lr=0.01"],
                "step 0.01, decoder from 1/2": ["optimizer.lr=0.01", "model.output_bias_from_data=false"],
            },
        },
    },
}


class Published(NamedTuple):
    """-ELBO in nats: read off the paper's figure (as recalled, unconfirmed); a reproduction's, of 3 seeds and 1.8e7 images."""

    paper: str
    others: float
    others_sd: float


PUBLISHED = {
    3: Published("~140", 141.30, 0.40),
    5: Published("~122", 124.41, 0.37),
    10: Published("~107", 107.57, 0.17),
    20: Published("~102", 100.61, 0.71),
    200: Published("~100", 99.23, 0.04),
}
PUBLISHED_AT = 1.8e7  # training images seen
COMPARED = [(3, 10), (10, 20), (20, 200)]
TOLERANCE = 1.5  # nats from the reproduction's, at its length


# --- measuring ------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    size: int
    seed: int
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return ",".join(
            [f"nz={self.size}", *(change.partition(".")[2] for change in self.changes), f"seed={self.seed}"]
        )

    @property
    def overrides(self) -> list[str]:
        return [f"model.latent_dim={self.size}", *self.changes, f"seed={self.seed}"]


def measure(context: Context) -> dict[str, Any]:
    """A seed that was measured is kept as it is when others are added, though its runs be gone."""
    settings, seeds = context.settings, context.settings["seeds"]
    context.stamp = {**context.stamp, "settings": {"sizes": settings["sizes"]}}  # whatever other seeds there are
    pieces = {f"seed={seed}": [Run(size, seed) for size in settings["sizes"]] for seed in seeds}
    if ablations := settings.get("ablations"):
        changed = [Run(ablations["size"], ablations["seed"], tuple(c)) for c in ablations["changes"].values()]
        pieces |= {run.name: [run] for run in changed}
    missing = [run for piece, runs in pieces.items() if not context.measured(piece) for run in runs]
    config = "experiment=aevb_latent_size" + "_quick" * context.quick
    folders = context.train_many(  # the widest, which take longest, first
        {run.name: [config, *run.overrides] for run in sorted(missing, reverse=True)}
    )
    found = context.cached_many(
        {
            piece: functools.partial(measure_runs, {run.size: folders.get(run.name) for run in runs})
            for piece, runs in pieces.items()
        }
    )
    of_seeds = [found[f"seed={seed}"] for seed in seeds]
    results = {
        "runs": {str(size): [piece["runs"][str(size)] for piece in of_seeds] for size in settings["sizes"]},
        "gains": {name: [piece["gains"][name] for piece in of_seeds] for name in of_seeds[0]["gains"]},
        "epochs": of_seeds[0]["epochs"],
    }
    if ablations:
        runs = dict(zip(ablations["changes"], (found[run.name]["runs"][str(run.size)] for run in changed), strict=True))
        for run in runs.values():
            run.pop("curve", None)  # not drawn
        results["ablations"] = {"size": ablations["size"], "runs": runs}
    return results


def measure_runs(folders: dict[int, Path]) -> dict[str, Any]:
    """Of runs with one seed, by latent size: each, and what the larger latent space gains on the same images."""
    found = {size: measure_run(folder) for size, folder in folders.items()}
    elbos = {size: run.pop("elbo_of_images") for size, run in found.items()}
    pairs = [(small, large) for small, large in COMPARED if {small, large} <= elbos.keys()]
    return {
        "runs": found,
        "gains": {f"{small} -> {large}": paired(elbos[large] - elbos[small]) for small, large in pairs},
        "epochs": read_config(next(iter(folders.values()))).trainer.max_epochs,
    }


def measure_run(folder: Path) -> dict[str, Any]:
    """The bound on every test image and on all that were trained on, with the best weights; and the way there."""
    config, data, module = load(folder)
    test, train = (of_images(module.vae, data, split) for split in ("test", "train"))
    metrics = read_metrics(folder)
    return {
        "elbo": test.mean(),
        "train_elbo": train.mean(),
        "rate": metrics["test/rate"],
        "active_units": metrics["test/active_units"],
        "best_epoch": metrics["val/best_epoch"] + 1,
        "seconds": read_status(folder)["seconds"],
        "curve": curve(folder, config.data.batch_size),
        "elbo_of_images": test,
    }


@torch.no_grad()
def of_images(vae: VAE, data: ImageDataModule, split: str) -> Tensor:
    """The ELBO of each image with one z, the draws being those of `vae.evaluate`: alike for every model."""
    data.test_split = split
    parts = []
    for batch in (data.prepare(batch, training=False) for batch in data.test_dataloader()):
        out = vae(batch.x, generator(batch.seed, "z"))
        parts.append(-(out.distortion + out.rate).double())
    return torch.cat(parts)


def curve(folder: Path, batch_size: int) -> dict[str, list[float]]:
    """ELBO after so many training images: of the validation split, and the mean over the epoch that ends there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    # a run that was cut off writes some steps twice, with the same values
    kept = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in ("val/elbo", "train/elbo")}
    at = sorted(set.intersection(*map(set, kept.values())))
    if len(at) > 100:  # enough for a picture
        at = sorted(
            {min(at, key=lambda step: abs(math.log((step + 1) / want))) for want in log_grid(at[0] + 1, at[-1] + 1)}
        )
    return {
        "images": [(step + 1) * batch_size for step in at],
        "validation": [round(kept["val/elbo"][step], 2) for step in at],
        "train": [round(kept["train/elbo"][step], 2) for step in at],
    }


def log_grid(first: float, last: float, points: int = 100) -> Iterator[float]:
    """From first to last, evenly in the logarithm."""
    return (first * (last / first) ** (i / (points - 1)) for i in range(points))


def paired(differences: Tensor) -> dict[str, float]:
    """The mean of differences on the same images, and its standard error."""
    return {"mean": differences.mean().item(), "se": differences.std().item() / math.sqrt(len(differences))}


# --- what the results say -------------------------------------------------------------------------------------------


def mean(results: dict[str, Any], size: int, key: str = "elbo") -> float:
    return statistics.fmean(run[key] for run in results["runs"][str(size)])


def gap(results: dict[str, Any], size: int) -> float:
    """Training ELBO less test ELBO, a mean over seeds."""
    return mean(results, size, "train_elbo") - mean(results, size)


def differences(results: dict[str, Any], small: int, large: int) -> list[float]:
    """What the larger latent space gains, seed by seed."""
    pairs = zip(results["runs"][str(small)], results["runs"][str(large)], strict=True)
    return [b["elbo"] - a["elbo"] for a, b in pairs]


def gain(results: dict[str, Any], small: int, large: int) -> tuple[float, str]:
    """What the larger latent space gains, in nats and in words."""
    by_seed = results["gains"][f"{small} -> {large}"]
    means, error = [found["mean"] for found in by_seed], max(found["se"] for found in by_seed)
    if len(means) == 1:
        return means[0], f"{means[0]:+.2f} ± {error:.2f} nats (s.e., paired images); one seed"
    words = f"{statistics.fmean(means):+.2f} ± {statistics.stdev(means):.2f} nats (sd over seeds: "
    each = ", ".join(f"{value:+.2f}" for value in means)
    return statistics.fmean(means), f"{words}{each}; each ± {error:.2f}, s.e. over paired images)"


def sizes_of(results: dict[str, Any]) -> list[int]:
    return [int(size) for size in results["runs"]]


def claims(results: dict[str, Any]) -> list[Claim]:
    """Of means over seeds; the claims of the full form's length are made only there."""
    (far, far_words), (near, near_words), (none, none_words) = (gain(results, *sizes) for sizes in COMPARED)
    held = [
        Claim("10 latents are far better than 3", far > 15, far_words, "over 15"),
        Claim("20 are better than 10", near > 2, near_words, "over 2"),
        Claim("200 are neither much better nor much worse than 20", abs(none) < 4, none_words, "within 4"),
        Claim(
            "superfluous latents do not overfit: train less test ELBO at 200 is that at 20",
            gap(results, 200) - gap(results, 20) < 1,
            f"{gap(results, 200):.2f} nats at 200, {gap(results, 20):.2f} at 20",
            "less than 1 more",
        ),
    ]
    if results["epochs"] < 300:
        return held
    sizes = sizes_of(results)
    in_order = all(difference > 0 for pair in pairwise(sizes) for difference in differences(results, *pair))
    order = " < ".join(f"{mean(results, size):.2f}" for size in sizes)
    held.append(Claim("every larger latent space is better, in every seed", in_order, order, "in this order"))
    held += [as_reproduced(f"-ELBO of {size} latents", size, results["runs"][str(size)]) for size in sizes]
    if ablations := results.get("ablations"):
        size = ablations["size"]
        held += [
            as_reproduced(f"-ELBO of {size} latents, {title}", size, [run]) for title, run in ablations["runs"].items()
        ]
    return held


def as_reproduced(name: str, size: int, runs: list[dict[str, Any]]) -> Claim:
    ours, theirs = -statistics.fmean(run["elbo"] for run in runs), PUBLISHED[size].others
    return Claim(name, abs(ours - theirs) <= TOLERANCE, f"{ours:.2f} nats", f"{theirs:.2f} within {TOLERANCE} nats")


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
                spread(run["rate"] for run in runs),
                spread((run["active_units"] for run in runs), 0),
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


# --- picture --------------------------------------------------------------------------------------------------------

COLOURS = {3: "#b98600", 5: "#b3589a", 10: "#d55e00", 20: "#009e73", 200: "#0072b2"}


def figure(results: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    picture, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=[2.1, 1])
    draw_curves(left, results)
    draw_gaps(right, results)
    return picture


def draw_curves(ax: Axes, results: dict[str, Any]) -> None:
    for size in sizes_of(results):
        for number, run in enumerate(results["runs"][str(size)]):
            kept, colour = run["curve"], COLOURS[size]
            ax.plot(kept["images"], kept["train"], color=colour, lw=0.9, ls=(0, (3, 2)), alpha=0.8)
            ax.plot(kept["images"], kept["validation"], color=colour, lw=1.6, alpha=1 if number == 0 else 0.5)
            ax.plot(kept["images"][-1], run["elbo"], "o", color=colour, ms=4.5, zorder=3)
        ax.plot(PUBLISHED_AT, -PUBLISHED[size].others, "D", color=COLOURS[size], mfc="white", ms=6, mew=1.5, zorder=3)
    ends = {size: -PUBLISHED[size].others for size in sizes_of(results)}
    for size, y in ends.items():
        nudge = {20: -1.3, 200: 1.3}.get(size, 0.0) if {20, 200} <= ends.keys() else 0.0
        ax.text(PUBLISHED_AT * 1.25, y + nudge, f"$N_z$ = {size}", color=COLOURS[size], va="center")
    dark = "#1d2127"
    for style, words in (
        ({"lw": 1.6}, "held out (validation images)"),
        ({"lw": 0.9, "ls": (0, (3, 2))}, "training, mean over each epoch"),
        ({"lw": 0, "marker": "o", "ms": 4.5}, "test images, at the end"),
        ({"lw": 0, "marker": "D", "mfc": "white", "ms": 6, "mew": 1.5}, "test, reproduction after 300 epochs"),
    ):
        ax.plot([], [], color=dark, label=words, **style)
    ax.legend(loc="lower right", fontsize=8)
    ax.set(
        xscale="log",
        xlim=(4.5e4, PUBLISHED_AT * 3.2),
        ylim=(-172, -94),
        xlabel="training images seen",
        ylabel="ELBO (nats an image)",
        title="The lower bound, by number of latents",
    )


def draw_gaps(ax: Axes, results: dict[str, Any]) -> None:
    sizes = sizes_of(results)
    for place, size in enumerate(sizes):
        ax.bar(place, gap(results, size), color=COLOURS[size], width=0.6)
        runs = results["runs"][str(size)]
        gaps = [run["train_elbo"] - run["elbo"] for run in runs]
        if len(gaps) > 1:
            ax.plot([place] * len(gaps), gaps, ".", color="#1d2127", ms=5, zorder=3)
        active = statistics.fmean(run["active_units"] for run in runs)
        ax.annotate(
            f"{active:.0f} active",
            (place, max(0.0, *gaps)),
            (0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    ax.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    ax.grid(axis="x", visible=False)
    ax.axhline(0, color="#667080", lw=0.8)
    ax.margins(y=0.15)
    ax.set(
        xlabel="latents, $N_z$",
        ylabel="train less test ELBO (nats an image)",
        title="Overfitting, by number of latents",
    )
