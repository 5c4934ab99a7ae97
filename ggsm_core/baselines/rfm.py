"""Recency, frequency, spend: the eleven numbers every shop already has, for a logistic regression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
import polars as pl

from ggsm_core.baselines.base import ACTS, DISCOUNTS, Baseline, Histories, total

if TYPE_CHECKING:
    from ggsm_core.intervals import Floats


class Rfm(Baseline[Histories, Histories]):
    """Days since the last and the first visit, and over a week, a month and the whole history:
    visits (distinct times at which the user did something), days with a visit, and spend. As log(1 + x)."""

    name = "rfm"

    def fit(self, train: Histories) -> Self:
        """Nothing to learn."""
        return self

    def embed(self, users: Histories) -> Floats:
        """Features Float[n, 11]; without any act, recency is the length of the history."""
        acts = users.timed.filter(pl.col("modality").is_in(ACTS))
        numbers = acts.group_by("row").agg(
            pl.col("before").min().alias("last"),
            pl.col("before").max().alias("first"),
            *(
                pl.col("time").filter(pl.col("before") <= d).n_unique().alias(f"visits_{s}")
                for s, d in users.spans.items()
            ),
            *(
                pl.col("before").filter(pl.col("before") <= d).n_unique().alias(f"days_{s}")
                for s, d in users.spans.items()
            ),
        )
        bills = users.timed.filter(
            (pl.col("modality") == "bill") & ~pl.col("text").is_in(DISCOUNTS)
        ).group_by("row")
        spend = bills.agg(total(d).alias(f"spend_{s}") for s, d in users.spans.items())
        everyone = pl.DataFrame({"row": np.arange(len(users.samples))}, schema={"row": numbers.schema["row"]})
        for part in (numbers, spend):
            everyone = everyone.join(part, on="row", how="left", maintain_order="left")
        table = everyone.with_columns(
            pl.col("last", "first").fill_null(users.days), pl.exclude("last", "first").fill_null(0)
        )
        values = table.drop("row").to_numpy().astype(np.float64)
        return np.sign(values) * np.log1p(np.abs(values))
