"""CDNOW (1997-1998) as an event log: who bought how many CDs on which day, and for how much. Nothing else.

A second adapter, on the barest data there is, so that the schema isn't made for one. The table lies inside
the package ``Lifetimes``: 69,659 purchases of 23,570 customers who all began in the first quarter of 1997.
"""

from __future__ import annotations

import polars as pl

from ggsm_core.data import privacy
from ggsm_core.data.events import DAY, ZONE, part_of_week, rows_of
from ggsm_core.provenance import package_files


def purchases() -> pl.DataFrame:
    """Every purchase: user (a pseudonym), time (midnight), day, cds, amount (dollars)."""
    (path,) = package_files("lifetimes", "datasets/CDNOW_master.txt")  # without importing it
    field = pl.col("line").str.extract_groups(
        r"^ *(?<user>\d+) +(?<day>\d{8}) +(?<cds>\d+) +(?<amount>[\d.]+)$"
    )
    lines = pl.scan_csv(path, has_header=True, separator="\n", new_columns=["line"])
    return (
        lines.select(field.alias("field"))
        .unnest("field")
        .select(
            user=privacy.hidden(pl.col("user"), privacy.public_salt()),
            time=pl.col("day").str.to_datetime("%Y%m%d", time_unit="us").dt.replace_time_zone(ZONE),
            cds=pl.col("cds").cast(pl.Int32),
            amount=pl.col("amount").cast(pl.Float64),
        )
        .with_columns(day=DAY)
        .collect()
    )


def events(bought: pl.DataFrame) -> pl.DataFrame:
    """The log: bill, per purchase (amount: dollars); app, per day with one (amount: days since the last).

    Hours aren't known, so a visit tells no more than weekday or weekend.
    """
    cds = (
        pl.when(pl.col("cds") == 1)
        .then(pl.lit("one cd"))
        .when(pl.col("cds") <= 3)
        .then(pl.lit("two or three cds"))
        .when(pl.col("cds") <= 9)
        .then(pl.lit("four to nine cds"))
        .otherwise(pl.lit("ten or more cds"))
    )
    week = part_of_week(pl.col("time").dt.weekday(), pl.lit(12)).str.split(" ").list.first()
    visits = bought.lazy().select("user", "time", "day").unique().sort("user", "day")
    parts = [
        rows_of("bill", bought.lazy(), text=cds, item="cd"),
        rows_of(
            "app",
            visits,
            text=pl.format("visit on a {}", week),
            amount=pl.col("day").diff().over("user"),
            item="shop",
        ),
    ]
    return pl.concat(parts).collect()
