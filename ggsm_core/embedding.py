"""Frozen embeddings of the probe samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from safetensors.numpy import save_file

from ggsm_core.collation import collate
from ggsm_core.model import UserEncoder
from ggsm_core.progress import Progress
from ggsm_core.template import PAD_TOKEN
from ggsm_core.text_encoder import features
from ggsm_core.tokens import Sequences
from ggsm_core.towers import build_encoder


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``embed``: Float[n, d], one row a probe sample.

    Without a contrast run among its inputs it embeds with the decoder before contrastive training (the
    paper's oracle).
    """
    if "contrast" in inputs:
        base = inputs["pretrain"] if params.lora is not None else None
        encoder = UserEncoder.load(inputs["contrast"], base=base)
    else:
        encoder = build_encoder(params, inputs)
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    users = Sequences.load(inputs["tokens"], "probe_users")
    embeddings = embed_all(encoder, users, features(inputs["texts"]), progress=progress)
    sample = pl.read_parquet(inputs["tokens"] / "probe.parquet")["sample"].to_numpy()
    save_file({"embeddings": embeddings, "sample": sample.astype(np.int64)}, out / "embeddings.safetensors")


def embed_all(
    encoder: UserEncoder, users: Sequences, feature_of: Any, progress: Progress, batch_size: int = 256
) -> np.ndarray:
    """Float32[n, d], in the order of ``users``."""
    result = np.empty((len(users), encoder.hidden_size), np.float32)
    device, done = next(encoder.parameters()).device, 0
    for rows in batches_by_length(users.lengths(), batch_size):
        batch = collate([users[i] for i in rows], encoder.ids[PAD_TOKEN], feature_of)
        result[rows] = encoder.embed(batch.to(device)).float().cpu().numpy()
        done += len(rows)
        progress(done, len(users), "users embedded")
    return result


def batches_by_length(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Row numbers in batches whose rows are of like length Int64[n], to pad little."""
    order = np.argsort(lengths, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
