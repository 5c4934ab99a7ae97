"""What a user would pick instead of the paper's encoder: one file a system, one interface (``Baseline``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ggsm_core.baselines.base import Baseline, Histories
from ggsm_core.baselines.handmade import Handmade
from ggsm_core.baselines.rfm import Rfm
from ggsm_core.evaluation import PROBES, Progress, evaluate

BASELINES: dict[str, type[Baseline]] = {system.name: system for system in (Rfm, Handmade)}

__all__ = ["BASELINES", "Baseline", "Histories", "run"]


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``baseline``: fit system ``params.name`` on the train split of run ``windows``, probe the rest.

    Writes auc.csv and scores.parquet as stage ``probe`` does, on the same samples, folds and resamples.
    """
    if params.name not in BASELINES:
        raise ValueError(f"name: {params.name!r} is no baseline; allowed: {', '.join(BASELINES)}")
    windows, days = inputs["windows"], params.data.history_days
    progress(0, 1, f"{params.name}: features")
    system = BASELINES[params.name]().fit(Histories.read(windows, "train", days))
    users = Histories.read(windows, "probe", days)
    evaluate(
        system.embed(users),
        users.samples,
        windows,
        out,
        recipe=system.name,
        seed=0,
        evaluation=params.evaluation,
        progress=progress,
        probe=PROBES[system.estimator],
    )
