"""Controls for gradient guidance: weights that have all of GG-SM but what the gradient says.

If the gradient matters, GG-SM beats each of them; ``source`` in ``sections.Guidance`` chooses one, and
everything else (warm-up, freezing, opening, the probe pass and its cost) stays as it is.

| source | keeps | takes away |
| --- | --- | --- |
| constant | that the future is half open | any difference between tokens |
| random | the distribution of weights over a batch | which user and which token a weight belongs to |
| shuffled | each user's own weights | which token a weight belongs to |
| position | the mean weight at each distance from ``<USER>`` | what is specific to a user |
| attention | a signal from the decoder, of the same pass | the gradient: what ``<USER>`` attends to instead |

``random`` and ``position`` look at the whole batch: they are for one process, and not for micro-batches.
Attention has mean 1, so under ``normalise: none`` its weights lie around sigma(1) = 0.73; by rank, all
sources have the same mean.

Shapes: B batch, L length, d hidden size; ``valid`` is Bool[B, L].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ggsm_core import guidance

HALF = 0.5
"""sigma(0): what every weight is where the gradient says nothing (Eq. 5)."""


def constant(weights: Tensor, valid: Tensor) -> Tensor:
    """One half on every real token."""
    return torch.full_like(weights, HALF).masked_fill(~valid, 0.0)


def random(weights: Tensor, valid: Tensor) -> Tensor:
    """Each token gets the weight of a token drawn from the whole batch, with replacement."""
    pool = weights[valid]
    drawn = torch.zeros_like(weights)
    drawn[valid] = pool[torch.randint(len(pool), (len(pool),)).to(pool.device)]
    return drawn


def shuffled(weights: Tensor, valid: Tensor) -> Tensor:
    """The weights of each sequence, in another order of its tokens."""
    # Real tokens first, in random order; the real places are then filled in turn.
    order = torch.rand(weights.shape).to(weights.device).masked_fill(~valid, 2.0).argsort(1)
    places = (valid.long().cumsum(1) - 1).clamp(min=0)
    return weights.gather(1, order).gather(1, places).masked_fill(~valid, 0.0)


def position(weights: Tensor, valid: Tensor) -> Tensor:
    """The batch's mean weight at the token's distance from the last real one."""
    return guidance.from_position(guidance.by_position(weights, valid, weights.shape[1]), valid)


def unchanged(weights: Tensor, valid: Tensor) -> Tensor:
    """The weights as they are: of the gradient, or of attention (then ``weights`` were made from that)."""
    return weights


SOURCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradient": unchanged,
    "constant": constant,
    "random": random,
    "shuffled": shuffled,
    "position": position,
    "attention": unchanged,
}
