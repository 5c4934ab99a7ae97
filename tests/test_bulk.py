"""A whole log as templates: pure, streamed, and the same bytes under Ray."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from ggsm_core.data import bulk, made_up, windows
from ggsm_core.data.events import EPOCH, ZONE, EventError, validate
from ggsm_core.sections import Template
from ggsm_core.template import render

SETTINGS = {"anchor": date(2017, 7, 1), "history_days": 90, "template": Template()}


def log(users: int = 60) -> pl.DataFrame:
    return made_up.events(users, 30).with_columns(pl.col("time").dt.replace_time_zone(ZONE))


def write(events: pl.DataFrame, path: Path) -> Path:
    events.write_parquet(path)
    return path


def test_the_made_up_file_is_what_its_generator_makes() -> None:
    found = pl.read_parquet(made_up.FILE)
    assert_frame_equal(found, made_up.events(made_up.USERS))
    assert made_up.FILE.stat().st_size < 200_000
    assert found["user"].str.starts_with("made-up-").all()


def test_streamed_texts_are_those_of_each_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = log()
    monkeypatch.setattr(bulk, "ROWS", 37)
    asked = Template(query="What next?")
    bulk.local(write(events, tmp_path / "log"), tmp_path / "texts", **(SETTINGS | {"template": asked}))
    found = dict(pl.read_parquet(tmp_path / "texts").iter_rows())
    assert list(found) == events["user"].unique().sort().to_list()
    day = (date(2017, 7, 1) - EPOCH).days
    for user, text in found.items():
        mine = validate(events.filter(pl.col("user") == user))
        sample = pl.DataFrame({"sample": [0], "user": [user], "anchor": [day]}).cast({"anchor": pl.Int32})
        (made,) = dict(windows.users(windows.history(mine, sample, 90), Template())).values()
        assert text == render(made, "What next?")


def test_order_and_company_change_nothing() -> None:
    events = log()
    whole = pl.DataFrame(bulk.templates(events.to_arrow(), **SETTINGS))
    shuffled = events.sample(fraction=1, shuffle=True, seed=1)
    assert whole.equals(pl.DataFrame(bulk.templates(shuffled.to_arrow(), **SETTINGS)))
    some = whole["user"].gather_every(3).to_list()
    alone = bulk.templates(events.filter(pl.col("user").is_in(some)).to_arrow(), **SETTINGS)
    assert whole.filter(pl.col("user").is_in(some)).equals(pl.DataFrame(alone))


def test_a_user_without_records_has_no_text(tmp_path: Path) -> None:
    day = pl.col("time").dt.date()
    first = pl.col("user") == pl.col("user").min()
    events = log(3).filter(pl.when(first).then(day < date(2017, 7, 1)).otherwise(day >= date(2017, 7, 1)))
    bulk.local(write(events, tmp_path / "log"), tmp_path / "texts", **SETTINGS)
    assert pl.read_parquet(tmp_path / "texts")["text"].is_null().to_list() == [False, True, True]


@pytest.mark.parametrize(
    ("more", "rows", "said"),
    [
        ({"anchor": EPOCH}, 99, "2016-10-03 to 2016-12-31; .*log has 2017-"),
        ({"history_days": 0}, 99, "history_days: 0"),
        ({"history_days": -5}, 99, "history_days: -5"),
        ({}, 0, "log: holds not one event"),
    ],
)
def test_a_log_without_any_text_is_refused(
    tmp_path: Path, more: dict[str, Any], rows: int, said: str
) -> None:
    with pytest.raises(EventError, match=said):
        bulk.local(write(log(3).head(rows), tmp_path / "log"), tmp_path / "texts", **(SETTINGS | more))
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_the_output_is_neither_the_input_nor_a_folder(tmp_path: Path) -> None:
    path = write(log(3), tmp_path / "log")
    (tmp_path / "folder").mkdir()
    for engine in (bulk.local, bulk.on_ray):
        with pytest.raises(EventError, match=r"--out: .*folder is a folder"):
            engine(path, tmp_path / "folder", **SETTINGS)
        with pytest.raises(EventError, match=r"--out: .* is the input"):
            engine(path, path, **SETTINGS)
    assert pl.read_parquet(path).equals(log(3))


def test_no_user_is_cut_in_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = log()
    path = write(events, tmp_path / "log")
    for rows in (1, 7, 31, 10_000):
        monkeypatch.setattr(bulk, "ROWS", rows)
        parts = [pl.DataFrame(table) for table in bulk.whole_users(path)]
        assert_frame_equal(pl.concat(parts), pl.read_parquet(path))
        assert sum(part["user"].n_unique() for part in parts) == events["user"].n_unique()


def test_a_log_out_of_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "ROWS", 11)
    for events in (log(9).reverse(), pl.concat([log(9), log(9).head(5)])):
        with pytest.raises(EventError, match="not sorted by user"):
            bulk.local(write(events, tmp_path / "log"), tmp_path / "texts", **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


@pytest.mark.parametrize("engine", [bulk.local, bulk.on_ray])
def test_a_bad_row_far_down_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: Any
) -> None:
    monkeypatch.setattr(bulk, "ROWS", 11)
    monkeypatch.setattr(bulk, "templates", None)  # no user is rendered
    events = log(9).with_row_index("line", 1)
    bad = pl.col("line") == len(events) - 3
    events = events.with_columns(text=pl.when(~bad).then("text")).drop("line")
    with pytest.raises(
        EventError, match=rf"1 of {len(events)} rows .*(\n.*)?line {len(events) - 3}: text: null"
    ):
        engine(write(events, tmp_path / "log"), tmp_path / "texts", **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "texts"
    command = [str(write(log(5), tmp_path / "log")), "--out", str(out), "--anchor", "2017-07-01"]
    assert bulk.main(command) == 0 and pq.read_metadata(out).num_rows == 5
    write(log(5).with_columns(amount=float("nan")), tmp_path / "log")
    assert bulk.main(command) == 1 and "amount: not finite" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bulk.main([*command[:-1], "2017-02-30"])
    assert "--anchor: '2017-02-30' is no day of the calendar" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "days"), [([], 90), (["--profile"], 30), (["--profile", "--history-days", "60"], 60)]
)
def test_the_history_is_as_long_as_the_profiles(tmp_path: Path, more: list[str], days: int) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("{name: mine, data: {history_days: 30, breakdowns: true}}")
    out, expected = tmp_path / "texts", tmp_path / "expected"
    path = write(log(5), tmp_path / "log")
    more = [*more[:1], str(profile), *more[1:]] if more else []
    assert bulk.main([str(path), "--out", str(out), "--anchor", "2017-07-01", *more]) == 0
    bulk.local(path, expected, **(SETTINGS | {"history_days": days, "breakdowns": bool(more)}))
    assert out.read_bytes() == expected.read_bytes()


LATE = "The current node timed out during startup. This could happen because ..."


@pytest.mark.parametrize(
    ("message", "failing", "tried", "starts"),
    [(LATE, 1, 2, True), (LATE, bulk.TRIES, bulk.TRIES, False), ("no room", 1, 1, False)],
)
def test_ray_may_be_late_but_not_broken(message: str, failing: int, tried: int, starts: bool) -> None:
    """A node that starts too slowly is started again; any other fault is raised at once."""
    calls: list[str] = []

    def init(**settings: Any) -> None:
        calls.append("init")
        if calls.count("init") <= failing:
            raise Exception(message)

    ray = SimpleNamespace(init=init, shutdown=lambda: calls.append("shutdown"))
    with nullcontext() if starts else pytest.raises(Exception, match=message[:20]):
        bulk._start(ray)
    assert calls == ["init", *["shutdown", "init"] * (tried - 1)]
