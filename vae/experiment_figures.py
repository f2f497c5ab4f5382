"""What an experiment's figure is drawn with: the style and its colours, guides, labels, dots, and images as text."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, PALE = "#1d2127", "#667080", "#dce0e6"  # of what is written, of guides, of grids
BLUE, ORANGE, GREEN, PINK, OCHRE, SKY, PURPLE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#b3589a",
    "#b98600",
    "#2f9bd6",
    "#7a5195",
)
STYLE = {
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": f"cycler('color', {[c[1:] for c in (BLUE, ORANGE, GREEN, PINK, OCHRE, SKY, PURPLE)]})",
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}
DASHES, DOTS, FINE = (0, (4, 2)), ":", (0, (3, 2))  # of lines


def note(ax: Axes, text: str, at: tuple[Any, Any], offset: tuple[float, float] = (0, 4), **style: Any) -> None:
    """Small words beside a point: `offset` in points from it, centred unless `ha` says otherwise."""
    ax.annotate(text, at, offset, textcoords="offset points", **{"ha": "center", "fontsize": 8, **style})


def guide(ax: Axes, *, x: float | None = None, y: float | None = None, **style: Any) -> None:
    """A thin grey line across the panel at this x or y."""
    style = {"color": MUTED, "lw": 0.8, **style}
    if x is not None:
        ax.axvline(x, **style)
    if y is not None:
        ax.axhline(y, **style)


def level(ax: Axes, y: float, text: str, offset: tuple[float, float] = (0, 3), **style: Any) -> None:
    """Grey words at the right end of a guide at this y."""
    style = {"ha": "right", "fontsize": 7.5, "color": MUTED, **style}
    note(ax, text, (0.98, y), offset, xycoords=("axes fraction", "data"), **style)


def dots(ax: Axes, place: float, values: Sequence[float], **style: Any) -> None:
    """The value of every seed above one place; none if there is but one seed, which is its own mean."""
    if len(values) > 1:
        ax.plot([place] * len(values), values, ".", **{"color": INK, "zorder": 3, **style})


def log_ticks(ax: Axes, *, x: Sequence[float] = (), y: Sequence[float] = ()) -> None:
    """These ticks and no others on a logarithmic axis, written as they are."""
    if len(x):
        ax.set_xticks(x, [f"{tick:g}" for tick in x])
    if len(y):
        ax.set_yticks(y, [f"{tick:g}" for tick in y])
    ax.minorticks_off()


def bare(ax: Axes) -> None:
    """No grid, no ticks' marks and no frame: for images."""
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)


def pack_images(images: Any) -> dict[str, Any]:
    """Arrays or tensors in [0, 1] as 8-bit grey levels in compressed text, for results.json: a picture needs no more."""
    import numpy as np

    levels = np.rint(np.asarray(images, dtype=np.float64) * 255).clip(0, 255).astype(np.uint8)
    text = base64.b64encode(zlib.compress(levels.tobytes(), 9)).decode()
    return {"shape": list(levels.shape), "levels": text}


def unpack_images(packed: dict[str, Any]) -> Any:
    """What `pack_images` packed, as a numpy array in [0, 1]."""
    import numpy as np

    levels = np.frombuffer(zlib.decompress(base64.b64decode(packed["levels"])), np.uint8)
    return levels.reshape(packed["shape"]) / 255
