"""Both towers of the objective are one decoder: built for a recipe, run on a batch of pairs (Sec. 4)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ggsm_core import adapters, dropout, recipes
from ggsm_core.batches import PairBatch
from ggsm_core.model import Output, UserEncoder, load_decoder
from ggsm_core.text_encoder import feature_size


def build_encoder(params: Any, inputs: dict[str, Path]) -> UserEncoder:
    """The encoder of this recipe before contrastive training, seeded by ``params.seed``."""
    torch.manual_seed(params.seed)
    decoder = load_decoder(inputs["pretrain"], params.backbone.attention)
    recipe = recipes.build(
        params.recipe,
        params.options,
        total_steps=params.training.total_steps,
        hidden_size=decoder.config.hidden_size,
        max_length=params.template.max_user_tokens,
    )
    adapter = params.template.modality_input == "adapter"
    encoder = UserEncoder(
        decoder,
        PreTrainedTokenizerFast.from_pretrained(inputs["pretrain"]),
        recipe,
        features=feature_size(inputs["texts"]) if adapter else None,
        lora=params.lora,
        answer_mask=params.training.answer_mask,
        template=params.template,
        history_days=params.data.history_days,
        breakdowns=params.data.breakdowns,
    )
    if encoder.adapters is not None and (inputs["pretrain"] / adapters.FILE).exists():
        encoder.adapters.load(inputs["pretrain"])  # a published decoder comes without
    return encoder


class Towers(nn.Module):
    """Both towers in one forward pass, so that data parallelism synchronises once."""

    def __init__(self, encoder: UserEncoder, seed: int) -> None:
        super().__init__()
        self.encoder, self.seed = encoder, seed
        self.drops = dropout.used_by(encoder, encoder.decoder.config)

    def forward(
        self,
        pairs: PairBatch,
        step: int,
        weights: Tensor | None,
        level: Tensor | None,
        site: str | None,
        causal: bool,
    ) -> tuple[Output, Output]:
        """User and answer outputs of some pairs.

        ``weights``: Float[., L] of the user tower. Answers have none of their own: ``level``, the scalar mean
        of the left tower's over the global batch.
        """
        answer_weights = (
            None if level is None else level * torch.ones_like(pairs.answer.valid, dtype=level.dtype)
        )
        with self._dropout(step, 0, pairs.user_rows):
            user = self.encoder(
                pairs.user, tower="user", step=step, weights=weights, site=site, causal=causal
            )
        with self._dropout(step, 1, pairs.answer_rows):
            answer = self.encoder(
                pairs.answer, tower="answer", step=step, weights=answer_weights, causal=causal
            )
        return user, answer

    def attention(self, pairs: PairBatch, step: int) -> Tensor:
        """Float[., L]: what the user's read-out attends to, where guidance takes attention for its source."""
        with self._dropout(step, 0, pairs.user_rows):
            return self.encoder.attention_of_read_out(pairs.user)

    def _dropout(self, step: int, tower: int, rows: Tensor) -> AbstractContextManager[None]:
        return dropout.by_row(self.seed, step, tower, rows) if self.drops else nullcontext()
