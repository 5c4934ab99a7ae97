"""Who computes which rows of the global batch, and how all come to know all of it (Sec. 4).

Shapes: B global batch, b this process's rows, L length. Rows are shared in contiguous blocks that differ by
at most one, so B need not be a multiple of the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class TrainingError(ValueError):
    """Training that can't start, or must not go on."""


class Shares:
    """The rows of each process.

    Raises ``TrainingError`` if there are more processes than rows.
    """

    def __init__(self, accelerator: Accelerator, batch_size: int) -> None:
        self.accelerator = accelerator
        world, rank = accelerator.num_processes, accelerator.process_index
        if world > batch_size:
            raise TrainingError(
                f"training.batch_size: {batch_size} pairs are too few for {world} processes; start at most "
                f"{batch_size}, or raise it"
            )
        sizes = [batch_size // world + (place < batch_size % world) for place in range(world)]
        self.sizes = sizes
        self.own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))

    def gather(self, own: Tensor) -> Tensor:
        """[B, ...] from [b, ...], detached; a second dimension is padded with 0 on the right."""
        own = own.detach().contiguous()
        if len(self.sizes) == 1:
            return own
        kind = own.dtype
        if own.ndim > 1:
            # accelerate makes int64 of a bool that it pads, and pads on the process with the shorter batch.
            own = self.accelerator.pad_across_processes(own, dim=1).to(kind)
        room = max(self.sizes)
        if lacking := room - len(own):
            own = torch.cat([own, own.new_zeros(lacking, *own.shape[1:])])
        everyone = self.accelerator.gather(own)
        return torch.cat([everyone[i * room : i * room + n] for i, n in enumerate(self.sizes)])

    def total(self, *values: float) -> list[float]:
        """The sum over processes of each value."""
        own = torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)
        return [float(v) for v in self.accelerator.reduce(own, "sum")]

    def agree(self, value: int, what: str) -> None:
        """Raise ``TrainingError`` unless all processes have the same ``value``."""
        own = torch.tensor([value], device=self.accelerator.device)
        seen = self.accelerator.gather(own).tolist()
        if len(set(seen)) > 1:
            raise TrainingError(
                f"{what}: processes 0 to {len(seen) - 1} have {seen}; give all of them the same folder"
            )


def joined(parts: list[Tensor]) -> Tensor:
    """[b, L] from the micro-batches' [., L_k], padded with 0 on the right to the longest."""
    length = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, length - part.shape[1])) for part in parts])


@contextmanager
def answered(seconds: int) -> Iterator[None]:
    """Turn the backend's complaint about a lost or hung process into a ``TrainingError``."""
    try:
        yield
    except RuntimeError as problem:
        if not isinstance(problem, torch.distributed.DistError) and "gloo" not in str(problem):
            raise
        raise TrainingError(
            f"another process is gone, or has not answered for training.timeout_seconds = {seconds}; its own "
            "log says why. The same command goes on from the last checkpoint"
        ) from problem
