"""Embed the users of an event log: one row a user, in parts, resumable.

    python -m ggsm_core.embed --model FOLDER --events FILE.parquet --out OUT.parquet [--base FOLDER]

The log has the columns of ``data.events.SCHEMA``; ``data.readers`` makes one of other files. Sorted by user
it is read fastest. Memory holds one part of the users, however many there are. OUT has the columns user,
records (shown to the encoder) and embedding; a user without any record in the window, or of whom none fits
into the template, has records 0 and no embedding.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch

from ggsm_core.data import windows
from ggsm_core.data.events import DAY, EPOCH, examine, validate
from ggsm_core.embedding import embed_all
from ggsm_core.model import UserEncoder
from ggsm_core.provenance import digest, sha256, write_atomically
from ggsm_core.template import encode_user
from ggsm_core.text_encoder import TextEncoder
from ggsm_core.tokens import Sequences

Progress = Callable[[float, float, str], None]


class EmbedError(ValueError):
    """Users that can't be embedded as asked."""


def embed(
    encoder: UserEncoder,
    events: Path,
    out: Path,
    *,
    anchor: date | None = None,
    history_days: int = 90,
    dtype: Literal["float32", "float16"] = "float32",
    part_size: int = 2000,
    texts: Callable[[list[str]], np.ndarray] | None = None,
    progress: Progress = lambda done, total, message: None,
) -> None:
    """Write ``out``: user, records (Int32), embedding (Array[d]), sorted by user.

    An interrupted call leaves its finished parts in ``<out>.parts``; the same call goes on from them.

    Args:
        encoder: holds its template.
        events: a log, Parquet.
        out: Parquet.
        anchor: the day before which the history ends; the day after the last event by default.
        history_days: length of the history.
        dtype: of the embeddings.
        part_size: users in memory at a time.
        texts: list of n record texts -> Float[n, F], for an encoder with adapters; MiniLM by default.
        progress: called with users done, users in all and a message.

    Raises:
        EventError: rows that break the schema, by line and kind.
        EmbedError: an encoder without template, or parts of another call.
    """
    if encoder.template is None:
        raise EmbedError("model: saved without its template; train it with this version of ggsm_core")
    log = pl.scan_parquet(events)
    examine(log).refuse()
    last = log.select(DAY.max()).collect(engine="streaming").item()
    if last is None and anchor is None:
        raise EmbedError(
            "events: not one of them has a time; give --anchor, the day before which history ends"
        )
    day = (anchor - EPOCH).days if anchor is not None else last + 1
    users = log.select(pl.col("user").unique()).collect(engine="streaming")["user"].sort()
    asked = {
        "events": sha256(events),
        "encoder": digest([f"{k} {v.float().sum().item()}" for k, v in encoder.trained_state().items()]),
        "settings": [day, history_days, dtype, part_size],
    }
    parts = _open(out.with_name(out.name + ".parts"), asked)
    vectors = _Vectors(texts) if encoder.features is not None else None
    for start in range(0, len(users), part_size):
        part = parts / f"{start:012d}.parquet"
        if not part.is_file():
            group = users.slice(start, part_size)
            table = _embed_part(encoder, log, group, day, history_days, dtype, vectors)
            table.write_parquet(part.with_suffix(".partial"))
            part.with_suffix(".partial").rename(part)
        progress(min(start + part_size, len(users)), len(users), "users embedded")
    whole = out.with_name(f".{out.name}.partial")
    pl.scan_parquet(parts / "*.parquet").sink_parquet(whole)
    whole.rename(out)
    shutil.rmtree(parts)


def _open(folder: Path, asked: dict[str, Any]) -> Path:
    """The folder of parts, new or left by the same call."""
    note = folder / "asked.json"
    if note.is_file() and json.loads(note.read_text(encoding="utf-8")) != asked:
        raise EmbedError(f"{folder}: holds parts of another model, log or setting; delete it to begin anew")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(asked))
    return folder


class _Vectors:
    """Record text -> Float[F], each distinct text encoded once."""

    def __init__(self, encode: Callable[[list[str]], np.ndarray] | None) -> None:
        self._encode = encode or TextEncoder().encode
        self._known: dict[str, np.ndarray] = {}

    def learn(self, texts: set[str]) -> None:
        new = sorted(texts - self._known.keys())
        if new:
            self._known |= dict(zip(new, self._encode(new), strict=True))

    def __call__(self, text: str) -> np.ndarray:
        return self._known[text]


def _embed_part(
    encoder: UserEncoder,
    log: pl.LazyFrame,
    group: pl.Series,
    day: int,
    history_days: int,
    dtype: str,
    vectors: _Vectors | None,
) -> pl.DataFrame:
    """The rows of these users, who are neighbours in the order of names."""
    template = encoder.template
    assert template is not None
    # A range, not a list: with a log sorted by user, the reader skips what lies outside it.
    inside = pl.col("user").is_between(pl.lit(group[0]), pl.lit(group[-1]))
    events = validate(log.filter(inside).collect(engine="streaming"))
    samples = pl.DataFrame({"user": group}).with_row_index("sample")
    found = samples.select(pl.col("sample").cast(pl.Int64), "user", pl.lit(day, pl.Int32).alias("anchor"))
    encoded = {
        sample: encode_user(
            user,
            encoder.tokenizer,
            modality_input=template.modality_input,
            max_tokens=template.max_user_tokens,
        )
        for sample, user in windows.users(windows.history(events, found, history_days), template)
    }
    shown = np.zeros(len(group), np.int32)
    embeddings = np.full((len(group), encoder.hidden_size), np.nan, np.float32)
    if encoded:
        rows = list(encoded)
        shown[rows] = [len(e.records) for e in encoded.values()]
        if vectors is not None:
            vectors.learn({record.text for e in encoded.values() for record in e.records})
        embeddings[rows] = embed_all(encoder, Sequences.of(encoded.values()), vectors, lambda *_: None)
    table = pl.DataFrame({"user": group, "records": shown, "embedding": embeddings.astype(dtype)})
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
    parser.add_argument("--anchor", type=date.fromisoformat, help="history ends before this day")
    parser.add_argument("--history-days", type=int, default=90)
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--part-size", type=int, default=2000, help="users in memory at a time")
    given: Any = parser.parse_args(arguments)
    try:
        encoder = UserEncoder.load(given.model, base=given.base)
        encoder.to("cuda" if torch.cuda.is_available() else "cpu")
        embed(
            encoder,
            given.events,
            given.out,
            anchor=given.anchor,
            history_days=given.history_days,
            dtype=given.dtype,
            part_size=given.part_size,
            progress=_say(time.monotonic()),
        )
    except (ValueError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
