"""The event log: the one format every data set is brought into before anything else happens.

| column | type | meaning |
| --- | --- | --- |
| user | String | whose event it is |
| time | Datetime(us, ZONE) | local time; null for time-less facts (modality ``tabular`` only) |
| modality | Enum(MODALITIES) | the template's tag it goes under |
| text | String | what happened, in words; few distinct texts, since each is encoded once |
| amount | Float64 | a number that goes with it, or null |
| item | String | a stable code of what it is about, or null |
| simulated | Boolean | True for what no person did |
"""

from __future__ import annotations

from datetime import date

import polars as pl

from ggsm_core.template import MODALITIES

ZONE = "America/New_York"
EPOCH = date(2017, 1, 1)
"""Day 0 of every day number, in local time."""

SCHEMA = pl.Schema(
    {
        "user": pl.String(),
        "time": pl.Datetime("us", ZONE),
        "modality": pl.Enum(MODALITIES),
        "text": pl.String(),
        "amount": pl.Float64(),
        "item": pl.String(),
        "simulated": pl.Boolean(),
    }
)
RULES = {
    "user: null": pl.col("user").is_null(),
    "text: null or empty": pl.col("text").is_null() | (pl.col("text").str.strip_chars() == ""),
    "time: null away from tabular": pl.col("time").is_null() & (pl.col("modality") != "tabular"),
    "simulated: null": pl.col("simulated").is_null(),
    "amount: not finite": ~pl.col("amount").is_finite(),
}
"""What no row may be, by the name that errors give it."""
DAY = (pl.col("time").dt.date() - EPOCH).dt.total_days().cast(pl.Int32)


def part_of_week(weekday: pl.Expr, hour: pl.Expr) -> pl.Expr:
    """``weekend evening`` and the like, from weekday (1 = Monday) and hour; they begin at 5, 12, 17, 22 h."""
    part = (
        pl.when(hour.is_between(5, 11))
        .then(pl.lit("morning"))
        .when(hour.is_between(12, 16))
        .then(pl.lit("afternoon"))
        .when(hour.is_between(17, 21))
        .then(pl.lit("evening"))
        .otherwise(pl.lit("night"))
    )
    return pl.format(
        "{} {}", pl.when(weekday >= 6).then(pl.lit("weekend")).otherwise(pl.lit("weekday")), part
    )


class EventError(ValueError):
    """An event log that does not follow ``SCHEMA``."""


def validate(events: pl.DataFrame) -> pl.DataFrame:
    """The log with exactly the columns of ``SCHEMA``, in one fixed order of rows.

    ``modality`` may come as String and ``time`` in any zone (converted to ``ZONE``). Raises ``EventError``.
    """
    if missing := [name for name in SCHEMA if name not in events.columns]:
        raise EventError(f"events: no column {missing}; needed are {', '.join(SCHEMA)}")
    time = events.schema["time"]
    if not isinstance(time, pl.Datetime) or time.time_zone is None:
        raise EventError(f"time: {time} has no time zone; attach one with dt.replace_time_zone")
    if unknown := sorted(
        set(events["modality"].cast(pl.String).unique().to_list()) - set(MODALITIES), key=str
    ):
        raise EventError(f"modality: {unknown} not in the template; allowed: {', '.join(MODALITIES)}")
    events = events.with_columns(pl.col("time").dt.convert_time_zone(ZONE))
    try:
        events = events.select(pl.col(name).cast(kind) for name, kind in SCHEMA.items())
    except pl.exceptions.PolarsError as error:
        raise EventError(f"events: {error}") from None
    for rule, broken in RULES.items():
        if bad := events.filter(broken.fill_null(False)).head(1).rows(named=True):
            raise EventError(f"{rule}, for example in {bad[0]}")
    return events.sort("user", "time", "modality", "text", "item", "amount")
