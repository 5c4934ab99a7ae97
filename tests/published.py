"""Made-up but coherent evidence: tables and provenance as the study publishes them, any rows and seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from ggsm_core import comparison, evidence, params, provenance
from ggsm_core.data.tasks import NAMES
from ggsm_core.evaluation import AUC_COLUMNS

ROOT = provenance.ROOT
RESAMPLES = 120
HOUSEHOLDS = 2000


def rows_of(name: str, seeds: int = 2) -> dict[str, int]:
    """Every row that profile ``name`` asks for -> number of seeds."""
    profile = params.load(ROOT / "params" / f"{name}.yaml")
    return {row: 1 if row in profile.unseeded else seeds for row in (*profile.trained, *profile.baselines)}


def publish(
    root: Path, name: str, rows: Mapping[str, int], *, lead: Mapping[str, float] | None = None
) -> None:
    """Write results/<name> below ``root``; ``lead`` moves a row's AUC on all tasks by so much."""
    folder = root / "results" / name
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    shared = 0.004 * rng.normal(size=(len(NAMES), RESAMPLES))
    level = np.linspace(0.6, 0.8, len(NAMES))
    points, draws, auc, labels, costs, runs = {}, {}, [], [], [], []
    for row, seeds in rows.items():
        spread = 0.0001 * rng.normal(size=(seeds, len(NAMES)))
        centre = level + (lead or {}).get(row, 0.0) + spread
        noise = 0.001 * rng.normal(size=(seeds, len(NAMES), RESAMPLES))
        points[row] = comparison.with_mean(centre.mean(axis=0))
        draws[row] = comparison.with_mean((centre[:, :, None] + noise).mean(axis=0) + shared)
        for seed in range(seeds):
            values = comparison.with_mean(centre[seed])
            auc += [
                (row, seed, task, value, value - 0.01, value + 0.01, HOUSEHOLDS)
                for task, value in zip((*NAMES, comparison.MEAN), values, strict=True)
            ]
            labels += [
                (
                    row,
                    seed,
                    task,
                    share,
                    value - 0.04 * (2 + np.log10(1 / share)) / 2,
                    int(HOUSEHOLDS * share),
                )
                for task, value in zip(NAMES, values[:-1], strict=True)
                for share in (0.01, 0.1, 1.0)
            ]
            costs.append((row, seed, 64 + 8 * len(costs) % 128, 30.0 + len(row), 5.0 + seed))
            stage = "baseline" if row in params.FEATURE_BASELINES else "probe"
            stage = "joined" if row.startswith(params.JOINED) else stage
            ended = "2026-01-02T03:04:05+00:00"
            runs.append(
                {"row": row, "seed": None if stage == "baseline" else seed, "stage": stage, "ended": ended}
                | {"commit": "0" * 40, "uncommitted_changes": False}
            )
    tables = {
        "auc": pl.DataFrame(auc, schema=AUC_COLUMNS, orient="row"),
        "rows": comparison.averages(points, draws, [*NAMES, comparison.MEAN], dict(rows)),
        "differences": comparison.differences(points, draws, [*NAMES, comparison.MEAN]),
        "covariance": comparison.covariances(draws, [*NAMES, comparison.MEAN]),
        "labels": pl.DataFrame(labels, schema=evidence.TABLES["labels"], orient="row"),
        "costs": pl.DataFrame(costs, schema=evidence.TABLES["costs"], orient="row"),
    }
    if lived := [(run["row"], run["seed"], 0.996, 0.995) for run in runs if run["stage"] == "probe"]:
        columns = ["recipe", "seed", "positive", "negative"]
        tables[evidence.LEARNING] = pl.DataFrame(lived, schema=columns, orient="row")
    for table, frame in tables.items():
        frame.write_csv(folder / f"{table}.csv")
    told = {
        "profile": name,
        "commit": "0" * 40,
        "uncommitted_changes": False,
        "machine": {"cpu": "made up", "cores": 2},
        "libraries": {"python": "3.11"},
        "data": "d" * 64,
        "seconds": 100.0,
        "runs": runs,
        "tables": {f"{table}.csv": provenance.sha256(folder / f"{table}.csv") for table in tables},
    }
    (folder / "provenance.json").write_text(json.dumps(told))
