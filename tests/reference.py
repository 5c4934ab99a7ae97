"""Slow references for the paper's equations: one function each, float64, one number at a time.

Written from the paper (arXiv 2602.10622, Sec. 3-4 and Appendix A) and from nothing else, so that an agreement
with ``ggsm_core`` means something. Indices are the paper's: B batch, L length, d hidden size, i query, j key,
t training step. Arrays are numpy float64; ``valid`` is Bool[B, L], True for a real token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ids = Sequence[int] | None

MODALITIES = ("bill", "minipro", "spm", "app", "search", "tabular")


# Sec. 3: data -----------------------------------------------------------------------------------------------


def cosine(v1: Sequence[float] | Array, v2: Sequence[float] | Array) -> float:
    """Sim of Eq. 3: v1 . v2 / (||v1|| ||v2||)."""
    dot = sum(float(x) * float(y) for x, y in zip(v1, v2, strict=True))
    return dot / (math.sqrt(sum(float(x) ** 2 for x in v1)) * math.sqrt(sum(float(y) ** 2 for y in v2)))


def difficulty(query_embedding: Array, answer_embedding: Array) -> float:
    """Eq. 3: S_d = 1 - Sim(Emb(u + q), Emb(a))."""
    return 1.0 - cosine(query_embedding, answer_embedding)


def sequence(records: dict[str, list[str]], query: str | None) -> list[str]:
    """Eq. 9-10 and Fig. 4: the six modalities in their order, each between its tags, then [q], then <USER>.

    Fig. 4's label "Instruction:" belongs to the optional q of Eq. 10.
    """
    parts = []
    for modality in MODALITIES:
        parts.append(f"<{modality}>")
        parts.extend(records.get(modality, []))
        parts.append(f"</{modality}>")
    if query is not None:
        parts.extend(("Instruction:", query))
    parts.append("<USER>")
    return parts


# Sec. 4 and A.2-A.4: masks ----------------------------------------------------------------------------------


def future_weight(visibility: Array, b: int, i: int, j: int) -> float:
    """w_ij of a visibility given per query and key [B, L, L], or per key [B, L] (then w_ij = w_j)."""
    return float(visibility[b, i, j] if visibility.ndim == 3 else visibility[b, j])


def additive_bias(visibility: Array, valid: Bools, hidden: float) -> Array:
    """Eq. 4 with padding, [B, 1, L, L]: 0 for j <= i, log w_ij for j > i, ``hidden`` where w is 0.

    A padding key is hidden for every query, except that a padding query sees itself (no row is empty).
    """
    batch, length = valid.shape
    bias = np.zeros((batch, 1, length, length))
    for b in range(batch):
        for i in range(length):
            for j in range(length):
                if not valid[b, j]:
                    bias[b, 0, i, j] = 0.0 if i == j else hidden
                elif j <= i:
                    bias[b, 0, i, j] = 0.0
                else:
                    w = future_weight(visibility, b, i, j)
                    bias[b, 0, i, j] = math.log(w) if w > 0 else hidden
    return bias


def attention(scores: Array, visibility: Array, valid: Bools) -> Array:
    """What Eq. 4 means after the softmax: p_ij = w_ij e^{s_ij} / sum_k w_ik e^{s_ik}, with w = 1 for j <= i.

    ``scores`` and the result are [B, L, L]. No logarithm and no hidden value occurs here.
    """
    batch, length = valid.shape
    result = np.zeros((batch, length, length))
    for b in range(batch):
        for i in range(length):
            mass = [0.0] * length
            for j in range(length):
                if not valid[b, j]:
                    w = 1.0 if i == j else 0.0
                elif j <= i:
                    w = 1.0
                else:
                    w = future_weight(visibility, b, i, j)
                mass[j] = w * math.exp(float(scores[b, i, j]))
            for j in range(length):
                result[b, i, j] = mass[j] / sum(mass)
    return result


def causal(i: int, j: int) -> float:
    """A.4, causal: nothing of the future."""
    return 1.0 if j <= i else 0.0


def hybrid_segment(i: int, j: int, inside: Sequence[bool]) -> float:
    """Sec. 1: bidirectional within the user segment, causal after."""
    return 1.0 if j <= i or (inside[i] and inside[j]) else 0.0


def soft_linear(t: int, total: int) -> float:
    """Scheduler as a soft weight (Conan-embedding-v2): one w for all the future, 0 at first, 1 at T_total."""
    return min(t / total, 1.0)


def share_open(t: int, total: int, shape: str) -> float:
    """Share of the span open at step t: linear, or half a cosine from 0 to 1."""
    x = min(t / total, 1.0)
    return x if shape == "linear" else (1.0 - math.cos(math.pi * x)) / 2.0


def span(i: int, j: int, delta: float) -> float:
    """A.4 (b): position i attends up to min(i + Delta, L)."""
    return 1.0 if j <= i + delta else 0.0


# Sec. 4: guidance -------------------------------------------------------------------------------------------


def gradient_norms(loss: Callable[[Array], float], hidden: Array, eps: float = 1e-6) -> Array:
    """||grad_{h_j} L|| of Eq. 5 by central differences, [B, L] for hidden [B, L, d]."""
    batch, length, size = hidden.shape
    norms = np.zeros((batch, length))
    for b in range(batch):
        for j in range(length):
            squares = 0.0
            for k in range(size):
                up, down = hidden.copy(), hidden.copy()
                up[b, j, k] += eps
                down[b, j, k] -= eps
                squares += ((loss(up) - loss(down)) / (2 * eps)) ** 2
            norms[b, j] = math.sqrt(squares)
    return norms


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x), without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def token_weights(norms: Array, valid: Bools, normalise: str = "none") -> Array:
    """First branch of Eq. 5, and its two normalised readings; 0 on padding.

    none: sigma(norm). zscore: sigma of the norm minus the row's mean, over its population deviation; 0.5
    where all norms are equal. rank: ascending rank 1..n over n + 1, ties share their mean rank.
    """
    batch, length = norms.shape
    weights = np.zeros((batch, length))
    for b in range(batch):
        row = [float(norms[b, j]) for j in range(length) if valid[b, j]]
        n = len(row)
        for j in range(length):
            if not valid[b, j]:
                continue
            x = float(norms[b, j])
            if normalise == "none":
                weights[b, j] = sigmoid(x)
            elif normalise == "zscore":
                mean = math.fsum(row) / n
                deviation = math.sqrt(math.fsum((y - mean) ** 2 for y in row) / n)
                weights[b, j] = 0.5 if min(row) == max(row) else sigmoid((x - mean) / deviation)
            elif normalise == "rank":
                below = sum(1 for y in row if y < x)
                equal = sum(1 for y in row if y == x)
                weights[b, j] = (below + (equal + 1) / 2) / (n + 1)
            else:
                raise KeyError(normalise)
    return weights


def open_linearly(w: float, t: int, warm: int, total: int) -> float:
    """Eq. 5 and 15 for one weight: w before T_warm, then (1 - alpha) w + alpha, 1 from T_total."""
    if t < warm:
        return w
    if t >= total:
        return 1.0
    alpha = (t - warm) / (total - warm)
    return (1.0 - alpha) * w + alpha


def freeze_by_position(weights: Array, valid: Bools) -> dict[int, float]:
    """Mean weight per position counted back from <USER>, the last real token (offset 0), over a batch."""
    found: dict[int, list[float]] = {}
    for b in range(valid.shape[0]):
        real = [j for j in range(valid.shape[1]) if valid[b, j]]
        for j in real:
            found.setdefault(real[-1] - j, []).append(float(weights[b, j]))
    return {offset: sum(values) / len(values) for offset, values in found.items()}


def freeze_by_segment(weights: Array, valid: Bools, segments: NDArray[np.int64]) -> dict[int, float]:
    """Mean weight per template segment over a batch."""
    found: dict[int, list[float]] = {}
    for b in range(valid.shape[0]):
        for j in range(valid.shape[1]):
            if valid[b, j]:
                found.setdefault(int(segments[b, j]), []).append(float(weights[b, j]))
    return {segment: sum(values) / len(values) for segment, values in found.items()}


# Sec. 4: loss -----------------------------------------------------------------------------------------------


def similarities(left: Array, right: Array) -> Array:
    """s(left_i, right_j) for all i, j of unit vectors, [B, B]."""
    rows, columns = len(left), len(right)
    return np.array(
        [[sum(float(x) * float(y) for x, y in zip(left[i], right[j], strict=True)) for j in range(columns)]
         for i in range(rows)]
    ).reshape(rows, columns)  # fmt: skip


def margin_mask(s: float, positive: float, margin: float | None) -> float:
    """Eq. 8 for one pair: 0 if s_ij > s(u_i, a_i+) + c_margin, else 1."""
    return 0.0 if margin is not None and s > positive + margin else 1.0


def are_negatives(i: int, j: int, answer_ids: Ids, user_ids: Ids) -> bool:
    """Whether rows i and j may be negatives: not itself, not the same answer, not the same user."""
    same_answer = answer_ids is not None and answer_ids[i] == answer_ids[j]
    same_user = user_ids is not None and user_ids[i] == user_ids[j]
    return i != j and not same_answer and not same_user


def terms(user: Array, answer: Array, same_side: bool) -> list[Array]:
    """The similarity matrices of the sums of Eq. 7: user-answer, user-user, answer-answer."""
    mixed = similarities(user, answer)
    return [mixed, similarities(user, user), similarities(answer, answer)] if same_side else [mixed]


def masks(
    user: Array, answer: Array, margin: float | None, same_side: bool, answer_ids: Ids, user_ids: Ids
) -> list[Array]:
    """m_ij of each sum of Eq. 7, each by its own s_ij (Eq. 8); 0 for pairs that are never negatives."""
    batch = len(user)
    positive = similarities(user, answer)
    result = []
    for s in terms(user, answer, same_side):
        m = np.zeros((batch, batch))
        for i in range(batch):
            for j in range(batch):
                if are_negatives(i, j, answer_ids, user_ids):
                    m[i, j] = margin_mask(s[i, j], positive[i, i], margin)
        result.append(m)
    return result


def info_nce(
    user: Array,
    answer: Array,
    *,
    temperature: float = 0.05,
    margin: float | None = 0.1,
    same_side: bool = True,
    answer_ids: Ids = None,
    user_ids: Ids = None,
    fixed: list[Array] | None = None,
) -> float:
    """Eq. 6-7. ``fixed`` gives the masks m instead of Eq. 8: the loss whose gradient a detached mask has."""
    batch = len(user)
    sides = terms(user, answer, same_side)
    m = fixed if fixed is not None else masks(user, answer, margin, same_side, answer_ids, user_ids)
    loss = 0.0
    for i in range(batch):
        positive = sides[0][i, i] / temperature
        ratio = 1.0  # Z_i / e^{positive}: the same number as Eq. 6, and e^{100} never meets e^{-100}
        for term, mask in zip(sides, m, strict=True):
            for j in range(batch):
                if j != i:
                    ratio += mask[i, j] * math.exp(term[i, j] / temperature - positive)
        loss += math.log(ratio)
    return loss / batch


def margin_gap(user: Array, answer: Array, margin: float | None, same_side: bool = True) -> float:
    """Smallest |s_ij - s(u_i, a_i+) - margin|: near 0, rounding may decide Eq. 8 either way."""
    if margin is None:
        return math.inf
    positive = similarities(user, answer)
    gap = math.inf
    for s in terms(user, answer, same_side):
        for i in range(len(user)):
            for j in range(len(user)):
                if i != j:
                    gap = min(gap, abs(s[i, j] - positive[i, i] - margin))
    return gap


def info_nce_gradient(
    user: Array, answer: Array, *, eps: float = 1e-6, **options: object
) -> tuple[Array, Array]:
    """Gradient of the loss in the raw vectors, whose L2 normalisation (Eq. 13) enters it, masks held.

    Central differences: each coordinate is moved, the row is normalised again, and Eq. 6 evaluated.
    """
    fixed = masks(
        user,
        answer,
        options.get("margin", 0.1),  # type: ignore[arg-type]
        bool(options.get("same_side", True)),
        options.get("answer_ids"),  # type: ignore[arg-type]
        options.get("user_ids"),  # type: ignore[arg-type]
    )
    gradients = []
    for side in (0, 1):
        base = (user, answer)[side]
        gradient = np.zeros_like(base)
        for i in range(base.shape[0]):
            for k in range(base.shape[1]):
                values = []
                for sign in (1.0, -1.0):
                    moved = base.copy()
                    moved[i, k] += sign * eps
                    moved[i] = normalise(moved[i])
                    both = (moved, answer) if side == 0 else (user, moved)
                    values.append(info_nce(*both, fixed=fixed, **options))  # type: ignore[arg-type]
                gradient[i, k] = (values[0] - values[1]) / (2 * eps)
        gradients.append(gradient)
    return gradients[0], gradients[1]


# A.2-A.3: read-out ------------------------------------------------------------------------------------------


def normalise(vector: Array) -> Array:
    """Eq. 13: u / ||u||_2."""
    norm = math.sqrt(sum(float(x) ** 2 for x in vector))
    return np.array([float(x) / norm for x in vector])


def read_out(hidden: Array, input_ids: NDArray[np.int64], marker: int) -> Array:
    """Eq. 11-14: the final hidden state at the last ``marker`` (<USER> or <EOS>), L2-normalised."""
    rows = []
    for b in range(hidden.shape[0]):
        position = max(j for j in range(hidden.shape[1]) if input_ids[b, j] == marker)
        rows.append(normalise(hidden[b, position]))
    return np.stack(rows)
