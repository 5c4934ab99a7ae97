"""Answers that were paid for, on disk: one file for each question, named by the hash of all that matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ggsm_core.provenance import digest, write_atomically


class DamagedAnswer(ValueError):
    """A file of the cache that can't be read."""


class Answer(BaseModel):
    """What a server said once, and what it took."""

    model_config = ConfigDict(frozen=True)

    text: str
    finished: bool  # False: cut at the limit of tokens
    prompt_tokens: int
    completion_tokens: int


class Cache:
    """A folder of answers. A question is any JSON value that holds all its answer depends on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, question: dict[str, Any]) -> Answer | None:
        """The stored answer, or None. Raises ``DamagedAnswer``."""
        path = self._path(question)
        if not path.is_file():
            return None
        try:
            return Answer.model_validate(json.loads(path.read_text(encoding="utf-8"))["answer"])
        except (ValueError, KeyError, TypeError) as problem:
            raise DamagedAnswer(
                f"{path}: holds no answer ({type(problem).__name__}); remove it, and its question is asked "
                "and paid for again"
            ) from None

    def store(self, question: dict[str, Any], answer: Answer) -> None:
        """Keep an answer, with its question beside it for whoever looks."""
        content = {"question": question, "answer": answer.model_dump()}
        write_atomically(self._path(question), json.dumps(content, ensure_ascii=False, indent=1))

    def _path(self, question: dict[str, Any]) -> Path:
        name = digest(question)
        return self.folder / name[:2] / f"{name}.json"
