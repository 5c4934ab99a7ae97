"""FOUND: transferable and forecastable user targeting (Dou et al. 2025, arXiv 2412.12468).

Records of every modality are encoded apart, fused by a transformer and read out by learnt queries through
cross-attention; the user's vector is aligned, by a contrastive loss in both directions, with a text that
describes what the user will do.

Decided here: its first stage (contrast of one user's windows and a KL term between them, before any text) is
left out, since training pairs are all there is to align with; the record encoder is the frozen MiniLM of run
``texts`` where theirs is trained; the text tower is a mean of token embeddings learnt here where theirs is a
language model, which for these four kinds of short sentence costs hours and is not what is compared; the
future texts are the rule-based answers, of one granularity a batch, and no query goes with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

from ggsm_core.adapters import Adapter
from ggsm_core.baselines.answered import Answered, Users
from ggsm_core.baselines.base import Baseline, BaselineError
from ggsm_core.baselines.fitting import Log, Loss, fit, in_batches
from ggsm_core.baselines.visits import transformer
from ggsm_core.collation import Batch, collate
from ggsm_core.loss import info_nce
from ggsm_core.template import MODALITIES, RECORD_TOKEN, SEGMENTS, Encoded

if TYPE_CHECKING:
    from ggsm_core.intervals import Floats, Ints

QUERIES = 4


class Model(nn.Module):
    """Both towers. B batch, L tokens, d width."""

    def __init__(self, features: int, vocabulary: int, record_id: int, settings: Any) -> None:
        super().__init__()
        width = settings.hidden
        self.record_id = record_id
        self.adapters = nn.ModuleDict({name: Adapter(features, width, 1.0) for name in MODALITIES})
        self.fuse = transformer(width, settings.layers, settings.heads)
        self.queries = nn.Parameter(torch.randn(QUERIES, width) * width**-0.5)
        self.read = nn.MultiheadAttention(width, settings.heads, batch_first=True)
        self.user_head = nn.Linear(QUERIES * width, width)
        self.words = nn.EmbeddingBag(vocabulary, width, mode="mean")
        self.answer_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def user(self, batch: Batch) -> Tensor:
        """Float[B, d], unit length."""
        assert batch.features is not None and batch.numbers is not None
        slots = (batch.input_ids == self.record_id) & batch.valid
        hidden = batch.features.new_zeros(*slots.shape, self.queries.shape[1])
        for name, adapter in self.adapters.items():
            here = slots & (batch.segments == SEGMENTS[name])
            hidden[here] = adapter(batch.features[here], batch.numbers[here])
        fused = self.fuse(hidden, src_key_padding_mask=~slots)
        asked = self.queries.expand(len(fused), -1, -1)
        read, _ = self.read(asked, fused, fused, key_padding_mask=~slots, need_weights=False)
        return normalize(self.user_head(read.flatten(1)), dim=1)

    def answer(self, answers: list[Encoded]) -> Tensor:
        """Float[B, d], unit length."""
        sizes = np.array([len(answer.input_ids) for answer in answers])
        tokens = torch.from_numpy(np.concatenate([answer.input_ids for answer in answers]))
        words = self.words(tokens, torch.from_numpy(np.cumsum(sizes) - sizes))
        return normalize(self.answer_head(words), dim=1)


class Found(Baseline[Answered, Users]):
    """See the module. ``params`` holds the declared sections, ``tokenizer`` made the sequences."""

    name = "found"

    def __init__(self, params: Any, tokenizer: PreTrainedTokenizerFast, log: Log) -> None:
        if params.template.modality_input != "adapter":
            raise BaselineError(
                f"template.modality_input: {params.template.modality_input!r}; found reads records as "
                "vectors; use adapter, or leave it out of baselines"
            )
        self.params, self.tokenizer, self.log = params, tokenizer, log

    def fit(self, train: Answered) -> Self:
        """Align users with their answers."""
        torch.manual_seed(self.params.seed)
        ids = self.tokenizer.get_added_vocab()
        self.pad_id, settings = ids[str(self.tokenizer.pad_token)], self.params.peers
        features = len(train.users.feature_of(train.users.sequences[0].records[0].text))
        self.model = Model(features, len(self.tokenizer), ids[RECORD_TOKEN], settings)
        self.fitted = fit(
            self.model, self._objective(train), train.households, settings, self.params.seed, self.log
        )
        return self

    def _objective(self, train: Answered) -> Loss:
        temperature = self.params.objective.temperature

        def loss(rows: Ints, rng: np.random.Generator) -> Tensor:
            kind = int(rng.integers(1 << 30))  # the same for all of a batch, as in our own training
            pairs = np.array([train.of_sample[row][kind % len(train.of_sample[row])] for row in rows])
            user = self.model.user(self._collate(train.users, pairs))
            answer = self.model.answer([train.answers[pair] for pair in pairs])
            ids = {
                "user_ids": torch.from_numpy(train.households[rows]),
                "answer_ids": torch.from_numpy(train.answer_ids[pairs]),
            }
            plain: dict[str, Any] = {"temperature": temperature, "margin": None, "same_side": False, **ids}
            return (info_nce(user, answer, **plain) + info_nce(answer, user, **plain)) / 2

        return loss

    def embed(self, users: Users) -> Floats:
        """Float[n, d]."""
        vectors: Floats = in_batches(
            lambda rows: self.model.user(self._collate(users, rows)), len(users.sequences)
        )
        return vectors

    def _collate(self, users: Users, rows: Ints) -> Batch:
        return collate([users.sequences[row] for row in rows], self.pad_id, users.feature_of)
