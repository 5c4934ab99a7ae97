"""Behaviour pairs: from training futures only, seeded, short, and true."""

from __future__ import annotations

import re

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from ggsm_core.data import pairs
from ggsm_core.template import MODALITIES, sanitise

NAMES = ["categories", "visits", "weeks", "offers"]


def build(future: pl.DataFrame, samples: pl.DataFrame, seed: int = 0, facts: int = 6) -> pl.DataFrame:
    return pairs.build(future, samples, granularities=NAMES, facts=facts, seed=seed, future_days=30)


def event(
    sample: int, offset: int, modality: str, text: str, item: str | None, amount: float | None
) -> dict[str, object]:
    base = {"sample": sample, "offset": offset, "hour": 18, "weekday": 6, "modality": modality, "text": text}
    return base | {"item": item, "amount": amount}


@pytest.fixture
def futures() -> tuple[pl.DataFrame, pl.DataFrame]:
    rows = []
    for day, spend in ((0, 52.0), (9, 31.0)):
        rows += [
            event(0, day, "app", "visit", "store/7", None),
            event(0, day, "bill", "milk (dairy)", "D/M", spend),
        ]
    rows += [
        event(0, 9, "bill", "loyalty discount", None, 12.0),
        event(0, 9, "spm", "front page", "0/D", 31.0),
    ]
    rows += [event(0, 3, "minipro", "coupon redeemed in a type A campaign", "coupon/1", None)] * 2
    for name in (
        "fish (sea)",
        "tea (grocery)",
        "jam (grocery)",
        "rice (grocery)",
        "ham (meat)",
        "eggs (dairy)",
    ):
        rows.append(event(2, 20, "bill", name, name, 4.0))
    rows.append(event(2, 20, "app", "visit", "store/7", None))
    schema = {"offset": pl.Int32, "hour": pl.Int32, "weekday": pl.Int32, "modality": pl.Enum(MODALITIES)}
    future = pl.DataFrame(rows, schema_overrides=schema)
    samples = pl.DataFrame(
        {
            "sample": [0, 1, 2, 3],
            "user": ["a", "b", "a", "b"],
            "anchor": [90] * 4,
            "split": ["train"] * 3 + ["probe"],
        }
    )
    return future, samples


def test_answers_say_what_happened(futures: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    answers = {(s, g): a for s, g, a in build(*futures).select("sample", "granularity", "answer").iter_rows()}
    assert answers[0, "categories"] == "Buys 1 kind for 80 dollars: milk."
    assert answers[0, "visits"] == (
        "2 visits, from day 1 to day 10, longest gap 9 days, mostly weekend evenings at store 7."
    )
    assert (
        answers[0, "weeks"]
        == "Spends 50, 30, 0 and 0 dollars over 1, 1, 0 and 0 visits in weeks 1, 2, 3 and 4."
    )
    assert answers[0, "offers"] == (
        "Coupon redeemed in a type A campaign 2 times, 35 percent bought from the mailer, "
        "10 dollars of loyalty discount."
    )


def test_a_whole_answer_is_the_four_in_turn(futures: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    future, samples = futures
    settings = {"facts": 6, "seed": 0, "future_days": 30}
    whole = pairs.build(future, samples, granularities=["whole"], **settings)
    told = build(future, samples).group_by("sample", maintain_order=True).agg("answer")
    assert whole["query"].unique().to_list() == ["What will this user do in the next 30 days?"]
    answers = dict(whole.select("sample", "answer").iter_rows())
    assert answers[0] == " ".join(told.filter(pl.col("sample") == 0)["answer"].item())
    assert answers[1] == "Does nothing in the next 30 days."
    assert answers[2].endswith(
        "One visit, on day 21, mostly weekend evenings at store 7. Spends 0, 0, 20 and 0 "
        "dollars over 0, 0, 1 and 0 visits in weeks 1, 2, 3 and 4. Takes up no offer in the next 30 days."
    )
    # The four are drawn as before, whether or not a fifth is.
    five = pairs.build(future, samples, granularities=[*NAMES, "whole"], **settings)
    four = five.filter(pl.col("granularity") != "whole").drop("answer_id")
    assert_frame_equal(four, build(future, samples).drop("answer_id"))


def test_an_empty_future_is_an_answer(futures: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    mine = build(*futures).filter(pl.col("sample") == 1)["answer"]
    assert mine.to_list() == [pairs.NOTHING[name].format(days=30) for name in NAMES]


def test_only_train_samples_and_their_futures(futures: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    """A future planted into a probe sample changes nothing; into a train sample it does."""
    future, samples = futures
    made = build(future, samples)
    assert set(made["sample"]) == {0, 1, 2}
    for sample, same in ((3, True), (1, False)):
        planted = future.with_columns(sample=pl.lit(sample, pl.Int64))
        assert build(pl.concat([future, planted]), samples).equals(made) is same


def test_the_draw_is_seeded_and_independent_of_row_order(futures: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    future, samples = futures
    made = build(future, samples, facts=2)
    shuffled = build(future.sample(fraction=1, shuffle=True, seed=1), samples.reverse(), facts=2)
    assert_frame_equal(made, shuffled)
    assert (
        len(
            {build(future, samples, seed, 2).filter(pl.col("sample") == 2)["answer"][0] for seed in range(20)}
        )
        > 3
    )


def test_equal_answers_share_an_id(futures: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    future, samples = futures
    future = future.filter(pl.col("sample") != 2)
    made = build(future, samples)
    assert made.group_by("answer").agg(pl.col("answer_id").n_unique())["answer_id"].to_list() == [1] * 8
    assert made["answer_id"].n_unique() == made["answer"].n_unique()
    assert pairs.collisions(made)["shared"].to_list() == pytest.approx([2 / 3] * 4)


def test_answers_are_short_sentences(futures: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    for answer in build(*futures)["answer"]:
        assert len(re.findall(r"[^\W\d]+|\d+|[^\w\s]", answer)) <= 30 and answer.endswith(".")
        assert sanitise(answer) == answer


def test_no_train_sample_is_an_error(futures: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    with pytest.raises(pairs.PairError, match="train_anchors"):
        build(futures[0], futures[1].filter(pl.col("split") == "probe"))
