"""Eq. 6-8: ``loss.info_nce`` against the loop-by-loop reference, its gradient, and what it must refuse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import properties, seeds
from torch import Tensor
from torch.nn.functional import normalize

from ggsm_core import loss

Loss = Callable[..., Tensor]
#: Rounding may decide a comparison of Eq. 8 closer than this; such draws are set aside.
UNDECIDED = 1e-6


def unit_rows(rng: np.random.Generator, batch: int, size: int) -> np.ndarray:
    """B unit vectors, Float[B, d]: random, or signed basis vectors (similarities exactly -1, 0 and 1)."""
    if rng.integers(0, 3) == 0:
        rows = np.zeros((batch, size))
        rows[np.arange(batch), rng.integers(0, size, batch)] = rng.choice([-1.0, 1.0], batch)
        return rows
    return np.stack([reference.normalise(row) for row in rng.normal(size=(batch, size)) + 0.1])


@st.composite
def batches(draw: st.DrawFn, batch: int = 5, size: int = 4) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """User and answer rows and the options of the loss; identifiers collide often."""
    rng = np.random.default_rng(draw(seeds))
    rows = draw(st.integers(1, batch))
    user, answer = (unit_rows(rng, rows, s) for s in [draw(st.integers(1, size))] * 2)
    options: dict[str, Any] = {
        "temperature": draw(st.sampled_from((0.01, 0.05, 0.5, 2.0))),
        "margin": draw(st.sampled_from((None, 0.0, 0.1, 0.55))),
        "same_side": draw(st.booleans()),
    }
    for name in ("answer_ids", "user_ids"):
        options[name] = list(map(int, rng.integers(0, 3, rows))) if draw(st.booleans()) else None
    return user, answer, options


def tensors(options: dict[str, Any]) -> dict[str, Any]:
    """The same options with the identifiers as Long[B]."""
    return {
        name: torch.tensor(value) if name in ("answer_ids", "user_ids") and value is not None else value
        for name, value in options.items()
    }


def decided(user: np.ndarray, answer: np.ndarray, options: dict[str, Any]) -> bool:
    """No comparison of Eq. 8 is within rounding, or all similarities are whole numbers and so exact."""
    exact = all(np.isin(rows, (-1.0, 0.0, 1.0)).all() for rows in (user, answer))
    return exact or reference.margin_gap(user, answer, options["margin"]) > UNDECIDED


def check(implementation: Loss, user: np.ndarray, answer: np.ndarray, options: dict[str, Any]) -> None:
    """The comparison with Eq. 6-8 that the tests below rely on."""
    value = implementation(torch.tensor(user), torch.tensor(answer), **tensors(options))
    assert value.shape == ()
    expected = reference.info_nce(user, answer, **options)
    np.testing.assert_allclose(value.item(), expected, rtol=1e-10, atol=1e-10)


@properties
@given(batches())
def test_loss_is_eq_6_to_8(drawn: tuple[np.ndarray, np.ndarray, dict[str, Any]]) -> None:
    user, answer, options = drawn
    assume(decided(*drawn))
    check(loss.info_nce, user, answer, options)


@properties
@given(batches(batch=4, size=3))
def test_gradient_is_that_of_finite_differences(drawn: tuple[np.ndarray, np.ndarray, dict[str, Any]]) -> None:
    """With Eq. 13 in front and the masks of Eq. 8 held: no gradient flows through a comparison."""
    user, answer, options = drawn
    assume(decided(*drawn))
    raw = [torch.tensor(rows, requires_grad=True) for rows in (user, answer)]
    loss.info_nce(*(normalize(rows, dim=-1) for rows in raw), **tensors(options)).backward()
    expected = reference.info_nce_gradient(user, answer, **options)
    for rows, gradient in zip(raw, expected, strict=True):
        assert rows.grad is not None
        np.testing.assert_allclose(rows.grad.numpy(), gradient, rtol=1e-5, atol=1e-6)


def test_the_defaults_are_the_stated_ones() -> None:
    rng = np.random.default_rng(0)
    user, answer = (torch.tensor(unit_rows(rng, 6, 3)) for _ in range(2))
    stated = loss.info_nce(user, answer, temperature=0.05, margin=0.1, same_side=True)
    assert torch.equal(loss.info_nce(user, answer), stated)


@properties
@given(batches(), st.sampled_from((torch.float32, torch.bfloat16)))
def test_loss_and_gradients_are_finite(
    drawn: tuple[np.ndarray, np.ndarray, dict[str, Any]], dtype: torch.dtype
) -> None:
    user, answer, options = drawn
    raw = [torch.tensor(rows).to(dtype).requires_grad_() for rows in (user, answer)]
    value = loss.info_nce(*raw, **tensors(options))
    assert torch.isfinite(value) and value >= 0
    value.backward()
    for rows in raw:
        assert rows.grad is not None and torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [None, 0.1])
@pytest.mark.parametrize("positive", [1.0, -1.0])
def test_the_extremes(dtype: torch.dtype, margin: float | None, positive: float) -> None:
    """Similarities of +-1 at temperature 0.01: e^{200} overflows these types, the loss doesn't."""
    batch = 8
    user = torch.zeros(batch, 4, dtype=dtype)
    user[:, 0] = 1
    raw = user.clone().requires_grad_(), (positive * user).requires_grad_()
    value = loss.info_nce(*raw, temperature=0.01, margin=margin)
    expected = reference.info_nce(
        user.double().numpy(), positive * user.double().numpy(), temperature=0.01, margin=margin
    )
    assert value.item() == pytest.approx(expected, rel=1e-2, abs=1e-6)
    value.backward()
    for rows in raw:
        assert rows.grad is not None and torch.isfinite(rows.grad).all()


@properties
@given(seeds, st.integers(2, 8))
def test_single_precision_agrees(seed: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    user, answer = (unit_rows(rng, batch, 16) for _ in range(2))
    assume(decided(user, answer, {"margin": 0.1}))
    value = loss.info_nce(torch.tensor(user, dtype=torch.float32), torch.tensor(answer, dtype=torch.float32))
    assert value.item() == pytest.approx(reference.info_nce(user, answer), rel=1e-4, abs=1e-4)


@properties
@given(batches(), st.integers(0, 5))
def test_rows_and_counts(drawn: tuple[np.ndarray, np.ndarray, dict[str, Any]], cut: int) -> None:
    """Two processes' rows are the whole batch's; true and masked negatives are counted as in Eq. 7-8."""
    user, answer, options = drawn
    assume(decided(*drawn))
    given_tensors = torch.tensor(user), torch.tensor(answer)
    whole, counted = loss.info_nce_rows(*given_tensors, **tensors(options))
    parts = [
        loss.info_nce_rows(*given_tensors, **tensors(options), rows=rows)[0]
        for rows in (slice(0, cut), slice(cut, None))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)

    choices = {name: options[name] for name in ("same_side", "answer_ids", "user_ids")}
    kept = reference.masks(user, answer, options["margin"], **choices)
    possible = reference.masks(user, answer, None, **choices)
    assert counted.kept == pytest.approx(sum(m.sum() for m in kept) / len(user))
    shares = counted.masked_user_answer, counted.masked_user_user, counted.masked_answer_answer
    for share, m, p in zip(shares, kept, possible, strict=False):
        if p.sum() > 0:
            assert share == pytest.approx(1 - m.sum() / p.sum())


# What the loss must not depend on ---------------------------------------------------------------------------


@properties
@given(batches(), seeds)
def test_the_order_of_the_batch_does_not_matter(
    drawn: tuple[np.ndarray, np.ndarray, dict[str, Any]], seed: int
) -> None:
    user, answer, options = drawn
    assume(decided(*drawn))
    order = torch.tensor(np.random.default_rng(seed).permutation(len(user)))
    given_options = tensors(options)
    moved_options = {
        name: value[order] if isinstance(value, Tensor) else value for name, value in given_options.items()
    }
    raw = [torch.tensor(rows, requires_grad=True) for rows in (user, answer)]
    moved = [rows.detach()[order].requires_grad_() for rows in raw]
    first, second = loss.info_nce(*raw, **given_options), loss.info_nce(*moved, **moved_options)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    first.backward()
    second.backward()
    for one, other in zip(raw, moved, strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad[order], other.grad, rtol=1e-9, atol=1e-9)


@properties
@given(seeds, st.sampled_from((None, 0.1)))
def test_an_excluded_row_changes_nothing(seed: int, margin: float | None) -> None:
    """A third row with row 0's answer and row 1's user is no negative of either, and has none itself."""
    rng = np.random.default_rng(seed)
    user, answer = (torch.tensor(unit_rows(rng, 3, 4)) for _ in range(2))
    assume(decided(user.numpy(), answer.numpy(), {"margin": margin}))
    options = {"answer_ids": torch.tensor([7, 8, 7]), "user_ids": torch.tensor([1, 2, 2]), "margin": margin}
    three = loss.info_nce(user, answer, **options)
    two = loss.info_nce(
        user[:2], answer[:2], margin=margin, answer_ids=torch.tensor([7, 8]), user_ids=torch.tensor([1, 2])
    )
    torch.testing.assert_close(3 * three, 2 * two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("field", ["answer_ids", "user_ids"])
def test_with_one_identity_there_are_no_negatives(field: str) -> None:
    """All rows of one household, or all with one answer: the loss and its gradient are exactly 0."""
    rng = np.random.default_rng(0)
    raw = [torch.tensor(unit_rows(rng, 5, 3), requires_grad=True) for _ in range(2)]
    value = loss.info_nce(*raw, margin=None, **{field: torch.zeros(5, dtype=torch.long)})
    assert value == 0
    value.backward()
    for rows in raw:
        assert rows.grad is None or (rows.grad == 0).all()


def test_distinct_identifiers_change_nothing() -> None:
    rng = np.random.default_rng(0)
    user, answer = (torch.tensor(unit_rows(rng, 6, 3)) for _ in range(2))
    ids = torch.tensor([5, -3, 9, 2**40, 0, 1])
    assert torch.equal(
        loss.info_nce(user, answer), loss.info_nce(user, answer, answer_ids=ids, user_ids=ids.flip(0))
    )


def test_batch_of_one_has_no_negatives() -> None:
    user = torch.tensor([[1.0, 0.0]], requires_grad=True)
    value = loss.info_nce(user, torch.tensor([[0.0, 1.0]]))
    assert value == 0
    value.backward()
    assert user.grad is not None and (user.grad == 0).all()


def test_a_margin_masked_negative_has_no_gradient() -> None:
    """Each user is nearer to the other's answer: every cross term is masked, so the loss is 0 and flat."""
    user = torch.eye(2, dtype=torch.float64, requires_grad=True)
    answer = torch.eye(2, dtype=torch.float64).flip(0).requires_grad_()
    value = loss.info_nce(user, answer, margin=0.1, same_side=False)
    assert value == 0
    value.backward()
    for rows in (user, answer):
        assert rows.grad is not None and (rows.grad == 0).all()
    assert loss.info_nce(user, answer, margin=None, same_side=False) > 1


def test_where_nobody_is_a_negative_none_is_masked() -> None:
    user = torch.eye(2, dtype=torch.float64)
    value, counted = loss.info_nce_rows(user, user, margin=None, user_ids=torch.zeros(2, dtype=torch.long))
    assert value.tolist() == [0, 0] and dataclasses.astuple(counted) == (0, 0, 0, 0)


def test_the_margin_is_exceeded_strictly() -> None:
    """s_ij = 0.5 = s(u_i, a_i) + margin stays a negative; the next smaller margin removes it."""
    user = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.0, 0.0, 1.0, 0.0]], dtype=torch.float64)
    answer = torch.tensor([[0.5, -0.5, 0.5, -0.5], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    below = math.nextafter(0.5, 0.0)
    for margin, kept in ((0.5, 1.0), (below, 0.0)):
        expected = kept * math.log1p(math.exp(0.5))  # both rows: positive 0, negative 0.5, temperature 1
        value = loss.info_nce(user, answer, temperature=1.0, margin=margin, same_side=False)
        assert value.item() == pytest.approx(expected, abs=1e-12)


def test_each_term_is_masked_by_its_own_similarity() -> None:
    """Users alike, answers apart: only the user-user term goes (1 > 0 + 0.1), the other two stay."""
    user = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    answer = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    value = loss.info_nce(user, answer, temperature=1.0, margin=0.1)
    assert value.item() == pytest.approx(math.log(3), abs=1e-12)  # e^0 (1 + user-answer + answer-answer)
    assert loss.info_nce(user, answer, temperature=1.0, margin=None).item() == pytest.approx(
        math.log(3 + math.e), abs=1e-12
    )


@properties
@given(seeds, st.floats(0.1, 1.0), st.integers(1, 5))
def test_scaling_similarities_is_scaling_the_temperature(seed: int, scale: float, batch: int) -> None:
    """Private coordinates shrink the similarities of distinct vectors by c^2: tau c^2 gives the same loss."""
    rng = np.random.default_rng(seed)
    user, answer = (torch.tensor(unit_rows(rng, batch, 3)) for _ in range(2))
    private = torch.eye(2 * batch, dtype=torch.float64) * math.sqrt(1 - scale**2)
    longer_user, longer_answer = (
        torch.cat([scale * rows, private[part]], dim=-1)
        for rows, part in ((user, slice(batch)), (answer, slice(batch, None)))
    )
    torch.testing.assert_close(
        loss.info_nce(longer_user, longer_answer, temperature=0.3 * scale**2, margin=None),
        loss.info_nce(user, answer, temperature=0.3, margin=None),
        rtol=1e-9,
        atol=1e-9,
    )


def test_at_high_temperature_the_loss_counts_the_negatives() -> None:
    rng = np.random.default_rng(0)
    user, answer = (torch.tensor(unit_rows(rng, 6, 4)) for _ in range(2))
    ids = torch.tensor([0, 0, 1, 1, 2, 3])  # rows 0-3 have 4 negatives per term, rows 4 and 5 have 5
    for same_side, sums in ((True, 3), (False, 1)):
        value = loss.info_nce(user, answer, temperature=1e9, margin=None, same_side=same_side, user_ids=ids)
        expected = (4 * math.log1p(4 * sums) + 2 * math.log1p(5 * sums)) / 6
        assert value.item() == pytest.approx(expected, abs=1e-6)


# Negative controls: the comparison above fails for each of these wrong losses -------------------------------


def wrong_loss(fault: str) -> Loss:
    """Eq. 6-8 in matrix form with one fault; "none" is right, so what fails is the fault."""

    def implementation(
        user: Tensor,
        answer: Tensor,
        *,
        temperature: float,
        margin: float,
        same_side: bool,
        answer_ids: Tensor,
        user_ids: Tensor,
    ) -> Tensor:
        mixed, users, answers = user @ answer.T, user @ user.T, answer @ answer.T
        if fault == "answers search users":
            mixed = mixed.T
        positive = mixed.diagonal()[:, None]
        if fault == "margin from the other row":
            positive = positive.T
        apart = ~torch.eye(len(user), dtype=torch.bool)
        if fault != "identical answers are negatives":
            apart &= answer_ids[:, None] != answer_ids
        if fault != "a user is its own negative":
            apart &= user_ids[:, None] != user_ids
        sides = [mixed, users, answers]
        if fault == "user-answer only":
            sides = sides[:1]
        if fault == "no answer-answer":
            sides = sides[:2]
        total = torch.zeros(len(user), dtype=user.dtype)
        for s in sides:
            compared = mixed if fault == "one mask for all terms" else s
            keep = compared <= positive + (0.0 if fault == "no c_margin" else margin)
            if fault == "mask reversed":
                keep = ~keep
            if fault == "no margin mask":
                keep = torch.ones_like(keep)
            exponent = s / temperature - (mixed.diagonal() / temperature)[:, None]
            total += (exponent.exp() * (keep & apart)).sum(-1)
        rows = total.log() if fault == "no positive in Z" else total.log1p()
        if fault == "temperature outside":
            return rows.mean() / temperature
        return rows.sum() if fault == "sum over the batch" else rows.mean()

    return implementation


FAULTS = (
    "answers search users",
    "margin from the other row",
    "identical answers are negatives",
    "a user is its own negative",
    "user-answer only",
    "no answer-answer",
    "one mask for all terms",
    "no c_margin",
    "mask reversed",
    "no margin mask",
    "no positive in Z",
    "temperature outside",
    "sum over the batch",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_loss_fails_the_comparison(fault: str) -> None:
    rng = np.random.default_rng(3)
    user, answer = (np.stack([reference.normalise(row) for row in rng.normal(size=(6, 3))]) for _ in range(2))
    options = {
        "temperature": 0.5,
        "margin": 0.3,
        "same_side": True,
        "answer_ids": [0, 0, 1, 2, 3, 4],
        "user_ids": [0, 1, 2, 2, 3, 4],
    }
    assert decided(user, answer, options)
    check(loss.info_nce, user, answer, options)
    check(wrong_loss("none"), user, answer, options)
    with pytest.raises(AssertionError):
        check(wrong_loss(fault), user, answer, options)


# Bad input: a ValueError that names the field and the value -------------------------------------------------

USER = normalize(torch.ones(3, 4), dim=-1)
NOT_A_NUMBER = USER.clone()
NOT_A_NUMBER[1, 2] = torch.nan


@properties
@given(batch=st.integers(2, 6), size=st.integers(2, 5), seed=seeds)
def test_centred_is_the_direction_from_the_mean_and_knows_no_shift(batch: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, shift = rng.normal(size=(batch, size)), 5 * rng.normal(size=size)
    found = loss.centred(torch.tensor(rows + shift))
    middle = [sum(row[k] for row in rows) / batch for k in range(size)]
    slow = np.stack(
        [reference.normalise(np.array([row[k] - middle[k] for k in range(size)])) for row in rows]
    )
    np.testing.assert_allclose(found.numpy(), slow, atol=1e-9)

    # What moves all users alike has no gradient; without centring it has one, and the loss falls along it.
    sides = [torch.tensor(rng.normal(size=(batch, size)) + 9.0) for _ in range(2)]
    along = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    moved = [loss.centred(sides[0] + along), loss.centred(sides[1])]
    (gradient,) = torch.autograd.grad(loss.info_nce(*moved, margin=None), along)
    assert gradient.abs().max() < 1e-8
    apart = torch.full((size,), -18.0, dtype=torch.float64, requires_grad=True)  # users opposite to answers
    plain = loss.info_nce(normalize(sides[0] + apart, dim=1), normalize(sides[1], dim=1), margin=None)
    (gradient,) = torch.autograd.grad(plain, apart)
    assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize(
    ("field", "value", "arguments"),
    [
        ("temperature", "0", {"temperature": 0.0}),
        ("temperature", "-0.05", {"temperature": -0.05}),
        ("temperature", "nan", {"temperature": math.nan}),
        ("margin", "nan", {"margin": math.nan}),
        ("user", "nan", {"user": NOT_A_NUMBER}),
        ("answer", "nan", {"answer": NOT_A_NUMBER}),
        ("answer", "inf", {"answer": torch.full((3, 4), torch.inf)}),
        ("answer", "2, 4", {"answer": USER[:2]}),
        ("answer", "3, 2", {"answer": USER[:, :2]}),
        ("user", "4", {"user": USER[0], "answer": USER[0]}),
        ("user", "1, 3, 4", {"user": USER[None], "answer": USER[None]}),
        ("user", "0, 4", {"user": USER[:0], "answer": USER[:0]}),
        ("answer_ids", "2", {"answer_ids": torch.arange(2)}),
        ("user_ids", "3, 1", {"user_ids": torch.arange(3)[:, None]}),
    ],
)
def test_bad_input_is_refused(field: str, value: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=field) as error:
        loss.info_nce(**{"user": USER, "answer": USER} | arguments)
    assert value in str(error.value)
