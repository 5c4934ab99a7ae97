"""What no person did says so wherever it goes: data, template, sequences, tables of results."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from ggsm_core import comparison, evaluation, sections
from ggsm_core.backbone import train_tokenizer
from ggsm_core.data import simulate, windows
from ggsm_core.data.events import DAY, validate
from ggsm_core.template import encode_user, render
from ggsm_core.tokens import Sequences, write

EVALUATION = sections.Evaluation(folds=3, bootstrap=100)


@pytest.fixture
def log() -> pl.DataFrame:
    """200 days of purchases and visits of 6 users, and searches made from them."""
    rng = np.random.default_rng(0)
    kinds = [f"kind {i}" for i in range(12)]
    rows = [
        {"user": f"u{user}", "time": datetime(2017, 1, 1, 12, tzinfo=UTC) + timedelta(days=day)}
        | {
            "modality": modality,
            "text": str(rng.choice(kinds)),
            "amount": 2.0,
            "item": "i",
            "simulated": False,
        }
        for user in range(6)
        for day in range(200)
        for modality in ("bill", "app")
        if rng.random() < 0.5
    ]
    events = validate(pl.DataFrame(rows))
    return validate(pl.concat([events, simulate.searches(events)]))


def samples(log: pl.DataFrame) -> pl.DataFrame:
    return windows.samples(log, sections.Data(train_anchors=[90], probe_anchors=[120, 150]))


def test_searches_are_of_what_the_same_window_holds(log: pl.DataFrame) -> None:
    """Each sample's simulated searches against its own purchases; a search of a later purchase is in none."""
    found = samples(log)
    days = log.with_columns(day=DAY).join(found, on="user")
    days = days.filter(pl.col("day").is_between(pl.col("anchor") - 90, pl.col("anchor") - 1))
    bought = {
        (row["sample"], f"search for {row['text']}")
        for row in days.filter(pl.col("modality") == "bill").rows(named=True)
    }
    records = windows.history(log, found, 90).filter(pl.col("modality") == "search")
    searched = set(records.select("sample", "text").rows())
    assert searched and searched <= bought
    assert records["simulated"].all()
    assert windows.future(log, found, 30).filter(pl.col("modality") == "search").is_empty()


def test_the_seed_decides_and_only_purchases_are_searched(log: pl.DataFrame) -> None:
    real = log.filter(~pl.col("simulated"))
    first, again, other = (simulate.searches(real, seed) for seed in (0, 0, 1))
    assert first.equals(again) and not first.equals(other)
    assert first["simulated"].all() and set(first["modality"].cast(pl.String)) == {"search"}


def test_template_and_sequences_carry_the_flag(log: pl.DataFrame, tmp_path: Path) -> None:
    users = [user for _, user in windows.users(windows.history(log, samples(log), 90), sections.Template())]
    for user in users:
        assert all(record.simulated for record in user.records.get("search", ()))
        assert not any(record.simulated for name in ("bill", "app") for record in user.records[name])
        if "search" in user.records:
            (line,) = (line for line in render(user).split("\n") if line.startswith("<search>"))
            assert line.count("simulated") == len(user.records["search"])
    tokenizer = train_tokenizer(log["text"].unique().sort().to_list(), 600)
    encoded = [encode_user(user, tokenizer, max_tokens=96) for user in users]
    write(tmp_path, "users", encoded)
    stored = Sequences.load(tmp_path, "users")
    flags = [[record.simulated for record in stored[i].records] for i in range(len(stored))]
    assert flags == [[record.simulated for record in one.records] for one in encoded]
    assert any(map(any, flags))


@pytest.mark.parametrize("simulated", [True, False])
def test_every_table_of_results_says_so_or_has_no_such_column(tmp_path: Path, simulated: bool) -> None:
    rng = np.random.default_rng(0)
    table = pl.DataFrame({"sample": range(240), "user": np.repeat(range(80), 3), "split": "probe"})
    table = table.with_columns(pl.col("user").cast(pl.String))
    if simulated:
        table = table.with_columns(simulated=pl.lit(True))
    folders = {"windows": tmp_path / "windows", "probe:causal:0": tmp_path / "causal"}
    folders["probe:ggsm:0"] = tmp_path / "ggsm"
    for folder in folders.values():
        folder.mkdir()
    table.write_parquet(folders["windows"] / "samples.parquet")
    labels = pl.DataFrame({"sample": range(240), "a": rng.integers(0, 2, 240), "b": rng.integers(0, 2, 240)})
    labels.write_parquet(folders["windows"] / "labels.parquet")
    for name in ("causal", "ggsm"):
        evaluation.evaluate(
            rng.normal(size=(240, 3)), np.arange(240), folders["windows"], tmp_path / name,
            recipe=name, seed=0, evaluation=EVALUATION, progress=lambda *_: None,
        )  # fmt: skip
    (tmp_path / "out").mkdir()
    comparison.run(SimpleNamespace(evaluation=EVALUATION), folders, tmp_path / "out", lambda *_: None)
    own = ["causal/auc.csv", "causal/labels.csv"]
    together = ["auc", "rows", "differences", "covariance", "labels"]
    written = [tmp_path / path for path in (*own, *(f"out/{name}.csv" for name in together))]
    for path in written:
        found = pl.read_csv(path)
        assert ("simulated" in found.columns) is simulated, path.name
        assert not simulated or found["simulated"].all()
    assert ("simulated" in pl.read_parquet_schema(tmp_path / "ggsm" / "scores.parquet")) is simulated


@pytest.mark.slow
def test_the_stage_marks_its_samples(tmp_path: Path) -> None:
    data = sections.Data(search="simulated", households=60)
    windows.run(SimpleNamespace(data=data), {}, tmp_path, lambda *_: None)
    assert pl.read_parquet(tmp_path / "samples.parquet")["simulated"].all()
    events = pl.read_parquet(tmp_path / "events.parquet")
    assert set(events.filter("simulated")["modality"].cast(pl.String)) == {"search"}
