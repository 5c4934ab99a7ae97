"""All rows of the result table side by side, with paired differences (Table 2).

T tasks, R bootstrap resamples, S training seeds of a recipe.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ggsm_core.data.tasks import DOMAINS, TASKS
from ggsm_core.evaluation import AUC_COLUMNS, households_of, marked
from ggsm_core.intervals import Difference, EvaluationError, Floats, Households, interval, mean_fold_auc
from ggsm_core.progress import Progress

REFERENCES = ("bidirectional", "causal", "handmade")  # the two plain masks, and what a user has without us
NONE_SHOWN = "no difference shown"
MEAN = "mean"  # the pseudo-task: plain average of the AUC over all tasks
LEVEL = 0.05
LABEL_COLUMNS = {
    "recipe": pl.String,
    "seed": pl.Int64,
    "task": pl.String,
    "share": pl.Float64,
    "auc": pl.Float64,
    "households": pl.Float64,
}


def holm(p: Sequence[float]) -> Floats:
    """Holm's adjusted p-values of one family [m], in the given order; valid whatever the dependence."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(steps).clip(max=1.0)
    return adjusted


def over_seeds(draws: Floats, weights: Floats) -> Floats:
    """Bootstrap draws [T, R] of the mean over S training seeds, from draws [S, T, R] and seed weights [S, R].

    Weighting S values at random spreads their mean by (S - 1) / (S + 1) of the variance that a mean of S
    independent runs has; the deviations are scaled up by that much, since S is 3 and not 300. One seed says
    nothing about the spread over seeds, and its interval is over households alone.
    """
    seeds = len(draws)
    centre: Floats = draws.mean(axis=0)
    if seeds == 1:
        return centre
    drawn = np.einsum("sr,str->tr", weights / weights.sum(axis=0), draws)
    return centre + np.sqrt((seeds + 1) / (seeds - 1)) * (drawn - centre)


def with_mean(per_task: Floats) -> Floats:
    """[T, ...] -> [T + 1, ...]: the mean over tasks appended."""
    return np.concatenate([per_task, per_task.mean(axis=0, keepdims=True)])


@dataclass(frozen=True, slots=True)
class Row:
    """One run of the table; the last entry of ``points`` and ``draws`` is the mean over tasks."""

    recipe: str
    seed: int
    table: pl.DataFrame  # AUC_COLUMNS: the run's own, and the mean
    asked: pl.DataFrame  # task, sample, label: what was scored
    points: Floats  # [T + 1]
    draws: Floats  # [T + 1, R]

    @classmethod
    def read(cls, name: str, folder: Path, users: pl.DataFrame, households: Households) -> Row:
        """The run ``<kind>:<recipe>[:<seed>]`` in ``folder``, its AUC resampled from its scores."""
        _, recipe, *rest = name.split(":")
        seed = int(rest[0]) if rest else 0
        table = pl.read_csv(folder / "auc.csv", schema_overrides=AUC_COLUMNS).select(*AUC_COLUMNS)
        table = table.with_columns(recipe=pl.lit(recipe), seed=pl.lit(seed, pl.Int64))
        scores = pl.read_parquet(folder / "scores.parquet").sort("task", "sample")
        scored = scores.join(users, on="sample", how="left", maintain_order="left")
        per_task, per_draw = [], []
        for task in table["task"]:
            part = scored.filter(pl.col("task") == task)
            household = households.index(part["user"])
            fold = households.fold[household]
            if not np.array_equal(fold, part["fold"].to_numpy()):
                raise EvaluationError(
                    f"{name}, task {task!r}: scored on other folds than evaluation.folds and evaluation.seed "
                    "give; probe it again"
                )
            score, label = part["score"].to_numpy(), part["label"].to_numpy()
            per_task.append(mean_fold_auc(score, label, fold)[0])
            per_draw.append(mean_fold_auc(score, label, fold, households.weights[household]))
        points, draws = with_mean(np.array(per_task)), with_mean(np.array(per_draw))
        mean = (recipe, seed, MEAN, float(points[-1]), *interval(draws[-1]), scores["sample"].n_unique())
        table = table.vstack(pl.DataFrame([mean], schema=AUC_COLUMNS, orient="row"))
        return cls(recipe, seed, table, scores.select("task", "sample", "label"), points, draws)


def differences(points: dict[str, Floats], draws: dict[str, Floats], tasks: list[str]) -> pl.DataFrame:
    """Every row against each of ``REFERENCES`` that takes part, on every task: columns as in ``run``.

    ``points`` holds an AUC [T + 1] for each row, ``draws`` the [T + 1, R] made under shared resamples.
    """
    families: dict[tuple[str, bool], list[tuple[Any, ...]]] = defaultdict(list)
    for reference in (name for name in REFERENCES if name in points):
        for row in (name for name in points if name != reference):
            gaps = zip(tasks, points[row] - points[reference], draws[row] - draws[reference], strict=True)
            for task, point, drawn in gaps:
                gap = Difference.of(float(point), drawn)
                families[reference, task == MEAN].append((row, reference, task, *astuple(gap)))
    columns = ("row", "reference", "task", "difference", "ci_low", "ci_high", "p")
    schema = dict(zip(columns, (*[pl.String] * 3, *[pl.Float64] * 4), strict=True))
    tables = [corrected(pl.DataFrame(lines, schema=schema, orient="row")) for lines in families.values()]
    return pl.concat(tables or [corrected(pl.DataFrame(schema=schema))]).drop("p")


def corrected(gaps: pl.DataFrame) -> pl.DataFrame:
    """``gaps`` with ``p_holm`` and ``verdict``, all its lines one family whatever they were before."""
    adjusted = pl.Series("p_holm", holm(gaps["p"].to_list()), dtype=pl.Float64)
    return gaps.with_columns(adjusted).with_columns(
        verdict=pl.when(pl.col("p_holm") >= LEVEL)
        .then(pl.lit(NONE_SHOWN))
        .when(pl.col("difference") > 0)
        .then(pl.lit("better"))
        .otherwise(pl.lit("worse"))
    )


def with_domains(per_task: Floats, tasks: list[str]) -> dict[str, Floats]:
    """[T + 1, ...] -> task or mean -> [...], and domain -> the plain average of its tasks."""
    found = dict(zip(tasks, per_task, strict=True))
    for domain in DOMAINS:
        members = [found[task.name] for task in TASKS if task.domain == domain and task.name in found]
        if members:
            found[domain] = np.mean(members, axis=0)
    return found


def averages(
    points: dict[str, Floats], draws: dict[str, Floats], tasks: list[str], seeds: dict[str, int]
) -> pl.DataFrame:
    """Each row's mean over its seeds on every task, domain and the mean, with its interval over both."""
    table = [
        (row, seeds[row], task, float(point), *interval(drawn))
        for row in points
        for (task, point), drawn in zip(
            with_domains(points[row], tasks).items(), with_domains(draws[row], tasks).values(), strict=True
        )
    ]
    types = (pl.String, pl.Int64, pl.String, *[pl.Float64] * 3)
    columns = ("recipe", "seeds", "task", "auc", "ci_low", "ci_high")
    return pl.DataFrame(table, schema=dict(zip(columns, types, strict=True)), orient="row")


def covariances(draws: dict[str, Floats], tasks: list[str]) -> pl.DataFrame:
    """How the rows' averages vary together over households and seeds: task, row, other, covariance.

    One line for each unordered pair, a row and itself included. With the averages it gives the standard error
    of any paired difference, also of two rows of which neither is a reference.
    """
    names = list(draws)
    pairs = [(i, j) for i in range(len(names)) for j in range(i, len(names))]
    split = [with_domains(draws[name], tasks) for name in names]
    table = []
    for task in split[0]:
        together = np.atleast_2d(np.cov([one[task] for one in split]))
        table += [(task, names[i], names[j], float(together[i, j])) for i, j in pairs]
    types = (*[pl.String] * 3, pl.Float64)
    columns = ("task", "row", "other", "covariance")
    return pl.DataFrame(table, schema=dict(zip(columns, types, strict=True)), orient="row")


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``compare``: ``windows``; rows ``probe:<row>:<seed>``, ``joined:..`` and ``baseline:<row>``.

    Writes auc.csv, the rows' own tables and the pseudo-task ``mean``, whose interval resamples the same
    households in all tasks at once; and differences.csv, each row (mean over its seeds) against each of
    ``REFERENCES`` that takes part; and labels.csv, the AUC from fewer labels. Intervals of differences are
    plain 95 % ones, over households and over seeds where there are several (the same seed is one draw in
    both rows: it shares data order and pre-trained decoder).
    The verdict stands after Holm's correction (``p_holm`` < 0.05) in two families for each reference: the
    mean over all rows, which is the claim; and all single tasks of all rows. An interval can leave out 0
    where the verdict is "no difference shown": one of many comparisons does so by chance. rows.csv has the
    averages over seeds, covariance.csv what any other paired difference needs.
    """
    evaluation = params.evaluation
    folders = {name: folder for name, folder in inputs.items() if name != "windows"}
    households = households_of(inputs["windows"], evaluation)
    samples = pl.read_parquet(inputs["windows"] / "samples.parquet")
    users = samples.select("sample", "user")
    rows: list[Row] = []
    for done, (name, folder) in enumerate(folders.items()):
        progress(done, len(folders), f"{name}: resampling households")
        rows.append(Row.read(name, folder, users, households))
        if not rows[-1].asked.equals(rows[0].asked):
            raise EvaluationError(
                f"{name} and {next(iter(folders))} were scored on other samples or labels; probe both again"
            )
    seeds = sorted({row.seed for row in rows})
    rng = np.random.default_rng([evaluation.seed, 1])
    weight = dict(zip(seeds, rng.standard_exponential((len(seeds), evaluation.bootstrap)), strict=True))
    runs: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        runs[row.recipe].append(row)
    points = {name: np.mean([row.points for row in group], axis=0) for name, group in runs.items()}
    draws = {
        name: over_seeds(
            np.array([row.draws for row in group]), np.array([weight[row.seed] for row in group])
        )
        for name, group in runs.items()
    }
    tasks = rows[0].table["task"].to_list()
    tables = {
        "auc": pl.concat(row.table for row in rows),
        "rows": averages(points, draws, tasks, {name: len(group) for name, group in runs.items()}),
        "differences": differences(points, draws, tasks),
    }
    for name, table in tables.items():
        marked(table, samples).write_csv(out / f"{name}.csv", float_precision=6)
    together = marked(covariances(draws, tasks), samples)
    together.write_csv(out / "covariance.csv", float_scientific=True, float_precision=5)
    fewer = pl.concat(_labels(name, folder) for name, folder in folders.items())
    marked(fewer, samples).write_csv(out / "labels.csv", float_precision=6)
    progress(len(folders), len(folders), "differences")


def _labels(name: str, folder: Path) -> pl.DataFrame:
    """A row's table of ``evaluation.with_fewer_labels``, under its name here."""
    _, recipe, *rest = name.split(":")
    table = pl.read_csv(folder / "labels.csv", schema_overrides=LABEL_COLUMNS).select(*LABEL_COLUMNS)
    return table.with_columns(recipe=pl.lit(recipe), seed=pl.lit(int(rest[0]) if rest else 0, pl.Int64))
