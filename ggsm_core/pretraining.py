"""The causal language model that contrastive training starts from.

The paper starts from Qwen2.5-0.5B-Instruct. Where no hub is at hand, a small Qwen2 learns the language of the
template itself: next-token prediction on the histories and answers of the training period. Where records are
soft tokens, a second part shows it the same histories in that form, and the adapters learn to be read: with
adapters that say nothing, all users look alike at ``<USER>`` (mean cosine 0.999), and InfoNCE, whose easiest
way down is then to move all users and answers to one point, stays there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ggsm_core.adapters import Adapters
from ggsm_core.backbone import load_pretrained, new_decoder, train_tokenizer
from ggsm_core.collation import collate
from ggsm_core.progress import Progress
from ggsm_core.template import (
    RECORD_TOKEN,
    USER_TOKEN,
    Encoded,
    QueryTooLong,
    Record,
    User,
    encode_answer,
    encode_user,
    render,
)
from ggsm_core.text_encoder import feature_size, features
from ggsm_core.tokens import read_users

IGNORED = -100
"""A target that the loss leaves out."""


class Diverged(ValueError):
    """A loss that is no number any more: what is saved after it would be worthless."""


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``pretrain``: a Hugging Face folder with decoder and tokenizer, and the adapters if it has any.

    For a published decoder it only adds the tags to the vocabulary.
    """
    if params.backbone.kind != "scratch":
        progress(0, 1, "published decoder")
        model, tokenizer = load_pretrained(params.backbone)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        progress(1, 1, "tags added")
        return
    settings, template = params.pretraining, params.template
    pairs = pl.read_parquet(inputs["pairs"] / "pairs.parquet").select("sample", "query", "answer")
    users = read_users(inputs["windows"], pairs["sample"], template)
    shuffled = pairs[np.random.default_rng(settings.seed).permutation(len(pairs))]
    in_all = settings.steps + (settings.adapter_steps if template.modality_input == "adapter" else 0)
    progress(0, in_all, "tokenizer")
    texts = [
        render(users[sample], query) for sample, query in shuffled[:2000].select("sample", "query").rows()
    ]
    tokenizer = train_tokenizer([*texts, *pairs["answer"].unique().sort()], params.backbone.vocab)
    _check_lengths(pairs, tokenizer, template, settings.sequence_tokens)

    torch.manual_seed(settings.seed)
    model = new_decoder(params.backbone, len(tokenizer))
    train = partial(_train, settings, shuffled, out / "metrics.jsonl", in_all, progress)
    text_loss = partial(_text_loss, model, tokenizer, users, settings.sequence_tokens)
    train(model.parameters(), text_loss, 0, settings.steps, settings.batch_size)
    if template.modality_input == "adapter":
        adapters = Adapters(feature_size(inputs["texts"]), model.get_input_embeddings())
        room = template.max_user_tokens + template.max_answer_tokens
        record_loss = partial(
            _record_loss, model, adapters, tokenizer, users, room, features(inputs["texts"])
        )
        learned = [*model.parameters(), *adapters.parameters()]
        train(learned, record_loss, settings.steps, settings.adapter_steps, settings.adapter_batch_size)
        adapters.save(out)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _check_lengths(
    pairs: pl.DataFrame, tokenizer: PreTrainedTokenizerFast, template: Any, sequence_tokens: int
) -> None:
    """Raises ``AnswerTooLong`` or ``QueryTooLong``, as stage ``tokens`` would once all is trained."""
    longest = max(
        len(encode_answer(answer, tokenizer, max_tokens=template.max_answer_tokens).input_ids)
        for answer in pairs["answer"].unique().sort()
    )
    anyone = User({"bill": [Record("one record")]})
    for query in (*pairs["query"].unique().sort(), template.query):
        encode_user(anyone, tokenizer, query, max_tokens=template.max_user_tokens,
                    modality_input=template.modality_input)  # fmt: skip
        try:
            encode_user(anyone, tokenizer, query, max_tokens=sequence_tokens - longest, modality_input="text")
        except QueryTooLong as why:
            raise QueryTooLong(
                f"pretraining.sequence_tokens: {sequence_tokens} has no room for an answer of {longest} "
                "tokens and its query; raise it"
            ) from why


def _train(
    settings: Any,
    pairs: pl.DataFrame,
    log: Path,
    in_all: int,
    progress: Progress,
    parameters: Any,
    loss_of: Callable[[pl.DataFrame], Tensor],
    first: int,
    steps: int,
    batch_size: int,
) -> None:
    """One part: ``steps`` steps on the pairs in their order, and on again from the first."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.01)
    rise = 0.1 if steps != 10 else 0.11  # a tenth of 10 steps would end at step 0, and torch divides by it
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=rise
    )
    begin = time.monotonic()
    with log.open("w" if first == 0 else "a", encoding="utf-8") as lines:
        for step in range(steps):
            loss = loss_of(pairs[np.arange(step * batch_size, (step + 1) * batch_size) % len(pairs)])
            value = float(loss.detach())
            if not isfinite(value):
                raise Diverged(
                    f"pretraining.learning_rate: the loss of step {first + step} is {value}; "
                    f"a rate below {settings.learning_rate:g} may keep it finite"
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            seconds = round(time.monotonic() - begin, 3)
            lines.write(json.dumps({"step": first + step, "loss": value, "seconds": seconds}) + "\n")
            lines.flush()
            progress(first + step + 1, in_all, f"language model, loss {value:.3f}")


def _text_loss(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    users: Mapping[int, User],
    room: int,
    pairs: pl.DataFrame,
) -> Tensor:
    """Every next token of histories and answers as plain tokens."""
    batch = collate(_documents(users, pairs, tokenizer, "text", room), tokenizer.pad_token_id)
    # Nothing is predicted after <EOS>: one same target would make the state read there a constant.
    targets = batch.input_ids.masked_fill(~batch.valid, IGNORED)
    return model(input_ids=batch.input_ids, attention_mask=batch.valid, labels=targets).loss


def _record_loss(
    model: Any,
    adapters: Adapters,
    tokenizer: PreTrainedTokenizerFast,
    users: Mapping[int, User],
    room: int,
    feature_of: Callable[[str], np.ndarray],
    pairs: pl.DataFrame,
) -> Tensor:
    """The answers' tokens, after histories whose records are soft tokens."""
    rows = _documents(users, pairs, tokenizer, "adapter", room)
    batch = collate(rows, tokenizer.pad_token_id, feature_of)
    record, user = (tokenizer.get_added_vocab()[token] for token in (RECORD_TOKEN, USER_TOKEN))
    embedded = adapters.insert(model.get_input_embeddings()(batch.input_ids), batch, record)
    ids = batch.input_ids
    answered = ((ids == user).cumsum(1) > 0) & (ids != user) & batch.valid
    targets = ids.masked_fill(~answered, IGNORED)
    return model(inputs_embeds=embedded, attention_mask=batch.valid, labels=targets).loss


def _documents(
    users: Mapping[int, User],
    pairs: pl.DataFrame,
    tokenizer: PreTrainedTokenizerFast,
    mode: Literal["adapter", "text"],
    room: int,
) -> list[Encoded]:
    return [
        _document(users[sample], query, answer, tokenizer, mode, room)
        for sample, query, answer in pairs.rows()
    ]


def _document(
    user: User,
    query: str | None,
    answer: str,
    tokenizer: PreTrainedTokenizerFast,
    mode: Literal["adapter", "text"],
    room: int,
) -> Encoded:
    """A history, its query, ``<USER>``, the answer and ``<EOS>``, in at most ``room`` tokens.

    The answer follows ``<USER>``, so the state that is read there already looks ahead. Old records go first
    where the whole does not fit.
    """
    end = encode_answer(answer, tokenizer, max_tokens=room)
    begin = encode_user(user, tokenizer, query, modality_input=mode, max_tokens=room - len(end.input_ids))
    return Encoded(
        np.concatenate([begin.input_ids, end.input_ids]),
        np.concatenate([begin.segments, end.segments]),
        begin.records,
        begin.slots,
    )
