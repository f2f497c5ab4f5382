"""What plots are drawn with: colours, axes, labels that do not cover each other; a figure as SVG for the page and as PNG.

Colours are the page's: a number's values run along RAMP, names take NAMES (Okabe & Ito 2008, safe for colour-blind
readers), and a different marker each. Figures are made by matplotlib's object interface, never pyplot.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from vae.report.runs import Run
from vae.report.seeds import mean, replicates, spread
from vae.report.sweep import Sweep
from vae.report.tables import nats
from vae.report.values import canonical, format_value, is_number, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK, MUTED, GRID, PAPER = "#1d2127", "#667080", "#dce0e6", "#fefefe"
RAMP = ("#2a0a8f", "#5c01a6", "#8405a7", "#a72197", "#c33d80", "#d9576b", "#e97257", "#ee8a3a")


NAMES = ("#0072b2", "#d55e00", "#009e73", "#b3589a", "#b98600", "#2f9bd6", "#7a5195")


MARKERS = "os^DvPX"


_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--paper"}


_VARIABLES |= {colour: f"--ramp{i}" for i, colour in enumerate(RAMP)}


_VARIABLES |= {colour: f"--name{i}" for i, colour in enumerate(NAMES)}


STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a run's name is a dollar
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Plot:
    """name: of its PNG; title: plain text; svg: markup whose text is escaped; png: the file's bytes."""

    name: str
    title: str
    svg: str
    png: bytes


class Palette:
    """A colour and a marker for each value of a swept key, the same in every plot of the sweep."""

    def __init__(self, sweep: Sweep, key: str | None) -> None:
        self.key = key
        self.values = sweep.values(key) if key is not None else []
        self._rank = {canonical(value): i for i, value in enumerate(self.values)}
        self._ordered = key is not None and sweep.numeric(key)

    def __call__(self, value: Any) -> tuple[str, str]:
        if self.key is None:
            return NAMES[0], MARKERS[0]
        i, n = self._rank[canonical(value)], len(self.values)
        if self._ordered:
            return RAMP[round(i * (len(RAMP) - 1) / max(n - 1, 1))], MARKERS[i % len(MARKERS)] if n < 8 else MARKERS[0]
        return NAMES[i % len(NAMES)], MARKERS[(i + i // len(NAMES)) % len(MARKERS)]


def short(text: str, length: int) -> str:
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), dpi=72, layout="constrained")  # at 72 dots an inch, pixels are points
    ax = fig.add_subplot()
    ax.tick_params(length=3, labelsize=9)
    return fig, ax


def draw_dots(
    ax: Axes, sweep: Sweep, xy: list[tuple[float, float]], groups: list[list[Run]], look: tuple[str, str]
) -> None:
    """Points in one colour and marker, each a link to the row of the first of its runs."""
    colour, marker = look
    dots = ax.scatter(
        *zip(*xy, strict=True), s=34, color=colour, marker=marker, edgecolors=PAPER, linewidths=0.8, zorder=4
    )
    dots.set_urls([f"#run-{sweep.places[id(runs[0])]}" for runs in groups])


def draw_iso_elbo(ax: Axes) -> None:
    """Lines of slope -1 behind everything, labelled where they leave the axes at the top or the right."""
    from matplotlib.ticker import MaxNLocator

    (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
    for level in MaxNLocator(nbins=14, steps=[1, 2, 5, 10]).tick_values(x0 + y0, x1 + y1):
        if not x0 + y0 < level < x1 + y1:
            continue
        ax.plot([x0, x1], [level - x0, level - x1], color=GRID, lw=1, zorder=0, scalex=False, scaley=False)
        top, right = level - y1, level - x1
        text, style = nats(-level, 0 if level == round(level) else 1), {"fontsize": 8, "color": MUTED}
        if x0 <= top <= x1 - 0.06 * (x1 - x0):
            ax.annotate(text, (top, y1), (0, 2), textcoords="offset points", ha="center", va="bottom", **style)
        elif y0 <= right <= y1 - 0.05 * (y1 - y0):
            ax.annotate(text, (x1, right), (3, 0), textcoords="offset points", ha="left", va="center", **style)
    ax.annotate("ELBO", (1, 1), (3, 2), xycoords="axes fraction", textcoords="offset points", fontsize=8, color=MUTED)
    ax.set(xlim=(x0, x1), ylim=(y0, y1))


def positions(values: list[Any]) -> dict[str, float]:
    """Where each value stands on the x axis: a number at itself, a word at its place in the list."""
    numbers = all(is_number(value) for value in values)
    return {canonical(value): float(value) if numbers else float(i) for i, value in enumerate(values)}


def scale_x(ax: Axes, values: list[Any]) -> None:
    """Logarithmic where positive values span a factor of eight or more (and zero at its foot); ticks at the values."""
    words = [short(format_value(value), 18) for value in values]
    if not all(is_number(value) for value in values):
        ax.set_xticks(range(len(values)), words, rotation=0 if sum(map(len, words)) < 44 else 30)
        ax.set_xlim(-0.4, len(values) - 0.6)
        return
    low = min((value for value in values if value > 0), default=None)
    if low is not None and min(values) >= 0 and max(values) / low >= 8:
        if min(values) == 0:
            ax.set_xscale("symlog", linthresh=low, linscale=0.5)
        else:
            ax.set_xscale("log")
    if len(values) <= 9:
        ax.set_xticks([float(value) for value in values], words)
        ax.set_xticks([], minor=True)
    elif ax.get_xscale() == "log":
        from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

        decades = math.log10(max(values) / low)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))
        ax.xaxis.set_minor_formatter(NullFormatter())


def draw_all_active(ax: Axes, sizes: list[Any]) -> None:
    """The line on which every latent dimension is active, named where it leaves the axes."""
    first, top = float(sizes[0]), ax.get_ylim()[1]
    last = min(float(sizes[-1]), top)
    line = [first + (last - first) * i / 100 for i in range(101)]
    ax.plot(line, line, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=0, scalex=False, scaley=False)
    # above the line there is never a point
    aside = {"xytext": (-5, -1), "va": "top"} if last == top else {"xytext": (-8, 0), "va": "center"}
    ax.annotate("all active", (last, last), textcoords="offset points", color=MUTED, fontsize=8, ha="right", **aside)


def draw_legend(ax: Axes, sweep: Sweep, palette: Palette) -> None:
    """Of many curves: some values of the colouring key, from first to last."""
    from matplotlib.lines import Line2D

    n = len(palette.values)
    shown = [palette.values[i] for i in sorted({round(j * (n - 1) / 7) for j in range(8)})] if n > 8 else palette.values
    handles = [
        Line2D([], [], color=colour, marker=marker, ms=6, lw=0, label=f" {short(format_value(value), 16)}")
        for value in shown
        for colour, marker in [palette(value)]
    ]
    ax.legend(
        handles=handles, title=short(sweep.label(palette.key), 20), loc="upper left", bbox_to_anchor=(1.07, 1),
        frameon=False, fontsize=8.5, title_fontsize=8.5, handletextpad=0.1,
    )  # fmt: skip


def label_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names to the right of the curves' last points, pushed apart until none overlaps, in the points' order."""
    bottom, top = ax.get_ylim()
    height = ax.figure.get_figheight() * 72 * 0.8
    gap = 11.5 / height * (top - bottom)
    ends = sorted(ends, key=lambda end: end[1])
    ys = [end[1] for end in ends]
    for i in range(1, len(ys)):
        ys[i] = max(ys[i], ys[i - 1] + gap)
    if excess := max(0.0, ys[-1] - top):
        ys[-1] -= excess
        for i in range(len(ys) - 2, -1, -1):
            ys[i] = min(ys[i], ys[i + 1] - gap)
    for (_, _, text, colour), y in zip(ends, ys, strict=True):
        ax.annotate(
            text, (1, y), (8, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            color=colour, fontsize=9, va="center", annotation_clip=False,
        )  # fmt: skip
    ax.set_ylim(bottom, top)


def place_labels(ax: Axes, labels: list[tuple], points: list[tuple], lines: list[list[tuple]]) -> None:
    """Put each (x, y, text, colour, size, must) beside its point where it covers least; drop what would cover a label."""
    _settle(ax.figure)
    pixels = ax.transData.transform
    inside = ax.get_window_extent()
    dots = np.array([pixels(point) for point in points]).reshape(-1, 2)
    thread: list[Any] = []
    for line in lines:
        corners = [pixels(point) for point in line]
        for a, b in itertools.pairwise(corners):
            steps = max(2, int(math.dist(a, b) // 8))
            thread += [a + (b - a) * i / steps for i in range(steps + 1)]
    along = np.array(thread).reshape(-1, 2)
    placed: list[tuple[float, float, float, float]] = []
    directions = [(1, 1), (1, -1), (-1, 1), (-1, -1), (1, 0), (0, 1), (0, -1), (-1, 0)]
    for x, y, text, colour, size, must in labels:
        px, py = pixels((x, y))
        w, h = 0.6 * size * len(text), 1.1 * size
        choices = []
        for order, (away, (dx, dy)) in enumerate((a, d) for a in (6, 13, 22) for d in directions):
            gap = away * (0.75 if dx and dy else 1)
            left = px + dx * gap - (0 if dx > 0 else w if dx < 0 else w / 2)
            low = py + dy * gap - (0 if dy > 0 else h if dy < 0 else h / 2)
            box = (left, low, left + w, low + h)
            covered = sum(_overlap(box, other) for other in placed)
            cost = 100 * covered + 12 * _contained(box, dots, 4) + 2 * _contained(box, along, 2)
            cost += 60 * (left < inside.x0 or left + w > inside.x1 + 30 or low < inside.y0 or low + h > inside.y1)
            choices.append((cost + 0.4 * order, covered, box))
        _, covered, box = min(choices)
        if covered and not must:
            continue
        placed.append(box)
        at = ax.transData.inverted().transform(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        ax.text(*at, text, color=colour, fontsize=size, ha="center", va="center_baseline", zorder=6)


def _overlap(a: tuple, b: tuple) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _contained(box: tuple, points: np.ndarray, margin: float) -> int:
    """How many of the points (n, 2) lie in the box or so near to it."""
    low, high = np.array(box[:2]) - margin, np.array(box[2:]) + margin
    return int(((low < points) & (points < high)).all(1).sum())


def _settle(fig: Figure) -> None:
    """Lay out once: positions in points are valid from here on, and neither file repeats the work."""
    if not getattr(fig, "settled", False):
        fig.draw_without_rendering()
        fig.set_layout_engine("none")
        fig.settled = True


def as_plot(fig: Figure, sweep: Sweep, name: str, title: str) -> Plot:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    name = re.sub(r"[^A-Za-z0-9.]+", "_", name).strip("._")[:100]
    _settle(fig)
    png, svg = io.BytesIO(), io.StringIO()
    # the canvases directly: savefig would draw each file twice more to measure it
    with matplotlib.rc_context({"svg.hashsalt": name}):
        fig.patch.set_visible(False)
        FigureCanvasSVG(fig).print_svg(svg, metadata={"Date": None})
    fig.patch.set_visible(True)
    fig.set_dpi(170)
    FigureCanvasAgg(fig).print_png(png)
    return Plot(name, title, _for_page(svg.getvalue(), sweep, title), png.getvalue())


def _for_page(svg: str, sweep: Sweep, title: str) -> str:
    """matplotlib's file as an element of the page: themed colours, no ids that collide, points that name their run."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    size = re.search(r'viewBox="0 0 ([\d.]+)', svg)
    head = f'<svg role="img" aria-label="{escape(title)}" style="max-width: {float(size[1]) * 4 / 3:.0f}px"'
    svg = re.sub(r'<svg|(?<=\s)(width|height)="[\d.]+pt"', lambda m: head if m[0] == "<svg" else "", svg)
    svg = re.sub("|".join(_VARIABLES), lambda m: f"var({_VARIABLES[m[0]]})", svg)

    alike = {id(run): runs for runs in (replicates(sweep) if sweep.seeds else []) for run in runs}

    def linked(match: re.Match) -> str:
        run = sweep.runs[int(match[1])]
        runs = alike.get(id(run), [run])
        what = (
            sweep.describe(run)
            if len(runs) == 1
            else f"{sweep.describe(run, with_seed=False)}, mean of {len(runs)} seeds"
        )
        numbers = [_told(m, [sweep.value(run, m) for run in runs]) for m in ("elbo", "rate", "distortion")]
        return f'<a href="#run-{match[1]}"><title>{escape(what)}\n{", ".join(numbers)}</title>'

    return re.sub(r'<a xlink:href="#run-(\d+)"[^>]*>', linked, svg)


def _told(metric: str, values: list[float]) -> str:
    sd = spread(values)
    return f"{metric.replace('_', ' ')} {nats(mean(values))}" + (f" ± {nats(sd)}" if math.isfinite(sd) else "")
