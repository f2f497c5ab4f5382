"""The sweep drawn: rate and distortion, and what the ELBO and the active units are against each swept key."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from vae.report.drawing import (
    GRID,
    INK,
    MUTED,
    STYLE,
    Palette,
    Plot,
    as_plot,
    draw_all_active,
    draw_dots,
    draw_iso_elbo,
    draw_legend,
    label_ends,
    new_figure,
    place_labels,
    positions,
    scale_x,
    short,
)
from vae.report.runs import Run
from vae.report.sweep import Sweep
from vae.report.values import canonical, format_value


@dataclass(frozen=True)
class Curve:
    """Runs that share every setting but one. points: the value of that one -> its runs, which differ in seed alone."""

    settings: dict[str, Any]
    points: list[tuple[Any, list[Run]]]


def draw(sweep: Sweep) -> list[list[Plot]]:
    """Groups of plots that belong side by side: rate-distortion, then ELBO and active units for each swept key.

    Each data set has its own axes: likelihoods of different data are never drawn together.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # names may use letters that the font lacks
        sets = [data for data in sweep.data_sets if _scored(sweep, data, "elbo")]
        groups = [
            [_rate_distortion(sweep, data) for data in sets if len(_scored(sweep, data, "rate", "distortion")) > 1]
        ]
        for key in sweep.swept:
            for data in sets:
                metrics = [metric for metric in ("elbo", "active_units") if _scored(sweep, data, metric)]
                if len(sweep.values(key, _scored(sweep, data, "elbo"))) > 1:
                    groups.append([_against(sweep, data, key, metric) for metric in metrics])
    return [group for group in groups if group]


# ---- what is drawn ----


def _rate_distortion(sweep: Sweep, data: str) -> Plot:
    """Alemi et al. 2018, "Fixing a broken ELBO": where each run lies, over lines of equal ELBO = -(rate + distortion)."""
    runs = _scored(sweep, data, "rate", "distortion")
    varying = [key for key in sweep.swept if len(sweep.values(key, runs)) > 1]
    numbers = [key for key in varying if sweep.numeric(key)]
    others = [key for key in numbers if key != sweep.latent_size] or numbers
    along = sweep.beta if sweep.beta in varying else others[0] if others else None
    curves, hue = curves_along(sweep, runs, along)
    palette = Palette(sweep, hue)

    fig, ax = new_figure(*((10.4, 5.4) if len(sweep.data_sets) == 1 else (5.8, 4.8)))
    labels, solid = [], []
    for curve in curves:
        colour, marker = palette(curve.settings.get(hue or ""))
        groups = [group for _, group in curve.points]
        xy = [(_mean(sweep, group, "rate"), _mean(sweep, group, "distortion")) for group in groups]
        if len(xy) > 1:
            ax.plot(*zip(*xy, strict=True), color=colour, lw=1.6, zorder=3)
        if seeds := [run for group in groups if len(group) > 1 for run in group]:
            each = [[sweep.value(run, metric) for run in seeds] for metric in ("rate", "distortion")]
            ax.plot(*each, marker=".", ms=5, lw=0, color=colour, alpha=0.45, zorder=2)
        draw_dots(ax, sweep, xy, groups, (colour, marker))
        if along is not None:
            labels += [
                (x, y, format_value(value), MUTED, 8.5, False)
                for (value, _), (x, y) in zip(curve.points, xy, strict=True)
            ]
        solid += xy
        if hue is not None and len(curves) <= 12:
            x, y = max(xy)
            labels.insert(0, (x, y, _curve_name(sweep, curve), colour, 9.5, True))
    if len(solid) > 1:
        x, y = min(solid, key=sum)
        ax.plot(x, y, "o", ms=13, mfc="none", mec=INK, mew=1.1, zorder=5)
        labels.append((x, y, "best ELBO", INK, 8.5, True))
    ax.margins(0.09)
    ax.set_xlabel(f"{_split(sweep)} rate, nats per image")
    ax.set_ylabel(f"{_split(sweep)} distortion, nats per image")
    draw_iso_elbo(ax)
    lines = [np.asarray(line.get_xydata()).tolist() for line in ax.lines if line.get_linewidth()]
    place_labels(ax, labels, solid, [[(x, y) for x, y in line] for line in lines if len(line) > 1])
    if hue is not None and len(curves) > 12:
        draw_legend(ax, sweep, palette)
    title = f"Rate and distortion, {data}" if len(sweep.data_sets) > 1 else "Rate and distortion"
    title += _of_seeds(sweep, [group for curve in curves for _, group in curve.points])
    title += f"; points are labelled by {sweep.label(along)}" if along else ""
    return as_plot(fig, sweep, f"rate_distortion{_suffix(sweep, data)}", title)


def _against(sweep: Sweep, data: str, key: str, metric: str) -> Plot:
    """A metric against one swept key: the mean over seeds, the band from the lowest to the highest seed."""
    runs = _scored(sweep, data, metric)
    curves, hue = curves_along(sweep, runs, key)
    palette = Palette(sweep, hue)
    values = sweep.values(key, runs)
    position = positions(values)

    fig, ax = new_figure(5.4, 3.7)
    ends = []
    for i, curve in enumerate(curves):
        colour, marker = palette(curve.settings.get(hue or ""))
        # words have room beside them: a little of it keeps curves that coincide apart
        aside = 0.0 if sweep.numeric(key) else 0.3 * (i - (len(curves) - 1) / 2) / len(curves)
        xs = [position[canonical(value)] + aside for value, _ in curve.points]
        ys = [_mean(sweep, group, metric) for _, group in curve.points]
        every = [[sweep.value(run, metric) for run in group] for _, group in curve.points]
        if any(len(group) > 1 for group in every):
            lows, highs = [min(group) for group in every], [max(group) for group in every]
            ax.vlines(xs, lows, highs, color=colour, lw=1, alpha=0.6, zorder=2)
            if sweep.numeric(key):
                ax.fill_between(xs, lows, highs, color=colour, alpha=0.16, lw=0, zorder=1)
        ax.plot(xs, ys, color=colour, lw=1.6 if sweep.numeric(key) else 0.8, alpha=1 if sweep.numeric(key) else 0.5)
        draw_dots(ax, sweep, list(zip(xs, ys, strict=True)), [group for _, group in curve.points], (colour, marker))
        ends.append((xs[-1], ys[-1], _curve_name(sweep, curve), colour))
    scale_x(ax, values)
    names = {"elbo": "ELBO at β = 1, nats per image", "active_units": "active units"}
    ax.set_xlabel(sweep.label(key))
    ax.set_ylabel(f"{_split(sweep)} {names[metric]}")
    if metric == "active_units":
        from matplotlib.ticker import MaxNLocator

        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        if key == sweep.latent_size:
            draw_all_active(ax, values)
    ax.grid(axis="y", color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    if hue is not None and len(curves) > 12:
        draw_legend(ax, sweep, palette)
    elif hue is not None:
        label_ends(ax, ends)
    what = "Active units" if metric == "active_units" else "ELBO"
    title = f"{what} against {sweep.label(key)}" + (f", {data}" if len(sweep.data_sets) > 1 else "")
    title += _of_seeds(sweep, [group for curve in curves for _, group in curve.points])
    return as_plot(fig, sweep, f"{metric}_against_{key}{_suffix(sweep, data)}", title)


def curves_along(sweep: Sweep, runs: list[Run], along: str | None) -> tuple[list[Curve], str | None]:
    """Runs of one data set as curves along a swept key, and the key that colours them (None where one colour does)."""
    others = [key for key in sweep.swept if key != along and len(sweep.values(key, runs)) > 1]
    grouped: dict[tuple[str, ...], dict[str, list[Run]]] = {}
    for run in runs:
        curve = grouped.setdefault(tuple(canonical(run.settings[key]) for key in others), {})
        curve.setdefault(canonical(run.settings.get(along or "")), []).append(run)
    curves = []
    for points in grouped.values():
        first = next(iter(points.values()))[0]
        inner = sweep.values(along, [run for group in points.values() for run in group]) if along else [None]
        curves.append(Curve({k: first.settings[k] for k in others}, [(v, points[canonical(v)]) for v in inner]))
    return curves, others[0] if others else None


# ---- parts of a plot ----


def _scored(sweep: Sweep, data: str, *metrics: str) -> list[Run]:
    """The finished runs of a data set whose metrics are all finite."""
    runs = [run for run in sweep.finished if run.data == data and (run.config or not sweep.swept)]
    return [run for run in runs if all(math.isfinite(sweep.value(run, metric)) for metric in metrics)]


def _mean(sweep: Sweep, runs: list[Run], metric: str) -> float:
    return math.fsum(sweep.value(run, metric) for run in runs) / len(runs)


def _split(sweep: Sweep) -> str:
    return "validation" if sweep.split == "val" else sweep.split


def _of_seeds(sweep: Sweep, groups: list[list[Run]]) -> str:
    """How many seeds the points are means of."""
    fewest, most = min(map(len, groups)), max(map(len, groups))
    if not sweep.seeds or most == 1:
        return ""
    return f", means of {most} seeds" if fewest == most else f", means of {fewest} to {most} seeds"


def _curve_name(sweep: Sweep, curve: Curve) -> str:
    return short(", ".join(f"{sweep.label(key)} {format_value(value)}" for key, value in curve.settings.items()), 34)


# ---- a figure -> SVG and PNG ----


def _suffix(sweep: Sweep, data: str) -> str:
    return f"_{data}" if len(sweep.data_sets) > 1 else ""
