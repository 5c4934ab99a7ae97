"""Controls for gradient guidance, and rows that differ from a recipe in one thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from strategies import properties, seeds, valid_masks
from test_training import WARM, corpus, fresh_accelerator, settings, steps, trainer
from torch import Tensor

from ggsm_core import ablation, params, recipes, sections
from ggsm_core.params import Profile, ProfileError
from ggsm_core.runs import Store
from ggsm_core.stages import GRAPH, Plan

__all__ = ["corpus", "fresh_accelerator"]  # fixtures
CONTROLS = ("constant", "random", "shuffled", "position")
QUICK = Path(__file__).resolve().parents[1] / "params" / "quick.yaml"


def draw(valid: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """Weights of a batch, all different, 0 on padding; and which tokens are real."""
    torch.manual_seed(seed)
    real = torch.tensor(valid)
    return torch.rand(valid.shape).masked_fill(~real, 0.0), real


@pytest.mark.parametrize("name", ablation.SOURCES)
@properties
@given(valid=valid_masks(length=8, empty=False), seed=seeds)
def test_weights_stay_weights(name: str, valid: np.ndarray, seed: int) -> None:
    """In [0, 1], 0 on padding, and each is one half, a mean of the batch, or a weight of the batch."""
    weights, real = draw(valid, seed)
    got = ablation.SOURCES[name](weights, real)
    assert got.shape == weights.shape and (got[~real] == 0).all()
    assert ((got >= 0) & (got <= 1)).all()
    known = set(weights[real].tolist())
    if name == "constant":
        assert set(got[real].tolist()) == {0.5}
    elif name != "position":
        assert set(got[real].tolist()) <= known


@properties
@given(valid_masks(length=8, empty=False), seeds)
def test_shuffling_keeps_each_users_weights(valid: np.ndarray, seed: int) -> None:
    weights, real = draw(valid, seed)
    got = ablation.shuffled(weights, real)
    for row in range(len(valid)):
        assert sorted(got[row][real[row]].tolist()) == sorted(weights[row][real[row]].tolist())


@properties
@given(valid_masks(length=8, empty=False), seeds)
def test_position_knows_the_distance_alone(valid: np.ndarray, seed: int) -> None:
    """Token by token: the mean over the batch of the weights that stand as far from the end."""
    weights, real = draw(valid, seed)
    got = ablation.position(weights, real)
    back = [[int(valid[b, j + 1 :].sum()) for j in range(valid.shape[1])] for b in range(len(valid))]
    places = [(b, j) for b, j in np.argwhere(valid)]
    for b, j in places:
        alike = [weights[c, k].item() for c, k in places if back[c][k] == back[b][j]]
        assert got[b, j].item() == pytest.approx(np.mean(alike), abs=1e-6)


def test_controls_break_the_bond_between_token_and_weight() -> None:
    """On many tokens a control's weights say nothing of the gradient's; negative control: gradient does."""
    weights, real = draw(np.ones((40, 50), dtype=bool), 0)

    def bond(name: str) -> float:
        got = ablation.SOURCES[name](weights, real)
        return float(np.corrcoef(weights.flatten(), got.flatten())[0, 1]) if got.std() > 0 else 0.0

    assert bond("gradient") == pytest.approx(1.0)
    assert all(abs(bond(name)) < 0.2 for name in CONTROLS)
    spread = ablation.random(weights, real).flatten().sort().values - weights.flatten().sort().values
    assert float(spread.abs().max()) < 0.05, "the distribution is the same"


@pytest.mark.parametrize("source", CONTROLS)
def test_a_control_freezes_and_opens_as_ggsm_does(source: str) -> None:
    guided = recipes.build(
        "ggsm", sections.Guidance(source=source, warm_steps=4), total_steps=10, hidden_size=5, max_length=6
    )
    assert isinstance(guided, recipes.Guided)
    valid, segments = torch.ones(3, 6, dtype=torch.bool), torch.zeros(3, 6, dtype=torch.long)
    weights = guided.weigh(torch.rand(3, 6), valid, 3)
    guided.freeze(weights, valid, segments)
    view = recipes.View(valid, segments, torch.zeros(3, 6, 5), 7)
    start = guided.visibility(recipes.View(valid, segments, view.hidden, 4))
    half = guided.visibility(view)
    assert torch.allclose(half, (1 + start) / 2) and (start >= 0.5 - 1e-6).all()


def test_attention_is_that_of_the_read_out() -> None:
    """Against attention by hand in the first block of a one-block decoder, a row at a time."""
    encoder = tiny.encoder("ggsm", layers=1, features=tiny.FEATURES)
    batch = tiny.users([2, 4], "left")
    with torch.no_grad():
        got = encoder.attention_of_read_out(batch)
        block = encoder.decoder.layers[0]
        for row in range(2):
            real = batch.valid[row]
            hidden = block.input_layernorm(encoder.embed_tokens(batch)[row : row + 1][:, real])
            n, heads = hidden.shape[1], encoder.decoder.config.num_attention_heads
            turn = encoder.decoder.rotary_emb(hidden, torch.arange(n)[None])
            q, k = (
                project(hidden).view(1, n, -1, 8).transpose(1, 2)
                for project in (block.self_attn.q_proj, block.self_attn.k_proj)
            )
            q, k = (_rotate(x, *turn) for x in (q, k))
            k = k.repeat_interleave(heads // k.shape[1], dim=1)
            paid = torch.softmax(q[0, :, -1:] @ k[0].transpose(1, 2) / 8**0.5, dim=-1)[:, 0].mean(0)
            assert torch.allclose(got[row][real], paid * n, atol=1e-4)
            assert torch.allclose(got[row][~real], torch.zeros(()), atol=1e-6)
    assert encoder.decoder.config._attn_implementation == "sdpa", "the backend is the one before"


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-right, left], dim=-1) * sin[:, None]


# --- variants -------------------------------------------------------------------------------------------


def profile(**more: Any) -> Profile:
    return Profile.model_validate(params.load(QUICK).model_dump(mode="json") | more)


VARIANTS = {
    "ggsm_rank": {"recipe": "ggsm", "options": {"normalise": "rank"}},
    "ggsm_late": {"recipe": "ggsm", "objective": {"margin_from": 50}},
}


def test_a_variant_is_its_recipe_but_for_what_it_names(tmp_path: Path) -> None:
    plan = Plan(GRAPH, profile(variants=VARIANTS), Store(tmp_path))
    own = plan.node("contrast", "ggsm", 0).config
    rank, late = (plan.node("contrast", name, 0).config for name in VARIANTS)
    assert rank["recipe"] == late["recipe"] == "ggsm"
    assert rank["options"] == own["options"] | {"normalise": "rank"} and late["options"] == own["options"]
    assert rank["sections"] == own["sections"]
    assert late["sections"]["objective"] == own["sections"]["objective"] | {"margin_from": 50}
    assert plan.node("probe", "ggsm_rank", 0).config["recipe"] == "ggsm_rank", "the row of the table"
    assert "probe:ggsm_late:0" in plan.node("compare").inputs


def test_variants_change_no_other_run(tmp_path: Path) -> None:
    before = {n.label: n.name for n in Plan(GRAPH, profile(), Store(tmp_path)).all()}
    after = {n.label: n.name for n in Plan(GRAPH, profile(variants=VARIANTS), Store(tmp_path)).all()}
    assert {label for label in before if before[label] != after[label]} == {"compare"}


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ({"ggsm": {"recipe": "ggsm"}}, ["variants.ggsm", "another row"]),
        ({"My row": {"recipe": "ggsm"}}, ["variants.My row"]),
        ({"mine": {"recipe": "ggsmm"}}, ["variants.mine.recipe", "ggsmm"]),
        ({"mine": {"recipe": "ggsm", "options": {"normalize": "rank"}}}, ["variants.mine", "normalize"]),
        ({"mine": {"recipe": "ggsm", "options": {"warm_steps": 100}}}, ["variants.mine.options", "100"]),
        ({"mine": {"recipe": "ggsm", "objective": {"margin": -1.0}}}, ["variants.mine", "margin", "-1.0"]),
        (
            {"mine": {"recipe": "ggsm", "options": {"source": "attention", "estimator": "previous_step"}}},
            ["variants.mine", "attention", "previous_step"],
        ),
    ],
)
def test_a_variant_that_can_not_be_is_refused(variant: Any, words: list[str], tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "extends": str(QUICK), "variants": variant}))
    with pytest.raises(ProfileError) as problem:
        params.load(path)
    assert all(word in str(problem.value) for word in words), str(problem.value)


def test_a_profile_with_variants_can_be_printed() -> None:
    assert any("ggsm_rank" in line for line in params.describe(profile(variants=VARIANTS)))


# --- training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ablation.SOURCES)
def test_every_control_trains_into_its_frozen_stage(source: str, corpus: dict[str, Path]) -> None:
    of = trainer(corpus, settings("ggsm", source=source, normalise="rank", margin=None))
    lines = steps(of, WARM + 2)
    recipe = of.encoder.recipe
    assert isinstance(recipe, recipes.Guided)
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert ((recipe.frozen_position >= 0) & (recipe.frozen_position <= 1)).all()
    flat = lines[0]["guidance_spread"] < 1e-6
    assert flat == (source == "constant")
