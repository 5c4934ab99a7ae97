"""Stage ``baseline``: features made by hand, with the probe that suits them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ggsm_core.baselines.base import Baseline, Histories
from ggsm_core.baselines.handmade import Handmade, Handmade128, HandmadeLinear
from ggsm_core.baselines.rfm import Rfm
from ggsm_core.evaluation import PROBES, Probe, evaluate
from ggsm_core.progress import Progress

SYSTEMS: dict[str, tuple[type[Baseline[Histories, Histories]], Probe]] = {
    system.name: (system, PROBES[probe])
    for system, probe in (
        (Rfm, "linear"),
        (Handmade, "boosted"),
        (HandmadeLinear, "linear"),
        (Handmade128, "linear"),
    )
}
"""Name -> the system and the probe that suits it."""


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Fit system ``params.name`` on the train split of run ``windows``, probe the rest.

    Writes what stage ``probe`` does, on the same samples, folds and resamples.
    """
    if params.name not in SYSTEMS:
        raise ValueError(f"name: {params.name!r} is no baseline; allowed: {', '.join(SYSTEMS)}")
    windows, days = inputs["windows"], params.data.history_days
    progress(0, 1, f"{params.name}: features")
    kind, probe = SYSTEMS[params.name]
    system = kind().fit(Histories.read(windows, "train", days))
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
        probe=probe,
    )
