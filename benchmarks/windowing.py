"""Reading and windowing all 1,469,307 transactions into 18,376 samples with labels.

    python benchmarks/windowing.py

prints JSON: seconds, peak memory in GB, and the same records' core aggregation for one anchor day in plain
pandas and here. Goal: 10 s and 3 GB on two cores.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import polars as pl

from ggsm_core.data import windows
from ggsm_core.data.events import EPOCH
from ggsm_core.params import Data

ANCHOR = 210


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of wall time, and what ``work`` returns."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def in_pandas(events: Any, users: set[str]) -> int:
    """Records of one anchor day, without ranks and totals; returns how many."""
    days = (events["time"].dt.tz_localize(None).dt.normalize() - pd.Timestamp(EPOCH)).dt.days
    inside = events[(days >= ANCHOR - 90) & (days < ANCHOR) & events["user"].isin(users)]
    before = ANCHOR - days[inside.index]
    frame = inside.assign(before=before, n30=before <= 30, n7=before <= 7)
    aggregates = {
        "amount": ("amount", "sum"),
        "count": ("before", "size"),
        "last": ("before", "min"),
        "first": ("before", "max"),
        "n30": ("n30", "sum"),
        "n7": ("n7", "sum"),
    }
    return len(frame.groupby(["user", "modality", "text"], observed=True).agg(**aggregates))


def main() -> None:
    """Run and print."""
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        seconds, _ = timed(lambda: windows.run(SimpleNamespace(data=Data()), {}, out, lambda *_: None))
        used = resource.getrusage(resource.RUSAGE_SELF)
        samples = pl.read_parquet(out / "samples.parquet")
        events = pl.read_parquet(out / "events.parquet")
    one = samples.filter(pl.col("anchor") == ANCHOR)
    here, _ = timed(lambda: windows.history(events, one, 90))
    plain = (
        events.filter(pl.col("time").is_not_null())
        .with_columns(pl.col("modality").cast(pl.String))
        .to_pandas()
    )
    pandas, _ = timed(lambda: in_pandas(plain, set(one["user"])))
    cpu_seconds = used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime
    report = {
        "samples": samples.height,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_gb": round(used.ru_maxrss * 1024 / 1e9, 2),
        "cores": os.cpu_count(),
        "one_anchor_seconds": round(here, 2),
        "one_anchor_seconds_pandas": round(pandas, 2),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
