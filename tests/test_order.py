"""Batches by length: a function of (seed, step), each sample once an epoch, little padding, any number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import properties

from ggsm_core import order
from ggsm_core.shards import ShardError


def padding(lengths: np.ndarray, made: list[np.ndarray]) -> float:
    """The share of padding among the tokens of some batches."""
    held = sum(len(rows) * int(lengths[rows].max()) for rows in made)
    return 1 - sum(int(lengths[rows].sum()) for rows in made) / held


def batches_of(lengths: np.ndarray, size: int, seed: int = 0) -> order.Batches:
    """A plan over samples of these lengths."""
    return order.Batches(np.argsort(lengths, kind="stable"), size, seed)


@properties
@given(count=st.integers(1, 400), data=st.data(), seed=st.integers(0, 9))
def test_every_sample_comes_once_an_epoch(count: int, data: st.DataObject, seed: int) -> None:
    """Over three epochs, whatever is left of a batch where one ends; and the epochs are told."""
    size = data.draw(st.integers(1, count))
    plan = batches_of(np.arange(count), size, seed)
    steps = [plan.samples(step) for step in range(-(-3 * count // size))]
    assert all(len(samples) == len(epochs) == size for samples, epochs in steps)
    samples, epochs = (np.concatenate(part)[: 3 * count] for part in zip(*steps, strict=True))
    assert np.array_equal(epochs, np.repeat(np.arange(3), count))
    for epoch in samples.reshape(3, count):
        assert np.array_equal(np.sort(epoch), np.arange(count))


@properties
@given(asked=st.lists(st.integers(0, 10**9), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_a_batch_follows_from_seed_and_step_alone(asked: list[int], seed: int) -> None:
    """Whatever was asked before, however far; another seed gives another batch."""
    lengths = np.arange(1000) % 37
    for step in asked:
        used, fresh, other = (batches_of(lengths, 8, s) for s in (seed, seed, seed + 1))
        used.samples(step + 3)
        order._permutation.cache_clear()
        assert np.array_equal(used.samples(step)[0], fresh.samples(step)[0])
        assert not np.array_equal(used.samples(step)[0], other.samples(step)[0])


def test_rows_of_like_length_share_a_batch() -> None:
    """A long tail of lengths wastes little; in random order half of all tokens would be padding."""
    rng = np.random.default_rng(0)
    lengths = 20 + rng.gamma(1.5, 40, 20_000).astype(int)
    plan = batches_of(lengths, 64)
    made = [plan.samples(step)[0] for step in range(len(lengths) // 64)]
    assert padding(lengths, made) < 0.15
    shuffled = np.split(rng.permutation(len(lengths))[: 64 * 312], 312)
    assert padding(lengths, shuffled) > 0.5


def test_neighbours_and_order_change_with_the_epoch() -> None:
    """No batch of one epoch is one of the next, and lengths come in no order."""
    plan = batches_of(np.arange(4096), 16)
    first, second = ([plan.samples(step)[0] for step in range(e * 256, (e + 1) * 256)] for e in (0, 1))
    assert not {frozenset(rows.tolist()) for rows in first} & {frozenset(rows.tolist()) for rows in second}
    assert max(len(set(a) & set(b)) for a in first[:32] for b in second) < 8
    means = [rows.mean() for rows in first]
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.2


def test_the_index_holds_the_pairs_of_each_sample(tmp_path: Path) -> None:
    """A sample is as long as its longest pair; what is saved is what is mapped."""
    pairs = pl.DataFrame({"sample": [3, 3, 5, 8, 8, 8], "user_id": [0, 0, 1, 2, 2, 2], "answer_id": range(6)})
    made = order.Index.of(pairs, np.array([9, 2, 7, 1, 8, 3]))
    assert made.start.tolist() == [0, 2, 3, 6] and made.by_length.tolist() == [1, 2, 0]
    made.save(tmp_path, "behaviour")
    mapped = order.Index.load(tmp_path, "behaviour")
    for name, array in vars(made).items():
        assert np.array_equal(getattr(mapped, name), array)
        assert isinstance(getattr(mapped, name).base, np.ndarray)  # a view of the file, not a copy of it
    with pytest.raises(ShardError, match="not sorted by sample"):
        order.Index.of(pairs.reverse(), np.ones(6))


def test_a_torn_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"index-behaviour\.safetensors: can't be read"):
        order.Index.load(tmp_path, "behaviour")
    pairs = pl.DataFrame({"sample": [0, 1], "user_id": [0, 1], "answer_id": [0, 1]})
    order.Index.of(pairs, np.array([3, 4])).save(tmp_path, "behaviour")
    whole = (tmp_path / "index-behaviour.safetensors").read_bytes()
    for torn in (whole[:-1], whole[:40], whole[:4], b"", b"\xff" * 64):
        (tmp_path / "index-behaviour.safetensors").write_bytes(torn)
        with pytest.raises(ShardError, match=r"index-behaviour\.safetensors: can't be read.*start again"):
            order.Index.load(tmp_path, "behaviour")
