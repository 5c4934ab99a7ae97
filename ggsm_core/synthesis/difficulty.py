"""How hard a pair is to align for a small embedding model (Eq. 3), and which pairs count as hard."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ggsm_core.text_encoder import TextEncoder

MAX_TOKENS = 512
"""All that the encoder's positions hold: a history is cut late, and the query stands before it."""


def hard_to_align(encoder: TextEncoder, users: Sequence[str], answers: Sequence[str]) -> np.ndarray:
    """Float64[n]: S_d = 1 - cos(Emb(u + q), Emb(a)) of n pairs, in [0, 2]. Texts of u + q, and of a."""
    if not users:
        return np.empty(0)
    left = encoder.encode(users, max_tokens=MAX_TOKENS)
    right = encoder.encode(answers, max_tokens=MAX_TOKENS)
    return 1.0 - (left * right).sum(1, dtype=np.float64)  # both are of unit length


def threshold(scores: np.ndarray, value: float | None, quantile: float | None) -> float:
    """T_filter: ``value``, or that ``quantile`` of the scores; infinite where there are no scores."""
    if value is not None:
        return value
    assert quantile is not None, "params.Synthesis asks for one of the two"
    return float(np.quantile(scores, quantile)) if len(scores) else float("inf")
