"""The result table: means, paired differences, correction for many comparisons, seeds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggsm_core import comparison, evaluation, intervals
from ggsm_core.comparison import differences, holm, over_seeds, with_mean
from ggsm_core.sections import Evaluation

TASKS = ("easy", "hard")
EVALUATION = Evaluation(bootstrap=300)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.6]).tolist() == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(deadline=None, max_examples=60)
def test_holm_lies_between_no_correction_and_bonferroni(p: list[float]) -> None:
    got = holm(p)
    assert (got >= np.array(p)).all()
    assert (got <= np.minimum(1, len(p) * np.array(p)) + 1e-15).all()
    assert (np.diff(got[np.argsort(p, kind="stable")]) >= 0).all()


def test_holm_keeps_its_promise_where_plain_p_values_break_theirs() -> None:
    """Twenty comparisons of nothing: some plain p is below 0.05 in most tables, corrected in 5 %."""
    p = np.random.default_rng(0).uniform(size=(1000, 20))
    assert (p.min(axis=1) < 0.05).mean() > 0.6
    assert np.mean([holm(row).min() < 0.05 for row in p]) < 0.075


def test_seeds_spread_the_mean_as_a_mean_of_independent_runs() -> None:
    """Three seeds, no other noise: the draws spread by the standard error of a mean of three. Negative
    control: the plain reweighting gives 0.71 of it."""
    rng = np.random.default_rng(0)
    values = np.array([0.1, 0.4, 0.7])
    weights = rng.standard_exponential((3, 20_000))
    draws = np.broadcast_to(values[:, None, None], (3, 1, 20_000))
    error = values.std(ddof=1) / np.sqrt(3)
    got = over_seeds(draws, weights)
    assert got.mean() == pytest.approx(0.4, abs=0.01)
    assert got.std() == pytest.approx(error, rel=0.05)
    plain = (weights * values[:, None]).sum(axis=0) / weights.sum(axis=0)
    assert plain.std() == pytest.approx(error / np.sqrt(2), rel=0.05)
    assert np.array_equal(over_seeds(draws[:1], weights[:1]), draws[0])


def test_verdicts_follow_the_corrected_p_in_two_families() -> None:
    rng = np.random.default_rng(0)
    tasks = ["a", "b", comparison.MEAN]
    noise = {name: 0.01 * rng.normal(size=(2, 400)) for name in ("causal", "up", "down", "same")}
    points = {
        name: with_mean(np.full(2, value)) for name, value in zip(noise, (0.7, 0.8, 0.6, 0.701), strict=True)
    }
    draws = {name: points[name][:, None] + with_mean(noise[name]) for name in noise}
    table = differences(points, draws, tasks)
    assert set(table["reference"]) == {"causal"}  # the only reference that takes part
    verdicts = {row: set(part["verdict"]) for (row,), part in table.group_by("row")}
    assert verdicts == {"up": {"better"}, "down": {"worse"}, "same": {"no difference shown"}}
    for family in (table.filter(task=comparison.MEAN), table.filter(pl.col("task") != comparison.MEAN)):
        raw = [
            intervals.Difference.of(
                row["difference"],
                (draws[row["row"]] - draws["causal"])[tasks.index(row["task"])],
            ).p
            for row in family.iter_rows(named=True)
        ]
        assert family["p_holm"].to_list() == pytest.approx(holm(raw).tolist())


@pytest.fixture
def house(tmp_path: Path) -> Path:
    folder = tmp_path / "windows"
    folder.mkdir()
    users = np.repeat([f"u{k:03d}" for k in range(200)], 2)
    pl.DataFrame({"sample": range(400), "user": users, "split": "probe"}).write_parquet(
        folder / "samples.parquet"
    )
    return folder


def row(house: Path, name: str, strength: float, seed: int = 0) -> Path:
    """A finished run whose scores know the label by ``strength``; task ``hard`` has 300 of 400 samples."""
    households = evaluation.households_of(house, EVALUATION)
    users = pl.read_parquet(house / "samples.parquet")["user"].to_numpy()
    labels = np.random.default_rng(1).integers(0, 2, (2, 400))
    noise = np.random.default_rng(2).normal(size=(2, 400)) + 0.3 * np.random.default_rng([3, seed]).normal(
        size=(2, 400)
    )
    folder = house.parent / f"{name}-{seed}"
    folder.mkdir()
    auc, scores = [], []
    for k, task in enumerate(TASKS):
        n = 400 - 100 * k
        score, label = strength * labels[k, :n] + noise[k, :n], labels[k, :n]
        member = households.index(users[:n])
        fold = households.fold[member]
        point = intervals.mean_fold_auc(score, label, fold)[0]
        draws = intervals.mean_fold_auc(score, label, fold, households.weights[member])
        auc.append((name, seed, task, point, *intervals.interval(draws), n))
        scores.append(
            pl.DataFrame({"sample": range(n), "task": task, "score": score, "label": label, "fold": fold})
        )
    pl.DataFrame(auc, schema=evaluation.AUC_COLUMNS, orient="row").write_csv(folder / "auc.csv")
    pl.concat(scores).write_parquet(folder / "scores.parquet")
    fewer = [
        (name, seed, task, share, 0.5 + share / 4, 160 * share) for task in TASKS for share in (0.1, 1.0)
    ]
    pl.DataFrame(fewer, schema=comparison.LABEL_COLUMNS, orient="row").write_csv(folder / "labels.csv")
    return folder


def compare(inputs: dict[str, Path], out: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    out.mkdir(exist_ok=True)
    comparison.run(SimpleNamespace(evaluation=EVALUATION), inputs, out, lambda *_: None)
    return pl.read_csv(out / "auc.csv"), pl.read_csv(out / "differences.csv")


def test_stage_gathers_means_and_differences(house: Path, tmp_path: Path) -> None:
    inputs = {
        "windows": house,
        "baseline:handmade": row(house, "handmade", 1.0),
        "probe:causal:0": row(house, "causal", 1.0, 0),
        "probe:ggsm:0": row(house, "ggsm", 2.5, 0),
        "probe:ggsm:1": row(house, "ggsm", 2.5, 1),
    }
    auc, gaps = compare(inputs, tmp_path / "out")
    assert auc.columns == list(evaluation.AUC_COLUMNS)
    assert auc.height == 4 * 3
    for (name, seed), part in auc.group_by("recipe", "seed", maintain_order=True):
        values = dict(zip(part["task"], part["auc"], strict=True))
        assert values["mean"] == pytest.approx((values["easy"] + values["hard"]) / 2, abs=2e-6), (name, seed)
        mean = part.filter(task="mean")
        assert mean["ci_low"][0] < mean["auc"][0] < mean["ci_high"][0]
        assert mean["n"].item() == 400
    fewer = pl.read_csv(tmp_path / "out" / "labels.csv")
    assert fewer.height == 4 * 4 and set(fewer["recipe"]) == {"handmade", "causal", "ggsm"}
    assert set(gaps["reference"]) == {"causal", "handmade"}  # bidirectional isn't there
    assert gaps.columns == [
        "row",
        "reference",
        "task",
        "difference",
        "ci_low",
        "ci_high",
        "p_holm",
        "verdict",
    ]
    best = gaps.filter(row="ggsm", reference="causal")
    assert best["verdict"].to_list() == ["better"] * 3
    both = (
        auc.filter(recipe="ggsm", task="mean")["auc"].mean()
        - auc.filter(recipe="causal", task="mean")["auc"][0]
    )
    assert best.filter(task="mean")["difference"].item() == pytest.approx(both, abs=2e-6)
    assert gaps.filter(row="causal", reference="handmade")["difference"].abs().max() == 0
    again, gaps_again = compare(inputs, tmp_path / "again")
    assert again.equals(auc) and gaps_again.equals(gaps)


def test_averages_and_covariances_give_any_paired_difference(house: Path, tmp_path: Path) -> None:
    """Against the table of differences, which takes the bootstrap draws themselves."""
    inputs = {"windows": house}
    for name, strength in (("causal", 1.0), ("ggsm", 1.6)):
        inputs |= {f"probe:{name}:{seed}": row(house, name, strength, seed) for seed in (0, 1)}
    auc, gaps = compare(inputs, tmp_path / "out")
    rows = pl.read_csv(tmp_path / "out" / "rows.csv")
    together = pl.read_csv(tmp_path / "out" / "covariance.csv")
    assert set(rows["seeds"]) == {2} and rows["task"].unique().sort().to_list() == ["easy", "hard", "mean"]
    for task in ("easy", "hard", "mean"):
        told = dict(rows.filter(task=task).select("recipe", "auc").iter_rows())
        seen = auc.filter(recipe="ggsm", task=task)["auc"].mean()
        assert told["ggsm"] == pytest.approx(seen, abs=2e-6)
        one = together.filter(task=task)
        of = {(a, b): c for _, a, b, c in one.iter_rows()}
        error = np.sqrt(of["causal", "causal"] + of["ggsm", "ggsm"] - 2 * of["causal", "ggsm"])
        gap = gaps.filter(row="ggsm", reference="causal", task=task)
        assert told["ggsm"] - told["causal"] == pytest.approx(gap["difference"].item(), abs=3e-6)
        width = (gap["ci_high"] - gap["ci_low"]).item()
        assert 2 * 1.96 * error == pytest.approx(width, rel=0.15)


def test_a_domain_is_the_average_of_its_tasks() -> None:
    tasks = ["redeem_known", "mailer_share_hi", "login_7d", comparison.MEAN]
    found = comparison.with_domains(np.array([[0.2], [0.4], [0.9], [0.5]]), tasks)
    assert found["marketing"] == pytest.approx(0.3) and found["user prediction"] == pytest.approx(0.9)
    assert "preference" not in found and found["mean"] == 0.5


def test_one_resample_of_households_serves_all_tasks(house: Path, tmp_path: Path) -> None:
    """Two tasks with the same scores and labels: their mean is as uncertain as each. Drawn apart, its
    interval would be 0.71 as wide."""
    folder = row(house, "causal", 1.0)
    twin = pl.read_parquet(folder / "scores.parquet").filter(task="easy")
    both = pl.concat([twin, twin.with_columns(task=pl.lit("hard"))])
    both.write_parquet(folder / "scores.parquet")
    auc, _ = compare({"windows": house, "probe:causal:0": folder}, tmp_path / "out")
    width = dict(zip(auc["task"], auc["ci_high"] - auc["ci_low"], strict=True))
    assert width["mean"] == pytest.approx(width["easy"], abs=3e-6)


def test_the_same_seed_pairs_two_recipes(house: Path, tmp_path: Path) -> None:
    """Runs of one seed share their luck: the difference is narrower than between other seeds."""
    a, b = (
        {s: row(house, name, strength, s) for s in (0, 1, 2)}
        for name, strength in (("causal", 1.0), ("ggsm", 1.1))
    )
    width = {}
    for kind, shift in (("paired", 0), ("apart", 3)):
        inputs = {"windows": house}
        inputs |= {f"probe:causal:{s}": folder for s, folder in a.items()}
        inputs |= {f"probe:ggsm:{s + shift}": folder for s, folder in b.items()}
        _, gaps = compare(inputs, tmp_path / kind)
        mean = gaps.filter(row="ggsm", reference="causal", task="mean")
        width[kind] = (mean["ci_high"] - mean["ci_low"]).item()
    assert width["paired"] < 0.7 * width["apart"]


def test_rows_on_other_samples_or_folds_are_refused(house: Path, tmp_path: Path) -> None:
    first, second = row(house, "causal", 1.0), row(house, "ggsm", 1.0)
    scores = pl.read_parquet(second / "scores.parquet")
    scores.filter(pl.col("sample") != 7).write_parquet(second / "scores.parquet")
    inputs = {"windows": house, "probe:causal:0": first, "probe:ggsm:0": second}
    with pytest.raises(
        intervals.EvaluationError, match="probe:ggsm:0 and probe:causal:0 were scored on other"
    ):
        compare(inputs, tmp_path / "out")
    scores.with_columns((pl.col("fold") + 1) % 5).write_parquet(second / "scores.parquet")
    with pytest.raises(intervals.EvaluationError, match="probe:ggsm:0, task 'easy': scored on other folds"):
        compare(inputs, tmp_path / "out")
