"""Which samples make batch t: neighbours in length, shuffled by (seed, epoch), however many there are.

The order by length lies on disk and is mapped into memory, never read whole. An epoch turns that order by a
random shift, shuffles it inside buckets of ``BUCKET`` batches, cuts it into batches and shuffles those. So
rows of a batch are of like length and pad little, the batches of an epoch come in any order of length, every
sample comes once an epoch, and batch t follows from (seed, t) alone: nothing is kept between two steps.

Shapes: S samples, P pairs, B batch size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import polars as pl
from safetensors.numpy import save_file

from ggsm_core.shards import ShardError, mapped

BEHAVIOUR, QA = "behaviour", "qa"
"""The two pools of pairs; D_qa stands among the pairs under its name as a granularity."""
BUCKET = 16
"""Batches whose samples are shuffled together: more mixes better, fewer pad less."""


@dataclass(frozen=True)
class Index:
    """The training pairs of one pool (D_behavior or D_qa) by number, those of a sample side by side.

    start: Int64[S + 1], sample s has the pairs ``start[s]`` to ``start[s + 1] - 1``.
    by_length: Int64[S], the samples from short to long.
    user_id, answer_id: Int64[P].
    """

    start: np.ndarray
    by_length: np.ndarray
    user_id: np.ndarray
    answer_id: np.ndarray

    @classmethod
    def of(cls, pairs: pl.DataFrame, lengths: np.ndarray) -> Index:
        """From a table sorted by sample (sample, user_id, answer_id) and Int64[P], tokens of the users."""
        sample = pairs["sample"].to_numpy()
        if (sample[1:] < sample[:-1]).any():
            raise ShardError("pairs: not sorted by sample")
        start = np.concatenate([[0], np.flatnonzero(sample[1:] != sample[:-1]) + 1, [len(sample)]])
        by_length = np.argsort(np.maximum.reduceat(lengths, start[:-1]), kind="stable")
        return cls(start, by_length, pairs["user_id"].to_numpy(), pairs["answer_id"].to_numpy())

    def save(self, folder: Path, pool: str) -> None:
        """Write ``index-<pool>.safetensors``."""
        save_file(
            {name: np.ascontiguousarray(array) for name, array in vars(self).items()}, _file(folder, pool)
        )

    @classmethod
    def load(cls, folder: Path, pool: str) -> Index:
        """Map what ``save`` wrote."""
        return cls(**mapped(_file(folder, pool)))

    @staticmethod
    def exists(folder: Path, pool: str) -> bool:
        """Has this pool any pairs?"""
        return _file(folder, pool).is_file()


def _file(folder: Path, pool: str) -> Path:
    return folder / f"index-{pool}.safetensors"


def in_pools(pairs: pl.DataFrame) -> pl.DataFrame:
    """The pairs in the order that ``save_indexes`` wants: D_behavior, then D_qa, each by sample."""
    return pairs.sort(pl.col("granularity") == QA, "sample", maintain_order=True)


def save_indexes(folder: Path, pairs: pl.DataFrame, lengths: np.ndarray) -> None:
    """Write the index of each pool that has pairs; ``pairs`` as ``in_pools`` left them, lengths Int64[P]."""
    behaviour = pairs.filter(pl.col("granularity") != QA).height
    for pool, part in ((BEHAVIOUR, slice(0, behaviour)), (QA, slice(behaviour, None))):
        if len(pairs[part]):
            Index.of(pairs[part], lengths[part]).save(folder, pool)


class Batches:
    """Samples of batch t."""

    def __init__(self, by_length: np.ndarray, batch_size: int, seed: int) -> None:
        self.by_length, self.batch_size, self.seed = by_length, batch_size, seed

    def samples(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Int64[B], the samples of batch ``step``, and Int64[B], the epoch in which each comes.

        Batches are cut where the epochs before end, so only one batch an epoch holds samples of two.
        """
        count, size = len(self.by_length), self.batch_size
        parts, epochs = [], []
        place, end = step * size, (step + 1) * size
        while place < end:
            epoch, offset = divmod(place, count)
            until = min(count, offset + end - place)
            parts.append(self._part(epoch, offset, until))
            epochs.append(np.full(until - offset, epoch))
            place += until - offset
        return np.concatenate(parts), np.concatenate(epochs)

    def _part(self, epoch: int, begin: int, end: int) -> np.ndarray:
        """Samples at the places ``begin`` to ``end`` of an epoch, which lie in one batch."""
        count, size = len(self.by_length), self.batch_size
        head = -epoch * count % size  # what the epoch before left of its last batch
        if end - begin == size:
            order = _permutation((count - head) // size, self.seed, epoch, 0)
            begin = head + int(order[(begin - head) // size]) * size
            end = begin + size
        shift = int(np.random.default_rng([self.seed, epoch, 1]).integers(count))
        return self._shuffled(epoch, (shift + np.arange(begin, end)) % count)

    def _shuffled(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """Samples at ``places`` of the order by length, after the buckets are shuffled."""
        width = BUCKET * self.batch_size
        bucket = places // width
        found = np.empty_like(places)
        for number in np.unique(bucket).tolist():
            first = number * width
            order = _permutation(min(width, len(self.by_length) - first), self.seed, epoch, 2 + number)
            here = bucket == number
            found[here] = self.by_length[first + order[places[here] - first]]
        return found


@lru_cache(maxsize=16)
def _permutation(size: int, *key: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(size)
