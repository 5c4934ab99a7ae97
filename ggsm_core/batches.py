"""Which pairs make batch t, and how they reach a process: whole, or in micro-batches.

Shapes: B global batch, b a process's share of it, m a micro-batch, F size of the text encoder's vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from ggsm_core.collation import Batch, collate
from ggsm_core.distributed import TrainingError
from ggsm_core.order import BEHAVIOUR, QA, Batches, Index
from ggsm_core.shards import ShardError
from ggsm_core.text_encoder import features
from ggsm_core.tokens import Sequences

Ints = np.ndarray


@dataclass(frozen=True)
class PairBatch:
    """Sequences of both towers; their ids and the numbers of their pairs in the global batch, Long[.].

    Pairs that share a user or an answer are no negatives of each other. In a micro-batch of several, user i
    and answer i need not be of one pair.
    """

    user: Batch
    answer: Batch
    user_ids: Tensor
    answer_ids: Tensor
    user_rows: Tensor
    answer_rows: Tensor

    def to(self, device: torch.device) -> PairBatch:
        """The same on ``device``."""
        return PairBatch(*(part.to(device) for part in vars(self).values()))


class Pairs:
    """The training pairs, and which of them make batch t."""

    def __init__(self, tokens: Path, texts: Path, batch_size: int, seed: int, qa_share: float = 0.0) -> None:
        self.users, self.answers = (
            Sequences.load(tokens, "train_users"),
            Sequences.load(tokens, "train_answers"),
        )
        self._tokens, self.qa_share = tokens, qa_share
        names = [BEHAVIOUR, *([QA] if Index.exists(tokens, QA) else [])]
        if qa_share > 0 and QA not in names:
            raise TrainingError(f"training.qa_share: {qa_share}, and {tokens.name} holds no pairs of D_qa")
        self.pools = [Index.load(tokens, name) for name in names]
        self._first = np.cumsum([0, *(len(pool.user_id) for pool in self.pools)])
        if not len(self.users) == len(self.answers) == self._first[-1]:
            raise ShardError(
                f"{tokens.name}: {len(self.users)} users, {len(self.answers)} answers and {self._first[-1]} "
                "pairs; delete that folder and start again"
            )
        for name, pool in zip(names, self.pools, strict=True):
            if (samples := len(pool.by_length)) < batch_size and (name == BEHAVIOUR or qa_share > 0):
                raise TrainingError(
                    f"training.batch_size: {batch_size} is above the {samples} training samples ({name})"
                )
        self.feature_of = features(texts)
        self.batch_size = batch_size
        self._batches = [Batches(pool.by_length, batch_size, seed) for pool in self.pools]

    def rows(self, step: int) -> np.ndarray:
        """Int64[B]: the pairs of batch ``step``. Every sample comes once an epoch, with one of its answers.

        One granularity a batch: with several, InfoNCE is soon solved by telling kinds of answers apart. A
        batch that begins in one epoch and ends in the next may hold two, and a sample twice; the rows of one
        sample share the user and are no negatives of each other. A batch is of D_behavior or of D_qa, whose
        steps are spread evenly and make up ``qa_share``; each of the two has epochs of its own.
        """
        from_qa = math.floor((step + 1) * self.qa_share)
        is_qa = from_qa > math.floor(step * self.qa_share)
        turn = from_qa - 1 if is_qa else step - from_qa
        start = self.pools[is_qa].start
        samples, epochs = self._batches[is_qa].samples(turn)
        # Shifted every epoch, so that a sample meets all its answers however many steps an epoch has.
        chosen = start[samples] + (turn + epochs) % (start[samples + 1] - start[samples])
        return self._first[int(is_qa)] + chosen

    def identities(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Long[n], Long[n]: whose the pairs are and which answers they have (who is no negative of whom)."""
        found = np.empty((2, len(rows)), np.int64)
        for first, pool in zip(self._first, self.pools, strict=False):
            here = (rows >= first) & (rows < first + len(pool.user_id))
            found[:, here] = pool.user_id[rows[here] - first], pool.answer_id[rows[here] - first]
        users, answers = torch.from_numpy(found)
        return users, answers

    def samples(self, rows: np.ndarray) -> list[int]:
        """The samples that the pairs were made from."""
        return pl.read_parquet(self._tokens / "pairs.parquet", columns=["sample"])["sample"][rows].to_list()

    def batch(
        self, rows: np.ndarray, pad_id: int, users: Ints | None = None, answers: Ints | None = None
    ) -> PairBatch:
        """Collate pairs of ``rows`` Int64[B]: all, those numbered ``users``, or with other ``answers``."""
        users = np.arange(len(rows)) if users is None else users
        answers = users if answers is None else answers
        return PairBatch(
            collate([self.users[i] for i in rows[users]], pad_id, self.feature_of),
            collate([self.answers[i] for i in rows[answers]], pad_id),
            self.identities(rows[users])[0],
            self.identities(rows[answers])[1],
            torch.from_numpy(users),
            torch.from_numpy(answers),
        )


class Chunk:
    """A micro-batch: ``users`` and ``answers`` Int64[m] of a global batch; ``load`` collates them when read.

    Where the micro-batch is all there is (``keep``), they are collated once; else memory holds one at a time.
    """

    def __init__(
        self, number: int, users: Ints, answers: Ints, load: Callable[[Ints, Ints], PairBatch], keep: bool
    ) -> None:
        self.number, self.users, self.answers = number, users, answers
        self._load, self._keep = load, keep
        self._pairs: PairBatch | None = None

    @property
    def pairs(self) -> PairBatch:
        """The sequences, collated."""
        if self._pairs is not None:
            return self._pairs
        pairs = self._load(self.users, self.answers)
        self._pairs = pairs if self._keep else None
        return pairs

    @cached_property
    def layout(self) -> tuple[Tensor, Tensor]:
        """The users' ``valid`` Bool[m, L] and ``segments`` Long[m, L]: small, and kept."""
        user = self.pairs.user
        return user.valid, user.segments


def chunks(
    own: slice,
    size: int | None,
    lengths: Callable[[Ints], tuple[Ints, Ints]],
    load: Callable[[Ints, Ints], PairBatch],
) -> list[Chunk]:
    """The rows ``own`` in micro-batches of ``size``, or in one.

    Several are cut from each tower's rows in the order of their length, so that they pad little: until the
    loss, which has all embeddings, nothing asks which answer is whose. ``lengths``: tokens of both towers.
    """
    rows = np.arange(own.start, own.stop)
    parts = split(slice(0, len(rows)), size)
    orders = (rows, rows) if len(parts) == 1 else [rows[np.argsort(n, kind="stable")] for n in lengths(rows)]
    cut = [(orders[0][part], orders[1][part]) for part in parts]
    return [Chunk(number, *part, load, keep=len(parts) == 1) for number, part in enumerate(cut)]


def split(rows: slice, size: int | None) -> list[slice]:
    """``rows`` in slices of ``size``, the last as short as need be; None for one slice."""
    size = size or rows.stop - rows.start
    return [slice(at, min(at + size, rows.stop)) for at in range(rows.start, rows.stop, size)]
