"""The records as numbers: all that the encoder is given, in as many dimensions, and no decoder.

A user is a long sparse row: for each kind of record (modality and text) that enough users have, whether the
template shows it, and its ``NUMBERS``. A truncated singular value decomposition, learnt on the training
period, makes it as long as an embedding. What an encoder of these records learns must show beside this row;
what this row lacks against the hand-made features was lost before any encoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import polars as pl
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import MaxAbsScaler

from ggsm_core.baselines.base import Baseline
from ggsm_core.baselines.fitting import learn
from ggsm_core.template import NUMBERS, User
from ggsm_core.tokens import read_users

if TYPE_CHECKING:
    from ggsm_core.intervals import Floats, Ints
    from ggsm_core.progress import Progress

WIDTH = 1 + len(NUMBERS)
"""Columns of a kind: shown or not, and its numbers."""


class Records(Baseline[list[User], list[User]]):
    """``dimensions`` of the decomposition; kinds that fewer than ``at_least`` users have are left out."""

    name = "records"

    def __init__(self, dimensions: int, at_least: int = 40) -> None:
        self.dimensions, self.at_least = dimensions, at_least

    def fit(self, train: list[User]) -> Self:
        """Find the kinds, the scale of each column, and the decomposition."""
        had = Counter(kind for user in train for kind in {kind for kind, _ in _kinds(user)})
        kept = sorted(kind for kind, n in had.items() if n >= self.at_least)
        self.kinds = {kind: i for i, kind in enumerate(kept)}
        table = self._table(train)
        self.scale = MaxAbsScaler().fit(table)
        count = min(self.dimensions, table.shape[1])
        self.decomposition = TruncatedSVD(count, random_state=0).fit(self.scale.transform(table))
        return self

    def embed(self, users: list[User]) -> Floats:
        """Float[n, d]."""
        vectors: Floats = self.decomposition.transform(self.scale.transform(self._table(users)))
        return vectors

    def _table(self, users: list[User]) -> csr_matrix:
        """[n, kinds * WIDTH]; of two records of one kind the later one counts."""
        found = {
            (row, self.kinds[kind]): (1.0, *numbers)
            for row, user in enumerate(users)
            for kind, numbers in _kinds(user)
            if kind in self.kinds
        }
        places = np.array(list(found), np.int64).reshape(-1, 2)
        columns = (places[:, 1:] * WIDTH + np.arange(WIDTH)).ravel()
        values = np.array(list(found.values()), float).ravel()
        shape = (len(users), len(self.kinds) * WIDTH)
        return csr_matrix((values, (places[:, 0].repeat(WIDTH), columns)), shape=shape)


def _kinds(user: User) -> Iterator[tuple[tuple[str, str], tuple[float, ...]]]:
    for modality, records in user.records.items():
        yield from (((modality, record.text), record.numbers) for record in records)


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``records``: learn from the train split of run ``windows``, embed the probe split.

    Writes what stage ``sequence`` writes.
    """
    windows = inputs["windows"]

    def of(split: str) -> tuple[Ints, list[User]]:
        samples = pl.read_parquet(windows / "samples.parquet").filter(pl.col("split") == split)["sample"]
        found = read_users(windows, samples, params.template)
        return np.array(list(found)), list(found.values())

    progress(0, 2, "records")
    train = of("train")[1]
    progress(1, 2, "decomposition")
    learn(Records(params.backbone.hidden), train, lambda: of("probe"), out)
