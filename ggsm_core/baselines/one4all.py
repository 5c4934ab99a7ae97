"""One4all: ShopperBERT (Shin et al. 2021, arXiv 2106.00573).

A bidirectional transformer over purchases, trained on pretext tasks: some steps are masked, and what they
were is predicted, each attribute by a head of its own. The user's vector is the mean of the last layer.

Decided here: their nine attributes of a purchase are those this log has, six of them: the kinds in the
visit, amount, number of items, days since the last visit, hour and weekday. Numbers are regressed, with hour
and weekday on the circle, where theirs are binned. 15 % of the steps are masked. The paper's row adds a MLP
decoder for each task; here all rows have the same linear probe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from ggsm_core.baselines.base import Histories
from ggsm_core.baselines.fitting import Loss, SequenceBaseline
from ggsm_core.baselines.msdp import MASKED, distribution_loss
from ggsm_core.baselines.visits import NUMBERS, Attending, Batch, Visits

if TYPE_CHECKING:
    from ggsm_core.intervals import Ints

PREDICTED = len(NUMBERS) - 1  # all but which step is the anchor


class Model(nn.Module):
    """The encoder, a vector that stands for masked steps, and the heads."""

    def __init__(self, vocabulary: int, settings: Any) -> None:
        super().__init__()
        width = settings.hidden
        self.encoder = Attending(vocabulary, settings)
        self.mask = nn.Parameter(torch.zeros(width))
        self.kinds = nn.Linear(width, vocabulary)
        self.numbers = nn.Linear(width, PREDICTED)

    def forward(self, batch: Batch, hide: Tensor | None = None) -> Tensor:
        """Float[B, L, d]; ``hide`` Bool[s] masks steps."""
        steps = self.encoder.steps(batch)
        if hide is not None:
            steps = torch.where(hide[:, None], self.mask, steps)
        states: Tensor = self.encoder(steps, batch)
        return states


class One4all(SequenceBaseline):
    """See the module."""

    name = "one4all"

    def build(self) -> Model:
        return Model(len(self.vocabulary), self.settings)

    def objective(self, train: Histories, visits: Visits) -> Loss:
        def loss(rows: Ints, rng: np.random.Generator) -> Tensor:
            batch = visits.batch(rows)
            hidden = rng.random(len(batch.offsets)) < MASKED
            hidden[rng.integers(len(hidden))] = True  # never none
            hide = torch.from_numpy(hidden)
            states = self.model(batch, hide).flatten(0, 1)[batch.at[hide]]
            counts = batch.counts(len(self.vocabulary))[hide]
            some = counts.sum(1) > 0  # the anchor, and visits of unknown kinds, have none
            numbers = smooth_l1_loss(self.model.numbers(states), batch.numbers[hide, :PREDICTED])
            if not bool(some.any()):
                return numbers
            kinds = counts[some] / counts[some].sum(1, keepdim=True)
            return numbers + distribution_loss(self.model.kinds(states[some]), kinds)

        return loss

    def vectors(self, batch: Batch) -> Tensor:
        real = batch.valid[..., None]
        vectors: Tensor = (self.model(batch) * real).sum(1) / real.sum(1)
        return vectors
