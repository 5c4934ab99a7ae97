"""Simulated search queries, for data without any. Off by default (``data.search``).

A query is derived from one purchase and carries that purchase's time, so a window holds a simulated query
only if it holds its purchase: nothing can leak from the future. Everything here is marked ``simulated``:
events and records (a column), the template's ``Record`` and its text, the samples, and every table of results
made from them (a column ``simulated``, which tables of real data alone don't have).
"""

from __future__ import annotations

import numpy as np
import polars as pl

SHARE = 0.05
"""Share of purchase events that a query is made for."""


def searches(events: pl.DataFrame, seed: int = 0) -> pl.DataFrame:
    """Search events for a seeded sample of the ``bill`` events of a validated log (same columns)."""
    bought = events.filter((pl.col("modality") == "bill") & pl.col("item").is_not_null())
    drawn = np.random.default_rng(seed).random(bought.height) < SHARE
    return bought.filter(pl.Series(drawn)).with_columns(
        modality=pl.lit("search", dtype=events.schema["modality"]),
        text=pl.format("search for {}", "text"),
        amount=pl.lit(None, dtype=pl.Float64),
        simulated=pl.lit(True),
    )
