"""Which future tokens does the loss lean on? Gradient norms -> weights -> schedule (Eq. 5, 15).

Shapes: B batch, L length, d hidden size; ``valid`` is Bool[B, L]. Weights are always detached: the loss
does not learn through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Normalise = Literal["none", "zscore", "rank"]


class GuidanceError(ValueError):
    """Guidance that can't be computed, or that says nothing."""


def gradient_norms(loss: Tensor, hidden: Tensor) -> Tensor:
    """The norms ||dL/dh_j|| of Eq. 5.

    Args:
        loss: scalar that depends on ``hidden``.
        hidden: Float[B, L, d], the hidden states h_j in whose terms the gradient is taken.

    Returns:
        Float[B, L], detached. The graph is kept, so the caller may still run the backward pass.

    Raises:
        GuidanceError: the loss isn't a scalar, does not depend on ``hidden``, or a gradient isn't finite.
    """
    if loss.ndim != 0:
        raise GuidanceError(f"loss: expected a scalar, got shape {tuple(loss.shape)}")
    if hidden.ndim != 3:
        raise GuidanceError(f"hidden: expected Float[B, L, d], got shape {tuple(hidden.shape)}")
    if not (hidden.requires_grad and loss.requires_grad):
        raise GuidanceError("hidden: the loss has no gradient path to it; enable gradients for this pass")
    (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise GuidanceError(
            "hidden: the loss does not depend on it; take the states of the pass that made the loss"
        )
    return norms_of(gradient)


def norms_of(gradient: Tensor) -> Tensor:
    """Float[B, L] norms of a gradient Float[B, L, d] that is already there."""
    precision = torch.promote_types(gradient.dtype, torch.float32)  # half precision squares overflow
    norms = torch.linalg.vector_norm(gradient.detach(), dim=-1, dtype=precision)
    if not bool(torch.isfinite(norms).all()):
        row, position = (~torch.isfinite(norms)).nonzero()[0].tolist()
        raise GuidanceError(
            f"gradient: norm {float(norms[row, position])} at row {row}, position {position}; "
            "the loss has overflowed"
        )
    return norms


def token_weights(norms: Tensor, valid: Tensor, normalise: Normalise = "none") -> Tensor:
    """Visibility weights from gradient norms (first branch of Eq. 5).

    Args:
        norms: Float[B, L], at least 0.
        valid: Bool[B, L].
        normalise: ``none``: sigma(norm), as published, so never below 0.5; ``zscore``: sigma of the z-score
            within the sequence; ``rank``: rank within the sequence over (n + 1), ties share the mean rank.

    Returns:
        Float[B, L] in (0, 1], 0 on padding, detached.

    Raises:
        GuidanceError: unknown ``normalise``, shapes that differ, norms negative or not finite.
    """
    if norms.shape != valid.shape or norms.ndim != 2:
        raise GuidanceError(
            f"norms: shape {tuple(norms.shape)} must be [B, L] as valid's {tuple(valid.shape)}"
        )
    if valid.dtype != torch.bool:
        raise GuidanceError(f"valid: expected Bool[B, L], got {valid.dtype}")
    norms = norms.detach()
    real = norms[valid]
    wrong = ~(torch.isfinite(real) & (real >= 0))
    if bool(wrong.any()):
        raise GuidanceError(f"norms: {float(real[wrong][0])} on a valid token; must be finite and at least 0")
    norms = norms.masked_fill(~valid, 0.0)
    count = valid.sum(1, keepdim=True).clamp(min=1)
    if normalise == "none":
        weights = torch.sigmoid(norms)
    elif normalise == "zscore":
        mean = norms.sum(1, keepdim=True) / count
        centred = (norms - mean).masked_fill(~valid, 0.0)
        spread = (centred.pow(2).sum(1, keepdim=True) / count).sqrt()
        # Equal norms leave rounding dust behind; dust over dust is no signal.
        flat = spread <= 4 * torch.finfo(norms.dtype).eps * mean
        weights = torch.sigmoid(torch.where(flat, 0.0, centred / spread.masked_fill(flat, 1.0)))
    elif normalise == "rank":
        pair = valid[:, None, :]
        below = (norms[:, None, :] < norms[:, :, None]) & pair  # [b, j, k]: norm_k < norm_j
        equal = (norms[:, None, :] == norms[:, :, None]) & pair
        rank = below.sum(2) + (equal.sum(2) + 1) / 2
        weights = rank.to(norms.dtype) / (count + 1)
    else:
        raise GuidanceError(f"normalise: {normalise!r} is not one of 'none', 'zscore', 'rank'")
    return weights.masked_fill(~valid, 0.0)


def open_linearly(weights: Tensor, step: int, warm_steps: int, total_steps: int) -> Tensor:
    """From the frozen weights to full visibility (second branch of Eq. 5, Eq. 15).

    Args:
        weights: Float[B, L], 0 on padding.
        step: t, counted from 0.
        warm_steps: T_warm, below T_total.
        total_steps: T_total.

    Returns:
        Float[B, L]: ``weights`` before ``warm_steps``, then (1 - alpha) w + alpha with
        alpha = (t - T_warm) / (T_total - T_warm), 1 from ``total_steps`` on. Padding opens with the rest;
        ``masks.additive_bias`` hides it whatever its weight.
    """
    if not 0 <= warm_steps < total_steps:
        raise GuidanceError(f"warm_steps: {warm_steps} must lie in [0, total_steps = {total_steps})")
    if step < 0:
        raise GuidanceError(f"step: {step} must be at least 0")
    outside = ~((weights >= 0) & (weights <= 1))
    if bool(outside.any()):
        raise GuidanceError(f"weights: must lie in [0, 1], got {float(weights[outside][0]):.4g}")
    if step < warm_steps:
        return weights
    alpha = min((step - warm_steps) / (total_steps - warm_steps), 1.0)
    return (1 - alpha) * weights + alpha


def by_position(weights: Tensor, valid: Tensor, length: int) -> Tensor:
    """Mean weight at each distance from the last real token: Float[length], for ``freeze: position``.

    Index 0 is ``<USER>``: counting back from it aligns sequences of unequal length. Distances that no
    sequence of the batch reaches take the weight of the farthest one that is reached.
    """
    if not bool(valid.any()):
        raise GuidanceError("valid: holds no real token, so there is nothing to average")
    distance = _distance(valid)
    total = torch.zeros(length, dtype=weights.dtype, device=weights.device)
    count = torch.zeros_like(total)
    total.index_add_(0, distance[valid], weights[valid])
    count.index_add_(0, distance[valid], torch.ones_like(weights[valid]))
    farthest = int(distance[valid].max())
    mean = total / count.clamp(min=1)
    mean[farthest + 1 :] = mean[farthest]
    return mean


def from_position(profile: Tensor, valid: Tensor) -> Tensor:
    """The inverse of ``by_position``: Float[B, L] for a new batch, 0 on padding."""
    return profile.to(valid.device)[_distance(valid).clamp(min=0)].masked_fill(~valid, 0.0)


def _distance(valid: Tensor) -> Tensor:
    """Long[B, L]: real tokens between a position and the last real one."""
    return valid.sum(1, keepdim=True) - valid.long().cumsum(1)


def by_segment(weights: Tensor, valid: Tensor, segments: Tensor, count: int) -> Tensor:
    """Mean weight of each template segment: Float[count]. A segment with no token takes the overall mean."""
    total = torch.zeros(count, dtype=weights.dtype, device=weights.device)
    seen = torch.zeros_like(total)
    total.index_add_(0, segments[valid], weights[valid])
    seen.index_add_(0, segments[valid], torch.ones_like(weights[valid]))
    return torch.where(seen > 0, total / seen.clamp(min=1), weights[valid].mean())


def from_segment(profile: Tensor, valid: Tensor, segments: Tensor) -> Tensor:
    """The inverse of ``by_segment``: Float[B, L] for a new batch."""
    return profile.to(valid.device)[segments].masked_fill(~valid, 0.0)


@dataclass(frozen=True)
class Diagnosis:
    """How much guidance says. ``spread`` is the mean over sequences of the weights' standard deviation."""

    mean: float
    spread: float
    silent_share: float

    @property
    def degenerate(self) -> str | None:
        """Why the weights carry no information, or None if they do."""
        if self.silent_share > 0.5:
            return (
                f"{self.silent_share:.0%} of the tokens have a gradient of exactly 0: the loss reads only "
                "<USER> at this site (grad_site: final is blind); use grad_site: embeddings"
            )
        if self.spread < 0.01:
            return (
                f"weights within a sequence differ by {self.spread:.2g} only (mean {self.mean:.3f}): "
                "guidance is a constant; use normalise: zscore or rank"
            )
        return None


def diagnose(norms: Tensor, weights: Tensor, valid: Tensor) -> Diagnosis:
    """Measure whether guidance is alive: norms and weights Float[B, L]."""
    count = valid.sum(1).clamp(min=1)
    mean = weights.masked_fill(~valid, 0.0).sum(1) / count
    square = (weights - mean[:, None]).masked_fill(~valid, 0.0).pow(2).sum(1) / count
    return Diagnosis(
        mean=float(mean.mean()),
        spread=float(square.sqrt().mean()),
        silent_share=float((norms[valid] == 0).float().mean()),
    )
