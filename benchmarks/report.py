"""What the benchmarks share: timing in turns, and a report that says where it was made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from ggsm_core import provenance

RESULTS = provenance.ROOT / "results" / "bench"


def interleaved(work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Name -> least seconds of ``repeats`` calls, all taking turns, so that a busy moment meets all alike."""
    least = dict.fromkeys(work, float("inf"))
    for call in work.values():
        call()
    for _ in range(repeats):
        for name, call in work.items():
            begin = time.perf_counter()
            call()
            least[name] = min(least[name], time.perf_counter() - begin)
    return least


def write(name: str, measured: dict[str, Any]) -> None:
    """Print the report and keep it as ``results/bench/<name>.json``, with machine, versions and commit."""
    commit, modified = provenance.commit()
    report = measured | {
        "machine": provenance.machine(),
        "libraries": provenance.libraries(),
        "commit": commit,
        "modified": modified,
    }
    print(json.dumps(measured, indent=1))
    provenance.write_atomically(RESULTS / f"{name}.json", json.dumps(report, indent=1) + "\n")
