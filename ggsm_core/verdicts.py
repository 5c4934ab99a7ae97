"""What published tables say: paired differences, rows that can't be told apart, orders that agree.

Every interval here is over households and training seeds, from the tables' covariances; p-values are
corrected by Holm over the family that a call asks for, no larger and no smaller. A row that was trained once
says nothing of its spread over seeds: it is compared on its own seed, and the spread is taken from the rows
that were trained several times (``spread``). Few seeds tell their own spread badly, so intervals
and p-values are Student's, with the degrees of freedom that Satterthwaite (1946) gives the sum of the two
variances; households are so many that theirs counts as known.

R rows, S simulated tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import polars as pl
from scipy.special import stdtr, stdtrit

from ggsm_core.comparison import MEAN, corrected
from ggsm_core.comparison import NONE_SHOWN as NONE_SHOWN
from ggsm_core.data.tasks import TASKS
from ggsm_core.evidence import Evidence, EvidenceError
from ggsm_core.intervals import Floats
from ggsm_core.params import FEATURE_BASELINES, PEERS

SIMULATIONS = 2000


class Noise(NamedTuple):
    """A variance that training seeds cause, and the degrees of freedom it was estimated with."""

    variance: float
    free: float


class Agreement(NamedTuple):
    """Kendall's tau of two orders of ``n`` rows, with the interval that one order's uncertainty gives it."""

    tau: float
    ci_low: float
    ci_high: float
    n: int


def points(evidence: Evidence, rows: Sequence[str], task: str = MEAN) -> Floats:
    """AUC [R], mean over seeds. Raises ``EvidenceError`` for a row or task without numbers."""
    found = dict(evidence.rows.filter(pl.col("task") == task).select("recipe", "auc").iter_rows())
    if lacking := [row for row in rows if row not in found]:
        raise EvidenceError(f"results/{evidence.name}: no numbers of row {lacking[0]!r} on {task!r}")
    return np.array([found[row] for row in rows])


def covariance(evidence: Evidence, rows: Sequence[str], task: str = MEAN) -> Floats:
    """[R, R], of the rows' AUC. Raises ``EvidenceError`` for a row or task without numbers."""
    table = evidence.covariance.filter(pl.col("task") == task)
    known = {
        frozenset(pair): value for *pair, value in table.select("row", "other", "covariance").iter_rows()
    }
    try:
        return np.array([[known[frozenset((a, b))] for b in rows] for a in rows])
    except KeyError as problem:
        pair = sorted(problem.args[0])
        raise EvidenceError(f"results/{evidence.name}: no covariance of {pair} on {task!r}") from None


def by_seed(evidence: Evidence, row: str, task: str = MEAN) -> dict[int, float]:
    """Training seed -> AUC on a task, on a domain (plain average of its tasks), or on the mean."""
    tasks = [one.name for one in TASKS if one.domain == task] or [task]
    found = evidence.auc.filter(pl.col("recipe") == row, pl.col("task").is_in(tasks))
    return dict(found.group_by("seed").agg(pl.col("auc").mean()).sort("seed").iter_rows())


def spread(evidence: Evidence, task: str = MEAN) -> tuple[Noise, Noise] | None:
    """What a training seed moves: variance of one row's AUC, and of the difference of two rows on one seed.

    Means over the R recipes and variants with several seeds, on the S seeds that all of these share (``ddof``
    1); None where no two rows have two seeds in common. A seed moves all rows alike in part, so one row's
    variance is credited with S - 1 degrees of freedom only, that of differences with (R - 1)(S - 1).
    """
    several = [row for row in evidence.profile.trained if evidence.seeds.get(row, 0) > 1]
    values = [by_seed(evidence, row, task) for row in several]
    shared = sorted(set.intersection(*map(set, values))) if values else []
    if len(values) < 2 or len(shared) < 2:
        return None
    auc = np.array([[one[seed] for seed in shared] for one in values])
    paired = [np.var(a - b, ddof=1) for a, b in combinations(auc, 2)]
    free = len(shared) - 1
    return (
        Noise(float(auc.var(axis=1, ddof=1).mean()), free),
        Noise(float(np.mean(paired)), (len(several) - 1) * free),
    )


def gaps(
    evidence: Evidence, pairs: Iterable[tuple[str, str]], task: str = MEAN, *, like: Evidence | None = None
) -> pl.DataFrame:
    """Paired differences of (row, reference) pairs, one family: columns of differences.csv, error, p, seeds.

    ``seeds`` is the smaller number of the two, of rows that draw by a seed. Where it is 1, the difference is
    that of the seed which both have, and its variance has the ``spread`` over seeds in ``like`` added
    (``evidence`` itself by default); where there is none, the interval is over households alone. Pairs of
    which one has no numbers are left out.
    """
    pairs = [(row, reference) for row, reference in pairs if len(evidence.has(row, reference)) == 2]
    rows = list(dict.fromkeys(name for pair in pairs for name in pair))
    at = {row: place for place, row in enumerate(rows)}
    auc, together = points(evidence, rows, task), covariance(evidence, rows, task)
    by_row = {name: by_seed(evidence, name, task) for name in rows}
    lines, over_seeds = [], spread(like or evidence, task)
    for row, reference in pairs:
        one, other = at[row], at[reference]
        point = float(auc[one] - auc[other])
        variance = max(together[one, one] + together[other, other] - 2 * together[one, other], 0.0)
        drawn = [name for name in (row, reference) if name not in evidence.profile.unseeded]
        seeds = min((evidence.seeds[name] for name in drawn), default=1)
        noise = Noise(0.0, 1)
        if drawn:
            paired = _paired(evidence, by_row, row, reference)
            if seeds > 1:
                noise = Noise(float(paired.var(ddof=1)) / len(paired), len(paired) - 1)
            else:
                point = float(paired.mean())
                noise = over_seeds[len(drawn) - 1] if over_seeds else noise
                variance += noise.variance
        error = float(np.sqrt(variance))
        lines.append((row, reference, task, seeds, point, *student(point, error, noise), error))
    columns = ("row", "reference", "task", "seeds", "difference", "ci_low", "ci_high", "p", "error")
    types = (*[pl.String] * 3, pl.Int64, *[pl.Float64] * 5)
    return corrected(pl.DataFrame(lines, schema=dict(zip(columns, types, strict=True)), orient="row"))


def family(evidence: Evidence, pairs: Sequence[tuple[str, str]], tasks: Sequence[str]) -> pl.DataFrame:
    """The ``gaps`` of all pairs on all tasks, corrected as one family."""
    return corrected(pl.concat([gaps(evidence, pairs, task) for task in tasks]))


def student(point: float, error: float, noise: Noise) -> tuple[float, float, float]:
    """Ends of the 95 % interval of ``point`` and its p-value; ``noise`` is a part of the variance."""
    if error == 0:
        return point, point, float(point == 0)
    share = min(noise.variance / error**2, 1.0)
    free = noise.free / share**2 if share else np.inf
    half = error * float(stdtrit(free, 0.975))
    return point - half, point + half, float(2 * stdtr(free, -abs(point) / error))


def _paired(evidence: Evidence, by_row: Mapping[str, dict[int, float]], row: str, reference: str) -> Floats:
    """The difference on each seed that both rows have; a row that draws nothing has all of them."""
    one, other = by_row[row], by_row[reference]
    if row in evidence.profile.unseeded:
        one = dict.fromkeys(other, next(iter(one.values())))
    if reference in evidence.profile.unseeded:
        other = dict.fromkeys(one, next(iter(other.values())))
    if not (shared := one.keys() & other.keys()):
        raise EvidenceError(
            f"results/{evidence.name}: {row!r} and {reference!r} have no training seed in common"
        )
    return np.array([one[seed] - other[seed] for seed in sorted(shared)])


def tried(
    evidence: Evidence, what: str, references: Sequence[str], *, like: Evidence | None = None
) -> pl.DataFrame:
    """``gaps`` of a profile's variants, or, where it has none, of all rows but features, to each reference.

    Each pair once. Further columns: change (what a variant changes, else ``what``; of a row that such a
    profile does not train, "..., untrained"), tables, and ``Evidence.ended``.
    """
    variants = evidence.profile.variants.items()
    parts = {row: {**v.options, **v.objective, **v.training}.items() for row, v in variants}
    changes = {row: ", ".join(f"{key}: {value}" for key, value in part) for row, part in parts.items()}
    learnt = {*evidence.profile.trained, *PEERS}
    rows = changes or {
        row: what if row in learnt else f"{what}, untrained"
        for row in evidence.seeds
        if row not in FEATURE_BASELINES
    }
    pairs = {frozenset((row, other)): (row, other) for other in references for row in rows if row != other}
    table = gaps(evidence, pairs.values(), like=like)
    change = pl.col("row").replace_strict(rows, return_dtype=pl.String)
    return table.with_columns(change=change, tables=pl.lit(evidence.name)).join(
        evidence.ended(), on="row", how="left", maintain_order="left"
    )


def twins(evidence: Evidence, rows: Sequence[str]) -> dict[str, str]:
    """Row -> an earlier one with the same AUC, digit by digit, on all tasks and shared seeds: one encoder."""
    auc = {
        row: dict(zip(of.select("seed", "task").iter_rows(), of["auc"], strict=True))
        for row in evidence.has(*rows)
        for of in [evidence.auc.filter(recipe=row)]
    }
    found: dict[str, str] = {}
    for row, other in combinations(auc, 2):
        shared = auc[row].keys() & auc[other].keys()
        if shared and other not in found and all(auc[row][key] == auc[other][key] for key in shared):
            found[other] = found.get(row, row)
    return found


def groups(evidence: Evidence, rows: Sequence[str], task: str = MEAN) -> list[list[str]]:
    """Largest runs of 2 or more rows, best first, in which no pair is told apart (Holm over all pairs)."""
    order = [rows[k] for k in np.argsort(-points(evidence, rows, task), kind="stable")]
    table = gaps(evidence, combinations(order, 2), task).filter(pl.col("verdict") != NONE_SHOWN)
    apart = set(table.select("row", "reference").iter_rows())
    found: list[list[str]] = []
    for start in range(len(order)):
        end = start + 1
        while end < len(order) and not any((row, order[end]) in apart for row in order[start:end]):
            end += 1
        run = order[start:end]
        if len(run) > 1 and not (found and set(run) <= set(found[-1])):
            found.append(run)
    return found


def _tau(values: Floats, fixed: Floats) -> Floats:
    """Kendall's tau-b of each line of ``values`` [S, R] with ``fixed`` [R]: [S]."""
    upper = np.triu_indices(len(fixed), 1)
    one = np.sign(values[:, :, None] - values[:, None, :])[:, upper[0], upper[1]]
    other = np.sign(fixed[:, None] - fixed[None, :])[upper]
    untied = np.sqrt((one != 0).sum(axis=1) * (other != 0).sum())
    tau: Floats = one @ other / np.maximum(untied, 1)
    return tau


def agreement(evidence: Evidence, printed: Mapping[str, float], task: str = MEAN, seed: int = 0) -> Agreement:
    """Order of our rows against ``printed`` numbers of the same rows, which come without uncertainty.

    The interval is that of tau over tables drawn from the normal distribution with our averages and
    covariances. Raises ``EvidenceError`` if fewer than three rows have both.
    """
    rows = evidence.has(*printed)
    if len(rows) < 3:
        raise EvidenceError(
            f"results/{evidence.name}: {len(rows)} rows have printed numbers too; 3 are needed"
        )
    ours, fixed = points(evidence, rows, task), np.array([printed[row] for row in rows])
    rng = np.random.default_rng(seed)
    together = covariance(evidence, rows, task)
    drawn = rng.multivariate_normal(ours, together, size=SIMULATIONS, check_valid="ignore", method="eigh")
    low, high = np.quantile(_tau(drawn, fixed), [0.025, 0.975])
    return Agreement(float(_tau(ours[None], fixed)[0]), float(low), float(high), len(rows))


# --- what a claim is worth --------------------------------------------------------------------------------

SUPPORTED, NOT_SHOWN, CONTRADICTED, UNMEASURED = "supported", "not shown", "contradicted", "not measured"


def judge(table: pl.DataFrame, planned: int, *, one_is_enough: bool = False) -> str:
    """The verdict on "row is better than reference" for a family of ``planned`` pairs, from its ``gaps``.

    Supported if every pair is better (or, if ``one_is_enough``, one is); contradicted if any is worse and it
    isn't supported; not measured if no pair has numbers; else not shown, also where a pair lacks numbers.
    """
    better, worse = ((table["verdict"] == word).sum() for word in ("better", "worse"))
    if table.is_empty():
        return UNMEASURED
    if better == planned or (one_is_enough and better):
        return SUPPORTED
    return CONTRADICTED if worse else NOT_SHOWN


def counted(table: pl.DataFrame) -> str:
    """``better 1, worse 0, no difference shown 4``."""
    if table.is_empty():
        return "nothing to compare yet"
    words = ("better", "worse", NONE_SHOWN)
    return ", ".join(f"{word} {(table['verdict'] == word).sum()}" for word in words)


def reach(table: pl.DataFrame) -> float:
    """The largest difference, of either sign, that some interval of ``gaps`` leaves possible."""
    return float(
        table.select(pl.max_horizontal(pl.col("ci_low").abs(), pl.col("ci_high").abs()).max()).item()
    )
