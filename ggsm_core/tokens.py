"""Sequences on disk: every user and answer tokenised once, in flat arrays.

Files ``<name>-00000.safetensors``, ... (shards) hold the concatenation of their sequences and where each
begins. They are mapped into memory: a training process starts at once, reads what a batch needs, and holds
every row that it reads against a checksum.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from ggsm_core.data import windows
from ggsm_core.order import in_pools, save_indexes
from ggsm_core.progress import Progress
from ggsm_core.shards import ShardError, mapped
from ggsm_core.template import (
    MODALITIES,
    NUMBERS,
    EmptyHistory,
    Encoded,
    Record,
    User,
    encode_answer,
    encode_user,
)

SHARD_ROWS = 1 << 18
"""Sequences in a file."""


class Shard:
    """The sequences of one file, or of memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray], name: str) -> None:
        self.arrays, self.name = arrays, name

    def __len__(self) -> int:
        return len(self.arrays["checksum"])

    @classmethod
    def of(cls, encoded: Iterable[Encoded], name: str = "memory") -> Shard:
        """Flatten sequences."""
        rows = list(encoded)
        texts = sorted({record.text for row in rows for record in row.records})
        index = {text: i for i, text in enumerate(texts)}
        records = [record for row in rows for record in row.records]
        shard = cls(
            {
                "input_ids": np.concatenate([row.input_ids for row in rows]).astype(np.int32),
                "segments": np.concatenate([row.segments for row in rows]).astype(np.int8),
                "token_start": np.cumsum([0, *(len(row.input_ids) for row in rows)]).astype(np.int64),
                "record_slot": np.concatenate([row.slots for row in rows]).astype(np.int32),
                "record_text": np.array([index[record.text] for record in records], np.int32),
                "record_numbers": np.array([record.numbers for record in records], np.float32).reshape(
                    -1, len(NUMBERS)
                ),
                "record_simulated": np.array([record.simulated for record in records], bool),
                "record_start": np.cumsum([0, *(len(row.slots) for row in rows)]).astype(np.int64),
                "dropped": np.array([row.dropped for row in rows], np.int32),
                "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
                "checksum": np.zeros(len(rows), np.uint32),
            },
            name,
        )
        for row in range(len(rows)):
            shard.arrays["checksum"][row] = shard._checksum(shard._of_row(row))
        return shard

    def _of_row(self, row: int) -> tuple[np.ndarray, ...]:
        a = self.arrays
        tokens = slice(a["token_start"][row], a["token_start"][row + 1])
        slots = slice(a["record_start"][row], a["record_start"][row + 1])
        return (
            *(a[name][tokens] for name in ("input_ids", "segments")),
            *(a[f"record_{name}"][slots] for name in ("slot", "text", "numbers", "simulated")),
            a["dropped"][row : row + 1],
        )

    def __getitem__(self, row: int) -> Encoded:
        parts = self._of_row(row)
        if self._checksum(parts) != self.arrays["checksum"][row]:
            raise ShardError(
                f"{self.name}: row {row} is not what was written (its checksum differs); delete that run and "
                "start again, so that it is made anew"
            )
        input_ids, segments, slots, texts, numbers, simulated, dropped = parts
        records = tuple(
            Record(self._texts[text], tuple(values), made_up)
            for text, values, made_up in zip(
                texts.tolist(), numbers.tolist(), simulated.tolist(), strict=True
            )
        )
        return Encoded(
            input_ids.astype(np.int64),
            segments.astype(np.int64),
            records,
            slots.astype(np.int64),
            int(dropped[0]),
        )

    def length(self, row: int) -> int:
        """Tokens of a sequence."""
        start = self.arrays["token_start"]
        return int(start[row + 1] - start[row])

    def _checksum(self, parts: Iterable[np.ndarray]) -> int:
        value = self._texts_checksum
        for part in parts:
            value = zlib.crc32(part.data, value)
        return value

    @cached_property
    def _texts_checksum(self) -> int:
        return zlib.crc32(self.arrays["texts"].data)

    @cached_property
    def _texts(self) -> list[str]:
        return json.loads(self.arrays["texts"].tobytes())


class Sequences:
    """Encoded sequences by row number; ``sequences[i]`` is an ``Encoded``."""

    def __init__(self, shards: list[Shard]) -> None:
        self._shards = shards
        self._first = np.cumsum([0, *map(len, shards)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, row: int) -> Encoded:
        number, place = self._place(row)
        return self._shards[number][place]

    def lengths(self) -> np.ndarray:
        """Int64[n]: tokens of each sequence."""
        return np.concatenate([np.diff(shard.arrays["token_start"]) for shard in self._shards])

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Int64[m]: tokens of the sequences ``rows`` Int64[m], without a look at any other."""
        return np.array([self._shards[number].length(row) for number, row in map(self._place, rows)])

    def _place(self, row: int) -> tuple[int, int]:
        """The shard of a row, and its number there."""
        number = int(np.searchsorted(self._first, row, side="right")) - 1
        return number, int(row - self._first[number])

    @property
    def dropped(self) -> int:
        """Records that truncation dropped, over all sequences."""
        return sum(int(shard.arrays["dropped"].sum()) for shard in self._shards)

    @classmethod
    def of(cls, encoded: Iterable[Encoded]) -> Sequences:
        """In memory."""
        return cls([Shard.of(encoded)])

    @classmethod
    def load(cls, folder: Path, name: str) -> Sequences:
        """Map what ``write`` wrote. Raises ``ShardError`` for files that are missing or cut off."""
        found = sorted(folder.glob(f"{name}-*.safetensors"))
        expected = [folder / _file(name, number) for number in range(max(len(found), 1))]
        if found != expected:
            lacking = next(path for path in expected if path not in found)
            raise ShardError(f"{folder.name}/{lacking.name}: missing; delete that folder and start again")
        return cls([Shard(mapped(path), f"{folder.name}/{path.name}") for path in found])


def write(folder: Path, name: str, encoded: Iterable[Encoded], shard_rows: int = SHARD_ROWS) -> None:
    """Write sequences in shards; memory holds one of them."""
    rest = iter(encoded)
    number = 0
    while rows := list(islice(rest, shard_rows)):
        save_file(dict(Shard.of(rows).arrays), folder / _file(name, number))
        number += 1


def _file(name: str, number: int) -> str:
    return f"{name}-{number:05d}.safetensors"


def read_users(folder: Path, samples: pl.Series, template: Any) -> dict[int, User]:
    """The users of these samples, from a windows run.

    Raises ``EmptyHistory`` for samples of which the template shows no record.
    """
    wanted = samples.unique()
    records = pl.read_parquet(folder / "records.parquet").filter(pl.col("sample").is_in(wanted.to_list()))
    users = dict(windows.users(records, template))
    hidden = [sample for sample in wanted if sample not in users]
    if hidden:
        counts = ", ".join(f"{name}: {getattr(template, name)}" for name in MODALITIES)
        theirs = records.filter(pl.col("sample").is_in(hidden))["modality"].cast(pl.String)
        most = theirs.value_counts().sort("count", "modality", descending=[True, False])["modality"]
        raise EmptyHistory(
            f"template: {len(hidden):,} of {len(wanted):,} samples have no record to show under {counts}; "
            f"raise those that they have records of: {', '.join(most) or 'none'}"
        )
    return users


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``tokens``: pairs as (user & query, answer), and the probe samples with the template's query.

    Writes ``train_users``, ``train_answers`` (row i is pair i of ``pairs.parquet``) and ``probe_users``
    (row i is row i of ``probe.parquet``).
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(inputs["pretrain"])
    pairs = in_pools(pl.read_parquet(inputs.get("mix", inputs["pairs"]) / "pairs.parquet"))
    samples = pl.read_parquet(inputs["windows"] / "samples.parquet")
    probe = samples.filter(pl.col("split") == "probe").select("sample", "user", "anchor")
    users = read_users(inputs["windows"], pl.concat([pairs["sample"], probe["sample"]]), params.template)
    limits = params.template

    def encode(sample: int, query: str | None) -> Encoded:
        return encode_user(
            users[sample],
            tokenizer,
            query,
            modality_input=limits.modality_input,
            max_tokens=limits.max_user_tokens,
        )

    def told(encoded: Iterable[Encoded], before: int, what: str) -> Iterator[Encoded]:
        for done, row in enumerate(encoded, before + 1):
            progress(done, 2 * len(pairs) + len(probe), what)
            yield row

    write(
        out,
        "train_users",
        told((encode(*row) for row in pairs.select("sample", "query").iter_rows()), 0, "users tokenised"),
    )
    answers = (
        encode_answer(answer, tokenizer, max_tokens=limits.max_answer_tokens) for answer in pairs["answer"]
    )
    write(out, "train_answers", told(answers, len(pairs), "answers tokenised"))
    probed = (encode(sample, limits.query) for sample in probe["sample"])
    write(out, "probe_users", told(probed, 2 * len(pairs), "probe samples tokenised"))
    household = samples.select("sample", "user")
    table = pairs.join(household, on="sample", how="left", maintain_order="left").select(
        "sample", "user", "granularity", "answer_id"
    )
    table = table.with_columns(pl.col("user").rank("dense").cast(pl.Int64).alias("user_id"))
    table.write_parquet(out / "pairs.parquet")
    save_indexes(out, table, Sequences.load(out, "train_users").lengths())
    probe.write_parquet(out / "probe.parquet")
