"""InfoNCE with same-side negatives and a margin mask (Eq. 6-8).

Shapes: B batch, d hidden size. ``user`` and ``answer`` are L2-normalised Float[B, d]; row i of one is the
positive of row i of the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class LossError(ValueError):
    """Embeddings or parameters InfoNCE can't be computed from."""


@dataclass(frozen=True)
class Negatives:
    """What stands in the denominators of Eq. 7, counted.

    ``kept``: true negatives per row, over the three sums. ``masked_*``: the share of candidate negatives that
    the margin mask of Eq. 8 removes, per sum.
    """

    kept: float
    masked_user_answer: float
    masked_user_user: float
    masked_answer_answer: float


def centred(embeddings: Tensor) -> Tensor:
    """Each row's direction as seen from the batch's mean: Float[B, d] -> Float[B, d], L2-normalised.

    Our extension. The states that a decoder has at one and the same token share most of what they are, so all
    users look alike to a cosine, and InfoNCE's shortest way down is to move users and answers to one point,
    where it stays. Seen from the mean there is no such way: what moves all rows alike moves nothing.
    """
    rows = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return nn.functional.normalize(rows - rows.mean(0, keepdim=True), dim=1)


def info_nce(
    user: Tensor,
    answer: Tensor,
    *,
    temperature: float = 0.05,
    margin: float | None = 0.1,
    same_side: bool = True,
    answer_ids: Tensor | None = None,
    user_ids: Tensor | None = None,
) -> Tensor:
    """The contrastive objective, Eq. 6, as a scalar.

    Args:
        user: Float[B, d], L2-normalised.
        answer: Float[B, d], L2-normalised; row i is the positive of user i.
        temperature: tau.
        margin: c_margin of Eq. 8, or None for no margin mask. Each of the three sums is masked by its own
            s_ij against s(u_i, a_i) + margin; comparisons carry no gradient.
        same_side: include user-user and answer-answer negatives.
        answer_ids: Long[B]; rows that share an answer are never negatives of each other.
        user_ids: Long[B]; nor are rows that share a user.

    Raises:
        LossError: shapes differ, a value isn't finite, tau <= 0 or margin < 0.
    """
    return info_nce_rows(
        user,
        answer,
        temperature=temperature,
        margin=margin,
        same_side=same_side,
        answer_ids=answer_ids,
        user_ids=user_ids,
    )[0].mean()


def info_nce_rows(
    user: Tensor,
    answer: Tensor,
    *,
    temperature: float = 0.05,
    margin: float | None = 0.1,
    same_side: bool = True,
    answer_ids: Tensor | None = None,
    user_ids: Tensor | None = None,
    rows: slice = slice(None),
) -> tuple[Tensor, Negatives]:
    """Eq. 6 before the mean: Float[b], the loss of each row in ``rows``, and what was counted as a negative.

    A trainer with micro-batches asks for some rows at a time; every process computes all of them.
    """
    _check(user, answer, temperature, margin, answer_ids, user_ids)
    batch = user.shape[0]
    index = torch.arange(batch, device=user.device)
    candidate = index[rows, None] != index[None, :]
    for ids in (answer_ids, user_ids):
        if ids is not None:
            candidate &= ids[rows, None] != ids[None, :]

    # At least fp32: exp(1 / tau) and differences of close cosines do not survive half precision.
    precision = torch.promote_types(user.dtype, torch.float32)
    user, answer = user.to(precision), answer.to(precision)
    positive = (user[rows] * answer[rows]).sum(1)
    sums = [user[rows] @ answer.T]
    if same_side:
        sums += [user[rows] @ user.T, answer[rows] @ answer.T]

    logits, masked, kept = [positive[:, None] / temperature], [], 0
    for similarity in sums:
        keep = candidate
        if margin is not None:
            keep = candidate & (similarity.detach() <= positive.detach()[:, None] + margin)
        logits.append((similarity / temperature).masked_fill(~keep, -torch.inf))
        masked.append(float((candidate & ~keep).sum()) / max(int(candidate.sum()), 1))
        kept += int(keep.sum())
    every = torch.cat(logits, dim=1)
    loss = torch.logsumexp(every, dim=1) - logits[0][:, 0]
    masked += [0.0] * (3 - len(masked))
    return loss, Negatives(kept / max(len(positive), 1), *masked)


def _check(
    user: Tensor,
    answer: Tensor,
    temperature: float,
    margin: float | None,
    answer_ids: Tensor | None,
    user_ids: Tensor | None,
) -> None:
    if user.ndim != 2 or user.shape != answer.shape or not len(user):
        raise LossError(
            f"user, answer: expected two Float[B, d] with B >= 1, got {tuple(user.shape)} "
            f"and {tuple(answer.shape)}"
        )
    if not temperature > 0:
        raise LossError(f"temperature: {temperature} must be above 0")
    if margin is not None and not margin >= 0:
        raise LossError(f"margin: {margin} must be at least 0, or None to switch the margin mask off")
    for name, ids in (("answer_ids", answer_ids), ("user_ids", user_ids)):
        if ids is not None and ids.shape != user.shape[:1]:
            raise LossError(
                f"{name}: expected Long[B] with B = {user.shape[0]}, got shape {tuple(ids.shape)}"
            )
    for name, tensor in (("user", user), ("answer", answer)):
        finite = torch.isfinite(tensor).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            value = float(tensor[row][~torch.isfinite(tensor[row])][0])
            raise LossError(f"{name}: row {row} holds {value}; embeddings must be finite")
