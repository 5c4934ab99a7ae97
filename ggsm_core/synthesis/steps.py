"""The synthesis of Sec. 3.2 from end to end: stage ``synthesis``.

| file | step of the paper | holds |
| --- | --- | --- |
| pool.jsonl | 1 | scenarios, from the file and from the model, and which of them are kept |
| retrieval.jsonl | 1, Eq. 1 | the scenarios of each user, best first, and who put them in order |
| calibration.jsonl | 1, Eq. 2 | D_c: a pair for each (user, scenario), what the checks say |
| difficulty.jsonl | 2, Eq. 3 | the pairs of D_c that passed, with S_d, and which are hard |
| rules.jsonl | 3 | rules induced from the hard pairs |
| scaled.jsonl | 4 | a larger set, asked for under the rules |
| rewritten.jsonl | 4 | what passed, written again and checked again, with S_d |
| pairs.parquet | | D_qa: sample, scenario, query, answer, s_d |
| report.parquet | | for each step: asked, yielded, cost, tokens, failures |

A step whose file is there is not made again, and within a step no answer is asked for that lies in the cache.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ggsm_core.progress import Progress
from ggsm_core.provenance import named_folder, sha256, write_atomically
from ggsm_core.synthesis import client, difficulty, history, prompts, questions, rules, scenarios, server
from ggsm_core.synthesis.budget import Budget, Prices
from ggsm_core.synthesis.cache import Cache
from ggsm_core.synthesis.checks import Checker
from ggsm_core.synthesis.history import History
from ggsm_core.text_encoder import TextEncoder

Rows = list[dict[str, Any]]
CACHE = "GGSM_LLM_CACHE"
"""Environment variable: a folder for answers that were paid for. Default: .llm beside the runs.
A relative one lies below the project's root (``provenance.named_folder``)."""
PAIRS = pl.Schema(
    {
        "sample": pl.Int64(),
        "scenario": pl.String(),
        "query": pl.String(),
        "answer": pl.String(),
        "s_d": pl.Float64(),
    }
)
NAMES = ("pool", "retrieval", "calibration", "difficulty", "rules", "scaled", "rewritten")


class SynthesisError(ValueError):
    """A synthesis that the data can't feed."""


class Synthesis:
    """All steps over one folder. Each method is one step: rows in, rows out."""

    def __init__(
        self,
        settings: Any,
        llm: client.LLM,
        encoder: TextEncoder,
        checker: Checker,
        out: Path,
        progress: Progress,
    ) -> None:
        self.settings, self.llm, self.encoder, self.checker = settings, llm, encoder, checker
        self.out, self.progress = out, progress

    def pool(self) -> Rows:
        """The scenarios, extended and without near duplicates."""
        seeds = prompts.scenarios()
        count = -(-self.settings.new_scenarios // scenarios.AT_ONCE)
        asked = scenarios.extension_questions(seeds, count, self.settings.max_tokens, self.settings.seed)
        with self._step("pool") as step:
            if step.missing:
                replies = step.ask(asked)
                step.rows = scenarios.grown(seeds, replies, self.encoder, self.settings.duplicate)
                step.yielded = sum(row["source"] == "model" for row in step.rows if row["kept"])
        return step.rows

    def retrieval(self, pool: Sequence[str], users: Sequence[History]) -> Rows:
        """Eq. 1 for every user."""
        with self._step("retrieval") as step:
            if step.missing:
                count = self.settings.retrieved
                near = scenarios.shortlists(pool, users, self.encoder, self.settings.shortlist)
                replies = step.ask(
                    [
                        scenarios.order_question(
                            user,
                            pool,
                            places,
                            min(count, len(places)),
                            self.settings.max_tokens,
                            self.settings.seed,
                        )
                        for user, places in zip(users, near, strict=True)
                    ]
                )
                for user, places, reply in zip(users, near, replies, strict=True):
                    found, problem = scenarios.chosen(reply, places, count)
                    step.rows.append(
                        {
                            "sample": user.sample,
                            "scenarios": [pool[place] for place in found],
                            "ordered_by": "model" if problem is None else "embedding",
                            "problem": problem,
                        }
                    )
                step.yielded = sum(row["problem"] is None for row in step.rows)
        return step.rows

    def pairs(
        self, name: str, users: Sequence[History], retrieved: Rows, count: int, found: Sequence[str]
    ) -> Rows:
        """Eq. 2 for the first ``count`` of (user, scenario), each user's best scenarios first."""
        with self._step(name) as step:
            if step.missing:
                of = {row["sample"]: row["scenarios"] for row in retrieved}
                each = self.settings.pairs_per_user
                tasks = [(user, line) for user in users for line in of[user.sample][:each]][:count]
                replies = step.ask(
                    [
                        questions.qa_question(user, line, found, self.settings.max_tokens, self.settings.seed)
                        for user, line in tasks
                    ]
                )
                step.rows = questions.without_twins(
                    [
                        {
                            "sample": user.sample,
                            "scenario": line,
                            **questions.judged(reply, user, self.checker),
                        }
                        for (user, line), reply in zip(tasks, replies, strict=True)
                    ]
                )
                step.yielded = sum(row["kept"] for row in step.rows)
        return step.rows

    def difficulty(self, users: Sequence[History], calibration: Rows) -> Rows:
        """Eq. 3 on the pairs that passed: an answer that is false is hard for no good reason."""
        with self._step("difficulty") as step:
            if step.missing:
                kept = [row for row in calibration if row["kept"]]
                scores = self._scores(users, kept)
                limit = difficulty.threshold(scores, self.settings.threshold, self.settings.quantile)
                step.rows = [
                    row | {"s_d": float(score), "hard": bool(score >= limit)}
                    for row, score in zip(kept, scores, strict=True)
                ]
                step.yielded = sum(row["hard"] for row in step.rows)
        return step.rows

    def rules(self, probed: Rows) -> list[str]:
        """Rules from the hard pairs; none where there is no hard pair."""
        with self._step("rules") as step:
            if step.missing:
                hard = [row for row in probed if row["hard"]]
                count = self.settings.rules
                question = rules.rules_question(hard, count, self.settings.max_tokens, self.settings.seed)
                replies = step.ask([question] if hard and count else [])
                step.rows = [{"rule": rule} for reply in replies for rule in rules.induced(reply, count)]
                step.yielded = len(step.rows)
        return [row["rule"] for row in step.rows]

    def rewritten(self, users: Sequence[History], scaled: Rows) -> Rows:
        """Posterior rewriting. Where no new text comes, or one that fails a check, the old one stands."""
        with self._step("rewritten") as step:
            if step.missing:
                of = {user.sample: user for user in users}
                kept = [row for row in scaled if row["kept"]]
                replies = step.ask(
                    [
                        questions.rewriting_question(
                            of[row["sample"]],
                            row["query"],
                            row["answer"],
                            self.settings.max_tokens,
                            self.settings.seed,
                        )
                        for row in kept
                    ]
                )
                for row, reply in zip(kept, replies, strict=True):
                    new = questions.judged(reply, of[row["sample"]], self.checker)
                    better = {"query": new["query"], "answer": new["answer"]} if new["kept"] else {}
                    told = {"rewritten": new["kept"], "refused": new["problems"], "before": row["answer"]}
                    step.rows.append(row | better | told)
                scores = self._scores(users, step.rows)
                step.rows = [row | {"s_d": float(s)} for row, s in zip(step.rows, scores, strict=True)]
                step.yielded = sum(row["rewritten"] for row in step.rows)
        return step.rows

    def _scores(self, users: Sequence[History], pairs: Rows) -> np.ndarray:
        of = {user.sample: user.text for user in users}
        asked = [f"{pair['query']}\n{of[pair['sample']]}" for pair in pairs]
        return difficulty.hard_to_align(self.encoder, asked, [pair["answer"] for pair in pairs])

    @contextmanager
    def _step(self, name: str) -> Iterator[Step]:
        step = Step(name, self.out, self.llm, lambda done, total: self._say(name, done, total))
        self._say(name, 0, 1)
        yield step
        if step.missing:
            step.write()

    def _say(self, name: str, done: int, total: int) -> None:
        place = NAMES.index(name)
        self.progress(
            place * 100 + 100 * done // max(total, 1), len(NAMES) * 100, f"{name} {done} of {total}"
        )


class Step:
    """One step's rows and what they took; read from disk if an earlier attempt wrote them."""

    def __init__(self, name: str, out: Path, llm: client.LLM, progress: Callable[[int, int], None]) -> None:
        self.name, self.llm, self.progress = name, llm, progress
        self._rows, self._report = out / f"{name}.jsonl", out / f"{name}.report.json"
        self.missing = not self._rows.is_file()
        self.rows: Rows = [] if self.missing else read_rows(self._rows)
        self.yielded = 0
        self._replies: list[client.Reply[Any]] = []
        self._began = time.monotonic()

    def ask(self, asked: Sequence[client.Question[client.Schema]]) -> list[client.Reply[client.Schema]]:
        """The replies, in order; their cost is this step's."""
        replies = self.llm.ask_all(asked, self.progress)
        self._replies += replies
        return replies

    def write(self) -> None:
        """The report, then the rows, whose presence says that the step is done."""
        replies = self._replies
        prompt, completion = (
            sum(getattr(reply, name) for reply in replies) for name in ("prompt_tokens", "completion_tokens")
        )
        failures = [failure for reply in replies for failure in reply.failures]
        report = {
            "step": self.name,
            "asked": len(replies),
            "answered": sum(reply.value is not None for reply in replies),
            "yielded": self.yielded,
            "calls": sum(reply.calls for reply in replies),
            "cached": sum(reply.cached for reply in replies),
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "dollars": self.llm.budget.prices.of(prompt, completion),
            "malformed": sum(failure.startswith("malformed") for failure in failures),
            "cut": sum(failure.startswith("cut") for failure in failures),
            "retries": sum(reply.retries.total() for reply in replies),
            "seconds": round(time.monotonic() - self._began, 2),
        }
        write_atomically(self._report, json.dumps(report))
        write_atomically(self._rows, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows))


def read_rows(path: Path) -> Rows:
    """The rows of a step. Lines end in line feeds alone: a text may hold what ``splitlines`` cuts at too."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def draw(samples: pl.DataFrame, settings: Any) -> tuple[list[int], list[int]]:
    """Train samples for the calibration set and for scaling: different ones, drawn by seed.

    Raises ``SynthesisError``.
    """
    train = samples.filter(pl.col("split") == "train")["sample"].sort().to_numpy()
    first, second = (
        -(-count // settings.pairs_per_user) for count in (settings.calibration, settings.scaled)
    )
    if first + second > len(train):
        raise SynthesisError(
            f"synthesis.calibration, synthesis.scaled: {settings.calibration} and {settings.scaled} pairs at "
            f"synthesis.pairs_per_user = {settings.pairs_per_user} need {first + second} train samples, not "
            f"the {len(train)} that there are"
        )
    drawn = np.random.default_rng(settings.seed).permutation(train)[: first + second].tolist()
    return drawn[:first], drawn[first:]


def coverage(
    pool: Sequence[str], users: Sequence[History], calibration: Rows, known: Sequence[str]
) -> dict[str, int]:
    """How much of the pool and of what people buy the calibration set touches, and how much passed."""
    passed = [row for row in calibration if row["kept"]]
    named = {name for row in passed for name in known if name in row["answer"]}
    return {
        "scenarios in the pool": len(pool),
        "scenarios asked about": len({row["scenario"] for row in calibration}),
        "scenarios with a pair that passed": len({row["scenario"] for row in passed}),
        "kinds anybody buys": len(known),
        "kinds in the histories shown": len(
            {name for user in users for name in user.bought if name in user.text}
        ),
        "kinds in answers that passed": len(named),
    }


@contextmanager
def language_model(settings: Any, served: Path | None, out: Path, cache: Path) -> Iterator[client.LLM]:
    """The profile's model: behind a server of its own, or the one that the environment names."""
    prices = Prices(settings.prompt_price, settings.completion_price)
    budget = Budget(
        out / "ledger.jsonl", tokens=settings.budget_tokens, dollars=settings.budget_dollars, prices=prices
    )
    patience = client.Patience(settings.timeout, settings.retries, settings.attempts, settings.concurrency)
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p}
    if served is None:
        model = client.Model(settings.model, **sampling)
        with client.from_environment() as connected:
            yield client.LLM(connected, model, Cache(cache), budget, patience)
    else:
        weights = sha256(served / server.MODEL / "model.safetensors")
        model = client.Model(server.MODEL, version=weights, **sampling)
        with server.serve(served, out / "server.log") as connected:
            yield client.LLM(connected, model, Cache(cache), budget, patience)


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``synthesis``: the files of the table above. ``out`` may hold those of an interrupted attempt."""
    settings, folder = params.synthesis, inputs["windows"]
    samples = pl.read_parquet(folder / "samples.parquet")
    first, second = draw(samples, settings)
    users = history.read(folder, [*first, *second], settings.records)
    known = history.catalogue(folder, samples.filter(pl.col("split") == "train")["sample"])
    cache = named_folder(CACHE, out.parent / ".llm")
    with language_model(settings, inputs.get("llm"), out, cache) as llm:
        work = Synthesis(
            settings, llm, TextEncoder(), Checker(known, params.data.history_days), out, progress
        )
        pool = [row["scenario"] for row in work.pool() if row["kept"]]
        retrieved = work.retrieval(pool, users)
        early, late = users[: len(first)], users[len(first) :]
        calibration = work.pairs("calibration", early, retrieved, settings.calibration, ())
        covered = coverage(pool, early, calibration, known)
        write_atomically(out / "coverage.json", json.dumps(covered))
        induced = work.rules(work.difficulty(early, calibration))
        scaled = work.pairs("scaled", late, retrieved, settings.scaled, induced)
        final = work.rewritten(late, scaled)
    pl.DataFrame([{name: row[name] for name in PAIRS} for row in final], schema=PAIRS).write_parquet(
        out / "pairs.parquet"
    )
    reports = [json.loads((out / f"{name}.report.json").read_text(encoding="utf-8")) for name in NAMES]
    pl.DataFrame(reports).write_parquet(out / "report.parquet")
