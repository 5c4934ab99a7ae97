"""What the encoder does with a mask, by moving tokens and looking at what moves: Eq. 4, 11-14, A.4."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ggsm_core import backbone, collation, guidance, loss, masks, model, recipes, sections, template

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

STEPS: tuple[int | None, ...] = (0, 1, 7, None)
SPAN = "scheduler/span_linear"
ROWS = (*recipes.RECIPES, SPAN)
ATTENTION = ("sdpa", "eager")


def build(row: str, architecture: str = "qwen2", **more: Any) -> model.UserEncoder:
    """The encoder of a recipe, or of a recipe/schedule; with adapters, so that a record is one token."""
    name, _, schedule = row.partition("/")
    options = {"schedule": schedule} if schedule else {}
    return tiny.encoder(name, architecture, **({"features": tiny.FEATURES} | more), **options)


def guided_weights(encoder: model.UserEncoder, batch: collation.Batch, step: int | None) -> Tensor | None:
    """What the trainer would hand over: here with some weights of exactly 0."""
    if encoder.recipe.name not in tiny.GUIDED or step is None:
        return None
    drawn = torch.rand(batch.valid.shape, generator=torch.Generator().manual_seed(3))
    return (0.1 + 0.9 * drawn).masked_fill(drawn < 0.4, 0.0).masked_fill(~batch.valid, 0.0)


# Who sees whom ----------------------------------------------------------------------------------------------


def repeat(batch: collation.Batch, times: int) -> collation.Batch:
    """The same rows ``times`` times over."""
    tensors = (batch.input_ids, batch.valid, batch.segments, batch.features, batch.numbers)
    return collation.Batch(*(None if t is None else t.repeat(times, *[1] * (t.ndim - 1)) for t in tensors))  # type: ignore[arg-type]


@contextmanager
def entering(encoder: model.UserEncoder, hidden: Tensor) -> Iterator[None]:
    """Inside, ``hidden`` enters the first block whatever the tokens are."""
    encoder.embed_tokens = lambda _: hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        del encoder.embed_tokens


def who_notices(
    encoder: model.UserEncoder,
    batch: collation.Batch,
    step: int | None,
    tower: recipes.Tower,
    site: str = "final",
) -> tuple[Tensor, model.Output]:
    """Bool[B, L, L]: does output i move when token j does? In float64, so that a whisper is heard.

    With a global token L counts it too, and it is moved like any other.
    """
    encoder = encoder.double()
    rows, length = batch.valid.shape
    extra = int(encoder.recipe.prefix is not None and tower == "user")
    weights = guided_weights(encoder, batch, step)
    hidden = encoder.embed_tokens(batch).detach()
    noise = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(5)).to(hidden)
    stacked = hidden.repeat(length + 1, 1, 1)
    for j in range(length):
        stacked[(j + 1) * rows : (j + 2) * rows, j] += noise
    everything = repeat(batch, length + 1)
    more: dict[str, Any] = {"tower": tower, "step": step, "site": site}
    with entering(encoder, stacked):
        many = encoder(everything, weights=None if weights is None else weights.repeat(length + 1, 1), **more)
    states = many.site.unflatten(0, (length + 1, rows))  # [1 + L, B, L (+ 1), d]
    moved = [states[1 + j] for j in range(length)]
    before = encoder(batch, weights=weights, **more)
    if extra:
        with torch.no_grad():
            encoder.recipe.prefix += noise
            moved.insert(0, encoder(batch, weights=weights, **more).site)
            encoder.recipe.prefix -= noise
    return torch.stack([(m - states[0]).abs().amax(-1) > 1e-9 for m in moved], dim=2), before


def who_should(output: model.Output, layers: int) -> Tensor:
    """Bool[B, L, L]: itself; the past; the future that the recipe shows; padding never; over the layers."""
    valid, length = output.valid, output.valid.shape[1]
    shown = output.visibility > 0
    shown = shown if shown.ndim == 3 else shown[:, None, :].expand(-1, length, -1)
    itself = torch.eye(length, dtype=torch.bool)
    past = torch.ones(length, length, dtype=torch.bool).tril()
    direct = ((past | shown) & valid[:, None, :]) | itself
    reach = direct
    for _ in range(layers - 1):
        reach = (reach.double() @ direct.double()) > 0
    return reach


def check_visibility(
    encoder: model.UserEncoder, batch: collation.Batch, tower: recipes.Tower, layers: int
) -> None:
    """The comparison, at every stage of training and at inference."""
    with torch.no_grad():
        for step in STEPS:
            noticed, output = who_notices(encoder, batch, step, tower)
            wrong = (noticed != who_should(output, layers)).nonzero()
            assert not len(wrong), f"step {step}: row, output, token {wrong[:3].tolist()} of {len(wrong)}"


BATCHES = {
    "alone": lambda: tiny.users([3]),
    "right": lambda: tiny.users([2, 4, 1]),
    "left": lambda: tiny.users([2, 4, 1], "left"),
}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("row", ROWS)
def test_an_output_moves_exactly_with_the_tokens_it_may_see(
    row: str, architecture: str, attention: str
) -> None:
    """One layer: what is directly visible."""
    encoder = build(row, architecture, attention=attention)
    for batch in BATCHES.values():
        check_visibility(encoder, batch(), "user", layers=1)


@pytest.mark.parametrize("row", ROWS)
def test_over_layers_a_change_travels_along_visibility(row: str) -> None:
    for layers in (2, 3):
        check_visibility(build(row, layers=layers), tiny.users([2, 4, 1], "left"), "user", layers)


@pytest.mark.parametrize("answer_mask", ["same", "causal", "bidirectional"])
@pytest.mark.parametrize("row", ROWS)
def test_answers_obey_the_mask_of_their_tower(row: str, answer_mask: str) -> None:
    encoder = build(row, answer_mask=answer_mask)
    for side in ("left", "right"):
        batch = tiny.answers(["frozen pizza", "soft drinks and an age", "once"], side)
        check_visibility(encoder, batch, "answer", layers=1)
        if answer_mask != "same":
            with torch.no_grad():
                noticed, output = who_notices(encoder, batch, None, "answer")
            future = torch.ones_like(noticed[0]).triu(1) & output.valid[:, None, :] & output.valid[:, :, None]
            assert bool(noticed[future].all()) == (answer_mask == "bidirectional")
            assert bool(noticed[future].any()) == (answer_mask == "bidirectional")


TRUE_BIAS = masks.additive_bias
Bias = Callable[..., Tensor]
WRONG: dict[str, Bias] = {
    "padding ignored": lambda w, valid, dtype: TRUE_BIAS(w, torch.ones_like(valid), dtype),
    "always causal": lambda w, valid, dtype: TRUE_BIAS(masks.causal(valid), valid, dtype),
    "always open": lambda w, valid, dtype: TRUE_BIAS(masks.bidirectional(valid), valid, dtype),
}
# The weights of hybrid_mlp are never 0, so "always open" shows in how much it sees: the test of Eq. 4 below.
SAME = {("always causal", "causal"), ("always open", "bidirectional"), ("always open", "hybrid_mlp")}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("row", ROWS)
def test_a_wrong_mask_is_noticed(row: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the three tests above, for each recipe."""
    if (wrong, row) in SAME:
        pytest.skip("for this recipe that mask is right")
    encoders = {layers: build(row, layers=layers) for layers in (1, 2)}
    monkeypatch.setattr(masks, "additive_bias", WRONG[wrong])
    for layers, encoder in encoders.items():
        with pytest.raises(AssertionError, match="row, output, token"):
            check_visibility(encoder, tiny.users([2, 4, 1], "left"), "user", layers)
    with pytest.raises(backbone.MaskNotHonoured):
        build(row)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("answer_mask", ["causal", "bidirectional"])
def test_a_wrong_mask_of_the_answers_is_noticed(
    answer_mask: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (wrong, answer_mask) in SAME:
        pytest.skip("for these answers that mask is right")
    encoder = build("hybrid_mlp", answer_mask=answer_mask)
    monkeypatch.setattr(masks, "additive_bias", WRONG[wrong])
    batch = tiny.answers(["frozen pizza", "soft drinks and an age", "once"], "left")
    with pytest.raises(AssertionError, match="row, output, token"):
        check_visibility(encoder, batch, "answer", layers=1)


def attention_of(
    encoder: model.UserEncoder, batch: collation.Batch, step: int | None
) -> tuple[Tensor, Tensor]:
    """Float[B, H, L, L]: attention of the first block, as the decoder reports it; and the visibility."""
    seen: list[Tensor] = []
    handle = encoder.decoder.layers[0].self_attn.register_forward_hook(lambda *a: seen.append(a[2][1]))
    with torch.no_grad():
        output = encoder(batch, step=step, weights=guided_weights(encoder, batch, step))
    handle.remove()
    return seen[0], output.visibility


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize(
    ("row", "step"), [("ggsm", 0), ("ggsm", 7), ("hybrid_mask", None), ("hybrid_mlp", None), ("scheduler", 7)]
)
def test_a_weight_scales_attention_as_eq_4_says(row: str, step: int | None, architecture: str) -> None:
    """w_ij multiplies the odds of a future key against the token itself, whatever else is visible."""
    encoder, batch = build(row, architecture, attention="eager").double(), tiny.users([4, 2])
    soft, weights = attention_of(encoder, batch, step)
    encoder.recipe.visibility = lambda view: masks.bidirectional(view.valid)  # type: ignore[method-assign]
    full, _ = attention_of(encoder, batch, step)
    odds = [a / a.diagonal(dim1=-2, dim2=-1)[..., None] for a in (soft, full)]
    future = torch.ones(batch.valid.shape[1], batch.valid.shape[1], dtype=torch.bool).triu(1)
    where = (future & batch.valid[:, None, :] & batch.valid[:, :, None])[:, None].expand_as(soft)
    weights = (
        weights if weights.ndim == 3 else weights[:, None, :].expand_as(future[None] & batch.valid[:, None])
    )
    expected = odds[1] * weights[:, None]
    torch.testing.assert_close(odds[0][where], expected[where], rtol=1e-5, atol=1e-8)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(odds[0][where], odds[1][where], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("row", ROWS)
def test_both_backends_agree(row: str, architecture: str) -> None:
    batch = tiny.users([3, 1, 5], "left")
    both = [build(row, architecture, layers=2, attention=name).embed(batch) for name in ATTENTION]
    torch.testing.assert_close(*both, rtol=0, atol=1e-5)


# A decoder that does not listen -----------------------------------------------------------------------------


def deaf(how: str) -> torch.nn.Module:
    """A decoder that changes the mask it is given."""
    decoder = tiny.decoder(layers=2)
    honest = decoder.forward

    def forward(*, attention_mask: Tensor, **more: Any) -> Any:
        low = torch.finfo(attention_mask.dtype).min
        if how == "drops it":
            attention_mask = None  # type: ignore[assignment]
        elif how == "ignores padding":
            attention_mask = attention_mask.masked_fill(torch.ones_like(attention_mask).tril().bool(), 0.0)
        elif how == "always open":
            attention_mask = torch.zeros_like(attention_mask)
        elif how == "on or off":
            attention_mask = torch.where(attention_mask > low, 0.0, low)
        return honest(attention_mask=attention_mask, **more)

    decoder.forward = forward
    return decoder


def test_a_decoder_that_does_not_honour_the_mask_is_refused() -> None:
    backbone.check_mask(deaf("not at all"))
    for how in ("drops it", "ignores padding", "always open", "on or off"):
        with pytest.raises(backbone.MaskNotHonoured, match="Qwen2Model with 'sdpa'"):
            model.UserEncoder(deaf(how), tiny.tokenizer(), tiny.recipe("causal"), features=None)


def test_the_mask_check_leaves_the_decoder_as_it_was() -> None:
    decoder = tiny.decoder(layers=2, attention_dropout=0.5).train()
    before = torch.get_rng_state()
    backbone.check_mask(decoder)
    assert decoder.training and torch.equal(torch.get_rng_state(), before)


# An embedding does not depend on its batch ------------------------------------------------------------------


def padded(batch: collation.Batch, count: int, side: str) -> collation.Batch:
    """``count`` more padding tokens on one side, holding what must not matter."""
    at = (count, 0) if side == "left" else (0, count)

    def pad(tensor: Tensor | None, value: float) -> Tensor | None:
        if tensor is None:
            return None
        return torch.nn.functional.pad(tensor, (*[0] * (2 * (tensor.ndim - 2)), *at), value=value)

    return collation.Batch(
        pad(batch.input_ids, 7),  # type: ignore[arg-type]
        pad(batch.valid, False),  # type: ignore[arg-type]
        pad(batch.segments, 1),  # type: ignore[arg-type]
        pad(batch.features, 9.0),
        pad(batch.numbers, -9.0),
    )


SIZES = (3, 1, 6, 2)


def check_alone(embed: Callable[[collation.Batch], Tensor], tolerance: float) -> float:
    """The same users alone, together, otherwise padded: the largest difference of a coordinate."""
    alone = torch.cat([embed(tiny.users([n])) for n in SIZES]).float()
    drift = 0.0
    for side in ("right", "left"):
        batch = tiny.users(SIZES, side)  # type: ignore[arg-type]
        others = [embed(batch), embed(padded(padded(batch, 3, "left"), 5, "right"))]
        others.append(torch.cat([embed(padded(tiny.users([n]), 4, side)) for n in SIZES]))
        drift = max(drift, *(float((other.float() - alone).abs().max()) for other in others))
    assert drift <= tolerance, f"an embedding moved by {drift:.2g} with its batch"
    return drift


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("row", ROWS)
def test_an_embedding_does_not_depend_on_its_batch(row: str, architecture: str, attention: str) -> None:
    check_alone(build(row, architecture, layers=3, attention=attention).embed, 1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_ignored_padding_would_show_in_the_embeddings(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = build(row, layers=3)
    monkeypatch.setattr(masks, "additive_bias", WRONG["padding ignored"])
    with pytest.raises(AssertionError, match="moved by"):
        check_alone(encoder.embed, 1e-5)


@pytest.mark.parametrize("row", ROWS)
def test_in_bf16_an_embedding_drifts_little(row: str) -> None:
    """bf16 has 8 bits: a batch may move a coordinate by a few of its steps, never by more."""
    encoder = build(row, layers=3)

    def embed(batch: collation.Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return encoder.embed(batch)

    check_alone(embed, 0.02)
    exact = encoder.embed(tiny.users(SIZES))
    assert float((exact * embed(tiny.users(SIZES))).sum(1).min()) > 0.999


# Gradients --------------------------------------------------------------------------------------------------


def contrast(
    encoder: model.UserEncoder, *, site: str | None = None, step: int = 5, causal: bool = False
) -> Any:
    """InfoNCE over four pairs, and what the user tower put out."""
    batch = tiny.users([2, 4, 1, 3], "left")
    weights = guided_weights(encoder, batch, step)
    output = encoder(batch, step=step, weights=weights, site=site, causal=causal)
    other = encoder(
        tiny.answers(["pizza", "soft drinks", "a visit", "once"]), tower="answer", step=step, causal=True
    )
    return loss.info_nce(output.embedding, other.embedding, temperature=1.0, margin=None), output, batch


@pytest.mark.parametrize("row", ["causal", "bidirectional"])
def test_the_final_states_are_blind_and_the_embeddings_are_not(row: str) -> None:
    """Reading note 1: the loss reads the final state at <USER> alone."""
    encoder = build(row, layers=2)
    at_user = tiny.users([2, 4, 1, 3], "left").input_ids == encoder.ids["<USER>"]
    value, output, batch = contrast(encoder, site="final")
    norms = guidance.gradient_norms(value, output.site)
    assert bool((norms[at_user] > 0).all()) and bool((norms[~at_user] == 0).all())
    for site in ("embeddings", "layer:0"):
        value, output, batch = contrast(encoder, site=site)
        norms = guidance.gradient_norms(value, output.site)
        assert bool((norms[batch.valid] > 0).all()) and bool((norms[~batch.valid] == 0).all()), site


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("lora", [None, sections.Lora(rank=2, alpha=2)])
def test_layer_k_is_the_output_of_block_k(architecture: str, lora: sections.Lora | None) -> None:
    encoder, batch = build("bidirectional", architecture, layers=3, lora=lora), tiny.users([2, 4])
    seen: list[Tensor] = []
    base = encoder.decoder if lora is None else encoder.decoder.get_base_model()
    for block in base.layers:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        sites = [encoder(batch, site=f"layer:{k}").site for k in range(3)]
        final = encoder(batch, site="final").site
    for k, site in enumerate(sites):
        assert torch.equal(site, seen[k])
    assert torch.equal(base.norm(sites[-1]), final)
    assert not torch.allclose(sites[0], sites[1])
    for wrong in ("layer:3", "layer:-1", "middle"):
        with pytest.raises(model.EncoderError, match=rf"grad_site: '{wrong}'.*layer:0 to layer:2"):
            encoder(batch, site=wrong)


def test_the_mask_mlp_learns_through_both_backends() -> None:
    gradients = []
    for attention in ATTENTION:
        encoder = build("hybrid_mlp", layers=2, attention=attention)
        contrast(encoder)[0].backward()
        found = {name: p.grad for name, p in encoder.recipe.named_parameters()}
        for name, gradient in found.items():
            assert gradient is not None and torch.isfinite(gradient).all() and gradient.any(), name
        gradients.append(torch.cat([g.flatten() for g in found.values()]))  # type: ignore[union-attr]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("row", ROWS)
def test_every_gradient_is_finite_and_reaches_what_is_trained(row: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        encoder = build(row, layers=2)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = contrast(encoder)[0]
        value.backward()
        for name, parameter in encoder.named_parameters():
            unused = parameter.grad is None
            assert not unused or any(
                name.startswith(f"adapters.{m}") for m in ("minipro", "spm", "search", "tabular")
            )
            assert unused or torch.isfinite(parameter.grad).all(), name


def test_weights_carry_no_gradient() -> None:
    """Reading note 6."""
    valid = torch.ones(2, 5, dtype=torch.bool)
    norms = torch.rand(2, 5, requires_grad=True)
    for normalise in ("none", "zscore", "rank"):
        weights = guidance.token_weights(norms, valid, normalise)  # type: ignore[arg-type]
        assert not weights.requires_grad
    value, output, _ = contrast(build("ggsm"), site="embeddings", causal=True)
    assert not guidance.gradient_norms(value, output.site).requires_grad


def test_guidance_that_says_nothing_is_named() -> None:
    valid = torch.ones(3, 8, dtype=torch.bool)
    drawn = torch.rand(3, 8, generator=torch.Generator().manual_seed(0)) + 0.1

    def verdict(norms: Tensor, normalise: str = "none") -> str | None:
        return guidance.diagnose(norms, guidance.token_weights(norms, valid, normalise), valid).degenerate  # type: ignore[arg-type]

    blind = torch.zeros(3, 8)
    blind[:, -1] = 1.0
    assert "final" in (verdict(blind) or "")
    assert "constant" in (verdict(drawn * 1e-4) or "")  # everything 0.5: the batch is large
    assert "constant" in (verdict(torch.ones(3, 8), "zscore") or "")  # equal norms
    assert verdict(drawn) is None and verdict(drawn * 1e-4, "zscore") is None
    assert verdict(drawn * 1e-4, "rank") is None
    padding = valid.clone()
    padding[:, :4] = False  # 0 on padding is no silence
    norms = drawn.masked_fill(~padding, 0.0)
    assert guidance.diagnose(norms, guidance.token_weights(norms, padding), padding).degenerate is None


# Bad input --------------------------------------------------------------------------------------------------


def test_a_sequence_without_or_with_two_read_out_tokens_is_refused() -> None:
    encoder, batch = build("causal"), tiny.users([2, 4])
    last = batch.input_ids == encoder.ids["<USER>"]
    batch.input_ids[last] = encoder.ids["<bill>"]
    with pytest.raises(collation.NoToken, match="<USER>"):
        encoder(batch)
    batch.input_ids[:, :2] = encoder.ids["<USER>"]
    with pytest.raises(collation.TwoTokens, match="<USER>"):
        encoder(batch)


def test_a_hidden_state_that_is_not_finite_is_refused() -> None:
    encoder, batch = build("bidirectional"), tiny.users([2, 4])
    assert batch.numbers is not None
    batch.numbers[1, 1] = torch.nan
    with pytest.raises(model.NotFinite, match="row 1"):
        encoder.embed(batch)


def test_slots_without_their_features_are_refused() -> None:
    batch = tiny.users([2, 4])
    batch.features = None
    with pytest.raises(model.EncoderError, match="feature_of"):
        build("causal").embed(batch)


def test_an_answer_mask_that_is_none_is_refused() -> None:
    with pytest.raises(model.EncoderError, match="answer_mask: 'bidirectonal' is not one of same, causal"):
        model.UserEncoder(
            tiny.decoder(), tiny.tokenizer(), tiny.recipe("causal"), features=None, answer_mask="bidirectonal"
        )  # type: ignore[arg-type]


def test_a_tokenizer_without_the_tags_is_refused() -> None:
    bare = tiny.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
    with pytest.raises(model.EncoderError, match=r"<bill>.*<USER>"):
        model.UserEncoder(tiny.decoder(), bare, tiny.recipe("causal"), features=None)


@pytest.mark.parametrize("row", [SPAN, "hybrid_mask"])
def test_a_sequence_longer_than_the_recipe_knows_is_refused(row: str) -> None:
    """A span built for 64 tokens would cut the view of the 65th in silence."""
    long = template.encode_user(tiny.user(60), tiny.tokenizer(), max_tokens=tiny.LONGEST + 20)
    batch = collation.collate([long], tiny.pad_id(), tiny.feature_of)
    with pytest.raises(model.EncoderError, match=rf"{len(long.input_ids)} tokens.*{tiny.LONGEST}"):
        build(row).embed(batch)
    build(row).embed(padded(tiny.users([2]), 90, "left"))  # padding does not count


# Saved, loaded, merged --------------------------------------------------------------------------------------


def shaken(encoder: model.UserEncoder) -> model.UserEncoder:
    """As after training: LoRA's second factor starts at 0 and would hide everything."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return encoder


LORA = sections.Lora(rank=4, alpha=8)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of the decoder that LoRA starts from."""
    tiny.decoder(layers=2).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("row", ROWS)
def test_an_encoder_comes_back_from_its_folder(
    row: str, lora: sections.Lora | None, base: Path, tmp_path: Path
) -> None:
    """Weights, recipe with options and state, tokenizer: embeddings of both towers are bitwise the same."""
    encoder = shaken(build(row, layers=2, lora=lora, answer_mask="same"))
    encoder.template, encoder.history_days = sections.Template(bill=3), 30
    encoder.save(tmp_path / "saved")
    loaded = model.UserEncoder.load(tmp_path / "saved", base=base if lora else None)
    batch, answers = tiny.users([3, 1, 5], query=tiny.QUERY), tiny.answers(["frozen pizza", "once"])
    assert torch.equal(loaded.embed(batch), encoder.embed(batch))
    assert torch.equal(loaded.embed(answers, "answer"), encoder.embed(answers, "answer"))
    assert (loaded.template, loaded.history_days) == (encoder.template, encoder.history_days)
    assert loaded.recipe.options == encoder.recipe.options and loaded.recipe.name == encoder.recipe.name
    for name, tensor in encoder.recipe.state_dict().items():
        assert torch.equal(loaded.recipe.state_dict()[name], tensor), name
    text = f"<bill> soft drinks; {template.sanitise('1<2')} </bill>\n<USER>"
    assert loaded.tokenizer(text).input_ids == tiny.tokenizer()(text).input_ids


def test_lora_saves_its_update_alone(tmp_path: Path) -> None:
    encoder = shaken(build("ggsm", layers=2, lora=LORA))
    encoder.save(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "encoder.safetensors").keys()
    assert not any(
        "base_layer" in name or "norm" in name.split("decoder.")[-1] for name in names if "decoder" in name
    )
    assert {
        f"recipe.{k}" for k in ("frozen_position", "frozen_segment", "frozen_mean", "previous_norms")
    } <= set(names)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "saved: holds LoRA weights only, and base is missing"),
        ("nowhere", "base is .*nowhere, no folder; give the folder of its decoder"),
        ("saved", "saved: missing or damaged"),
        ("another", "another holds other weights than the decoder that saved was trained on"),
    ],
)
def test_a_base_is_the_one_that_lora_was_trained_on(
    given: str | None, said: str, base: Path, tmp_path: Path
) -> None:
    """A decoder of the same shape would load without a word and embed otherwise."""
    shaken(build("ggsm", layers=2, lora=LORA)).save(tmp_path / "saved")
    tiny.decoder(layers=2, seed=1).save_pretrained(tmp_path / "another")
    with pytest.raises(model.EncoderError, match=said):
        model.UserEncoder.load(tmp_path / "saved", base=given and tmp_path / given)
    build("ggsm", layers=2).save(tmp_path / "whole")
    with pytest.raises(model.EncoderError, match="whole has no LoRA; leave base out"):
        model.UserEncoder.load(tmp_path / "whole", base=base)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("row", ["ggsm", "hybrid_mlp", "hybrid_gq"])
def test_merged_lora_embeds_the_same(row: str, architecture: str, tmp_path: Path) -> None:
    """To 1e-5 in fp32; and what is merged is saved whole."""
    encoder = shaken(build(row, architecture, layers=2, lora=LORA))
    batch = tiny.users([3, 1, 5])
    before = encoder.embed(batch)
    merged = encoder.merged()
    torch.testing.assert_close(merged.embed(batch), before, rtol=0, atol=1e-5)
    assert torch.equal(encoder.embed(batch), before), "merging changed the encoder it was asked of"
    merged.save(tmp_path)
    assert torch.equal(model.UserEncoder.load(tmp_path).embed(batch), merged.embed(batch))
    half = encoder.bfloat16().merged()
    assert half.decoder.dtype == torch.float32, "an update added in bf16 is mostly rounded away"
    with pytest.raises(model.EncoderError, match="lora"):
        merged.merged()


def break_missing(state: dict[str, Tensor], key: str) -> str:
    """Take a key away."""
    del state[key]
    return f"missing.*{key}"


def break_unexpected(state: dict[str, Tensor], key: str) -> str:
    """Add a key under a wrong name."""
    state[f"{key}.more"] = state[key].clone()
    return f"unexpected.*{key}.more"


def break_shape(state: dict[str, Tensor], key: str) -> str:
    """Give a key another shape."""
    state[key] = torch.cat([state[key].flatten(), torch.zeros(1)])
    return f"other shape.*{key}"


@pytest.mark.parametrize("damage", [break_missing, break_unexpected, break_shape])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_keys_that_do_not_fit_are_errors(
    damage: Callable[..., str], lora: sections.Lora | None, base: Path, tmp_path: Path
) -> None:
    build("ggsm", layers=2, lora=lora).save(tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "encoder.safetensors")
    keys = ["recipe.frozen_mean", "adapters.bill.layers.0.weight"]
    keys.append(next(k for k in whole if ("lora_B" if lora else "q_proj.weight") in k))
    for number, key in enumerate(keys):
        state = dict(whole)
        expected = damage(state, key)
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", folder)
        save_file(state, folder / "encoder.safetensors")
        with pytest.raises(model.EncoderError, match=expected):
            model.UserEncoder.load(folder, base=base if lora else None)


DAMAGES: dict[str, tuple[str, Callable[[str], str], str]] = {
    "empty weights": ("encoder.safetensors", lambda _: "", ""),
    "cut weights": ("encoder.safetensors", lambda text: text[: len(text) // 2], ""),
    "no length": ("encoder.json", lambda text: text.replace('"max_length"', '"length"'), "max_length: "),
    "an earlier version": (
        "encoder.json",
        lambda text: text.replace('"history_days"', '"days"'),
        "history_days: ",
    ),
    "length as text": ("encoder.json", lambda text: text.replace(": 64,", ': "64",', 1), "max_length: "),
    "half a description": ("encoder.json", lambda text: text[:60], "Invalid JSON"),
    "an unknown option": ("encoder.json", lambda text: text.replace(": {", ': {"x": 1', 1), "x: "),
    "half a tokenizer": ("tokenizer.json", lambda text: text[:60], ""),
    "half a configuration": ("config.json", lambda text: text[:60], ""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_named_with_file_and_field(damage: str, tmp_path: Path) -> None:
    name, change, field = DAMAGES[damage]
    build("causal").save(tmp_path / "saved")
    file = tmp_path / "saved" / name
    before = file.read_bytes().decode("latin-1")
    assert before != change(before)
    file.write_bytes(change(before).encode("latin-1"))
    with pytest.raises(model.EncoderError, match=rf"saved/{name}: .*{field}"):
        model.UserEncoder.load(tmp_path / "saved")


def test_a_folder_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(model.EncoderError, match=r"nowhere/encoder\.json: missing"):
        model.UserEncoder.load(tmp_path / "nowhere")


def flip(weight: Tensor) -> None:
    """Keeps the sum."""
    weight.data = weight.data.flip(0)


CHANGES: dict[str, Callable[[model.UserEncoder], object]] = {
    "trained weight": lambda encoder: flip(encoder.adapters.bill.layers[0].weight),  # type: ignore[union-attr]
    "frozen weight": lambda encoder: flip(encoder._base().layers[0].mlp.up_proj.weight),
    "frozen state": lambda encoder: flip(encoder.recipe.frozen_position),
    "template": lambda encoder: setattr(encoder, "template", sections.Template(bill=3)),
    "recipe": lambda encoder: setattr(encoder.recipe, "total_steps", 3),
    "configuration": lambda encoder: setattr(encoder._base().config, "rms_norm_eps", 1e-5),
    "tokenizer": lambda encoder: encoder.tokenizer.add_tokens(["milk"]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_fingerprint_is_of_all_that_makes_an_embedding(
    change: str, lora: sections.Lora | None, base: Path, tmp_path: Path
) -> None:
    encoder = build("ggsm", layers=2, lora=lora)
    encoder.tokenizer = copy.deepcopy(encoder.tokenizer)
    encoder.save(tmp_path / "saved")
    before = encoder.fingerprint()
    encoder.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert encoder.fingerprint() == before
    assert model.UserEncoder.load(tmp_path / "saved", base=base if lora else None).fingerprint() == before
    CHANGES[change](encoder)
    assert encoder.fingerprint() != before


def test_a_recipe_that_is_not_registered_is_named(tmp_path: Path) -> None:
    build("causal").save(tmp_path)
    described = (tmp_path / "encoder.json").read_text(encoding="utf-8")
    (tmp_path / "encoder.json").write_text(described.replace('"causal"', '"mine"', 1), encoding="utf-8")
    with pytest.raises(model.EncoderError, match="'mine'"):
        model.UserEncoder.load(tmp_path)


def test_with_one_seed_all_recipes_start_alike() -> None:
    """Rows of a table differ by their recipe, not by other adapters."""
    states = []
    for name in recipes.RECIPES:
        torch.manual_seed(0)
        recipe = recipes.build(name, None, total_steps=10, hidden_size=tiny.HIDDEN, max_length=tiny.LONGEST)
        encoder = model.UserEncoder(
            tiny.decoder(), tiny.tokenizer(), recipe, features=tiny.FEATURES, lora=LORA
        )
        states.append({k: v for k, v in encoder.state_dict().items() if not k.startswith("recipe.")})
    for state in states[1:]:
        assert all(torch.equal(state[k], v) for k, v in states[0].items())


# Real weights -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: Path) -> Iterator[Callable[..., model.UserEncoder]]:
    """Encoders on SmolLM2-135M; the decoder is read once."""
    decoder = model.load_decoder(smollm2_folder, "sdpa")
    tokenizer = tiny.PreTrainedTokenizerFast.from_pretrained(smollm2_folder)

    def build(name: str) -> model.UserEncoder:
        torch.manual_seed(0)
        recipe = recipes.build(name, None, total_steps=60, hidden_size=576, max_length=96)
        if isinstance(recipe, recipes.Guided):
            recipe.freeze(
                torch.rand(1, 96), torch.ones(1, 96, dtype=torch.bool), torch.zeros(1, 96, dtype=torch.long)
            )
        return model.UserEncoder(decoder, tokenizer, recipe, features=tiny.FEATURES).eval()

    yield build


def smollm2_users(encoder: model.UserEncoder, side: str) -> collation.Batch:
    """Two users."""
    rows = [template.encode_user(tiny.user(n), encoder.tokenizer, max_tokens=96) for n in (4, 2)]
    return collation.collate(rows, encoder.ids["<pad>"], tiny.feature_of, side)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_smollm2_sees_what_it_may_and_no_batch(smollm2: Callable[..., model.UserEncoder], name: str) -> None:
    """Direct visibility after block 0, reach after the last; embeddings alone and in a batch; in fp32."""
    encoder = smollm2(name)
    batch = smollm2_users(encoder, "left")
    hidden = encoder.embed_tokens(batch).detach()
    extra = int(encoder.recipe.prefix is not None)
    places = (1, batch.valid.shape[1] - 3)  # padding of one row, and near the end
    with torch.inference_mode():
        for site, layers in (("layer:0", 1), ("final", 30)):
            before = encoder(batch, site=site)
            should = who_should(before, layers)
            for j in places:
                moved = hidden.clone()
                moved[:, j] += 0.1 * torch.randn(576, generator=torch.Generator().manual_seed(j))
                with entering(encoder, moved):
                    noticed = (encoder(batch, site=site).site != before.site).any(-1)
                assert torch.equal(noticed, should[:, :, j + extra]), (site, j)
    right = encoder.embed(smollm2_users(encoder, "right"))
    torch.testing.assert_close(encoder.embed(batch), right, rtol=0, atol=1e-5)
    row = template.encode_user(tiny.user(2), encoder.tokenizer, max_tokens=96)
    alone = encoder.embed(collation.collate([row], encoder.ids["<pad>"], tiny.feature_of))
    torch.testing.assert_close(alone, right[1:], rtol=0, atol=1e-5)
