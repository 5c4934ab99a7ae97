"""Ten million made-up events of 160,000 users -> their templates as text, streamed, in one process.

    python benchmarks/templating.py

measures windows a second of processor time (a second of one core), and peak memory in GB, at a tenth and
at the whole of the log. Goal: 5,000 windows a second a core, and no more memory for ten times the users.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import report

from ggsm_core import provenance
from ggsm_core.data import bulk, made_up
from ggsm_core.data.events import ZONE
from ggsm_core.sections import Template

USERS, EACH, STEP = 160_000, 62, 16_000


def write(path: Path, users: int) -> int:
    """A log of ``users`` users; returns its events."""
    writer, count = None, 0
    for first in range(0, users, STEP):
        log = made_up.events(STEP, EACH, first=first)
        table = log.with_columns(pl.col("time").dt.replace_time_zone(ZONE)).to_arrow()
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=bulk.ROWS)
        count += table.num_rows
    assert writer is not None
    writer.close()
    return count


def measure(path: Path) -> dict[str, float]:
    """Template a log in this process."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    out = path.with_suffix(".texts.parquet")
    bulk.local(path, out, anchor=date(2017, 7, 1), history_days=90, template=Template())
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    windows = pq.read_metadata(out).num_rows
    return {
        "windows": windows,
        "seconds": round(seconds, 1),
        "windows_per_core_second": round(windows / cpu),
        "peak_gb": round(provenance.peak_memory() / 1e9, 2),
    }


def main() -> None:
    """Make both logs, measure each in a process of its own, report."""
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, users in (("tenth", USERS // 10), ("whole", USERS)):
            path = Path(folder, f"{name}.parquet")
            events = write(path, users)
            done = subprocess.run(
                [sys.executable, __file__, str(path)], check=True, capture_output=True, text=True
            )
            measured[name] = {"events": events} | json.loads(done.stdout)
    report.write("templating", measured)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(measure(Path(sys.argv[1]))))
    else:
        main()
