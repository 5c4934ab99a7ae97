"""A second, barer data set through the same rooms: events, windows, pairs, sequences."""

from __future__ import annotations

from collections import defaultdict
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest

from ggsm_core.backbone import train_tokenizer
from ggsm_core.data import cdnow, pairs, privacy, tasks, windows
from ggsm_core.data.events import EPOCH, validate
from ggsm_core.sections import Data, Template
from ggsm_core.template import encode_answer, encode_user
from ggsm_core.tokens import Sequences

pytestmark = pytest.mark.skipif(find_spec("lifetimes") is None, reason="needs pip install Lifetimes==0.11.3")
FIRST = (date(1997, 1, 1) - EPOCH).days
DATA = Data(train_anchors=[FIRST + 90, FIRST + 180], probe_anchors=[FIRST + 240, FIRST + 300])


@pytest.fixture(scope="module")
def events() -> pl.DataFrame:
    return validate(cdnow.events(cdnow.purchases()))


@pytest.fixture(scope="module")
def bought() -> dict[str, list[tuple[int, int, float]]]:
    """User -> day, CDs, dollars of each purchase, read without the adapter."""
    spec = find_spec("lifetimes")
    assert spec is not None and spec.submodule_search_locations
    table = defaultdict(list)
    file = Path(spec.submodule_search_locations[0], "datasets/CDNOW_master.txt")
    for line in file.read_text(encoding="utf-8").splitlines()[1:]:
        user, day, cds, dollars = line.split()
        day = date(int(day[:4]), int(day[4:6]), int(day[6:]))
        name = privacy.pseudonym(user, privacy.public_salt())
        table[name].append(((day - EPOCH).days, int(cds), float(dollars)))
    return table


def test_events_count_as_the_file_does(
    events: pl.DataFrame, bought: dict[str, list[tuple[int, int, float]]]
) -> None:
    purchases = cdnow.purchases()
    assert purchases.height == 69_659 == sum(map(len, bought.values()))
    assert purchases["user"].n_unique() == 23_570 == len(bought)
    assert purchases["cds"].sum() == sum(n for rows in bought.values() for _, n, _ in rows)
    bills, visits = (events.filter(pl.col("modality") == name) for name in ("bill", "app"))
    assert bills.height == 69_659
    assert bills["amount"].sum() == pytest.approx(sum(d for rows in bought.values() for *_, d in rows))
    assert visits.height == sum(len({day for day, *_ in rows}) for rows in bought.values())


def test_samples_and_labels_are_those_of_a_slow_count(
    events: pl.DataFrame, bought: dict[str, list[tuple[int, int, float]]]
) -> None:
    samples = windows.samples(events, DATA)
    expected = {}
    for user, rows in bought.items():
        days = {day for day, *_ in rows}
        for anchor in (*DATA.train_anchors, *DATA.probe_anchors):
            if sum(anchor - 90 <= day < anchor for day in days) >= windows.MIN_VISITS:
                expected[user, anchor] = int(any(anchor <= day < anchor + 30 for day in days))
    labels = tasks.comes_back(samples, windows.future(events, samples, 30))
    found = samples.join(labels, on="sample").select("user", "anchor", "comes_back").rows()
    assert {(user, anchor): label for user, anchor, label in found} == expected
    assert len(found) == len(expected) > 1000
    assert set(samples["split"]) == {"train", "probe"}


def test_windows_and_pairs_become_sequences(events: pl.DataFrame) -> None:
    samples = windows.samples(events, DATA)
    few = windows.draw_households(samples, 200)
    made = pairs.build(
        windows.future(events, few, 30), few,
        granularities=["categories", "visits", "weeks"], facts=6, seed=0, future_days=30,
    )  # fmt: skip
    users = dict(windows.users(windows.history(events, few, 90), Template()))
    assert set(users) == set(few["sample"])
    tokenizer = train_tokenizer(made["answer"].unique().sort().to_list(), 600)
    limits = Template(max_answer_tokens=48)
    answers = [encode_answer(text, tokenizer, max_tokens=limits.max_answer_tokens) for text in made["answer"]]
    histories = [
        encode_user(users[sample], tokenizer, query, max_tokens=limits.max_user_tokens)
        for sample, query in made.select("sample", "query").iter_rows()
    ]
    assert len(Sequences.of(histories)) == len(Sequences.of(answers)) == made.height > 200
    assert all(set(user.records) == {"bill", "app", "tabular"} for user in users.values())
    assert any("cd" in answer for answer in made["answer"])
