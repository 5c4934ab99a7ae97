"""What the chapters share: the one household they follow, tables, and sentences made from numbers.

Nothing past ``data.privacy`` knows a household's number; a page shows the beginning of its pseudonym.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from ggsm_core import comparison, params, runs, sections
from ggsm_core.data import windows
from ggsm_core.evaluation import households_of
from ggsm_core.figures import SEGMENT_COLOURS
from ggsm_core.template import MODALITIES, SPECIAL_TOKENS, User

SHARED = ("windows", "pairs", "texts", "pretrain", "tokens")
"""Stages whose runs all recipes share."""


class StoryError(ValueError):
    """Data that does not hold what a chapter is about."""


def short_name(user: str) -> str:
    """What the chapters call a household: its pseudonym's beginning, in letters that look like no number."""
    return "household " + user[:4].translate(str.maketrans("0123456789", "ghijklmnop"))


@dataclass(frozen=True)
class Example:
    """The household that the book follows, at its last training anchor."""

    user: str = field(repr=False)
    sample: int = field(repr=False)
    anchor: int
    name: str


def example(folder: Path) -> Example:
    """The same household in every chapter of a profile, chosen by rule: nobody picked a pretty one.

    Of those with a sample at the last training anchor, the households whose history fills most modalities and
    for which dateless facts are known; of these the one with the median number of events.
    """
    samples = pl.scan_parquet(folder / "samples.parquet").filter(pl.col("split") == "train")
    last = samples.filter(pl.col("anchor") == pl.col("anchor").max())
    records = pl.scan_parquet(folder / "records.parquet")
    dated = pl.col("last_day").is_not_null() & (pl.col("modality").cast(pl.String) != "tabular")
    candidates = (
        last.join(records, on="sample")
        .group_by("sample", "user", "anchor")
        .agg(
            modalities=pl.col("modality").filter(dated).n_unique(),
            facts=pl.col("last_day").is_null().any(),
            events=pl.col("count").filter(dated).sum(),
        )
        .collect()
    )
    if candidates.is_empty():
        raise StoryError(f"{folder.name}: no household has a training sample; check data.train_anchors")
    rank = pl.struct("facts", "modalities").rank("max")
    rich = candidates.filter(rank == rank.max())
    chosen = rich.sort("events", "user").row(len(rich) // 2, named=True)
    return Example(chosen["user"], chosen["sample"], chosen["anchor"], short_name(chosen["user"]))


def shared(profile: str) -> dict[str, Path]:
    """Stage -> folder of its run, for all stages that recipes share."""
    return {stage: runs.ensure(profile, stage).folder for stage in SHARED}


def user_of(folders: Mapping[str, Path], sample: int, template: sections.Template) -> User:
    """The records of one sample, as the template shows them."""
    records = pl.scan_parquet(folders["windows"] / "records.parquet").filter(pl.col("sample") == sample)
    return dict(windows.users(records.collect(), template))[sample]


def rows(profile: str, *names: str) -> list[str]:
    """Those of ``names`` that the profile trains or probes; says which it leaves out."""
    loaded = params.load(profile)
    here = {*loaded.recipes.active, *loaded.baselines}
    if absent := [name for name in names if name not in here]:
        print(f"Profile {loaded.name!r} leaves out {', '.join(absent)}; this page shows the others.")
    return [name for name in names if name in here]


def _turns(metrics: pl.DataFrame) -> int:
    """About a tenth of the steps, in whole turns of the granularities: a batch holds pairs of one alone."""
    turn = len(sections.Pairs().granularities)
    return turn * max(round(len(metrics) / 10 / turn), 1)


def ends(metrics: pl.DataFrame, *names: str) -> dict[str, tuple[float, float]]:
    """Metric -> its means over the first and over the last tenth of the steps.

    One step against another would compare two granularities, whose losses differ more than training does.
    """
    count = _turns(metrics)
    series = {name: metrics[name].to_numpy() for name in names}
    return {name: (float(s[:count].mean()), float(s[-count:].mean())) for name, s in series.items()}


def outcome(metrics: pl.DataFrame) -> dict[str, float]:
    """What contrastive training did, over the last tenth of a run's steps.

    loss beside chance, the loss log(1 + true negatives) of an encoder that gives all one embedding; positive
    and negative, the mean cosines of pairs and of all others; apart, their difference, and apart at first,
    over the first tenth. Collapsed is where chance and loss are equal and both cosines 1: the loss has fallen
    all the same.
    """
    metrics = metrics.with_columns(
        chance=(1 + pl.col("true_negatives")).log(), apart=pl.col("positive") - pl.col("negative")
    )
    found = ends(metrics, "loss", "chance", "positive", "negative", "apart")
    return {name: pair[1] for name, pair in found.items()} | {"apart at first": found["apart"][0]}


def learned(profile: str, rows: Sequence[str]) -> pl.DataFrame:
    """The ``outcome`` of each row's first seed."""
    ran = {row: runs.ensure(profile, "contrast", row) for row in rows}
    return pl.DataFrame([{"row": row, **outcome(run.metrics())} for row, run in ran.items()])


def gaps(profile: str, rows: Sequence[str], reference: str) -> pl.DataFrame:
    """Paired differences of ``rows`` to ``reference``, each task and the mean, as stage ``compare`` has them.

    From the profile's first seed alone, and Holm's correction covers these rows alone; the comparison takes
    all seeds and corrects over all rows.
    """
    evaluation, folder = params.load(profile).evaluation, runs.ensure(profile, "windows").folder
    households = households_of(folder, evaluation)
    users = pl.read_parquet(folder / "samples.parquet", columns=["sample", "user"])
    read = {
        row: comparison.Row.read(f"probe:{row}", runs.ensure(profile, "probe", row).folder, users, households)
        for row in (*rows, reference)
    }
    table = comparison.differences(
        {name: row.points for name, row in read.items()},
        {name: row.draws for name, row in read.items()},
        read[reference].table["task"].to_list(),
    )
    return table.filter(pl.col("reference") == reference)


@dataclass(frozen=True)
class Page:
    """Something that shows itself as HTML in a notebook and in the book."""

    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.html


def table(
    frame: pl.DataFrame,
    *,
    caption: str = "",
    decimals: int | Mapping[str, int] = 3,
    bold: Sequence[str] = (),
    colour: str | None = None,
) -> Page:
    """A polars frame as a table for readers: numbers on the right, ``decimals`` digits, null as a dash.

    ``bold`` sets rows in bold whose first column is one of its names. Column ``colour``, if given, holds a
    modality and is not shown but colours the row's first cell.
    """
    columns = [name for name in frame.columns if name != colour]
    digits = decimals if isinstance(decimals, Mapping) else dict.fromkeys(columns, decimals)
    numeric = {name for name in columns if frame.schema[name].is_numeric()}
    align = {name: "right" if name in numeric else "left" for name in columns}
    head = "".join(f'<th style="text-align:{align[name]}">{html.escape(name)}</th>' for name in columns)
    body = []
    for row in frame.iter_rows(named=True):
        cells = []
        for index, name in enumerate(columns):
            text = _cell(row[name], digits.get(name, 3))
            edge = f";border-left:6px solid {SEGMENT_COLOURS[row[colour]]}" if colour and not index else ""
            strong = f"<strong>{text}</strong>" if row[columns[0]] in bold else text
            cells.append(f'<td style="text-align:{align[name]}{edge}">{strong}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    # Reached by the tab key, so that a wide table can be scrolled without a mouse.
    region = f'role="region" tabindex="0" aria-label="{html.escape(caption or "table")}"'
    return Page(
        f'<div style="overflow-x:auto" {region}><table class="dataframe">{title}{inner}</table></div>'
    )


def _cell(value: object, decimals: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.{decimals}f}"
    if isinstance(value, int):
        return f"{value:,}"
    return html.escape(str(value))


def coloured(text: str) -> Page:
    """A rendered template with each modality on a ground of its own colour and every tag in bold."""
    tags = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
    lines = []
    for line in text.split("\n"):
        kind = next((name for name in MODALITIES if line.startswith(f"<{name}>")), "user")
        marked = tags.sub(lambda tag: f"\0{tag[0]}\1", line)
        safe = html.escape(marked).replace("\0", "<strong>").replace("\1", "</strong>")
        lines.append(
            f'<div style="border-left:6px solid {SEGMENT_COLOURS[kind]};background:{SEGMENT_COLOURS[kind]}22;'
            f'padding:2px 8px;margin:2px 0">{safe}</div>'
        )
    style = "font:.85em monospace;background:#fff;color:#222;padding:6px;white-space:pre-wrap"
    return Page(f'<div style="{style}">{"".join(lines)}</div>')


def signed(value: float, low: float, high: float, decimals: int = 4) -> str:
    """``+0.0021 [-0.0030, +0.0071]``, with real minus signs."""
    return f"{value:+.{decimals}f} [{low:+.{decimals}f}, {high:+.{decimals}f}]".replace("-", "−")


def across(gaps: pl.DataFrame, *beside: str) -> pl.DataFrame:
    """One line a row of ``gaps`` (columns row, ``beside`` and those of a paired difference), for readers.

    Each reference becomes a column: the difference with its interval, and the verdict where one is shown.
    """
    shown = pl.struct("difference", "ci_low", "ci_high").map_elements(
        lambda gap: signed(*gap.values()), return_dtype=pl.String
    )
    verdict = (
        pl.when(pl.col("verdict") == comparison.NONE_SHOWN)
        .then(pl.lit(""))
        .otherwise(" " + pl.col("verdict"))
    )
    cells = gaps.select("row", *beside, to=pl.format("minus {}", "reference"), cell=shown + verdict)
    return cells.pivot("to", index=["row", *beside], values="cell")


def between(value: float, low: float, high: float, decimals: int = 3) -> str:
    """``0.712 [0.701, 0.722]``, on one line."""
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]".replace(" ", "\u00a0")


def compared(differences: pl.DataFrame, row: str, reference: str, task: str = comparison.MEAN) -> str:
    """One sentence on ``row`` against ``reference``, verdict included (a table of stage ``compare``)."""
    found = differences.filter(
        (pl.col("row") == row) & (pl.col("reference") == reference) & (pl.col("task") == task)
    )
    if len(found) != 1:
        raise StoryError(f"differences: {len(found)} lines for {row} against {reference} on {task}, not one")
    line = found.row(0, named=True)
    what = "mean of the tasks" if task == comparison.MEAN else task
    gap = signed(line["difference"], line["ci_low"], line["ci_high"])
    return f"{row} against {reference}, {what}: {gap} AUC, **{line['verdict']}**"


def gradient_share(norms: np.ndarray, valid: np.ndarray, segments: np.ndarray) -> pl.DataFrame:
    """Mean norm and share of all gradient by template segment: norms, valid, segments [B, L]."""
    names = np.array([*SEGMENT_COLOURS])
    frame = pl.DataFrame({"segment": names[segments[valid]], "norm": norms[valid].astype(float)})
    return (
        frame.group_by("segment")
        .agg(
            pl.len().alias("tokens"),
            pl.col("norm").mean().alias("mean norm"),
            (pl.col("norm").sum() / frame["norm"].sum()).alias("share of all gradient"),
        )
        .sort(pl.col("segment").replace_strict({name: i for i, name in enumerate(names)}))
    )
