"""A.4: what each of the eight recipes shows at every training step and at inference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import properties, seeds, valid_masks
from torch import Tensor

from ggsm_core import masks, recipes, sections
from ggsm_core.template import MODALITIES, SEGMENTS

TOTAL, WARM, SIZE, LONGEST = 10, 4, 5, 12
STEPS: tuple[int | None, ...] = (0, 1, WARM - 1, WARM, 7, TOTAL - 1, TOTAL, TOTAL + 3, None)
HISTORY = len(MODALITIES)  # segments 0..5 are the user's history
GUIDED = ("hybrid_mask", "ggsm")
Expected = Callable[[int, int, int], float]

steps = st.sampled_from(STEPS)
towers = st.sampled_from(("user", "answer"))


def build(name: str, options: sections.Section | None = None) -> recipes.Recipe:
    """The recipe for T_total = 10 and sequences of up to 12 tokens."""
    return recipes.build(name, options, total_steps=TOTAL, hidden_size=SIZE, max_length=LONGEST)


def guided(name: str, **options: Any) -> recipes.Guided:
    """A recipe with guidance and T_warm = 4."""
    recipe = build(name, sections.Guidance(**{"warm_steps": WARM} | options))
    assert isinstance(recipe, recipes.Guided)
    return recipe


def draw_view(
    valid: np.ndarray, seed: int, step: int | None = 0, tower: str = "user", **more: Any
) -> recipes.View:
    """A template-like batch: modalities in order, then the instruction, then <USER>; or an answer."""
    rng = np.random.default_rng(seed)
    segments = np.full(valid.shape, SEGMENTS["answer"])
    if tower == "user":
        for b, row in enumerate(valid):
            places = np.flatnonzero(row)
            segments[b, places] = np.sort(rng.integers(0, SEGMENTS["user"], len(places)))
            segments[b, places[-1:]] = SEGMENTS["user"]
    return recipes.View(
        valid=torch.tensor(valid),
        segments=torch.tensor(segments),
        hidden=torch.tensor(rng.normal(size=(*valid.shape, SIZE)), dtype=torch.float32),
        step=step,
        tower=tower,  # type: ignore[arg-type]
        **more,
    )


def square(visibility: Tensor) -> Tensor:
    """Float[B, L, L] of either form of visibility."""
    return visibility if visibility.ndim == 3 else visibility[:, None, :].expand(-1, visibility.shape[1], -1)


def future(valid: Tensor) -> list[tuple[int, int, int]]:
    """All (b, i, j) with j > i, both real: where a visibility is read."""
    pairs = valid[:, :, None] & valid[:, None, :]
    return [tuple(place) for place in pairs.triu(1).nonzero().tolist()]


def check(recipe: recipes.Recipe, view: recipes.View, expected: Expected) -> None:
    """The comparison that the tests below rely on."""
    visibility = recipe.visibility(view)
    masks.additive_bias(visibility, view.valid)  # in [0, 1], of a shape that masks accept
    seen = square(visibility)
    for b, i, j in future(view.valid):
        assert seen[b, i, j].item() == pytest.approx(expected(b, i, j), abs=1e-6), (b, i, j)


# Recipes without a state ------------------------------------------------------------------------------------


@properties
@given(valid_masks(), seeds, steps, towers)
def test_causal_shows_nothing_of_the_future(
    valid: np.ndarray, seed: int, step: int | None, tower: str
) -> None:
    check(build("causal"), draw_view(valid, seed, step, tower), lambda b, i, j: reference.causal(i, j))


@properties
@given(valid_masks(), seeds, steps, towers)
def test_bidirectional_shows_everything_from_step_0(
    valid: np.ndarray, seed: int, step: int | None, tower: str
) -> None:
    check(build("bidirectional"), draw_view(valid, seed, step, tower), lambda b, i, j: 1.0)


@properties
@given(valid_masks(length=8), seeds, steps, towers)
def test_hybrid_segment_is_open_inside_the_history_only(
    valid: np.ndarray, seed: int, step: int | None, tower: str
) -> None:
    """The history sees itself whole; the instruction, <USER> and answers stay causal, at inference too."""
    view = draw_view(valid, seed, step, tower)
    inside = (view.segments < HISTORY).tolist()
    check(build("hybrid_segment"), view, lambda b, i, j: reference.hybrid_segment(i, j, inside[b]))


@properties
@given(valid_masks(), seeds, steps, towers)
def test_soft_scheduler_raises_one_weight(valid: np.ndarray, seed: int, step: int | None, tower: str) -> None:
    w = 1.0 if step is None else reference.soft_linear(step, TOTAL)
    recipe = build("scheduler", sections.Scheduler(schedule="soft_linear"))
    check(recipe, draw_view(valid, seed, step, tower), lambda b, i, j: w)


@properties
@given(valid_masks(length=LONGEST), seeds, steps, towers, st.sampled_from(("linear", "cosine")))
def test_span_scheduler_shows_up_to_i_plus_delta(
    valid: np.ndarray, seed: int, step: int | None, tower: str, shape: str
) -> None:
    """w is 1 up to Delta(t) real tokens ahead and 0 beyond; Delta may round either way."""
    view = draw_view(valid, seed, step, tower)
    recipe = build("scheduler", sections.Scheduler(schedule=f"span_{shape}"))  # type: ignore[arg-type]
    seen = square(recipe.visibility(view))
    share = 1.0 if step is None else reference.share_open(step, TOTAL, shape)
    delta = share * (LONGEST - 1)
    for b, i, j in future(view.valid):
        least = reference.span(i, j, math.floor(delta + 1e-9))
        most = reference.span(i, j, math.ceil(delta - 1e-9))
        assert seen[b, i, j] in (0, 1) and least <= seen[b, i, j] <= most, (b, i, j)


def test_the_cosine_lags_then_leads_the_line() -> None:
    view = draw_view(np.ones((1, LONGEST), dtype=bool), 0)
    opened = {
        shape: [
            float(build("scheduler", sections.Scheduler(schedule=shape)).visibility(at(view, t)).mean())  # type: ignore[arg-type]
            for t in range(TOTAL + 1)
        ]
        for shape in ("span_linear", "span_cosine")
    }
    linear, cosine = opened["span_linear"], opened["span_cosine"]
    assert cosine[2] < linear[2] and cosine[8] > linear[8]
    for share in opened.values():
        assert share == sorted(share) and share[-1] == 1


def at(view: recipes.View, step: int | None) -> recipes.View:
    """The same view at another step."""
    return recipes.View(view.valid, view.segments, view.hidden, step, view.tower, view.weights)


# Hybrid (b): the MLP ----------------------------------------------------------------------------------------


def trained_mlp(seed: int = 0) -> recipes.Recipe:
    """The MLP recipe with weights as training might leave them: nothing is 0 any more."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        recipe = build("hybrid_mlp")
        with torch.no_grad():
            for _, parameter in recipe.named_parameters():
                parameter += 0.2 * torch.randn(parameter.shape)
    return recipe


@properties
@given(valid_masks(length=8), seeds, st.integers(0, 7))
def test_mlp_reads_h_i_and_the_distance_only(valid: np.ndarray, seed: int, place: int) -> None:
    """Moving h_i moves row i and no other; with one h everywhere, w depends on j - i alone."""
    recipe, view = trained_mlp(seed % 7), draw_view(valid, seed)
    seen = square(recipe.visibility(view))
    place %= valid.shape[1]
    moved = view.hidden.clone()
    moved[:, place] += torch.linspace(-1, 2, SIZE)
    other = square(recipe.visibility(recipes.View(view.valid, view.segments, moved, 0)))
    pairs = future(view.valid)
    changed = {i for b, i, j in pairs if abs(seen[b, i, j] - other[b, i, j]) > 1e-6}
    assert changed == {i for _, i, _ in pairs if i == place}

    same = view.hidden[:1, :1].expand_as(view.hidden)
    alike = square(recipe.visibility(recipes.View(view.valid, view.segments, same, 0)))
    by_distance: dict[int, float] = {}
    for b, i, j in pairs:
        first = by_distance.setdefault(j - i, alike[b, i, j].item())
        assert alike[b, i, j].item() == pytest.approx(first, abs=1e-6)


@properties
@given(valid_masks(), seeds)
def test_mlp_mask_of_inference_is_the_trained_one(valid: np.ndarray, seed: int) -> None:
    recipe, view = trained_mlp(), draw_view(valid, seed)
    expected = square(recipe.visibility(view)).tolist()
    for step in STEPS:
        check(recipe, at(view, step), lambda b, i, j: expected[b][i][j])


def test_mlp_starts_near_causal_and_learns() -> None:
    """The gradient reaches every parameter through the bias, and stays finite where w underflows to 0."""
    recipe, view = build("hybrid_mlp"), draw_view(np.ones((2, 6), dtype=bool), 0)
    start = square(recipe.visibility(view))
    assert (start > 0).all() and (start < 0.5).all()
    for shift in (0.0, -200.0, 200.0):
        recipe = trained_mlp()
        with torch.no_grad():
            recipe.bias += shift
        scores = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1))
        bias = masks.additive_bias(recipe.visibility(view), view.valid)
        torch.softmax(scores + bias, dim=-1)[..., 0].sum().backward()
        for name, parameter in recipe.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            assert shift != 0 or parameter.grad.any(), name


# Hybrid (c): the global query -------------------------------------------------------------------------------


@properties
@given(valid_masks(length=8), seeds, steps)
def test_the_global_token_sees_the_history_and_the_rest_is_causal(
    valid: np.ndarray, seed: int, step: int | None
) -> None:
    recipe, view = build("hybrid_gq"), draw_view(valid, seed, step)
    first = torch.ones(len(valid), 1, dtype=torch.long)
    view = recipes.View(
        torch.cat([first.bool(), view.valid], dim=1),
        torch.cat([first * recipes.GLOBAL_SEGMENT, view.segments], dim=1),
        torch.cat([torch.zeros(len(valid), 1, SIZE), view.hidden], dim=1),
        step,
    )
    history = ((view.segments < HISTORY) & view.valid).tolist()
    check(recipe, view, lambda b, i, j: float(i == 0 and history[b][j]))


def test_the_global_token_is_learnt_and_answers_have_none() -> None:
    recipe = build("hybrid_gq")
    assert recipe.prefix is not None and recipe.prefix.shape == (1, SIZE) and recipe.prefix.requires_grad
    check(recipe, draw_view(np.ones((2, 5), dtype=bool), 0, 0, "answer"), lambda b, i, j: 0.0)
    assert all(build(name).prefix is None for name in recipes.RECIPES if name != "hybrid_gq")


# Gradient guidance: Hybrid (a) and GG-SM --------------------------------------------------------------------


def draw_weights(valid: np.ndarray, seed: int) -> np.ndarray:
    """Guidance weights of a batch, 0 on padding."""
    return np.random.default_rng(seed).uniform(0.1, 0.9, valid.shape) * valid


def frozen(recipe: recipes.Guided, valid: np.ndarray, weights: np.ndarray, segments: Tensor) -> None:
    """End the warm-up on this batch."""
    recipe.freeze(torch.tensor(weights, dtype=torch.float32), torch.tensor(valid), segments)


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("step", range(WARM))
def test_in_warm_up_the_weights_of_the_batch_are_the_visibility(name: str, step: int) -> None:
    valid = np.array([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=bool)
    weights = draw_weights(valid, step)
    view = draw_view(valid, 0, step, weights=torch.tensor(weights, dtype=torch.float32))
    check(guided(name), view, lambda b, i, j: weights[b, j])


@properties
@given(
    valid_masks(), seeds, st.sampled_from(("none", "zscore", "rank")), st.integers(0, TOTAL), st.booleans()
)
def test_weights_come_from_norms_by_eq_5(
    valid: np.ndarray, seed: int, normalise: str, step: int, ramp: bool
) -> None:
    """With ``ramp``, beta_t rises over warm-up to 1 at its last step, so that what is frozen is Eq. 5's."""
    norms = np.random.default_rng(seed).integers(0, 24, valid.shape) / 8
    recipe = guided("ggsm", normalise=normalise, ramp=ramp)
    weights = recipe.weigh(torch.tensor(norms, dtype=torch.float32), torch.tensor(valid), step).numpy()
    expected = reference.token_weights(norms, valid, normalise)
    if not ramp or step >= WARM - 1:
        np.testing.assert_allclose(weights, expected, atol=1e-6)
        return
    np.testing.assert_allclose(weights, expected * (step + 1) / WARM, atol=1e-6)


@properties
@given(valid_masks(batch=4, length=LONGEST, empty=False), valid_masks(length=LONGEST, empty=False), seeds)
def test_freezing_by_position_counts_back_from_user(before: np.ndarray, after: np.ndarray, seed: int) -> None:
    weights = draw_weights(before, seed)
    expected = reference.freeze_by_position(weights, before)
    for name in GUIDED:
        recipe = guided(name)
        frozen(recipe, before, weights, draw_view(before, seed).segments)
        view = draw_view(after, seed, WARM)
        recalled = recipe.recall(view.valid, view.segments, WARM)
        assert (recalled[~view.valid] == 0).all() and ((recalled >= 0) & (recalled <= 1)).all()
        for b, row in enumerate(after):
            places = np.flatnonzero(row)
            for j in places:
                offset = min(int(places[-1] - j), max(expected))  # beyond the farthest: its weight
                assert recalled[b, j].item() == pytest.approx(expected[offset], abs=1e-6)


@properties
@given(valid_masks(batch=4, length=LONGEST, empty=False), valid_masks(length=LONGEST, empty=False), seeds)
def test_freezing_by_segment(before: np.ndarray, after: np.ndarray, seed: int) -> None:
    weights, segments = draw_weights(before, seed), draw_view(before, seed).segments
    expected = reference.freeze_by_segment(weights, before, segments.numpy())
    recipe = guided("ggsm", freeze="segment")
    frozen(recipe, before, weights, segments)
    view = draw_view(after, seed + 1, WARM)
    recalled = recipe.recall(view.valid, view.segments, WARM)
    assert (recalled[~view.valid] == 0).all() and ((recalled >= 0) & (recalled <= 1)).all()
    for b, j in view.valid.nonzero().tolist():
        segment = int(view.segments[b, j])
        mean = weights[before].mean()  # of a segment that the batch did not have
        assert recalled[b, j].item() == pytest.approx(expected.get(segment, mean), abs=1e-6)


@properties
@given(valid_masks(length=LONGEST, empty=False), seeds, steps, st.sampled_from(("position", "segment")))
def test_after_warm_up_ggsm_opens_and_hybrid_mask_stays(
    valid: np.ndarray, seed: int, step: int | None, freeze: str
) -> None:
    """Eq. 15 and a full mask at inference for GG-SM; the frozen weights, at inference too, for the hybrid."""
    if step is not None and step < WARM:
        step += WARM
    weights, view = draw_weights(valid, seed), draw_view(valid, seed, step)
    if freeze == "segment":
        by_segment = reference.freeze_by_segment(weights, valid, view.segments.numpy())
        profile = {(b, int(j)): by_segment[int(view.segments[b, j])] for b, j in np.argwhere(valid)}
    else:
        by_position = reference.freeze_by_position(weights, valid)
        last = [np.flatnonzero(row)[-1] for row in valid]
        profile = {(b, int(j)): by_position[int(last[b] - j)] for b, j in np.argwhere(valid)}
    hybrid, ggsm = (guided(name, freeze=freeze) for name in GUIDED)
    for recipe in (hybrid, ggsm):
        frozen(recipe, valid, weights, view.segments)
    check(hybrid, view, lambda b, i, j: profile[b, j])
    t = TOTAL if step is None else step
    check(ggsm, view, lambda b, i, j: reference.open_linearly(profile[b, j], t, WARM, TOTAL))


@pytest.mark.parametrize("step", [TOTAL, TOTAL + 5, None])
def test_ggsm_ends_bidirectional_for_both_towers(step: int | None) -> None:
    recipe = guided("ggsm")
    valid = np.ones((2, 5), dtype=bool)
    frozen(recipe, valid, draw_weights(valid, 0), draw_view(valid, 0).segments)
    for tower in ("user", "answer"):
        check(recipe, draw_view(valid, 0, step, tower), lambda b, i, j: 1.0)


def test_hybrid_mask_of_answers_is_the_mean_of_the_left_towers_weights() -> None:
    """Reading notes 7: answers get one number, the mean over the real tokens that were frozen."""
    valid = np.array([[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]], dtype=bool)
    weights = draw_weights(valid, 0)
    recipe = guided("hybrid_mask")
    frozen(recipe, valid, weights, draw_view(valid, 0).segments)
    mean = float(weights[valid].mean())
    check(recipe, draw_view(np.ones((2, 4), dtype=bool), 0, None, "answer"), lambda b, i, j: mean)


def test_without_warm_up_ggsm_is_the_soft_scheduler() -> None:
    recipe, view = guided("ggsm", warm_steps=0), draw_view(np.ones((1, 4), dtype=bool), 0)
    for step in range(TOTAL + 1):
        check(recipe, at(view, step), lambda b, i, j, t=step: reference.soft_linear(t, TOTAL))  # type: ignore[misc]


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("freeze", ["position", "segment"])
def test_frozen_weights_travel_with_the_state(name: str, freeze: str) -> None:
    valid = np.array([[1, 1, 1, 0], [0, 1, 1, 1]], dtype=bool)
    view = draw_view(valid, 0, WARM)
    recipe, other = guided(name, freeze=freeze), guided(name, freeze=freeze)
    frozen(recipe, valid, draw_weights(valid, 0), view.segments)
    other.load_state_dict(recipe.state_dict())
    assert torch.equal(recipe.visibility(view), other.visibility(view))


@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize("freeze", ["position", "segment"])
def test_frozen_weights_before_the_end_of_warm_up_are_refused(name: str, freeze: str) -> None:
    view = draw_view(np.ones((1, 3), dtype=bool), 0, WARM)
    with pytest.raises(ValueError, match="frozen"):
        guided(name, freeze=freeze).visibility(view)


@pytest.mark.parametrize("name", GUIDED)
def test_previous_step_uses_the_norms_of_the_step_before(name: str) -> None:
    """Mean norm per position, counted back from <USER>; the first step has none and stays as pre-trained."""
    recipe = guided(name, estimator="previous_step")
    valid = np.array([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]], dtype=bool)
    norms = np.random.default_rng(0).uniform(0, 3, valid.shape) * valid
    view = draw_view(valid, 0)
    assert (recipe.recall(view.valid, view.segments, 0) == 0).all()
    recipe.remember(torch.tensor(norms, dtype=torch.float32), view.valid)
    means = reference.freeze_by_position(norms, valid)
    recalled = recipe.recall(view.valid, view.segments, 1)
    for b, j in np.argwhere(valid):
        offset = np.flatnonzero(valid[b])[-1] - j
        assert recalled[b, j].item() == pytest.approx(reference.sigmoid(means[offset]), abs=1e-6)


@pytest.mark.parametrize(
    ("estimator", "freeze", "probed"),
    [
        ("two_pass", "position", range(WARM)),
        ("two_pass", "tower", range(TOTAL)),
        ("previous_step", "position", ()),
        ("previous_step", "tower", range(WARM, TOTAL)),
    ],
)
def test_extra_passes_are_made_only_where_they_are_used(
    estimator: str, freeze: str, probed: range | tuple[int, ...]
) -> None:
    recipe = guided("ggsm", estimator=estimator, freeze=freeze)
    assert [t for t in range(TOTAL) if recipe.wants_probe(t)] == list(probed)
    wanted = [t for t in range(TOTAL) if recipe.wants_norms(t)]
    assert all(t < WARM for t in wanted) and bool(wanted) == (estimator == "previous_step")


# All recipes ------------------------------------------------------------------------------------------------


def ready(name: str) -> recipes.Recipe:
    """A recipe at the end of its training."""
    if name == "hybrid_mlp":
        return trained_mlp()
    if name not in GUIDED:
        return build(name)
    recipe = guided(name)
    valid = np.tri(LONGEST, dtype=bool)
    frozen(recipe, valid, draw_weights(valid, 0), draw_view(valid, 0).segments)
    return recipe


@pytest.mark.parametrize("name", recipes.RECIPES)
@properties
@given(valid=valid_masks(length=LONGEST), seed=seeds, step=steps, tower=towers)
def test_a_sequence_does_not_see_its_batch_or_its_padding(
    name: str, valid: np.ndarray, seed: int, step: int | None, tower: str
) -> None:
    """Each row alone, stripped of its padding, has the same visibility; all of it is accepted by the mask."""
    recipe, view = ready(name), draw_view(valid, seed, step, tower)
    if isinstance(recipe, recipes.Guided) and step is not None and step < WARM:
        view = recipes.View(
            view.valid, view.segments, view.hidden, step, view.tower, torch.tensor(draw_weights(valid, seed))
        )
    whole = recipe.visibility(view)
    assert torch.isfinite(masks.additive_bias(whole, view.valid)).all()
    whole = square(whole)
    for b, row in enumerate(view.valid):
        alone = recipe.visibility(
            recipes.View(
                row[row][None],
                view.segments[b, row][None],
                view.hidden[b, row][None],
                step,
                view.tower,
                None if view.weights is None else view.weights[b, row][None],
            )
        )
        real = whole[b][row][:, row].triu(1)
        torch.testing.assert_close(square(alone)[0].triu(1), real, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_recipe_is_a_module_like_any_other(name: str) -> None:
    """``parameters()``, ``requires_grad_`` and ``zero_grad`` are torch's and reach what is learnt."""
    recipe = build(name)
    assert list(recipe.parameters()) == [parameter for _, parameter in recipe.named_parameters()]
    recipe.zero_grad()
    recipe.requires_grad_(False)
    assert not any(parameter.requires_grad for _, parameter in recipe.named_parameters())


def test_the_eight_recipes_are_those_of_the_paper() -> None:
    assert tuple(recipes.RECIPES)[:8] == (
        "causal",
        "hybrid_segment",
        "hybrid_mask",
        "hybrid_mlp",
        "hybrid_gq",
        "bidirectional",
        "scheduler",
        "ggsm",
    )
    for name in recipes.RECIPES:
        assert build(name).name == name


def test_unknown_recipes_and_foreign_options_are_refused() -> None:
    with pytest.raises(ValueError, match="full_attention"):
        build("full_attention")
    with pytest.raises(ValueError, match="options") as error:
        build("scheduler", sections.Guidance())
    assert "Guidance" in str(error.value)


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_another_recipe_fails_the_comparison(name: str) -> None:
    """Negative control: in the middle of training no two recipes show the same, and ``check`` notices."""
    valid = np.ones((1, 8), dtype=bool)
    segments = torch.tensor(
        [[recipes.GLOBAL_SEGMENT, 0, 0, 2, 2, 5, SEGMENTS["instruction"], SEGMENTS["user"]]]
    )
    plain = draw_view(valid, 0, 7)
    view = recipes.View(plain.valid, segments, plain.hidden, 7)
    expected = square(ready(name).visibility(view)).tolist()
    check(ready(name), view, lambda b, i, j: expected[b][i][j])
    for other in set(recipes.RECIPES) - {name}:
        with pytest.raises(AssertionError):
            check(ready(other), view, lambda b, i, j: expected[b][i][j])
