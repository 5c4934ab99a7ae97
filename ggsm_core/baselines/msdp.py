"""MSDP: multi-scale stochastic distribution prediction (Fu et al. 2023, CIKM, doi 10.1145/3583780.3614714).

What one user does next is noise; how behaviour is distributed over a stretch of time is not. The model is
given a sequence and, as a prompt, how many days ahead it is asked about, drawn at random from several scales,
and predicts the distribution over kinds of event in those days. A contrastive term keeps the embedding of a
sequence with masked steps near that of the whole one (stopped gradient, cosine).

Decided here: scales of 1, 3, 7, 14 and 30 days, those within data.future_days; kinds are the vocabulary and
one more for "nothing at all"; the prompt is one more step behind the sequence, read out there; 15 % of the
steps masked; lambda 0.1; the predictor on one branch, as in SimSiam. Every task gets the embedding under the
longest scale, since every row of the table has one embedding for all tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax

from ggsm_core.baselines.base import BaselineError, Histories
from ggsm_core.baselines.fitting import Loss, SequenceBaseline
from ggsm_core.baselines.visits import Attending, Batch, Visits

if TYPE_CHECKING:
    from ggsm_core.intervals import Ints

SCALES = (1, 3, 7, 14, 30)  # days
MASKED = 0.15
LAMBDA = 0.1


def distribution_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of Float[B, K] logits against distributions Float[B, K]: their KL divergence, but for a
    constant."""
    return -(target * log_softmax(logits, dim=1)).sum(1).mean()


class Model(nn.Module):
    """The encoder, a prompt for each scale, and the heads."""

    def __init__(self, vocabulary: int, settings: Any, scales: int) -> None:
        super().__init__()
        width = settings.hidden
        self.encoder = Attending(vocabulary, settings)
        self.prompts = nn.Embedding(scales, width)
        self.distribution = nn.Linear(width, vocabulary + 1)
        self.predictor = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, batch: Batch, scale: Tensor, keep: Tensor | None = None) -> Tensor:
        """Float[B, d]: the state at the prompt; ``keep`` Bool[s] masks steps."""
        steps = self.encoder.steps(batch)
        if keep is not None:
            steps = steps * keep[:, None]
        states: Tensor = self.encoder(steps, batch, self.prompts(scale))
        return states[:, -1]


class Msdp(SequenceBaseline):
    """See the module."""

    name = "msdp"

    def build(self) -> Model:
        return Model(len(self.vocabulary), self.settings, len(self.scales))

    def objective(self, train: Histories, visits: Visits) -> Loss:
        targets = torch.from_numpy(
            np.stack([self._ahead(train, days) for days in self.scales])
        )  # [scales, n, K]

        def loss(rows: Ints, rng: np.random.Generator) -> Tensor:
            batch = visits.batch(rows)
            scale = torch.from_numpy(rng.integers(len(self.scales), size=len(rows)))
            keep = torch.from_numpy(rng.random(len(batch.offsets)) >= MASKED)
            whole, masked = self.model(batch, scale), self.model(batch, scale, keep)
            near = cosine_similarity(self.model.predictor(masked), whole.detach(), dim=1).mean()
            target = targets[scale, torch.from_numpy(rows)]
            return distribution_loss(self.model.distribution(whole), target) - LAMBDA * near

        return loss

    def vectors(self, batch: Batch) -> Tensor:
        longest = torch.full((len(batch.valid),), len(self.scales) - 1)
        vectors: Tensor = self.model(batch, longest)
        return vectors

    def fit(self, train: Histories) -> Msdp:
        """Raises ``BaselineError`` where ``train`` was read without its future."""
        days = train.future.select(1 - pl.col("before").min()).item() or 0  # null where there is none
        self.scales = [scale for scale in SCALES if scale <= days]
        if not self.scales:
            raise BaselineError("train.future: holds nothing to predict; read it with future_days")
        return super().fit(train)

    def _ahead(self, train: Histories, days: int) -> np.ndarray:
        """Float32[n, K]: the distribution over kinds, "nothing" last, in the next ``days`` days."""
        known = self.vocabulary.distribution(
            train.future.filter(pl.col("before") > -days), len(train.samples)
        )
        return np.concatenate([known, 1 - known.sum(1, keepdims=True)], axis=1)
