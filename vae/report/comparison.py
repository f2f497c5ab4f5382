"""What the runs of one sweep gained or lost against those of another: paired differences with their intervals."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from vae.report.intervals import Interval, over_images, over_seeds
from vae.report.keys import leaf
from vae.report.pairing import LETTERS, Row, Sides, differing, unpaired
from vae.report.per_image import read_per_image
from vae.report.runs import Run
from vae.report.seeds import mean
from vae.report.tables import Measured, count, csv_cell, csv_word, measured

ABSENT, NOT_KEPT, OTHER_IMAGES, OTHER_NUMBERS = "absent", "not kept", "other images", "other numbers"
_IMAGES = ("data.limit", "data.split_seed", "data.binarize", "data.source")


@dataclass(frozen=True)
class Difference:
    """Of one metric over paired runs. first, second: the means in the two sweeps; value: second - first; seeds: how many."""

    first: float
    second: float
    value: float
    seeds: int
    over_seeds: Interval | None
    over_images: Interval | None


@dataclass
class Block:
    """One sweep against the first, on one data set. rows: a setting's metrics by name; overall: the mean over settings,
    of the seeds that all of them have."""

    data: str
    other: int
    rows: list[tuple[Row, dict[str, Difference]]]
    overall: dict[str, Difference] = field(default_factory=dict)
    overall_seeds: int = 0


@dataclass
class Comparison:
    """metrics: in the order in which they are shown; lost: why images' intervals were left out, of how many pairs."""

    sides: Sides
    metrics: list[Measured]
    blocks: list[Block]
    lost: Counter[tuple[int, str]]
    notes: list[str]

    @property
    def equal(self) -> bool:
        """Whether every difference is exactly zero."""
        return all(d.value == 0 for block in self.blocks for _, found in block.rows for d in found.values())


def compare(sides: Sides) -> Comparison:
    """Every sweep against the first, setting by setting, on each data set that both have."""
    metrics = measured(sides.pool)
    blocks, lost = [], Counter[tuple[int, str]]()
    for other in range(1, len(sides.sweeps)):
        rows = sides.compared(other)
        for data in dict.fromkeys(row.data for row in rows):
            blocks.append(_block(sides, other, [row for row in rows if row.data == data], metrics, lost))
    return Comparison(sides, metrics, blocks, lost, _notes(sides, blocks, metrics, lost))


def _block(sides: Sides, other: int, rows: list[Row], metrics: list[Measured], lost: Counter) -> Block:
    everywhere = [seed for seed in rows[0].seeds(other) if all(seed in row.seeds(other) for row in rows)]
    block = Block(rows[0].data, other, [], overall_seeds=len(everywhere))
    images = {metric.name: ImageMeans() for metric in metrics}
    for row in rows:
        pairs, split = row.pairs(other), sides.pool.split
        arrays = [tuple(_of_images(run, split) for run in pair) for pair in pairs]
        chosen = [i for i, seed in enumerate(row.seeds(other)) if seed in everywhere]
        found = {}
        for metric in metrics:
            values = [[run.metrics.get(f"{split}/{metric.name}", math.nan) for run in pair] for pair in pairs]
            if not all(f"{split}/{metric.name}" in run.metrics for pair in pairs for run in pair):
                continue
            each = [_difference_of_images(pair, of, metric.name) for pair, of in zip(arrays, values, strict=True)]
            for problem in each if metric.name == "elbo" else ():
                if isinstance(problem, str):
                    lost[other, problem] += 1
            kept = [one for one in each if not isinstance(one, str)]
            whole = len(kept) == len(each) and len({str(a["images"]) for a, _ in arrays}) == 1
            found[metric.name] = _difference(values, over_images(np.mean(kept, axis=0)) if whole else None)
            if whole and chosen:
                images[metric.name].add(np.mean([kept[i] for i in chosen], axis=0), str(arrays[0][0]["images"]))
        block.rows.append((row, found))
    if len(rows) > 1 and everywhere:
        for metric in metrics:
            if all(metric.name in found for _, found in block.rows):
                block.overall[metric.name] = _overall(sides, block, everywhere, metric.name, images[metric.name])
    return block


class ImageMeans:
    """The mean over settings of each image's difference, as long as all settings are of the same images."""

    def __init__(self) -> None:
        self.total, self.settings, self.digest = np.zeros(0), 0, ""

    def add(self, differences: np.ndarray, digest: str) -> None:
        if digest == self.digest or not self.digest:
            self.total = self.total + differences if self.settings else differences
            self.settings, self.digest = self.settings + 1, digest


def _overall(sides: Sides, block: Block, seeds: list[str], name: str, images: ImageMeans) -> Difference:
    """The mean over settings: each seed's mean over them is one difference, and so is each image's."""
    key, rows = f"{sides.pool.split}/{name}", [row for row, _ in block.rows]
    values = [
        [mean([row.runs[side][seed].metrics[key] for row in rows]) for side in (0, block.other)] for seed in seeds
    ]
    whole = images.settings == len(rows)
    return _difference(values, over_images(images.total / images.settings) if whole else None)


def _difference(values: list[list[float]], images: Interval | None) -> Difference:
    """Of pairs (first, second), one for each seed."""
    differences = [second - first for first, second in values]
    first, second = (mean([pair[side] for pair in values]) for side in (0, 1))
    return Difference(first, second, mean(differences), len(values), over_seeds(differences), images)


# ---- images ----


def _of_images(run: Run, split: str) -> dict[str, np.ndarray]:
    """A run's per-image numbers, with distortion, which follows from the other two."""
    found = read_per_image(run.folder, split)
    for given in ("", "_given_label"):
        if {f"elbo{given}", f"rate{given}"} <= found.keys():
            elbo, rate = (found[f"{name}{given}"].astype(np.float64) for name in ("elbo", "rate"))
            found[f"distortion{given}"] = -elbo - rate
    return found


def _difference_of_images(pair: tuple[dict[str, np.ndarray], ...], values: list[float], name: str) -> np.ndarray | str:
    """second - first of each image, (images,) in nats, or why there is none."""
    if not all(pair):
        return ABSENT
    if any(name not in one for one in pair):  # a number of the whole split, as the active units are
        return NOT_KEPT
    first, second = pair
    if str(first["images"]) != str(second["images"]) or first[name].shape != second[name].shape:
        return OTHER_IMAGES
    for one, value in zip(pair, values, strict=True):
        if not math.isclose(one[name].astype(np.float64).mean(), value, rel_tol=1e-5, abs_tol=1e-4):
            return OTHER_NUMBERS
    return second[name].astype(np.float64) - first[name].astype(np.float64)


# ---- what has to be said ----


def _notes(sides: Sides, blocks: list[Block], metrics: list[Measured], lost: Counter) -> list[str]:
    notes = []
    for other in range(1, len(sides.sweeps)):
        letter = LETTERS[other]
        mine = [block for block in blocks if block.other == other]
        if not mine:
            notes.append(f"{letter} has no setting and seed in common with A: see below.")
            continue
        numbers = sorted({len(row.seeds(other)) for row in sides.compared(other)})
        if numbers == [1]:
            notes.append(f"{letter} and A share one seed in each setting: one difference has no interval over seeds.")
        elif len(numbers) > 1:
            few = sum(len(row.seeds(other)) == 1 for row in sides.compared(other))
            alone = (
                f"; {count(few, 'setting')} with one {'have' if few > 1 else 'has'} no interval over seeds"
                if few
                else ""
            )
            notes.append(
                f"Seeds differ in number: settings that {letter} and A share have {numbers[0]} to {numbers[-1]} seeds in "
                f"common{alone}. Means over settings are of the seeds that all have."
            )
        notes += _lost_images(other, lost, sum(len(row.seeds(other)) for row in sides.compared(other)))
        bounds = [
            {n for s in (0, other) for n in _bounds(sides, s)},
            set(_bounds(sides, 0)) & set(_bounds(sides, other)),
        ]
        if bounds[0] - bounds[1]:
            said = [", ".join(sorted(_bounds(sides, s))) or "none" for s in (0, other)]
            notes.append(
                f"Bounds of different K do not compare: A has {said[0]} and {letter} {said[1]}. `python -m vae.evaluate "
                "run=FOLDER nll_samples=K` measures another, and keeps it in evaluation-SPLIT.json, not in a report."
            )
    notes += [
        f"{LETTERS[side]} has {count(n, 'run')} with the settings and seed of another: the first of each is compared."
        for side, n in enumerate(sides.repeats)
        if n
    ]
    images = [key for key, _ in differing(sides) if key.startswith(_IMAGES) and leaf(key) != "root"]
    if images:
        notes.append(
            f"{', '.join(images)} {'differs' if len(images) == 1 else 'differ'} between the sweeps, so that their test "
            "images may: a difference may be one of images."
        )
    return notes


def _bounds(sides: Sides, side: int) -> set[str]:
    prefix = f"{sides.pool.split}/nll_iw"
    keys = {key for run in sides.sweeps[side].finished for key in run.metrics if key.startswith(prefix)}
    return {f"K={key.removeprefix(prefix)}" for key in keys if key.removeprefix(prefix).isdecimal()}


def _lost_images(other: int, lost: Counter, pairs: int) -> list[str]:
    letter, notes = LETTERS[other], []
    if n := lost[other, ABSENT]:
        notes.append(
            f"{n} of {count(pairs, 'pair')} of runs of A and {letter} lack per-image numbers, as runs of earlier versions do, "
            "and so have an interval over seeds only: `python -m vae.evaluate run=FOLDER` writes them."
        )
    if n := lost[other, OTHER_IMAGES]:
        notes.append(
            f"{n} of {count(pairs, 'pair')} of runs of A and {letter} were measured on other images than each other: there is "
            "no interval over images, and a difference may be one of images."
        )
    if n := lost[other, OTHER_NUMBERS]:
        notes.append(
            f"In {n} of {count(pairs, 'pair')} of runs of A and {letter} the per-image numbers are not those that metrics.json "
            "is the mean of (measured on another device, or of other weights): there is no interval over images."
        )
    return notes


# ---- all numbers ----


def differences_csv(comparison: Comparison) -> str:
    """One line per setting, sweep and metric: the means, the difference and both intervals, in full precision."""
    sides, out = comparison.sides, io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    ends = ["seeds_low", "seeds_high", "n_images", "images_low", "images_high"]
    header = ["against", "data", *sides.pool.swept, "metric", "n_seeds", "first", "second", "difference", *ends]
    writer.writerow(map(csv_word, header))
    for block in comparison.blocks:
        for row, found in block.rows:
            settings = [row.settings[key] for key in sides.pool.swept]
            for name, d in found.items():
                seeds = [d.over_seeds.low, d.over_seeds.high] if d.over_seeds else [None, None]
                images = [d.over_images.n, d.over_images.low, d.over_images.high] if d.over_images else [None] * 3
                numbers = [d.seeds, d.first, d.second, d.value, *seeds, *images]
                words = [csv_word(sides.name(block.other)), csv_word(row.data)]
                writer.writerow([*words, *map(csv_cell, settings), csv_word(name), *map(csv_cell, numbers)])
    return out.getvalue()


def left_over(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    """(sweep's letter, setting, seeds, why) of every run without one like it, each once."""
    others = range(1, len(comparison.sides.sweeps))
    return list(dict.fromkeys(entry for other in others for entry in unpaired(comparison.sides, other)))
