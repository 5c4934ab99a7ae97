"""Linear probe of frozen embeddings, AUC, and intervals over households (Sec. 5; evaluation protocol).

n samples (rows), d features, H households, R bootstrap resamples, S settings of a probe.

How one task is scored, the same way for every row of every table:

1. Households, not samples, are dealt into folds (``Households``), once for all tasks and all rows.
2. For each fold, the probe is fitted on the other folds. Its setting (the C of a logistic regression) is
   the one of a fixed grid with the best AUC *inside* those other folds (``probe_tasks`` says how);
   the scored fold never has a say.
3. The AUC is the mean over folds of the AUC within a fold. Scores of two folds come from two models, whose
   intercepts and scales differ, so ranking them together (a pooled AUC) would be biased, downwards for noise.
4. The interval is a bootstrap over households of that same mean, scores held fixed. The same resample of
   households serves every task and row, so that differences between rows and means over tasks are paired.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import polars as pl
from numpy.typing import ArrayLike
from safetensors.numpy import load_file
from scipy.linalg import LinAlgWarning
from scipy.special import logit
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from ggsm_core.intervals import Difference, EvaluationError, Floats, Households, Ints, interval, mean_fold_auc
from ggsm_core.progress import Progress, silent


class SingleClassFold(EvaluationError):
    """A fold without positives or without negatives: its AUC doesn't exist."""


class MissingValue(EvaluationError):
    """A NaN or an infinity among the features."""


class ConstantEmbedding(EvaluationError):
    """All rows are the same: a collapsed encoder, not a weak one."""


class NotConverged(EvaluationError):
    """A probe whose solver stopped early. It is never averaged over in silence."""


@dataclass(frozen=True, slots=True)
class Task:
    """One binary task on some of the rows."""

    name: str
    rows: Ints  # [n], rows of the features
    labels: Ints  # [n], 0 or 1
    household: Ints  # [n], rows of Households


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Out-of-fold AUC of one task with its 95 % interval over households."""

    auc: float
    ci_low: float
    ci_high: float
    n: int
    scores: Floats  # [n], out of fold; comparable within a fold
    fold: Ints  # [n]
    settings: tuple[float, ...]  # the setting chosen for each fold


# --- the two probes -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Probe:
    """A model family and the settings it is allowed; a tie between settings goes to the earlier one."""

    scores: Callable[[Floats, Ints, Floats, Sequence[float]], Floats]
    """(x [n, d], y [n], held [m, d], settings [S]) -> scores Float[S, m] of the held-out rows."""
    grid: tuple[float, ...]


def standardise(x: Floats, held: Floats) -> tuple[Floats, Floats]:
    """``x`` [n, d] with mean 0 and variance 1, ``held`` scaled alike; what is constant in ``x`` becomes 0."""
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale <= 1e-7 * np.abs(mean)] = np.inf
    return (x - mean) / scale, (held - mean) / scale


def linear_scores(x: Floats, y: Ints, held: Floats, settings: Sequence[float]) -> Floats:
    """Logistic regression along a path of C, each fit starting from the one before."""
    x, held = standardise(x, held)
    model = LogisticRegression(solver="newton-cholesky", warm_start=True, tol=1e-5, max_iter=50)
    scores = []
    for strength in settings:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            warnings.simplefilter("error", LinAlgWarning)
            try:
                model.set_params(C=strength).fit(x, y)
            except (ConvergenceWarning, LinAlgWarning) as warning:
                raise NotConverged(f"C = {strength:g}: {warning}") from None
        scores.append(model.decision_function(held))
    return np.array(scores)


def boosted_scores(x: Floats, y: Ints, held: Floats, settings: Sequence[float]) -> Floats:
    """Histogram gradient boosting, read out after each number of trees in ``settings``."""
    model = HistGradientBoostingClassifier(
        learning_rate=0.1,
        max_iter=int(max(settings)),
        max_leaf_nodes=6,
        min_samples_leaf=30,
        l2_regularization=1.0,
        max_features=0.3,
        max_bins=64,
        early_stopping=False,  # its split is over rows; here the trees are counted on held-out households
        random_state=0,
    ).fit(x, y)
    wanted = {int(count) for count in settings}
    staged = enumerate(model.staged_predict_proba(held), start=1)
    return np.array([logit(p[:, 1]) for count, p in staged if count in wanted])


PROBES = {
    # C, the most regularised first. An embedding may vary a thousand times more one way than another,
    # and what lies along a narrow way takes large weights.
    "linear": Probe(linear_scores, (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)),
    "boosted": Probe(boosted_scores, (15, 30, 60, 120)),  # trees
}


# --- nested folds -------------------------------------------------------------------------------------


def _held_out(
    probe: Probe, x: Floats, task: Task, fold: Ints, held: Sequence[int], settings: Sequence[float]
) -> Floats:
    """Scores [S, m] of the rows in the folds ``held``, from a model of all other folds."""
    out = np.isin(fold, held)
    train, y = x[task.rows[~out]], task.labels[~out]
    with threadpool_limits(1):  # one thread: the same sums in the same order, however many processes
        try:
            return probe.scores(train, y, x[task.rows[out]], settings)
        except NotConverged as error:
            raise NotConverged(f"task {task.name!r}, held-out fold(s) {list(held)}: {error}") from None


def _choose(
    task: Task, fold: Ints, ring: dict[tuple[int, int], Floats], grid: Sequence[float]
) -> list[float]:
    """For each fold k, the setting with the best AUC on its two neighbours b, scored without k and b."""
    gain = np.zeros((len(ring), len(grid)))
    for pair, scores in ring.items():
        held = np.isin(fold, pair)
        for k, b in (pair, pair[::-1]):
            rows = fold[held] == b
            gain[k] += [mean_fold_auc(s[rows], task.labels[held][rows], fold[held][rows])[0] for s in scores]
    return [grid[int(best)] for best in gain.argmax(axis=1)]


def probe_tasks(
    features: ArrayLike,
    tasks: Sequence[Task],
    households: Households,
    *,
    probe: Probe = PROBES["linear"],
    jobs: int = 1,
    progress: Progress = silent,
) -> list[ProbeResult]:
    """Probe ``features`` Float[N, d] on every task; ``jobs`` (processes) changes the time only.

    The folds stand in a ring. A model of all folds but two neighbours serves the choice of both: its scores
    of the one choose for the other. That is five inner fits a task; holding out every pair of folds takes ten
    and moved no task's AUC by more than 0.001 (Complete Journey, 262 features).
    """
    x = np.ascontiguousarray(features, dtype=np.float64)
    _check_features(x)
    fold_of = [households.fold[task.household] for task in tasks]
    folds = range(int(households.fold.max()) + 1)
    for task, fold in zip(tasks, fold_of, strict=True):
        _check_task(task, fold, folds)

    ring = [(k, (k + 1) % len(folds)) for k in folds]
    inner = [(t, pair) for t in range(len(tasks)) for pair in ring]
    outer = [(t, k) for t in range(len(tasks)) for k in folds]
    total = len(inner) + len(outer)
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator")
    one = joblib.delayed(_held_out)

    found: list[dict[tuple[int, int], Floats]] = [{} for _ in tasks]
    fits = parallel(one(probe, x, tasks[t], fold_of[t], pair, probe.grid) for t, pair in inner)
    for done, ((t, pair), scores) in enumerate(zip(inner, fits, strict=True), start=1):
        found[t][pair] = scores
        progress(done, total, f"{tasks[t].name}: choosing the setting")
    chosen = [_choose(*each, probe.grid) for each in zip(tasks, fold_of, found, strict=True)]

    held = [np.empty(len(task.rows)) for task in tasks]
    fits = parallel(one(probe, x, tasks[t], fold_of[t], (k,), (chosen[t][k],)) for t, k in outer)
    for done, ((t, k), scores) in enumerate(zip(outer, fits, strict=True), start=len(inner) + 1):
        held[t][fold_of[t] == k] = scores[0]
        progress(done, total, f"{tasks[t].name}: scoring")

    results = []
    for task, fold, scores, settings in zip(tasks, fold_of, held, chosen, strict=True):
        auc = float(mean_fold_auc(scores, task.labels, fold)[0])
        draws = mean_fold_auc(scores, task.labels, fold, households.weights[task.household])
        results.append(ProbeResult(auc, *interval(draws), len(scores), scores, fold, tuple(settings)))
    return results


LABEL_SHARES = (0.01, 0.1)
"""Of the labelled households, how many a probe may learn from in ``with_fewer_labels``."""


def with_fewer_labels(
    features: ArrayLike,
    tasks: Sequence[Task],
    results: Sequence[ProbeResult],
    households: Households,
    *,
    probe: Probe = PROBES["linear"],
    shares: Sequence[float] = LABEL_SHARES,
) -> pl.DataFrame:
    """AUC where each fold's probe learns from a share of its training households: how dear are labels?

    Same folds, same scored rows and same settings as ``results``, which are the last share, 1. Which
    households come first is drawn once for all rows of the table, so a larger share holds the smaller one. A
    share with labels of one class alone takes further households until it has both; ``households`` is the
    mean number over folds. Columns: task, share, auc, households.
    """
    x = np.ascontiguousarray(features, dtype=np.float64)
    order = np.random.default_rng(0).permutation(len(households.fold))  # rank of each household
    table = []
    for task, full in zip(tasks, results, strict=True):
        fold, folds = households.fold[task.household], len(full.settings)
        counts = [len(np.unique(task.household[fold != k])) for k in range(folds)]
        for share in shares:
            scores, used = np.empty(len(task.rows)), []
            for k, setting in enumerate(full.settings):
                few = _first_households(task, order, fold != k, share)
                used.append(len(np.unique(task.household[few])))
                part = Task(task.name, task.rows[few | (fold == k)], task.labels[few | (fold == k)],
                            task.household[few | (fold == k)])  # fmt: skip
                inside = fold[few | (fold == k)]
                scores[fold == k] = _held_out(probe, x, part, inside, (k,), (setting,))[0]
            auc = float(mean_fold_auc(scores, task.labels, fold)[0])
            table.append((task.name, share, auc, float(np.mean(used))))
        table.append((task.name, 1.0, full.auc, float(np.mean(counts))))
    columns = {"task": pl.String, "share": pl.Float64, "auc": pl.Float64, "households": pl.Float64}
    return pl.DataFrame(table, schema=columns, orient="row")


def _first_households(task: Task, order: Ints, allowed: Any, share: float) -> Any:
    """Bool[n]: the rows of the first ``share`` of the allowed households, and on until both classes occur."""
    rank = order[task.household]
    ranks = np.unique(rank[allowed])
    least = max(rank[allowed & (task.labels == label)].min() for label in (0, 1))
    last = max(ranks[max(round(share * len(ranks)), 1) - 1], least)
    return allowed & (rank <= last)


def _check_features(x: Floats) -> None:
    if x.ndim != 2 or not x.size:
        raise EvaluationError(f"embeddings: shape {x.shape}; expected [n, d] with n, d > 0")
    if not (finite := np.isfinite(x)).all():
        row, column = np.argwhere(~finite)[0]
        bad = int((~finite.all(axis=1)).sum())
        raise MissingValue(
            f"embeddings: {x[row, column]} in row {row}, dimension {column} ({bad} row(s) in all); "
            "the encoder diverged, or a feature is missing: mend it there, the probe drops no rows"
        )
    if np.ptp(x, axis=0).max() <= 1e-6 * np.abs(x).max():  # equal but for rounding in float32
        raise ConstantEmbedding(
            f"embeddings: all {len(x)} rows are the same (first values {x[0, :3]}); the encoder collapsed"
        )


def _check_task(task: Task, fold: Ints, folds: Iterable[int]) -> None:
    for k in folds:
        inside = task.labels[fold == k]
        if len(np.unique(inside)) < 2:
            what = f"all {len(inside)} labels are {inside[0]}" if len(inside) else "it has no rows"
            raise SingleClassFold(
                f"task {task.name!r}, fold {k}: {what}, so its AUC doesn't exist; "
                "use more households or fewer folds"
            )


def make_task(
    name: str, rows: ArrayLike, labels: ArrayLike, groups: ArrayLike, households: Households
) -> Task:
    """A checked ``Task``: one label (0 or 1) and one group for each of ``rows``."""
    rows, values, household = np.asarray(rows, dtype=np.int64), np.asarray(labels), households.index(groups)
    if not values.shape == rows.shape == household.shape:
        raise EvaluationError(
            f"task {name!r}: {values.shape} labels and {household.shape} groups for {rows.shape} rows; "
            "give one of each a row"
        )
    if not (binary := np.isin(values, (0, 1))).all():
        wrong = int(np.flatnonzero(~binary)[0])
        raise EvaluationError(
            f"task {name!r}: label {values[wrong]} in row {wrong}; labels are 0 or 1, drop nulls first"
        )
    return Task(name, rows, values.astype(np.int64), household)


def linear_probe(
    embeddings: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    *,
    folds: int = 5,
    seed: int = 0,
    bootstrap: int = 1000,
    households: Households | None = None,
) -> ProbeResult:
    """Logistic regression on frozen ``embeddings`` Float[n, d]: AUC, interval and out-of-fold scores.

    ``labels`` [n] are 0 or 1; ``groups`` [n] are household ids, never in two folds. To compare several tasks
    or rows, build ``households`` once from all users: it then replaces ``folds``, ``seed`` and ``bootstrap``.
    Raises ``SingleClassFold``, ``MissingValue``, ``ConstantEmbedding`` or ``NotConverged``.
    """
    households = households or Households.of(groups, folds=folds, seed=seed, bootstrap=bootstrap)
    x = np.asarray(embeddings)
    task = make_task("labels", np.arange(len(x)), labels, groups, households)
    return probe_tasks(x, [task], households)[0]


def paired_difference(
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike,
    *,
    folds: int = 5,
    seed: int = 0,
    bootstrap: int = 1000,
    households: Households | None = None,
) -> Difference:
    """AUC of out-of-fold ``scores_a`` [n] minus that of ``scores_b`` [n], under the same resamples.

    Raises ``EvaluationError``, also as ``MissingValue`` or ``SingleClassFold``.
    """
    households = households or Households.of(groups, folds=folds, seed=seed, bootstrap=bootstrap)
    a, b = np.asarray(scores_a, dtype=np.float64), np.asarray(scores_b, dtype=np.float64)
    if a.shape != b.shape:
        raise EvaluationError(
            f"scores_b: {b.shape} scores beside {a.shape} of scores_a; give one of each a row"
        )
    task = make_task("difference", np.arange(len(a)), labels, groups, households)
    for name, scores in (("scores_a", a), ("scores_b", b)):
        if not (finite := np.isfinite(scores)).all():
            raise MissingValue(f"{name}: {scores[~finite][0]} in row {int(np.flatnonzero(~finite)[0])}")
    fold, weights = households.fold[task.household], households.weights[task.household]
    _check_task(task, fold, range(int(fold.max()) + 1))
    point = mean_fold_auc(a, task.labels, fold) - mean_fold_auc(b, task.labels, fold)
    draws = mean_fold_auc(a, task.labels, fold, weights) - mean_fold_auc(b, task.labels, fold, weights)
    return Difference.of(float(point[0]), draws)


# --- the stage ----------------------------------------------------------------------------------------

AUC_COLUMNS = {
    "recipe": pl.String,
    "seed": pl.Int64,
    "task": pl.String,
    "auc": pl.Float64,
    "ci_low": pl.Float64,
    "ci_high": pl.Float64,
    "n": pl.Int64,
}
SCORE_COLUMNS = ("sample", "task", "score", "label", "fold")


def marked(table: pl.DataFrame, samples: pl.DataFrame) -> pl.DataFrame:
    """``table`` with a column ``simulated`` if its ``samples`` have one: made-up events touch its numbers."""
    return table.with_columns(simulated=pl.lit(True)) if "simulated" in samples.columns else table


def households_of(windows: Path, evaluation: Any) -> Households:
    """The households of a windows run, probed or not: every row and task shares their folds and resamples."""
    users = pl.read_parquet(windows / "samples.parquet", columns=["user"])["user"]
    return Households.of(users, folds=evaluation.folds, seed=evaluation.seed, bootstrap=evaluation.bootstrap)


def evaluate(
    features: ArrayLike,
    samples: ArrayLike,
    windows: Path,
    out: Path,
    *,
    recipe: str,
    seed: int,
    evaluation: Any,
    progress: Progress,
    probe: Probe = PROBES["linear"],
) -> None:
    """Probe ``features`` Float[N, d] of ``samples`` Int[N] on all tasks.

    Writes auc.csv, labels.csv (``with_fewer_labels``) and scores.parquet. ``samples`` must be exactly the
    probe split of ``windows``: all rows of a table are about the same users. The tables have a column
    ``simulated`` where the simulator filled a modality, and only there.
    """
    split = pl.read_parquet(windows / "samples.parquet").filter(pl.col("split") == "probe").sort("sample")
    order = np.argsort(samples)
    ids = np.asarray(samples)[order]
    if not np.array_equal(ids, split["sample"].to_numpy()):
        raise EvaluationError(
            f"samples: {len(ids)} embedded, {len(split)} in the probe split of {windows.name}, and they must "
            "be the same; embed again from these windows"
        )
    households = households_of(windows, evaluation)
    labels = pl.read_parquet(windows / "labels.parquet")
    table = split.select("sample", "user").join(labels, on="sample", how="left", maintain_order="left")
    tasks = []
    for name in labels.columns[1:]:
        known = table.with_row_index("row").drop_nulls(name)
        tasks.append(make_task(name, known["row"], known[name], known["user"], households))
    x = np.asarray(features)[order]
    results = probe_tasks(x, tasks, households, probe=probe, jobs=joblib.cpu_count(), progress=progress)
    auc, scores = [], []
    for task, r in zip(tasks, results, strict=True):
        auc.append((recipe, seed, task.name, r.auc, r.ci_low, r.ci_high, r.n))
        columns = {"sample": ids[task.rows], "score": r.scores, "label": task.labels, "fold": r.fold}
        scores.append(pl.DataFrame(columns).with_columns(task=pl.lit(task.name)))
    aucs = pl.DataFrame(auc, schema=AUC_COLUMNS, orient="row")
    marked(aucs, split).write_csv(out / "auc.csv", float_precision=6)
    fewer = with_fewer_labels(x, tasks, results, households, probe=probe)
    fewer = fewer.select(pl.lit(recipe).alias("recipe"), pl.lit(seed, pl.Int64).alias("seed"), pl.all())
    marked(fewer, split).write_csv(out / "labels.csv", float_precision=6)
    marked(pl.concat(scores).select(SCORE_COLUMNS), split).write_parquet(out / "scores.parquet")


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``probe``: linear probes on the tasks of run ``windows``, of the other input's embeddings."""
    (folder,) = (path for name, path in inputs.items() if name != "windows")
    stored = load_file(folder / "embeddings.safetensors")
    evaluate(
        stored["embeddings"],
        stored["sample"],
        inputs["windows"],
        out,
        recipe=params.recipe,
        seed=params.seed,
        evaluation=params.evaluation,
        progress=progress,
    )
