"""Sequences on disk: what is read is what was written, from one shard or many, and damage is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from strategies import properties
from test_baselines import log, write

from ggsm_core import sections, template, tokens
from ggsm_core.data import windows
from ggsm_core.shards import ShardError


def encoded(sizes: list[int]) -> list[template.Encoded]:
    """Users of so many records, and an answer for 0."""
    return [
        template.encode_user(tiny.user(size, seed=i), tiny.tokenizer(), max_tokens=tiny.LONGEST)
        if size
        else template.encode_answer("frozen pizza", tiny.tokenizer(), max_tokens=32)
        for i, size in enumerate(sizes)
    ]


def same(one: template.Encoded, other: template.Encoded) -> bool:
    """All fields equal, numbers to float32."""
    arrays = all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("input_ids", "segments", "slots")
    )
    texts = [r.text for r in one.records] == [r.text for r in other.records]
    numbers = [np.array([r.numbers for r in of.records], np.float32) for of in (one, other)]
    return arrays and texts and np.array_equal(*numbers) and one.dropped == other.dropped


@properties
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), shard_rows=st.integers(1, 13))
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shard_rows: int
) -> None:
    folder, rows = tmp_path_factory.mktemp("shards"), encoded(sizes)
    tokens.write(folder, "users", iter(rows), shard_rows)
    assert len(list(folder.iterdir())) == -(-len(rows) // shard_rows)
    for found in (tokens.Sequences.load(folder, "users"), tokens.Sequences.of(rows)):
        assert len(found) == len(rows)
        assert all(same(found[i], row) for i, row in enumerate(rows))
        assert found.lengths().tolist() == [len(row.input_ids) for row in rows]
        assert found.dropped == sum(row.dropped for row in rows)


def test_any_changed_byte_is_named_with_file_and_row(tmp_path: Path) -> None:
    """A bit anywhere in the data: what is returned is what was written, or it is refused.

    Only where a file's last offset grows, which cuts nothing off, is there nothing to refuse.
    """
    rows = encoded([3, 0, 5, 1])
    tokens.write(tmp_path, "users", rows)
    path = tmp_path / "users-00000.safetensors"
    whole = path.read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    noticed = 0
    for place in rng.choice(np.arange(begin, len(whole)), 300, replace=False):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        found, refused = tokens.Sequences.load(tmp_path, "users"), 0
        for i, row in enumerate(rows):
            try:
                assert same(found[i], row)
            except ShardError as error:
                assert f"users-00000.safetensors: row {i} is not what was written" in str(error)
                refused += 1
        noticed += refused > 0
    assert noticed >= 290


def test_missing_and_torn_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"users-00000\.safetensors: missing"):
        tokens.Sequences.load(tmp_path, "users")
    tokens.write(tmp_path, "users", encoded([1, 2, 3]), shard_rows=1)
    second = tmp_path / "users-00001.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-2])
    with pytest.raises(ShardError, match=r"users-00001\.safetensors: can't be read"):
        tokens.Sequences.load(tmp_path, "users")
    second.unlink()
    with pytest.raises(ShardError, match=r"users-00001\.safetensors: missing"):
        tokens.Sequences.load(tmp_path, "users")


def test_the_stage_knows_households_and_asks_the_probed_what_the_template_says(tmp_path: Path) -> None:
    """Two training windows of one household have one user id: they are no negatives of each other."""
    folder = write(tmp_path / "windows", log(4), users=4)
    plan = ((90, "train"), (120, "train"), (240, "probe"))
    samples = pl.DataFrame(
        [(3 * k + i, f"u{k:02d}", anchor, split) for k in range(4) for i, (anchor, split) in enumerate(plan)],
        schema={"sample": pl.Int64, "user": pl.String, "anchor": pl.Int32, "split": pl.String},
        orient="row",
    )
    samples.write_parquet(folder / "samples.parquet")
    records = windows.history(pl.read_parquet(folder / "events.parquet"), samples, 90)
    records.write_parquet(folder / "records.parquet")
    inputs = {"windows": folder, "pairs": tmp_path / "pairs", "pretrain": tmp_path / "pretrain"}
    out = tmp_path / "out"
    for path in (inputs["pairs"], inputs["pretrain"], out):
        path.mkdir()
    asked = samples.filter(split="train").select("sample", granularity=pl.lit("visits"))
    told = asked.with_columns(query=pl.lit(tiny.QUERY), answer=pl.lit("homeowner"), answer_id=pl.lit(0))
    told.write_parquet(inputs["pairs"] / "pairs.parquet")
    tiny.tokenizer().save_pretrained(inputs["pretrain"])
    limits = sections.Template(bill=2, app=1, spm=1, minipro=1, tabular=2, query="all visits?")
    tokens.run(SimpleNamespace(template=limits), inputs, out, lambda *_: None)

    table, probe = (pl.read_parquet(out / f"{name}.parquet") for name in ("pairs", "probe"))
    owner = dict(samples.select("sample", "user").iter_rows())
    ids, owners = table["user_id"].to_list(), [owner[sample] for sample in table["sample"]]
    assert [[a == b for b in ids] for a in ids] == [[a == b for b in owners] for a in owners]
    assert len(set(ids)) == 4 < len(ids)
    assert set(probe["sample"]) == set(samples.filter(split="probe")["sample"])
    users = dict(windows.users(records, limits))
    for name, rows, query in (
        ("train_users", table["sample"], tiny.QUERY),
        ("probe_users", probe["sample"], limits.query),
    ):
        found = tokens.Sequences.load(out, name)
        for row, sample in enumerate(rows):
            expected = template.encode_user(
                users[sample], tiny.tokenizer(), query, max_tokens=limits.max_user_tokens
            )
            assert same(found[row], expected)


def test_samples_of_which_a_template_shows_nothing_are_counted(tmp_path: Path) -> None:
    """With the counts that hide them, and what they have records of."""
    texts = pl.DataFrame({"sample": [1, 2, 2], "modality": ["bill", "app", "app"], "text": ["a", "b", "c"]})
    rest = {"rank": pl.int_range(pl.len()).over("sample", "modality"), "simulated": False}
    numbers = {name: pl.lit(0.0) for name in template.NUMBERS}
    texts.with_columns(**rest, **numbers).write_parquet(tmp_path / "records.parquet")
    samples = pl.Series("sample", [1, 2, 2])
    with pytest.raises(template.EmptyHistory, match=r"1 of 2 samples .* app: 0, .*raise .*records of: app$"):
        tokens.read_users(tmp_path, samples, sections.Template(app=0))
    assert sorted(tokens.read_users(tmp_path, samples, sections.Template(app=1))) == [1, 2]
