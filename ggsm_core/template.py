"""A user's records as one tagged sequence of tokens (paper A.1, Fig. 4, Eq. 9-10).

    <bill> record; record </bill>
    <minipro> record </minipro>
    <spm> record </spm>
    <app> record </app>
    <search> </search>
    <tabular> record; record </tabular>
    Instruction: an optional query <USER>

Every tag is one token, a modality without records keeps its pair, ``<USER>`` comes last. A record travels as
one soft token (``modality_input="adapter"``, Fig. 1) or as plain tokens (``"text"``, Fig. 4).

Shapes: B batch, L sequence length, F size of the text encoder's vectors.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import copysign, expm1
from typing import TYPE_CHECKING, Literal

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast  # slow to import, and only a type here

MODALITIES = ("bill", "minipro", "spm", "app", "search", "tabular")
TAGS = tuple(tag for name in MODALITIES for tag in (f"<{name}>", f"</{name}>"))
USER_TOKEN, EOS_TOKEN, PAD_TOKEN, RECORD_TOKEN = "<USER>", "<EOS>", "<pad>", "<record>"
SPECIAL_TOKENS = (*TAGS, USER_TOKEN, EOS_TOKEN, PAD_TOKEN, RECORD_TOKEN)

SEGMENTS = {name: index for index, name in enumerate((*MODALITIES, "instruction", "user", "answer"))}

NUMBERS = ("log_amount", "log_count", "days_since_last", "days_since_first", "log_count_30d", "log_count_7d")
"""What travels beside a record's text: sign(x) log(1 + |x|) of the summed amount, log(1 + n) of the number of
events (all, last 30 days, last 7 days), days before the anchor in units of ``DAYS``."""
DAYS = 90.0
"""Unit of the two day numbers: the paper's history window, in every profile."""
NO_NUMBERS = (0.0,) * len(NUMBERS)

KEPT = 64
"""Records stored per modality and sample, the most important ones: no template may show more."""

_MONEY = frozenset({"bill", "spm", "tabular"})  # modalities whose amounts are dollars


class TemplateError(ValueError):
    """A user, query or answer that can't be put into the template."""


class UnknownModality(TemplateError):
    """A record under a name that is not one of ``MODALITIES``."""


class EmptyHistory(TemplateError):
    """A user without a single record has no representation."""


class QueryTooLong(TemplateError):
    """Tags, query and ``<USER>`` alone exceed the limit."""


class AnswerTooLong(TemplateError):
    """An answer is never cut: a cut answer is another answer."""


class TokenizerLacksTags(TemplateError):
    """A tokenizer that would take a tag apart."""


@dataclass(frozen=True, slots=True)
class Record:
    """All events of one kind in a window: what they are, and their ``NUMBERS``."""

    text: str
    numbers: tuple[float, ...] = NO_NUMBERS
    simulated: bool = False


@dataclass(frozen=True, slots=True)
class User:
    """u_i of Eq. 9: modality -> records, oldest first. A modality left out is an empty one."""

    records: Mapping[str, Sequence[Record]]

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.records) - set(MODALITIES)):
            raise UnknownModality(f"records: {unknown} not in the template; allowed: {', '.join(MODALITIES)}")


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """One sequence. ``records`` are those kept, in template order; ``dropped`` counts the others."""

    input_ids: np.ndarray  # Int64[L]
    segments: np.ndarray  # Int64[L], ids of SEGMENTS
    records: tuple[Record, ...] = ()  # R of them
    slots: np.ndarray = field(
        default_factory=lambda: np.empty(0, np.int64)
    )  # Int64[R]: <record>s, adapter mode
    dropped: int = 0


class _Safe(dict[int, str]):
    """For ``str.translate``: what a character of user text becomes, by its Unicode category.

    Tokenizers write their special tokens between brackets or bars, so every bracket (and what looks like one)
    becomes a round one and every bar a slash; ``;`` would forge the border between two records.
    Control, bidi, zero-width and private characters go; letters, digits and marks of every script stay.
    """

    bars = dict.fromkeys("|¦∣ǀ│❘", "/") | dict.fromkeys(";\u037e", ",")

    def __missing__(self, code: int) -> str:
        char = chr(code)
        category = unicodedata.category(char)
        if category[0] == "Z" or char in "\t\n\v\f\r\x1c\x1d\x1e\x1f\x85":
            safe = " "
        elif category in ("Cc", "Cf", "Cs", "Co"):
            safe = ""
        elif category == "Ps" or char in "<«‹˂ᐸ≪≮⋖⋘⪡⫷\U0001d236":
            safe = "("
        elif category == "Pe" or char in ">»›˃ᐳ≫≯⋗⋙⪢⫸\U0001d237":
            safe = ")"
        else:
            safe = self.bars.get(char, char)
        self[code] = safe
        return safe


_SAFE = _Safe()


@lru_cache(maxsize=1 << 16)
def sanitise(text: str) -> str:
    """User text that can't forge a tag, a record's border or the instruction line, and is still readable.

    NFKC, on one line, single spaces, no control or bidi characters, round brackets only.
    """
    return " ".join(unicodedata.normalize("NFKC", text.translate(_SAFE)).translate(_SAFE).split())


def describe(record: Record, modality: str = "bill") -> str:
    """A record as words: ``soft drinks (grocery), 5 times, 12 dollars, last 3 days ago``."""
    amount, count, last = record.numbers[:3]
    words = [sanitise(record.text) or "unnamed"]
    if count:
        times = round(expm1(count))
        words.append("once" if times == 1 else f"{times} times")
        if modality in _MONEY and (dollars := round(copysign(expm1(abs(amount)), amount))):
            words.append(f"{dollars} dollar{'s' * (abs(dollars) != 1)}")
        days = round(last * DAYS)
        words.append(f"last {days} day{'s' * (days != 1)} ago")
    if record.simulated:
        words.append("simulated")
    return ", ".join(words)


def render(user: User, query: str | None = None) -> str:
    """The template of Fig. 4 as text. Tokenising it gives what ``encode_user`` gives in text mode."""
    lines = []
    for name in MODALITIES:
        body = "; ".join(describe(record, name) for record in user.records.get(name, ()))
        lines.append(f"<{name}> {body} </{name}>" if body else f"<{name}> </{name}>")
    lines.append(USER_TOKEN if query is None else f"Instruction: {sanitise(query)} {USER_TOKEN}")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Ids of our tags, and a copy of the tokenizer in which no text can become a special token."""

    ids: Mapping[str, int]
    text: Tokenizer

    def encode(self, pieces: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.text.encode_batch_fast(list(pieces), add_special_tokens=False)]


@lru_cache(maxsize=4)
def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> _Vocabulary:
    added = tokenizer.get_added_vocab()
    special = set(tokenizer.all_special_tokens)
    if lacking := [token for token in SPECIAL_TOKENS if token not in added or token not in special]:
        raise TokenizerLacksTags(
            f"tokenizer: {', '.join(lacking)} not among its special tokens; add all of "
            "template.SPECIAL_TOKENS with tokenizer.add_special_tokens and resize the decoder's embeddings"
        )
    text = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    text.no_truncation()
    text.no_padding()
    text.encode_special_tokens = True
    return _Vocabulary({token: added[token] for token in SPECIAL_TOKENS}, text)


@lru_cache(maxsize=1 << 12)
def _piece(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(_vocabulary(tokenizer).encode([text])[0])


def encode_user(
    user: User,
    tokenizer: PreTrainedTokenizerFast,
    query: str | None = None,
    *,
    modality_input: Literal["adapter", "text"] = "adapter",
    max_tokens: int,
) -> Encoded:
    """x_i of Eq. 10 as token ids, at most ``max_tokens`` of them.

    Too long a history loses its oldest records first (largest ``days_since_last``, then first in its
    modality): whole records, never a tag, the query or ``<USER>``. Adapter mode has no white space.

    Raises ``EmptyHistory``, ``QueryTooLong``, ``TokenizerLacksTags``.
    """
    vocabulary = _vocabulary(tokenizer)
    ids = vocabulary.ids
    if not any(user.records.values()):
        raise EmptyHistory("records: none in any modality; a user needs at least one to be represented")
    # Cut where byte-level BPE cuts too (before " x", around tags): the pieces tokenise like render()'s whole.
    if modality_input == "adapter":
        space: tuple[int, ...] = ()
        newline: tuple[int, ...] = ()
        slot = [ids[RECORD_TOKEN]]
        bodies = {name: [slot] * len(records) for name, records in user.records.items()}
    elif modality_input == "text":
        space, newline = _piece(tokenizer, " "), _piece(tokenizer, "\n")
        bodies = {name: vocabulary.encode(_bodies(records, name)) for name, records in user.records.items()}
    else:
        raise TemplateError(f"modality_input: {modality_input!r} is not one of adapter, text")
    instruction = () if query is None else _piece(tokenizer, f"Instruction: {sanitise(query)}") + space

    fixed = len(TAGS) + len(MODALITIES) * len(space + newline) + len(instruction) + 1
    if fixed > max_tokens:
        raise QueryTooLong(
            f"max_tokens: {max_tokens} is below the {fixed} tokens of tags, query ({len(instruction)}) and "
            f"{USER_TOKEN}; raise template.max_user_tokens or shorten the query"
        )
    kept_from = _truncate(user, bodies, max_tokens - fixed)
    tokens: list[int] = []
    segments: list[int] = []
    records: list[Record] = []
    for index, name in enumerate(MODALITIES):
        start = kept_from.get(name, 0)
        records += user.records.get(name, ())[start:]
        tokens.append(ids[f"<{name}>"])
        for body in bodies.get(name, ())[start:]:
            tokens += body
        tokens += [*space, ids[f"</{name}>"], *newline]
        segments += [index] * (len(tokens) - len(segments))
    tokens += [*instruction, ids[USER_TOKEN]]
    segments += [SEGMENTS["instruction"]] * len(instruction) + [SEGMENTS["user"]]
    input_ids = np.array(tokens)
    slots = np.flatnonzero(input_ids == ids[RECORD_TOKEN])
    return Encoded(input_ids, np.array(segments), tuple(records), slots, sum(kept_from.values()))


def _bodies(records: Sequence[Record], modality: str) -> list[str]:
    bodies = [f" {describe(record, modality)};" for record in records]
    return [*bodies[:-1], bodies[-1][:-1]] if bodies else []


def _truncate(user: User, bodies: Mapping[str, Sequence[Sequence[int]]], room: int) -> dict[str, int]:
    """How many records each modality loses from its old end, so that the rest fits into ``room`` tokens."""
    excess = sum(len(body) for modality in bodies.values() for body in modality) - room
    if excess <= 0:
        return {}
    order = []
    for index, name in enumerate(MODALITIES):
        oldest = float("-inf")
        for position in reversed(range(len(bodies.get(name, ())))):
            # A record in front of an older one goes before it: a modality is always cut from its front.
            oldest = max(oldest, user.records[name][position].numbers[2])
            order.append((-oldest, position, index, name))
    lost: dict[str, int] = {}
    for _, position, _, name in sorted(order):
        if excess <= 0:
            break
        excess -= len(bodies[name][position])
        lost[name] = lost.get(name, 0) + 1
    return lost


def encode_answer(text: str, tokenizer: PreTrainedTokenizerFast, *, max_tokens: int) -> Encoded:
    """An answer and ``<EOS>``, whose hidden state is its embedding (A.3).

    Raises ``AnswerTooLong``, ``TemplateError`` for an answer without words, ``TokenizerLacksTags``.
    """
    words = sanitise(text)
    if not words:
        raise TemplateError(f"answer: {text!r} holds no words")
    vocabulary = _vocabulary(tokenizer)
    tokens = [*vocabulary.encode([words])[0], vocabulary.ids[EOS_TOKEN]]
    if len(tokens) > max_tokens:
        raise AnswerTooLong(
            f"answer: {len(tokens)} tokens with {EOS_TOKEN}, at most {max_tokens} allowed; raise "
            f"template.max_answer_tokens or shorten {words[:60]!r}"
        )
    return Encoded(np.array(tokens), np.full(len(tokens), SEGMENTS["answer"]))
