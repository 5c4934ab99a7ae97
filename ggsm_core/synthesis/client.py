"""One language model behind any OpenAI-compatible server, asked for answers that follow a schema.

An answer is validated as it came, never repaired: text around the JSON, a missing field or an answer cut at
its limit is a counted failure, and the question is asked again a bounded number of times with another seed.
What the network does (429, 500, time-outs, a dead server, a torn answer) is retried with back-off, then ends
the work with an error; all answers that had come are in the cache, and are neither lost nor paid for again.

A key comes from the environment, goes into the request's header, and nowhere else.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import openai
from openai.types.chat import ChatCompletion
from pydantic import BaseModel, ValidationError

from ggsm_core.provenance import digest
from ggsm_core.synthesis.budget import Budget
from ggsm_core.synthesis.cache import Answer, Cache

Message = Mapping[str, str]
"""``role`` and ``content``, as in the chat completions of OpenAI."""
Schema = TypeVar("Schema", bound=BaseModel)

LONGEST_WAIT = 30.0
"""Seconds between two tries at most, whatever the server asks for."""
FRAME = 32
"""Tokens that a chat template adds to a message at most."""


class ServerFailed(ValueError):
    """The server gave no answer after all retries, or refused the request."""


class MissingAddress(ValueError):
    """The environment does not say where the server is."""


@dataclass(frozen=True)
class Model:
    """Which model, and how it is sampled. All of it belongs to a question's identity."""

    name: str
    temperature: float
    top_p: float
    version: str = ""  # of the weights, where the name does not say it all


@dataclass(frozen=True)
class Patience:
    """How long and how often to try."""

    timeout: float  # seconds for one answer
    retries: int  # after a failure of the network or the server
    attempts: int  # at an answer that follows the schema
    concurrency: int  # questions under way at once
    backoff: float = 0.5  # seconds before the first retry, doubled each time


@dataclass
class Reply(Generic[Schema]):
    """The answer to one question, or why there is none, and what it took."""

    value: Schema | None = None
    failures: list[str] = field(default_factory=list)  # one for each answer that was refused
    calls: int = 0  # answers that came over the network
    cached: int = 0  # answers that lay on disk
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: Counter[str] = field(default_factory=Counter)  # by what had happened


@dataclass(frozen=True)
class Question(Generic[Schema]):
    """What to ask, and the form that the answer must have."""

    messages: Sequence[Message]
    schema: type[Schema]
    max_tokens: int
    seed: int = 0


class LLM:
    """Ask questions, many at once."""

    def __init__(
        self,
        client: openai.OpenAI,
        model: Model,
        cache: Cache,
        budget: Budget,
        patience: Patience,
    ) -> None:
        self.model, self.cache, self.budget, self.patience = model, cache, budget, patience
        # Each try is reserved and counted here, so the library may not try again on its own.
        self._client = client.with_options(max_retries=0, timeout=self.patience.timeout)
        self._asking: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._stopped = threading.Event()

    def ask_all(
        self, questions: Sequence[Question[Schema]], progress: Callable[[int, int], None] | None = None
    ) -> list[Reply[Schema]]:
        """The replies in the order of the questions, several under way at once.

        Each holds the first answer that follows the schema, of at most ``attempts``. After an error
        (``BudgetExceeded``, ``ServerFailed``) nothing new is sent; answers on their way still reach the
        cache, then it is raised.
        """
        self._stopped.clear()
        replies: list[Reply[Schema]] = []
        with ThreadPoolExecutor(self.patience.concurrency) as pool:
            futures = [pool.submit(self._ask_or_stop, question) for question in questions]
            try:
                for future in as_completed(futures):
                    if isinstance(future.exception(), _Stopped):
                        continue  # the error that stopped it is still to come
                    future.result()
                    if progress is not None:
                        progress(sum(other.done() for other in futures), len(futures))
                replies = [future.result() for future in futures]
            finally:
                # Also when interrupted: whoever waits to try again is woken, and sends nothing more.
                self._stopped.set()
                pool.shutdown(cancel_futures=True)
        return replies

    def _ask_or_stop(self, question: Question[Schema]) -> Reply[Schema]:
        try:
            return self._ask(question)
        except BaseException:
            self._stopped.set()  # here, before this thread takes the next question
            raise

    def _ask(self, question: Question[Schema]) -> Reply[Schema]:
        reply: Reply[Schema] = Reply()
        for attempt in range(self.patience.attempts):
            answer = self._answer(question, question.seed + attempt, reply)
            reply.prompt_tokens += answer.prompt_tokens
            reply.completion_tokens += answer.completion_tokens
            if not answer.finished:
                reply.failures.append(f"cut at {question.max_tokens} tokens: {answer.text}")
                continue
            try:
                reply.value = question.schema.model_validate_json(answer.text)
                return reply
            except ValidationError as problem:
                reply.failures.append(f"malformed ({problem.errors()[0]['msg']}): {answer.text}")
        return reply

    def _answer(self, question: Question[Schema], seed: int, reply: Reply[Schema]) -> Answer:
        identity = {
            "model": self.model.name,
            "version": self.model.version,
            "messages": [dict(message) for message in question.messages],
            "schema": question.schema.model_json_schema(),
            "temperature": self.model.temperature,
            "top_p": self.model.top_p,
            "max_tokens": question.max_tokens,
            "seed": seed,
        }
        with self._asking[digest(identity)]:  # the same question twice at once is paid for once
            stored = self.cache.find(identity)
            if stored is not None:
                reply.cached += 1
                return stored
            answer = self._fetch(question, seed, reply)
            self.cache.store(identity, answer)
        reply.calls += 1
        return answer

    def _fetch(self, question: Question[Schema], seed: int, reply: Reply[Schema]) -> Answer:
        # A byte is at least one token of no known vocabulary, so this is the most that the prompt can take.
        longest = sum(len(m["content"].encode()) + FRAME for m in question.messages) + FRAME
        for tries in range(self.patience.retries + 1):
            if self._stopped.is_set():
                raise _Stopped
            ticket = self.budget.reserve(longest, question.max_tokens)
            try:
                completion = self._client.chat.completions.create(**self._request(question, seed))
                answer = _read(completion)
            except Exception as problem:
                name = _trouble(problem)
                if name is None:
                    self.budget.settle(ticket, 0, 0)
                    raise _refused(problem) from None
                if name in ("HTTP 429", "no connection"):  # nothing was computed; else it may be charged for
                    self.budget.settle(ticket, 0, 0)
                reply.retries[name] += 1
                if tries == self.patience.retries:
                    raise ServerFailed(
                        f"the model's server: {name} after {tries + 1} tries; start it or raise "
                        "synthesis.retries, and go on from what is done"
                    ) from None
                self._wait(tries, problem)
                continue
            if answer.prompt_tokens or answer.completion_tokens:
                self.budget.settle(ticket, answer.prompt_tokens, answer.completion_tokens)
            return answer
        raise AssertionError("the last try returns or raises")

    def _request(self, question: Question[Schema], seed: int) -> dict[str, Any]:
        schema = {
            "name": question.schema.__name__,
            "strict": True,
            "schema": question.schema.model_json_schema(),
        }
        return {
            "model": self.model.name,
            "messages": list(question.messages),
            "temperature": self.model.temperature,
            "top_p": self.model.top_p,
            "max_tokens": question.max_tokens,
            "seed": seed,
            # vLLM and others decode under it; a server that ignores it is held to it below all the same.
            "response_format": {"type": "json_schema", "json_schema": schema},
        }

    def _wait(self, tries: int, problem: Exception) -> None:
        wait = self.patience.backoff * 2**tries
        if isinstance(problem, openai.APIStatusError):
            try:
                wait = max(wait, float(problem.response.headers.get("retry-after", 0)))
            except ValueError:
                pass  # a date: the back-off is as good
        self._stopped.wait(min(wait, LONGEST_WAIT))


class _Stopped(Exception):
    """Another question failed, and its error is the one to tell."""


class _Broken(Exception):
    """An answer that is no chat completion."""


def _read(completion: Any) -> Answer:
    if not isinstance(completion, ChatCompletion) or not completion.choices:
        raise _Broken
    choice, usage = completion.choices[0], completion.usage
    if choice.message is None or not isinstance(choice.message.content, str):
        raise _Broken
    return Answer(
        text=choice.message.content.strip(),
        finished=choice.finish_reason != "length",
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
    )


def _trouble(problem: Exception) -> str | None:
    """A name for what a second try may mend; None for the rest."""
    if isinstance(problem, openai.APITimeoutError):
        return "time-out"
    if isinstance(problem, openai.APIConnectionError):
        return "no connection" if _unheard(problem) else "torn answer"
    if isinstance(problem, openai.APIStatusError):
        again = problem.status_code in (408, 409, 429) or problem.status_code >= 500
        return f"HTTP {problem.status_code}" if again else None
    if isinstance(problem, _Broken | ValueError | openai.APIResponseValidationError):
        return "broken answer"
    return None


def _unheard(problem: BaseException | None) -> bool:
    """Whether the request never reached a server."""
    while problem is not None:
        if isinstance(problem, ConnectionRefusedError | socket.gaierror):
            return True
        problem = problem.__cause__ or problem.__context__
    return False


def _refused(problem: Exception) -> Exception:
    if isinstance(problem, openai.APIStatusError):
        # The server's own words stay out: some repeat the key that they were sent.
        return ServerFailed(
            f"the model's server refused the request: HTTP {problem.status_code}; check synthesis.model, and "
            "OPENAI_BASE_URL and OPENAI_API_KEY in the environment"
        )
    return problem


def _is_address(given: str) -> bool:
    try:
        parts = urlsplit(given)
        whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # half a pair of brackets, or a port that is no number
        return False
    return whole and given.isprintable() and " " not in given


def from_environment() -> openai.OpenAI:
    """A client of the server that ``OPENAI_BASE_URL`` names, with the key in ``OPENAI_API_KEY``.

    Raises ``MissingAddress``.
    """
    lacking = [name for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY") if not os.environ.get(name)]
    if lacking:
        raise MissingAddress(
            f"synthesis.server: environment, and {' and '.join(lacking)} not set there; a server that wants "
            "no key takes any word"
        )
    if not _is_address(os.environ["OPENAI_BASE_URL"]):
        raise MissingAddress(  # without the value, which may be a key or hold one
            "OPENAI_BASE_URL: is set to no address; give one as http://127.0.0.1:8000/v1"
        )
    if not (key := os.environ["OPENAI_API_KEY"]).isascii() or not key.isprintable():
        raise MissingAddress("OPENAI_API_KEY: holds a character that no header may have; set it again")
    return openai.OpenAI()
