"""Histories as sequences of visits: what the sequence models of Table 2 read.

A step is a visit: all events of one user at one time. In front of the visits stands one step with the facts
that have no time; behind them one empty step, the anchor, so that the last gap is the time since the last
visit. Every event is a code (its modality and text), never a text encoder's vector.

Shapes: n samples, S steps in all, B batch, L steps of the longest sequence, V codes, N numbers, d width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from ggsm_core.baselines.base import BaselineError, Histories, commonest

if TYPE_CHECKING:
    from ggsm_core.intervals import Ints

NUMBERS = (
    "log_amount",
    "log_items",
    "log_gap",
    "sin_hour",
    "cos_hour",
    "sin_weekday",
    "cos_weekday",
    "anchor",
)
KIND = pl.format("{}: {}", "modality", "text").alias("kind")


@dataclass(frozen=True)
class Batch:
    """B sequences, padded on the right."""

    codes: Tensor  # Long[C], the codes of all steps in a row
    weights: Tensor  # Float[C], log(1 + number of events)
    offsets: Tensor  # Long[s], where each step's codes begin; s real steps
    numbers: Tensor  # Float[s, N]
    at: Tensor  # Long[s], place of each step in [B * L]
    valid: Tensor  # Bool[B, L]

    @property
    def last(self) -> Tensor:
        """Long[B]: the last real step."""
        return self.valid.sum(1) - 1

    def spread(self, steps: Tensor) -> Tensor:
        """Float[B, L, ...] from Float[s, ...]: zero on padding."""
        batch, length = self.valid.shape
        padded = steps.new_zeros(batch * length, *steps.shape[1:])
        return padded.index_copy(0, self.at, steps).view(batch, length, *steps.shape[1:])

    def counts(self, vocabulary: int) -> Tensor:
        """Float[s, V]: the weights of each step's codes."""
        step = torch.repeat_interleave(
            torch.arange(len(self.offsets)), torch.diff(self.offsets, append=torch.tensor([len(self.codes)]))
        )
        table = torch.zeros(len(self.offsets), vocabulary)
        return table.index_put((step, self.codes), self.weights, accumulate=True)


class Vocabulary:
    """The kinds of event that most training samples have; others are not seen."""

    def __init__(self, train: Histories, size: int) -> None:
        self.kinds = commonest(train.events.with_columns(KIND), "kind", size)
        if not self.kinds:
            raise BaselineError("events: the training histories hold none, so there is nothing to learn from")

    def __len__(self) -> int:
        return len(self.kinds)

    def code(self, events: pl.DataFrame) -> pl.DataFrame:
        """``events`` of known kinds, with their code."""
        codes = pl.DataFrame({"kind": self.kinds, "code": range(len(self.kinds))})
        return events.with_columns(KIND).join(codes, on="kind")

    def distribution(self, events: pl.DataFrame, n: int) -> np.ndarray:
        """Float32[n, V]: the share of each kind among the events of each row; 0 where a row has none."""
        counted = self.code(events).group_by("row", "code").len()
        table = np.zeros((n, len(self)), np.float32)
        table[counted["row"].to_numpy(), counted["code"].to_numpy()] = counted["len"].to_numpy()
        return table / table.sum(1, keepdims=True).clip(min=1)


class Visits:
    """The steps of n samples in flat arrays; sample i has steps ``start[i]`` to ``start[i + 1]``."""

    def __init__(self, histories: Histories, vocabulary: Vocabulary, limit: int) -> None:
        n = len(histories.samples)
        anchors = pl.DataFrame({"row": np.arange(n)}, schema={"row": histories.events.schema["row"]})
        steps = _steps(histories, anchors, limit).with_row_index("step")
        coded = (
            vocabulary.code(histories.events)
            .group_by("row", "time", "code")
            .len()
            .join(steps.filter(pl.col("kind") != ANCHOR), on=["row", "time"], nulls_equal=True)
            .sort("step", "code")
        )
        self.start = np.concatenate([[0], np.cumsum(np.bincount(steps["row"].to_numpy(), minlength=n))])
        self._numbers = steps.select(NUMBERS).to_numpy().astype(np.float32)
        per_step = np.bincount(coded["step"].to_numpy(), minlength=len(steps))
        self._code_start = np.concatenate([[0], np.cumsum(per_step)])
        self._codes = coded["code"].to_numpy()
        self._weights = np.log1p(coded["len"].to_numpy()).astype(np.float32)

    def batch(self, rows: Ints) -> Batch:
        """The whole sequences of these samples."""
        return self.slices(self.start[rows], self.start[rows + 1])

    def slices(self, first: Ints, end: Ints) -> Batch:
        """The runs of steps ``first[i]`` to ``end[i]``, the latter excluded; none may be empty."""
        length = end - first
        step = _ranges(first, length)
        code = _ranges(self._code_start[step], sizes := np.diff(self._code_start)[step])
        valid = np.arange(length.max()) < length[:, None]
        return Batch(
            torch.from_numpy(self._codes[code]),
            torch.from_numpy(self._weights[code]),
            torch.from_numpy(np.cumsum(sizes) - sizes),
            torch.from_numpy(self._numbers[step]),
            torch.from_numpy(np.flatnonzero(valid)),
            torch.from_numpy(valid),
        )


FACTS, VISIT, ANCHOR = 0, 1, 2  # kinds of step, in the order in which they stand


def _steps(histories: Histories, anchors: pl.DataFrame, limit: int) -> pl.DataFrame:
    """row, time, kind and ``NUMBERS`` of every step: at most ``limit`` visits, facts and anchor beside."""
    visits = (
        histories.timed.group_by("row", "time")
        .agg(
            pl.col("before").first(),
            items=pl.len(),
            amount=pl.col("amount").filter(pl.col("modality") == "bill").sum().round(4),
        )
        .sort("row", "time")
        .group_by("row", maintain_order=True)
        .tail(limit)
        .with_columns(kind=pl.lit(VISIT))
    )
    facts = histories.events.filter(pl.col("before").is_null()).group_by("row").agg(items=pl.len())
    ends = anchors.with_columns(before=pl.lit(0, pl.Int32), kind=pl.lit(ANCHOR))
    steps = pl.concat([visits, facts.with_columns(kind=pl.lit(FACTS)), ends], how="diagonal").sort(
        "row", "kind", "time"
    )
    gap = (pl.col("before").shift(1).over("row").fill_null(histories.days) - pl.col("before")).fill_null(0)
    hour = pl.col("time").dt.hour() * (2 * np.pi / 24)
    weekday = pl.col("time").dt.weekday() * (2 * np.pi / 7)
    amount = pl.col("amount").fill_null(0.0)
    return steps.select(
        "row",
        "time",
        "kind",
        log_amount=amount.sign() * amount.abs().log1p(),
        log_items=pl.col("items").fill_null(0).log1p(),
        log_gap=gap.log1p(),
        sin_hour=hour.sin().fill_null(0.0),
        cos_hour=hour.cos().fill_null(0.0),
        sin_weekday=weekday.sin().fill_null(0.0),
        cos_weekday=weekday.cos().fill_null(0.0),
        anchor=(pl.col("kind") == ANCHOR).cast(pl.Float64),
    )


def _ranges(start: Ints, length: Ints) -> Ints:
    """start[0], start[0] + 1, ... length[0] numbers in all, then those of start[1] and so on."""
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    return within + np.repeat(start, length)


class StepEmbedding(nn.Module):
    """A step's codes and numbers -> one vector."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.codes = nn.EmbeddingBag(vocabulary, width, mode="sum")
        self.numbers = nn.Linear(len(NUMBERS), width)
        self.norm = nn.LayerNorm(width)

    def forward(self, batch: Batch) -> Tensor:
        """Float[s, d]."""
        codes = self.codes(batch.codes, batch.offsets, per_sample_weights=batch.weights)
        return self.norm(codes + self.numbers(batch.numbers))


class Recurrent(nn.Module):
    """Steps -> a GRU's states."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.steps = StepEmbedding(vocabulary, width)
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Step embeddings z and states c, both Float[B, L, d]."""
        steps = batch.spread(self.steps(batch))
        states, _ = self.gru(steps)
        return steps, states


def at_last(states: Tensor, batch: Batch) -> Tensor:
    """Float[B, d]: the state at each sequence's last real step."""
    return states[torch.arange(len(states)), batch.last]


class Attending(nn.Module):
    """Steps -> a bidirectional transformer's states. Positions count back from the last step."""

    def __init__(self, vocabulary: int, settings: Any) -> None:
        super().__init__()
        self.steps = StepEmbedding(vocabulary, settings.hidden)
        self.positions = nn.Embedding(settings.visits + 2, settings.hidden)  # facts and anchor beside
        nn.init.normal_(self.positions.weight, std=0.02)
        self.transformer = transformer(settings.hidden, settings.layers, settings.heads)

    def forward(self, steps: Tensor, batch: Batch, prompt: Tensor | None = None) -> Tensor:
        """Float[B, L, d] from step embeddings Float[s, d]; [B, L + 1, d] with a prompt Float[B, d] behind."""
        valid = batch.valid
        back = (batch.last[:, None] - torch.arange(valid.shape[1])).clamp(min=0)
        hidden = batch.spread(steps) + self.positions(back)
        if prompt is not None:
            hidden = torch.cat([hidden, prompt[:, None]], dim=1)
            valid = torch.cat([valid, valid.new_ones(len(valid), 1)], dim=1)
        return self.transformer(hidden, src_key_padding_mask=~valid)


def transformer(width: int, layers: int, heads: int) -> nn.TransformerEncoder:
    """Pre-norm blocks, without dropout: early stopping is what keeps them from learning by heart."""
    block = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
