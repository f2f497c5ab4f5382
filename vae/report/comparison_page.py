"""A comparison -> a page, a CSV and, in the terminal, the table of differences."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import warnings
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from vae.errors import VAEError
from vae.files import write_atomically, write_text
from vae.report.comparison import Block, Comparison, Difference, differences_csv, left_over
from vae.report.drawing import GRID, INK, MUTED, NAMES, STYLE, Plot, as_plot, new_figure, short
from vae.report.intervals import Interval
from vae.report.pairing import LETTERS, Row, differing
from vae.report.tables import Measured, count, nats, tally
from vae.report.values import format_value, is_number, printable

if TYPE_CHECKING:
    from rich.console import Console

_HERE = Path(__file__).parent
MOST_DRAWN = 60  # settings of a plot
MOST_LISTED = 200  # entries of what is in one sweep only


def write_comparison(comparison: Comparison, out: str | Path | None = None) -> Path:
    """Write index.html, differences.csv and plots/*.png to `out`, by default FIRST/report/against/OTHER; return the page.

    Each file is whole or not written, the page last. Raises VAEError if it cannot be written.
    """
    sides = comparison.sides
    names = "+".join(sides.name(side) for side in range(1, len(sides.sweeps)))
    folder = sides.sweeps[0].folder / "report" / "against" / re.sub(r"[^\w.,=+-]+", "_", names)[:150]
    folder = folder if out is None else Path(out)
    plots = draw(comparison)
    try:
        drawn = {folder / "plots" / f"{plot.name}.png": plot for group in plots for plot in group}
        for path, plot in drawn.items():
            write_atomically(path, partial(_write_png, plot))
        for stale in set((folder / "plots").glob("*.png")) - set(drawn):
            stale.unlink()
        write_text(folder / "differences.csv", differences_csv(comparison))
        write_text(folder / "index.html", render(comparison, plots))
    except OSError as error:
        raise VAEError(f"The report cannot be written to {str(folder)!r}: {error.strerror or error}.") from error
    return folder / "index.html"


def _write_png(plot: Plot, file: IO[bytes]) -> None:
    file.write(plot.png)


def render(comparison: Comparison, plots: list[list[Plot]]) -> str:
    """The page. Everything that comes from configs, names and files is escaped; only our own script may run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    sides, left = comparison.sides, left_over(comparison)
    return environment.get_template("comparison.html.j2").render(
        it=comparison,
        sides=sides,
        pool=sides.pool,
        letters=LETTERS,
        names=[printable(sides.name(side)) for side in range(len(sides.sweeps))],
        folders=[printable(str(sweep.folder)) for sweep in sides.sweeps],
        tallies=[tally(sweep) for sweep in sides.sweeps],
        headlines=headlines(comparison),
        differing=differing(sides),
        shown=shown,
        signed=signed,
        interval=interval,
        verdict=verdict,
        number=_number,
        word=format_value,
        is_number=is_number,
        left=left[:MOST_LISTED],
        more=len(left) - MOST_LISTED,
        plots=plots,
        images=max((d.over_images.n for _, _, d in _every(comparison) if d.over_images), default=0),
        seeds=max((d.seeds for _, _, d in _every(comparison)), default=0),
        counted=sum(len(block.rows) for block in comparison.blocks),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        count=count,
        nats=nats,
        printable=printable,
    )


# ---- words ----


def shown(comparison: Comparison, block: Block, key: bool) -> list[Measured]:
    """The metrics that a block has a difference of: ELBO and bounds first (key), or the others that everyone reads."""
    there = {name for _, found in block.rows for name in found}
    every = [metric for metric in comparison.metrics if metric.name in there and metric.key]
    main = [metric for metric in every if metric.name == "elbo" or metric.name.startswith("nll_iw")]
    return main if key else [metric for metric in every if metric not in main and metric.name != "bits_per_dim"]


def headlines(comparison: Comparison) -> list[str]:
    """For each block the ELBO's difference and its intervals: the mean over settings, or that of the only setting."""
    lines = []
    for block in comparison.blocks:
        found = block.overall if len(block.rows) > 1 else block.rows[0][1]
        if "elbo" not in found:
            continue
        d, letter = found["elbo"], LETTERS[block.other]
        of = f" over {count(len(block.rows), 'setting')}" if len(block.rows) > 1 else ""
        on = f" on {block.data}" if len({b.data for b in comparison.blocks}) > 1 else ""
        seeds = f"{interval(d.over_seeds, 2)} over {d.seeds} seeds" if d.over_seeds else "no interval over one seed"
        images = f", {interval(d.over_images, 2)} over {d.over_images.n:,} test images" if d.over_images else ""
        lines.append(f"{letter} − A, ELBO{of}{on}: {signed(d.value, 2)} nats per image; 95% intervals: {seeds}{images}")
    return lines


def signed(value: float, digits: int) -> str:
    """+0.52, −0.31; 0.00 where it rounds to zero, and 0 where it is exactly that."""
    if value == 0:
        return "0"
    text = nats(value, digits)
    return text if text.startswith("−") or not text.strip("0.") or not math.isfinite(value) else f"+{text}"


def interval(found: Interval | None, digits: int) -> str:
    return "" if found is None else f"[{signed(found.low, digits)}, {signed(found.high, digits)}]"


def verdict(d: Difference, metric: Measured) -> str:
    """better or worse where the seeds' interval excludes zero, and which of the two is known; otherwise ""."""
    if metric.better is None or d.over_seeds is None or not d.over_seeds.excludes_zero:
        return ""
    return "better" if (d.value > 0) == (metric.better == "higher") else "worse"


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else ""


def _every(comparison: Comparison) -> list[tuple[Block, Row, Difference]]:
    return [(block, row, d) for block in comparison.blocks for row, found in block.rows for d in found.values()]


# ---- plots ----


def draw(comparison: Comparison) -> list[list[Plot]]:
    """For each block the ELBO's differences and the tightest bound's, a line per setting, where these are not too many."""
    import matplotlib

    groups = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        for block in comparison.blocks:
            if 1 < len(block.rows) <= MOST_DRAWN:
                metrics = shown(comparison, block, True)
                groups.append(
                    [_forest(comparison, block, m) for m in dict.fromkeys((metrics[0], metrics[-1]))] if metrics else []
                )
    return [group for group in groups if group]


def _forest(comparison: Comparison, block: Block, metric: Measured) -> Plot:
    rows = [(row, found[metric.name]) for row, found in block.rows if metric.name in found]
    rows = [(row, d) for row, d in rows if math.isfinite(d.value)]
    fig, ax = new_figure(5.8, 1.1 + 0.27 * max(len(rows), 2))
    for place, (_, d) in enumerate(rows):
        if d.over_seeds:
            ax.hlines(place - 0.14, d.over_seeds.low, d.over_seeds.high, color=NAMES[0], lw=2.2, zorder=3)
        if d.over_images:
            ax.hlines(place + 0.14, d.over_images.low, d.over_images.high, color=NAMES[1], lw=2.2, zorder=3)
        ax.plot(d.value, place, "D", color=INK, ms=4.5, zorder=4)
    ax.axvline(0, color=MUTED, lw=1, zorder=2)
    # intervals of two seeds are so wide that they would hide all else: they may leave the axes
    reach = [abs(d.value) for _, d in rows] + [max(abs(i.low), abs(i.high)) for _, d in rows if (i := d.over_images)]
    halves = sorted((d.over_seeds.high - d.over_seeds.low) / 2 for _, d in rows if d.over_seeds)
    reach += halves[: (len(halves) + 1) // 2]
    limit = 1.15 * max([*reach, 1e-3])
    ax.set(xlim=(-limit, limit), ylim=(len(rows) - 0.4, -0.6))
    ax.set_yticks(range(len(rows)), [short(comparison.sides.describe(row), 40) for row, _ in rows])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    letter = LETTERS[block.other]
    worth = {"higher": f", higher is better for {letter}", "lower": f", lower is better for {letter}"}
    ax.set_xlabel(f"{metric.title}, {letter} − A, nats per image{worth.get(metric.better or '', '')}")
    on = f", {block.data}" if len({b.data for b in comparison.blocks}) > 1 else ""
    return as_plot(
        fig, comparison.sides.pool, f"{metric.name}_{letter}_{block.data}", f"{metric.title}: {letter} − A{on}"
    )


# ---- the terminal ----


def print_comparison(comparison: Comparison, console: Console) -> None:
    """For each sweep against the first the ELBO's differences, setting by setting, with their intervals; and the notes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    sides = comparison.sides
    for side, sweep in enumerate(sides.sweeps):
        console.print(Text(f"{LETTERS[side]}: {printable(str(sweep.folder))}, {tally(sweep)}"), soft_wrap=True)
    for block in comparison.blocks:
        letter = LETTERS[block.other]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=f"ELBO, {letter} − A", title_justify="left")
        for title in ("setting", "n", "A", letter, f"{letter} − A", "95% over seeds", "over test images"):
            table.add_column(title, justify="left" if title == "setting" else "right", no_wrap=title != "setting")
        overall = [("mean over settings", block.overall)] if block.overall else []
        for name, found in [*overall, *((sides.describe(row), found) for row, found in block.rows)]:
            if d := found.get("elbo"):
                cells = [name, str(d.seeds), nats(d.first), nats(d.second), signed(d.value, 2)]
                cells += [interval(d.over_seeds, 2) or "–", interval(d.over_images, 2) or "–"]
                table.add_row(*map(Text, cells), style="bold" if found is block.overall else None)
        console.print(table)
    if comparison.equal:
        console.print("Every difference is exactly zero.")
    for note in comparison.notes:
        console.print(Text(note), soft_wrap=True)
    if left := left_over(comparison):
        console.print(Text(f"{count(len(left), 'setting')} or seeds are in one sweep only; the page lists them."))
