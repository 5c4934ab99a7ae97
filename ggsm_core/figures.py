"""Every picture of the book, in one house style.

Each function takes numbers and returns a matplotlib figure; as a notebook's last expression it shows itself.
Colours are Okabe and Ito's, told apart by people with any colour vision, and every series also differs in
marker or line, so that a grey print says the same. The ground is white, also on a dark page.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

# A page holds no stderr, and on a new machine matplotlib says there that it builds its font list.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import polars as pl  # noqa: E402
import seaborn  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import ListedColormap, LogNorm  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import Patch, Rectangle  # noqa: E402
from numpy.typing import ArrayLike  # noqa: E402

from ggsm_core.template import MODALITIES, SEGMENTS  # noqa: E402

WIDTH = 7.6
"""Inches of a figure as wide as the page's text."""
INK = "#222222"
VISIBILITY = "cividis"
"""Colours of w in [0, 1]: dark is hidden, bright is visible, monotone in grey."""

STYLE: dict[Any, Any] = {
    **seaborn.axes_style("whitegrid"),
    "figure.dpi": 110,
    "savefig.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#666666",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Look:
    """How one row of the comparison is drawn, everywhere in the book."""

    colour: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]


LOOKS = {
    "causal": Look("#000000", "o", "-"),
    "hybrid_segment": Look("#56B4E9", "v", (0, (1, 1))),
    "hybrid_mask": Look("#E69F00", "^", (0, (5, 1))),
    "hybrid_mlp": Look("#CC79A7", "<", (0, (3, 1, 1, 1))),
    "hybrid_gq": Look("#F0E442", ">", (0, (4, 2))),
    "bidirectional": Look("#0072B2", "s", "--"),
    "scheduler": Look("#009E73", "P", "-."),
    "ggsm": Look("#D55E00", "D", "-"),
    "oracle": Look("#999999", "x", ":"),
    "rfm": Look("#777777", "1", ":"),
    "handmade": Look("#444444", "*", ":"),
    "handmade_linear": Look("#444444", "+", "--"),
    "handmade_128": Look("#444444", "|", "-."),
    "handmade+ggsm": Look("#8C510A", "X", ":"),
    "cpc": Look("#7A5195", "p", ":"),
    "coles": Look("#003F5C", "h", ":"),
    "msdp": Look("#2F9E9E", "d", ":"),
    "one4all": Look("#BC5090", "8", ":"),
    "found": Look("#FF764A", "H", ":"),
    "instructue": Look("#488F31", "2", ":"),
    "minilm": Look("#665191", "3", ":"),
    "records": Look("#8C564B", "4", "--"),
}
FREE = (
    Look("#0072B2", "o", "-"),
    Look("#D55E00", "s", "--"),
    Look("#009E73", "^", "-."),
    Look("#CC79A7", "D", ":"),
    Look("#E69F00", "v", (0, (5, 1))),
    Look("#56B4E9", "P", (0, (3, 1, 1, 1))),
    Look("#000000", "<", (0, (1, 1))),
    Look("#777777", ">", (0, (4, 2))),
)
"""For series that are no row of the comparison, and for rows that readers add, in order of appearance."""
SEGMENT_COLOURS = dict(
    zip(
        SEGMENTS,
        ("#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#009E73", "#999999", "#D55E00", "#000000"),
        strict=True,
    )
)


@contextmanager
def canvas(
    rows: int = 1, columns: int = 1, *, height: float, width: float = WIDTH, **options: Any
) -> Iterator[tuple[Figure, np.ndarray]]:
    """A figure in the house style and its axes [rows, columns]. Closed, so that a notebook shows it once."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Colour, marker and line of each name: rows keep theirs everywhere, segments their colour."""
    chosen = {}
    for index, name in enumerate(names):
        free = FREE[index % len(FREE)]
        free = replace(free, colour=SEGMENT_COLOURS.get(name, free.colour))
        chosen[name] = LOOKS.get(name, free)
    return chosen


# --- data -----------------------------------------------------------------------------------------------


def timeline(events: pl.DataFrame, anchor: int, history_days: int, future_days: int) -> Figure:
    """One user's events (columns day, modality) by day, with the two windows around ``anchor``."""
    shown = [name for name in MODALITIES if name in set(events["modality"].cast(pl.String))]
    with canvas(height=2.4) as (figure, axes):
        axis: Axes = axes[0, 0]
        axis.axvspan(anchor - history_days, anchor, color="#cfe3f1", lw=0)
        axis.axvspan(anchor, anchor + future_days, color="#f7dfc6", lw=0)
        for row, name in enumerate(shown):
            days = events.filter(pl.col("modality").cast(pl.String) == name)["day"]
            axis.plot(days, [row] * len(days), "|", color=SEGMENT_COLOURS[name], markersize=15, mew=1.2)
        axis.axvline(anchor, color=INK, lw=1.2)
        axis.set_yticks(range(len(shown)), shown)
        axis.set_ylim(len(shown) - 0.4, -1.1)
        axis.text(anchor - history_days / 2, -0.75, "history: the input", ha="center", va="center")
        axis.text(anchor + future_days / 2, -0.75, "future", ha="center", va="center")
        axis.set_xlabel("days since 2017-01-01")
        axis.grid(axis="y", visible=False)
    return figure


def histogram(
    values: Mapping[str, ArrayLike],
    label: str,
    limit: float | None = None,
    *,
    counted: str = "sequences",
    decimals: int = 0,
) -> Figure:
    """Distributions side by side, one panel each, with their median and an optional limit marked."""
    with canvas(1, len(values), height=2.5) as (figure, axes):
        for axis, (name, numbers) in zip(axes[0], values.items(), strict=True):
            found = np.asarray(numbers, dtype=float)
            bins = min(30, max(len(np.unique(found)), 2))
            seaborn.histplot(found, bins=bins, color="#0072B2", alpha=1, ax=axis)
            median = float(np.median(found))
            axis.axvline(median, color=INK, ls="--", lw=1.2, label=f"median {median:,.{decimals}f}")
            if limit is not None:
                axis.axvline(limit, color="#D55E00", lw=1.5, label=f"limit {limit:,.{decimals}f}")
            axis.set_title(name)
            axis.set(xlabel=label, ylabel="")
            axis.legend(fontsize=8)
        axes[0, 0].set_ylabel(counted)
    return figure


def bars(values: Mapping[str, float], label: str, limit: float | None = None) -> Figure:
    """One horizontal bar for each name, with its number; axis from 0."""
    with canvas(height=0.7 + 0.32 * len(values)) as (figure, axes):
        axis: Axes = axes[0, 0]
        names = list(values)
        drawn = axis.barh(names, list(values.values()), color="#56B4E9", edgecolor=INK, linewidth=0.6)
        axis.bar_label(drawn, fmt="{:.3g}", padding=3, fontsize=8.5)
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.set_xlim(0, limit or 1.12 * max(max(values.values()), 1e-9))
        axis.grid(axis="y", visible=False)
    return figure


# --- masks ----------------------------------------------------------------------------------------------


def masks(
    visibilities: Mapping[str, ArrayLike],
    segments: ArrayLike,
    *,
    columns: int = 4,
    read_out: int | None = None,
) -> Figure:
    """Visibility [L, L] (query i down, key j across) of each name, the past drawn fully visible.

    ``segments`` [L] colours the border, so that a reader sees which part of the template a token belongs to;
    ``read_out`` rings the row of ``<USER>``.
    """
    kinds = np.asarray(segments)
    shown = {name: whole(values, len(kinds)) for name, values in visibilities.items()}
    return _squares(shown, kinds, columns, "visibility w", read_out, vmin=0, vmax=1)


def attention(maps: Mapping[str, ArrayLike], segments: ArrayLike, *, columns: int = 2) -> Figure:
    """Attention [L, L] (query i down, key j across) of each name, rows sum to 1; colours on a log scale."""
    shown = {name: np.asarray(values, dtype=float) for name, values in maps.items()}
    norm = LogNorm(1e-3, 1, clip=True)
    return _squares(shown, np.asarray(segments), columns, "attention", None, norm=norm)


def _squares(
    panels: Mapping[str, np.ndarray],
    kinds: np.ndarray,
    columns: int,
    label: str,
    read_out: int | None,
    **scale: Any,
) -> Figure:
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    side = WIDTH / columns
    with canvas(rows, columns, height=rows * side + 0.5) as (figure, axes):
        for axis, (name, values) in zip(axes.flat, panels.items(), strict=False):
            _heat(values, axis, square=True, cbar=False, xticklabels=False, yticklabels=False, **scale)
            _margin(axis, kinds)
            if read_out is not None:
                axis.add_patch(Rectangle((0, read_out), len(kinds), 1, fill=False, ec="#D55E00", lw=1.5))
            axis.set_title(name)
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        axes[0, 0].set(ylabel="query i", xlabel="key j")
        picture = axes[0, 0].collections[0]
        figure.colorbar(picture, ax=axes, label=label, shrink=0.7, aspect=18, pad=0.02)
        _segment_legend(figure, kinds)
    return figure


def _heat(values: ArrayLike, axis: Axes, **options: Any) -> None:
    """A heat map in the colours of visibility, one square cell of the picture for each value."""
    seaborn.heatmap(np.asarray(values), ax=axis, **{"cmap": VISIBILITY} | options)
    axis.grid(visible=False)


def whole(visibility: ArrayLike, length: int) -> np.ndarray:
    """Float[L, L] from [L] (per key) or [L, L], the past filled in as visible: no recipe decides on it."""
    values = np.broadcast_to(np.asarray(visibility, dtype=float), (length, length)).copy()
    values[np.tril_indices(length)] = 1.0
    return values


def _margin(axis: Axes, kinds: np.ndarray) -> None:
    names = list(SEGMENTS)
    width = max(1.0, len(kinds) / 30)
    starts = np.flatnonzero(np.diff(kinds, prepend=-1)).tolist()
    for start, end in zip(starts, [*starts[1:], len(kinds)], strict=True):
        colour = SEGMENT_COLOURS[names[kinds[start]]] if kinds[start] < len(names) else "#ffffff"
        for corner, size in (
            ((-1.5 * width, start), (width, end - start)),
            ((start, len(kinds) + 0.5 * width), (end - start, width)),
        ):
            patch = Rectangle(corner, *size, color=colour, lw=0, clip_on=False)
            axis.add_patch(patch)
    axis.set_xlim(-1.6 * width, len(kinds))
    axis.set_ylim(len(kinds) + 1.6 * width, 0)


def _segment_legend(figure: Figure, kinds: np.ndarray) -> None:
    names = [name for index, name in enumerate(SEGMENTS) if index in set(kinds.tolist())]
    patches = [Patch(facecolor=SEGMENT_COLOURS[name], label=name) for name in names]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(names), 8), fontsize=8)


def grid(
    values: ArrayLike,
    *,
    rows: str,
    columns: str,
    label: str,
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """A heat map [R, C]; nan is left white."""
    numbers = np.asarray(values, dtype=float)
    every = {f"{axis}ticklabels": max(1, n // 10) for axis, n in zip("yx", numbers.shape, strict=True)}
    with canvas(height=1.2 + min(4.6, max(1.6, 0.26 * len(numbers)))) as (figure, axes):
        _heat(numbers, axes[0, 0], vmin=low, vmax=high, cbar_kws={"label": label, "pad": 0.02}, **every)
        axes[0, 0].set(xlabel=columns, ylabel=rows)
        axes[0, 0].tick_params(rotation=0)
    return figure


# --- negatives ------------------------------------------------------------------------------------------

KINDS = ("negative", "removed by the margin", "the same answer", "the same household", "positive, or itself")
_FILLS = ("#9ecae1", "#F0E442", "#CC79A7", "#E69F00", "#222222")
_MARKS = ("", "·", "=", "H", "")


def negatives(kinds: Mapping[str, ArrayLike]) -> Figure:
    """What each cell [B, B] of the sums of Eq. 7 is: an index into ``KINDS``; one panel for each sum."""
    with canvas(1, len(kinds), height=WIDTH / len(kinds) + 0.8) as (figure, axes):
        for axis, (name, cells) in zip(axes[0], kinds.items(), strict=True):
            cell = np.asarray(cells)
            marks = {"annot": np.array(_MARKS)[cell], "fmt": "", "annot_kws": {"size": 7}}
            options = {"cmap": ListedColormap(_FILLS), "vmin": 0, "vmax": len(KINDS) - 1, "cbar": False}
            if len(cell) <= 24:
                options |= marks
            _heat(cell, axis, square=True, xticklabels=False, yticklabels=False, **options)
            axis.set_title(name)
        axes[0, 0].set(ylabel="row i", xlabel="row j")
        patches = [Patch(facecolor=f, edgecolor=INK, label=k) for f, k in zip(_FILLS, KINDS, strict=True)]
        figure.legend(handles=patches, loc="outside lower center", ncols=5, fontsize=8)
    return figure


# --- training -------------------------------------------------------------------------------------------


def curves(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    label: str,
    steps: str = "step t",
    warm_steps: int | None = None,
    log: bool = False,
) -> Figure:
    """One line for each name, (steps, values); ``warm_steps`` shades the warm-up."""
    with canvas(height=2.9) as (figure, axes):
        axis: Axes = axes[0, 0]
        if warm_steps:
            axis.axvspan(-0.5, warm_steps - 0.5, color="#eeeeee", lw=0, label="warm-up")
        styles = looks(list(series))
        for name, (x, y) in series.items():
            drawn, found = styles[name], np.asarray(x)
            axis.plot(
                found,
                np.asarray(y, dtype=float),
                color=drawn.colour,
                ls=drawn.line,
                marker=drawn.marker,
                markevery=max(1, len(found) // 12),
                markersize=5,
                markeredgecolor=INK,
                markeredgewidth=0.5,
                label=name,
            )
        if log:
            axis.set_yscale("log")
        axis.set_xlabel(steps)
        axis.set_ylabel(label)
        if len(series) > 4:
            figure.legend(fontsize=8.5, loc="outside right upper")
        else:
            axis.legend(fontsize=8.5)
    return figure


def per_token(
    values: Mapping[str, ArrayLike],
    segments: ArrayLike,
    *,
    label: str,
    low: float | None = None,
    high: float | None = None,
) -> Figure:
    """A bar for every token [L] of one sequence, a panel for each name, coloured by template segment."""
    kinds, names = np.asarray(segments), list(SEGMENTS)
    colours = [SEGMENT_COLOURS[names[kind]] for kind in kinds]
    with canvas(len(values), 1, height=0.7 + 1.35 * len(values), sharex=True) as (figure, axes):
        for axis, (name, numbers) in zip(axes[:, 0], values.items(), strict=True):
            heights = np.asarray(numbers, dtype=float)
            axis.bar(range(len(kinds)), heights, color=colours, ec=INK, lw=0.3, width=0.9)
            axis.set_title(name)
            axis.set_ylabel(label)
            axis.set_ylim(low, high)
        axes[-1, 0].set_xlabel("token j, from the first tag to <USER>")
        _segment_legend(figure, kinds)
    return figure


# --- results --------------------------------------------------------------------------------------------


def nothing() -> Figure:
    """What stands for a picture of rows that have no numbers yet."""
    with canvas(height=0.8) as (figure, axes):
        axes[0, 0].set_axis_off()
        axes[0, 0].text(0, 0.5, "No row of this picture has numbers yet.", va="center")
    return figure


def forest(table: pl.DataFrame, *, label: str, zero: float | None = None, columns: int = 3) -> Figure:
    """Points with 95 % intervals: columns panel, row, value, ci_low, ci_high. ``zero`` draws a line there."""
    if table.is_empty():
        return nothing()
    panels = table["panel"].unique(maintain_order=True).to_list()
    names = table["row"].unique(maintain_order=True).to_list()
    styles = looks(names)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    height = rows * (0.55 + 0.2 * len(names)) + 0.4
    with canvas(rows, columns, height=height, sharey=True) as (figure, axes):
        for axis, panel in zip(axes.flat, panels, strict=False):
            part = table.filter(pl.col("panel") == panel)
            for name, value, low, high in part.select("row", "value", "ci_low", "ci_high").iter_rows():
                drawn = styles[name]
                axis.errorbar(
                    value,
                    names.index(name),
                    xerr=[[max(value - low, 0.0)], [max(high - value, 0.0)]],
                    fmt=drawn.marker,
                    color=drawn.colour,
                    ecolor=INK,
                    elinewidth=1.2,
                    markersize=6,
                    markeredgecolor=INK,
                    markeredgewidth=0.6,
                )
            if zero is not None:
                axis.axvline(zero, color=INK, lw=1, ls=":")
            axis.set_title(panel)
            axis.set_yticks(range(len(names)), names)
            axis.locator_params(axis="x", nbins=5)
            axis.tick_params(labelsize=8.5)
        axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
        for axis in list(axes.flat)[len(panels) :]:
            axis.set_visible(False)
        figure.supxlabel(label, fontsize=9.5)
    return figure


def embedding_map(points: ArrayLike, labels: Mapping[str, ArrayLike], *, axes_label: str) -> Figure:
    """Users [N, 2] as points, a panel for each task; its labels Bool[N] differ in colour and marker."""
    columns = min(3, len(labels))
    rows = -(-len(labels) // columns)
    place = np.asarray(points, dtype=float)
    with canvas(rows, columns, height=0.5 + rows * WIDTH / columns, sharex=True, sharey=True) as (
        figure,
        axes,
    ):
        for axis, (name, values) in zip(axes.flat, labels.items(), strict=False):
            kinds = np.where(np.asarray(values, dtype=bool), "yes", "no")
            order = ["no", "yes"]
            hue = {"hue": kinds, "hue_order": order, "palette": ["#56B4E9", "#D55E00"]}
            style = {"style": kinds, "style_order": order, "markers": ["o", "X"]}
            seaborn.scatterplot(x=place[:, 0], y=place[:, 1], ax=axis, s=14, lw=0.3, ec=INK, **hue, **style)
            axis.set_title(name)
            axis.legend(fontsize=8, title=None, loc="best", handletextpad=0.2)
        for axis in list(axes.flat)[len(labels) :]:
            axis.set_visible(False)
        figure.supxlabel(axes_label, fontsize=9.5)
    return figure


def result(auc: pl.DataFrame) -> Figure:
    """The comparison at a glance: mean AUC of every row and seed (auc.csv of stage ``compare``)."""
    mean = auc.filter(pl.col("task") == "mean")
    average = mean.group_by("recipe", maintain_order=True).agg(pl.col("auc", "ci_high").mean()).sort("auc")
    names = average["recipe"].to_list()
    with canvas(height=0.9 + 0.27 * len(names)) as (figure, axes):
        axis: Axes = axes[0, 0]
        for name, value, low, high in mean.select("recipe", "auc", "ci_low", "ci_high").iter_rows():
            drawn, row = looks(names)[name], names.index(name)
            axis.plot([low, high], [row, row], color=INK, lw=1.2)
            axis.plot(value, row, marker=drawn.marker, color=drawn.colour, ms=8, mec=INK, mew=0.7)
        for row, (value, high) in enumerate(average.select("auc", "ci_high").iter_rows()):
            axis.text(high, row, f"   {value:.3f}", va="center", fontsize=8.5)
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.margins(x=0.12)
        axis.set_xlabel("mean AUC of nine tasks, 95 % interval over households")
        axis.grid(axis="y", visible=False)
    return figure


if __name__ == "__main__":  # python -m ggsm_core.figures results/quick/auc.csv book/_static/result.png
    source, target = sys.argv[1:]
    result(pl.read_csv(source)).savefig(target, dpi=150, metadata={"Software": None})
