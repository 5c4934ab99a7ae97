"""Folds, AUC, intervals and the two probes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from ggsm_core import evaluation, intervals
from ggsm_core.evaluation import PROBES, linear_probe, paired_difference
from ggsm_core.intervals import Households, mean_fold_auc, weighted_auc
from ggsm_core.sections import Evaluation

FAST = {"bootstrap": 100}


def planted(users: int = 150, rows: int = 4, d: int = 6, strength: float = 1.0):
    """Embeddings [n, d], labels [n], groups [n]: a signal in dimension 0, elsewhere who it is."""
    rng = np.random.default_rng(0)
    groups = np.repeat([f"u{k}" for k in range(users)], rows)
    x = np.repeat(rng.normal(size=(users, d)), rows, axis=0) + 0.1 * rng.normal(size=(users * rows, d))
    labels = (strength * x[:, 0] + rng.logistic(size=len(x)) > 0.3).astype(int)
    return x, labels, groups


# --- folds --------------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 10**6), min_size=5, max_size=60), st.integers(0, 99), st.integers(3, 5))
@settings(deadline=None, max_examples=40)
def test_folds_are_balanced_and_depend_on_ids_and_seed_alone(ids: set[int], seed: int, folds: int) -> None:
    rows = np.array([*ids, *ids])
    shuffled = np.random.default_rng(seed).permutation(rows)
    a = Households.of(rows, folds=folds, seed=seed, bootstrap=2)
    b = Households.of(shuffled, folds=folds, seed=seed, bootstrap=2)
    assert np.array_equal(a.ids, b.ids) and np.array_equal(a.fold, b.fold)
    assert np.array_equal(a.weights, b.weights)
    sizes = np.bincount(a.fold, minlength=folds)
    assert sizes.max() - sizes.min() <= 1


def test_another_seed_deals_other_folds() -> None:
    folds = [Households.of(range(100), seed=seed, bootstrap=2).fold for seed in (0, 1)]
    assert not np.array_equal(*folds)


def test_a_household_is_in_one_fold_for_every_row_and_task() -> None:
    x, labels, groups = planted()
    households = Households.of(groups, **FAST)
    some = np.flatnonzero(np.random.default_rng(1).random(len(x)) < 0.4)
    every = linear_probe(x, labels, groups, households=households)
    part = linear_probe(x[some], labels[some], groups[some], households=households)
    fold_of = dict(zip(groups, every.fold, strict=True))
    assert [fold_of[g] for g in groups] == every.fold.tolist()
    assert [fold_of[g] for g in groups[some]] == part.fold.tolist()


def test_households_kept_together_is_what_keeps_fingerprints_from_scoring() -> None:
    """Labels that a user's rows share, and embeddings that only say who the user is: nothing to generalise.

    Negative control: the same probe with rows instead of households in the folds finds the user again.
    """
    rng = np.random.default_rng(3)
    x = np.repeat(rng.normal(size=(90, 40)), 6, axis=0)
    labels = np.repeat(rng.integers(0, 2, 90), 6)
    groups = np.repeat(np.arange(90), 6)
    assert abs(linear_probe(x, labels, groups, **FAST).auc - 0.5) < 0.12
    assert linear_probe(x, labels, np.arange(len(x)), **FAST).auc > 0.8


# --- AUC and its resamples ----------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(2, 60), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_weighted_auc_is_that_of_a_plain_loop_and_of_scikit_learn(seed: int, n: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, n).astype(float)  # many ties
    labels = np.concatenate([[0, 1], rng.integers(0, 2, n - 2)])
    weights = rng.standard_exponential((n, 3))
    got = weighted_auc(scores, labels, weights)
    for r, w in enumerate(weights.T):
        won = total = 0.0
        for i in np.flatnonzero(labels == 1):
            for j in np.flatnonzero(labels == 0):
                total += w[i] * w[j]
                won += w[i] * w[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
        assert got[r] == pytest.approx(won / total, abs=1e-12)
        assert got[r] == pytest.approx(roc_auc_score(labels, scores, sample_weight=w), abs=1e-12)


def test_weights_of_a_household_count_as_repeating_its_rows() -> None:
    rng = np.random.default_rng(0)
    scores, labels, fold = rng.normal(size=60), np.tile([0, 1], 30), np.repeat([0, 1, 2], 20)
    times = rng.integers(1, 4, 60)
    repeated = [np.repeat(each, times) for each in (scores, labels, fold)]
    weighted = mean_fold_auc(scores, labels, fold, times[:, None].astype(float))
    assert weighted == pytest.approx(mean_fold_auc(*repeated), abs=1e-12)


def test_folds_on_other_scales_do_not_matter() -> None:
    """Why the mean over folds and not a pooled AUC: the scores of two folds come from two models."""
    rng = np.random.default_rng(0)
    labels, fold = np.tile([0, 1], 100), np.repeat([0, 1], 100)
    scores = labels + rng.normal(size=200)
    moved = np.where(fold == 0, scores, 50 + 9 * scores)
    assert mean_fold_auc(moved, labels, fold) == pytest.approx(mean_fold_auc(scores, labels, fold), abs=1e-12)
    assert abs(roc_auc_score(labels, moved) - roc_auc_score(labels, scores)) > 0.05


def test_interval_is_over_households_not_over_rows() -> None:
    """Copies of a household's rows are no news: the interval stays as it was. Rows as groups halve it."""
    rng = np.random.default_rng(0)
    n, copies = 300, 4
    labels, scores = rng.integers(0, 2, n), rng.normal(size=n)
    scores += labels
    widths = []
    for ids in (np.repeat(np.arange(n), copies), np.arange(n * copies)):
        households = Households.of(ids, bootstrap=500)
        weights = households.weights[households.index(ids)]
        draws = weighted_auc(np.repeat(scores, copies), np.repeat(labels, copies), weights)
        widths.append(np.diff(intervals.interval(draws))[0])
    single = Households.of(np.arange(n), bootstrap=500)
    alone = np.diff(intervals.interval(weighted_auc(scores, labels, single.weights)))[0]
    assert widths[0] == pytest.approx(alone, rel=0.25)
    assert widths[1] == pytest.approx(alone / 2, rel=0.25)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """AUC of two unit normals a distance apart is known: 0.5 + 0.26 at distance 1."""
    truth, hits = 0.760250, 0
    for seed in range(200):
        rng = np.random.default_rng([seed, 1])
        labels = np.tile([0, 1], 60)
        scores = rng.normal(size=120) + labels
        weights = Households.of(np.arange(120), bootstrap=300, seed=seed).weights
        low, high = intervals.interval(weighted_auc(scores, labels, weights))
        hits += low <= truth <= high
    assert 0.90 <= hits / 200 <= 0.99


# --- the probes ---------------------------------------------------------------------------------------


def test_linear_probe_finds_a_planted_signal_and_nothing_in_noise() -> None:
    x, labels, groups = planted()
    found = linear_probe(x, labels, groups, **FAST)
    assert found.n == len(x) and found.scores.shape == (len(x),)
    assert found.ci_low < found.auc < found.ci_high
    assert found.auc > 0.65
    noise = linear_probe(x[:, 1:], labels, groups, **FAST)
    assert noise.ci_low < 0.53


def test_out_of_fold_scores_are_those_of_scikit_learn_without_the_fold() -> None:
    x, labels, groups = planted()
    result = linear_probe(x, labels, groups, **FAST)
    for k, strength in enumerate(result.settings):
        out = result.fold == k
        mean, std = x[~out].mean(0), x[~out].std(0)
        model = LogisticRegression(C=strength, tol=1e-8, max_iter=1000)
        model.fit((x[~out] - mean) / std, labels[~out])
        assert np.allclose(result.scores[out], model.decision_function((x[out] - mean) / std), atol=1e-3)
    assert result.auc == pytest.approx(
        np.mean([roc_auc_score(labels[result.fold == k], result.scores[result.fold == k]) for k in range(5)])
    )


def test_nothing_of_the_scored_fold_reaches_its_scores() -> None:
    """Scores of fold k stay bit for bit when its labels are turned over and a row is moved away: neither
    standardisation nor choice of C has seen it. Negative control: these labels do reach the other folds."""
    x, labels, groups = planted(strength=0.5)
    before = linear_probe(x, labels, groups, **FAST)
    for k in range(5):
        out = before.fold == k
        turned = np.where(out, 1 - labels, labels)
        after = linear_probe(x, turned, groups, **FAST)
        assert after.settings[k] == before.settings[k]
        assert np.array_equal(after.scores[out], before.scores[out])
        assert not np.array_equal(after.scores[~out], before.scores[~out])
        last = np.flatnonzero(out)[-1]
        moved = x.copy()
        moved[last] += 1000
        after = linear_probe(moved, labels, groups, **FAST)
        rest = out & (np.arange(len(x)) != last)
        assert np.array_equal(after.scores[rest], before.scores[rest])


def test_choosing_on_the_scored_fold_would_flatter_noise() -> None:
    """What the nested folds prevent: of many settings that are all noise, the best on the scored fold looks
    better than chance, the one chosen inside the training folds doesn't."""

    def noise(x, y, held, settings):
        return np.random.default_rng(len(held)).normal(size=(60, len(held)))[[int(s) for s in settings]]

    probe = evaluation.Probe(noise, tuple(float(s) for s in range(60)))
    x, labels, groups = planted(users=100, rows=1)
    labels = np.random.default_rng(5).permutation(labels)
    households = Households.of(groups, **FAST)
    task = evaluation.make_task("noise", np.arange(len(x)), labels, groups, households)
    honest = evaluation.probe_tasks(x, [task], households, probe=probe)[0].auc
    fold = households.fold[task.household]
    flattered = np.mean(
        [
            max(roc_auc_score(labels[fold == k], s) for s in noise(None, None, x[fold == k], probe.grid))
            for k in range(5)
        ]
    )
    assert flattered > 0.7
    assert honest < flattered - 0.1


def test_the_choice_finds_the_setting_that_generalises() -> None:
    """Setting k scores by column k; only column 3 knows anything, so every fold must choose it."""

    def column(x, y, held, settings):
        return held.T[[int(s) for s in settings]]

    probe = evaluation.Probe(column, (0.0, 1.0, 2.0, 3.0))
    x, labels, groups = planted(strength=3.0)
    households = Households.of(groups, **FAST)
    task = evaluation.make_task("column", np.arange(len(x)), labels, groups, households)
    result = evaluation.probe_tasks(x[:, [2, 4, 1, 0]], [task], households, probe=probe)[0]
    assert result.settings == (3.0,) * 5


def test_row_order_and_processes_change_nothing() -> None:
    x, labels, groups = planted(users=60)
    households = Households.of(groups, **FAST)
    tasks = [
        evaluation.make_task(name, rows, labels[rows], groups[rows], households)
        for name, rows in (("all", np.arange(len(x))), ("half", np.arange(0, len(x), 2)))
    ]
    seen: list[tuple[int, int]] = []
    one = evaluation.probe_tasks(x, tasks, households, progress=lambda *said: seen.append(said[:2]))
    two = evaluation.probe_tasks(x, tasks, households, jobs=2)
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.scores, b.scores) and (a.auc, a.ci_low) == (b.auc, b.ci_low)
    assert seen == [(k, 20) for k in range(1, 21)]
    order = np.random.default_rng(0).permutation(len(x))
    shuffled = linear_probe(x[order], labels[order], groups[order], households=households)
    assert shuffled.auc == pytest.approx(one[0].auc, abs=1e-4)


def test_boosted_probe_sees_what_a_line_cannot() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), 3)
    x = rng.normal(size=(600, 4))
    labels = (x[:, 0] * x[:, 1] > 0).astype(int)
    households = Households.of(groups, **FAST)
    task, kind = evaluation.make_task("both", np.arange(600), labels, groups, households), PROBES["boosted"]
    boosted, again = (evaluation.probe_tasks(x, [task], households, probe=kind)[0] for _ in range(2))
    assert boosted.auc > 0.85
    assert linear_probe(x, labels, groups, **FAST).auc < 0.6
    assert np.array_equal(boosted.scores, again.scores)
    assert set(boosted.settings) <= set(kind.grid)


def test_a_setting_read_out_on_the_way_is_the_model_fitted_to_it() -> None:
    x, labels, _ = planted(users=80)
    path = evaluation.boosted_scores(x[:200], labels[:200], x[200:], (15, 30, 60))
    assert np.array_equal(path[1], evaluation.boosted_scores(x[:200], labels[:200], x[200:], (30,))[0])


# --- paired differences -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda a, b, y: (a, np.where(np.arange(len(b)) == 7, np.nan, b), y),
            "MissingValue",
            "scores_b: nan in row 7",
        ),
        (lambda a, b, y: (a, b[:-1], y), "EvaluationError", "scores_b"),
        (lambda a, b, y: (a, b, 0 * y), "SingleClassFold", "all"),
        (lambda a, b, y: (a, b, y[:-1]), "EvaluationError", "labels"),
    ],
)
def test_a_paired_difference_of_what_has_none_is_refused(change: Any, error: str, words: str) -> None:
    rng = np.random.default_rng(0)
    a, b, y = change(rng.normal(size=60), rng.normal(size=60), np.arange(60) % 2)
    with pytest.raises(getattr(evaluation, error), match=words):
        paired_difference(a, b, y, np.arange(60) // 2, bootstrap=100)


def test_paired_difference_is_narrow_where_two_rows_make_the_same_errors() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 600)
    groups = np.arange(600)
    a = labels + 1.5 * rng.normal(size=600)
    b = a + 0.05 * rng.normal(size=600)
    other = labels + 1.5 * rng.normal(size=600)
    near, far = paired_difference(a, b, labels, groups), paired_difference(a, other, labels, groups)
    assert near.ci_high - near.ci_low < 0.2 * (far.ci_high - far.ci_low)
    same = paired_difference(a, a, labels, groups)
    assert (same.difference, same.ci_low, same.ci_high, same.p) == (0.0, 0.0, 0.0, 1.0)
    back = paired_difference(b, a, labels, groups)
    assert back.difference == -near.difference and back.p == near.p
    assert paired_difference(labels + 0.3 * a, a, labels, groups).p < 1e-4


def test_p_is_two_sided() -> None:
    """An interval that just touches 0 has p = 0.05."""
    draws = np.random.default_rng(0).normal(size=50_000)
    for sign in (1, -1):
        edge = sign * 1.959964 * float(draws.std(ddof=1))
        assert intervals.Difference.of(edge, draws + edge).p == pytest.approx(0.05, abs=1e-4)


# --- errors -------------------------------------------------------------------------------------------


def test_errors_name_what_and_where() -> None:
    x, labels, groups = planted(users=40)
    broken = x.copy()
    broken[17, 3] = np.nan
    with pytest.raises(evaluation.MissingValue, match="nan in row 17, dimension 3"):
        linear_probe(broken, labels, groups)
    with pytest.raises(evaluation.ConstantEmbedding, match="160 rows are the same"):
        linear_probe(np.full_like(x, 0.1) + 1e-9 * x, labels, groups)
    households = Households.of(groups, **FAST)
    fold = households.fold[households.index(groups)]
    with pytest.raises(evaluation.SingleClassFold, match="task 'labels', fold 2: all 32 labels are 0"):
        linear_probe(x, np.where(fold == 2, 0, labels), groups)
    with pytest.raises(evaluation.SingleClassFold, match="fold 1: it has no rows"):
        linear_probe(x[fold != 1], labels[fold != 1], groups[fold != 1], households=households)
    with pytest.raises(intervals.EvaluationError, match="label 3 in row 0"):
        linear_probe(x, labels + 2, groups)
    with pytest.raises(intervals.EvaluationError, match=r"\(159,\) labels"):
        linear_probe(x, labels[1:], groups)
    with pytest.raises(intervals.EvaluationError, match="'stranger' is not among the 40 households"):
        linear_probe(x, labels, np.where(groups == "u0", "stranger", groups), households=households)
    with pytest.raises(intervals.EvaluationError, match="folds: 2"):
        linear_probe(x, labels, groups, folds=2)
    with pytest.raises(intervals.EvaluationError, match="3 households can't fill 5 folds"):
        Households.of(["a", "b", "c"])
    assert issubclass(intervals.EvaluationError, ValueError)


def test_a_solver_that_stops_early_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def hurried(**options):
        return LogisticRegression(**{**options, "max_iter": 1, "tol": 1e-12})

    monkeypatch.setattr(evaluation, "LogisticRegression", hurried)
    with pytest.raises(
        evaluation.NotConverged, match=r"task 'labels', held-out fold\(s\) \[0, 1\]: C = 0.0001"
    ):
        linear_probe(*planted())


def test_a_feature_that_only_the_held_out_rows_vary_in_is_left_out() -> None:
    train, held = np.full((50, 2), 0.1), np.full((5, 2), 7.0)
    train[:, 0] = np.arange(50)
    x, y = evaluation.standardise(train, held)
    assert np.all(x[:, 1] == 0) and np.all(y[:, 1] == 0)


# --- the stage ----------------------------------------------------------------------------------------


@pytest.fixture
def windows(tmp_path: Path) -> Path:
    """A windows run of 80 users with 3 probe samples each (and a train sample), two tasks."""
    rng = np.random.default_rng(0)
    split = ["train", "probe", "probe", "probe"]
    samples = pl.DataFrame(
        {
            "sample": np.arange(320),
            "user": np.repeat([f"u{k:02d}" for k in range(80)], 4),
            "anchor": np.tile([90, 240, 270, 300], 80),
            "split": split * 80,
        }
    )
    a, b = rng.integers(0, 2, 320), rng.integers(0, 2, 320).astype(object)
    b[::5] = None
    folder = tmp_path / "windows"
    folder.mkdir()
    samples.write_parquet(folder / "samples.parquet")
    labels = pl.DataFrame({"sample": np.arange(320), "a": a, "b": list(b)}, schema_overrides={"b": pl.Int8})
    labels.write_parquet(folder / "labels.parquet")
    return folder


def test_stage_writes_one_row_a_task_and_the_scores_behind_it(windows: Path, tmp_path: Path) -> None:
    probed = np.array([k for k in range(320) if k % 4])
    order = np.random.default_rng(0).permutation(len(probed))
    labels = pl.read_parquet(windows / "labels.parquet")
    x = np.random.default_rng(1).normal(size=(320, 3))
    x[:, 0] += 2 * labels["a"].to_numpy()
    embed = tmp_path / "embed"
    embed.mkdir()
    save_file(
        {"embeddings": x[probed[order]].astype(np.float32), "sample": probed[order]},
        embed / "embeddings.safetensors",
    )
    params = SimpleNamespace(recipe="ggsm", seed=3, evaluation=Evaluation(bootstrap=100))
    evaluation.run(params, {"embed": embed, "windows": windows}, tmp_path, lambda *_: None)
    table = pl.read_csv(tmp_path / "auc.csv")
    assert table.columns == ["recipe", "seed", "task", "auc", "ci_low", "ci_high", "n"]
    assert table.select("recipe", "seed", "task", "n").rows() == [
        ("ggsm", 3, "a", 240),
        ("ggsm", 3, "b", int(labels["b"].gather(probed.tolist()).is_not_null().sum())),
    ]
    assert table["auc"][0] > 0.85  # a row in the wrong order would be near 0.5
    scores = pl.read_parquet(tmp_path / "scores.parquet")
    assert scores.columns == ["sample", "task", "score", "label", "fold"]
    part = scores.filter(pl.col("task") == "a")
    assert part["sample"].to_list() == probed.tolist()
    assert part["label"].to_list() == labels["a"].gather(probed.tolist()).to_list()

    save_file({"embeddings": x[probed[1:]], "sample": probed[1:]}, embed / "embeddings.safetensors")
    with pytest.raises(intervals.EvaluationError, match="239 embedded, 240 in the probe split"):
        evaluation.run(params, {"embed": embed, "windows": windows}, tmp_path, lambda *_: None)


def test_fewer_labels_are_those_of_nested_households_and_of_both_classes() -> None:
    x, labels, groups = planted(users=200)
    households = Households.of(groups, **FAST)
    task = evaluation.make_task("t", np.arange(len(x)), labels, groups, households)
    rare = evaluation.make_task("rare", np.arange(len(x)), (x[:, 0] > 1.6).astype(int), groups, households)
    results = evaluation.probe_tasks(x, [task, rare], households)
    table = evaluation.with_fewer_labels(x, [task, rare], results, households, shares=(0.02, 0.2))
    of_task, of_rare = (table.filter(task=name) for name in ("t", "rare"))
    assert of_task["share"].to_list() == [0.02, 0.2, 1.0]
    assert of_task["auc"][2] == results[0].auc and of_task["auc"][0] < of_task["auc"][2]
    assert of_task["households"].to_list()[1:] == [32.0, 160.0]
    # 3 of 160 households hardly ever have a rare label: further ones are taken until there is one.
    assert of_rare["households"][0] > of_task["households"][0] >= 3
    # Negative control: households drawn for labels alone know nothing of noise.
    noise = np.random.default_rng(5).normal(size=x.shape)
    blind = evaluation.probe_tasks(noise, [task], households)
    shares = evaluation.with_fewer_labels(noise, [task], blind, households, shares=(0.2,))
    assert abs(shares["auc"][0] - 0.5) < 0.1
