"""The prompts as text files, one a task, and the hand-written scenarios that the pool starts from.

A prompt is a conversation: a line ``=== system``, ``=== user`` or ``=== assistant`` begins a message, and
``$name`` is a value to be filled in.
"""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

FOLDER = Path(__file__).resolve().parent
_HEAD = re.compile(r"^=== (system|user|assistant)\n", re.M)


class PromptError(ValueError):
    """A prompt file that is no conversation, or a value that it lacks."""


def text(name: str) -> str:
    """The prompt file ``<name>.txt`` as it is."""
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def messages(name: str, **values: object) -> list[dict[str, str]]:
    """The conversation of prompt ``name`` with ``values`` in it. A value can't begin a message.

    Raises ``PromptError``.
    """
    before, *parts = _HEAD.split(text(name))
    if before.strip() or not parts:
        raise PromptError(f"{name}.txt: a prompt begins with a line `=== system` or `=== user`")
    filled = {key: str(value) for key, value in values.items()}
    try:
        return [
            {"role": role, "content": Template(content.strip()).substitute(filled).strip()}
            for role, content in zip(parts[::2], parts[1::2], strict=True)
        ]
    except (KeyError, ValueError) as problem:
        raise PromptError(f"{name}.txt: {problem}; it was given {', '.join(filled) or 'nothing'}") from None


def scenarios() -> list[str]:
    """The hand-written scenarios."""
    return [line for line in text("scenarios").splitlines() if line.strip()]
