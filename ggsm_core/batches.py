"""Which pairs make batch t, and how they reach a process: whole, or in micro-batches.

Shapes: B global batch, b a process's share of it, F size of the text encoder's vectors.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from safetensors.numpy import load_file as load_numpy
from torch import Tensor

from ggsm_core.distributed import TrainingError
from ggsm_core.order import Batches, Index
from ggsm_core.shards import ShardError
from ggsm_core.template import Batch, collate
from ggsm_core.tokens import Sequences


@dataclass(frozen=True)
class PairBatch:
    """Both towers' sequences of some pairs; their ids and their numbers in the global batch, Long[.].

    Pairs that share a user or an answer are no negatives of each other.
    """

    user: Batch
    answer: Batch
    user_ids: Tensor
    answer_ids: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> PairBatch:
        """The same on ``device``."""
        ids = (self.user_ids.to(device), self.answer_ids.to(device), self.rows.to(device))
        return PairBatch(self.user.to(device), self.answer.to(device), *ids)


class Pairs:
    """The training pairs, and which of them make batch t."""

    def __init__(self, tokens: Path, texts: Path, batch_size: int, seed: int) -> None:
        self.users, self.answers = (
            Sequences.load(tokens, "train_users"),
            Sequences.load(tokens, "train_answers"),
        )
        self._tokens, self.index = tokens, Index.load(tokens)
        samples = len(self.index.by_length)
        if samples < batch_size:
            raise TrainingError(f"training.batch_size: {batch_size} is above the {samples} training samples")
        if not len(self.users) == len(self.answers) == len(self.index.user_id):
            raise ShardError(
                f"{tokens.name}: {len(self.users)} users, {len(self.answers)} answers and "
                f"{len(self.index.user_id)} pairs; delete that folder and start again"
            )
        self.feature_of = features(texts)
        self.batch_size, self.batches = batch_size, Batches(self.index.by_length, batch_size, seed)

    def rows(self, step: int) -> np.ndarray:
        """Int64[B]: the pairs of batch ``step``. Every sample comes once an epoch, with one of its answers.

        One granularity a batch: with several, InfoNCE is soon solved by telling kinds of answers apart. A
        batch that begins in one epoch and ends in the next may hold a sample twice; its rows share the user
        and are no negatives of each other.
        """
        samples, epochs = self.batches.samples(step)
        first = self.index.start[samples]
        # Shifted every epoch, so that a sample meets all its answers however many steps an epoch has.
        return first + (step + epochs) % (self.index.start[samples + 1] - first)

    def identities(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Long[n], Long[n]: whose the pairs are and which answers they have (who is no negative of whom)."""
        return (
            torch.from_numpy(self.index.user_id[rows].astype(np.int64)),
            torch.from_numpy(self.index.answer_id[rows].astype(np.int64)),
        )

    def samples(self, rows: np.ndarray) -> list[int]:
        """The samples that the pairs were made from."""
        return pl.read_parquet(self._tokens / "pairs.parquet", columns=["sample"])["sample"][rows].to_list()

    def batch(self, rows: np.ndarray, pad_id: int, part: slice = slice(None)) -> PairBatch:
        """Collate a ``part`` of the pairs in ``rows`` Int64[B]."""
        return PairBatch(
            collate([self.users[i] for i in rows[part]], pad_id, self.feature_of),
            collate([self.answers[i] for i in rows[part]], pad_id),
            *self.identities(rows[part]),
            torch.arange(len(rows))[part],
        )


def features(texts: Path) -> Callable[[str], np.ndarray]:
    """Record text -> Float[F], from the run that encoded them."""
    names = json.loads((texts / "texts.json").read_text(encoding="utf-8"))
    table = load_numpy(texts / "texts.safetensors")["features"]
    index = {name: i for i, name in enumerate(names)}
    return lambda text: table[index[text]]


def feature_size(texts: Path) -> int:
    """F."""
    return int(load_numpy(texts / "texts.safetensors")["features"].shape[1])


class Chunk:
    """A micro-batch: rows ``part`` of a global batch Int64[B]; ``load`` collates them when they are read.

    Where the micro-batch is all there is (``keep``), they are collated once; else memory holds one at a time.
    """

    def __init__(self, number: int, part: slice, load: Callable[[slice], PairBatch], keep: bool) -> None:
        self.number, self.part = number, part
        self._load, self._keep = load, keep
        self._pairs: PairBatch | None = None

    @property
    def pairs(self) -> PairBatch:
        """The pairs, collated."""
        if self._pairs is not None:
            return self._pairs
        pairs = self._load(self.part)
        self._pairs = pairs if self._keep else None
        return pairs


def chunks(own: slice, size: int | None, load: Callable[[slice], PairBatch]) -> list[Chunk]:
    """The rows ``own`` in micro-batches of ``size``, or in one."""
    parts = split(own, size)
    return [Chunk(number, part, load, keep=len(parts) == 1) for number, part in enumerate(parts)]


def split(rows: slice, size: int | None) -> list[slice]:
    """``rows`` in slices of ``size``, the last as short as need be; None for one slice."""
    size = size or rows.stop - rows.start
    return [slice(at, min(at + size, rows.stop)) for at in range(rows.start, rows.stop, size)]
