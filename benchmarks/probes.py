"""Time of nine linear probes with intervals: ``python benchmarks/probes.py [--samples N] [--features D]``.

Synthetic embeddings with the sample counts and positive rates of the nine real tasks.
"""

from __future__ import annotations

import argparse
import time

import joblib
import numpy as np
import report

from ggsm_core import provenance
from ggsm_core.evaluation import Task, probe_tasks
from ggsm_core.intervals import Households

# share of samples that have the label, share of positives among them: the nine tasks of Complete Journey
TASKS = {
    "event_purchase": (1.0, 0.276),
    "login_7d": (1.0, 0.635),
    "mau_loss_30d": (1.0, 0.0886),
    "fuel_30d_no_recent": (0.755, 0.0957),
    "income_ge75k": (0.387, 0.278),
    "seafood_30d": (1.0, 0.248),
    "media_30d": (1.0, 0.179),
    "redeem_known": (0.284, 0.104),
    "mailer_share_hi": (0.718, 0.499),
}


def measure(samples: int, features: int, jobs: int) -> dict[str, float]:
    """Seconds and peak memory [MiB] of one row of the result table."""
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(0, max(50, samples // 8), samples))
    # a spectrum that falls off as that of trained embeddings does
    x = rng.normal(size=(samples, features)) * np.geomspace(1, 0.01, features)
    x = x @ rng.normal(size=(features, features))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    households = Households.of(user)
    tasks = []
    for name, (share, positive) in TASKS.items():
        rows = np.flatnonzero(rng.random(samples) < share)
        logit = 1.5 * x[rows] @ rng.normal(size=features) + rng.logistic(size=len(rows))
        labels = (logit > np.quantile(logit, 1 - positive)).astype(np.int64)
        tasks.append(Task(name, rows, labels, households.index(user[rows])))
    start = time.perf_counter()
    results = probe_tasks(x, tasks, households, jobs=jobs)
    return {
        "samples": samples,
        "features": features,
        "tasks": len(tasks),
        "processes": jobs,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mib": round(provenance.peak_memory() / 2**20),
        "mean_auc": round(float(np.mean([r.auc for r in results])), 4),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=18_376)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=joblib.cpu_count())
    given = parser.parse_args()
    report.write("probes", measure(given.samples, given.features, given.jobs))
