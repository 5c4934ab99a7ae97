"""The contrastive loop in one process: batches, resuming, negatives, guidance."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
import reference
import tiny
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from strategies import properties
from torch import Tensor

from ggsm_core import (
    adapters,
    batches,
    checkpoints,
    collation,
    embedding,
    loss,
    model,
    params,
    recipes,
    runs,
    sections,
    text_encoder,
    tokens,
    towers,
    training,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

TOTAL, WARM, BATCH = 5, 2, 6
ALL = tuple(recipes.RECIPES)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps the precision of the first Accelerator of a process."""
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs of tokens, texts and pretrain, tiny."""
    folder = tmp_path_factory.mktemp("corpus")
    inputs = tiny.corpus(folder) | {"pretrain": folder / "pretrain"}
    # Dropout, so that random state matters; and weights of an ordinary size.
    tiny.decoder(layers=2, attention_dropout=0.1).save_pretrained(inputs["pretrain"])
    tiny.tokenizer().save_pretrained(inputs["pretrain"])
    return inputs


def settings(recipe: str = "ggsm", *, lora: bool = False, seed: int = 0, **more: Any) -> SimpleNamespace:
    """What the stage contrast sees of a profile. ``more``: of training, objective or the recipe."""

    def those(section: type[sections.Section]) -> dict[str, Any]:
        return {name: value for name, value in more.items() if name in section.model_fields}

    section = recipes.RECIPES[recipe].section
    guided = {"warm_steps": WARM} if section is sections.Guidance else {}
    schedule = {"total_steps": TOTAL, "batch_size": BATCH, "learning_rate": 1e-2, "checkpoint_every": 2}
    return SimpleNamespace(
        recipe=recipe,
        seed=seed,
        options=section(**(guided | those(section))),
        training=sections.Training(**(schedule | those(sections.Training))),
        objective=sections.Objective(**({"temperature": 0.5} | those(sections.Objective))),
        backbone=sections.Backbone(),
        data=sections.Data(),
        template=sections.Template(max_user_tokens=tiny.LONGEST),
        lora=sections.Lora(rank=2, alpha=2) if lora else None,
    )


def trainer(corpus: dict[str, Path], params: SimpleNamespace) -> training.Trainer:
    """A trainer before its first step."""
    pairs = batches.Pairs(corpus["tokens"], corpus["texts"], params.training.batch_size, params.seed)
    return training.Trainer(towers.build_encoder(params, corpus), pairs, params)


def steps(of: training.Trainer, count: int) -> list[dict[str, Any]]:
    """The metrics of ``count`` steps, without their times."""
    lines = [of.train_step() for _ in range(count)]
    measured = ("seconds", "tokens_per_second", "mfu", "peak_memory_mib")
    return [{k: v for k, v in line.items() if k not in measured} for line in lines]


# Batches ----------------------------------------------------------------------------------------------------


@properties
@given(batch=st.integers(1, 12), seed=st.integers(0, 99), asked=st.lists(st.integers(0, 40), min_size=1))
def test_a_batch_is_a_function_of_seed_and_step(
    corpus: dict[str, Path], batch: int, seed: int, asked: list[int]
) -> None:
    """Whatever was asked for before; and in each epoch every sample comes once."""
    pairs = batches.Pairs(corpus["tokens"], corpus["texts"], batch, seed)
    again = batches.Pairs(corpus["tokens"], corpus["texts"], batch, seed)
    for step in asked:
        assert np.array_equal(pairs.rows(step), again.rows(step))
        again.rows(step + 7)
    samples = np.concatenate([pairs.rows(step) for step in range(24)]) // 2  # pair i is of sample i // 2
    for epoch in samples[: len(samples) // 12 * 12].reshape(-1, 12):
        assert sorted(epoch) == list(range(12))


def test_a_batch_is_of_one_granularity(corpus: dict[str, Path]) -> None:
    kinds = pl.read_parquet(corpus["tokens"] / "pairs.parquet")["granularity"].to_numpy()
    pairs = batches.Pairs(corpus["tokens"], corpus["texts"], BATCH, 0)  # 6 of 12: no batch holds two epochs
    drawn = [set(kinds[pairs.rows(step)]) for step in range(8)]
    assert all(len(one) == 1 for one in drawn) and len(set.union(*drawn)) == 2


def test_another_seed_gives_other_batches_and_every_pair_is_met(corpus: dict[str, Path]) -> None:
    first, second = (batches.Pairs(corpus["tokens"], corpus["texts"], BATCH, seed) for seed in (0, 1))
    assert any(not np.array_equal(first.rows(t), second.rows(t)) for t in range(3))
    assert {int(row) for t in range(60) for row in first.rows(t)} == set(range(24))


def test_a_batch_larger_than_the_data_is_refused(corpus: dict[str, Path]) -> None:
    with pytest.raises(training.TrainingError, match=r"batch_size: 13.*12 training samples"):
        batches.Pairs(corpus["tokens"], corpus["texts"], 13, 0)


# Resuming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        *((name, {}) for name in ALL),
        ("ggsm", {"freeze": "tower"}),
        ("ggsm", {"estimator": "previous_step", "freeze": "tower"}),
        ("hybrid_mask", {"estimator": "previous_step", "ramp": True, "freeze": "segment"}),
        ("ggsm", {"freeze": "tower", "lora": True}),
        ("hybrid_gq", {"lora": True}),
    ],
)
def test_a_resumed_run_is_the_undisturbed_one(
    corpus: dict[str, Path], tmp_path: Path, recipe: str, more: dict[str, Any]
) -> None:
    """Bitwise, with dropout, from any step: weights, optimizer, frozen weights and tower, metrics."""
    whole = trainer(corpus, settings(recipe, **more))
    metrics, expected = steps(whole, TOTAL), whole.state()
    for stop in (1, 3):
        first = trainer(corpus, settings(recipe, **more))
        before = steps(first, stop)
        store = checkpoints.Store(tmp_path / str(stop), 1, first.identity())
        store.save(stop, first.state())
        torch.manual_seed(99)  # another process has another random state
        second = trainer(corpus, settings(recipe, **more))
        state = store.latest()
        assert state is not None
        second.load_state(state)
        assert before + steps(second, TOTAL - stop) == metrics
        found = second.state()
        assert found.keys() == expected.keys()
        different = [k for k, v in expected.items() if not torch.equal(v.nan_to_num(), found[k].nan_to_num())]
        assert not different


def test_what_is_dropped_depends_on_the_seed(corpus: dict[str, Path]) -> None:
    """Negative control: dropout is alive in the test above, whatever torch's own random state is."""
    lines = []
    for seed, state in ((0, 1), (0, 2), (5, 1)):
        of = trainer(corpus, settings("bidirectional"))
        of.towers.seed = seed
        torch.manual_seed(state)
        lines.append(steps(of, 1))
    assert lines[0] == lines[1] != lines[2]


def test_the_stage_goes_on_where_it_was_cut_off(corpus: dict[str, Path], tmp_path: Path) -> None:
    """As `run` does it: the log has each step once, and the saved encoder is the undisturbed one."""

    class Cut(Exception):
        pass

    def until(step: float) -> Any:
        def progress(done: float, total: float, message: str) -> None:
            if done > step and "loss" in message:
                raise Cut

        return progress

    given_ = settings("ggsm")
    given_.data = sections.Data(history_days=60, breakdowns=True)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    training.run(given_, corpus, tmp_path / "whole", until(math.inf))
    with pytest.raises(Cut):
        training.run(given_, corpus, tmp_path / "cut", until(3))
    training.run(given_, corpus, tmp_path / "cut", until(math.inf))
    saved = [model.UserEncoder.load(tmp_path / name) for name in ("whole", "cut")]
    assert (saved[0].template, saved[0].history_days, saved[0].breakdowns) == (given_.template, 60, True)
    weights = [one.state_dict() for one in saved]
    assert all(torch.equal(value.nan_to_num(), weights[1][k].nan_to_num()) for k, value in weights[0].items())
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(TOTAL))
    assert (tmp_path / "cut" / runs.SCRATCH).is_dir()  # until the run is finished: that may fail as well


# Every combination trains -----------------------------------------------------------------------------------

GUIDANCE = list(
    product(
        ("embeddings", "layer:0", "final"),
        ("none", "zscore", "rank"),
        ("two_pass", "previous_step"),
        ("position", "tower", "segment"),
    )
)


@pytest.mark.parametrize(("grad_site", "normalise", "estimator", "freeze"), GUIDANCE)
def test_every_form_of_guidance_trains(
    corpus: dict[str, Path], grad_site: str, normalise: str, estimator: str, freeze: str
) -> None:
    """Into the frozen stage, with finite losses; the metrics say at `final` that guidance is blind."""
    options = {
        "grad_site": grad_site,
        "normalise": normalise,
        "estimator": estimator,
        "freeze": freeze,
        "margin": None,  # a row that loses all its negatives to the margin has no gradient
    }
    for name in tiny.GUIDED:
        of = trainer(corpus, settings(name, **options))
        before = {k: v.clone() for k, v in of.encoder.named_parameters()}
        lines = steps(of, WARM + 2)
        assert all(math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"]) for line in lines)
        assert any(not torch.equal(v, before[k]) for k, v in of.encoder.named_parameters())
        recipe = of.encoder.recipe
        assert isinstance(recipe, recipes.Guided)
        for frozen in (recipe.frozen_position, recipe.frozen_segment, recipe.frozen_mean):
            assert bool(((frozen >= 0) & (frozen <= 1)).all())
        if estimator == "two_pass":
            silent = lines[0]["guidance_silent"]
            assert silent > 0.9 if grad_site == "final" else silent == 0
        of.encoder.embed(tiny.users([2, 3]))


@pytest.mark.parametrize("recipe", ALL)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("answer_mask", ["same", "causal", "bidirectional"])
def test_every_recipe_trains(corpus: dict[str, Path], recipe: str, precision: str, answer_mask: str) -> None:
    of = trainer(corpus, settings(recipe, precision=precision, answer_mask=answer_mask))
    lines = steps(of, TOTAL)
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert all(torch.isfinite(p).all() for p in of.encoder.parameters())


def test_training_lowers_the_loss(corpus: dict[str, Path]) -> None:
    of = trainer(corpus, settings("bidirectional", total_steps=40, batch_size=12, margin=None))
    losses = [line["loss"] for line in steps(of, 40)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_probing_leaves_no_trace(corpus: dict[str, Path]) -> None:
    """The probe pass draws nothing from the random state and adds nothing to the gradients."""
    of = trainer(corpus, settings("ggsm"))
    of.encoder.train()
    parts, before = of._chunks(0), torch.get_rng_state()
    (norms,) = of._probe(parts, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in of.encoder.parameters())
    assert norms.shape == parts[0].pairs.user.valid.shape and not norms.requires_grad


def test_the_probe_runs_in_the_precision_of_training(corpus: dict[str, Path]) -> None:
    """Outside autocast it would cost twice the time and weigh another computation."""
    of = trainer(corpus, settings("ggsm", precision="bf16"))
    seen: list[torch.dtype] = []
    of.encoder.decoder.layers[0].mlp.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    of.train_step()
    assert set(seen) == {torch.bfloat16}


def test_a_row_is_embedded_as_trained_and_the_oracle_as_before(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    """Stage embed: each probe sample by its own encoder, whatever batch it came in, under its own name."""
    given_, inputs = settings("ggsm"), corpus | {"tokens": tmp_path / "tokens"}
    of = trainer(corpus, given_)
    steps(of, TOTAL)
    of.encoder.save(tmp_path / "contrast")
    shutil.copytree(corpus["tokens"], inputs["tokens"])
    for shard in list(inputs["tokens"].glob("train_users-*")):
        shard.rename(shard.with_name(shard.name.replace("train", "probe")))
    ids = list(range(123, 99, -1))
    pl.DataFrame({"sample": ids}).write_parquet(inputs["tokens"] / "probe.parquet")
    users = tokens.Sequences.load(inputs["tokens"], "probe_users")
    feature_of, found = text_encoder.features(corpus["texts"]), []
    before = towers.build_encoder(given_, corpus)
    for name, more, used in (
        ("trained", {"contrast": tmp_path / "contrast"}, of.encoder),
        ("oracle", {}, before),
    ):
        (tmp_path / name).mkdir()
        embedding.run(given_, inputs | more, tmp_path / name, lambda *_: None)
        stored = load_file(tmp_path / name / "embeddings.safetensors")
        assert stored["sample"].tolist() == ids
        for row in (0, 7, 23):
            batch = collation.collate([users[row]], tiny.pad_id(), feature_of)
            alone = used.eval().embed(batch)[0].numpy()
            np.testing.assert_allclose(stored["embeddings"][row], alone, atol=1e-5)
        found.append(stored["embeddings"])
    assert np.abs(found[0] - found[1]).max() > 1e-3


def test_training_starts_from_the_adapters_of_pretraining(corpus: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(corpus["pretrain"], tmp_path / "pretrain")
    torch.manual_seed(7)
    made = adapters.Adapters(tiny.FEATURES, tiny.decoder().get_input_embeddings())
    made.save(folder)
    built = towers.build_encoder(settings(), corpus | {"pretrain": folder}).adapters
    assert built is not None
    state = built.state_dict()
    assert state.keys() == made.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in made.state_dict().items())


CHANGES: list[dict[str, Any]] = [
    {"same_side": False},
    {"temperature": 0.7},
    {"margin": None},
    {"answer_mask": "causal"},
    {"weight_decay": 0.5},
    {"adam_beta2": 0.5},
    {"max_grad_norm": 1e-3},
    {"lr_warm_share": 0.8},
    {"learning_rate": 2e-3},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_setting_reaches_the_training(corpus: dict[str, Path], change: dict[str, Any]) -> None:
    """Negative control: the same settings twice end bitwise alike."""
    ends = []
    for more in ({}, {}, change):
        of = trainer(corpus, settings("bidirectional", **more))
        steps(of, 3)
        ends.append({name: value.clone() for name, value in of.encoder.trained_state().items()})
    alike = [all(torch.equal(ends[0][name], value) for name, value in end.items()) for end in ends[1:]]
    assert alike == [True, False]


# Guidance state ---------------------------------------------------------------------------------------------


def visibility_of(of: training.Trainer) -> list[Tensor]:
    """Collects the user tower's visibility of every training pass."""
    seen: list[Tensor] = []

    def keep(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if not inputs[5]:  # not the probe pass
            seen.append(output[0].visibility.detach())

    of.towers.register_forward_hook(keep)
    return seen


def test_the_weights_go_from_the_gradient_to_the_mask_and_open(corpus: dict[str, Path]) -> None:
    """Eq. 5, 15 as trained: in warm-up sigma(norm) of this batch; then frozen ones, ever more open."""
    of = trainer(corpus, settings("ggsm"))
    seen = visibility_of(of)
    means = []
    for t in range(TOTAL):
        of.encoder.train()
        (chunk,) = of._chunks(t)
        pairs = chunk.pairs
        if t < WARM:
            expected = torch.sigmoid(of._probe([chunk], t)[0])
        else:
            alpha = (t - WARM) / (TOTAL - WARM)
            recipe = of.encoder.recipe
            assert isinstance(recipe, recipes.Guided)
            expected = (1 - alpha) * recipe.recall(pairs.user.valid, pairs.user.segments, t) + alpha
        line = of.train_step()
        valid = pairs.user.valid
        torch.testing.assert_close(seen[-1][valid], expected[valid], rtol=0, atol=1e-6)
        means.append(line["visibility"])
    assert means[WARM:] == sorted(means[WARM:]) and min(means) >= 0.5


def test_answers_see_the_mean_and_the_last_warm_up_batch_is_frozen(corpus: dict[str, Path]) -> None:
    of, answers = trainer(corpus, settings("ggsm")), []
    recipe = of.encoder.recipe
    assert isinstance(recipe, recipes.Guided)

    def keep(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        if not inputs[5]:  # not the probe pass
            answers.append(output[1].visibility.detach())

    of.towers.register_forward_hook(keep)
    for t in range(TOTAL):
        of.encoder.train()
        (chunk,) = of._chunks(t)
        user, answer = chunk.pairs.user, chunk.pairs.answer
        if t < WARM:
            weights = torch.sigmoid(of._probe([chunk], t)[0])
        else:
            weights = recipe.recall(user.valid, user.segments, t)
        of.train_step()
        alpha = max(t - WARM, 0) / (TOTAL - WARM)
        shown = answers[-1][answer.valid]
        mean = (1 - alpha) * weights[user.valid].mean() + alpha
        torch.testing.assert_close(shown, mean.expand_as(shown), rtol=0, atol=1e-6)
        if t == WARM - 1:
            frozen = reference.freeze_by_position(weights.double().numpy(), user.valid.numpy())
            told = float(weights[user.valid].mean())
    assert float(recipe.frozen_mean) == pytest.approx(told, abs=1e-6)
    for offset, value in frozen.items():
        assert recipe.frozen_position[offset].item() == pytest.approx(value, abs=1e-6)


def test_hybrid_mask_keeps_its_frozen_weights(corpus: dict[str, Path]) -> None:
    of = trainer(corpus, settings("hybrid_mask"))
    steps(of, WARM)
    recipe = of.encoder.recipe
    frozen = {k: v.clone() for k, v in recipe.state_dict().items()}
    lines = steps(of, TOTAL - WARM)
    assert all(torch.equal(recipe.state_dict()[k], v) for k, v in frozen.items() if k.startswith("frozen"))
    assert max(line["visibility"] for line in lines) < 1


def test_previous_step_uses_the_norms_of_the_step_before(corpus: dict[str, Path]) -> None:
    """Causal at step 0; then the weights are those of the norms that the step before left."""
    of = trainer(corpus, settings("ggsm", estimator="previous_step", warm_steps=4))
    seen = visibility_of(of)
    of.train_step()
    assert float(seen[0].abs().max()) == 0
    recipe = of.encoder.recipe
    assert isinstance(recipe, recipes.Guided)
    for t in (1, 2):
        norms = recipe.previous_norms.clone()
        pairs = of._chunks(t)[0].pairs
        of.train_step()
        distance = pairs.user.valid.sum(1, keepdim=True) - pairs.user.valid.long().cumsum(1)
        valid = pairs.user.valid
        torch.testing.assert_close(seen[t][valid], torch.sigmoid(norms[distance.clamp(min=0)])[valid])
        assert not torch.equal(recipe.previous_norms, norms)


def test_the_frozen_tower_stays_what_it_was(corpus: dict[str, Path]) -> None:
    of = trainer(corpus, settings("ggsm", freeze="tower"))
    steps(of, WARM)
    assert of.frozen_tower is not None and of.frozen_tower is not of.encoder
    before = {k: v.clone() for k, v in of.frozen_tower.state_dict().items()}
    steps(of, TOTAL - WARM)
    assert all(
        torch.equal(of.frozen_tower.state_dict()[k].nan_to_num(), v.nan_to_num()) for k, v in before.items()
    )
    moved = of.encoder.state_dict()
    assert any(not torch.equal(moved[k], v) for k, v in before.items() if k.startswith("decoder"))


# Negatives --------------------------------------------------------------------------------------------------


def test_the_logged_negatives_are_counted_by_hand(corpus: dict[str, Path]) -> None:
    """Never the same household or answer; each of the three sums has its own margin mask (Eq. 7-8)."""
    of = trainer(corpus, settings("causal", batch_size=12))
    of.encoder.eval()
    of.encoder.train = lambda mode=True: of.encoder  # type: ignore[method-assign,misc]  # no dropout
    pairs, batch = of._chunks(0)[0].pairs, of.pairs.rows(0)
    user_ids, answer_ids = of.pairs.identities(batch)
    with torch.no_grad():
        user, answer = of.towers(pairs, 0, None, None, None, False)
    u, a = user.embedding, answer.embedding
    line = of.train_step()
    rows = range(12)
    candidate = [[user_ids[i] != user_ids[j] and answer_ids[i] != answer_ids[j] for j in rows] for i in rows]
    assert len(set(user_ids.tolist())) < 12 and len(set(answer_ids.tolist())) < 12
    kept, masked = 0, {}
    for name, left, right in (("user_answer", u, a), ("user_user", u, u), ("answer_answer", a, a)):
        keep = [bool(candidate[i][j] and left[i] @ right[j] <= u[i] @ a[i] + 0.1) for i in rows for j in rows]
        kept += sum(keep)
        masked[name] = 1 - sum(keep) / sum(bool(c) for row in candidate for c in row)
    assert line["true_negatives"] == pytest.approx(kept / 12)
    for name, share in masked.items():
        assert line[f"masked_{name}"] == pytest.approx(share), name
    expected = loss.info_nce(u, a, temperature=0.5, answer_ids=answer_ids, user_ids=user_ids)
    assert line["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_margin_acts_from_its_step(corpus: dict[str, Path]) -> None:
    of = trainer(corpus, settings("causal", margin=0.0, margin_from=2))
    shares = [line["masked_user_user"] + line["masked_user_answer"] for line in steps(of, 3)]
    assert shares[:2] == [0.0, 0.0] and shares[2] > 0


# Real weights -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_learns_with_lora(smollm2_folder: Path, tmp_path: Path) -> None:
    """The profile's own LoRA on real weights: a few steps on the text of the template, saved and merged."""
    profile = params.load(Path(__file__).parent.parent / "params" / "smollm2.yaml")
    assert profile.lora is not None and (profile.lora.rank, profile.lora.alpha) == (64, 64)
    assert set(profile.lora.targets) == set(sections.LORA_TARGETS)
    tokenizer = tiny.PreTrainedTokenizerFast.from_pretrained(smollm2_folder)
    inputs = tiny.corpus(tmp_path / "corpus", vocabulary=tokenizer) | {"pretrain": smollm2_folder}
    given_ = settings("ggsm", total_steps=4, batch_size=4, learning_rate=2e-4, margin=None, warm_steps=1)
    given_.lora = profile.lora
    of = trainer(inputs, given_)
    same = of.pairs.rows(0)
    of.pairs.rows = lambda step: same  # type: ignore[method-assign]  # one batch, so that losses compare
    frozen = next(
        v for k, v in of.encoder.named_parameters() if k.endswith("q_proj.base_layer.weight")
    ).clone()
    lines = steps(of, 4)
    assert lines[-1]["loss"] < lines[0]["loss"]
    after = next(v for k, v in of.encoder.named_parameters() if k.endswith("q_proj.base_layer.weight"))
    assert torch.equal(after, frozen)
    of.encoder.save(tmp_path / "saved")
    loaded = model.UserEncoder.load(tmp_path / "saved", base=smollm2_folder)
    batch = of._chunks(0)[0].pairs.user
    embedded = of.encoder.embed(batch)
    assert torch.equal(loaded.embed(batch), embedded)
    # (W + BA) x and W x + B (A x) round apart, over 30 layers by up to 4e-5.
    torch.testing.assert_close(loaded.merged().embed(batch), embedded, rtol=0, atol=1e-4)
