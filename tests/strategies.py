"""Hypothesis strategies shared by the tests of the mathematics."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from numpy.typing import NDArray

#: A property test runs on this many drawn cases, the same ones each time, with no limit on one case's time.
properties = settings(deadline=None, max_examples=60, derandomize=True)

seeds = st.integers(0, 2**32 - 1)


@st.composite
def valid_masks(draw: st.DrawFn, *, batch: int = 3, length: int = 6, empty: bool = True) -> NDArray[np.bool_]:
    """Bool[B, L]: rows of 0 (or 1) to L real tokens, with padding on the left, the right or both sides."""
    size = draw(st.integers(1, batch))
    width = draw(st.integers(1, length))
    side = draw(st.sampled_from(("left", "right", "both")))
    valid = np.zeros((size, width), dtype=bool)
    for b in range(size):
        n = draw(st.integers(0 if empty else 1, width))
        start = {"left": width - n, "right": 0}.get(side)
        if start is None:
            start = draw(st.integers(0, width - n))
        valid[b, start : start + n] = True
    return valid
