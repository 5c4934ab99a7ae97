"""AUC and its interval over households: folds, resamples and paired differences (``evaluation`` says why so).

n samples (rows), H households, R bootstrap resamples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class EvaluationError(ValueError):
    """Something that can't be evaluated. The message names what, where, and the mend."""


@dataclass(frozen=True, slots=True)
class Households:
    """Folds and bootstrap weights of all households: build it once from ALL users, use it for every row.

    The resamples are a Bayesian bootstrap (Rubin 1981): each household draws a standard exponential weight.
    Integer counts could leave a fold without one class; these never do, and dropping the households that a
    task filters out needs no new draw.
    """

    ids: NDArray[np.str_]  # [H], sorted
    fold: Ints  # [H], 0 .. folds - 1
    weights: Floats  # [H, R]

    @classmethod
    def of(cls, groups: ArrayLike, *, folds: int = 5, seed: int = 0, bootstrap: int = 1000) -> Households:
        """Deal the unique ``groups`` into folds whose sizes differ by at most one.

        They are dealt in the order of a hash of (seed, id), which knows neither row order nor platform.
        """
        ids = np.unique(np.asarray(groups).astype(str))
        if folds < 3:
            raise EvaluationError(
                f"folds: {folds}; a setting is chosen inside the training folds, use at least 3"
            )
        if len(ids) < folds:
            raise EvaluationError(f"groups: {len(ids)} households can't fill {folds} folds; use fewer folds")
        digests = [hashlib.blake2b(f"{seed}:{name}".encode()).digest() for name in ids]
        fold = np.empty(len(ids), dtype=np.int64)
        fold[sorted(range(len(ids)), key=digests.__getitem__)] = np.arange(len(ids)) % folds
        return cls(ids, fold, np.random.default_rng(seed).standard_exponential((len(ids), bootstrap)))

    def index(self, groups: ArrayLike) -> Ints:
        """Row of each group in ``ids``: Int[n]."""
        names = np.asarray(groups).astype(str)
        index = np.searchsorted(self.ids, names).clip(max=len(self.ids) - 1)
        if (unknown := self.ids[index] != names).any():
            raise EvaluationError(
                f"groups: {str(names[unknown][0])!r} is not among the {len(self.ids)} households; "
                "build Households from all users"
            )
        return index


@dataclass(frozen=True, slots=True)
class Difference:
    """AUC of a minus AUC of b on the same rows, 95 % interval and two-sided p-value."""

    difference: float
    ci_low: float
    ci_high: float
    p: float

    @classmethod
    def of(cls, difference: float, draws: Floats) -> Difference:
        """From bootstrap draws [R]. p is normal (difference over the draws' standard deviation): a count
        of R draws can't go below 1/R, where a correction for many comparisons has to look.

        Raises ``EvaluationError`` for draws that are no numbers.
        """
        if not (np.isfinite(draws).all() and np.isfinite(difference)):
            raise EvaluationError(
                "difference: a draw is no number; each resample needs scores and both labels"
            )
        return cls(float(difference), *interval(draws), two_sided(float(difference), float(draws.std())))


def two_sided(difference: float, error: float) -> float:
    """The normal p-value of ``difference`` with standard error ``error``; without error, 1 or 0."""
    return float(2 * ndtr(-abs(difference) / error)) if error > 0 else float(difference == 0)


def interval(draws: Floats) -> tuple[float, float]:
    """95 % percentile interval of bootstrap draws [R]."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def weighted_auc(scores: Floats, labels: Ints, weights: Floats) -> Floats:
    """AUC [R] of ``scores`` [n] under each column of row ``weights`` [n, R]; ties count one half."""
    positive, negative = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    negative = negative[np.argsort(scores[negative], kind="stable")]
    below = np.zeros((len(negative) + 1, weights.shape[1]))  # row k: weight of the k lowest negatives
    np.cumsum(weights[negative], axis=0, out=below[1:])
    first = np.searchsorted(scores[negative], scores[positive], side="left")
    last = np.searchsorted(scores[negative], scores[positive], side="right")
    beaten = below[first]
    tied = last > first
    beaten[tied] = (beaten[tied] + below[last[tied]]) / 2
    auc: Floats = np.einsum("pr,pr->r", weights[positive], beaten)
    return auc / (weights[positive].sum(axis=0) * below[-1])


def mean_fold_auc(scores: Floats, labels: Ints, fold: Ints, weights: Floats | None = None) -> Floats:
    """Mean over folds of the AUC within a fold: [R] under row ``weights`` [n, R]; [1] without."""
    if weights is None:
        weights = np.ones((len(scores), 1))
    inside = [fold == k for k in np.unique(fold)]
    auc: Floats = np.mean([weighted_auc(scores[r], labels[r], weights[r]) for r in inside], axis=0)
    return auc
