"""The event log: the one format every data set is brought into before anything else happens.

| column | type | meaning |
| --- | --- | --- |
| user | String | whose event it is: a pseudonym (``data.privacy``) |
| time | Datetime(us, a zone) | when; its zone is the one that days and hours are counted in. Null for time-less facts (modality ``tabular`` only) |
| modality | Enum(MODALITIES) | the template's tag it goes under |
| text | String | what happened, in words; few distinct texts, since each is encoded once |
| amount | Float64 | a number that goes with it, or null |
| item | String | a stable code of what it is about, or null |
| simulated | Boolean | True for what no person did |

Modality ``app`` holds visits: who has too few in a window is no sample. Amounts of ``bill`` and ``spm`` are money.
``data.readers`` brings files into this form.
"""  # noqa: E501

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl
from polars.datatypes import FloatType, IntegerType

from ggsm_core.template import MODALITIES

if TYPE_CHECKING:  # every stage imports this module, and only ``stream`` is handed such a file
    import pyarrow as pa
    import pyarrow.parquet as pq

ZONE = "America/New_York"
"""Of The Complete Journey."""
EPOCH = date(2017, 1, 1)
"""Day 0 of every day number, in local time; days before it are negative."""


def schema(zone: str = ZONE) -> pl.Schema:
    """Columns and types of a log whose days are those of ``zone``."""
    return pl.Schema(
        {
            "user": pl.String(),
            "time": pl.Datetime("us", zone),
            "modality": pl.Enum(MODALITIES),
            "text": pl.String(),
            "amount": pl.Float64(),
            "item": pl.String(),
            "simulated": pl.Boolean(),
        }
    )


SCHEMA = schema()
TEXT = (pl.String, pl.Categorical, pl.Enum, pl.Null)
CODES = (*TEXT, IntegerType)
HOLDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("user", "modality", "text"), TEXT),
    "amount": (FloatType, IntegerType, pl.Decimal, pl.String, pl.Null),
    "item": CODES,
    "simulated": (pl.Boolean, pl.Null),
}
"""Types that a column's values may come in; of ``time`` a zone is asked too."""
READERS = "`python -m ggsm_core.data.readers` makes a log of other files"
NO_TIME = "time: null away from tabular"
LARGEST = 1e12
"""Of an amount, either way: sums stay finite, and what is larger is no number of money or things."""
RULES = {
    "user: null": pl.col("user").is_null(),
    "user: empty": pl.col("user").str.strip_chars() == "",
    "modality: null": pl.col("modality").is_null(),
    "text: null or empty": pl.col("text").is_null() | (pl.col("text").str.strip_chars() == ""),
    NO_TIME: pl.col("time").is_null() & (pl.col("modality") != "tabular"),
    "simulated: null": pl.col("simulated").is_null(),
    "amount: not finite": ~pl.col("amount").is_finite(),
    f"amount: above {LARGEST:g} or below {-LARGEST:g}": pl.col("amount").is_finite()
    & (pl.col("amount").abs() > LARGEST),
    "amount: of a time-less fact, which has none": (pl.col("modality") == "tabular")
    & pl.col("time").is_null()
    & (pl.col("amount") != 0),
}
"""What no row may be, by the name that errors give it."""
DAY = (pl.col("time").dt.date() - EPOCH).dt.total_days().cast(pl.Int32)
SHOWN = 20
"""Bad rows that an error lists."""


def part_of_week(weekday: pl.Expr, hour: pl.Expr) -> pl.Expr:
    """``weekend evening`` and the like, from weekday (1 = Monday) and hour; they begin at 5, 12, 17, 22 h."""
    part = (
        pl.when(hour.is_between(5, 11))
        .then(pl.lit("morning"))
        .when(hour.is_between(12, 16))
        .then(pl.lit("afternoon"))
        .when(hour.is_between(17, 21))
        .then(pl.lit("evening"))
        .otherwise(pl.lit("night"))
    )
    return pl.format(
        "{} {}", pl.when(weekday >= 6).then(pl.lit("weekend")).otherwise(pl.lit("weekday")), part
    )


def midnight(day: str) -> pl.Expr:
    """The first moment of a day number, in ``ZONE``."""
    return (pl.lit(EPOCH) + pl.duration(days=pl.col(day))).cast(pl.Datetime("us")).dt.replace_time_zone(ZONE)


def rows_of(modality: str, rows: pl.LazyFrame, **columns: pl.Expr | str) -> pl.LazyFrame:
    """Rows as events of ``modality``, for adapters: columns by name, then as given; the others are null."""
    given = {name: pl.lit(value) if isinstance(value, str) else value for name, value in columns.items()}
    given |= {"modality": pl.lit(modality), "simulated": pl.lit(False)}
    have = {*rows.collect_schema().names(), *given}
    rows = rows.with_columns(**given)
    return rows.select((pl.col(n) if n in have else pl.lit(None).alias(n)).cast(k) for n, k in SCHEMA.items())


class EventError(ValueError):
    """An event log that does not follow ``SCHEMA``."""


def apart(source: Path, out: Path) -> None:
    """Raises ``EventError`` if ``out`` would take the place of ``source``, or lie among its files."""
    same = source.exists() and out.exists() and source.samefile(out)
    if same or source.resolve() in (out.resolve(), *out.resolve().parents):
        raise EventError(f"--out: {out} is the input, or within it; give another --out")


def apart_file(source: Path, out: Path) -> None:
    """``apart``, for an ``out`` that is to be a file: ``EventError`` before the work if it is a folder."""
    apart(source, out)
    if out.is_dir():
        raise EventError(f"--out: {out} is a folder; give a file, new or to be replaced")


_When = TypeVar("_When", bound=date)


def _option(kind: type[_When], what: str, example: str) -> Callable[[str], _When]:
    """What reads an ISO 8601 ``kind`` off a command line, as the ``type`` of an argument."""

    def read(text: str) -> _When:
        try:
            return kind.fromisoformat(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is no {what}; write it as {example}") from None

    return read


a_day = _option(date, "day of the calendar", "2017-12-31")
a_moment = _option(datetime, "moment", "2017-12-31T00:00-05:00")


@contextmanager
def reading(path: Path, advice: str = READERS) -> Iterator[None]:
    """What reading a file that is no Parquet raises, as ``EventError``."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise
    except (pl.exceptions.PolarsError, pa.ArrowException, OSError) as error:
        raise EventError(f"{path}: not a Parquet file, or a damaged one ({error}); {advice}") from error


def files_of(log: Path) -> list[Path]:
    """The file of a log, or those of its folder, sorted."""
    return sorted(log.rglob("*.parquet")) if log.is_dir() else [log]


def open_log(path: Path, anchor: date | None, history_days: int) -> pl.LazyFrame:
    """A log's file, or the folder of its files, each row examined before any work is done on one.

    Raises ``EventError`` if it can't be a log, if a history has no day, and for an ``anchor`` with not one
    event in its history (a log of time-less facts alone may have any); ``BadRows`` for rows that break the
    schema.
    """
    if history_days < 1:
        raise EventError(f"history_days: {history_days} is no length of a history; give 1 or more")
    files = files_of(path)
    if not files:
        raise EventError(f"{path}: no file *.parquet in this folder; {READERS}")
    day = pl.col("time").dt.date()
    with reading(path):
        log = pl.scan_parquet(files, glob=False)
        flagged(log, str(path))
        if _nothing(log):
            raise EventError(f"{path}: holds not one event")
        if anchor is not None:
            first, last = (date.fromordinal(max(1, anchor.toordinal() - n)) for n in (history_days, 1))
            if _nothing(log.filter(day.is_between(first, last))):
                start, end = log.select(day.min(), last=day.max()).collect(engine="streaming").row(0)
                if end is not None:
                    raise EventError(
                        f"anchor, history_days: not one event lies in the window, {first} to {last}; "
                        f"{path} has {start} to {end}, so give another anchor"
                    )
        examine(log).refuse()
    return log


def _nothing(log: pl.LazyFrame) -> bool:
    return log.head(1).collect(engine="streaming").is_empty()


class BadRows(EventError):
    """Rows that break the schema; ``report`` counts them by kind."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


@dataclass
class Report:
    """What was found in a log: how many rows are bad, how many of each kind, and which come first."""

    rows: int = 0
    bad: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    first: list[tuple[int, list[str]]] = field(default_factory=list)  # line and kinds, SHOWN of them

    def add(self, found: pl.LazyFrame) -> None:
        """Count more rows: ``line`` (from 1), and a Boolean column for each kind, true on bad rows."""
        kinds = [name for name in found.collect_schema() if name != "line"]
        bad = pl.any_horizontal(kinds)
        totals, first = pl.collect_all(
            [
                found.select(pl.col(kinds).sum(), rows=pl.len(), bad=bad.sum()),
                found.filter(bad).head(SHOWN - len(self.first)),
            ],
            engine="streaming",
        )
        counts = totals.row(0, named=True)
        self.rows += counts.pop("rows")
        self.bad += counts.pop("bad")
        for kind, count in counts.items():
            if count:
                self.kinds[kind] = self.kinds.get(kind, 0) + count
        for row in first.rows(named=True):
            self.first.append((row.pop("line"), [kind for kind, broken in row.items() if broken]))

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} x {kind}" for kind, count in sorted(self.kinds.items()))
        lines = [f"events: {self.bad:,} of {self.rows:,} rows break the schema{kinds and f' ({kinds})'}"]
        lines += [f"line {line}: {', '.join(kinds)}" for line, kinds in self.first]
        return "\n".join([*lines, "and more"] if self.bad > len(self.first) else lines)

    def refuse(self) -> None:
        """Raises ``BadRows`` if there are any."""
        if self.bad:
            raise BadRows(self)


def judge_columns(
    found: Mapping[str, pl.DataType],
    where: str,
    holds: Mapping[str, tuple[Any, ...]] = HOLDS,
    advice: str = READERS,
) -> None:
    """Raises ``EventError`` for a column that is missing, or of a type that can't hold its values."""
    if missing := [name for name in SCHEMA if name not in found]:
        raise EventError(f"{where}: no column {missing}; needed are {', '.join(SCHEMA)}; {advice}")
    for name, kinds in holds.items():
        if not isinstance(found[name], kinds):
            raise EventError(f"{where}: {name}: {found[name]} can't stand for {SCHEMA[name]}; {advice}")


def flagged(log: pl.LazyFrame, where: str = "events") -> tuple[pl.LazyFrame, list[str]]:
    """The rows with the schema's types, and a Boolean column for each kind of fault; the names of these.

    A value that doesn't fit its type is null. Raises ``EventError`` for a log whose columns can't be judged.
    """
    found = log.collect_schema()
    judge_columns(found, where)
    time = found["time"]
    if not isinstance(time, pl.Datetime) or time.time_zone is None:
        raise EventError(
            f"{where}: time: {time} has no time zone; attach one with dt.replace_time_zone; {READERS}"
        )
    types = schema(time.time_zone)
    misfits = {name: f"{name}: not {kind}" for name, kind in types.items()}
    rows = (
        log.with_columns(
            (pl.col(name).cast(kind, strict=False).is_null() & pl.col(name).is_not_null()).alias(
                misfits[name]
            )
            for name, kind in types.items()
        )
        .with_columns(pl.col(name).cast(kind, strict=False) for name, kind in types.items())
        .with_columns(  # what is null only because it didn't fit has its name already
            (broken.fill_null(False) & ~pl.col(misfits[rule.partition(":")[0]])).alias(rule)
            for rule, broken in RULES.items()
        )
    )
    return rows, [*misfits.values(), *RULES]


def examine(log: pl.LazyFrame) -> Report:
    """Every row of a log held against the schema, streamed. Raises ``EventError`` as ``flagged`` does."""
    rows, kinds = flagged(log.with_row_index("line", offset=1))
    report = Report()
    report.add(rows.select("line", *kinds))
    return report


def validate(events: pl.DataFrame) -> pl.DataFrame:
    """The log with exactly the columns and types of ``schema``, in one fixed order of rows.

    Columns may come in types that hold the same values, as ``modality`` as String. Raises ``EventError``.
    """
    examine(events.lazy()).refuse()
    rows, _ = flagged(events.lazy())
    return rows.select(*SCHEMA).collect().sort("user", "time", "modality", "text", "item", "amount")


def stream(file: pq.ParquetFile, rows: int) -> Iterator[pa.RecordBatch]:
    """A log's columns, at most ``rows`` events at a time, in the memory that one row group takes.

    Asked for all row groups in one call, pyarrow keeps something of each that it has read.
    """
    for group in range(file.num_row_groups):
        yield from file.iter_batches(rows, row_groups=[group], columns=list(SCHEMA))
