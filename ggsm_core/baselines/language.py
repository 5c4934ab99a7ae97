"""Stage ``language``: the systems of Table 2 that are built around a language model, on our own pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from transformers import PreTrainedTokenizerFast

from ggsm_core.baselines.answered import Answered, Users
from ggsm_core.baselines.base import BaselineError
from ggsm_core.baselines.fitting import Log, learn
from ggsm_core.baselines.found import Found
from ggsm_core.baselines.instructue import InstructUe
from ggsm_core.batches import Pairs
from ggsm_core.text_encoder import features
from ggsm_core.tokens import Sequences

if TYPE_CHECKING:
    from ggsm_core.intervals import Ints
    from ggsm_core.progress import Progress


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Fit system ``params.recipe`` on the training pairs, embed the probe samples.

    Writes embeddings.safetensors as stage ``embed`` does, system.json and metrics.jsonl.
    """
    tokens, feature_of = inputs["tokens"], features(inputs["texts"])

    def probed() -> tuple[Ints, Users]:
        samples = pl.read_parquet(tokens / "probe.parquet")["sample"].to_numpy()
        return samples, Users(Sequences.load(tokens, "probe_users"), feature_of)

    if params.recipe == Found.name:
        log = Log(out, params.peers.epochs, progress)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(inputs["pretrain"])
        learn(Found(params, tokenizer, log), Answered.read(tokens, feature_of), probed, out)
    elif params.recipe == InstructUe.name:
        log = Log(out, params.training.total_steps, progress)
        pairs = Pairs(tokens, inputs["texts"], params.training.batch_size, params.seed)
        learn(InstructUe(params, inputs, log), pairs, probed, out)
    else:
        raise BaselineError(
            f"recipe: {params.recipe!r} is no system of this stage; it has {Found.name} and {InstructUe.name}"
        )
