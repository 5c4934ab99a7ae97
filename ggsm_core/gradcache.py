"""Batches larger than memory: GradCache (Gao et al. 2021, arXiv:2101.06983).

InfoNCE needs all B embeddings at once, but not the graphs behind them. So: encode every micro-batch without a
graph; compute the loss and its gradient with respect to the embeddings; encode each micro-batch again, now
with its graph, and go on backwards from there. The second pass drops what the first dropped: dropout is a
function of the row (``dropout.by_row``). A batch of one micro-batch keeps its graph and is encoded once.

Shapes: b this process's rows, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ggsm_core.model import Output

Part = TypeVar("Part")
Outputs = tuple[Output, Output]
"""Of the user and of the answer tower."""


class TwoPasses(Generic[Part]):
    """The two passes over ``chunks``; ``encode`` gives the user and the answer tower's output of one."""

    def __init__(self, encode: Callable[[Part], Outputs], chunks: Sequence[Part]) -> None:
        self._encode, self._chunks = encode, chunks
        self._kept: Outputs | None = None

    def first(self) -> tuple[Tensor, Tensor]:
        """The embeddings Float[b, d] of both towers, detached."""
        users, answers = [], []
        with torch.set_grad_enabled(len(self._chunks) == 1):
            for chunk in self._chunks:
                user, answer = outputs = self._encode(chunk)
                users.append(user.embedding.detach())
                answers.append(answer.embedding.detach())
        if len(self._chunks) == 1:
            self._kept = outputs
        return torch.cat(users), torch.cat(answers)

    def second(self, chunk: Part) -> Outputs:
        """The outputs of ``chunk`` with their graph."""
        return self._encode(chunk) if self._kept is None else self._kept


def surrogate(outputs: Outputs, gradients: tuple[Tensor, Tensor]) -> Tensor:
    """A scalar with the loss's own gradient in all behind ``outputs``: the sum of embedding . dL/dembedding.

    ``gradients``: Float[., d] of the loss with respect to both towers' embeddings of these rows.
    """
    user, answer = (
        (output.embedding * gradient).sum() for output, gradient in zip(outputs, gradients, strict=True)
    )
    return user + answer
