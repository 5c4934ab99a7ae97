"""A whole event log as templates: user and text of Fig. 4, streamed, or on a cluster.

    python -m ggsm_core.data.bulk EVENTS.parquet --out TEXTS.parquet --anchor 2017-11-27 [--engine ray]

``templates`` is a pure function from a table of whole users' events to a table of their texts, so any engine
that hands over Arrow tables can run it. ``local`` streams a log sorted by user through it in constant memory;
``on_ray`` runs it under Ray Data (extra ``cluster``), for a log in any order that no single machine holds.
Both write the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ggsm_core import params, sections
from ggsm_core.data import windows
from ggsm_core.data.events import (
    EPOCH,
    SCHEMA,
    EventError,
    a_day,
    apart_file,
    open_log,
    reading,
    stream,
    validate,
)
from ggsm_core.template import render

ROWS = 100_000
"""Events read at a time."""
GROUP = 10_000
"""Users of a row group that is written."""
BUCKETS = 256
"""Groups of users, by a hash of their names, that a cluster works on, each in one piece."""
PARTITIONS = 16
"""Parts that a cluster shuffles these groups into."""
TRIES = 3
"""Times that Ray may try to start."""
_OUT = pa.schema({"user": pa.large_string(), "text": pa.large_string()})


def templates(
    events: pa.Table,
    *,
    anchor: date,
    history_days: int,
    template: sections.Template,
    breakdowns: bool = False,
) -> pa.Table:
    """Each user's history before ``anchor`` as text: user, text (null without any record), sorted by user.

    ``events`` has the columns of ``events.SCHEMA`` and all events of each of its users. Pure: the same events
    in any order, of any company of users, give the same rows. Raises ``EventError``.
    """
    log = validate(pl.DataFrame(events.select(list(SCHEMA))))
    users = log.select(pl.col("user").unique().sort()).with_row_index("sample")
    day = pl.lit((anchor - EPOCH).days, pl.Int32)
    found = users.select(pl.col("sample").cast(pl.Int64), "user", anchor=day)
    texts: list[str | None] = [None] * len(users)
    records = windows.history(log, found, history_days, breakdowns=breakdowns)
    for sample, user in windows.users(records, template):
        texts[sample] = render(user, template.query)
    return pa.table({"user": users["user"].to_list(), "text": texts}, _OUT)


def local(events: Path, out: Path, **settings: Any) -> None:
    """``templates`` of a log sorted by user, in one process; ``settings`` are its keywords."""
    apart_file(events, out)
    open_log(events, settings["anchor"], settings["history_days"])
    _write((templates(table, **settings) for table in whole_users(events)), out)


def on_ray(events: Path, out: Path, **settings: Any) -> None:
    """The same under Ray Data: on the cluster that Ray is connected to, else on this machine."""
    apart_file(events, out)
    open_log(events, settings["anchor"], settings["history_days"])
    with buckets_on_ray(events) as buckets:
        texts = buckets.map_groups(partial(templates, **settings), batch_format="pyarrow").sort("user")
        _write(texts.iter_batches(batch_size=GROUP, batch_format="pyarrow"), out)


@contextmanager
def buckets_on_ray(events: Path, skip: frozenset[int] = frozenset()) -> Iterator[Any]:
    """A log's events as Ray's groups by ``bucket``, without those to ``skip``; Ray is there meanwhile."""
    with connected() as ray:
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield (
            ray.data.read_parquet(str(events.resolve()))
            .select_columns(list(SCHEMA))
            .map_batches(partial(_bucketed, skip=skip), batch_format="pyarrow")
            .groupby("bucket", num_partitions=PARTITIONS)
        )


@contextmanager
def connected() -> Iterator[Any]:
    """Ray on the cluster that it is connected to, else on this machine as long as this lasts."""
    import ray
    import ray.data

    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _start(ray)
    try:
        yield ray
    finally:
        ray.shutdown()


def _start(ray: Any) -> None:
    """Ray gives its node half a minute to start, which a busy machine may miss: it may try three times."""
    for attempt in range(1, TRIES + 1):
        try:
            ray.init(include_dashboard=False, log_to_driver=False)
            return
        except Exception as problem:  # Ray raises no narrower one
            if attempt == TRIES or "timed out during startup" not in str(problem):
                raise
            print(f"Ray did not start in time; attempt {attempt + 1} of {TRIES}", file=sys.stderr)
            ray.shutdown()


def whole_users(events: Path) -> Iterator[pa.Table]:
    """A log sorted by user in tables of some ``ROWS`` events, no user cut in two. Raises ``EventError``."""
    held: list[pa.Table] = []
    seen = ""
    with reading(events), pq.ParquetFile(events) as file:
        for batch in stream(file, ROWS):
            table = pa.table(batch)
            names = pl.Series(table["user"]).cast(pl.String)
            if names.null_count() or not names.is_sorted() or names[0] < seen:
                raise EventError(f"{events.name}: not sorted by user; sort it, or use the engine ray")
            seen = names[-1]
            if cut := int(names.search_sorted(seen, side="left")):
                yield pa.concat_tables([*held, table.slice(0, cut)])
                held = []
            held.append(table.slice(cut))
    if held:
        yield pa.concat_tables(held)


def _bucketed(events: pa.Table, skip: frozenset[int]) -> pa.Table:
    if events["user"].null_count:
        raise EventError("user: null in the log; data.readers names such rows by line")
    users = pc.dictionary_encode(events["user"].combine_chunks())
    buckets = np.array([crc32(name.encode()) % BUCKETS for name in users.dictionary.to_pylist()])
    bucket = buckets[users.indices.to_numpy()]
    return events.append_column("bucket", pa.array(bucket)).filter(~np.isin(bucket, list(skip)))


def _write(tables: Iterable[pa.Table], out: Path) -> None:
    """Row groups of ``GROUP`` users however the tables come: the bytes do not tell who made them."""
    draft = out.with_name(f".{out.name}.partial")
    held = _OUT.empty_table()
    try:
        with pq.ParquetWriter(draft, _OUT) as writer:
            for table in tables:
                held = pa.concat_tables([held, table.cast(_OUT)])
                while held.num_rows >= GROUP:
                    writer.write_table(held.slice(0, GROUP).combine_chunks())
                    held = held.slice(GROUP)
            writer.write_table(held.combine_chunks())
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ggsm_core.data.bulk", description="Write the templates of a whole event log."
    )
    parser.add_argument("events", type=Path, help="event log, Parquet; sorted by user for the engine local")
    parser.add_argument("--out", type=Path, required=True, help="Parquet with user and text")
    parser.add_argument("--anchor", type=a_day, required=True, help="history ends before this day")
    parser.add_argument("--profile", type=Path, help="whose template and history; the default ones without")
    parser.add_argument("--history-days", type=int, help="length of the history, instead of the profile's")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    given = parser.parse_args(arguments)
    try:
        profile = params.load(given.profile) if given.profile else None
        template, data = (
            (profile.template, profile.data) if profile else (sections.Template(), sections.Data())
        )
        days = data.history_days if given.history_days is None else given.history_days
        run = {"local": local, "ray": on_ray}[given.engine]
        run(
            given.events,
            given.out,
            anchor=given.anchor,
            history_days=days,
            template=template,
            breakdowns=data.breakdowns,
        )
    except (ValueError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
