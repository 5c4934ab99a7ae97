"""Questions on a user with their answers: written (Eq. 2) and written again (step 4 of Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints

from ggsm_core.synthesis import prompts
from ggsm_core.synthesis.checks import Checker
from ggsm_core.synthesis.client import Question, Reply
from ggsm_core.synthesis.history import History
from ggsm_core.template import sanitise

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=400)]


class QA(BaseModel):
    """A question and its answer, and nothing else."""

    model_config = ConfigDict(extra="forbid")

    query: Text
    answer: Text


def qa_question(
    history: History, scenario: str, rules: Sequence[str], max_tokens: int, seed: int
) -> Question[QA]:
    """Eq. 2 for one of a user's scenarios; ``rules`` are those of step 3, none before it."""
    told = "\n".join(["Follow these rules:", *(f"- {rule}" for rule in rules)]) if rules else ""
    conversation = prompts.messages("qa", history=history.text, scenario=scenario, rules=told)
    return Question(conversation, QA, max_tokens, seed)


def rewriting_question(history: History, query: str, answer: str, max_tokens: int, seed: int) -> Question[QA]:
    """Posterior rewriting: the same pair, clearer and true to the history."""
    conversation = prompts.messages("rewrite", history=history.text, query=query, answer=answer)
    return Question(conversation, QA, max_tokens, seed)


def judged(reply: Reply[QA], history: History, checker: Checker) -> dict[str, Any]:
    """The pair of a reply: query, answer (null where none came), problems, and kept (no problem found)."""
    if reply.value is None:
        return {"query": None, "answer": None, "problems": reply.failures, "kept": False}
    query, answer = sanitise(reply.value.query), sanitise(reply.value.answer)
    problems = checker.problems(query, answer, history)
    return {"query": query, "answer": answer, "problems": problems, "kept": not problems}


def without_twins(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pairs, all but the first of equal ones on one sample refused as ``repeated``."""
    seen: set[tuple[Any, ...]] = set()
    judged_again = []
    for pair in pairs:
        key = (pair["sample"], pair["query"], pair["answer"])
        if pair["kept"] and key in seen:
            pair = pair | {"kept": False, "problems": ["repeated: the same pair again"]}
        seen.add(key)
        judged_again.append(pair)
    return judged_again
