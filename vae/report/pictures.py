"""The runs' pictures side by side, small enough that the page stays light."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vae.report.plots import curves_along
from vae.report.runs import Run
from vae.report.seeds import best_runs, replicates
from vae.report.sweep import Sweep
from vae.report.values import canonical, format_value, sort_key

TOTAL_BYTES = 4_500_000  # of all pictures of a page, before base64 adds a third
LARGEST, SMALLEST = 150_000, 12_000
WIDEST = 720  # pixels

_ABOUT = {
    "samples": "Images decoded from draws of the prior: what the model believes the data to look like.",
    "reconstructions": "Images that were not trained on, each above what the model makes of it.",
    "channel_traversals": "All places of one channel of the latent map a row, moved together while the others stand still.",
    "latent_maps": "Images that were not trained on, each before the channels of its latent map, 0 being half grey.",
    "kl_per_channel": "What each channel of the latent map carries, and below it where.",
    "traversals": "One latent dimension a row, moved through its range while the others stand still.",
    "latent_grid": "The two-dimensional latent space, decoded on a grid.",
    "latent_space": "Where the encoder puts images that were not trained on.",
    "kl_per_dimension": "What each latent dimension carries, in nats.",
}
_ORDER = list(_ABOUT)


@dataclass(frozen=True)
class Picture:
    """uri: a data: address, or None where the file cannot be read; pixelated: so small that it is enlarged."""

    run: Run
    caption: str
    uri: str | None
    pixelated: bool = False


@dataclass(frozen=True)
class Shelf:
    """One kind of picture of the runs of one data set. columns: the values of one swept key across, or () for no order;
    rows: a caption and, for each column, a picture or None."""

    data: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[Picture | None]]]


@dataclass(frozen=True)
class Gallery:
    kind: str
    title: str
    about: str
    shelves: list[Shelf]


def galleries(sweep: Sweep) -> list[Gallery]:
    """Every kind of picture that any run has, those everyone looks at first."""
    shown = chosen(sweep)
    present = {kind for run in shown for kind in run.pictures}
    kinds = sorted(present, key=lambda kind: (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind))
    total = sum(len(run.pictures) for run in shown)
    budget = min(LARGEST, max(SMALLEST, TOTAL_BYTES // max(total, 1)))
    found = []
    for kind in kinds:
        shelves = []
        for data in dict.fromkeys(run.data for run in shown):
            runs = [run for run in shown if run.data == data and kind in run.pictures]
            if runs:
                shelves.append(_shelf(sweep, data, runs, kind, budget))
        title = re.sub(r"\bkl\b", "KL", kind.replace("_", " "))
        found.append(Gallery(kind, title[:1].upper() + title[1:], _ABOUT.get(kind, ""), shelves))
    return found


def chosen(sweep: Sweep) -> list[Run]:
    """The runs whose pictures the page has room for, in order.

    All with pictures, where these fit. Otherwise one seed of each setting, or, of too many settings, as many as fit at
    equal distances in the sweep's order; with the best of each data set always among them.
    """
    runs = [run for run in sweep.runs if run.pictures]
    most = TOTAL_BYTES // SMALLEST
    if sum(len(run.pictures) for run in runs) <= most:
        return runs
    places = max(1, most // max(len(run.pictures) for run in runs))
    firsts = {id(group[0]) for group in replicates(sweep, runs)}
    best = {id(run) for data in sweep.data_sets for run in best_runs(sweep, data)[:1]}
    rest = [run for run in runs if id(run) in firsts and id(run) not in best]
    few = max(0, places - len(best))
    spaced = {id(rest[round(i * (len(rest) - 1) / max(few - 1, 1))]) for i in range(min(few, len(rest)))}
    return [run for run in runs if id(run) in spaced | best]


def _shelf(sweep: Sweep, data: str, runs: list[Run], kind: str, budget: int) -> Shelf:
    """A table with beta (or another swept number) across and the other settings down, where that fills most cells."""

    def picture(run: Run, caption: str) -> Picture:
        return Picture(run, caption, *inline(run.pictures[kind], budget))

    varying = [key for key in sweep.swept if len(sweep.values(key, runs)) > 1]
    numeric = [key for key in varying if key != sweep.latent_size and sweep.numeric(key)]
    across = sweep.beta if sweep.beta in varying else next(iter(numeric), None)
    if across is not None and 2 <= len(values := sweep.values(across, runs)) <= 8:
        rows: list[tuple[str, list[Picture | None]]] = []
        for curve in curves_along(sweep, runs, across)[0]:
            # (seed, how many before had it) -> value -> run: one seed a row, the same seed across
            cells: dict[tuple, dict[str, Run]] = {}
            for value, group in curve.points:
                for i, run in enumerate(group):
                    repeat = sum(canonical(other.seed) == canonical(run.seed) for other in group[:i])
                    cells.setdefault((sort_key(run.seed), repeat), {})[canonical(value)] = run
            for _, found in sorted(cells.items(), key=lambda item: item[0]):
                row = [found.get(canonical(value)) for value in values]
                pictures = [picture(run, sweep.describe(run)) if run else None for run in row]
                rows.append((_row_caption(sweep, curve.settings, next(iter(found.values()))), pictures))
        if len(rows) > 1 and sum(cell is not None for _, row in rows for cell in row) >= 0.6 * len(rows) * len(values):
            return Shelf(data, tuple(f"{sweep.label(across)} {format_value(value)}" for value in values), rows)
    return Shelf(data, (), [("", [picture(run, sweep.describe(run)) for run in runs])])


def _row_caption(sweep: Sweep, settings: dict[str, Any], run: Run) -> str:
    parts = [f"{sweep.label(key)} {format_value(value)}" for key, value in settings.items()]
    return ", ".join(parts + ([f"seed\u00a0{format_value(run.seed)}"] if sweep.seeds else []))


def inline(path: Path, budget: int) -> tuple[str | None, bool]:
    """The picture as a data: address of at most `budget` bytes before base64, and whether it is tiny."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            image = _flat(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None, False
    tiny = image.width <= 200
    image.thumbnail((WIDEST, 2 * WIDEST), Image.Resampling.LANCZOS)
    encoded, kind = _encode(image, "png"), "png"
    while len(encoded) > budget and min(image.size) > 48:
        if kind == "jpeg":  # too large even so
            shrink = max(0.4, min(0.85, 0.95 * math.sqrt(budget / len(encoded))))
            image = image.resize([max(1, round(side * shrink)) for side in image.size], Image.Resampling.LANCZOS)
        kind, encoded = "jpeg", _encode(image, "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}", tiny


def _flat(image: Any) -> Any:
    """Opaque, and grey where it can be: transparent pixels become white."""
    from PIL import Image

    if image.mode in ("1", "L", "I", "I;16"):
        return (
            image.convert("L") if image.mode in ("1", "L") else image.convert("I").point(lambda v: v / 257).convert("L")
        )
    rgba = image.convert("RGBA")
    flat = Image.new("RGB", image.size, "white")
    flat.paste(rgba, mask=rgba.getchannel("A"))
    red, green, blue = (channel.tobytes() for channel in flat.split())
    return flat.getchannel("R") if red == green == blue else flat


def _encode(image: Any, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 82} if kind == "jpeg" else {}))
    return out.getvalue()
