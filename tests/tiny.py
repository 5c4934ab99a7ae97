"""Tiny encoders with random weights, of every architecture and recipe, and batches to feed them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from safetensors.numpy import save_file
from transformers import (
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from ggsm_core import backbone, collation, model, order, recipes, sections, template, tokens

ARCHITECTURES = {
    "qwen2": (Qwen2Config, Qwen2Model),
    "llama": (LlamaConfig, LlamaModel),
    "qwen3": (Qwen3Config, Qwen3Model),
}
GUIDED = ("hybrid_mask", "ggsm")
HIDDEN, LONGEST, TOTAL, WARM = 32, 64, 10, 4
FEATURES = 5
WORDS = "soft drinks (grocery), frozen pizza, visit to a store on a weekday, age 45-54, homeowner, once"
QUERY = "What next?"


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows the template's tags, and some numbers as one token."""
    return backbone.train_tokenizer([WORDS, QUERY, " 12 45-54" * 9], 320)


def decoder(
    architecture: str = "qwen2", layers: int = 1, attention: str = "sdpa", seed: int = 0, **more: Any
) -> PreTrainedModel:
    """Grouped queries, as in the published models; weights large enough for attention to matter."""
    config, kind = ARCHITECTURES[architecture]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = kind(
            config(
                vocab_size=len(tokenizer()),
                hidden_size=HIDDEN,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                initializer_range=0.2,
                tie_word_embeddings=True,
                attn_implementation=attention,
                **more,
            )
        )
    return built


def recipe(name: str, seed: int = 0, **options: Any) -> recipes.Recipe:
    """The recipe as training might leave it: nothing that is learnt or frozen is at its start."""
    section = recipes.RECIPES[name].section
    if name in GUIDED:
        options = {"warm_steps": WARM} | options
    built = recipes.build(name, section(**options), total_steps=TOTAL, hidden_size=HIDDEN, max_length=LONGEST)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if isinstance(built, recipes.Guided):
            for frozen in built.buffers():
                frozen.copy_(0.1 + 0.8 * torch.rand(frozen.shape, generator=generator))
    return built


def encoder(
    name: str = "bidirectional",
    architecture: str = "qwen2",
    *,
    layers: int = 1,
    attention: str = "sdpa",
    features: int | None = None,
    lora: sections.Lora | None = None,
    answer_mask: str = "same",
    **options: Any,
) -> model.UserEncoder:
    """An encoder ready to embed; the same arguments give the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return model.UserEncoder(
            decoder(architecture, layers, attention),
            tokenizer(),
            recipe(name, **options),
            features=features,
            lora=lora,
            answer_mask=answer_mask,
        ).eval()


def user(records: int, seed: int = 0) -> template.User:
    """``records`` records, most of them bills."""
    rng = np.random.default_rng(seed)
    texts = rng.choice(WORDS.split(", "), records).tolist()
    made = [template.Record(text, tuple(rng.normal(size=6).tolist())) for text in texts]
    return template.User({"bill": made[1:], "app": made[:1]})


def feature_of(text: str) -> np.ndarray:
    """Float32[F], a stand-in for the frozen text encoder."""
    return np.random.default_rng(len(text)).normal(size=FEATURES).astype(np.float32)


def users(
    sizes: Sequence[int],
    side: Literal["left", "right"] = "right",
    *,
    adapter: bool = True,
    query: str | None = None,
) -> collation.Batch:
    """A batch of users with so many records each, every record one slot (or text)."""
    mode: Literal["adapter", "text"] = "adapter" if adapter else "text"
    rows = [
        template.encode_user(user(n, seed=n), tokenizer(), query, modality_input=mode, max_tokens=LONGEST)
        for n in sizes
    ]
    return collation.collate(rows, pad_id(), feature_of if adapter else None, side)


def answers(texts: Sequence[str], side: Literal["left", "right"] = "right") -> collation.Batch:
    """A batch of answers."""
    return collation.collate(
        [template.encode_answer(text, tokenizer(), max_tokens=32) for text in texts], pad_id(), None, side
    )


def pad_id() -> int:
    """Id of ``<pad>``."""
    return int(tokenizer().convert_tokens_to_ids(template.PAD_TOKEN))


def corpus(
    folder: Path,
    *,
    vocabulary: PreTrainedTokenizerFast | None = None,
    kinds: tuple[str, str] = ("visits", "weeks"),
) -> dict[str, Path]:
    """What the stages tokens and texts write: two pairs a sample; some households have two samples."""
    answers_of = ("frozen pizza", "soft drinks (grocery)", "a visit on a weekday", "homeowner", "age 45-54")
    vocabulary = vocabulary or tokenizer()
    households = 9
    drawn = [(sample, kind, kinds[kind]) for sample in range(12) for kind in range(2)]
    table = order.in_pools(pl.DataFrame(drawn, schema=["sample", "kind", "granularity"], orient="row"))
    rows = table.select("sample", "kind").rows()
    encoded = [
        template.encode_user(user(1 + sample % 5, seed=sample), vocabulary, QUERY, max_tokens=LONGEST)
        for sample, _ in rows
    ]
    answer_ids = [(2 * sample + kind) % len(answers_of) for sample, kind in rows]
    pairs = pl.DataFrame(
        {
            "sample": [sample for sample, _ in rows],
            "user": [f"household {sample % households}" for sample, _ in rows],
            "granularity": table["granularity"],
            "answer_id": answer_ids,
            "user_id": [sample % households for sample, _ in rows],
        }
    )
    inputs = {name: folder / name for name in ("tokens", "texts")}
    for path in inputs.values():
        path.mkdir(parents=True)
    tokens.write(inputs["tokens"], "train_users", encoded)
    said = [template.encode_answer(answers_of[i], vocabulary, max_tokens=32) for i in answer_ids]
    tokens.write(inputs["tokens"], "train_answers", said)
    pairs.write_parquet(inputs["tokens"] / "pairs.parquet")
    order.save_indexes(inputs["tokens"], pairs, np.array([len(one.input_ids) for one in encoded]))
    texts = sorted(WORDS.split(", "))
    (inputs["texts"] / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    features = np.stack([feature_of(text) for text in texts])
    save_file({"features": features}, inputs["texts"] / "texts.safetensors")
    return inputs
