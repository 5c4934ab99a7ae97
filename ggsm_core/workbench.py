"""Encoders and sequences for a chapter to take apart: before training and after, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from ggsm_core import batches, params, recipes, runs, story, text_encoder, towers
from ggsm_core.collation import Batch, collate
from ggsm_core.model import UserEncoder
from ggsm_core.template import PAD_TOKEN, Encoded, User, encode_user

transformers_logging.disable_progress_bar()  # it draws on stderr, and a page holds none


def tokenizer(folders: Mapping[str, Path]) -> PreTrainedTokenizerFast:
    """The tokenizer that all recipes share."""
    return PreTrainedTokenizerFast.from_pretrained(folders["pretrain"])


def encoded(user: User, encoder: UserEncoder, profile: str, query: str | None = None) -> Encoded:
    """One user as the L tokens that the profile's template makes."""
    template = params.load(profile).template
    return encode_user(
        user,
        encoder.tokenizer,
        query,
        modality_input=template.modality_input,
        max_tokens=template.max_user_tokens,
    )


def words(sequence: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The L tokens as a reader should see them: a soft token by the text of its record."""
    told = [str(tokenizer.decode([token])) for token in sequence.input_ids]
    for slot, record in zip(sequence.slots, sequence.records, strict=False):  # text mode has no slots
        told[slot] = record.text
    return told


def led_by(who: story.Example, pairs: batches.Pairs, folders: Mapping[str, Path]) -> np.ndarray:
    """Int64[B]: the pairs of the first batch, with one of the household's in front."""
    sample = pl.read_parquet(folders["tokens"] / "pairs.parquet")["sample"].to_numpy()
    rows = pairs.rows(0)
    own, others = np.flatnonzero(sample == who.sample)[:1], rows[sample[rows] != who.sample]
    return np.concatenate([own, others])[: len(rows)]


def sequence(
    user: User, encoder: UserEncoder, folders: Mapping[str, Path], profile: str, query: str | None = None
) -> Batch:
    """One user as a batch of one sequence, L tokens without padding."""
    one = encoded(user, encoder, profile, query)
    adapter = encoder.features is not None
    feature_of = text_encoder.features(folders["texts"]) if adapter else None
    return collate([one], encoder.ids[PAD_TOKEN], feature_of)


def untrained(profile: str, recipe: str, **options: Any) -> UserEncoder:
    """The encoder of ``recipe`` before contrastive training; ``options`` replace some of the profile's."""
    loaded = params.load(profile)
    given = loaded.row(recipe).options
    kind = recipes.RECIPES[recipe].section
    chosen = kind.model_validate((given.model_dump() if given is not None else {}) | options)
    wanted = SimpleNamespace(**dict(loaded), recipe=recipe, options=chosen, seed=loaded.seeds[0])
    return towers.build_encoder(wanted, story.shared(profile))


def trained(profile: str, recipe: str) -> UserEncoder:
    """The encoder that the run of ``recipe`` ended with."""
    base = runs.ensure(profile, "pretrain").folder if params.load(profile).lora is not None else None
    return UserEncoder.load(runs.ensure(profile, "contrast", recipe).folder, base=base)


@torch.inference_mode()
def attention(encoder: UserEncoder, batch: Batch) -> np.ndarray:
    """Float[layers, L, L]: attention of one sequence, mean over heads, under the mask of inference.

    Fused kernels don't tell their weights, so the decoder computes them the plain way for this once.
    """
    found: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        found.append(output[1][0].mean(0))

    with encoder.eager() as decoder:
        handles = [layer.self_attn.register_forward_hook(keep) for layer in decoder.layers]
        try:
            encoder.embed(batch)
        finally:
            for handle in handles:
                handle.remove()
    return torch.stack(found).float().numpy()


def negatives(
    user: Tensor, answer: Tensor, *, margin: float | None, answer_ids: Tensor, user_ids: Tensor
) -> list[np.ndarray]:
    """What each cell of the three sums of Eq. 7 is, as an index into ``figures.KINDS``: three Int[B, B].

    The words for what ``loss.info_nce_rows`` computes; a test holds the two together.
    """
    own = torch.eye(len(user), dtype=torch.bool)
    twin, home = (ids[:, None] == ids[None] for ids in (answer_ids, user_ids))
    limit = torch.inf if margin is None else (user * answer).sum(1, keepdim=True) + margin
    cells = []
    for similarity in (user @ answer.T, user @ user.T, answer @ answer.T):
        kind = (similarity > limit).long()
        cells.append(kind.masked_fill(twin, 2).masked_fill(home, 3).masked_fill(own, 4).numpy())
    return cells
