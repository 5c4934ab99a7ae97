"""Events -> samples, records of the history, events of the future, labels.

A sample is a (user, anchor day a) with at least ``MIN_VISITS`` visits in its history [a - history_days, a).
Its future is [a, a + future_days). Inputs come from the history and from facts without a date, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ggsm_core.data import complete_journey, simulate, tasks
from ggsm_core.data.events import DAY, part_of_week, validate
from ggsm_core.progress import Progress
from ggsm_core.template import DAYS, KEPT, MODALITIES, NUMBERS, Record, User

MIN_VISITS = 3
TOTALS = {
    "bill": "all purchases",
    "minipro": "all campaigns and coupons",
    "spm": "all promoted purchases",
    "app": "all visits",
    "search": "all searches",
    "tabular": "all dated facts",
}
SUMMED = ("bill", "spm")
"""Modalities whose amounts are dollars, so that their sum over all kinds means something."""
ACTIVE_DAYS = "active days"
GROUP = pl.col("text").str.extract(r"\(([^()]+)\)$")
"""The wider group of a purchase, in brackets at the end of its text: ``soft drinks (grocery)``."""


class WindowError(ValueError):
    """Windows that the log can't fill."""


def samples(events: pl.DataFrame, data: Any) -> pl.DataFrame:
    """All samples: sample (0..n-1, by user and anchor), user, anchor, split (train, probe, none).

    ``temporal`` splits by anchor. ``new_users`` also halves the users by a seeded draw: one half is trained
    on, the other probed, and what falls between is ``none``.
    """
    anchors = sorted({*data.train_anchors, *data.probe_anchors})
    days = events.select(first=DAY.min(), last=DAY.max()).row(0, named=True)
    if days["last"] is None:
        raise WindowError("events: not one of them has a time")
    for anchor in anchors:
        start, end = anchor - data.history_days, anchor + data.future_days - 1
        if start < days["first"] or end > days["last"]:
            raise WindowError(
                f"data.train_anchors, data.probe_anchors: anchor {anchor} needs days {start} to {end}, the "
                f"log has {days['first']} to {days['last']}; move the anchor or shorten the windows"
            )
    visits = (
        events.lazy().filter((pl.col("modality") == "app") & ~pl.col("simulated")).select("user", day=DAY)
    )
    found = pl.concat(
        visits.filter(pl.col("day").is_between(anchor - data.history_days, anchor - 1))
        .group_by("user")
        .len()
        .filter(pl.col("len") >= MIN_VISITS)
        .select("user", anchor=pl.lit(anchor, pl.Int32))
        for anchor in anchors
    ).collect()
    train, probe = pl.col("anchor").is_in(data.train_anchors), pl.col("anchor").is_in(data.probe_anchors)
    if data.protocol == "new_users":
        users = found["user"].unique().sort().to_list()
        probed = np.random.default_rng(0).permutation(users)[: len(users) // 2].tolist()
        train, probe = train & ~pl.col("user").is_in(probed), probe & pl.col("user").is_in(probed)
    split = pl.when(train).then(pl.lit("train")).when(probe).then(pl.lit("probe")).otherwise(pl.lit("none"))
    return (
        found.sort("user", "anchor")
        .with_row_index("sample")
        .select(pl.col("sample").cast(pl.Int64), "user", "anchor", split=split)
    )


def draw_households(found: pl.DataFrame, households: int | None) -> pl.DataFrame:
    """The samples of ``households`` users, drawn with seed 0; sample numbers stay those of all samples."""
    users = found["user"].unique().sort()
    if households is None or households >= len(users):
        return found
    drawn = np.random.default_rng(0).choice(users.to_numpy(), households, replace=False).tolist()
    return found.filter(pl.col("user").is_in(drawn))


def history(
    events: pl.DataFrame, found: pl.DataFrame, history_days: int, *, breakdowns: bool = False
) -> pl.DataFrame:
    """The records of every sample: its events of one modality and text, as one row with ``NUMBERS``.

    Columns: sample, modality, rank (0 = most important: most events, then largest amount), text, the
    ``NUMBERS``, amount, count, last_day, simulated. Modality ``tabular`` also gets a total for each modality
    and the number of active days; with ``breakdowns``, purchases by group and visits by part of the week too.
    At most ``KEPT`` a modality.
    """
    # Texts as ordered codes: the same groups in the same order as with strings, in half the time.
    sums = _breakdowns(events) if breakdowns else events.clear()
    texts = {*events["text"].unique(), *sums["text"].unique()}
    codes = pl.Enum(sorted({*texts, *TOTALS.values(), ACTIVE_DAYS}))
    tabular = pl.lit("tabular", pl.Enum(MODALITIES))
    coded = events.with_columns(pl.col("text").cast(codes), day=DAY)
    dated, broken = (
        log.filter(pl.col("time").is_not_null()).select(
            "user", "day", "modality", "text", pl.col("amount").fill_null(0.0), "simulated"
        )
        for log in (coded, sums.with_columns(pl.col("text").cast(codes), day=DAY))
    )
    active = (
        dated.filter(~pl.col("simulated"))
        .select("user", "day", modality=tabular, text=pl.lit(ACTIVE_DAYS, codes), amount=0.0, simulated=False)
        .unique()
    )
    parts = []
    for (anchor,), group in found.group_by("anchor", maintain_order=True):
        # Only days before the anchor pass this filter: everything below sees the history and nothing else.
        inside = pl.col("day").is_between(anchor - history_days, anchor - 1)
        who = group.select("sample", "user", "anchor").lazy()
        kinds, *rest = pl.collect_all(
            [_aggregate(who.join(log.lazy().filter(inside), on="user")) for log in (dated, active, broken)]
        )
        totals = kinds.group_by("sample", "modality").agg(
            pl.col("amount", "count", "count_30d", "count_7d").sum(),
            pl.col("last").min(),
            pl.col("first", "last_day").max(),
            pl.col("simulated").any(),
        )
        totals = totals.with_columns(
            text=pl.col("modality").replace_strict(TOTALS, return_dtype=codes),
            amount=pl.when(pl.col("modality").is_in(SUMMED)).then("amount").otherwise(0.0),
            modality=tabular,
        )
        parts += [kinds, totals.select(kinds.columns), *rest]
    facts = (
        found.join(coded.filter(pl.col("time").is_null()).with_columns(amount=0.0), on="user")
        .group_by("sample", "modality", "text")
        .agg(pl.col("simulated").any())
        .select(pl.col(name) if name in _KIND or name == "simulated" else pl.lit(0).cast(kind).alias(name)
                for name, kind in parts[0].schema.items())
        .with_columns(last_day=pl.lit(None, pl.Int32))
    )  # fmt: skip
    return (
        pl.concat([*parts, facts])
        .with_columns(pl.col("amount").round(6))  # rounded: a sum must not depend on the order of its terms
        .lazy()
        .sort(
            *_KIND[:2], "count", pl.col("amount").abs(), "text", descending=[False, False, True, True, False]
        )
        .with_columns(rank=pl.int_range(pl.len(), dtype=pl.Int32).over("sample", "modality"))
        .filter(pl.col("rank") < KEPT)
        .select(
            "sample",
            "modality",
            "rank",
            pl.col("text").cast(pl.String),
            log_amount=pl.col("amount").sign() * pl.col("amount").abs().log1p(),
            log_count=pl.col("count").log1p(),
            days_since_last=pl.col("last") * _PER_DAY,
            days_since_first=pl.col("first") * _PER_DAY,
            log_count_30d=pl.col("count_30d").log1p(),
            log_count_7d=pl.col("count_7d").log1p(),
            amount="amount",
            count="count",
            last_day="last_day",
            simulated="simulated",
        )
        .collect()
    )


_KIND = ("sample", "modality", "text")
_PER_DAY = 1 / DAYS
"""A product: polars' quotients differ in the last bit with their place in a chunk, and they order records."""


def _breakdowns(events: pl.DataFrame) -> pl.DataFrame:
    """Purchases once more under the name of their group, visits under that of their part of the week."""
    log = events.lazy().filter(pl.col("time").is_not_null())
    when = part_of_week(pl.col("time").dt.weekday(), pl.col("time").dt.hour())
    bought = log.filter(pl.col("modality") == "bill").with_columns(text=pl.format("all {}", GROUP))
    visits = log.filter(pl.col("modality") == "app").with_columns(
        text=pl.format("visits on a {}", when), amount=0.0
    )
    both = pl.concat([bought.drop_nulls("text"), visits])
    return both.with_columns(modality=pl.lit("tabular", pl.Enum(MODALITIES))).collect()


def _aggregate(window: pl.LazyFrame) -> pl.LazyFrame:
    before = (pl.col("anchor") - pl.col("day")).cast(pl.Int64)
    return window.group_by(_KIND).agg(
        amount=pl.col("amount").sum(),
        count=pl.len().cast(pl.Int64),
        count_30d=(before <= 30).sum().cast(pl.Int64),
        count_7d=(before <= 7).sum().cast(pl.Int64),
        last=before.min(),
        first=before.max(),
        last_day=pl.col("day").max(),
        simulated=pl.col("simulated").any(),
    )


def future(events: pl.DataFrame, found: pl.DataFrame, future_days: int) -> pl.DataFrame:
    """Real events after the anchor, what training pairs are made from; never an input.

    Columns: sample, offset (0..future_days - 1), hour, weekday (1 = Monday), modality, text, item, amount.
    """
    dated = events.lazy().filter(pl.col("time").is_not_null() & ~pl.col("simulated")).with_columns(day=DAY)
    offset = pl.col("day") - pl.col("anchor")
    return (
        found.lazy()
        .select("sample", "user", "anchor")
        .join(dated, on="user")
        .filter(offset.is_between(0, future_days - 1))
        .sort("sample", "time", "modality", "text", "item", "amount")
        .select(
            "sample",
            offset=offset.cast(pl.Int32),
            hour=pl.col("time").dt.hour().cast(pl.Int32),
            weekday=pl.col("time").dt.weekday().cast(pl.Int32),
            modality="modality",
            text="text",
            item="item",
            amount="amount",
        )
        .collect()
    )


def users(records: pl.DataFrame, template: Any) -> Iterator[tuple[int, User]]:
    """Each sample of ``history`` as the template's ``User``: its most important records, oldest first.

    ``template`` holds the number of records kept per modality (params.template). In order of ``sample``.
    """
    limit = (
        pl.col("modality")
        .cast(pl.String)
        .replace_strict({name: getattr(template, name) for name in MODALITIES})
    )
    kept = records.filter(pl.col("rank") < limit).sort(
        "sample",
        "modality",
        "days_since_last",
        "days_since_first",
        "text",
        descending=[False, False, True, True, False],
    )
    names = kept["modality"].cast(pl.String).to_list()
    numbers = kept.select(NUMBERS).iter_rows()
    made = map(Record, kept["text"].to_list(), numbers, kept["simulated"].to_list())
    rows = zip(kept["sample"].to_list(), names, made, strict=True)
    for sample, group in groupby(rows, key=itemgetter(0)):
        user: dict[str, list[Record]] = {}
        for _, name, record in group:
            user.setdefault(name, []).append(record)
        yield sample, User(user)


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``windows``: writes events, samples, records, future and labels (.parquet) into ``out``.

    ``samples`` has a column ``simulated`` if, and only if, a simulator has filled what the data lacks.
    """
    data = params.data
    progress(0, 4, "reading The Complete Journey")
    bought = complete_journey.purchases()
    events = complete_journey.events(bought)
    progress(1, 4, f"{events.height:,} events")
    if data.search == "simulated":
        events = pl.concat([events, simulate.searches(validate(events))])
    events = validate(events)
    every = samples(events, data)
    labels = tasks.labels(
        every,
        bought,
        complete_journey.campaigns(),
        complete_journey.redemptions(),
        complete_journey.incomes(),
        data.future_days,
    )
    del bought
    if data.search == "simulated":  # whoever reads these samples tells by it
        every = every.with_columns(simulated=pl.lit(True))
    found = draw_households(every, data.households)
    progress(2, 4, f"{found.height:,} samples of {found['user'].n_unique():,} users")
    records = history(events, found, data.history_days, breakdowns=data.breakdowns)
    progress(3, 4, f"{records.height:,} records")
    tables = {
        "events": events.filter(pl.col("user").is_in(found["user"].unique().to_list())),
        "samples": found,
        "labels": labels.filter(pl.col("sample").is_in(found["sample"].to_list())),
        "records": records,
        "future": future(events, found, data.future_days),
    }
    for name, table in tables.items():
        # One chunk, so that the bytes do not depend on how the work was cut up.
        table.rechunk().write_parquet(out / f"{name}.parquet", compression="lz4", row_group_size=1 << 20)
    progress(4, 4, "windows written")
