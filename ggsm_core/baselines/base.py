"""What every baseline sees, and the one interface they share.

n samples, E events, k features or dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, Self, TypeVar

import numpy as np
import polars as pl

from ggsm_core.data.events import DAY

if TYPE_CHECKING:  # the stages that only embed must not run again when the probe changes
    from ggsm_core.intervals import Floats, Ints

Train = TypeVar("Train")
Users = TypeVar("Users")

ACTS = ("bill", "app", "search")
"""What a user does; campaigns and displays come to the user."""
DISCOUNTS = ("coupon discount", "loyalty discount")
"""Lines of a bill that nobody spends."""


SYSTEM = "system.json"
"""Beside a system's embeddings: name, dimension, fit_seconds, embed_seconds, how the fit went."""


class BaselineError(ValueError):
    """A baseline that can't be fitted to what it is given."""


@dataclass(frozen=True, slots=True)
class Histories:
    """The history windows [a - days, a) of n samples, and nothing else of the event log.

    ``events``: row (0 .. n - 1, position in ``samples``), before (days from the event to the anchor, 1 to
    ``days``; null for time-less facts), time, modality, text, amount (0 where the log has none).
    ``future``: the same columns for the days that follow the anchor, with before from 0 down; only of
    training samples, and only where it was asked for.
    """

    samples: Ints  # [n], ascending
    users: Ints  # [n], equal for samples of one household
    events: pl.DataFrame  # [E]
    days: int
    future: pl.DataFrame

    @classmethod
    def read(cls, windows: Path, split: str, days: int, future_days: int = 0) -> Histories:
        """The histories of a split from a windows run.

        Raises ``BaselineError`` where the future of any other split than ``train`` is asked for.
        """
        if future_days and split != "train":
            raise BaselineError(
                f"future_days: {future_days} asked of split {split!r}; only train has a future"
            )
        samples = pl.read_parquet(windows / "samples.parquet").filter(pl.col("split") == split).sort("sample")
        before = pl.col("before")
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
            .join(samples.lazy().with_row_index("row").select("row", "user", "anchor"), on="user")
            .with_columns(before=pl.col("anchor") - pl.col("day"))
            .filter(before.is_null() | before.is_between(1 - future_days, days))
            .select("row", "before", "time", "modality", "text", "amount")
            .sort("row", "time", "modality", "text", "amount")
            .collect()
        )
        past = before.is_null() | (before > 0)
        users = samples["user"].rank("dense").cast(pl.Int64).to_numpy()
        return cls(samples["sample"].to_numpy(), users, seen.filter(past), days, seen.filter(~past))

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


def commonest(frame: pl.DataFrame, column: str, limit: int) -> list[str]:
    """The values of ``column`` that most samples have, at most ``limit``; ties in alphabetical order."""
    shared = frame.drop_nulls(column).group_by(column).agg(n=pl.col("row").n_unique())
    return shared.sort(["n", column], descending=[True, False]).head(limit)[column].to_list()


class Baseline(ABC, Generic[Train, Users]):
    """A system that turns users into vectors, as the paper's encoder does."""

    name: ClassVar[str]

    @abstractmethod
    def fit(self, train: Train) -> Self:
        """Learn from the training period."""

    @abstractmethod
    def embed(self, users: Users) -> Floats:
        """Float[n, k], one row for each of ``users``."""


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
