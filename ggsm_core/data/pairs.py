"""Rule-based behaviour pairs (paper 3.1): a query about a user's future, and what happened as its answer.

The next ``future_days`` of a training sample are aggregated by action type or time bin into facts, and a
seeded subset of them is written down in one sentence. Granularities:

| name | aggregated by | facts |
| --- | --- | --- |
| categories | kind of purchase | spend, breadth, kinds bought (rare ones preferred: they tell users apart) |
| visits | visit | how many, first and last, longest gap, the usual store and hours |
| weeks | week | spend and visits |
| offers | kind of offer | coupons redeemed, campaigns, discounts, share bought from mailer and display |
| whole | all of these | the four sentences in one answer, four times as long |

A future without events is an answer too. Only ``train`` samples are looked at, so no answer knows a day on or
after the first probe anchor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import groupby
from math import floor, log10
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ggsm_core.data.events import part_of_week
from ggsm_core.progress import Progress

ROOM = 26
"""Words, digits and signs of a sentence at most: keeps it below 32 tokens of a BPE that knows its words."""

QUERIES = {
    "categories": "What will this user buy in the next {days} days?",
    "visits": "When and where will this user shop in the next {days} days?",
    "weeks": "How much will this user spend in each week of the next {days} days?",
    "offers": "Which offers will this user take up in the next {days} days?",
    "whole": "What will this user do in the next {days} days?",
}
NOTHING = {
    "categories": "Buys nothing in the next {days} days.",
    "visits": "No visit in the next {days} days.",
    "weeks": "Spends nothing in any week.",
    "offers": "Takes up no offer in the next {days} days.",
    "whole": "Does nothing in the next {days} days.",
}
_UNIT = re.compile(r"[^\W\d]+|\d|[^\w\s]")


class PairError(ValueError):
    """Samples that no pair can be made from."""


def build(
    future: pl.DataFrame,
    samples: pl.DataFrame,
    *,
    granularities: list[str],
    facts: int,
    seed: int,
    future_days: int,
) -> pl.DataFrame:
    """One pair for each train sample and granularity.

    ``future`` and ``samples`` are those of ``windows``; at most ``facts`` facts go into a sentence. Columns:
    sample, granularity, query, answer, answer_id (0.., equal for equal answers). The draw depends on ``seed``
    and on which events there are, not on the order of their rows. Raises ``PairError``.
    """
    train = samples.filter(pl.col("split") == "train").sort("sample")["sample"]
    if train.is_empty():
        raise PairError("samples: none has split train; check data.train_anchors and data.households")
    seen = future.filter(pl.col("sample").is_in(train.to_list()))
    parts = []
    for index, name in enumerate(QUERIES):
        if name not in granularities:
            continue
        rng = np.random.default_rng([seed, index])
        answers = _ANSWERS[name](seen, facts, rng, future_days)
        nothing = NOTHING[name].format(days=future_days)
        parts.append(
            pl.DataFrame(
                {
                    "sample": train,
                    "granularity": [name] * len(train),
                    "query": [QUERIES[name].format(days=future_days)] * len(train),
                    "answer": [answers.get(sample, nothing) for sample in train],
                }
            )
        )
    pairs = pl.concat(parts).sort("sample", maintain_order=True)
    return pairs.with_columns(answer_id=pl.col("answer").rank("dense").cast(pl.Int64) - 1)


def collisions(pairs: pl.DataFrame) -> pl.DataFrame:
    """How often an answer is not its sample's alone: granularity, pairs, answers (distinct), shared (share of
    pairs whose answer another pair has too). Identical answers are never negatives of each other."""
    return (
        pairs.with_columns(again=pl.len().over("answer_id") > 1)
        .group_by("granularity", maintain_order=True)
        .agg(pairs=pl.len(), answers=pl.col("answer_id").n_unique(), shared=pl.col("again").mean())
    )


def _categories(future: pl.DataFrame, facts: int, rng: np.random.Generator, days: int) -> dict[int, str]:
    kinds = (
        _bought(future)
        .with_columns(kind=pl.col("text").str.replace(r" \([^()]*\)$", ""))
        .group_by("sample", "kind")
        .agg(pl.len(), pl.col("amount").sum().round(2))
        .sort("sample", "kind")
    )
    # Weighted draw without replacement (Efraimidis and Spirakis 2006): frequent here, rare elsewhere.
    everyone = kinds["sample"].n_unique()
    weight = pl.col("len").sqrt() * (1 + everyone / pl.len().over("kind")).log()
    kinds = kinds.with_columns(key=pl.Series(rng.random(kinds.height)).log() / weight)
    spent = kinds.group_by("sample").agg(pl.col("amount").sum().round(2), pl.len())
    drawn = (
        kinds.sort("sample", "key", "kind", descending=[False, True, False])
        .group_by("sample", maintain_order=True)
        .agg(pl.col("kind").head(facts))
    )
    return {
        sample: _sentence(
            f"Buys {_count(breadth, 'kind')} for {_count(_about(amount), 'dollar')}:", names, joint=" "
        )
        for sample, names, amount, breadth in drawn.join(
            spent, on="sample", maintain_order="left"
        ).iter_rows()
    }


def _visits(future: pl.DataFrame, facts: int, rng: np.random.Generator, days: int) -> dict[int, str]:
    visits = future.filter(pl.col("modality") == "app").sort("sample", "offset", "hour", "item")
    table = visits.group_by("sample", maintain_order=True).agg(
        pl.len(),
        first=pl.col("offset").min() + 1,
        last=pl.col("offset").max() + 1,
        gap=pl.col("offset").diff().max(),
        place=pl.col("item").drop_nulls().mode().sort().first().str.replace("/", " "),
        hours=part_of_week(pl.col("weekday"), pl.col("hour")).mode().sort().first(),
    )
    answers = {}
    for sample, count, first, last, gap, place, hours in table.iter_rows():
        found = [f"from day {first} to day {last}", f"longest gap {_count(gap, 'day')}"]
        if count == 1:
            found = [f"on day {first}"]
        found.append(f"mostly {hours}s at {place}" if place else f"mostly {hours}s")
        answers[sample] = _sentence(f"{count} visits" if count > 1 else "One visit", _draw(found, facts, rng))
    return answers


def _weeks(future: pl.DataFrame, facts: int, rng: np.random.Generator, days: int) -> dict[int, str]:
    weeks = max(days // 7, 1)  # the last one takes the days that are left over
    key = ["sample", (pl.col("offset") // 7).clip(upper_bound=weeks - 1).alias("week")]
    spent = _bought(future).group_by(key).agg(spent=pl.col("amount").sum().round(2))
    visits = future.filter(pl.col("modality") == "app").group_by(key).agg(visits=pl.len())
    both = (
        spent.join(visits, on=["sample", "week"], how="full", coalesce=True)
        .fill_null(0)
        .sort("sample", "week")
    )
    answers = {}
    for sample, rows in groupby(both.iter_rows(), key=itemgetter(0)):
        found = {week: (_about(amount), count) for _, week, amount, count in rows}
        drawn = [int(week) for week in _draw([str(week) for week in range(weeks)], facts, rng)]
        dollars, counts = (_list(found.get(week, (0, 0))[i] for week in drawn) for i in (0, 1))
        visits_in = "visit in week" if counts == "1" else "visits in week"
        several = "s" * (len(drawn) > 1)
        named = _list(week + 1 for week in drawn)
        answers[sample] = f"Spends {dollars} dollars over {counts} {visits_in}{several} {named}."
    return answers


def _offers(future: pl.DataFrame, facts: int, rng: np.random.Generator, days: int) -> dict[int, str]:
    counted = (
        future.filter(pl.col("modality") == "minipro")
        .group_by("sample", "text")
        .len()
        .sort("sample", "text", descending=[False, True])
    )
    discounts = (
        future.filter((pl.col("modality") == "bill") & pl.col("item").is_null())
        .group_by("sample", "text")
        .agg(pl.col("amount").sum().round(2))
        .sort("sample", "text")
    )
    spent = _bought(future).group_by("sample").agg(total=pl.col("amount").sum().round(2))
    display, mailer = (pl.col("item").str.split("/").list.get(i, null_on_oob=True) != "0" for i in (0, 1))
    shares = (
        future.filter(pl.col("modality") == "spm")
        .group_by("sample")
        .agg(
            *(
                pl.col("amount").filter(on).sum().round(2).alias(n)
                for n, on in (("mailer", mailer), ("display", display))
            )
        )
        .join(spent.filter(pl.col("total") > 0), on="sample")
        .sort("sample")
    )
    found: dict[int, list[str]] = {}
    for sample, text, n in counted.iter_rows():
        found.setdefault(sample, []).append(text if n == 1 else f"{text} {n} times")
    for sample, mailer_amount, _, total in shares.iter_rows():
        found.setdefault(sample, []).append(f"{_percent(mailer_amount / total)} bought from the mailer")
    for sample, text, amount in discounts.iter_rows():
        found.setdefault(sample, []).append(f"{_about(amount)} dollars of {text}")
    for sample, _, display_amount, total in shares.iter_rows():
        found.setdefault(sample, []).append(f"{_percent(display_amount / total)} bought from displays")
    return {
        sample: _sentence("", _draw(texts, facts, rng), joint="") for sample, texts in sorted(found.items())
    }


_SENTENCES = {"categories": _categories, "visits": _visits, "weeks": _weeks, "offers": _offers}


def _whole(future: pl.DataFrame, facts: int, rng: np.random.Generator, days: int) -> dict[int, str]:
    told = {name: tell(future, facts, rng, days) for name, tell in _SENTENCES.items()}
    return {
        sample: " ".join(told[name].get(sample, NOTHING[name].format(days=days)) for name in told)
        for sample in sorted(set().union(*told.values()))
    }


_ANSWERS: dict[str, Callable[[pl.DataFrame, int, np.random.Generator, int], dict[int, str]]] = {
    **_SENTENCES,
    "whole": _whole,
}


def _bought(future: pl.DataFrame) -> pl.DataFrame:
    return future.filter((pl.col("modality") == "bill") & pl.col("item").is_not_null())


def _draw(found: list[str], facts: int, rng: np.random.Generator) -> list[str]:
    """``facts`` of them at random, in their order."""
    if len(found) <= facts:
        return found
    return [found[i] for i in sorted(rng.choice(len(found), facts, replace=False))]


def _about(amount: float) -> int:
    """To one significant digit: near amounts make the same answer."""
    if abs(amount) < 1:
        return 0
    unit = 10 ** floor(log10(abs(amount)))
    return round(amount / unit) * unit


def _count(number: int, noun: str) -> str:
    """``1 day``, ``2 days``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def _percent(share: float) -> str:
    """In steps of 5."""
    return f"{round(20 * share) * 5} percent"


def _list(numbers: Iterable[int]) -> str:
    *front, last = map(str, numbers)
    return f"{', '.join(front)} and {last}" if front else last


def _sentence(head: str, facts: Iterable[str], joint: str = ", ") -> str:
    """The facts that fit into ``ROOM``, as one sentence."""
    text, room = head, ROOM - len(_UNIT.findall(head))
    for fact in facts:
        need = len(_UNIT.findall(fact)) + 1
        if need > room:
            continue
        text += (joint if text == head else ", ") + fact
        room -= need
    return f"{text[:1].upper()}{text[1:]}."


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``pairs``: writes pairs.parquet into ``out``."""
    progress(0, 1, "aggregating the futures of the train samples")
    windows = inputs["windows"]
    pairs = build(
        pl.read_parquet(windows / "future.parquet"),
        pl.read_parquet(windows / "samples.parquet"),
        granularities=params.pairs.granularities,
        facts=params.pairs.facts,
        seed=params.pairs.seed,
        future_days=params.data.future_days,
    )
    pairs.write_parquet(out / "pairs.parquet", compression="lz4")
    shared = collisions(pairs).select("granularity", "shared").iter_rows()
    progress(1, 1, "answers shared by several pairs: " + ", ".join(f"{n} {s:.0%}" for n, s in shared))
