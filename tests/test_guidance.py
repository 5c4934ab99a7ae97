"""Eq. 5 and 15: gradient norms, token weights and the opening, against the loop-by-loop reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import properties, seeds, valid_masks
from torch import Tensor

from ggsm_core import guidance, masks

Weigh = Callable[[Tensor, Tensor, str], Tensor]
NORMALISE = ("none", "zscore", "rank")
normalisations = st.sampled_from(NORMALISE)


# Gradient norms ---------------------------------------------------------------------------------------------


def toy_loss(hidden: Tensor, mix: Tensor) -> Tensor:
    """A smooth loss in which every token of every row matters, and rows matter to each other."""
    scores = hidden @ mix @ hidden.transpose(1, 2) / 3  # [B, L, L]
    read = (torch.softmax(scores, dim=-1) @ hidden)[:, -1]  # [B, d], as read at <USER>
    return torch.logsumexp(read @ read.T, dim=-1).mean() + torch.tanh(hidden).pow(2).mean()


@properties
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), seeds)
def test_norms_are_those_of_finite_differences(batch: int, length: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    states, mix = rng.normal(size=(batch, length, size)), torch.tensor(rng.normal(size=(size, size)))
    hidden = torch.tensor(states, requires_grad=True)
    norms = guidance.gradient_norms(toy_loss(hidden, mix), hidden)
    expected = reference.gradient_norms(lambda x: float(toy_loss(torch.tensor(x), mix)), states)
    assert tuple(norms.shape) == (batch, length)
    assert not norms.requires_grad
    np.testing.assert_allclose(norms.numpy(), expected, rtol=1e-5, atol=1e-8)


def test_the_graph_is_kept_and_nothing_is_accumulated() -> None:
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    inputs = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)

    hidden = inputs * 2
    toy_loss(hidden, mix).backward()
    assert mix.grad is not None and inputs.grad is not None
    alone = mix.grad.clone(), inputs.grad.clone()

    mix.grad = inputs.grad = None
    hidden = inputs * 2
    loss = toy_loss(hidden, mix)
    guidance.gradient_norms(loss, hidden)
    assert mix.grad is None and inputs.grad is None and loss.requires_grad
    loss.backward()
    assert torch.equal(mix.grad, alone[0]) and torch.equal(inputs.grad, alone[1])


def test_at_the_final_layer_guidance_is_blind() -> None:
    """Reading notes 1: a loss that reads h at <USER> has gradient 0 elsewhere: weights of 0.5."""
    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    norms = guidance.gradient_norms(hidden[:, -1].pow(2).sum(), hidden)
    assert (norms[:, :-1] == 0).all() and (norms[:, -1] > 0).all()
    weights = guidance.token_weights(norms, torch.ones(2, 5, dtype=torch.bool))
    assert (weights[:, :-1] == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_finite_in_every_precision(dtype: torch.dtype) -> None:
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    norms = guidance.gradient_norms((hidden.float() * 1e3).pow(2).sum(), hidden)
    assert torch.isfinite(norms).all() and (norms > 0).all()


def test_norms_refuse_what_has_no_gradient() -> None:
    hidden = torch.ones(2, 3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="loss") as error:
        guidance.gradient_norms(hidden.sum(-1), hidden)
    assert "2, 3" in str(error.value)
    flat = torch.ones(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="hidden") as error:
        guidance.gradient_norms(flat.sum(), flat)
    assert "3, 4" in str(error.value)
    with pytest.raises(ValueError, match="hidden"):
        guidance.gradient_norms(hidden.sum(), torch.ones(2, 3, 4, requires_grad=True))
    with pytest.raises(ValueError, match="hidden"):
        guidance.gradient_norms(hidden.sum(), torch.ones(2, 3, 4))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_norms_refuse_a_loss_that_is_no_number(bad: float) -> None:
    hidden = torch.ones(2, 3, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"loss|gradient|norms|hidden") as error:
        guidance.gradient_norms((hidden * bad).sum(), hidden)
    assert str(bad) in str(error.value)


# Token weights ----------------------------------------------------------------------------------------------


def draw_norms(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Norms with ties: multiples of 1/8, exact in every float type used here."""
    return rng.integers(0, 24, shape) / 8


def check(implementation: Weigh, norms: np.ndarray, valid: np.ndarray, normalise: str) -> None:
    """The comparison with Eq. 5 that the tests below rely on."""
    weights = implementation(torch.tensor(norms), torch.tensor(valid), normalise)
    assert weights.shape == norms.shape
    np.testing.assert_allclose(
        weights.double().numpy(), reference.token_weights(norms, valid, normalise), rtol=0, atol=1e-12
    )


@properties
@given(valid_masks(), seeds, normalisations)
def test_weights_are_eq_5(valid: np.ndarray, seed: int, normalise: str) -> None:
    check(guidance.token_weights, draw_norms(np.random.default_rng(seed), valid.shape), valid, normalise)


def test_the_default_is_the_formula_of_the_paper() -> None:
    norms = torch.tensor([[0.0, 1.0, 3.0]])
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert torch.equal(guidance.token_weights(norms, valid), guidance.token_weights(norms, valid, "none"))
    assert guidance.token_weights(norms, valid)[0, 0] == 0.5


@properties
@given(valid_masks(), seeds, normalisations, st.sampled_from((0.0, 1.0, 1e-30, 1e6)))
def test_weights_are_usable_as_visibility(valid: np.ndarray, seed: int, normalise: str, scale: float) -> None:
    """In [0, 1], 0 on padding only, whatever norm lies there, for vanishing and huge norms."""
    rng = np.random.default_rng(seed)
    norms = torch.tensor(rng.uniform(0, 1, valid.shape) * scale, dtype=torch.float32)
    other = torch.where(torch.tensor(valid), norms, 7.0)
    weights = guidance.token_weights(norms, torch.tensor(valid), normalise)
    assert torch.equal(weights, guidance.token_weights(other, torch.tensor(valid), normalise))
    assert ((weights > 0) == torch.tensor(valid)).all() and (weights <= 1).all()
    assert torch.isfinite(masks.additive_bias(weights, torch.tensor(valid))).all()


@properties
@given(
    st.integers(1, 600),
    st.floats(1e-12, 1e4),
    st.sampled_from((torch.float32, torch.float64)),
)
def test_equal_norms_say_nothing(length: int, norm: float, dtype: torch.dtype) -> None:
    """A constant row is 0.5 throughout: rounding of the mean isn't mistaken for a difference."""
    norms = torch.full((1, length), norm, dtype=dtype)
    valid = torch.ones(1, length, dtype=torch.bool)
    for normalise in ("zscore", "rank"):
        weights = guidance.token_weights(norms, valid, normalise)
        torch.testing.assert_close(weights, torch.full_like(weights, 0.5), rtol=0, atol=1e-6)


@properties
@given(valid_masks(), seeds, st.sampled_from((1e-12, 1e-7, 1e-3, 1e3)))
def test_normalised_weights_do_not_depend_on_the_scale(valid: np.ndarray, seed: int, scale: float) -> None:
    """The gradient of a mean loss falls as 1/B; zscore and rank must not see it."""
    norms = draw_norms(np.random.default_rng(seed), valid.shape)
    for normalise in ("zscore", "rank"):
        weights, scaled = (
            guidance.token_weights(torch.tensor(x, dtype=torch.float32), torch.tensor(valid), normalise)
            for x in (norms, norms * scale)
        )
        torch.testing.assert_close(weights, scaled, rtol=0, atol=1e-5)


@properties
@given(valid_masks(batch=4), seeds, normalisations)
def test_a_row_does_not_see_the_others(valid: np.ndarray, seed: int, normalise: str) -> None:
    norms = torch.tensor(draw_norms(np.random.default_rng(seed), valid.shape))
    weights = guidance.token_weights(norms, torch.tensor(valid), normalise)
    for b in range(len(valid)):
        alone = guidance.token_weights(norms[b : b + 1], torch.tensor(valid[b : b + 1]), normalise)
        torch.testing.assert_close(alone[0], weights[b], rtol=0, atol=1e-12)


def test_rank_ties_share_their_mean() -> None:
    norms, valid = torch.tensor([[2.0, 1.0, 2.0, 9.0, 5.0]]), torch.tensor([[True, True, True, True, False]])
    weights = guidance.token_weights(norms, valid, "rank")
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.2, 0.5, 0.8, 0.0]]))


WRONG_WEIGHTS: dict[str, Weigh] = {
    "padding kept": lambda n, v, how: guidance.token_weights(n, torch.ones_like(v), how),
    "padding in the statistics": lambda n, v, how: guidance.token_weights(n, torch.ones_like(v), how) * v,
    "statistics of the whole batch": lambda n, v, how: guidance.token_weights(
        n.reshape(1, -1), v.reshape(1, -1), how
    ).reshape(n.shape),
    "reversed": lambda n, v, how: guidance.token_weights(-n, v, how),
    "another normalisation": lambda n, v, how: guidance.token_weights(
        n, v, {"none": "zscore", "zscore": "rank", "rank": "none"}[how]
    ),
}


STATISTICAL = ("padding in the statistics", "statistics of the whole batch")  # the plain sigmoid has none


@pytest.mark.parametrize(
    ("fault", "normalise"),
    [(f, n) for f in WRONG_WEIGHTS for n in NORMALISE if n != "none" or f not in STATISTICAL],
)
def test_wrong_weights_fail_the_comparison(fault: str, normalise: str) -> None:
    norms = np.array([[0.5, 2.0, 1.0, 3.0, 0.25], [4.0, 0.125, 2.5, 0.0, 1.5]])
    valid = np.array([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=bool)
    check(guidance.token_weights, norms, valid, normalise)
    with pytest.raises((AssertionError, ValueError)):
        check(WRONG_WEIGHTS[fault], norms, valid, normalise)


NORMS = torch.ones(2, 3)
VALID = torch.ones(2, 3, dtype=torch.bool)


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_norms_that_are_no_numbers_are_refused(bad: float, normalise: str) -> None:
    norms = NORMS.clone()
    norms[1, 2] = bad
    with pytest.raises(ValueError, match="norms") as error:
        guidance.token_weights(norms, VALID, normalise)
    assert str(bad) in str(error.value)


def test_wrong_shapes_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norms|valid") as error:
        guidance.token_weights(torch.ones(2, 4), VALID)
    assert "2, 4" in str(error.value)
    with pytest.raises(ValueError, match="norms") as error:
        guidance.token_weights(torch.ones(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool))
    assert "2, 3, 4" in str(error.value)
    with pytest.raises(ValueError, match="normalise") as error:
        guidance.token_weights(NORMS, VALID, "softmax")
    assert "softmax" in str(error.value)


def test_the_diagnosis_tells_living_guidance_from_dead() -> None:
    """Reading notes 1 and 2: blind at the final layer, constant for tiny norms, alive otherwise."""
    valid = torch.tensor([[True, True, True, True, False]])
    blind = torch.tensor([[0.0, 0.0, 0.0, 2.0, 0.0]])
    tiny = torch.tensor([[1e-5, 2e-5, 3e-5, 4e-5, 0.0]])
    alive = torch.tensor([[0.1, 0.5, 1.0, 3.0, 0.0]])
    verdicts = [
        guidance.diagnose(norms, guidance.token_weights(norms, valid, how), valid).degenerate
        for norms, how in ((blind, "none"), (tiny, "none"), (tiny, "zscore"), (alive, "none"))
    ]
    assert [verdict is None for verdict in verdicts] == [False, False, True, True]

    seen = guidance.diagnose(alive, guidance.token_weights(alive, valid), valid)
    row = reference.token_weights(alive.double().numpy(), valid.numpy())[0, :4]
    assert seen.mean == pytest.approx(row.mean(), abs=1e-6)
    assert seen.spread == pytest.approx(row.std(), abs=1e-6)
    assert seen.silent_share == 0


# Opening ----------------------------------------------------------------------------------------------------


@properties
@given(
    st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6),
    st.integers(0, 12),
    st.integers(0, 6),
    st.integers(1, 6),
)
def test_opening_is_eq_5_and_15(row: list[float], step: int, warm: int, more: int) -> None:
    weights = torch.tensor([row], dtype=torch.float64)
    opened = guidance.open_linearly(weights, step, warm, warm + more)
    expected = [reference.open_linearly(w, step, warm, warm + more) for w in row]
    np.testing.assert_allclose(opened[0].numpy(), expected, rtol=0, atol=1e-14)


@properties
@given(valid_masks(), seeds, st.integers(0, 4), st.integers(1, 6), normalisations)
def test_opening_never_closes_and_ends_open(
    drawn: np.ndarray, seed: int, warm: int, more: int, normalise: str
) -> None:
    """Weights rise with the step, stay in [0, 1] and reach exactly 1 at T_total."""
    valid = torch.tensor(drawn)
    norms = torch.tensor(draw_norms(np.random.default_rng(seed), drawn.shape), dtype=torch.float32)
    weights = guidance.token_weights(norms, valid, normalise)
    before = weights
    for t in range(warm + more + 3):
        opened = guidance.open_linearly(weights, t, warm, warm + more)
        assert ((opened >= 0) & (opened <= 1)).all()
        assert (opened >= before - 1e-7).all()
        if t <= warm:  # alpha is 0 at T_warm: the schedule starts from the frozen weights, without a jump
            assert torch.equal(opened, weights)
        if t >= warm + more:
            assert (opened[valid] == 1).all()
        bias = masks.additive_bias(opened, valid)
        assert torch.equal(bias, masks.additive_bias(opened * valid, valid)), "opening showed padding"
        before = opened


def test_opening_leaves_its_input_alone() -> None:
    weights = torch.full((1, 3), 0.5)
    guidance.open_linearly(weights, 9, 2, 10)
    assert (weights == 0.5).all()


@properties
@given(st.floats(0.1, 0.9), st.integers(1, 6), st.integers(2, 6), st.data())
def test_a_wrong_opening_differs(w: float, warm: int, more: int, data: st.DataObject) -> None:
    """Alpha counted from step 0, or applied to w alone, or one step late: each disagrees with Eq. 15."""
    total = warm + more
    step = data.draw(st.integers(warm + 1, total - 1))
    opened = guidance.open_linearly(torch.tensor([[w]], dtype=torch.float64), step, warm, total).item()
    alpha = (step - warm) / (total - warm)
    late = (step + 1 - warm) / (total - warm)
    from_zero = step / total
    for wrong in (
        (1 - from_zero) * w + from_zero,
        (1 - alpha) * w,
        (1 - late) * w + late,
        alpha * w + 1 - alpha,
    ):
        assume(abs(alpha - 0.5) > 1e-6)
        assert abs(opened - wrong) > 1e-9


@pytest.mark.parametrize(("weight", "value"), [(1.5, "1.5"), (-0.5, "-0.5"), (torch.nan, "nan")])
@pytest.mark.parametrize("step", [0, 5, 20])
def test_weights_outside_the_unit_interval_are_refused(weight: float, value: str, step: int) -> None:
    with pytest.raises(ValueError, match="weights") as error:
        guidance.open_linearly(torch.tensor([[0.5, weight]]), step, 2, 10)
    assert value in str(error.value)


@pytest.mark.parametrize(
    ("field", "step", "warm", "total"),
    [("step", -1, 2, 10), ("warm_steps", 1, -2, 10), ("warm_steps|total_steps", 1, 12, 10)],
)
def test_impossible_steps_are_refused(field: str, step: int, warm: int, total: int) -> None:
    with pytest.raises(ValueError, match=field):
        guidance.open_linearly(torch.full((1, 2), 0.5), step, warm, total)
