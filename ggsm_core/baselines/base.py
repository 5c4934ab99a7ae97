"""What every baseline sees, and the one interface they share.

n samples, E events, k features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import polars as pl

from ggsm_core.data.events import DAY
from ggsm_core.evaluation import Floats, Ints

ACTS = ("bill", "app", "search")
"""What a user does; campaigns and displays come to the user."""
DISCOUNTS = ("coupon discount", "loyalty discount")
"""Lines of a bill that nobody spends."""


@dataclass(frozen=True, slots=True)
class Histories:
    """The history windows [a - days, a) of n samples, and nothing else of the event log.

    ``events``: row (0 .. n - 1, position in ``samples``), before (days from the event to the anchor, 1 to
    ``days``; null for time-less facts), time, modality, text, amount (0 where the log has none).
    """

    samples: Ints  # [n], ascending
    events: pl.DataFrame  # [E]
    days: int

    @classmethod
    def read(cls, windows: Path, split: str, days: int) -> Histories:
        """The histories of a split from a windows run."""
        samples = pl.scan_parquet(windows / "samples.parquet").filter(pl.col("split") == split).sort("sample")
        seen = (
            pl.scan_parquet(windows / "events.parquet")
            .select(
                "user",
                "time",
                pl.col("modality").cast(pl.String),
                "text",
                pl.col("amount").fill_null(0.0),
                day=DAY,
            )
            .join(samples.with_row_index("row").select("row", "user", "anchor"), on="user")
            .with_columns(before=pl.col("anchor") - pl.col("day"))
            .filter(pl.col("before").is_null() | pl.col("before").is_between(1, days))
            .select("row", "before", "time", "modality", "text", "amount")
            .sort("row", "time", "modality", "text", "amount")
        )
        return cls(samples.collect()["sample"].to_numpy(), seen.collect(), days)

    @property
    def spans(self) -> dict[str, int]:
        """Days that counts and sums look back."""
        return {"week": min(7, self.days), "month": min(30, self.days), "all": self.days}

    @property
    def timed(self) -> pl.DataFrame:
        """Events that have a time."""
        return self.events.filter(pl.col("before").is_not_null())


def total(days: int) -> pl.Expr:
    """Sum of the amounts of the last ``days`` days, rounded: it must not depend on the number of threads."""
    return pl.col("amount").filter(pl.col("before") <= days).sum().round(4)


class Baseline(ABC):
    """A system that turns histories into vectors, as the paper's encoder does."""

    name: ClassVar[str]
    estimator: ClassVar[Literal["linear", "boosted"]]  # the probe that suits its vectors

    @abstractmethod
    def fit(self, train: Histories) -> Self:
        """Learn what the features are, from histories of the training period."""

    @abstractmethod
    def embed(self, users: Histories) -> Floats:
        """Features Float[n, k] of ``users``, one row for each of ``users.samples``."""


def scatter(frame: pl.DataFrame, key: str, keys: list[str], n: int, empty: float = 0.0) -> Floats:
    """Rows (``row``, ``key``, V value columns) as Float[n, len(keys) * V]; ``empty`` where there is none.

    Keys that aren't in ``keys`` are left out: they were not there in the training period.
    """
    columns = pl.DataFrame(
        {key: keys, "column": range(len(keys))}, schema={key: pl.String, "column": pl.Int64}
    )
    known = frame.join(columns, on=key)
    values = known.drop("row", key, "column")
    matrix = np.full((n, len(keys), values.width), empty)
    matrix[known["row"].to_numpy(), known["column"].to_numpy()] = values.to_numpy()
    return matrix.reshape(n, -1)
