"""Stage ``sequence``: the systems of Table 2 that read a history as a sequence of visits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggsm_core.baselines.base import Histories
from ggsm_core.baselines.coles import Coles
from ggsm_core.baselines.cpc import Cpc
from ggsm_core.baselines.fitting import Log, SequenceBaseline, learn
from ggsm_core.baselines.msdp import Msdp
from ggsm_core.baselines.one4all import One4all

if TYPE_CHECKING:
    from ggsm_core.intervals import Ints
    from ggsm_core.progress import Progress

SYSTEMS: dict[str, type[SequenceBaseline]] = {system.name: system for system in (Cpc, Coles, Msdp, One4all)}


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Fit system ``params.recipe`` on the train split of run ``windows``, embed the probe split.

    Writes embeddings.safetensors as stage ``embed`` does, system.json and metrics.jsonl.
    """
    windows, data = inputs["windows"], params.data
    progress(0, params.peers.epochs, "histories")
    train = Histories.read(windows, "train", data.history_days, data.future_days)
    system = SYSTEMS[params.recipe](params.peers, params.seed, Log(out, params.peers.epochs, progress))

    def probed() -> tuple[Ints, Histories]:
        users = Histories.read(windows, "probe", data.history_days)
        return users.samples, users

    learn(system, train, probed, out)
