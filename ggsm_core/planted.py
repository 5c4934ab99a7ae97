"""Can guidance find the token that matters? A data set in which it is known.

Every user has one record that decides the answer, the key, at a random place among records that say nothing.
Guidance finds it where the key's weight is above that of the user's other records.

    experiment(sections.Guidance(normalise="rank"))        # one row a step: step, loss, found

What it shows: before training the gradient knows nothing of the key (found is 0.5), and it finds it when,
and only when, the decoder has learnt to read it, by which time the loss has fallen without it.

Shapes: B batch, L length, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ggsm_core import guidance, recipes
from ggsm_core.backbone import new_decoder, train_tokenizer
from ggsm_core.collation import Batch, collate
from ggsm_core.loss import info_nce
from ggsm_core.model import UserEncoder
from ggsm_core.sections import Backbone, Guidance
from ggsm_core.template import PAD_TOKEN, Record, User, encode_answer, encode_user

FEATURES = 32  # F, of the records' vectors
RECORDS = 12  # a user's
KINDS = 16  # of keys, each with an answer of its own
NOISE = 64  # kinds of record that say nothing
LONGEST = 40  # tokens of a user
OBJECTIVE: dict[str, Any] = {
    "temperature": 0.3,
    "margin": None,
    "same_side": False,
}  # so that it is soon learnt


@dataclass(frozen=True)
class Planted:
    """B users and their answers. ``key``: Bool[B, L], the record that decides, of all ``records``."""

    user: Batch
    answer: Batch
    kind: Tensor  # Long[B]
    key: Tensor
    records: Tensor


def draw(tokenizer: PreTrainedTokenizerFast, users: int, rng: np.random.Generator) -> Planted:
    """B = ``users`` new users."""
    kind, place = rng.integers(KINDS, size=users), rng.integers(RECORDS, size=users)
    encoded, said = [], []
    for k, at in zip(kind.tolist(), place.tolist(), strict=True):
        texts = [f"noise {n}" for n in rng.integers(NOISE, size=RECORDS)]
        texts[at] = f"key {k}"
        user = User({"bill": [Record(text) for text in texts]})
        encoded.append(encode_user(user, tokenizer, max_tokens=LONGEST))
        said.append(encode_answer(f"answer {k}", tokenizer, max_tokens=LONGEST))
    pad = tokenizer.get_added_vocab()[PAD_TOKEN]
    user_batch = collate(encoded, pad, vector)
    records = torch.zeros_like(user_batch.valid)
    key = torch.zeros_like(user_batch.valid)
    for row, (sequence, at) in enumerate(zip(encoded, place.tolist(), strict=True)):
        records[row, sequence.slots] = True
        key[row, sequence.slots[at]] = True
    return Planted(user_batch, collate(said, pad), torch.from_numpy(kind), key, records)


@cache
def vector(text: str) -> np.ndarray:
    """Float32[F], unit length: a fixed random direction for each text."""
    drawn = np.random.default_rng(list(text.encode())).normal(size=FEATURES)
    return np.asarray(drawn / np.linalg.norm(drawn), np.float32)


def found(weights: Tensor, planted: Planted) -> float:
    """The chance that the key's weight is above that of another record of the same user; 0.5 says nothing."""
    key = weights[planted.key][:, None]
    others = weights[planted.records & ~planted.key].view(len(key), -1)
    return float(((key > others).double() + (key == others).double() / 2).mean())


def experiment(
    options: Guidance, *, steps: int = 160, users: int = 64, seed: int = 0, learning_rate: float = 3e-4
) -> pl.DataFrame:
    """Train a small encoder under GG-SM on planted users and watch the weights: step, loss, found.

    Guidance is taken at each step, in warm-up and after it, from a pass under the causal mask as ``two_pass``
    does; the mask follows ``options``. Batches depend on ``seed`` and not on ``options``.
    """
    torch.manual_seed(seed)
    texts = [f"{name} {n}" for name, count in (("answer", KINDS), ("key", KINDS)) for n in range(count)]
    tokenizer = train_tokenizer(texts, 512)
    decoder = new_decoder(Backbone(layers=2, hidden=64, heads=4, intermediate=128), len(tokenizer)).model
    recipe = recipes.build("ggsm", options, total_steps=steps, hidden_size=64, max_length=LONGEST)
    assert isinstance(recipe, recipes.Guided)
    encoder = UserEncoder(decoder, tokenizer, recipe, features=FEATURES)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=learning_rate)
    rng, lines = np.random.default_rng(seed), []
    for step in range(steps):
        batch = draw(tokenizer, users, rng)
        with torch.random.fork_rng():
            measured = _weights(encoder, recipe, batch, step)
            if recipe.warm(step):
                weights = measured
                recipe.freeze(weights, batch.user.valid, batch.user.segments)  # the last one stays
            else:
                weights = recipe.recall(batch.user.valid, batch.user.segments, step)
        loss = _loss(encoder, batch, step, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lines.append({"step": step, "loss": float(loss.detach()), "found": found(measured, batch)})
    return pl.DataFrame(lines)


def _weights(encoder: UserEncoder, recipe: recipes.Guided, batch: Planted, step: int) -> Tensor:
    """Float[B, L]: what guidance says of this batch."""
    if recipe.options.source == "attention":
        with torch.no_grad():
            norms = encoder.attention_of_read_out(batch.user)
    else:
        user = encoder(batch.user, step=step, site=recipe.options.grad_site, causal=True)
        answer = encoder(batch.answer, tower="answer", step=step, causal=True)
        loss = info_nce(user.embedding, answer.embedding, **OBJECTIVE, answer_ids=batch.kind)
        norms = guidance.gradient_norms(loss, user.site)
    return recipe.weigh(norms, batch.user.valid, step)


def _loss(encoder: UserEncoder, batch: Planted, step: int, weights: Tensor) -> Tensor:
    """InfoNCE under the recipe's mask; users of one kind are no negatives of each other."""
    level = weights[batch.user.valid].mean() * torch.ones_like(batch.answer.valid, dtype=weights.dtype)
    user = encoder(batch.user, step=step, weights=weights)
    answer = encoder(batch.answer, tower="answer", step=step, weights=level)
    return info_nce(user.embedding, answer.embedding, **OBJECTIVE, answer_ids=batch.kind)
