"""A user's records as a language model may see them, and as its answers are checked against.

What is shown is made from a sample's records alone: no number of a household, a product or a basket is in
them, and the code of a place becomes a letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl

from ggsm_core.data import windows
from ggsm_core.template import KEPT, MODALITIES, Record, describe

PLACES = "app"
"""The modality whose texts hold codes of places."""
_CODE = re.compile(r"\b\w*\d\w*\b")


@dataclass(frozen=True)
class Fact:
    """One record: what it is about, without its department, and all of it in words."""

    name: str
    told: str


@dataclass(frozen=True)
class History:
    """One sample: ``text`` is shown, ``facts`` (all records that are stored) say what is true."""

    sample: int
    text: str
    facts: tuple[Fact, ...]
    bought: tuple[str, ...]  # names of the kinds bought


def read(folder: Path, samples: Iterable[int], records: int) -> list[History]:
    """The histories of ``samples``, in their order, from a windows run; ``records`` shown per modality."""
    wanted = list(samples)
    table = pl.read_parquet(folder / "records.parquet").filter(pl.col("sample").is_in(wanted))
    shown, stored = (
        dict(windows.users(table, SimpleNamespace(**dict.fromkeys(MODALITIES, limit))))
        for limit in (records, KEPT)
    )
    return [_history(sample, shown[sample].records, stored[sample].records) for sample in wanted]


def _history(sample: int, shown: Any, stored: Any) -> History:
    letters: dict[str, str] = {}
    lines = []
    for name in reversed(MODALITIES):  # purchases last: a small model answers from what it has just read
        if found := shown.get(name, ()):
            lines.append(f"{name}: " + "; ".join(_fact(record, name, letters).told for record in found))
    facts = [_fact(record, name, letters) for name in MODALITIES for record in stored.get(name, ())]
    bought = [kind(record.text) for record in stored.get("bill", ())]
    return History(sample, "\n".join(lines), tuple(facts), tuple(bought))


def _fact(record: Record, modality: str, letters: dict[str, str]) -> Fact:
    if modality == PLACES:
        named = _CODE.sub(lambda code: letters.setdefault(code[0], _letter(len(letters))), record.text)
        record = replace(record, text=named)
    return Fact(kind(record.text), describe(record, modality))


def _letter(number: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    name = ""
    while number >= 0:
        name = chr(ord("A") + number % 26) + name
        number = number // 26 - 1
    return name


def kind(text: str) -> str:
    """The name of a kind of purchase without its department: ``soft drinks (grocery)`` -> ``soft drinks``."""
    return re.sub(r" \([^()]*\)$", "", text)


def catalogue(folder: Path, samples: Iterable[int]) -> list[str]:
    """Every kind that was bought in any of ``samples``, sorted."""
    bought = (
        pl.scan_parquet(folder / "records.parquet")
        .filter(pl.col("sample").is_in(list(samples)) & (pl.col("modality").cast(pl.String) == "bill"))
        .select(pl.col("text").unique().sort())
        .collect()
    )
    return sorted({kind(text) for text in bought["text"]})
