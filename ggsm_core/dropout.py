"""Dropout that belongs to the pair, not to the process: a pure function of (seed, step, row, place).

PyTorch draws dropout from one stream per process, in the shape of the padded batch. Who computes a row, and
beside which other rows, would then change what it drops. Here each element's fate is a hash of the step, the
row's number in the global batch and the element's own place: one process or sixty-four, in micro-batches or
whole, encoded once or twice (GradCache), drop the same, and a resume has no random state to restore.

Shapes: b rows, H heads, L length, d size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_STRIDE = 1 << 20
"""Above any length: an element's number must not depend on how far its batch is padded."""


class DropoutError(ValueError):
    """A dropout that can't be attributed to rows."""


def used_by(model: nn.Module, config: Any) -> bool:
    """Does ``model`` drop anything when it trains? ``config`` is its decoder's."""
    named = (value for name, value in config.to_dict().items() if "drop" in name)
    return any(isinstance(value, float) and value > 0 for value in named) or any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
    )


@contextmanager
def by_row(seed: int, step: int, stream: int, rows: Tensor) -> Iterator[None]:
    """Within, dropout on tensors [b, ...] is decided by ``rows``, Long[b], the numbers in the global batch.

    ``stream`` keeps the two towers apart. The order of calls tells one layer from the next.

    Raises:
        DropoutError: a tensor whose first dimension isn't b is dropped from.
    """
    (base,) = np.random.SeedSequence([seed, step, stream]).generate_state(1, np.uint64).astype(np.int64)
    with _ByRow(_mix(_mix(rows) + int(base))):
        yield


class _ByRow(TorchFunctionMode):
    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        self.keys, self.calls = keys, 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.dropout:
            return self._dropout(*args, **kwargs)
        if function is nn.functional.scaled_dot_product_attention and kwargs.get("dropout_p", 0.0) > 0:
            return self._attention(*args, **kwargs)
        return function(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """As ``torch.nn.functional.dropout``."""
        if not training or p == 0:
            return x
        return x * self._keep(x, p) / (1 - p)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """As ``scaled_dot_product_attention`` under an additive mask, in plain steps."""
        if enable_gqa:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.mT * (scale or 1 / math.sqrt(query.shape[-1])) + attn_mask
        return self._dropout(scores.softmax(-1).to(value.dtype), dropout_p) @ value

    def _keep(self, x: Tensor, p: float) -> Tensor:
        """Bool like ``x`` [b, ...]: which elements survive."""
        if x.shape[0] != len(self.keys):
            raise DropoutError(f"dropout: a tensor {tuple(x.shape)} for {len(self.keys)} rows")
        place = torch.full((), self.calls, dtype=torch.int64, device=x.device)
        for size in x.shape[1:]:
            place = _mix(place)[..., None] * _STRIDE + torch.arange(size, device=x.device)
        self.calls += 1
        keys = self.keys.view(-1, *[1] * (x.ndim - 1))
        return _mix(_mix(place) ^ keys) >= int((2 * p - 1) * 2**63)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on Long: every bit of the result depends on every bit of ``x``."""
    x = x ^ ((x >> 30) & ((1 << 34) - 1))
    x = x * -0x40A7B892E31B1A47
    x = x ^ ((x >> 27) & ((1 << 37) - 1))
    x = x * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & ((1 << 33) - 1))
