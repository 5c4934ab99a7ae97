"""What masks and guidance cost, and how near the encoder comes to the machine's own speed.

    python benchmarks/encoder.py

Ratios within one run, each of calls that take turns: a whole GG-SM training against plain bidirectional
(T_warm = 10 %; goals 1.02 with previous_step, 1.10 with two_pass), forward and backward under a recipe's mask
against plain causal attention at L = 512 (goal 1.05), tokens that sorting by length leaves as padding (goal
15 %), and the share of the machine's matmul rate that a forward pass reaches (goal 60 %).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import report
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from ggsm_core import batches, masks, params, runs, towers, training
from ggsm_core.embedding import batches_by_length
from ggsm_core.sections import Guidance
from ggsm_core.tokens import Sequences

PROFILE = "params/quick.yaml"
STEPS, WARM = 40, 4
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
LAYERS = 4  # of SmolLM2's 30: all are alike, and the rates are per layer
LENGTH, BATCH = 512, 4


def trainer(recipe: str, options: Any) -> training.Trainer:
    """A trainer of the quick profile with STEPS steps."""
    loaded = params.load(PROFILE)
    inputs: dict[str, Path] = {
        stage: runs.ensure(PROFILE, stage).folder for stage in ("tokens", "texts", "pretrain")
    }
    wanted = SimpleNamespace(**dict(loaded), recipe=recipe, options=options, seed=0)
    wanted.training = loaded.training.model_copy(update={"total_steps": STEPS})
    pairs = batches.Pairs(inputs["tokens"], inputs["texts"], wanted.training.batch_size, 0)
    return training.Trainer(towers.build_encoder(wanted, inputs), pairs, wanted)


def whole_runs(repeats: int = 2) -> dict[str, float]:
    """Recipe -> seconds of a whole training, relative to bidirectional."""
    kinds: dict[str, tuple[str, Any]] = {
        "bidirectional": ("bidirectional", None),
        "two_pass": ("ggsm", Guidance(warm_steps=WARM, estimator="two_pass")),
        "previous_step": ("ggsm", Guidance(warm_steps=WARM, estimator="previous_step")),
    }
    seconds = {name: np.full((repeats, STEPS), np.inf) for name in kinds}
    for repeat in range(repeats):
        trainers = {name: trainer(*kind) for name, kind in kinds.items()}
        for step in range(STEPS):  # step by step in turns
            for name, each in trainers.items():
                begin = time.perf_counter()
                each.train_step()
                seconds[name][repeat, step] = time.perf_counter() - begin
    least = {name: float(each.min(0).sum()) for name, each in seconds.items()}
    return {name: round(value / least["bidirectional"], 3) for name, value in least.items()}


def model() -> LlamaModel:
    """Blocks of SmolLM2's sizes."""
    torch.manual_seed(0)
    return LlamaModel(
        LlamaConfig(vocab_size=512, num_hidden_layers=LAYERS, attn_implementation="sdpa", **SMOLLM2)
    )


def mask_cost(repeats: int = 6) -> dict[str, float]:
    """Mask -> seconds of forward and backward at L = 512, relative to plain causal attention."""
    decoder = model()
    inputs = torch.randn(BATCH, LENGTH, SMOLLM2["hidden_size"])
    valid = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    history = torch.arange(LENGTH).expand(BATCH, LENGTH) < LENGTH - 16

    def both(visibility: Callable[[], torch.Tensor] | None) -> Callable[[], None]:
        def call() -> None:
            bias = None if visibility is None else masks.additive_bias(visibility(), valid)
            states = decoder(inputs_embeds=inputs, attention_mask=bias, use_cache=False).last_hidden_state
            states[:, -1].square().sum().backward()
            decoder.zero_grad()

        return call

    weights = torch.rand(BATCH, LENGTH)
    least = report.interleaved(
        {
            "plain causal": both(None),
            "causal": both(lambda: masks.causal(valid)),
            "bidirectional": both(lambda: masks.bidirectional(valid)),
            "ggsm": both(lambda: weights),
            "hybrid_segment": both(lambda: masks.segment(history)),
        },
        repeats,
    )
    return {name: round(value / least["plain causal"], 3) for name, value in least.items()}


def padding() -> dict[str, float]:
    """Share of tokens that are padding, of all probe users, in batches by length and as they come."""
    users = Sequences.load(runs.ensure(PROFILE, "tokens").folder, "probe_users")
    lengths = users.lengths()

    def waste(batches: list[np.ndarray]) -> float:
        padded = sum(len(rows) * int(lengths[rows].max()) for rows in batches)
        return round(1 - float(lengths.sum()) / padded, 4)

    as_they_come = np.array_split(np.arange(len(lengths)), -(-len(lengths) // 256))
    return {"by length": waste(batches_by_length(lengths, 256)), "as they come": waste(as_they_come)}


@torch.inference_mode()
def matmul_share(repeats: int = 8) -> dict[str, float]:
    """The forward pass's multiplications a second over those of plain matrix products of its size."""
    decoder = model().eval()
    hidden, inner = SMOLLM2["hidden_size"], SMOLLM2["intermediate_size"]
    tokens = BATCH * LENGTH
    inputs = torch.randn(BATCH, LENGTH, hidden)
    bias = masks.additive_bias(
        masks.bidirectional(torch.ones(BATCH, LENGTH)), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    )
    weights = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, nn.Linear))
    attention = 2 * LAYERS * LENGTH * hidden  # scores and mixtures of one query over all keys
    operations = 2.0 * tokens * (weights + attention)
    left, right = torch.randn(tokens, hidden), torch.randn(hidden, inner)
    least = report.interleaved(
        {
            "forward": lambda: decoder(inputs_embeds=inputs, attention_mask=bias, use_cache=False),
            "matmul": lambda: [left @ right for _ in range(8)],
        },
        repeats,
    )
    rates = {
        "forward": operations / least["forward"],
        "matmul": 8 * 2.0 * tokens * hidden * inner / least["matmul"],
    }
    return {
        "forward_gflops": round(rates["forward"] / 1e9, 1),
        "matmul_gflops": round(rates["matmul"] / 1e9, 1),
        "share": round(rates["forward"] / rates["matmul"], 3),
    }


if __name__ == "__main__":
    report.write(
        "encoder",
        {
            "threads": torch.get_num_threads(),
            "whole run over bidirectional": whole_runs(),
            "forward and backward over plain causal, L = 512": mask_cost(),
            "padding": padding(),
            "forward pass": matmul_share(),
        },
    )
