"""Rules that make hard pairs, induced from hard pairs (step 3 of Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints

from ggsm_core.synthesis import prompts
from ggsm_core.synthesis.client import Question, Reply
from ggsm_core.template import sanitise

SHOWN = 8
"""Hard pairs that the model sees at most, the hardest."""


class Rules(BaseModel):
    """The model's answer to ``rules``."""

    model_config = ConfigDict(extra="forbid")

    rules: list[Annotated[str, StringConstraints(strip_whitespace=True, min_length=3, max_length=240)]]


def rules_question(
    hard: Sequence[Mapping[str, Any]], count: int, max_tokens: int, seed: int
) -> Question[Rules]:
    """What do the hardest pairs have in common?"""
    hardest = sorted(hard, key=lambda pair: -pair["s_d"])[:SHOWN]
    lines = "\n".join(f"Question: {pair['query']}\nAnswer: {pair['answer']}" for pair in hardest)
    conversation = prompts.messages("rules", pairs=lines, count=count)
    return Question(conversation, Rules, max_tokens, seed)


def induced(reply: Reply[Rules], count: int) -> list[str]:
    """At most ``count`` different rules; none where no answer followed the schema."""
    found = [] if reply.value is None else [sanitise(rule) for rule in reply.value.rules]
    return list(dict.fromkeys(found))[:count]
