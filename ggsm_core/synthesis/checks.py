"""Does an answer follow from the history, and does the question keep it to itself?

Rules on words and numbers, so that no model has to be believed. They are strict: an answer that can't be
verified is not kept, and the reason is.

| check | refused |
| --- | --- |
| empty | a question or an answer of fewer than two words |
| invented | a kind of the catalogue, or what is said to be bought or counted, that no record names |
| number | a number that stands neither in a record which the answer names nor in the question |
| ungrounded | an answer that names nothing from the records |
| leak | a question that holds all the facts of its answer, or most of its words |
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from ggsm_core.synthesis import prompts
from ggsm_core.synthesis.history import History

OVERLAP = 0.6
"""Share of an answer's words in its question from which the question gives it away."""
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
PLAIN = frozenset(prompts.text("plain_words").split())
"""Words that claim no purchase of their own, though some stand in names of kinds."""
_BOUGHT = re.compile(
    r"\b(?:bought|buys?|buying|purchased?|purchases|purchasing|orders?|ordered|ordering)\b"
    r"((?:[ ,]+(?!(?:for|at|on|in|from|every|during|because|with|about|to|since|when|while|but|by)\b)"
    r"[\w'/&-]+)*)"
)
_COUNTED = re.compile(
    r"([^.,;:()]+)(?: \([^()]*\))?,? (?:(?:was|were|is|are) )?(?:bought )?(?:once|[\w,]+ times)\b"
)


def words(text: str) -> list[str]:
    """Lower-case words of at least three letters, without their plural, in their order."""
    return [_singular(word) for word in re.findall(r"[a-z]{3,}", text.lower())]


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "oes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def facts(text: str) -> list[str]:
    """The words that say something: neither stop words nor plain ones."""
    return [word for word in words(text) if word not in _SILENT]


_SILENT = frozenset(map(_singular, PLAIN)) | PLAIN | frozenset(map(_singular, ENGLISH_STOP_WORDS)) | {
    _singular(word) for word in NUMBERS
}  # fmt: skip


_GENERAL = frozenset(map(_singular, ENGLISH_STOP_WORDS))


def _names(answer: str, name: str) -> bool:
    """Whether an answer names a record: by a telling word of its name, by two plain ones or by all words."""
    shared = set(words(answer)) & set(words(name))
    whole = " " in name and re.search(rf"\b{re.escape(name.lower())}\b", answer.lower())
    return bool(shared - _SILENT) or len(shared - _GENERAL) > 1 or bool(whole)


def numbers(text: str) -> set[int]:
    """Whole numbers, as digits or as words up to twelve; ``1,400`` is one number."""
    plain = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.lower())
    spelled = {value for value, word in enumerate(NUMBERS, start=2) if re.search(rf"\b{word}\b", plain)}
    return spelled | {int(found) for found in re.findall(r"\d+", plain)}


class Checker:
    """Checks against one catalogue: every kind that anybody buys."""

    def __init__(self, catalogue: Iterable[str], history_days: int) -> None:
        self.known = frozenset(word for name in catalogue for word in facts(name))
        self.history_days = history_days  # everybody knows it, so any answer may name it

    def problems(self, query: str, answer: str, history: History) -> list[str]:
        """Why the pair is refused, one reason a line; empty for a pair that is kept."""
        said, asked = facts(answer), set(facts(query))
        figures, asked_figures = numbers(answer), numbers(query)
        if len(query.split()) < 2 or len(answer.split()) < 2:
            return ["empty: a question and an answer need two words each"]
        own = {word for fact in history.facts for word in words(fact.told)}  # departments too
        named = [fact for fact in history.facts if _names(answer, fact.name)]
        counted = {number for fact in named for number in numbers(fact.told)}
        found = []
        lower = answer.lower()
        claimed = [
            word for claim in _BOUGHT.findall(lower) + _COUNTED.findall(lower) for word in facts(claim)
        ]
        doubtful = [word for word in said if word in self.known] + claimed
        if invented := list(dict.fromkeys(word for word in doubtful if word not in own)):
            found.append(f"invented: {', '.join(invented)} in no record")
        if strange := sorted(figures - counted - asked_figures - {self.history_days}):
            found.append(f"number: {', '.join(map(str, strange))} in no record of what it names")
        grounds = {word for word in said if word in own}
        if not named:
            found.append("ungrounded: names nothing from the records")
        told = grounds | {str(number) for number in figures}
        given = asked | {str(number) for number in asked_figures}
        shared = len(set(said) & asked) / max(len(set(said)), 1)
        if (told and told <= given) or shared >= OVERLAP:
            found.append("leak: the question holds what the answer says")
        return found
