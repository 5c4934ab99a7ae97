"""InstructUE: instruction-aware user embeddings (Gao et al. 2025, arXiv 2510.11016).

Encoders of six modalities, light adapters and a causal decoder, as in the paper's own architecture. An
instruction follows the records, and one training step has two losses: contrastive, between the user under
that instruction and the answer's text, and autoregressive, the answer written token by token after the user.

Decided here: it is our recipe ``causal`` (same decoder, pairs, batches, schedule, number of steps and
InfoNCE) with the autoregressive loss beside it, weight 1, on a quarter of each batch; instructions are the
queries of the rule-based pairs where theirs are a synthesised UserQA set. Their embedding follows the
instruction of each task; here every row has one embedding for all tasks, so users are embedded without one.
Not stopped early: the number of steps is that of the recipes.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ggsm_core import masks
from ggsm_core.backbone import positions
from ggsm_core.baselines.answered import Users
from ggsm_core.baselines.base import Baseline, BaselineError
from ggsm_core.baselines.fitting import Fitted, Log
from ggsm_core.batches import Chunk, Pairs
from ggsm_core.collation import Batch
from ggsm_core.embedding import embed_all
from ggsm_core.model import UserEncoder
from ggsm_core.template import PAD_TOKEN
from ggsm_core.towers import build_encoder
from ggsm_core.training import Trainer

if TYPE_CHECKING:
    from ggsm_core.intervals import Floats

WRITTEN = 4  # one row in so many is written as well


def answer_loss(encoder: UserEncoder, user: Batch, answer: Batch) -> Tensor:
    """Mean cross-entropy of the answers' tokens, each given the user and the tokens before it.

    The decoder's input embeddings are its output layer (``InstructUe`` refuses others).
    """
    embedded = torch.cat([encoder.embed_tokens(user), encoder.embed_tokens(answer)], dim=1)
    valid = torch.cat([user.valid, answer.valid], dim=1)
    bias = masks.additive_bias(masks.causal(valid), valid, embedded.dtype)
    states = encoder.decoder(
        inputs_embeds=embedded, attention_mask=bias, position_ids=positions(valid), use_cache=False
    ).last_hidden_state
    length = user.valid.shape[1]
    # The first token is told from the state at <USER>, which padding may separate from the answer.
    first = states[torch.arange(len(states)), user.valid.sum(1) - 1]
    before = torch.cat([first[:, None], states[:, length:-1]], dim=1)[answer.valid]
    logits = before @ encoder.decoder.get_input_embeddings().weight.T
    return cross_entropy(logits, answer.input_ids[answer.valid])


class _Trainer(Trainer):
    """The contrastive loop, with the autoregressive loss beside InfoNCE."""

    def _beside(self, chunk: Chunk, step: int) -> Tensor:
        rows, some = self.pairs.rows(step), chunk.users[::WRITTEN]
        pairs = self.pairs.batch(rows, self.encoder.ids[PAD_TOKEN], some).to(self.accelerator.device)
        return answer_loss(self.encoder, pairs.user, pairs.answer) * (len(chunk.users) / len(rows))


class InstructUe(Baseline[Pairs, Users]):
    """See the module. ``params`` holds the declared sections; ``inputs`` are the runs it starts from."""

    name = "instructue"

    def __init__(self, params: Any, inputs: dict[str, Path], log: Log) -> None:
        self.params, self.log = SimpleNamespace(**vars(params)), log
        self.params.recipe, self.params.options = "causal", None
        self.encoder = build_encoder(self.params, inputs)
        if not self.encoder.decoder.config.tie_word_embeddings:
            raise BaselineError(
                "backbone: instructue writes answers, and this decoder has an output layer of its own, which "
                "is not kept; take a decoder with tie_word_embeddings, or leave instructue out of baselines"
            )

    def fit(self, train: Pairs) -> Self:
        """Train for ``training.total_steps`` steps."""
        trainer, total = _Trainer(self.encoder, train, self.params), self.params.training.total_steps
        for step in range(1, total + 1):
            metrics = trainer.train_step()
            self.log(step=step, loss=metrics["loss"], seconds=metrics["seconds"])
        trained = sum(p.numel() for p in self.encoder.parameters() if p.requires_grad)
        epochs = -(-total * train.batch_size // len(train.answers))  # passes over all pairs, begun
        self.fitted = Fitted(epochs, epochs, False, trained)
        return self

    def embed(self, users: Users) -> Floats:
        """Float[n, d], unit length."""
        vectors = embed_all(self.encoder.eval(), users.sequences, users.feature_of, lambda *_: None)
        return vectors.astype(float)
