"""The pool of scenarios, and the ten that fit a user best (step 1 of Sec. 3.2, Eq. 1).

The pool starts from a hand-written file and is extended by the model; a scenario that says nearly the same as
an earlier one is left out. For a user, a search by embedding gives a shortlist; the model puts it in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import faiss
import numpy as np
from pydantic import BaseModel, ConfigDict, StringConstraints

from ggsm_core.synthesis import prompts
from ggsm_core.synthesis.client import Question, Reply
from ggsm_core.synthesis.difficulty import MAX_TOKENS
from ggsm_core.synthesis.history import History
from ggsm_core.template import sanitise
from ggsm_core.text_encoder import TextEncoder

AT_ONCE = 2
"""New scenarios asked for in one question."""
SHOWN = 4
"""Scenarios of the pool that a question for new ones shows."""
Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=3, max_length=160)]


class Scenarios(BaseModel):
    """The model's answer to ``extend``."""

    model_config = ConfigDict(extra="forbid")

    scenarios: list[Line]


class Order(BaseModel):
    """The model's answer to ``retrieve``: numbers as shown, from 1."""

    model_config = ConfigDict(extra="forbid")

    order: list[int]


def near_duplicates(vectors: np.ndarray, limit: float) -> list[int | None]:
    """For each of n unit vectors [n, F]: the first earlier one that is kept and at cosine ``limit`` or above.

    None for those that are kept.
    """
    kept = faiss.IndexFlatIP(vectors.shape[1])
    places: list[int] = []
    found: list[int | None] = []
    for place, vector in enumerate(np.ascontiguousarray(vectors, np.float32)):
        query = vector[None]
        near = None
        if places:
            cosine, index = kept.search(query, 1)
            near = places[int(index[0, 0])] if cosine[0, 0] >= limit else None
        if near is None:
            kept.add(query)
            places.append(place)
        found.append(near)
    return found


def extension_questions(
    pool: Sequence[str], count: int, max_tokens: int, seed: int
) -> list[Question[Scenarios]]:
    """``count`` questions for new scenarios; each shows another part of the pool."""
    rng = np.random.default_rng([seed, 1])
    questions = []
    for number in range(count):
        shown = rng.choice(len(pool), min(SHOWN, len(pool)), replace=False)
        lines = "\n".join(f"- {pool[place]}" for place in sorted(shown))
        conversation = prompts.messages("extend", pool=lines, count=AT_ONCE)
        questions.append(Question(conversation, Scenarios, max_tokens, seed + number))
    return questions


def grown(
    seeds: Sequence[str], replies: Sequence[Reply[Scenarios]], encoder: TextEncoder, duplicate: float
) -> list[dict[str, object]]:
    """Every scenario, from the file and from the replies: scenario, source, kept, like (what it repeats)."""
    new = [sanitise(line) for reply in replies if reply.value for line in reply.value.scenarios]
    every = [*seeds, *new]
    like = near_duplicates(encoder.encode(every), duplicate)
    return [
        {
            "scenario": line,
            "source": "file" if place < len(seeds) else "model",
            "kept": same is None,
            "like": None if same is None else every[same],
        }
        for place, (line, same) in enumerate(zip(every, like, strict=True))
    ]


def shortlists(
    pool: Sequence[str], histories: Sequence[History], encoder: TextEncoder, size: int
) -> list[list[int]]:
    """For each history the places in ``pool`` of the ``size`` nearest scenarios, nearest first."""
    index = faiss.IndexFlatIP(encoder.dim)
    index.add(encoder.encode(pool))
    _, places = index.search(
        encoder.encode([history.text for history in histories], max_tokens=MAX_TOKENS), min(size, len(pool))
    )
    return [[int(place) for place in row] for row in places]


def order_question(
    history: History, pool: Sequence[str], shortlist: Sequence[int], count: int, max_tokens: int, seed: int
) -> Question[Order]:
    """Eq. 1: which ``count`` of the shortlist fit this user, best first?"""
    lines = "\n".join(f"{number}. {pool[place]}" for number, place in enumerate(shortlist, start=1))
    conversation = prompts.messages("retrieve", history=history.text, scenarios=lines, count=count)
    return Question(conversation, Order, max_tokens, seed)


def chosen(reply: Reply[Order], shortlist: Sequence[int], count: int) -> tuple[list[int], str | None]:
    """The places in the pool that the model chose; and if it gave no valid order, why.

    Valid is: ``count`` different numbers, all of the shortlist. Else the shortlist's own order stands, and
    whoever reads the result is told.
    """
    count = min(count, len(shortlist))
    if reply.value is None:
        return list(shortlist[:count]), "no order that follows the schema"
    order = reply.value.order
    if len(order) != count or len(set(order)) != count or not set(order) <= set(range(1, len(shortlist) + 1)):
        return list(shortlist[:count]), f"asked for {count} different numbers, got {order}"
    return [shortlist[number - 1] for number in order], None
