"""Faults that a row shows only to a clock or beside other rows: times of a zone, order, repetition."""

from __future__ import annotations

import polars as pl

from ggsm_core.data.events import SCHEMA, EventError

NOT_A_TIME = "time: not ISO 8601"
NO_OFFSET = "time: offset beyond -12:00 to +14:00"
NO_ZONE = "time: no zone"
AMBIGUOUS = "time: twice that day, clocks go back"
SKIPPED = "time: never that day, clocks go forward"
TOO_LATE = "time: after the end"
UNSORTED = "order: earlier than a row before of the same user"
DUPLICATE = "order: a row before is the same"
_STAMP = (
    r"^(?<day>\d{4}-\d\d-\d\d)(?:[T ](?<hour>\d\d:\d\d)(?<second>:\d\d(?:\.\d{1,6})?)?)?"
    r"(?:(?<utc>Z)|(?<sign>[+-])(?<hours>\d\d):?(?<minutes>[0-5]\d))?$"
)


def clock(rows: pl.DataFrame, zone: str | None) -> tuple[pl.DataFrame, list[str]]:
    """Rows whose ``time`` is a Datetime with a zone, and a column for each fault; the names of these columns.

    ``time`` comes as text (ISO 8601), date or datetime. A date is its midnight. ``zone`` is that of naive
    times and of the result; without it naive times are faults, and the result keeps the column's, else UTC.
    """
    kind, beyond = rows.schema["time"], pl.lit(False)
    if kind == pl.String:
        part = pl.col("time").str.strip_chars().str.extract_groups(_STAMP)
        rows = rows.with_columns(_part=part).with_columns(
            _naive=pl.format(
                "{}T{}{}",
                pl.col("_part").struct["day"],
                pl.col("_part").struct["hour"].fill_null("00:00"),
                pl.col("_part").struct["second"].fill_null(":00"),
            ).str.to_datetime("%Y-%m-%dT%H:%M:%S%.f", time_unit="us", strict=False)
        )
        given = pl.col("_part").struct
        minutes = given["hours"].cast(pl.Int64) * 60 + given["minutes"].cast(pl.Int64)
        shift = pl.when(given["sign"] == "-").then(-minutes).otherwise(minutes)
        beyond = ~shift.is_between(-12 * 60, 14 * 60)
        aware = given["utc"].is_not_null() | shift.is_not_null()
        known = pl.col("_naive") - pl.duration(minutes=shift.fill_null(0))
        moment = pl.when(aware).then(known).dt.replace_time_zone("UTC")
    elif isinstance(kind, pl.Datetime) and kind.time_zone is not None:
        zone = zone or kind.time_zone
        rows = rows.with_columns(_naive=pl.lit(None, pl.Datetime("us")))
        moment, aware = pl.col("time").dt.cast_time_unit("us").dt.convert_time_zone("UTC"), pl.lit(True)
    elif not isinstance(kind, pl.Datetime | pl.Date | pl.Null):
        raise EventError(f"time: {kind} is no time; give a timestamp, or text as 2017-01-05T18:30:00-05:00")
    else:
        rows = rows.with_columns(_naive=pl.col("time").cast(pl.Datetime("us"), strict=False))
        moment, aware = pl.lit(None, pl.Datetime("us", "UTC")), pl.lit(False)
    there = pl.col("time").is_not_null()
    rows = rows.with_columns(_aware=aware, _moment=moment, _beyond=beyond)
    naive = pl.col("_naive")
    # Null where the clock of the zone showed a naive time twice or never, and never.
    once = naive.dt.replace_time_zone(zone or "UTC", ambiguous="null", non_existent="null")
    twice = naive.dt.replace_time_zone(zone or "UTC", ambiguous="earliest", non_existent="null")
    rows = rows.with_columns(_once=once, _twice=twice)
    unaware = there & ~pl.col("_aware")
    faults = {
        NOT_A_TIME: there & naive.is_null() & pl.col("_moment").is_null(),
        NO_OFFSET: pl.col("_beyond"),
        NO_ZONE: unaware & naive.is_not_null() & pl.lit(zone is None),
        AMBIGUOUS: unaware & pl.col("_once").is_null() & pl.col("_twice").is_not_null(),
        SKIPPED: unaware & naive.is_not_null() & pl.col("_twice").is_null(),
    }
    time = pl.col("_moment").dt.convert_time_zone(zone or "UTC").fill_null(pl.col("_once"))
    rows = rows.with_columns(**{name: fault.fill_null(False) for name, fault in faults.items()}, time=time)
    return rows.drop("^_.*$"), list(faults)


class Order:
    """Which rows come too late or twice, over all batches.

    Rows of a user come in order of time, so a row that repeats an older one is either at the user's latest
    time, or out of order anyway: of each user only the rows at its latest time are kept, and its facts.
    """

    def __init__(self) -> None:
        self._latest: pl.DataFrame | None = None  # the schema's columns

    def judge(self, rows: pl.DataFrame, kinds: list[str]) -> pl.DataFrame:
        """``rows`` with the columns UNSORTED and DUPLICATE, about those without any other fault."""
        good = rows.filter(~pl.any_horizontal(kinds)).select("line", *SCHEMA)
        before = self._latest if self._latest is not None else good.drop("line").clear()
        touched = pl.col("user").is_in(good["user"].unique().implode())
        known = before.filter(touched).with_columns(line=pl.lit(0, good.schema["line"])).select(good.columns)
        both = pl.concat([known, good])
        reached = pl.col("time").cum_max().forward_fill().shift(1).over("user")
        both = both.with_columns(
            (pl.col("time") < reached).fill_null(False).alias(UNSORTED),
            (~pl.struct(*SCHEMA).is_first_distinct()).alias(DUPLICATE),
        )
        kept = both.filter(~pl.col(UNSORTED) & ~pl.col(DUPLICATE)).filter(
            (pl.col("time") == pl.col("time").max().over("user")) | pl.col("time").is_null()
        )
        self._latest = pl.concat([before.filter(~touched), kept.select(*SCHEMA)])
        judged = both.filter(pl.col("line") > 0).select(
            "line", UNSORTED, pl.col(DUPLICATE) & ~pl.col(UNSORTED)
        )
        return rows.join(judged, on="line", how="left", maintain_order="left").with_columns(
            pl.col(UNSORTED, DUPLICATE).fill_null(False)
        )
