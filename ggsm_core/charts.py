"""Pictures of the evidence, in the book's one style: rows, their order, what they cost.

As in ``figures``, each function takes numbers and returns a figure; series differ without colour too.

R rows, K columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import ArrayLike

from ggsm_core.figures import INK, VISIBILITY, canvas, looks, nothing


def named_grid(
    values: ArrayLike,
    texts: Sequence[Sequence[str]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
) -> Figure:
    """A heat map [R, K] with named rows and columns, whose cells say ``texts``; nan is left white."""
    numbers = np.asarray(values, dtype=float)
    known = numbers[np.isfinite(numbers)]
    if not known.size:
        return nothing()
    middle = float(known.min() + known.max()) / 2
    with canvas(height=1.1 + 0.42 * len(rows)) as (figure, axes):
        axis: Axes = axes[0, 0]
        picture = axis.imshow(numbers, cmap=VISIBILITY, aspect="auto")
        for (row, column), value in np.ndenumerate(numbers):
            pale = np.isfinite(value) and value < middle
            colour = "white" if pale else INK
            axis.text(column, row, texts[row][column], ha="center", va="center", color=colour, fontsize=8.5)
        axis.set_xticks(range(len(columns)), columns)
        axis.set_yticks(range(len(rows)), rows)
        axis.grid(visible=False)
        figure.colorbar(picture, ax=axis, label=label, pad=0.02)
    return figure


def over(
    table: pl.DataFrame, *, ticks: Sequence[str], steps: str, label: str, zero: float | None = None
) -> Figure:
    """Lines with 95 % intervals: columns row, at (an index into ``ticks``), value, ci_low, ci_high."""
    if table.is_empty():
        return nothing()
    names = table["row"].unique(maintain_order=True).to_list()
    styles = looks(names)
    with canvas(height=3.3) as (figure, axes):
        axis: Axes = axes[0, 0]
        for number, name in enumerate(names):
            part, drawn = table.filter(pl.col("row") == name).sort("at"), styles[name]
            value, low, high = (part[column].to_numpy() for column in ("value", "ci_low", "ci_high"))
            place = part["at"].to_numpy() + 0.03 * (number - (len(names) - 1) / 2)
            axis.errorbar(
                place,
                value,
                yerr=[np.maximum(value - low, 0), np.maximum(high - value, 0)],
                fmt=drawn.marker,
                ls=drawn.line,
                color=drawn.colour,
                ecolor="#888888",
                elinewidth=1,
                markersize=6,
                markeredgecolor=INK,
                markeredgewidth=0.5,
                label=name,
            )
        if zero is not None:
            axis.axhline(zero, color=INK, lw=1, ls=":")
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set(xlabel=steps, ylabel=label)
        figure.legend(fontsize=8.5, loc="outside right upper")
    return figure


def critical_difference(
    points: Mapping[str, float], groups: Sequence[Sequence[str]], *, label: str
) -> Figure:
    """Rows from best to worst; a bar on the right joins those of which no two are told apart."""
    names = sorted(points, key=lambda name: -points[name])
    styles = looks(names)
    height = 0.7 + 0.23 * len(names)
    with canvas(1, 2, height=height, sharey=True, width_ratios=[4, 1]) as (figure, axes):
        axis, side = axes[0]
        for row, name in enumerate(names):
            drawn = styles[name]
            axis.plot(points[name], row, drawn.marker, color=drawn.colour, ms=7, mec=INK, mew=0.6)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel(label)
        for place, group in enumerate(groups):
            ends = [names.index(name) for name in group]
            side.plot(
                [place, place], [min(ends) - 0.25, max(ends) + 0.25], color=INK, lw=4, solid_capstyle="butt"
            )
        side.set_xlim(-0.7, max(len(groups), 1) - 0.3)
        side.set_xticks([])
        side.grid(visible=False)
        side.set_xlabel("not told apart")
        side.spines["left"].set_visible(False)
        side.tick_params(left=False)
    return figure


def cost(table: pl.DataFrame, *, label: str) -> Figure:
    """AUC against seconds (log): columns row, seconds, dimension, auc; a larger point has more dimensions."""
    names = table["row"].to_list()
    styles = looks(names)
    with canvas(height=4.2) as (figure, axes):
        axis: Axes = axes[0, 0]
        for name, seconds, dimension, auc in table.select("row", "seconds", "dimension", "auc").iter_rows():
            drawn, size = styles[name], 3.5 + 0.35 * np.sqrt(dimension)
            axis.plot(seconds, auc, drawn.marker, color=drawn.colour, ms=size, mec=INK, mew=0.6, label=name)
        axis.set_xscale("log")
        decades = np.log10(table["seconds"].to_numpy())
        axis.set_xlim(10.0 ** np.floor(decades.min()), 10.0 ** np.ceil(decades.max()))  # few labels
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set(xlabel=label, ylabel="mean AUC")
        legend = figure.legend(fontsize=8.5, loc="outside right upper")
        for handle in legend.legend_handles:
            handle.set_markersize(6)  # type: ignore[union-attr]
    return figure


def orders(left: Mapping[str, float], right: Mapping[str, float], *, sides: tuple[str, str]) -> Figure:
    """Ranks of the same rows in two tables, 1 at the top, each row's two places joined by a line."""
    names = sorted(left, key=lambda name: -left[name])
    rank = {name: place for place, name in enumerate(sorted(right, key=lambda name: -right[name]), start=1)}
    styles = looks(names)
    with canvas(height=0.8 + 0.27 * len(names)) as (figure, axes):
        axis: Axes = axes[0, 0]
        for place, name in enumerate(names, start=1):
            drawn = styles[name]
            axis.plot(
                [0, 1], [place, rank[name]], color=drawn.colour, ls=drawn.line, marker=drawn.marker,
                ms=7, mec=INK, mew=0.6,
            )  # fmt: skip
            axis.text(-0.04, place, f"{name}  {left[name]:.4f}", ha="right", va="center", fontsize=8.5)
            axis.text(1.04, rank[name], f"{right[name]:.4f}  {name}", ha="left", va="center", fontsize=8.5)
        axis.set_xlim(-0.9, 1.9)
        axis.set_ylim(len(names) + 0.6, 0.4)
        axis.set_xticks([0, 1], sides)
        axis.set_yticks([])
        axis.grid(visible=False)
        axis.spines[["left", "bottom"]].set_visible(False)
        axis.tick_params(bottom=False)
    return figure
