"""Eq. 4: ``masks.additive_bias`` against the loop-by-loop reference, and what it must refuse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import properties, seeds, valid_masks
from torch import Tensor

from ggsm_core import masks

Bias = Callable[[Tensor, Tensor, torch.dtype], Tensor]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# One unit in the last place of each type, for a logarithm of up to 70.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.3, torch.float16: 0.05}
LEAST = 1e-30


def draw_visibility(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Weights in [0, 1]: a third of them exactly 0 or 1, some tiny, the others uniform."""
    kind = rng.integers(0, 6, shape)
    uniform = rng.uniform(LEAST, 1.0, shape)
    return np.select([kind == 0, kind == 1, kind == 2], [0.0, 1.0, LEAST + uniform * 1e-20], uniform)


def check(
    implementation: Bias, visibility: np.ndarray, valid: np.ndarray, dtype: torch.dtype = torch.float64
) -> None:
    """The comparison with Eq. 4 that every test below relies on."""
    carried = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    bias = implementation(torch.tensor(visibility, dtype=carried), torch.tensor(valid), dtype)
    hidden = torch.finfo(dtype).min
    expected = reference.additive_bias(visibility, valid, hidden)
    assert bias.dtype == dtype
    assert tuple(bias.shape) == expected.shape
    actual = bias.double().numpy()
    assert ((actual == hidden) == (expected == hidden)).all(), "other entries are hidden"
    assert ((actual == 0) == (expected == 0)).all(), "other entries are fully visible"
    soft = expected != hidden
    np.testing.assert_allclose(actual[soft], expected[soft], rtol=0, atol=TOLERANCE[dtype])


@properties
@given(valid_masks(), seeds, st.booleans(), st.sampled_from(DTYPES))
def test_bias_is_eq_4(valid: np.ndarray, seed: int, per_key: bool, dtype: torch.dtype) -> None:
    batch, length = valid.shape
    shape = (batch, length) if per_key else (batch, length, length)
    visibility = draw_visibility(np.random.default_rng(seed), shape)
    if dtype in (torch.bfloat16, torch.float16):  # a weight next to 1 has a logarithm that rounds to 0 there
        visibility = np.where(visibility > 0.9, 1.0, visibility)
    check(masks.additive_bias, visibility, valid, dtype)


@properties
@given(valid_masks(), seeds)
def test_softmax_of_the_bias_multiplies_attention_by_visibility(valid: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, length = valid.shape
    visibility = draw_visibility(rng, (batch, length, length))
    scores = rng.normal(0, 3, (batch, length, length))
    bias = masks.additive_bias(torch.tensor(visibility), torch.tensor(valid), torch.float64)
    attention = torch.softmax(torch.tensor(scores)[:, None] + bias, dim=-1)[:, 0].numpy()
    np.testing.assert_allclose(attention, reference.attention(scores, visibility, valid), atol=1e-12)


@properties
@given(valid_masks(), seeds, st.sampled_from(DTYPES))
def test_no_row_is_empty(valid: np.ndarray, seed: int, dtype: torch.dtype) -> None:
    """Softmax with large scores is finite, in an all-padding row and with w = 0 throughout too."""
    rng = np.random.default_rng(seed)
    visibility = torch.zeros(valid.shape, dtype=torch.float32)
    bias = masks.additive_bias(visibility, torch.tensor(valid), dtype)
    assert torch.isfinite(bias).all()
    scores = torch.tensor(rng.choice([-100.0, 100.0], bias.shape)).to(dtype)
    attention = torch.softmax((scores + bias).float(), dim=-1)
    assert torch.isfinite(attention).all()
    for b, i, j in np.argwhere(
        ~valid[:, None, :] & (np.arange(valid.shape[1])[:, None] != np.arange(valid.shape[1]))
    ):
        assert attention[b, 0, i, j] == 0, "a padding key is seen"


@properties
@given(valid_masks(), seeds)
def test_weights_of_the_past_and_of_padding_do_not_matter(valid: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    batch, length = valid.shape
    one, other = (draw_visibility(rng, (batch, length, length)) for _ in range(2))
    future = np.triu(np.ones((length, length), dtype=bool), 1) & valid[:, None, :]
    other = np.where(future, one, other)
    first, second = (masks.additive_bias(torch.tensor(v), torch.tensor(valid)) for v in (one, other))
    assert torch.equal(first, second)


@properties
@given(valid_masks(), seeds)
def test_per_key_weights_are_the_same_for_every_query(valid: np.ndarray, seed: int) -> None:
    weights = torch.tensor(draw_visibility(np.random.default_rng(seed), valid.shape))
    square = weights[:, None, :].expand(-1, valid.shape[1], -1).contiguous()
    first, second = (masks.additive_bias(v, torch.tensor(valid)) for v in (weights, square))
    assert torch.equal(first, second)


@properties
@given(valid_masks(), seeds, st.integers(1, 3))
def test_more_padding_leaves_the_real_part_alone(valid: np.ndarray, seed: int, extra: int) -> None:
    batch, length = valid.shape
    visibility = draw_visibility(np.random.default_rng(seed), (batch, length, length))
    whole = masks.additive_bias(torch.tensor(visibility), torch.tensor(valid))
    for left, right in ((extra, 0), (0, extra), (extra, extra)):
        padded = masks.additive_bias(
            torch.tensor(np.pad(visibility, ((0, 0), (left, right), (left, right)))),
            torch.tensor(np.pad(valid, ((0, 0), (left, right)))),
        )
        assert torch.equal(padded[:, :, left : left + length, left : left + length], whole)


def test_the_logarithm_has_the_precision_of_the_bias() -> None:
    """Half-precision weights lose nothing more on their way to a single-precision bias."""
    weights = torch.tensor([[0.1, 0.3, 0.7]], dtype=torch.bfloat16)
    bias = masks.additive_bias(weights, torch.ones(1, 3, dtype=torch.bool), torch.float32)
    torch.testing.assert_close(bias[0, 0, 0, 1:], weights[0, 1:].double().log().float(), rtol=1e-6, atol=0)


def test_the_two_ends_are_the_causal_and_the_full_mask() -> None:
    valid = torch.ones(1, 4, dtype=torch.bool)
    hidden = torch.finfo(torch.float32).min
    causal = masks.additive_bias(torch.zeros(1, 4), valid)
    assert causal.dtype == torch.float32
    assert torch.equal(causal[0, 0], torch.full((4, 4), hidden).triu(1))
    assert torch.equal(masks.additive_bias(torch.ones(1, 4), valid), torch.zeros(1, 1, 4, 4))


@properties
@given(valid_masks(), seeds, st.booleans())
def test_mean_visibility_is_over_real_future_pairs(valid: np.ndarray, seed: int, per_key: bool) -> None:
    batch, length = valid.shape
    shape = (batch, length) if per_key else (batch, length, length)
    visibility = draw_visibility(np.random.default_rng(seed), shape)
    seen = [
        reference.future_weight(visibility, b, i, j)
        for b in range(batch)
        for i in range(length)
        for j in range(i + 1, length)
        if valid[b, i] and valid[b, j]
    ]
    mean = masks.mean_visibility(torch.tensor(visibility), torch.tensor(valid))
    assert mean == pytest.approx(sum(seen) / len(seen) if seen else 0.0, abs=1e-12)


# Negative controls: the comparison above fails for each of these wrong masks.


def _always_causal(visibility: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    return masks.additive_bias(torch.zeros_like(visibility), valid, dtype)


def _always_full(visibility: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    return masks.additive_bias(torch.ones_like(visibility), valid, dtype)


def _past_for_future(visibility: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    return masks.additive_bias(visibility, valid, dtype).transpose(-1, -2)


def _ignores_padding(visibility: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    return masks.additive_bias(visibility, torch.ones_like(valid), dtype)


def _weight_of_the_query(visibility: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    return masks.additive_bias(visibility.transpose(-1, -2), valid, dtype)


def _no_logarithm(visibility: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    bias = masks.additive_bias(visibility, valid, dtype)
    return torch.where(bias > torch.finfo(dtype).min, bias.exp() - 1, bias)


def _minus_infinity(visibility: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    bias = masks.additive_bias(visibility, valid, dtype)
    return torch.where(bias > torch.finfo(dtype).min, bias, -torch.inf)


def _empty_padding_rows(visibility: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    bias = masks.additive_bias(visibility, valid, dtype)
    return torch.where(valid[:, None, None, :], bias, torch.finfo(dtype).min)


def _padding_queries_blind(visibility: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    bias = masks.additive_bias(visibility, valid, dtype)
    own = torch.eye(valid.shape[1], dtype=torch.bool)
    return torch.where(valid[:, None, :, None] | own, bias, torch.finfo(dtype).min)


WRONG = (
    _always_causal,
    _always_full,
    _past_for_future,
    _ignores_padding,
    _weight_of_the_query,
    _no_logarithm,
    _minus_infinity,
    _empty_padding_rows,
    _padding_queries_blind,
)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_mask_fails_the_comparison(wrong: Bias) -> None:
    rng = np.random.default_rng(0)
    visibility = rng.uniform(0.1, 0.9, (2, 5, 5))
    visibility[:, 0, 1] = 0.0
    visibility[:, 0, 2] = 1.0
    valid = np.array([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=bool)
    check(masks.additive_bias, visibility, valid)
    with pytest.raises(AssertionError):
        check(wrong, visibility, valid)


# Bad input: a ValueError that names the field and the value.

VALID = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("visibility", "value"),
    [
        (torch.full((2, 3, 3), 1.5), "1.5"),
        (torch.full((2, 3), -0.25), "-0.25"),
        (torch.full((2, 3, 3), torch.nan), "nan"),
        (torch.full((2, 3), torch.inf), "inf"),
        (torch.ones(2, 4), "4"),
        (torch.ones(3, 3, 3), "3, 3, 3"),
        (torch.ones(2, 3, 4), "2, 3, 4"),
        (torch.ones(3), "3"),
        (torch.ones(2, 1, 3, 3), "2, 1, 3, 3"),
    ],
)
def test_bad_visibility_is_refused(visibility: Tensor, value: str) -> None:
    with pytest.raises(ValueError, match="visibility") as error:
        masks.additive_bias(visibility, VALID)
    assert value in str(error.value)


@pytest.mark.parametrize("place", [(0, 0, 2), (1, 1, 2)])
def test_one_bad_weight_among_good_ones_is_refused(place: tuple[int, int, int]) -> None:
    visibility = torch.full((2, 3, 3), 0.5)
    visibility[place] = torch.nan
    with pytest.raises(ValueError, match="visibility"):
        masks.additive_bias(visibility, VALID)


@pytest.mark.parametrize("valid", [torch.ones(3, dtype=torch.bool), torch.ones(2, 3, 3, dtype=torch.bool)])
def test_bad_shape_of_valid_is_refused(valid: Tensor) -> None:
    with pytest.raises(ValueError, match="valid"):
        masks.additive_bias(torch.ones(2, 3), valid)


def test_valid_must_be_boolean() -> None:
    with pytest.raises(ValueError, match="valid"):
        masks.additive_bias(torch.ones(2, 3), torch.ones(2, 3))
