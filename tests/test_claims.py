"""Verdicts follow their rules, whatever the tables say; and the paper's words are held against its table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl
import published
import pytest

from ggsm_core import claims, evidence, printed, provenance, verdicts
from ggsm_core.evidence import Evidence
from ggsm_core.reference import paper_table2

Make = Callable[..., dict[str, Evidence]]
FAR = 0.02  # beyond any doubt in the made-up tables


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Publishes a study with some rows, each ahead by its number, and reads it."""
    (tmp_path / "params").symlink_to(published.ROOT / "params")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)

    def make(lead: Mapping[str, float], seeds: int = 3) -> dict[str, Evidence]:
        published.publish(tmp_path, "study", dict.fromkeys(lead, seeds), lead=lead)
        return {"study": evidence.load("study")}

    return make


PAIRS = [("ggsm", "causal"), ("ggsm", "bidirectional")]


@pytest.mark.parametrize(
    ("ggsm", "causal", "verdict", "one"),
    [
        (FAR, 0.0, "supported", "supported"),
        (0.0, 0.0, "not shown", "not shown"),
        (0.0, FAR, "contradicted", "contradicted"),
        (FAR, 2 * FAR, "contradicted", "supported"),  # better than one, worse than the other
        (0.0, -FAR, "not shown", "supported"),  # better than one, and no difference to the other
    ],
)
def test_better(tables: Make, ggsm: float, causal: float, verdict: str, one: str) -> None:
    found = tables({"ggsm": ggsm, "causal": causal, "bidirectional": 0.0})
    got = claims.better("study", PAIRS)(found)
    assert got.verdict == verdict and got.seeds == 3
    assert got.value is not None and got.value == verdicts.gaps(found["study"], PAIRS)["difference"].min()
    assert claims.better("study", PAIRS, one_is_enough=True)(found).verdict == one


def test_a_family_without_all_its_rows_is_never_supported(tables: Make) -> None:
    found = tables({"ggsm": FAR, "causal": 0.0})
    got = claims.better("study", PAIRS)(found)
    assert got.verdict == "not shown" and "1 without numbers" in got.what
    assert claims.better("study", PAIRS[:1])(found).verdict == "supported"
    assert claims.better("study", [("found", "cpc")])(found).verdict == "not measured"
    assert claims.better("ablation", PAIRS)(found) == claims._nothing("results/ablation is not published")


def test_the_family_is_all_pairs_on_all_tasks(tables: Make) -> None:
    found = tables({"ggsm": 0.001, "causal": 0.0, "bidirectional": 0.0})["study"]
    tasks = ("login_7d", "seafood_30d")
    family = verdicts.family(found, PAIRS, tasks)
    assert len(family) == 4
    alone = pl.concat([verdicts.gaps(found, PAIRS, task) for task in tasks])
    assert family["p"].to_list() == alone["p"].to_list()
    p, worst, slow = family["p"].to_list(), 0.0, [0.0] * len(family)
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        slow[i] = worst = max(worst, min(1.0, (len(p) - rank) * p[i]))
    assert family["p_holm"].to_list() == pytest.approx(slow)


@pytest.mark.parametrize(
    ("lead", "verdict"), [(0.0, "supported"), (FAR, "contradicted"), (-FAR, "contradicted")]
)
def test_marginal(tables: Make, lead: float, verdict: str) -> None:
    found = tables({"hybrid_gq": lead, "causal": 0.0})
    got = claims.marginal("study", [("hybrid_gq", "causal")])(found)
    assert got.verdict == verdict
    assert (
        claims.marginal("study", [("hybrid_gq", "causal"), ("hybrid_mlp", "causal")])(found).verdict
        != "supported"
    )


def test_steadier_needs_seeds_and_a_clear_ratio(tables: Make) -> None:
    found = tables({"ggsm": 0.0, "scheduler": 0.0}, seeds=5)
    got = claims.steadier("study", "ggsm", "scheduler")(found)
    assert got.value is not None and got.ci_low is not None and got.ci_high is not None
    assert got.ci_low < got.value < got.ci_high and got.ci_high / got.ci_low > 4  # five seeds say little
    back = claims.steadier("study", "scheduler", "ggsm")(found)
    assert back.value == pytest.approx(1 / got.value) and back.ci_low == pytest.approx(1 / got.ci_high)
    assert claims.steadier("study", "ggsm", "found")(found).verdict == "not measured"


@pytest.mark.parametrize(("sign", "verdict"), [(1, "supported"), (-1, "contradicted")])
def test_order(tables: Make, sign: int, verdict: str) -> None:
    rows = ("causal", "hybrid_gq", "hybrid_mlp", "bidirectional", "scheduler", "ggsm")
    known = printed.by_row()
    got = claims.ordered("study", rows)(tables({row: sign * 10 * known[row] for row in rows}))
    assert got.verdict == verdict and got.value == sign


def test_every_claim_is_about_rows_that_the_profiles_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all rows published, nothing is left unmeasured: no row's name is misspelt."""
    for name in evidence.PROFILES:
        published.publish(tmp_path, name, published.rows_of(name))
    (tmp_path / "params").symlink_to(published.ROOT / "params")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    audit = claims.audit({name: evidence.load(name) for name in evidence.PROFILES})
    assert len(audit) >= 12 and audit.select("said", "note").n_unique() == len(audit)
    assert verdicts.UNMEASURED not in audit["verdict"].to_list()
    assert not audit["what"].str.contains("without numbers").any()
    assert audit.null_count().sum_horizontal().item() == 0


# --- the paper against itself -----------------------------------------------------------------------------


def test_printed_averages_are_those_of_the_printed_columns() -> None:
    table = paper_table2()
    means = table.select(pl.mean_horizontal(*printed.COLUMNS)).to_series()
    assert (means - table["average"]).abs().max() <= 0.5e-4 + 1e-9  # type: ignore[operator]


def test_the_words_against_the_table() -> None:
    told = {(said, rule): rest for _, said, rule, *rest in printed.against_words().iter_rows()}
    assert len(told) == len(printed.against_words())

    def of(words: str) -> list[str]:
        (found,) = [rest for (said, _), rest in told.items() if words in said]
        return found

    assert of("twelve") == ["9 columns", "no"]
    assert of("peak AUC")[1] == "yes"
    assert of("the same") == ["Achiev.: CPC 0.6256, GG-SM 0.6078; Physical: GG-SM 0.6615", "no"]
    assert of("its consistent lead")[1] == "no"
    assert of("marginal gains")[1] == "yes"  # by the rule that our own rows are judged by
    average = printed.by_row()
    assert average["ggsm"] - average["causal"] == pytest.approx(printed.SPAN)
    best = printed.table().filter(pl.col("best in").str.contains("marketing"))["method"].to_list()
    assert best == ["GG-SM"]
