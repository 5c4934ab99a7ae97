"""From encoded sequences to the padded batch that the decoder reads, and the place where it is read out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ggsm_core.template import NUMBERS, USER_TOKEN, Encoded, TemplateError


class NoToken(TemplateError):
    """A sequence without its read-out token."""


class TwoTokens(TemplateError):
    """A sequence with more than one read-out token."""


@dataclass
class Batch:
    """Padded sequences. ``features`` and ``numbers`` are zero away from ``<record>``; None in text mode."""

    input_ids: torch.Tensor  # Long[B, L]
    valid: torch.Tensor  # Bool[B, L], True on real tokens
    segments: torch.Tensor  # Long[B, L]
    features: torch.Tensor | None = None  # Float[B, L, F]
    numbers: torch.Tensor | None = None  # Float[B, L, 6]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            self.input_ids.to(device),
            self.valid.to(device),
            self.segments.to(device),
            None if self.features is None else self.features.to(device),
            None if self.numbers is None else self.numbers.to(device),
        )


def collate(
    encoded: Sequence[Encoded],
    pad_id: int,
    feature_of: Callable[[str], np.ndarray] | None = None,
    side: Literal["right", "left"] = "right",
) -> Batch:
    """Pad sequences to one length on ``side`` and put each record's vector and numbers into its slot.

    ``feature_of`` maps a record's text to Float[F]; None where records travel as text (and for answers).
    """
    length = max(len(e.input_ids) for e in encoded)
    input_ids = np.full((len(encoded), length), pad_id)
    segments = np.zeros((len(encoded), length), np.int64)
    valid = np.zeros((len(encoded), length), bool)
    for row, e in enumerate(encoded):
        at = slice(0, len(e.input_ids)) if side == "right" else slice(length - len(e.input_ids), length)
        input_ids[row, at], segments[row, at], valid[row, at] = e.input_ids, e.segments, True
    batch = Batch(*map(torch.from_numpy, (input_ids, valid, segments)))
    if feature_of is not None and (records := [record for e in encoded for record in e.records]):
        shift = [0 if side == "right" else length - len(e.input_ids) for e in encoded]
        rows = np.repeat(np.arange(len(encoded)), [len(e.slots) for e in encoded])
        places = np.concatenate([e.slots + s for e, s in zip(encoded, shift, strict=True)])
        numbers = np.array([record.numbers for record in records], np.float32)
        if not np.isfinite(numbers).all():
            row = int(np.flatnonzero(~np.isfinite(numbers).all(1))[0])
            raise TemplateError(f"numbers: {records[row]} holds a value that is not finite")
        vectors = np.stack([feature_of(record.text) for record in records])
        batch.features = torch.zeros(*input_ids.shape, vectors.shape[1])
        batch.numbers = torch.zeros(*input_ids.shape, len(NUMBERS))
        batch.features[rows, places] = torch.from_numpy(vectors)
        batch.numbers[rows, places] = torch.from_numpy(numbers)
    return batch


def locate(input_ids: torch.Tensor, token_id: int, token: str = USER_TOKEN) -> torch.Tensor:
    """Position Long[B] of the read-out token in ``input_ids`` Long[B, L].

    Raises ``NoToken`` or ``TwoTokens`` and names the rows.
    """
    found = input_ids == token_id
    counts = found.sum(1)
    if len(rows := (counts == 0).nonzero().flatten().tolist()):
        raise NoToken(f"input_ids: no {token} in rows {rows[:8]}; a sequence is read out at its {token}")
    if len(rows := (counts > 1).nonzero().flatten().tolist()):
        raise TwoTokens(f"input_ids: several {token} in rows {rows[:8]}; the template writes exactly one")
    return found.int().argmax(1)
