"""Visibility, and the one attention bias made from it (Eq. 4, A.4).

Shapes: B batch, L length. ``valid`` is Bool[B, L], True for real tokens, padding on either side.
A visibility is a number in [0, 1] for each future key j > i: Float[B, L] if it depends on the key alone,
Float[B, L, L] if it also depends on the query i. What it says about j <= i is not read: a token always
sees itself and its past.
"""

from __future__ import annotations

import torch
from torch import Tensor


class MaskError(ValueError):
    """A visibility or validity mask that can't be turned into an attention bias."""


def _check(visibility: Tensor, valid: Tensor) -> None:
    if valid.dtype != torch.bool or valid.ndim != 2:
        raise MaskError(f"valid: expected Bool[B, L], got {valid.dtype} {tuple(valid.shape)}")
    batch, length = valid.shape
    if visibility.shape not in ((batch, length), (batch, length, length)):
        raise MaskError(
            f"visibility: shape {tuple(visibility.shape)} is neither [B, L] nor [B, L, L] "
            f"for valid of shape {tuple(valid.shape)}"
        )
    if not torch.is_floating_point(visibility):
        raise MaskError(f"visibility: expected a float tensor, got {visibility.dtype}")
    seen = visibility.detach()
    if not bool(((seen >= 0) & (seen <= 1)).all()):
        low, high = float(seen.min()), float(seen.max())
        raise MaskError(
            f"visibility: values must lie in [0, 1], got [{low:.4g}, {high:.4g}] (NaN counts as outside)"
        )


def additive_bias(visibility: Tensor, valid: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The additive attention bias of Eq. 4, understood by every backend.

    Args:
        visibility: Float[B, L, L] or Float[B, L] (per key) in [0, 1].
        valid: Bool[B, L].
        dtype: of the result; its minimum stands for minus infinity.

    Returns:
        Float[B, 1, L, L]: 0 for j <= i, log w_ij for j > i, the minimum where w is 0 or the key is padding.
        A padding query also sees itself, so no softmax row is ever empty.

    Raises:
        MaskError: wrong shape or dtype, or a value outside [0, 1].

    Gradients flow through log w (the MLP of hybrid_mlp learns that way); where w is 0 they are 0.
    """
    _check(visibility, valid)
    batch, length = valid.shape
    low = torch.finfo(dtype).min
    weight = visibility if visibility.ndim == 3 else visibility[:, None, :].expand(batch, length, length)
    weight = weight.to(torch.promote_types(weight.dtype, dtype))  # log of a bf16 weight would round twice
    shown = weight > 0
    # log on a safe value, then masked: log(0) would send NaN through the backward pass of torch.where.
    bias = torch.where(shown, weight, torch.ones_like(weight)).log().to(dtype).clamp(min=low)
    bias = bias.masked_fill(~shown, low)
    position = torch.arange(length, device=valid.device)
    past = position[None, :] <= position[:, None]  # [i, j]: j <= i
    bias = bias.masked_fill(past, 0.0).masked_fill(~valid[:, None, :], low)
    lonely = torch.diag_embed(~valid)  # padding query i, key i
    return bias.masked_fill(lonely, 0.0)[:, None]


def causal(valid: Tensor) -> Tensor:
    """No future key is visible: Float[B, L] of zeros."""
    return torch.zeros(valid.shape, device=valid.device)


def bidirectional(valid: Tensor) -> Tensor:
    """Every future key is visible: Float[B, L] of ones."""
    return torch.ones(valid.shape, device=valid.device)


def segment(inside: Tensor) -> Tensor:
    """Full visibility between tokens of one segment, causal elsewhere: Float[B, L, L] from Bool[B, L]."""
    return (inside[:, :, None] & inside[:, None, :]).float()


def span(valid: Tensor, delta: int) -> Tensor:
    """Future keys up to ``min(i + delta, L)`` visible (A.4, bidirectional b): Float[B, L, L].

    Positions are counted over real tokens, so padding on the left does not eat into the span.
    """
    if delta < 0:
        raise MaskError(f"delta: {delta} must be at least 0 tokens")
    position = valid.long().cumsum(1)
    ahead = position[:, None, :] - position[:, :, None]  # [b, i, j] = real tokens from i to j
    return (ahead <= delta).float()


def mean_visibility(visibility: Tensor, valid: Tensor) -> float:
    """How open a mask is: mean w_ij over all future pairs of real tokens; 0 causal, 1 bidirectional."""
    _check(visibility, valid)
    batch, length = valid.shape
    weight = visibility if visibility.ndim == 3 else visibility[:, None, :].expand(batch, length, length)
    future = torch.ones(length, length, dtype=torch.bool, device=valid.device).triu(1)
    pairs = valid[:, :, None] & valid[:, None, :] & future
    return float(weight.detach()[pairs].mean()) if bool(pairs.any()) else 0.0
