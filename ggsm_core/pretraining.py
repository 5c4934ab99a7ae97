"""The causal language model that contrastive training starts from.

The paper starts from Qwen2.5-0.5B-Instruct. Where no hub is at hand, a small Qwen2 learns the language of the
template itself: next-token prediction on the histories and answers of the training period.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch

from ggsm_core.backbone import load_pretrained, new_decoder, train_tokenizer
from ggsm_core.template import EOS_TOKEN, encode_answer, encode_user, render
from ggsm_core.tokens import Progress, read_users


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``pretrain``: a Hugging Face folder with decoder and tokenizer.

    For a published decoder it only adds the tags to the vocabulary.
    """
    if params.backbone.kind != "scratch":
        progress(0, 1, "published decoder")
        model, tokenizer = load_pretrained(params.backbone)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        progress(1, 1, "tags added")
        return
    settings = params.pretraining
    samples = pl.read_parquet(inputs["windows"] / "samples.parquet")
    train = samples.filter(pl.col("split") == "train")["sample"]
    users = read_users(inputs["windows"], train, params.template)
    pairs = (
        pl.read_parquet(inputs["pairs"] / "pairs.parquet")
        .select("query", "answer")
        .unique(maintain_order=True)
    )
    order = np.random.default_rng(settings.seed).permutation(train.to_numpy()).tolist()
    texts = [render(users[sample]) for sample in order[:2000]]
    progress(0, settings.steps, "tokenizer")
    tokenizer = train_tokenizer(
        [*texts, *pairs["query"].drop_nulls().unique().sort(), *pairs["answer"]], params.backbone.vocab
    )

    # Three parts histories, one part answers: the language of both towers, in the order of one epoch at most.
    needed = settings.steps * settings.batch_size * settings.sequence_tokens
    eos = tokenizer.convert_tokens_to_ids(EOS_TOKEN)
    histories = (
        np.append(
            encode_user(users[sample], tokenizer, modality_input="text", max_tokens=1 << 20).input_ids, eos
        )
        for sample in order
    )
    reader = np.random.default_rng([settings.seed, 1])
    answers = (
        encode_answer(pairs["answer"][int(i)], tokenizer, max_tokens=1 << 20).input_ids
        for i in reader.permutation(len(pairs))
    )
    stream = [*_until(histories, 3 * needed // 4), *_until(answers, needed // 4)]
    tokens = _shuffled_blocks(stream, settings.sequence_tokens, reader)

    torch.manual_seed(settings.seed)
    model = new_decoder(params.backbone, len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    begin = time.monotonic()
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as log:
        for step in range(settings.steps):
            rows = torch.from_numpy(tokens[reader.integers(len(tokens), size=settings.batch_size)])
            loss = model(input_ids=rows, labels=rows).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seconds = time.monotonic() - begin
            log.write(
                json.dumps({"step": step, "loss": float(loss.detach()), "seconds": round(seconds, 3)}) + "\n"
            )
            log.flush()
            progress(step + 1, settings.steps, f"language model, loss {float(loss.detach()):.3f}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _until(documents: Iterator[np.ndarray], tokens: int) -> Iterator[np.ndarray]:
    """Documents until there are that many tokens, or no more documents."""
    for document in documents:
        if tokens <= 0:
            return
        tokens -= len(document)
        yield document


def _shuffled_blocks(stream: list[np.ndarray], length: int, generator: np.random.Generator) -> np.ndarray:
    """Int64[n, length]: documents in a new order, packed end to end."""
    packed = np.concatenate([stream[i] for i in generator.permutation(len(stream))])
    return packed[: len(packed) // length * length].reshape(-1, length)
