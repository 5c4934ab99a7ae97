"""Parameters that FSDP2 has spread over the processes: made whole to be saved, spread again when loaded."""

from __future__ import annotations

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which each process holds a part, and any other tensor as it is.

    Processes wait for each other here: all must ask, or none.
    """
    return tensor.full_tensor() if _is_spread(tensor) else tensor  # type: ignore[attr-defined]


def spread_like(tensor: Tensor, example: Tensor) -> Tensor:
    """A whole tensor cut up as ``example`` is, if that is, and of its shape."""
    if not _is_spread(example) or tensor.shape != example.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor  # a second to import, for FSDP2 alone

    assert isinstance(example, DTensor)
    return distribute_tensor(tensor.to(example.device), example.device_mesh, example.placements)


def _is_spread(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # DTensor's own, and no other tensor's
