"""Stage ``joined``: does an embedding add anything to features made by hand?

Row ``handmade+<row>``: the hand-made features and the embedding of ``<row>`` side by side, under gradient
boosting, with the seed that the embedding was trained with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from ggsm_core.baselines.base import BaselineError, Histories
from ggsm_core.baselines.handmade import Handmade
from ggsm_core.evaluation import PROBES, evaluate
from ggsm_core.progress import Progress


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Writes what stage ``probe`` does. Raises ``BaselineError``."""
    (folder,) = (path for name, path in inputs.items() if name != "windows")
    windows, days = inputs["windows"], params.data.history_days
    progress(0, 1, f"{params.recipe}: features")
    users = Histories.read(windows, "probe", days)
    features = Handmade().fit(Histories.read(windows, "train", days)).embed(users)
    stored = load_file(folder / "embeddings.safetensors")
    order = np.argsort(stored["sample"])
    if not np.array_equal(stored["sample"][order], users.samples):
        raise BaselineError(
            f"samples: {folder.name} embedded {len(order)}, {windows.name} has {len(users.samples)} in its "
            "probe split, and they must be the same; embed again from these windows"
        )
    evaluate(
        np.concatenate([features, stored["embeddings"][order]], axis=1),
        users.samples,
        windows,
        out,
        recipe=params.recipe,
        seed=params.seed,
        evaluation=params.evaluation,
        progress=progress,
        probe=PROBES["boosted"],
    )
