"""A file of events (Parquet, CSV, JSON lines) -> an event log: the edge where strangers' data is checked.

    GGSM_SALT=... python -m ggsm_core.data.readers FILE --out EVENTS.parquet [--zone ZONE] [--skip-bad]

FILE has the columns of ``events.SCHEMA``, one event a line; more columns are ignored. Users are hashed
(``data.privacy``). Times carry a zone or an offset, or ``--zone`` says which clock they were read from. Rows
of a user are in order of time. Nothing is repaired: a file with a bad row is refused, with every kind of
fault counted and the first bad rows named. ``--skip-bad`` leaves bad rows out instead, and writes them to
``EVENTS.parquet.rejected.csv`` as they came, identifiers included, with line and reason.

Read in batches: memory holds one of them, and of each user the rows at its latest time.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import polars as pl
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from ggsm_core.data import privacy
from ggsm_core.data.checks import DUPLICATE, TOO_LATE, UNSORTED, Order, clock
from ggsm_core.data.events import (
    CODES,
    EPOCH,
    HOLDS,
    NO_TIME,
    SCHEMA,
    EventError,
    Report,
    a_moment,
    apart_file,
    flagged,
    judge_columns,
    reading,
    stream,
)

BATCH = 200_000
"""Rows in memory at a time."""
MALFORMED = "line: malformed"
MISTYPED = {name: f"{name}: key missing, or value of another type" for name in SCHEMA}
UNREADABLE = (MALFORMED, *MISTYPED.values())
RAW = {"line": pl.Int64(), "raw": pl.String(), **dict.fromkeys(UNREADABLE, pl.Boolean())}
_FINE, _LOST = (False,) * len(MISTYPED), (None,) * len(SCHEMA)
_HOLDS = HOLDS | {"user": CODES, "simulated": (pl.Boolean, pl.String, pl.Null)}


class _Event(BaseModel):
    """One line of JSON. Values are never turned into another type, except whole numbers into floats."""

    model_config = ConfigDict(strict=True)

    user: str | None
    time: str | None
    modality: str | None
    text: str | None
    amount: float | None
    item: str | None
    simulated: bool | None


def read(
    file: Path,
    out: Path,
    *,
    salt: str,
    zone: str | None = None,
    end: datetime | None = None,
    skip_bad: bool = False,
) -> Report:
    """Write the events of ``file`` to ``out`` (Parquet, rows in the file's order); returns what was found.

    Args:
        file: .parquet, .csv, .jsonl or .ndjson.
        out: the log.
        salt: of the users' pseudonyms.
        zone: whose clock naive times show, and whose days and hours count. Without it naive times are bad
            rows, and days are those of a Parquet column's zone, else of UTC.
        end: no event is from then or later; now by default.
        skip_bad: leave bad rows out and write them beside ``out``.

    Raises:
        BadRows: bad rows, without ``skip_bad``.
        EventError: no event, a missing column, an unknown suffix or zone.
    """
    rejections = out.with_name(f"{out.name}.rejected.csv")
    for written in (out, rejections):
        apart_file(file, written)
    if zone is not None:
        _judge_zone(zone)
    rows, end = _rows(file), end or datetime.now(UTC)
    if end.tzinfo is None:
        raise EventError(f"end: {end} has no zone; write an offset, as in 2017-12-31T00:00-05:00")
    report, order, writer = Report(), Order(), None
    partial = out.with_name(f".{out.name}.partial")
    rejected = _Rejected(rejections) if skip_bad else None
    try:
        for batch in rows:
            found, kinds = _judge(batch, zone, end, order)
            report.add(found.lazy().select("line", *kinds))
            bad = pl.any_horizontal(kinds)
            if rejected is not None:
                rejected.write(found.filter(bad), kinds)
            good = found.filter(~bad).with_columns(privacy.hidden(pl.col("user"), salt)).select(*SCHEMA)
            arrow = good.with_columns(pl.col("modality").cast(pl.String)).to_arrow(
                compat_level=pl.CompatLevel.oldest()
            )
            writer = writer or pq.ParquetWriter(partial, arrow.schema)
            writer.write_table(arrow)
        if not report.rows:
            raise EventError(f"{file.name}: empty, not one event")
        if not skip_bad:
            report.refuse()
        if report.bad == report.rows:
            raise EventError(f"{file.name}: not one good row\n{report}")
        assert writer is not None
        writer.close()
        partial.replace(out)
        if rejected is not None:
            rejected.keep()
    finally:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)
        if rejected is not None:
            rejected.close()
    return report


def _judge_zone(zone: str) -> None:
    """Raises ``EventError`` for what Python or polars, each with a list of its own, can't take for a zone."""
    try:
        ZoneInfo(zone)
        pl.select(pl.lit(EPOCH, pl.Datetime("us")).dt.replace_time_zone(zone))
    except Exception as error:  # of each library, and of the folders that one of them reads
        raise EventError(f"zone: {zone!r} is unknown; give a name such as Europe/Berlin") from error


def _rows(file: Path) -> Iterator[pl.DataFrame]:
    """Batches with ``RAW`` and the columns of the schema, in the types that the file has them in."""
    kinds = {".parquet": _parquet, ".csv": _csv, ".jsonl": _json, ".ndjson": _json}
    if file.suffix not in kinds:
        raise EventError(f"{file.name}: {file.suffix or 'no suffix'} is not one of {', '.join(kinds)}")
    if not file.stat().st_size:
        raise EventError(f"{file.name}: empty, not one event")
    return kinds[file.suffix](file)


def _parquet(file: Path) -> Iterator[pl.DataFrame]:
    start = 1
    with reading(file, "write it anew"), pq.ParquetFile(file) as source:
        _judge_header(source.schema_arrow.names, file)
        named = pl.DataFrame(source.schema_arrow.empty_table().select(list(SCHEMA))).schema
        judge_columns(named, file.name, _HOLDS, "cast the column")
        for arrow in stream(source, BATCH):
            rows = pl.DataFrame(arrow).with_columns(pl.col("user", "modality").cast(pl.String))
            shown = rows.select(pl.struct(pl.all().cast(pl.String)).struct.json_encode().alias("raw"))
            fine = (pl.lit(False).alias(kind) for kind in UNREADABLE)
            yield rows.with_columns(shown["raw"], *fine).with_row_index("line", start)
            start += rows.height


def _csv(file: Path) -> Iterator[pl.DataFrame]:
    """With Python's reader, not polars': it goes on after a malformed line and knows its number."""
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        header = next(csv.reader(stream), [])
        _judge_header(header, file)
        places = [header.index(name) for name in SCHEMA]

        def cells() -> Iterator[list[Any]]:
            for line, text in enumerate(stream, start=2):
                try:
                    (values,) = csv.reader([text], strict=True)
                except (csv.Error, ValueError):
                    values = []
                if len(values) != len(header) or "\ufffd" in text:
                    yield [line, text, True, *_FINE, *_LOST]
                else:
                    yield [line, text, False, *_FINE, *(values[place] or None for place in places)]

        yield from _frames(cells(), pl.Schema(dict.fromkeys(SCHEMA, pl.String())))


def _json(file: Path) -> Iterator[pl.DataFrame]:
    def cells() -> Iterator[list[Any]]:
        with file.open("rb") as stream:
            for line, text in enumerate(stream, start=1):
                shown = text.decode("utf-8", "replace")
                try:
                    event = _Event.model_validate_json(text)
                    yield [line, shown, False, *_FINE, *(getattr(event, name) for name in SCHEMA)]
                except ValidationError as error:
                    wrong = {name for fault in error.errors(include_url=False) for name in fault["loc"][:1]}
                    yield [line, shown, not wrong, *(name in wrong for name in MISTYPED), *_LOST]

    types = dict.fromkeys(SCHEMA, pl.String()) | {"amount": pl.Float64(), "simulated": pl.Boolean()}
    return _frames(cells(), pl.Schema(types))


def _frames(cells: Iterator[list[Any]], types: pl.Schema) -> Iterator[pl.DataFrame]:
    while rows := list(islice(cells, BATCH)):
        yield pl.DataFrame(rows, schema=RAW | types, orient="row")


def _judge_header(names: Sequence[str], file: Path) -> None:
    if missing := [name for name in SCHEMA if name not in names]:
        raise EventError(f"{file.name}: no column {missing}; needed are {', '.join(SCHEMA)}")
    if twice := [name for name in SCHEMA if names.count(name) > 1]:
        raise EventError(f"{file.name}: column {twice} is there twice; leave one of each")


def _judge(
    rows: pl.DataFrame, zone: str | None, end: datetime, order: Order
) -> tuple[pl.DataFrame, list[str]]:
    """The rows typed, with a Boolean column for each kind of fault; the names of these columns."""
    if rows.schema["simulated"] == pl.String:
        truth = pl.col("simulated").str.to_lowercase().replace_strict(
            {"true": True, "false": False}, default=None, return_dtype=pl.Boolean
        )  # fmt: skip
        rows = rows.with_columns(truth)
    rows, of_time = clock(rows, zone)
    judged, kinds = flagged(rows.lazy())
    # One fault, named once: what can't be read has no value either.
    readable, timed = ~pl.any_horizontal(*UNREADABLE), ~pl.any_horizontal(of_time)
    found = judged.with_columns(
        *((pl.col(kind) & readable & (timed if kind == NO_TIME else True)).alias(kind) for kind in kinds),
        (pl.col("time").dt.convert_time_zone("UTC") >= end.astimezone(UTC)).fill_null(False).alias(TOO_LATE),
    ).collect()
    kinds = [*UNREADABLE, *of_time, TOO_LATE, *kinds]
    return order.judge(found, kinds), [*kinds, UNSORTED, DUPLICATE]


class _Rejected:
    """The file of rejected rows: line, reason, the row as it came. Without any, there is no file.

    It takes the place of an earlier one only when it is kept.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._partial = path, path.with_name(f".{path.name}.partial")
        self._stream = self._partial.open("w", encoding="utf-8", newline="")
        csv.writer(self._stream).writerow(["line", "reason", "row"])
        self._rows = 0

    def write(self, rows: pl.DataFrame, kinds: list[str]) -> None:
        self._rows += rows.height
        reasons = rows.select(
            "line", pl.concat_str(
                *(pl.when(kind).then(pl.lit(kind)) for kind in kinds), separator="; ", ignore_nulls=True
            ).alias("reason"), pl.col("raw").str.strip_chars_end("\r\n"),
        )  # fmt: skip
        csv.writer(self._stream).writerows(reasons.iter_rows())

    def keep(self) -> None:
        self._stream.close()
        if self._rows:
            self._partial.replace(self._path)
        else:
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        self._stream.close()
        self._partial.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ggsm_core.data.readers",
        description="Check events and make them a log.",
    )
    parser.add_argument("file", type=Path, help=".parquet, .csv, .jsonl or .ndjson")
    parser.add_argument("--out", type=Path, required=True, help="the log, Parquet")
    parser.add_argument("--zone", help="of naive times, and of days and hours; as America/New_York")
    parser.add_argument("--end", type=a_moment, help="no event is from then or later; now")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out, into OUT.rejected.csv")
    parser.add_argument(
        "--public", action="store_true", help=f"users are no secret: {privacy.SALT} may be missing"
    )
    given = parser.parse_args(arguments)
    try:
        salt = privacy.public_salt() if given.public else privacy.secret_salt()
        more = {"zone": given.zone, "end": given.end, "skip_bad": given.skip_bad}
        report = read(given.file, given.out, salt=salt, **more)
    except (ValueError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    if report.bad:
        print(report, file=sys.stderr)
    print(f"{report.rows - report.bad:,} events written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
