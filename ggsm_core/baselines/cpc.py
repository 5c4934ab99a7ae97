"""CPC: contrastive predictive coding (van den Oord, Li and Vinyals 2018, arXiv 1807.03748).

Visits are embedded (g_enc), a GRU sums up the past (g_ar), and from its state c_t a linear map W_k for each
k tells the embedding of the visit k steps ahead from those of other users (their Eq. 3 and 4).

Decided here: steps are visits, not samples of sound; K = 4; negatives are 128 visits drawn from the batch,
none of the same household; the user's vector is the last state c_T, as theirs for whole utterances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ggsm_core.baselines.base import Histories
from ggsm_core.baselines.fitting import Loss, SequenceBaseline
from ggsm_core.baselines.visits import Batch, Recurrent, Visits, at_last

if TYPE_CHECKING:
    from ggsm_core.intervals import Ints

AHEAD = 4  # K
NEGATIVES = 128


def cpc_loss(steps: Tensor, predictions: Tensor, valid: Tensor, pool: Tensor, allowed: Tensor) -> Tensor:
    """InfoNCE over future steps (Eq. 4), mean over positions, then over the K distances.

    Args:
        steps: Float[B, L, d], z.
        predictions: Float[K, B, L, d], W_k c_t.
        valid: Bool[B, L], True on real steps.
        pool: Long[M], places in [B * L] of the steps that serve as negatives.
        allowed: Bool[B, M], may this one be a negative for that sequence?
    """
    negatives, losses = steps.flatten(0, 1)[pool], []
    for k, guesses in enumerate(predictions, start=1):
        real = valid[:, k:]  # steps that lie k behind a real one
        if not bool(real.any()):
            continue  # no sequence is that long
        guess = guesses[:, :-k][real]  # Float[P, d]
        right = (guess * steps[:, k:][real]).sum(1, keepdim=True)
        sequence = real.nonzero()[:, 0]
        wrong = (guess @ negatives.T).masked_fill(~allowed[sequence], -torch.inf)
        losses.append((torch.logsumexp(torch.cat([right, wrong], dim=1), 1) - right[:, 0]).mean())
    return torch.stack(losses).mean()


class Model(nn.Module):
    """g_enc, g_ar and the W_k."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.encoder = Recurrent(vocabulary, width)
        self.ahead = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(AHEAD))

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """z Float[B, L, d] and predictions Float[K, B, L, d]."""
        steps, states = self.encoder(batch)
        return steps, torch.stack([head(states) for head in self.ahead])


class Cpc(SequenceBaseline):
    """See the module."""

    name = "cpc"

    def build(self) -> Model:
        return Model(len(self.vocabulary), self.settings.hidden)

    def objective(self, train: Histories, visits: Visits) -> Loss:
        def loss(rows: Ints, rng: np.random.Generator) -> Tensor:
            batch = visits.batch(rows)
            steps, predictions = self.model(batch)
            drawn = rng.choice(batch.at.numpy(), min(NEGATIVES, len(batch.at)), replace=False)
            owner = train.users[rows]
            allowed = owner[:, None] != owner[drawn // batch.valid.shape[1]][None]
            places = torch.from_numpy(drawn)
            return cpc_loss(steps, predictions, batch.valid, places, torch.from_numpy(allowed))

        return loss

    def vectors(self, batch: Batch) -> Tensor:
        states: Tensor = self.model.encoder(batch)[1]
        return at_last(states, batch)
