"""Embed the users of an event log: one row a user, in parts, resumable.

    python -m ggsm_core.embed --model FOLDER --events FILE.parquet --out OUT.parquet [--anchor 2017-11-27]
    python -m ggsm_core.embed --model FOLDER --events EVENTS --out FOLDER --anchor 2017-11-27 --engine ray

The log has the columns of ``data.events.SCHEMA``; ``data.readers`` makes one of other files. Sorted by user
it is read fastest. Memory holds one part of the users, however many there are. OUT has the columns user,
records (shown to the encoder) and embedding; a user without any record in the window, or of whom none fits
into the template, has records 0 and no embedding. How long a history is shown, the encoder says: as long as
those it was trained on.

``on_ray`` does the same under Ray Data (extra ``cluster``), for a log and a population that no single machine
holds: OUT is then a folder of shards.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ggsm_core.data import bulk, windows
from ggsm_core.data.events import (
    DAY,
    EPOCH,
    READERS,
    SCHEMA,
    EventError,
    a_day,
    apart,
    apart_file,
    files_of,
    open_log,
    validate,
)
from ggsm_core.embedding import embed_all
from ggsm_core.model import UserEncoder
from ggsm_core.progress import Progress, silent
from ggsm_core.provenance import digest, sha256, write_atomically
from ggsm_core.template import encode_user
from ggsm_core.text_encoder import TextEncoder
from ggsm_core.tokens import Sequences

NOTE = "asked.json"
PART = 2000
"""Users in memory at a time."""


class EmbedError(ValueError):
    """Users that can't be embedded as asked."""


def embed(
    encoder: UserEncoder,
    events: Path,
    out: Path,
    *,
    anchor: date | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    part_size: int = PART,
    texts: Callable[[list[str]], np.ndarray] | None = None,
    progress: Progress = silent,
) -> date:
    """Write ``out``: user, records (Int32), embedding (Array[d]), sorted by user; returns the anchor.

    An interrupted call leaves its finished parts in ``<out>.parts``; the same call goes on from them.

    Args:
        encoder: holds its template and the length of its histories.
        events: a log, Parquet.
        out: Parquet.
        anchor: the day before which the history ends; the day after the last event by default.
        dtype: of the embeddings.
        part_size: users in memory at a time.
        texts: list of n record texts -> Float[n, F], for an encoder with adapters; MiniLM by default. What it
            makes is not compared when a call goes on: give the same one.
        progress: called with users done, users in all and a message.

    Raises:
        EventError: no log; rows that break the schema, by line and kind; a window without any event.
        EmbedError: an encoder without template, parts of another call, or a last event that is still to come.
    """
    apart_file(events, out)
    if part_size < 1:
        raise EmbedError(f"part_size: {part_size} is no number of users to hold in memory; give 1 or more")
    if events.is_dir():
        raise EventError(f"{events}: a folder, which the engine ray reads; give a file; {READERS}")
    embedded = _Embedder(encoder, dtype, texts)
    log = open_log(events, anchor, embedded.history_days)
    anchor = anchor or _day_after_all(log)
    day = (anchor - EPOCH).days
    users = log.select(pl.col("user").unique()).collect(engine="streaming")["user"].sort()
    parts = _open(out, sha256(events), encoder, [day, dtype, part_size])
    for start in range(0, len(users), part_size):
        part = parts / f"{start:012d}.parquet"
        if not part.is_file():
            group = users.slice(start, part_size)
            # A range, not a list: with a log sorted by user, the reader skips what lies outside it.
            inside = pl.col("user").is_between(pl.lit(group[0]), pl.lit(group[-1]))
            _keep(embedded(log.filter(inside).collect(engine="streaming"), day), part)
        progress(min(start + part_size, len(users)), len(users), "users embedded")
    whole = out.with_name(f".{out.name}.partial")
    written = sorted(parts.glob("*.parquet"))
    with pq.ParquetWriter(whole, pq.read_schema(written[0])) as writer:
        for part in written:  # one at a time: a lazy scan holds many
            writer.write_table(pq.read_table(part))
    whole.rename(out)
    shutil.rmtree(parts)
    return anchor


def _day_after_all(log: pl.LazyFrame) -> date:
    """The day after the last event. Raises ``EmbedError`` if there is none, or if it is still to come."""
    utc = pl.col("time").max().dt.convert_time_zone("UTC")
    last, moment = log.select(day=DAY.max(), utc=utc).collect(engine="streaming").row(0)
    if last is None:
        raise EmbedError(
            "events: not one of them has a time; give --anchor, the day before which history ends"
        )
    if moment > datetime.now(UTC) + timedelta(days=1):  # a day for clocks that are wrong
        raise EmbedError(
            f"events: the latest is of {moment:%Y-%m-%d %H:%M} UTC, still to come, and history would end "
            "after it; correct that row, or give --anchor, the day before which history ends"
        )
    return EPOCH + timedelta(days=last + 1)


def on_ray(
    encoder: UserEncoder,
    events: Path,
    out: Path,
    *,
    anchor: date,
    dtype: Literal["float32", "float16"] = "float32",
    texts: Callable[[list[str]], np.ndarray] | None = None,
    progress: Progress = silent,
) -> None:
    """``embed`` on the cluster that Ray is connected to, else on this machine; a GPU for each worker if any.

    Users are dealt by a hash of their names into ``bulk.BUCKETS`` groups. Each becomes a file of the folder
    ``out``, whole or not at all. An interrupted call leaves them in ``<out>.parts``; the same call embeds the
    other users. All machines see ``out``, and ``events``: a file or a folder, in any order.

    Raises:
        EmbedError: as ``embed``; or ``out`` is there already.
        EventError: as ``embed``.
    """
    import ray

    apart(events, out)
    embedded = _Embedder(encoder, dtype, texts)
    if out.exists():
        raise EmbedError(f"{out}: is there already; delete it, or give another --out")
    open_log(events, anchor, embedded.history_days)
    stamps = digest([[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files_of(events)])
    day = (anchor - EPOCH).days
    parts = _open(out.resolve(), stamps, encoder, [day, dtype, bulk.BUCKETS])
    done = {int(part.stem) for part in parts.glob("*.parquet")}
    with bulk.buckets_on_ray(events, frozenset(done)) as buckets:
        shards = buckets.map_groups(
            _Shards,
            fn_constructor_args=(embedded, day, parts),
            batch_format="pyarrow",
            num_gpus=min(1, ray.cluster_resources().get("GPU", 0)),
        )
        for number, _ in enumerate(shards.iter_rows(), len(done) + 1):
            progress(number, bulk.BUCKETS, "shards embedded")
    parts.rename(out)
    (out / NOTE).unlink()


class _Shards:
    """What a worker of Ray holds; it embeds one bucket after the other."""

    def __init__(self, embedded: _Embedder, day: int, parts: Path) -> None:
        embedded.encoder.to("cuda" if torch.cuda.is_available() else "cpu")
        self.embedded, self.day, self.parts = embedded, day, parts

    def __call__(self, events: pa.Table) -> pa.Table:
        bucket = events["bucket"][0].as_py()
        table = self.embedded(pl.DataFrame(events.select(list(SCHEMA))), self.day)
        _keep(table, self.parts / f"{bucket:05d}.parquet")
        return pa.table({"bucket": [bucket]})


def _keep(table: pl.DataFrame, part: Path) -> None:
    """Write a part, whole or not at all."""
    table.write_parquet(part.with_suffix(".partial"))
    part.with_suffix(".partial").rename(part)


def _open(out: Path, events: str, encoder: UserEncoder, settings: list[Any]) -> Path:
    """The folder of parts, new or left by the same call."""
    asked = {"events": events, "encoder": encoder.fingerprint(), "settings": settings}
    folder = out.with_name(out.name + ".parts")
    note = folder / NOTE
    if folder.exists() and not note.is_file() and (folder.is_file() or any(folder.iterdir())):
        raise EmbedError(
            f"{folder}: is there and was not made by this command, which would put parts into it and delete "
            "it in the end; move it, or give another --out"
        )
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != asked:
        raise EmbedError(f"{folder}: holds parts of another model, log or setting; delete it to begin anew")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(asked))
    return folder


class _Vectors:
    """Record text -> Float[F], of the users at hand: what the last ones had too is not encoded again."""

    def __init__(self, encode: Callable[[list[str]], np.ndarray] | None) -> None:
        self._encode = encode
        self._known: dict[str, np.ndarray] = {}

    def learn(self, texts: set[str]) -> None:
        self._encode = self._encode or TextEncoder().encode  # loaded where it is used
        new = sorted(texts - self._known.keys())
        self._known = {text: vector for text, vector in self._known.items() if text in texts}
        if new:
            self._known |= dict(zip(new, self._encode(new), strict=True))

    def __call__(self, text: str) -> np.ndarray:
        return self._known[text]


class _Embedder:
    """All events of some users, and the day before which history ends -> their rows, sorted by user."""

    def __init__(
        self,
        encoder: UserEncoder,
        dtype: str,
        texts: Callable[[list[str]], np.ndarray] | None,
    ) -> None:
        if encoder.template is None or encoder.history_days is None:
            raise EmbedError(
                "model: saved without template or history_days, so nobody knows how users were shown to it; "
                "train it with ggsm_core.training"
            )
        self.encoder, self.dtype = encoder, dtype
        self.template, self.history_days = encoder.template, encoder.history_days
        self.vectors = _Vectors(texts) if encoder.features is not None else None

    def __call__(self, log: pl.DataFrame, day: int) -> pl.DataFrame:
        events, template = validate(log), self.template
        users = events.select(pl.col("user").unique().sort())
        samples = users.with_row_index("sample").select(pl.col("sample").cast(pl.Int64), "user")
        found = samples.with_columns(anchor=pl.lit(day, pl.Int32))
        records = windows.history(events, found, self.history_days, breakdowns=self.encoder.breakdowns)
        encoded = {
            sample: encode_user(
                user,
                self.encoder.tokenizer,
                template.query,
                modality_input=template.modality_input,
                max_tokens=template.max_user_tokens,
            )
            for sample, user in windows.users(records, template)
        }
        shown = np.zeros(len(users), np.int32)
        embeddings = np.full((len(users), self.encoder.hidden_size), np.nan, np.float32)
        if encoded:
            rows = list(encoded)
            shown[rows] = [len(e.records) for e in encoded.values()]
            if self.vectors is not None:
                self.vectors.learn({record.text for e in encoded.values() for record in e.records})
            made = Sequences.of(encoded.values())
            embeddings[rows] = embed_all(self.encoder, made, self.vectors, silent)
        table = pl.DataFrame(
            {"user": users["user"], "records": shown, "embedding": embeddings.astype(self.dtype)}
        )
        return table.with_columns(pl.when(pl.col("records") > 0).then("embedding"))


def _say(began: float) -> Progress:
    last = [began]

    def progress(done: float, total: float, message: str) -> None:
        now = time.monotonic()
        if now - last[0] >= 5 or done == total:
            last[0] = now
            left = (now - began) * (total - done) / max(done, 1)
            print(f"{done:,} of {total:,} {message}, about {timedelta(seconds=round(left))} left", flush=True)

    return progress


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ggsm_core.embed", description="Embed the users of an event log, one row a user."
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained encoder")
    parser.add_argument("--events", type=Path, required=True, help="event log, Parquet")
    parser.add_argument("--out", type=Path, required=True, help="Parquet with one row a user")
    parser.add_argument("--base", type=Path, help="folder of the decoder, for an encoder with LoRA")
    parser.add_argument(
        "--anchor",
        type=a_day,
        help="history ends before this day; engine local: else the day after the last event",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--part-size", type=int, help=f"users in memory at a time, engine local; {PART}")
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    given: Any = parser.parse_args(arguments)
    try:
        encoder = UserEncoder.load(given.model, base=given.base)
        asked = {name: getattr(given, name) for name in ("anchor", "dtype")}
        asked["progress"] = _say(time.monotonic())
        if given.engine == "ray":
            if given.anchor is None:
                raise EmbedError(
                    "--anchor: missing; the engine ray does not look for the last day of the log"
                )
            if given.part_size is not None:
                raise EmbedError("--part-size: the engine ray deals users out in its own way; leave it out")
            on_ray(encoder, given.events, given.out, **asked)
            anchor = given.anchor
        else:
            encoder.to("cuda" if torch.cuda.is_available() else "cpu")
            part_size = PART if given.part_size is None else given.part_size
            anchor = embed(encoder, given.events, given.out, part_size=part_size, **asked)
        shown = pl.scan_parquet(given.out).select(users=pl.len(), none=pl.col("records").eq(0).sum())
        users, none = shown.collect().row(0)
        print(
            f"history: {encoder.history_days} days before anchor {anchor}; {none:,} of {users:,} users have "
            "no embedding, for no record of theirs is in it or fits into the template"
        )
    except (ValueError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
