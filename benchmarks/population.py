"""Embed 10,000 and 100,000 made-up users: users a second, and that memory does not grow with their number.

    python benchmarks/population.py

Each size in a process of its own, with the encoder that the ggsm run of profile quick ended with.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import report

from ggsm_core import provenance, runs
from ggsm_core.data.events import SCHEMA, ZONE
from ggsm_core.embed import embed
from ggsm_core.model import UserEncoder

PROFILE = "params/quick.yaml"
EVENTS = 12  # a user
CHUNK = 10_000  # users made at a time
TEXTS = [f"{what} ({where})" for where in ("grocery", "drug", "deli") for what in ("milk", "bread", "soap")]


def made_up(users: int, path: Path) -> None:
    """Write a log of EVENTS events for each user, sorted by user."""
    draw, start = np.random.default_rng(0), np.datetime64(datetime(2017, 1, 1), "us")
    writer = None
    for first in range(0, users, CHUNK):
        count = min(CHUNK, users - first) * EVENTS
        table = pl.DataFrame(
            {
                "user": np.repeat([f"u{i:08d}" for i in range(first, first + count // EVENTS)], EVENTS),
                "time": start + draw.integers(0, 89 * 24 * 60, count) * np.timedelta64(60_000_000, "us"),
                "modality": draw.choice(["bill", "app", "spm"], count),
                "text": draw.choice(TEXTS, count),
                "amount": draw.gamma(2.0, 5.0, count).round(2),
                "item": draw.choice(["a", "b", "c"], count),
                "simulated": np.zeros(count, bool),
            }
        ).with_columns(pl.col("time").dt.replace_time_zone("UTC").dt.convert_time_zone(ZONE))
        arrow = table.select(pl.col(name).cast(kind) for name, kind in SCHEMA.items()).to_arrow()
        writer = writer or pq.ParquetWriter(path, arrow.schema)
        writer.write_table(arrow)
    assert writer is not None
    writer.close()


def measure(users: int) -> dict[str, float]:
    """Embed so many users; seconds and peak memory of this process."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "events.parquet")
        made_up(users, log)
        encoder = UserEncoder.load(runs.ensure(PROFILE, "contrast", "ggsm").folder)
        begin = time.perf_counter()
        embed(encoder, log, Path(folder, "out.parquet"))
        seconds = time.perf_counter() - begin
        rows = pl.scan_parquet(Path(folder, "out.parquet")).select(pl.len()).collect().item()
    return {
        "users": rows,
        "seconds": round(seconds, 1),
        "users_per_second": round(rows / seconds, 1),
        "peak_mib": round(provenance.peak_memory() / 2**20),
    }


def main() -> None:
    """Both sizes, and the ratio of their memory."""
    sizes = []
    for users in (10_000, 100_000):
        command = [sys.executable, __file__, "--users", str(users)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        sizes.append(json.loads(done.stdout.splitlines()[-1]))
    ratio = sizes[1]["peak_mib"] / sizes[0]["peak_mib"]
    report.write("population", {"sizes": sizes, "memory of ten times the users": round(ratio, 3)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int)
    given = parser.parse_args()
    if given.users:
        print(json.dumps(measure(given.users)))
    else:
        main()
