"""How a long computation tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float, float, str], None]
"""Called with what is done, of how much, and what is at work."""


def silent(done: float, total: float, message: str) -> None:
    """For whom nobody waits."""
