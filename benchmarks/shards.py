"""Training pairs on disk, 1 to 100 million: time until the first batch, memory, pairs a second, padding.

    python benchmarks/shards.py

Each size in a process of its own. Goals: the first batch of 10 million pairs within 5 s, constant memory, and
at most 15 % of a batch's tokens padding. 100 million are planned, not read: they would fill this disk.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import report
from safetensors.numpy import save_file

BATCH, STEPS, SEED = 2048, 20, 0
SHARD = 1 << 16


def made_up(folder: Path, pairs: int, *, planned: bool) -> None:
    """Write an index of ``pairs`` samples, and unless it is only planned, shards: one, under many names."""
    from ggsm_core import order, template, tokens

    draw = np.random.default_rng(SEED)
    lengths = (12 + draw.gamma(2.0, 15.0, SHARD)).astype(np.int64).clip(max=128)
    rows = np.arange(pairs + 1)
    by_length = np.argsort(np.resize(lengths.astype(np.int16), pairs), kind="stable")
    order.Index(rows, by_length, rows[:-1], rows[:-1]).save(folder, "behaviour")
    if planned:
        return
    kinds = {n: np.full(n, template.SEGMENTS["answer"]) for n in range(1, 129)}
    shard = tokens.Shard.of(template.Encoded(draw.integers(0, 4096, n), kinds[n]) for n in lengths.tolist())
    whole = folder / "whole"
    save_file(dict(shard.arrays), whole)
    for name in ("train_users", "train_answers"):
        for number in range(-(-pairs // SHARD)):
            (folder / f"{name}-{number:05d}.safetensors").hardlink_to(whole)


def own_memory() -> float:
    """Memory of this process that is not a mapped file, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def measure(folder: Path, *, planned: bool) -> dict[str, float]:
    """Open, plan and read batches."""
    from ggsm_core.collation import collate
    from ggsm_core.order import Batches, Index
    from ggsm_core.tokens import Sequences

    before, begin = own_memory(), time.perf_counter()
    plan = Batches(Index.load(folder, "behaviour").by_length, BATCH, SEED)
    users = None if planned else Sequences.load(folder, "train_users")
    answers = None if planned else Sequences.load(folder, "train_answers")
    first, planning, waste = 0.0, 0.0, []
    for step in range(STEPS):
        asked = time.perf_counter()
        samples, _ = plan.samples(step * 97)
        planning += time.perf_counter() - asked
        if users is not None and answers is not None:
            made = collate([users[i] for i in samples], 0)
            collate([answers[i] for i in samples], 0)
            waste.append(1 - float(made.valid.float().mean()))
        first = first or time.perf_counter() - begin
    seconds = time.perf_counter() - begin
    found = {
        "first_batch_seconds": round(first, 3),
        "plan_milliseconds": round(1000 * planning / STEPS, 2),
        "own_memory_mib": round(own_memory() - before, 1),
    }
    if not planned:
        found |= {
            "pairs_a_second": round(STEPS * BATCH / seconds),
            "padding": round(float(np.mean(waste)), 4),
        }
    return found


def main() -> None:
    """Make, measure, report."""
    found = {}
    for pairs in (1_000_000, 10_000_000, 100_000_000):
        planned = pairs > 10_000_000
        with tempfile.TemporaryDirectory() as place:
            made_up(Path(place), pairs, planned=planned)
            command = [sys.executable, __file__, "--measure", place, *(["--planned"] if planned else [])]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[f"{pairs:,} pairs"] = json.loads(done.stdout)
    report.write("shards", {"batch": BATCH} | found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--planned", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is None:
        main()
    else:
        print(json.dumps(measure(given.measure, planned=given.planned)))
