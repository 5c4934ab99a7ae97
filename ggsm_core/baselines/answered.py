"""What the language models of Table 2 learn from: our own template's sequences, with their answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from ggsm_core.order import QA
from ggsm_core.tokens import Sequences

if TYPE_CHECKING:
    from ggsm_core.intervals import Ints


@dataclass(frozen=True)
class Users:
    """Sequences, and the vector Float[F] of a record's text."""

    sequences: Sequences
    feature_of: Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Answered:
    """Training pairs: row i of ``users`` and ``answers`` is pair i. n samples, each with several pairs."""

    users: Users
    answers: Sequences
    answer_ids: Ints  # of each pair
    of_sample: list[Ints]  # the pairs of each sample
    households: Ints  # [n]

    @classmethod
    def read(cls, tokens: Path, feature_of: Callable[[str], np.ndarray]) -> Answered:
        """From a run of stage ``tokens``: D_behavior alone, also where D_qa lies beside it."""
        table = pl.read_parquet(tokens / "pairs.parquet").with_row_index("row")
        behaviour = table.filter(pl.col("granularity") != QA)
        samples = behaviour.group_by("sample", maintain_order=True).agg("row", pl.col("user_id").first())
        return cls(
            Users(Sequences.load(tokens, "train_users"), feature_of),
            Sequences.load(tokens, "train_answers"),
            table["answer_id"].to_numpy().astype(np.int64),
            [np.array(rows) for rows in samples["row"]],
            samples["user_id"].to_numpy(),
        )
