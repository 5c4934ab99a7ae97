"""Files of events: every kind of bad row counted and named, nothing repaired, nobody's identifier kept."""

from __future__ import annotations

import csv
import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from ggsm_core.data import checks, privacy, readers
from ggsm_core.data.events import SCHEMA, BadRows, EventError, validate

SALT = "a salt for these tests"
ZONE = "America/New_York"
SUFFIXES = (".csv", ".jsonl", ".parquet")
Row = dict[str, Any]


def good(users: int = 7, each: int = 12) -> list[Row]:
    """Rows of a sound log, as text, in order of time within each user."""
    rng = random.Random(0)
    rows: list[Row] = []
    for user in range(users):
        rows.append(event(user, None, "tabular", text="age 45-54"))
        time = datetime(2017, 5, 1, 9, 30)
        for _ in range(each):
            time += timedelta(hours=rng.randint(1, 60))
            rows.append(event(user, time.isoformat(), rng.choice(["bill", "app"]), rng.uniform(1, 90)))
    return rows


def event(user: int, time: str | None, modality: str, amount: float | None = None, **more: Any) -> Row:
    row = {"user": f"customer-{user}", "time": time, "modality": modality, "text": 'milk, "fresh"\u00e9'}
    return row | {"amount": amount, "item": None, "simulated": False} | more


def write(rows: list[Row], path: Path) -> Path:
    """As a stranger would."""
    if path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(SCHEMA))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        types = dict.fromkeys(SCHEMA, pl.String) | {"amount": pl.Float64, "simulated": pl.Boolean}
        pl.DataFrame(rows, schema=types, orient="row").write_parquet(path)
    return path


def line(index: int, path: Path) -> int:
    """The line of the row ``index`` (from 0) of ``write``."""
    return index + (2 if path.suffix == ".csv" else 1)


def read(file: Path, **more: Any) -> tuple[pl.DataFrame, readers.Report]:
    out = file.with_name("log.parquet")
    report = readers.read(file, out, **({"salt": SALT, "zone": ZONE} | more))
    return pl.read_parquet(out), report


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_sound_file_is_read_as_it_is(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = good()
    monkeypatch.setattr(readers, "BATCH", 11)
    log, report = read(write(rows, tmp_path / f"events{suffix}"))
    assert (report.rows, report.bad, report.kinds, report.first) == (len(rows), 0, {}, [])
    validate(log)  # raises
    assert not (tmp_path / "log.parquet.rejected.csv").exists()
    for row, found in zip(rows, log.rows(named=True), strict=True):
        assert found["user"] == privacy.pseudonym(row["user"], SALT)
        time = found.pop("time")
        assert (time and time.replace(tzinfo=None).isoformat()) == row["time"]
        assert {k: found[k] for k in found if k != "user"} == {k: row[k] for k in found if k != "user"}


BAD: dict[str, Row] = {
    checks.NOT_A_TIME: {"time": "5/1/2017 9 am"},
    checks.NO_OFFSET: {"time": "2017-05-01T09:30+14:01"},
    checks.AMBIGUOUS: {"time": "2017-11-05T01:30"},
    checks.SKIPPED: {"time": "2017-03-12 02:30:00"},
    checks.TOO_LATE: {"time": "2217-05-01T09:30-04:00"},
    checks.UNSORTED: {"time": "2017-01-01T00:00:01.5Z"},
    "amount: not finite": {"amount": float("nan")},
    "amount: above 1e+12": {"amount": -2e12},
    "amount: of a time-less fact, which has none": {"modality": "tabular", "time": None, "amount": 5.0},
    "modality: not Enum": {"modality": "shop"},
    "modality: null": {"modality": None},
    "time: null away from tabular": {"time": None},
    "text: null or empty": {"text": " "},
    "user: null": {"user": None},
    "simulated: null": {"simulated": None},
    "user: empty": {"user": " "},
}


def spoilt() -> tuple[list[Row], dict[int, str]]:
    """A log with one bad row of each kind, behind the first user's rows; index -> kind."""
    rows, where = good(), {}
    for kind, change in BAD.items():
        at = 13 + 3 * len(where)
        before = next(rows[i] for i in range(at - 2, 0, -1) if rows[i]["time"] and i not in where)
        rows.insert(at, before | {"modality": "bill"} | change)
        where[at] = kind
    rows.append(rows[-1])
    return rows, where | {len(rows) - 1: checks.DUPLICATE}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("batch", [5, 1000])
def test_each_kind_of_bad_row_is_counted_and_named(
    tmp_path: Path, suffix: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, where = spoilt()
    file = write(rows, tmp_path / f"events{suffix}")
    monkeypatch.setattr(readers, "BATCH", batch)
    with pytest.raises(BadRows) as error:
        read(file)
    report = error.value.report
    assert (report.rows, report.bad) == (len(rows), len(where))
    assert list(report.kinds.values()) == [1] * len(where)
    found = dict(report.first)
    assert sorted(found) == [line(at, file) for at in sorted(where)]
    for at, kind in where.items():
        (named,) = found[line(at, file)]
        assert named.startswith(kind) and f"line {line(at, file)}: {named}" in str(error.value)
    assert "customer" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_skipping_writes_the_rejected_rows_and_only_the_good_ones_go_on(tmp_path: Path, suffix: str) -> None:
    rows, where = spoilt()
    file = write(rows, tmp_path / f"events{suffix}")
    log, report = read(file, skip_bad=True)
    with (tmp_path / "log.parquet.rejected.csv").open(encoding="utf-8", newline="") as stream:
        rejected = list(csv.DictReader(stream))
    assert [int(row["line"]) for row in rejected] == [line(at, file) for at in sorted(where)]
    for at, row in zip(sorted(where), rejected, strict=True):
        assert row["reason"].startswith(where[at]) and (rows[at]["user"] or "") in row["row"]
    sound = write([row for at, row in enumerate(rows) if at not in where], tmp_path / f"sound{suffix}")
    assert_frame_equal(log, read(sound)[0])
    assert report.bad == len(where)


def test_a_duplicate_is_found_across_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a row that only looks like one isn't: another amount, another user, a later time."""
    monkeypatch.setattr(readers, "BATCH", 2)
    first = event(1, "2017-05-01T09:30", "bill", 2.0)
    fact = event(1, None, "tabular")
    others = [first | {"amount": 3.0}, first | {"user": "customer-2"}, first | {"time": "2017-05-01T09:31"}]
    rows = [fact, first, *others[:2], first, others[2], fact]
    log, report = read(write(rows, tmp_path / "events.jsonl"), skip_bad=True)
    assert report.first == [(5, [checks.DUPLICATE]), (7, [checks.DUPLICATE])]
    assert log.height == 5


def test_against_a_slow_reading_of_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BATCH", 7)
    for seed in range(20):
        rng = random.Random(seed)
        rows = [
            event(rng.randrange(3), f"2017-05-0{rng.randint(1, 4)}T00:00", "bill", float(rng.randrange(2)))
            for _ in range(40)
        ]
        latest: dict[str, str] = {}
        kept: list[Row] = []
        for row in rows:
            if row["time"] < latest.get(row["user"], "") or row in kept:
                continue
            latest[row["user"]] = row["time"]
            kept.append(row)
        log, _ = read(write(rows, tmp_path / "events.csv"), skip_bad=True)
        assert_frame_equal(log, read(write(kept, tmp_path / "kept.csv"))[0])


def test_naive_times_need_a_zone_and_offsets_do_not(tmp_path: Path) -> None:
    naive, aware = event(1, "2017-05-01T09:30", "bill"), event(1, "2017-05-01T21:30+08:00", "bill")
    with pytest.raises(BadRows, match=checks.NO_ZONE):
        read(write([naive], tmp_path / "events.csv"), zone=None)
    log, _ = read(write([aware], tmp_path / "events.csv"), zone=None)
    assert log["time"].to_list() == [datetime(2017, 5, 1, 13, 30, tzinfo=UTC)]
    both, _ = read(write([naive, aware | {"user": "b"}], tmp_path / "events.csv"))
    assert both["time"].n_unique() == 1 and both.schema["time"] == pl.Datetime("us", ZONE)


def test_times_of_parquet_in_every_type(tmp_path: Path) -> None:
    file, naive = tmp_path / "events.parquet", datetime(2017, 11, 5, 1, 30)
    frame = pl.DataFrame([event(1, None, "bill")] * 2, schema_overrides={"item": pl.String})
    column = pl.Series("time", [naive, naive + timedelta(hours=1)])
    frame.with_columns(column.cast(pl.Datetime("ns"))).write_parquet(file)
    with pytest.raises(BadRows, match=f"line 1: {checks.AMBIGUOUS}"):
        read(file)
    frame.with_columns(column.dt.replace_time_zone("Asia/Tokyo")).write_parquet(file)
    assert read(file, zone=None)[0].schema["time"] == pl.Datetime("us", "Asia/Tokyo")
    assert read(file)[0]["time"].dt.hour().to_list() == [12, 13]
    frame.head(1).with_columns(time=pl.date(2017, 5, 1)).write_parquet(file)
    assert read(file)[0]["time"].dt.hour().to_list() == [0]
    frame.with_columns(time=pl.lit(1_500_000_000)).write_parquet(file)
    with pytest.raises(EventError, match="time: Int"):
        read(file)


def test_one_percent_of_corrupt_lines(tmp_path: Path) -> None:
    rows = good(20, 49)
    for suffix in (".csv", ".jsonl"):
        file = write(rows, tmp_path / f"events{suffix}")
        lines = file.read_bytes().splitlines(keepends=True)
        at = list(range(5, len(lines), 100))
        for number, index in enumerate(at):
            half = lines[index][: len(lines[index]) // 2]
            lines[index] = [half + b"\n", half + b'"\n', b"\xff\xfe\x00\n", b"\n"][number % 4]
        file.write_bytes(b"".join(lines))
        with pytest.raises(BadRows, match=f"{len(at)} x {readers.MALFORMED}"):
            read(file)
        log, report = read(file, skip_bad=True)
        assert report.kinds == {readers.MALFORMED: len(at)} and log.height == len(rows) - len(at)
        assert [number for number, _ in report.first] == [index + 1 for index in at]


def test_json_values_keep_their_types(tmp_path: Path) -> None:
    row = event(1, "2017-05-01T09:30", "bill", 3)
    spoilt = [row | {"user": 17}, row | {"amount": "3"}, row | {"simulated": "no"}, row]
    spoilt.append({key: row[key] for key in row if key != "item"})
    _, report = read(write(spoilt, tmp_path / "events.jsonl"), skip_bad=True)
    wrong = {1: "user", 2: "amount", 3: "simulated", 5: "item"}
    assert report.first == [(number, [readers.MISTYPED[name]]) for number, name in wrong.items()]
    assert all(readers.MISTYPED[name].startswith(f"{name}: ") for name in SCHEMA)


@pytest.mark.parametrize(
    ("offset", "hour"), [("+14:00", -4), ("-12:00", 22), ("+99:99", None), ("-77:00", None)]
)
def test_an_offset_is_one_that_a_zone_can_have(tmp_path: Path, offset: str, hour: int | None) -> None:
    file = write([event(1, f"2017-05-02T10:00{offset}", "bill")], tmp_path / "events.csv")
    if hour is None:
        with pytest.raises(BadRows, match="line 2: time: "):
            read(file)
    else:
        midnight = datetime(2017, 5, 2, tzinfo=UTC)
        assert read(file)[0]["time"].item() == midnight + timedelta(hours=hour)


@pytest.mark.parametrize(
    ("column", "value"),
    [("simulated", 7), ("amount", True), ("user", ["a"]), ("text", b"\xff"), ("user", 1.0)],
)
def test_a_parquet_column_of_another_type_is_named(tmp_path: Path, column: str, value: Any) -> None:
    file, row = tmp_path / "events.parquet", event(1, "2017-05-01T09:30", "bill", 1.0)
    pl.DataFrame([row | {column: value}]).write_parquet(file)
    with pytest.raises(EventError, match=rf"events\.parquet: {column}: .* can't stand for"):
        read(file)
    pl.DataFrame([row | {"user": 17}]).write_parquet(file)
    assert read(file)[0]["user"].to_list() == [privacy.pseudonym("17", SALT)]


def test_a_column_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "events.csv"
    file.write_text(f"{','.join(SCHEMA)},time\n", encoding="utf-8")
    with pytest.raises(EventError, match=r"events\.csv: column \['time'\] is there twice"):
        read(file)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_neither_the_input_nor_an_earlier_run_is_lost(tmp_path: Path, suffix: str) -> None:
    file = write(spoilt()[0], tmp_path / f"events{suffix}")
    content = file.read_bytes()
    with pytest.raises(EventError, match=r"--out: .* is the input"):
        readers.read(file, file, salt=SALT, skip_bad=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(EventError, match=r"--out: .*folder is a folder"):
        readers.read(file, tmp_path / "folder", salt=SALT)
    (tmp_path / "folder").rmdir()
    assert file.read_bytes() == content
    read(file, skip_bad=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(EventError, match="not one good row"):
        read(write([event(1, "noon", "bill")], tmp_path / "bad.csv"), skip_bad=True)
    (tmp_path / "bad.csv").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    read(write(good(), tmp_path / f"sound{suffix}"), skip_bad=True)
    assert not (tmp_path / "log.parquet.rejected.csv").exists()


def test_files_that_hold_no_event(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        with pytest.raises(EventError, match="empty"):
            read(write([], tmp_path / f"events{suffix}"))
    (tmp_path / "nothing.csv").touch()
    with pytest.raises(EventError, match="empty"):
        read(tmp_path / "nothing.csv")
    with pytest.raises(EventError, match="not one good row"):
        read(write([event(1, "noon", "bill")], tmp_path / "events.csv"), skip_bad=True)
    (tmp_path / "words.parquet").write_text("no columns here")
    with pytest.raises(EventError, match="not a Parquet file"):
        read(tmp_path / "words.parquet")
    with pytest.raises(EventError, match="not one of"):
        read(write(good(), tmp_path / "events.csv").rename(tmp_path / "events.xlsx"))


@pytest.mark.parametrize("column", SCHEMA)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_missing_column_is_named(tmp_path: Path, suffix: str, column: str) -> None:
    file = write(good(), tmp_path / f"events{suffix}")
    if suffix == ".csv":
        pl.read_csv(file).drop(column).write_csv(file)
    else:
        pl.read_parquet(file).drop(column).write_parquet(file)
    with pytest.raises(EventError, match=f"no column .'{column}'"):
        read(file)


def test_zone_and_end_are_checked(tmp_path: Path) -> None:
    file = write([event(1, "2017-05-01T09:30", "bill")], tmp_path / "events.csv")
    for zone in ("Mars/Olympus", "", " ", "localtime", "Factory", "Europe", "+02:00", "../UTC"):
        with pytest.raises(
            EventError, match=f"zone: {zone!r} is unknown; give a name such as".replace("+", r"\+")
        ):
            read(file, zone=zone)
    with pytest.raises(EventError, match="no zone"):
        read(file, end=datetime(2017, 5, 1))
    end = datetime(2017, 5, 1, 13, 30, tzinfo=UTC)
    with pytest.raises(BadRows, match=checks.TOO_LATE):
        read(file, end=end)
    assert read(file, end=end + timedelta(seconds=1))[1].bad == 0


def test_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, where = spoilt()
    out = tmp_path / "log.parquet"
    command = [str(write(rows, tmp_path / "events.csv")), "--out", str(out), "--zone", ZONE]
    monkeypatch.delenv(privacy.SALT, raising=False)
    assert readers.main(command) == 1 and privacy.SALT in capsys.readouterr().err
    monkeypatch.setenv(privacy.SALT, "short")
    assert readers.main([*command, "--public"]) == 1 and "16 characters" in capsys.readouterr().err
    monkeypatch.setenv(privacy.SALT, SALT)
    assert readers.main(command) == 1 and not out.exists()
    assert f"{len(where)} of {len(rows)} rows" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        readers.main([*command, "--end", "2017-02-30"])
    assert "--end: '2017-02-30' is no moment; write it as 2017-12-31T" in capsys.readouterr().err
    assert readers.main([*command, "--skip-bad"]) == 0
    assert f"{len(rows) - len(where)} events written" in capsys.readouterr().out
    assert privacy.pseudonym("customer-0", SALT) in set(pl.read_parquet(out)["user"])
    assert b"customer" not in out.read_bytes()
