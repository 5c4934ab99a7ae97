"""Reading and windowing all 1,469,307 transactions into 18,376 samples with labels.

    python benchmarks/windowing.py

measures seconds of wall and processor time, peak memory in GB. Goal: 10 s and 3 GB on two cores.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import report

from ggsm_core import provenance
from ggsm_core.data import windows
from ggsm_core.sections import Data


def main() -> None:
    """Run and print."""
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        windows.run(SimpleNamespace(data=Data()), {}, Path(folder), lambda *_: None)
        seconds = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_SELF)
        samples = pl.scan_parquet(Path(folder, "samples.parquet")).select(pl.len()).collect().item()
    cpu_seconds = used.ru_utime + used.ru_stime - cpu.ru_utime - cpu.ru_stime
    measured = {
        "samples": samples,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_gb": round(provenance.peak_memory() / 1e9, 2),
        "cores": os.cpu_count(),
    }
    report.write("windowing", measured)


if __name__ == "__main__":
    main()
