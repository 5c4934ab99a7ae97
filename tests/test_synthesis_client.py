"""The client of a language model: what the network and the model may do to it, and what it costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llmserver import COMPLETION, KEY, PROMPT, Act, Server, serving
from pydantic import BaseModel, ConfigDict

from ggsm_core.synthesis.budget import Budget, BudgetExceeded, DamagedLedger, Prices
from ggsm_core.synthesis.cache import Answer, Cache, DamagedAnswer
from ggsm_core.synthesis.client import (
    LLM,
    MissingAddress,
    Model,
    Patience,
    Question,
    Reply,
    Schema,
    ServerFailed,
    from_environment,
)

ONE = PROMPT + COMPLETION


class Word(BaseModel):
    model_config = ConfigDict(extra="forbid")

    word: str


def question(text: str = "Say a word.", seed: int = 0) -> Question[Word]:
    return Question([{"role": "user", "content": text}], Word, 16, seed)


TINY = Model("tiny", temperature=0.5, top_p=1.0)


def llm(server: Server, folder: Path, budget: Budget | None = None, **patience: Any) -> LLM:
    chosen: dict[str, Any] = {"timeout": 5.0, "retries": 3, "backoff": 0.01, "attempts": 2, "concurrency": 1}
    return LLM(
        server.client(),
        TINY,
        Cache(folder / "cache"),
        budget or Budget(folder / "ledger.jsonl"),
        Patience(**chosen | patience),
    )


def ask(of: LLM, asked: Question[Schema]) -> Reply[Schema]:
    (reply,) = of.ask_all([asked])
    return reply


def files(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*") if path.is_file())


def test_an_answer_is_asked_for_by_schema_and_paid_for_once(tmp_path: Path) -> None:
    with serving(lambda number, body: Act()) as server:
        first = ask(llm(server, tmp_path), question())
        again = ask(llm(server, tmp_path), question())
    assert first.value == again.value == Word(word="yes")
    assert (first.calls, first.cached, again.calls, again.cached) == (1, 0, 0, 1)
    assert len(server.requests) == 1
    form = server.requests[0]["response_format"]["json_schema"]
    assert form["schema"] == Word.model_json_schema() and form["strict"]
    assert server.authorisations == [f"Bearer {KEY}"] and KEY not in files(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"text": "Say another word."},
        {"seed": 1},
        {"schema": type("Other", (Word,), {})},
        {"max_tokens": 17},
        {"model": replace(TINY, name="large")},
        {"model": replace(TINY, version="other weights")},
        {"model": replace(TINY, temperature=0.6)},
        {"model": replace(TINY, top_p=0.9)},
    ],
    ids=str,
)
def test_whatever_matters_makes_another_question(tmp_path: Path, change: dict[str, Any]) -> None:
    with serving(lambda number, body: Act()) as server:
        plain = llm(server, tmp_path)
        ask(plain, question())
        plain.model = change.get("model", plain.model)
        text = change.get("text", "Say a word.")
        asked = Question(
            [{"role": "user", "content": text}],
            change.get("schema", Word),
            change.get("max_tokens", 16),
            change.get("seed", 0),
        )
        assert ask(plain, asked).cached == 0
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("trouble", "name"),
    [
        (Act(status=429, headers={"retry-after": "0.05"}), "HTTP 429"),
        (Act(status=500), "HTTP 500"),
        (Act(status=503), "HTTP 503"),
        (Act(wait=1.0), "time-out"),
        (Act(torn=True), "torn answer"),
        (Act(body=b"{not json"), "broken answer"),
        (Act(body=b'{"choices": []}'), "broken answer"),
        (Act(body=b"<html>hello</html>", headers={"content-type": "text/html"}), "broken answer"),
    ],
)
def test_a_passing_trouble_is_tried_again_and_counted(tmp_path: Path, trouble: Act, name: str) -> None:
    with serving(lambda number, body: trouble if number < 2 else Act()) as server:
        reply = ask(llm(server, tmp_path, timeout=0.4 if trouble.wait else 5.0), question())
    assert reply.value == Word(word="yes") and reply.retries == {name: 2}
    assert len(server.requests) == 3 and reply.calls == 1


def test_trouble_without_end_is_an_error_after_a_bounded_number_of_tries(tmp_path: Path) -> None:
    with (
        serving(lambda number, body: Act(status=500)) as server,
        pytest.raises(ServerFailed, match="HTTP 500 after 3 tries"),
    ):
        ask(llm(server, tmp_path, retries=2), question())
    assert len(server.requests) == 3


def test_a_dead_server_is_an_error_that_costs_nothing(tmp_path: Path) -> None:
    with serving(lambda number, body: Act()) as server:
        pass
    budget = Budget(tmp_path / "ledger.jsonl", tokens=10_000)
    with pytest.raises(ServerFailed, match="no connection after 2 tries"):
        ask(llm(server, tmp_path, budget, retries=1), question())
    assert budget.tokens == 0


def test_a_refusal_is_not_tried_again_and_its_words_are_not_repeated(tmp_path: Path) -> None:
    refusal = Act(status=401, body=f'{{"error": "bad key {KEY}"}}'.encode())
    with serving(lambda number, body: refusal) as server, pytest.raises(ServerFailed) as problem:
        ask(llm(server, tmp_path), question())
    assert "HTTP 401" in str(problem.value) and KEY not in str(problem.value)
    assert problem.value.__cause__ is None and len(server.requests) == 1


@pytest.mark.parametrize(
    "text",
    [
        '```json\n{"word": "yes"}\n```',
        '{"word": "yes"',
        '{"word": "yes"} gladly',
        '{"wort": "yes"}',
        "yes",
        "",
    ],
)
def test_a_malformed_answer_is_counted_asked_again_and_never_repaired(tmp_path: Path, text: str) -> None:
    with serving(lambda number, body: Act(text=text)) as server:
        reply = ask(llm(server, tmp_path, attempts=3), question())
    assert reply.value is None and len(reply.failures) == 3
    assert all(failure.startswith("malformed") for failure in reply.failures)
    assert [request["seed"] for request in server.requests] == [0, 1, 2]
    assert reply.prompt_tokens == 3 * PROMPT  # it is paid for all the same
    with serving(lambda number, body: Act()) as server:
        assert ask(llm(server, tmp_path, attempts=3), question()).cached == 3
        assert not server.requests


def test_an_answer_cut_at_its_limit_is_no_answer_even_where_it_parses(tmp_path: Path) -> None:
    with serving(lambda number, body: Act(finish="stop" if number else "length")) as server:
        reply = ask(llm(server, tmp_path), question())
    assert reply.value == Word(word="yes") and len(server.requests) == 2
    assert [failure.split(":")[0] for failure in reply.failures] == ["cut at 16 tokens"]


def test_one_question_asked_twice_at_once_is_paid_for_once(tmp_path: Path) -> None:
    with serving(lambda number, body: Act(wait=0.1)) as server:
        replies = llm(server, tmp_path, concurrency=4).ask_all([question()] * 4)
    assert len(server.requests) == 1
    assert sorted(reply.cached for reply in replies) == [0, 1, 1, 1]


def test_questions_are_under_way_together_and_replies_keep_their_order(tmp_path: Path) -> None:
    def act(number: int, body: dict[str, Any]) -> Act:
        text = body["messages"][0]["content"]
        return Act(text=f'{{"word": "{text}"}}', wait=0.2 if text == "0" else 0.0)

    with serving(act) as server:
        replies = llm(server, tmp_path, concurrency=3).ask_all([question(str(i)) for i in range(6)])
    assert [reply.value.word for reply in replies if reply.value] == ["0", "1", "2", "3", "4", "5"]


def test_an_error_stops_the_rest_and_keeps_what_came(tmp_path: Path) -> None:
    with serving(lambda number, body: Act(status=403) if number == 3 else Act()) as server:
        asked = [question(str(i)) for i in range(10)]
        with pytest.raises(ServerFailed, match="HTTP 403"):
            llm(server, tmp_path).ask_all(asked)
        assert len(server.requests) == 4
        replies = llm(server, tmp_path).ask_all(asked)
    assert sum(reply.cached for reply in replies) == 3 and len(server.requests) == 11


# --------------------------------------------------------------------------------- what it may cost


def test_the_budget_stops_before_it_is_passed_and_goes_on_when_raised(tmp_path: Path) -> None:
    asked = [question(str(i)) for i in range(10)]
    limit = 5 * ONE
    with serving(lambda number, body: Act()) as server:
        budget = Budget(tmp_path / "ledger.jsonl", tokens=limit)
        with pytest.raises(BudgetExceeded, match=r"budget_tokens: 300 allowed"):
            llm(server, tmp_path, budget).ask_all(asked)
        before = len(server.requests)
        assert 0 < before < 6 and server.charged <= limit and budget.tokens == server.charged
        raised = Budget(tmp_path / "ledger.jsonl", tokens=100 * ONE)
        replies = llm(server, tmp_path, raised).ask_all(asked)
    assert all(reply.value for reply in replies)
    assert len(server.requests) == 10 and raised.tokens == 10 * ONE


@pytest.mark.parametrize(
    "trouble", [Act(wait=0.3), Act(torn=True), Act(usage=False)], ids=["slow", "torn", "uncounted"]
)
def test_what_may_have_been_charged_for_counts_as_spent(tmp_path: Path, trouble: Act) -> None:
    limit = 300
    with serving(lambda number, body: trouble) as server:
        budget = Budget(tmp_path / "ledger.jsonl", tokens=limit)
        asking = llm(server, tmp_path, budget, timeout=0.1 if trouble.wait else 5.0, retries=100)
        with pytest.raises(BudgetExceeded):
            asking.ask_all([question(str(i)) for i in range(30)])
    assert 0 < server.charged <= limit


def test_threads_do_not_pass_the_budget_together(tmp_path: Path) -> None:
    with serving(lambda number, body: Act(wait=0.01)) as server:
        budget = Budget(tmp_path / "ledger.jsonl", tokens=700)
        with pytest.raises(BudgetExceeded):
            llm(server, tmp_path, budget, concurrency=8).ask_all([question(str(i)) for i in range(40)])
    assert server.charged <= 700


def test_reservations_at_once_do_not_pass_the_limit(tmp_path: Path) -> None:
    class Slow(Budget):
        """Widens the window between looking and writing."""

        @property
        def tokens(self) -> int:
            found = super().tokens
            time.sleep(0.02)
            return found

    budget = Slow(tmp_path / "ledger.jsonl", tokens=100)

    def reserve(_: int) -> int | None:
        try:
            return budget.reserve(10, 0)
        except BudgetExceeded:
            return None

    with ThreadPoolExecutor(16) as pool:
        tickets = [ticket for ticket in pool.map(reserve, range(16)) if ticket is not None]
    assert sorted(tickets) == list(range(10))
    assert Budget(tmp_path / "ledger.jsonl").tokens == 100


def test_money_is_counted_by_its_prices(tmp_path: Path) -> None:
    prices = Prices(prompt=2.0, completion=10.0)
    each = (PROMPT * 2.0 + COMPLETION * 10.0) / 1e6
    with serving(lambda number, body: Act()) as server:
        budget = Budget(tmp_path / "ledger.jsonl", dollars=6 * each, prices=prices)
        with pytest.raises(BudgetExceeded, match="budget_dollars"):
            llm(server, tmp_path, budget).ask_all([question(str(i)) for i in range(10)])
    assert budget.dollars == pytest.approx(len(server.requests) * each) and budget.dollars <= 6 * each


operations = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40), st.floats(0, 1), st.booleans()), max_size=30
)


@given(operations=operations, limit=st.integers(1, 200))
@settings(deadline=None, max_examples=60)
def test_no_order_of_reservations_passes_the_limit(
    tmp_path_factory: pytest.TempPathFactory, operations: list[Any], limit: int
) -> None:
    ledger = tmp_path_factory.mktemp("budget") / "ledger.jsonl"
    budget = Budget(ledger, tokens=limit)
    spent = 0
    for prompt, completion, share, settled in operations:
        try:
            ticket = budget.reserve(prompt, completion)
        except BudgetExceeded:
            assert spent + prompt + completion > limit
            continue
        taken = (int(prompt * share), int(completion * share)) if settled else (prompt, completion)
        if settled:
            budget.settle(ticket, *taken)
        spent += sum(taken)
        assert budget.tokens == spent <= limit
    reopened = Budget(ledger, tokens=limit)
    assert reopened.tokens == spent  # also what was under way and never settled


def test_a_ledger_torn_by_a_crash_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    first = Budget(ledger)
    first.settle(first.reserve(5, 5), 3, 2)
    with ledger.open("a") as file:
        file.write('{"ticket": 1, "pro')
    second = Budget(ledger, tokens=100)
    assert second.tokens == 5
    second.reserve(10, 10)
    third = Budget(ledger)
    assert third.tokens == 25


@pytest.mark.parametrize("line", ["{}", "5", "[1]", '{"ticket": 1', "\0\0", ""])
def test_a_damaged_line_of_the_ledger_is_named(tmp_path: Path, line: str) -> None:
    ledger = tmp_path / "ledger.jsonl"
    first = Budget(ledger)
    for _ in range(2):
        first.reserve(5, 5)
    _, last = ledger.read_text().splitlines()
    ledger.write_text(f"{line}\n{last}\n")
    with pytest.raises(DamagedLedger, match=rf"{ledger}, line 1: .*remove"):
        Budget(ledger)
    ledger.write_text(f"{last}\n")
    second = Budget(ledger)
    second.reserve(1, 1)
    assert second.tokens == 12


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"answer": {}}', "{"])
def test_a_damaged_file_of_the_cache_is_named(tmp_path: Path, content: str) -> None:
    cache, asked = Cache(tmp_path), {"messages": ["Say a word."]}
    cache.store(asked, Answer(text="yes", finished=True, prompt_tokens=1, completion_tokens=1))
    (path,) = tmp_path.rglob("*.json")
    path.write_text(content)
    with pytest.raises(DamagedAnswer, match=rf"{path}: .*remove it"):
        cache.find(asked)


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_synthesis_client import llm, question
from llmserver import Server
llm(Server(url={url!r}), Path({folder!r}), concurrency=2).ask_all([question(str(i)) for i in range(20)])
"""


def test_a_killed_process_loses_nothing_that_had_come(tmp_path: Path) -> None:
    with serving(lambda number, body: Act(wait=0.05)) as server:
        script = SCRIPT.format(tests=str(Path(__file__).parent), url=server.url, folder=str(tmp_path))
        root = Path(__file__).resolve().parents[1]
        process = subprocess.Popen(
            [sys.executable, "-c", script], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
        )
        deadline = time.monotonic() + 60
        while len(server.requests) < 6 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        had = len(list((tmp_path / "cache").rglob("[!.]*.json")))
        under_way = len(server.requests) - had
        assert 0 < had < 20 and under_way <= 2
        replies = llm(server, tmp_path).ask_all([question(str(i)) for i in range(20)])
        assert all(reply.value for reply in replies)
        assert sum(reply.cached for reply in replies) == had
        assert len(server.requests) == 20 + under_way  # nothing else was asked twice


def test_the_environment_must_say_where_the_server_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(MissingAddress, match="OPENAI_BASE_URL") as problem:
        from_environment()
    assert KEY not in str(problem.value)
    for address in (
        "localhost:8000/v1", "not a url", " http://127.0.0.1:9/v1", "http://[::1", "http://h:port/v1", KEY,
        f"http://user:{KEY}@h:port/v1",
    ):  # fmt: skip
        monkeypatch.setenv("OPENAI_BASE_URL", address)
        with pytest.raises(MissingAddress, match=r"OPENAI_BASE_URL: .*as http://") as problem:
            from_environment()
        assert address not in str(problem.value) and KEY not in str(problem.value)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(MissingAddress, match="OPENAI_API_KEY") as problem:
        from_environment()
    assert "schl" not in str(problem.value)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    client = from_environment()
    assert isinstance(client, openai.OpenAI) and client.api_key == KEY
    client.close()
