"""The causal language model that contrastive training starts from.

The paper starts from Qwen2.5-0.5B-Instruct. Where no hub is at hand, a small Qwen2 learns the language of the
template itself: next-token prediction on the histories and answers of the training period.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from transformers import PreTrainedTokenizerFast

from ggsm_core.backbone import load_pretrained, new_decoder, train_tokenizer
from ggsm_core.template import Encoded, User, collate, encode_answer, encode_user, render
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
    pairs = pl.read_parquet(inputs["pairs"] / "pairs.parquet").select("sample", "query", "answer")
    users = read_users(inputs["windows"], pairs["sample"], params.template)
    reader = np.random.default_rng(settings.seed)
    chosen = pairs[reader.permutation(len(pairs))[: settings.steps * settings.batch_size]]
    progress(0, settings.steps, "tokenizer")
    texts = [render(users[sample], query) for sample, query in chosen[:2000].select("sample", "query").rows()]
    tokenizer = train_tokenizer([*texts, *pairs["answer"].unique().sort()], params.backbone.vocab)
    documents = [
        _document(users[sample], query, answer, tokenizer, settings.sequence_tokens)
        for sample, query, answer in chosen.rows()
    ]

    torch.manual_seed(settings.seed)
    model = new_decoder(params.backbone, len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    begin = time.monotonic()
    with (out / "metrics.jsonl").open("w", encoding="utf-8") as log:
        for step in range(settings.steps):
            places = np.arange(step * settings.batch_size, (step + 1) * settings.batch_size) % len(documents)
            batch = collate([documents[place] for place in places], tokenizer.pad_token_id)
            # Nothing is predicted after <EOS>: one same target would make the state read there a constant.
            targets = batch.input_ids.masked_fill(~batch.valid, -100)
            loss = model(input_ids=batch.input_ids, attention_mask=batch.valid, labels=targets).loss
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


def _document(
    user: User, query: str | None, answer: str, tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> Encoded:
    """A history, its query, ``<USER>``, the answer and ``<EOS>``, as plain tokens.

    The answer follows ``<USER>``, so the state that is read there already looks ahead. Old records go first
    where the whole does not fit.
    """
    end = encode_answer(answer, tokenizer, max_tokens=max_tokens)
    begin = encode_user(
        user, tokenizer, query, modality_input="text", max_tokens=max_tokens - len(end.input_ids)
    )
    return Encoded(
        np.concatenate([begin.input_ids, end.input_ids]), np.concatenate([begin.segments, end.segments])
    )
