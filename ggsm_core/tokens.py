"""Sequences on disk: every user and answer tokenised once, in flat arrays.

A folder ``<name>.safetensors`` holds the concatenation of all sequences and where each begins, so a training
process starts at once and reads what a batch needs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from ggsm_core.data import windows
from ggsm_core.template import NUMBERS, Encoded, Record, User, encode_answer, encode_user

Progress = Callable[[float, float, str], None]


class Sequences:
    """Encoded sequences by row number; ``sequences[i]`` is an ``Encoded``."""

    def __init__(self, arrays: dict[str, np.ndarray], texts: Sequence[str]) -> None:
        self._arrays = arrays
        self._texts = texts

    def __len__(self) -> int:
        return len(self._arrays["token_start"]) - 1

    def __getitem__(self, row: int) -> Encoded:
        a = self._arrays
        tokens = slice(a["token_start"][row], a["token_start"][row + 1])
        slots = slice(a["record_start"][row], a["record_start"][row + 1])
        records = tuple(
            Record(self._texts[text], tuple(numbers), simulated)
            for text, numbers, simulated in zip(
                *(a[f"record_{name}"][slots].tolist() for name in ("text", "numbers", "simulated")),
                strict=True,
            )
        )
        return Encoded(
            a["input_ids"][tokens].astype(np.int64),
            a["segments"][tokens].astype(np.int64),
            records,
            a["record_slot"][slots].astype(np.int64),
            int(a["dropped"][row]),
        )

    def lengths(self) -> np.ndarray:
        """Int64[n]: tokens of each sequence."""
        return np.diff(self._arrays["token_start"])

    @property
    def dropped(self) -> int:
        """Records that truncation dropped, over all sequences."""
        return int(self._arrays["dropped"].sum())

    @classmethod
    def of(cls, encoded: Iterable[Encoded]) -> Sequences:
        """Flatten sequences."""
        rows = list(encoded)
        texts = sorted({record.text for row in rows for record in row.records})
        index = {text: i for i, text in enumerate(texts)}
        records = [record for row in rows for record in row.records]
        arrays: dict[str, np.ndarray] = {
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
        }
        return cls(arrays, texts)

    def save(self, folder: Path, name: str) -> None:
        """Write ``<name>.safetensors`` and ``<name>.json`` (the distinct record texts)."""
        save_file(self._arrays, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(list(self._texts)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, name: str) -> Sequences:
        """Read what ``save`` wrote."""
        texts = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return cls(load_file(folder / f"{name}.safetensors"), texts)


def read_users(folder: Path, samples: pl.Series, template: Any) -> dict[int, User]:
    """The users of these samples, from a windows run."""
    wanted = pl.col("sample").is_in(samples.unique().to_list())
    return dict(windows.users(pl.read_parquet(folder / "records.parquet").filter(wanted), template))


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``tokens``: pairs as (user & query, answer), and the probe samples without query.

    Writes ``train_users``, ``train_answers`` (row i is pair i of ``pairs.parquet``) and ``probe_users``
    (row i is row i of ``probe.parquet``).
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(inputs["pretrain"])
    pairs = pl.read_parquet(inputs["pairs"] / "pairs.parquet")
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

    total, done = len(pairs) + len(probe), 0
    train_users, train_answers = [], []
    for sample, query, answer in pairs.select("sample", "query", "answer").iter_rows():
        train_users.append(encode(sample, query))
        train_answers.append(encode_answer(answer, tokenizer, max_tokens=limits.max_answer_tokens))
        done += 1
        progress(done, total, "pairs tokenised")
    Sequences.of(train_users).save(out, "train_users")
    Sequences.of(train_answers).save(out, "train_answers")
    probe_users = []
    for sample in probe["sample"].to_list():
        probe_users.append(encode(sample, None))
        done += 1
        progress(done, total, "probe samples tokenised")
    Sequences.of(probe_users).save(out, "probe_users")
    household = samples.select("sample", "user")
    pairs.join(household, on="sample", how="left", maintain_order="left").select(
        "sample", "user", "granularity", "answer_id"
    ).with_columns(pl.col("user").rank("dense").cast(pl.Int64).alias("user_id")).write_parquet(
        out / "pairs.parquet"
    )
    probe.write_parquet(out / "probe.parquet")
