"""General text embeddings: a frozen text encoder reads the user as the template writes it (Table 2).

MiniLM comes from its package; Qwen3-Embedding, KaLM-Embedding and llama-embed-nemotron from the folder or hub
name in ``params.text_models``. Each is pooled as its own folder says, by sentence-transformers.

Decided here: the text is ``template.render`` of the same records as our own encoder sees, cut at
``max_tokens``, without a query and without an instruction, since users are documents here; a model that needs
code of its own is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import polars as pl

from ggsm_core.baselines.base import Baseline, BaselineError
from ggsm_core.baselines.fitting import learn
from ggsm_core.template import render
from ggsm_core.text_encoder import MissingEncoder, package_folder
from ggsm_core.tokens import read_users

if TYPE_CHECKING:
    from ggsm_core.intervals import Floats, Ints
    from ggsm_core.progress import Progress

BATCH = 64


class MissingModel(BaselineError):
    """A text encoder that is neither installed, nor in the named folder, nor on a hub that answers."""


def folder_of(name: str, text_models: Any) -> str:
    """Where the model of row ``name`` is: a folder, or the name that a hub knows it by."""
    if name != "minilm":
        return str(getattr(text_models, name))
    try:
        return str(package_folder())
    except MissingEncoder as problem:
        raise MissingModel(f"minilm: {problem}") from None


class FrozenText(Baseline[list[str], list[str]]):
    """A text encoder that learns nothing. ``name`` is its row, ``source`` a folder or hub name."""

    def __init__(self, name: str, source: str, max_tokens: int, progress: Progress) -> None:
        self.name = name  # type: ignore[misc]  # one class, a row for each encoder
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise MissingModel(f"{name}: needs sentence-transformers: pip install -e .[dev]") from None
        try:
            self._model = SentenceTransformer(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise MissingModel(
                f"text_models.{name}: {source!r} can't be loaded ({str(error).splitlines()[0]}); give "
                "its folder, or a hub name where a hub answers; code of a model's own is never run"
            ) from None
        self._model.max_seq_length = max_tokens
        self._progress = progress

    def fit(self, train: list[str]) -> Self:
        """Nothing to learn."""
        return self

    def embed(self, users: list[str]) -> Floats:
        """Float[n, d], one row a text. Equal lengths share a batch, to pad little."""
        order = sorted(range(len(users)), key=lambda i: len(users[i]))
        parts = []
        for start in range(0, len(order), BATCH):
            batch = [users[i] for i in order[start : start + BATCH]]
            parts.append(self._model.encode(batch, batch_size=BATCH, show_progress_bar=False))
            self._progress(start + len(batch), len(order), "texts embedded")
        vectors = np.empty((len(users), parts[0].shape[1]))
        vectors[order] = np.concatenate(parts)
        return vectors


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``text``: embed the probe split of run ``windows``, with the files of stage ``sequence``."""
    settings = params.text_models
    source = folder_of(params.recipe, settings)
    system = FrozenText(params.recipe, source, settings.max_tokens, progress)

    def probed() -> tuple[Ints, list[str]]:
        windows = inputs["windows"]
        samples = pl.read_parquet(windows / "samples.parquet").filter(pl.col("split") == "probe")["sample"]
        found = read_users(windows, samples, params.template)
        return np.array(list(found)), [render(user) for user in found.values()]

    learn(system, [], probed, out)
