"""Published tables are read as they were written, or refused; and what is read off them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import polars as pl
import published
import pytest
from scipy.stats import kendalltau
from scipy.stats import t as student

from ggsm_core import book, evidence, provenance, runs, verdicts
from ggsm_core.evidence import EvidenceError

ROWS = {"causal": 3, "bidirectional": 3, "ggsm": 2, "handmade": 1}
LEAD = {"ggsm": 0.02, "causal": -0.02}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose study is published for some rows."""
    published.publish(tmp_path, "study", ROWS, lead=LEAD)
    (tmp_path / "params").symlink_to(published.ROOT / "params")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


def test_what_was_published_is_read(root: Path) -> None:
    study = evidence.load("study")
    assert study.seeds == ROWS
    assert study.has("ggsm", "scheduler", "causal") == ["ggsm", "causal"]
    assert "scheduler" in study.absent and "ggsm" not in study.absent
    said = study.told()
    assert "4 rows" in said and "2 to 3 seeds of 5 planned" in said and "among them hybrid_segment," in said
    assert "one seed" not in said  # a row that draws nothing has no second seed to miss
    assert evidence.find("ablation") is None
    assert evidence.hashes("ablation") == {} and len(evidence.hashes("study")) == 8


def test_one_seed_is_said_to_say_less(root: Path) -> None:
    published.publish(root, "ablation", {"ggsm": 2, "ggsm_constant": 1})
    said = evidence.load("ablation").told()
    assert "1 to 2 seeds of 5 planned" in said and "borrows the spread of those with several" in said
    published.publish(root, "attempts", {"bidirectional": 1, "no_margin": 1})
    said = evidence.load("attempts").told()
    assert "over households alone, but for a borrowed spread" in said
    assert said.endswith("Computed from commit 0000000, finished 2026-01-02, on 2 cores.")


def test_every_commit_behind_a_table_is_named(root: Path) -> None:
    study = evidence.load("study")
    runs = [dict(run) for run in study.provenance["runs"]]
    runs[0]["commit"], runs[1]["uncommitted_changes"] = "1" * 40, True
    said = replace(study, provenance=study.provenance | {"runs": runs}).origin()
    assert f"commits 0000000 ({len(runs) - 2} runs), " in said
    assert "1111111 (1)" in said and "0000000 with uncommitted changes (1)" in said


def test_a_row_trained_once_is_compared_on_its_seed_with_a_borrowed_spread(root: Path) -> None:
    """Against a slow computation from the tables: the seed they share, and the variance that seeds add."""
    published.publish(root, "ablation", {"causal": 3, "bidirectional": 3, "ggsm": 3, "ggsm_constant": 1})
    found = evidence.load("ablation")
    auc = {(row, seed): value for row, seed, value in found.auc.filter(task="mean")[:, [0, 1, 3]].iter_rows()}
    rows = ("causal", "bidirectional", "ggsm")
    pairs = [np.var([auc[a, s] - auc[b, s] for s in range(3)], ddof=1) for a, b in combinations(rows, 2)]
    spread = verdicts.spread(found)
    assert spread is not None
    single, paired = spread
    assert paired == pytest.approx((np.mean(pairs), 4))
    assert single == pytest.approx(
        (np.mean([np.var([auc[r, s] for s in range(3)], ddof=1) for r in rows]), 2)
    )
    got = verdicts.gaps(found, [("ggsm_constant", "ggsm")]).row(0, named=True)
    assert got["difference"] == pytest.approx(auc["ggsm_constant", 0] - auc["ggsm", 0])
    (one, both), (_, other) = verdicts.covariance(found, ("ggsm_constant", "ggsm"))
    whole = one + other - 2 * both + paired.variance
    assert got["error"] ** 2 == pytest.approx(whole)
    free = 4 * (whole / paired.variance) ** 2
    half = student.ppf(0.975, free) * np.sqrt(whole)
    assert (got["ci_high"] - got["ci_low"]) / 2 == pytest.approx(half)
    assert got["p"] == pytest.approx(2 * student.sf(abs(got["difference"]) / got["error"], free))
    alone = evidence.load("study")
    assert verdicts.gaps(alone, [("ggsm", "bidirectional")])["seeds"][0] == 2  # and nothing borrowed


def test_an_interval_covers_though_seeds_are_few() -> None:
    """Noise of households, known, and of three seeds, estimated: 95 % of intervals hold the truth."""
    rng, tables = np.random.default_rng(0), 4000
    household = 0.5
    seeds = rng.normal(0.0, 1.0, (tables, 3))
    found = seeds.mean(axis=1) + rng.normal(0.0, household, tables)
    noise = [verdicts.Noise(float(one.var(ddof=1)) / 3, 2) for one in seeds]
    errors = [float(np.sqrt(household**2 + one.variance)) for one in noise]
    ends = [verdicts.student(*given) for given in zip(found, errors, noise, strict=True)]
    held = np.mean([low <= 0 <= high for low, high, _ in ends])
    normal = np.mean(np.abs(found) < 1.96 * np.array(errors))
    assert abs(held - 0.95) < 0.015 < 0.02 < held - normal
    assert np.mean([p < 0.05 for *_, p in ends]) == pytest.approx(1 - held)


def test_a_row_that_draws_nothing_has_every_seed(root: Path) -> None:
    study = evidence.load("study")
    got = verdicts.gaps(study, [("ggsm", "handmade")]).row(0, named=True)
    assert got["seeds"] == 2
    assert got["difference"] == pytest.approx(
        float(np.subtract(*verdicts.points(study, ("ggsm", "handmade"))))
    )


def test_rows_that_agree_in_every_digit_are_named(root: Path) -> None:
    study = evidence.load("study")
    copied = study.auc.filter(recipe="ggsm").with_columns(recipe=pl.lit("again"))
    both = replace(
        study,
        auc=pl.concat([study.auc, copied]),
        rows=pl.concat([study.rows, study.rows.filter(recipe="ggsm").with_columns(recipe=pl.lit("again"))]),
    )
    assert verdicts.twins(both, ["ggsm", "causal", "again"]) == {"again": "ggsm"}
    assert verdicts.twins(study, list(ROWS)) == {}


def test_what_is_read_is_what_the_pipeline_writes() -> None:
    assert {f"{table}.csv" for table in evidence.TABLES} == {*book.TABLES, book.COSTS}
    assert [f"{table}.csv" for table in evidence.KEPT] == [book.LEARNING, book.SYNTHESIS]


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "labels.csv").unlink(), r"labels\.csv is missing"),
        (lambda folder: (folder / "provenance.json").unlink(), r"provenance\.json is missing"),
        (lambda folder: change(folder / "auc.csv", "0.6", "0.7"), r"auc\.csv is not the table"),
        (lambda folder: change(folder / "costs.csv", "dimension", "size"), "costs.csv"),
        (
            lambda folder: change(folder / "provenance.json", '"ggsm"', '"ggsm2"'),
            "row 'ggsm', seed 0 is in auc.csv",
        ),
        (lambda folder: change(folder / "provenance.json", '"study"', '"quick"'), "another profile"),
    ],
)
def test_damaged_tables_are_refused(root: Path, damage: object, words: str) -> None:
    damage(root / "results" / "study")  # type: ignore[operator]
    with pytest.raises(EvidenceError, match=rf"results/study.*{words}.*publish it again|{words}"):
        evidence.load("study")


def test_a_column_that_is_missing_is_named(root: Path) -> None:
    folder = root / "results" / "study"
    change(folder / "costs.csv", "dimension", "size")
    told = json.loads((folder / "provenance.json").read_text())
    told["tables"] = {}
    (folder / "provenance.json").write_text(json.dumps(told))
    with pytest.raises(EvidenceError, match="no column 'dimension', only recipe, seed, size"):
        evidence.load("study")


def test_what_is_not_published_is_named(root: Path) -> None:
    with pytest.raises(EvidenceError, match=r"results/ablation/provenance\.json is missing; publish it"):
        evidence.load("ablation")
    with pytest.raises(EvidenceError, match="'quick' is not published; published are study"):
        evidence.load("quick")


def test_a_page_reads_only_what_it_declares(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = root / "reads.json"
    reads.write_text(json.dumps({"notebook": "11_x.ipynb", "runs": [], "results": ["ablation"]}))
    monkeypatch.setenv(runs.READS, str(reads))
    with pytest.raises(runs.UndeclaredRun, match=r"11_x\.ipynb reads results/study"):
        evidence.load("study")


# --- what is read off them --------------------------------------------------------------------------------


def test_a_gap_is_the_published_difference(root: Path) -> None:
    """Where differences.csv has the pair, the covariances give the same, but for percentiles."""
    study = evidence.load("study")
    for task in ("mean", "login_7d"):
        got = verdicts.gaps(study, [("ggsm", "bidirectional"), ("causal", "bidirectional")], task)
        for line in got.iter_rows(named=True):
            told = study.differences.filter(row=line["row"], reference="bidirectional", task=task).row(
                0, named=True
            )
            assert line["difference"] == pytest.approx(told["difference"], abs=1e-9)
            assert line["ci_high"] - line["ci_low"] == pytest.approx(
                told["ci_high"] - told["ci_low"], rel=0.25
            )
            assert line["verdict"] == told["verdict"]
            one, other = (verdicts.by_seed(study, line[side], task) for side in ("row", "reference"))
            noise = np.var([one[s] - other[s] for s in range(line["seeds"])], ddof=1) / line["seeds"]
            free = (line["seeds"] - 1) / min(noise / line["error"] ** 2, 1) ** 2
            half = student.ppf(0.975, free) * line["error"]
            assert (line["ci_high"] - line["ci_low"]) / 2 == pytest.approx(half)
            assert line["p"] == pytest.approx(2 * student.sf(abs(line["difference"]) / line["error"], free))
    assert got["seeds"].to_list() == [2, 3]
    back = verdicts.gaps(study, [("bidirectional", "ggsm")], "login_7d")
    assert back["difference"][0] == -got["difference"][0] and back["verdict"][0] == "worse"


def test_the_family_is_what_was_asked_for(root: Path) -> None:
    study = evidence.load("study")
    pair = ("handmade", "bidirectional")
    alone = verdicts.gaps(study, [pair])["p_holm"][0]
    among = verdicts.gaps(study, [pair, *[("causal", "ggsm")] * 9]).filter(row="handmade")["p_holm"][0]
    assert among >= alone
    assert verdicts.gaps(study, [("ggsm", "scheduler")]).is_empty()  # has no numbers


def test_attempts_are_told_by_what_they_change(root: Path) -> None:
    """Variants where a profile has some, else the rows that learn; one family over all references."""
    published.publish(root, "attempts", {"bidirectional": 1, "no_margin": 1, "steps_400": 1, "handmade": 1})
    rows = evidence.profile("attempts").variants
    seen = verdicts.tried(evidence.load("attempts"), "", ("bidirectional", "handmade"))
    change = dict(seen.select("row", "change").iter_rows())
    assert change == {"no_margin": "margin: None", "steps_400": "total_steps: 400"} and change.keys() < {
        *rows
    }
    assert len(seen) == 4 and set(seen["tables"]) == {"attempts"}
    study = evidence.load("study")
    learnt = verdicts.tried(study, "as it is", ("bidirectional", "handmade"))
    pairs = [("ggsm", "bidirectional"), ("causal", "bidirectional")]
    pairs += [(row, "handmade") for row in ("causal", "bidirectional", "ggsm")]
    assert set(learnt.select("row", "reference").iter_rows()) == {*pairs}
    same = verdicts.gaps(study, learnt.select("row", "reference").iter_rows())
    assert learnt["p_holm"].to_list() == same["p_holm"].to_list() and set(learnt["change"]) == {"as it is"}


def test_rows_that_cannot_be_told_apart_stand_together(root: Path) -> None:
    study = evidence.load("study")
    assert verdicts.groups(study, list(ROWS)) in (
        [["bidirectional", "handmade"]],
        [["handmade", "bidirectional"]],
    )


def test_groups_against_every_run_of_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow and plain: all runs without a pair apart, less those inside another."""
    rows = dict.fromkeys(("causal", "bidirectional", "ggsm", "scheduler", "hybrid_gq"), 1)
    lead = dict(zip(rows, (0.0, 0.0009, 0.0018, 0.0027, 0.0036), strict=True))
    published.publish(tmp_path, "study", rows, lead=lead)
    (tmp_path / "params").symlink_to(published.ROOT / "params")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    study = evidence.load("study")
    order = [row for _, row in sorted(zip(-verdicts.points(study, list(rows)), rows, strict=True))]
    table = verdicts.gaps(study, combinations(order, 2))
    apart = {
        frozenset((a, b))
        for a, b, v in table.select("row", "reference", "verdict").iter_rows()
        if "no" not in v
    }
    spans = [
        order[i:j]
        for i in range(5)
        for j in range(i + 2, 6)
        if not any(frozenset(pair) in apart for pair in combinations(order[i:j], 2))
    ]
    largest = [one for one in spans if not any(set(one) < set(other) for other in spans)]
    assert verdicts.groups(study, list(rows)) == largest
    assert len(largest) > 1, "a case in which groups overlap"
    assert all(order.index(a[0]) < order.index(b[0]) for a, b in pairwise(largest))


def test_agreement_against_scipy(root: Path) -> None:
    study = evidence.load("study")
    printed = {"causal": 0.7, "bidirectional": 0.72, "ggsm": 0.71, "handmade": 0.72}
    got = verdicts.agreement(study, printed)
    ours = verdicts.points(study, list(printed))
    assert got.tau == pytest.approx(kendalltau(ours, list(printed.values())).statistic)
    assert got.ci_low <= got.tau <= got.ci_high and got.n == 4
    same = dict(zip(printed, ours, strict=True))
    assert verdicts.agreement(study, same).tau == pytest.approx(1.0)
    with pytest.raises(EvidenceError, match="2 rows have printed numbers"):
        verdicts.agreement(study, {"causal": 1.0, "ggsm": 2.0, "found": 3.0})


def test_covariance_is_symmetric_and_named_when_missing(root: Path) -> None:
    study = evidence.load("study")
    matrix = verdicts.covariance(study, ["ggsm", "causal", "handmade"])
    assert np.array_equal(matrix, matrix.T) and np.linalg.eigvalsh(matrix).min() > 0
    with pytest.raises(EvidenceError, match="scheduler"):
        verdicts.covariance(study, ["ggsm", "scheduler"])
    with pytest.raises(EvidenceError, match="'found'"):
        verdicts.points(study, ["found"])
    assert isinstance(study.rows, pl.DataFrame)


def test_runs_that_collapsed_are_counted(root: Path) -> None:
    study = evidence.load("study")
    runs = len(study.learning) if study.learning is not None else 0
    assert study.collapsed().startswith(f"Of {runs} training runs {runs} ended")
    assert replace(study, learning=None).collapsed() == ""


def test_what_tuning_found_is_told_with_what_is_shown(root: Path) -> None:
    assert evidence.load("study").tuned().startswith("No row was tuned")
    trials = pl.DataFrame(
        {
            "row": ["ggsm", "causal"] * 2,
            "rate": [1.0, 1.0, 3.0, 3.0],
            "auc": [0.7, 0.7, 0.6, 0.8],
            "chosen": [True, False, False, True],
        }
    )
    before = evidence.hashes("study")
    trials.write_csv(root / "results" / "study" / evidence.TRIALS)
    told = evidence.load("study").tuned()
    assert "2 trials for each of 2 rows" in told
    assert "Best at the profile's own pace: ggsm. Best at learning rate × 3: causal." in told
    assert "Shown here without it: causal. Not tuned: hybrid_segment," in told
    assert evidence.hashes("study") != before  # a page that tells of it is made again
