"""Baselines: features of the history window alone, for any event log."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ggsm_core import evaluation
from ggsm_core.baselines import features as stage
from ggsm_core.baselines import sequence
from ggsm_core.baselines.base import Baseline, BaselineError, Histories, scatter
from ggsm_core.data.events import EPOCH, SCHEMA, ZONE
from ggsm_core.sections import Data, Evaluation, Peers

ANCHORS = {"train": 90, "probe": 240}
PEERS = Peers(hidden=8, layers=1, heads=2, epochs=2, batch_size=16)
SYSTEMS: dict[str, Callable[[], Baseline[Histories, Histories]]] = {
    **{name: system for name, (system, _) in stage.SYSTEMS.items()},
    **{name: partial(system, PEERS, 0, lambda **metrics: None) for name, system in sequence.SYSTEMS.items()},
}
KINDS = {
    "bill": ["soft drinks (grocery)", "beef (meat)", "roses (floral)", "loyalty discount"],
    "app": ["visit to store 1 on a weekday evening"],
    "spm": ["front end cap display, not in the mailer"],
    "minipro": ["campaign of type A received"],
}


def event(user: str, day: float, modality: str, text: str, amount: float | None) -> tuple:
    """One row of an event log, ``day`` days after local midnight of day 0."""
    midnight = datetime(EPOCH.year, EPOCH.month, EPOCH.day, tzinfo=ZoneInfo(ZONE))
    return user, midnight + timedelta(days=day), modality, text, amount, None, False


def log(users: int = 60) -> list[tuple]:
    """A year of random events of every modality, and one fact, for each user."""
    rng = np.random.default_rng(0)
    rows = []
    for k in range(users):
        for day in rng.uniform(0, 360, 60):
            modality = str(rng.choice(list(KINDS), p=[0.5, 0.3, 0.1, 0.1]))
            text, amount = str(rng.choice(KINDS[modality])), float(rng.exponential(9))
            rows.append(event(f"u{k:02d}", day, modality, text, amount))
        rows.append((f"u{k:02d}", None, "tabular", f"age group {k % 3}", None, None, False))
    return rows


def write(folder: Path, rows: list[tuple], users: int = 60) -> Path:
    """A windows run: the log, two samples a user (train and probe)."""
    folder.mkdir(exist_ok=True)
    pl.DataFrame(rows, schema=SCHEMA, orient="row").write_parquet(folder / "events.parquet")
    samples = [
        (2 * k + i, f"u{k:02d}", anchor, split)
        for k in range(users)
        for i, (split, anchor) in enumerate(ANCHORS.items())
    ]
    types = {"sample": pl.Int64, "user": pl.String, "anchor": pl.Int32, "split": pl.String}
    pl.DataFrame(samples, schema=types, orient="row").write_parquet(folder / "samples.parquet")
    return folder


def features(name: str, folder: Path) -> np.ndarray:
    system = SYSTEMS[name]().fit(Histories.read(folder, "train", 90, 30))
    return system.embed(Histories.read(folder, "probe", 90))


@pytest.mark.parametrize("name", SYSTEMS)
def test_only_the_history_window_reaches_the_features(name: str, tmp_path: Path) -> None:
    """An event on the anchor day or later, or before the window, changes nothing, however large. Negative
    control: on the last or the first day of the window it changes that user's features and no other's."""
    rows = log()
    before = features(name, write(tmp_path / "w", rows))
    anchor = ANCHORS["probe"]
    for modality in KINDS:
        days = (anchor, anchor + 5.7, anchor - 90.01)
        outside = [event("u07", day, modality, KINDS[modality][0], 999.0) for day in days]
        assert np.allclose(features(name, write(tmp_path / "w", rows + outside)), before, atol=1e-6)
    for day in (anchor - 0.01, anchor - 90):
        inside = [event("u07", day, "bill", "beef (meat)", 999.0)]
        after = features(name, write(tmp_path / "w", rows + inside))
        moved = ~np.isclose(after, before, atol=1e-6)  # another longest sequence rounds elsewhere
        assert np.flatnonzero(moved.any(axis=1)).tolist() == [7]


@pytest.mark.parametrize("name", SYSTEMS)
def test_features_do_not_depend_on_the_order_of_the_log(name: str, tmp_path: Path) -> None:
    rows = log()
    shuffled = [rows[k] for k in np.random.default_rng(0).permutation(len(rows))]
    first = features(name, write(tmp_path / "a", rows))
    assert np.isfinite(first).all()
    assert np.array_equal(first, features(name, write(tmp_path / "b", shuffled)))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_user_without_events_gets_a_row_of_its_own(name: str, tmp_path: Path) -> None:
    rows = [row for row in log() if row[0] != "u05"]
    got = features(name, write(tmp_path / "w", rows))
    assert len(got) == 60 and np.isfinite(got).all()
    assert not np.array_equal(got[5], got[4])


def test_rfm_counts_what_it_says(tmp_path: Path) -> None:
    rows = [
        event("u00", 240 - 3, "bill", "beef (meat)", 10.0),
        event("u00", 240 - 3, "bill", "soft drinks (grocery)", 2.0),  # the same visit
        event("u00", 240 - 3, "bill", "loyalty discount", 5.0),  # not spent
        event("u00", 240 - 20, "app", "visit to store 1", 17.0),  # days since the last visit, not dollars
        event("u00", 240 - 80, "bill", "beef (meat)", 4.0),
        event("u00", 240 - 1, "minipro", "campaign of type A received", 30.0),  # nothing the user did
    ]
    got = features("rfm", write(tmp_path / "w", rows, users=2))
    assert np.expm1(got[0]) == pytest.approx([3, 80, 1, 2, 3, 1, 2, 3, 12, 12, 16])
    assert np.expm1(got[1]) == pytest.approx([90, 90, *[0] * 9])


def test_handmade_counts_what_it_says(tmp_path: Path) -> None:
    """Column by column on a log so small that all of them can be listed."""
    rows = [
        event("u00", 80.5, "bill", "beef (meat)", 1.0),  # training period: decides which texts count
        event("u00", 240 - 3 + 0.5, "bill", "beef (meat)", 10.0),
        event("u00", 240 - 10 + 0.5, "bill", "beef (meat)", 2.0),
        event("u00", 240 - 60 + 0.5, "bill", "unheard of (meat)", 4.0),
        ("u00", None, "tabular", "homeowner", None, None, False),
    ]
    got = features("handmade", write(tmp_path / "w", rows, users=2))[0].tolist()
    totals = [1, 2, 3, 10, 12, 16, 1, 2, 3, 2]  # events, amounts, active days; two texts
    # day 237 is a Saturday, 230 a Saturday, 180 a Friday; all at noon
    weekdays, bands = [0, 0, 0, 0, 1, 2, 0], [0, 0, 0, 3, 0, 0]
    assert got == [*totals, 3, 60, 2, 2, 1, 16, *weekdays, *bands, 1]


def test_handmade_128_turns_the_scaled_features_and_loses_nothing_where_they_are_few(tmp_path: Path) -> None:
    train = Histories.read(write(tmp_path / "w", log()), "train", 90)
    varied = SYSTEMS["handmade_linear"]().fit(train).embed(train).std(axis=0) > 1e-12
    covariance = np.cov(SYSTEMS["handmade_128"]().fit(train).embed(train), rowvar=False, ddof=0)
    variances = np.diag(covariance)
    assert variances.sum() == pytest.approx(varied.sum())  # each feature had variance 1
    assert (np.diff(variances) <= 1e-9).all() and np.abs(covariance - np.diag(variances)).max() < 1e-9


def test_handmade_learns_its_columns_from_the_training_period_alone(tmp_path: Path) -> None:
    rows = log()
    before = features("handmade", write(tmp_path / "w", rows))
    later = [event(f"u{k:02d}", 200, "bill", "novelty (toys)", 1.0) for k in range(60)]
    assert features("handmade", write(tmp_path / "w", rows + later)).shape == before.shape
    earlier = [event(f"u{k:02d}", 50, "bill", "novelty (toys)", 1.0) for k in range(60)]
    assert features("handmade", write(tmp_path / "w", rows + earlier)).shape[1] > before.shape[1]


@given(st.dictionaries(st.tuples(st.integers(0, 4), st.sampled_from("abcz")), st.integers(1, 9), max_size=12))
@settings(deadline=None, max_examples=40)
def test_scatter_puts_every_known_key_in_its_place(cells: dict[tuple[int, str], int]) -> None:
    types = {"row": pl.UInt32, "key": pl.String, "value": pl.Int64}
    frame = pl.DataFrame([(r, k, v) for (r, k), v in cells.items()], schema=types, orient="row")
    want = [[cells.get((r, k), -1) for k in "abc"] for r in range(5)]
    assert scatter(frame, "key", ["a", "b", "c"], 5, empty=-1).tolist() == want


def test_a_short_history_and_a_log_with_two_modalities_will_do(tmp_path: Path) -> None:
    rows = [row for row in log() if row[2] in ("app", "search")]
    folder = write(tmp_path / "w", rows)
    for system in SYSTEMS.values():
        short = Histories.read(folder, "train", 5, 3)
        assert short.events["before"].max() <= 5 and short.future["before"].min() > -3
        assert len(system().fit(short).embed(short)) == 60


def habit(folder: Path, *first_days: int) -> Path:
    """Half of the users have more events from each of these days on; the label says who."""
    eager = [
        event(f"u{k:02d}", day + j, "bill", "beef (meat)", 5.0)
        for k in range(45)
        for day in first_days
        for j in range(9)
    ]
    write(folder, log(90) + eager, users=90)
    labels = [int(k < 90) for k in range(180)]
    pl.DataFrame({"sample": range(180), "task": labels}).write_parquet(folder / "labels.parquet")
    return folder


@pytest.mark.parametrize("name", stage.SYSTEMS)
def test_stage_finds_a_habit(name: str, tmp_path: Path) -> None:
    folder = habit(tmp_path / "w", 200)
    params = SimpleNamespace(name=name, data=Data(), evaluation=Evaluation(bootstrap=100))
    said: list[str] = []
    stage.run(params, {"windows": folder}, tmp_path, lambda done, total, message: said.append(message))
    table = pl.read_csv(tmp_path / "auc.csv")
    assert table["recipe"].to_list() == [name] and table["n"].to_list() == [90]
    assert table["auc"][0] > 0.9
    assert said[0] == f"{name}: features"


@pytest.mark.slow
@pytest.mark.parametrize("name", sequence.SYSTEMS)
def test_a_sequence_model_finds_a_habit(name: str, tmp_path: Path) -> None:
    """Embedded and probed by the two stages. Who has the habit has it in the training window too: CoLES
    learns what tells users apart, and nothing else."""
    folder = habit(tmp_path / "w", 60, 200)
    peers = PEERS.model_copy(update={"hidden": 16, "epochs": 12, "learning_rate": 5e-3})
    params = SimpleNamespace(
        recipe=name, seed=3, data=Data(), peers=peers, evaluation=Evaluation(bootstrap=100)
    )
    out = tmp_path / "out"
    out.mkdir()
    sequence.run(params, {"windows": folder}, out, lambda *_: None)
    evaluation.run(params, {"windows": folder, "sequence": out}, out, lambda *_: None)
    table = pl.read_csv(out / "auc.csv")
    assert table.select("recipe", "seed", "n").rows() == [(name, 3, 90)]
    assert table["auc"][0] > 0.8
    how = json.loads((out / "system.json").read_text())
    lines = pl.read_ndjson(out / "metrics.jsonl")
    assert how["name"] == name and how["dimension"] == 16 and how["epochs"] == len(lines)
    assert lines["held_out_loss"].arg_min() == how["best_epoch"] - 1


def test_only_training_samples_have_a_future(tmp_path: Path) -> None:
    folder = write(tmp_path / "w", log())
    train = Histories.read(folder, "train", 90, 30)
    assert train.future["before"].max() == 0 and train.future["before"].min() == -29
    assert train.events["before"].min() == 1
    assert Histories.read(folder, "train", 90).future.is_empty()
    with pytest.raises(BaselineError, match="only train has a future"):
        Histories.read(folder, "probe", 90, 30)


def test_an_unknown_baseline_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'oracle' is no baseline; allowed: rfm, handmade"):
        stage.run(SimpleNamespace(name="oracle"), {}, tmp_path, lambda *_: None)
