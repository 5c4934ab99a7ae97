"""What may be spent on a language model, and a ledger on disk of what has been.

Before a request leaves, the most that it can cost is reserved; the answer's own count replaces the
reservation. So the limit is never passed, whatever the number of threads, and a process that was killed finds
its spending (and what it had under way, taken as spent) when it starts again.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from pathlib import Path

MILLION = 1_000_000
GO_ON = (
    "answers so far are kept and cost nothing again; a raised limit counts from 0, so set it to what may be "
    "spent from here on"
)
"""The limit is part of what names a run, and a run has a ledger of its own."""


class BudgetExceeded(ValueError):
    """The next request could pass the limit, so it was not sent."""


class DamagedLedger(ValueError):
    """What was spent can't be read."""


@dataclass(frozen=True)
class Prices:
    """Dollars for a million tokens."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / MILLION


class Budget:
    """Limits in tokens and dollars (None for no limit), and the ledger behind them. Threads may share it."""

    def __init__(
        self,
        ledger: Path,
        *,
        tokens: int | None = None,
        dollars: float | None = None,
        prices: Prices | None = None,
    ) -> None:
        self.limit_tokens, self.limit_dollars, self.prices = tokens, dollars, prices or Prices()
        self._entries: dict[int, tuple[int, int]] = {}  # ticket -> prompt and completion tokens
        self._lock = threading.Lock()
        ledger.parent.mkdir(parents=True, exist_ok=True)
        self._ledger = ledger
        self._read()

    def _read(self) -> None:
        if not self._ledger.is_file():
            return
        whole = self._ledger.read_bytes()
        end = whole.rfind(b"\n") + 1  # a line without end was being written when the process died
        for number, line in enumerate(whole[:end].splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._entries[entry["ticket"]] = (entry["prompt"], entry["completion"])
            except (ValueError, KeyError, TypeError) as problem:
                raise DamagedLedger(
                    f"{self._ledger}, line {number}: tells no spending ({type(problem).__name__}); mend the "
                    "line, or remove it: what it stood for then counts as unspent"
                ) from None
        if end < len(whole):
            with self._ledger.open("r+b") as file:
                file.truncate(end)

    @property
    def tokens(self) -> int:
        """Spent and reserved, in tokens."""
        return sum(prompt + completion for prompt, completion in self._entries.values())

    @property
    def dollars(self) -> float:
        """Spent and reserved, in dollars."""
        return sum(self.prices.of(*entry) for entry in self._entries.values())

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> int:
        """A ticket for a request that takes at most this much. Raises ``BudgetExceeded``."""
        with self._lock:
            more = prompt_tokens + completion_tokens
            if self.limit_tokens is not None and self.tokens + more > self.limit_tokens:
                raise BudgetExceeded(
                    f"synthesis.budget_tokens: {self.limit_tokens:,} allowed, {self.tokens:,} spent, and the "
                    f"next request may take {more:,}; {GO_ON}"
                )
            price = self.prices.of(prompt_tokens, completion_tokens)
            if self.limit_dollars is not None and self.dollars + price > self.limit_dollars:
                raise BudgetExceeded(
                    f"synthesis.budget_dollars: {self.limit_dollars:.4f} allowed, {self.dollars:.4f} spent, "
                    f"and the next request may cost {price:.4f}; {GO_ON}"
                )
            ticket = max(self._entries, default=-1) + 1  # not their number: a line may have been taken out
            self._write(ticket, prompt_tokens, completion_tokens)
            return ticket

    def settle(self, ticket: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Replace a reservation by what the request took; zeros where nothing was done for it."""
        with self._lock:
            self._write(ticket, prompt_tokens, completion_tokens)

    def _write(self, ticket: int, prompt_tokens: int, completion_tokens: int) -> None:
        self._entries[ticket] = (prompt_tokens, completion_tokens)
        entry = {"ticket": ticket, "prompt": prompt_tokens, "completion": completion_tokens}
        with self._ledger.open("a", encoding="utf-8") as file:  # out of this process before the request is
            file.write(json.dumps(entry) + "\n")
