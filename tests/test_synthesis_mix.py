"""D_qa beside D_behavior: what fits is mixed in, at the share that was asked for, and compared."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import polars as pl
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toygraph import small

from ggsm_core import batches, book, runs, sections, stages, training
from ggsm_core.synthesis import mix, steps


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Runs of the stages pairs, synthesis and pretrain, as far as mix reads them."""
    folders = {name: tmp_path / name for name in ("pairs", "synthesis", "pretrain")}
    for folder in folders.values():
        folder.mkdir()
    behaviour = {
        "sample": [0, 0, 1, 1],
        "granularity": ["visits", "weeks"] * 2,
        "query": ["What next?"] * 4,
        "answer": ["frozen pizza", "homeowner", "frozen pizza", "a visit"],
        "answer_id": [1, 2, 1, 0],
    }
    pl.DataFrame(behaviour).write_parquet(folders["pairs"] / "pairs.parquet")
    made = [
        (0, "s", "Which food?", "frozen pizza", 0.4),
        (1, "s", "Which food?", "pizza " * 90, 0.5),
        (1, "s", "Which food, " * 90, "soft drinks", 0.6),
        (1, "s", "Which drinks?", "soft drinks", 0.7),
    ]
    pl.DataFrame(made, schema=steps.PAIRS, orient="row").write_parquet(folders["synthesis"] / "pairs.parquet")
    tiny.tokenizer().save_pretrained(folders["pretrain"])
    return folders


@pytest.mark.parametrize("way", ["adapter", "text"])
def test_pairs_that_fit_are_mixed_in_and_the_others_named(
    way: Literal["adapter", "text"], inputs: dict[str, Path], tmp_path: Path
) -> None:
    template = sections.Template(modality_input=way, max_user_tokens=tiny.LONGEST, max_answer_tokens=32)
    mix.run(SimpleNamespace(template=template), inputs, tmp_path, lambda done, total, what: None)
    both = pl.read_parquet(tmp_path / "pairs.parquet")
    assert both.columns == ["sample", "granularity", "query", "answer", "answer_id"]
    assert both.filter(granularity=mix.QA).select("sample", "answer").rows() == [
        (0, "frozen pizza"),
        (1, "soft drinks"),
    ]
    assert both.filter(pl.col("granularity") != mix.QA).height == 4
    of_pizza = both.filter(answer="frozen pizza")["answer_id"]
    assert of_pizza.n_unique() == 1 and len(of_pizza) == 3  # no negatives of each other, whatever their kind
    why = pl.read_parquet(tmp_path / "left_out.parquet")["why"].to_list()
    assert len(why) == 2 and "max_answer_tokens" in why[0] and "max_user_tokens" in why[1]


def test_plain_text_needs_more_room_for_a_query() -> None:
    """White space between tags is tokens then: what fits as soft tokens may not fit as text."""
    query = "Which food? " * 6

    def fits(way: Literal["adapter", "text"], room: int) -> bool:
        template = sections.Template(modality_input=way, max_user_tokens=room, max_answer_tokens=16)
        return mix.misfit(query, "pizza", tiny.tokenizer(), template) is None

    least = {way: next(n for n in range(16, 512) if fits(way, n)) for way in ("adapter", "text")}
    assert least["text"] > least["adapter"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A corpus whose pairs of one granularity are called D_qa."""
    return tiny.corpus(tmp_path_factory.mktemp("mixed"), kinds=("visits", mix.QA))


@given(share=st.fractions(0, Fraction(19, 20), max_denominator=20), steps=st.integers(1, 60))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batches_keep_to_the_share_and_to_one_kind(
    mixed: dict[str, Path], share: Fraction, steps: int
) -> None:
    kinds = pl.read_parquet(mixed["tokens"] / "pairs.parquet")["granularity"].to_numpy() == mix.QA
    pairs = batches.Pairs(mixed["tokens"], mixed["texts"], 4, 0, float(share))
    drawn = [kinds[pairs.rows(step)] for step in range(steps)]
    assert all(batch.all() or not batch.any() for batch in drawn)
    assert abs(sum(batch.all() for batch in drawn) - share * steps) <= 1


def test_each_kind_has_epochs_of_its_own(mixed: dict[str, Path]) -> None:
    pairs = batches.Pairs(mixed["tokens"], mixed["texts"], 4, 0, 0.5)
    count = Counter(np.concatenate([pairs.rows(step) for step in range(12)]).tolist())
    assert set(count.values()) == {2} and len(count) == 24  # 6 steps of each kind are two epochs of 12


def test_without_a_share_no_batch_holds_d_qa(mixed: dict[str, Path]) -> None:
    kinds = pl.read_parquet(mixed["tokens"] / "pairs.parquet")["granularity"].to_numpy()
    pairs = batches.Pairs(mixed["tokens"], mixed["texts"], 4, 0)
    assert all(mix.QA not in kinds[pairs.rows(step)] for step in range(9))


def test_too_few_pairs_of_d_qa_are_an_error(mixed: dict[str, Path]) -> None:
    index = pl.read_parquet(mixed["tokens"] / "pairs.parquet")
    batches.Pairs(mixed["tokens"], mixed["texts"], index["sample"].n_unique(), 0, 0.5)
    with pytest.raises(training.TrainingError, match=r"training\.batch_size"):
        batches.Pairs(mixed["tokens"], mixed["texts"], 13, 0, 0.5)


def test_a_mix_is_a_row_of_the_comparison() -> None:
    share = {"recipe": "ggsm", "training": {"qa_share": 0.25}}
    profile = small(synthesis={}, variants={"ggsm_qa_25": share})
    plan = stages.Plan(stages.GRAPH, profile, runs.Store())
    mixed, plain = (plan.node("contrast", row, 0) for row in ("ggsm_qa_25", "ggsm"))
    shares = [node.config["sections"]["training"]["qa_share"] for node in (mixed, plain)]
    assert shares == [0.25, 0.0]
    # Both read the same tokens, which hold both kinds of pairs; the plain row takes none of the second.
    assert mixed.inputs["tokens"].name == plain.inputs["tokens"].name
    assert plan.node("mix").name == plain.inputs["tokens"].inputs["mix"].name
    assert f"probe:ggsm_qa_25:{profile.seeds[0]}" in plan.node("compare").inputs
    with pytest.raises(ValueError, match="qa_share"):
        small(synthesis=None, variants={"ggsm_qa_25": share})
    with pytest.raises(ValueError, match="qa_share"):
        small(synthesis={}, variants={"ggsm_qa_25": share | {"training": {"qa_share": 1.0}}})


def test_what_the_model_wrote_is_published_beside_the_rows(tmp_path: Path) -> None:
    share = {"recipe": "ggsm", "training": {"qa_share": 0.25}}
    plan = stages.Plan(
        stages.GRAPH, small(synthesis={}, variants={"ggsm_qa_25": share}), runs.Store(tmp_path)
    )
    folder = plan.store.folder(plan.node("synthesis").name)
    folder.mkdir(parents=True)
    told = {"asked": 8, "answered": 6, "yielded": 3, "prompt_tokens": 900, "completion_tokens": 90}
    report = {"step": steps.NAMES, "seconds": 1.5, "dollars": 0.0, "malformed": 1, "cut": 1} | told
    pl.DataFrame(report).write_parquet(folder / "report.parquet")
    table = book.synthesis(plan)
    assert {"seconds", "dollars"}.isdisjoint(table.columns)  # the one differs from run to run
    assert table.columns[:2] == ["step", "asked"] and table["step"].to_list() == list(steps.NAMES)
    assert set(table["yielded"]) == {3}
