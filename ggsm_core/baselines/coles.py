"""CoLES: contrastive learning for event sequences (Babaev et al. 2022, arXiv 2002.08232).

No row of the paper's Table 2; the strongest open peer. Several random slices of one user's sequence are each
other's positives, slices of others are negatives: contrastive loss with margin on Euclidean distances, with
the hardest negatives of the batch.

Decided here: 4 slices a user of 4 steps up to the whole sequence; margin 0.5 and the 5 nearest negatives of
each slice, as in their library; the mean over pairs, not the sum, so that the learning rate does not depend
on the batch; two windows of one household count as one user.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, pairwise_distance

from ggsm_core.baselines.base import Histories
from ggsm_core.baselines.fitting import Loss, SequenceBaseline
from ggsm_core.baselines.visits import Batch, Recurrent, Visits, at_last

if TYPE_CHECKING:
    from ggsm_core.intervals import Ints

SLICES = 4
SHORTEST = 4
MARGIN = 0.5
HARDEST = 5


def coles_loss(embeddings: Tensor, owners: Tensor, margin: float = MARGIN, hardest: int = HARDEST) -> Tensor:
    """Contrastive loss of Float[M, d] unit vectors: d^2 of positive pairs, max(0, margin - d)^2 of negatives.

    Pairs of one owner (Long[M]) are positives; for each vector the ``hardest`` nearest of other owners are
    its negatives, fewer where there are fewer. The mean over all these pairs.
    """
    same = owners[:, None] == owners[None]
    left, right = torch.triu(same, diagonal=1).nonzero(as_tuple=True)
    positive = pairwise_distance(embeddings[left], embeddings[right]).pow(2)
    with torch.no_grad():
        distance = torch.cdist(embeddings, embeddings).masked_fill(same, torch.inf)
        near = distance.topk(min(hardest, len(owners) - 1), largest=False)
    anchor, place = near.values.isfinite().nonzero(as_tuple=True)
    other = near.indices[anchor, place]
    negative = (margin - pairwise_distance(embeddings[anchor], embeddings[other])).clamp(min=0).pow(2)
    return torch.cat([positive, negative]).mean()


class Coles(SequenceBaseline):
    """See the module."""

    name = "coles"

    def build(self) -> Recurrent:
        return Recurrent(len(self.vocabulary), self.settings.hidden)

    def objective(self, train: Histories, visits: Visits) -> Loss:
        def loss(rows: Ints, rng: np.random.Generator) -> Tensor:
            several = np.repeat(rows, SLICES)
            start, end = visits.start[several], visits.start[several + 1]
            size = rng.integers(np.minimum(SHORTEST, end - start), end - start, endpoint=True)
            first = rng.integers(start, end - size, endpoint=True)
            batch = visits.slices(first, first + size)
            return coles_loss(self.vectors(batch), torch.from_numpy(train.users[several]))

        return loss

    def vectors(self, batch: Batch) -> Tensor:
        return normalize(at_last(self.model(batch)[1], batch), dim=1)
