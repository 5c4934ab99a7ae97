"""Peak memory of one training step: 2,048 pairs in micro-batches of 32 against 32 pairs.

    python benchmarks/micro_batches.py

Each figure comes from a process of its own and counts from after the model, its gradients and its optimizer
exist. Goal: 1.1 times. What grows with the batch B are some B x d embeddings and their gradients; the B x B
product is taken in rows. How they compare with the activations of 32 pairs is a matter of depth, not width:
the decoder has Qwen2.5-0.5B's 24 blocks, and is narrow to be fast.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import numpy as np
import report
import tiny
import torch
from transformers import Qwen2Config, Qwen2Model

from ggsm_core import batches, recipes, sections, towers, training

SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS = 24
GIVES_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_MMAP_MAX_": "1000000",
}
"""glibc keeps much of what is freed; told to give it back, a process holds what its tensors need."""


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measure(batch: int, micro_batch: int | None, recipe: str) -> dict[str, float]:
    """Peak above the model's own [MiB] and pairs a second of a step of ``batch`` pairs."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        inputs = tiny.corpus(Path(name)) | {"pretrain": Path(name) / "pretrain"}
        config = Qwen2Config(vocab_size=len(tiny.tokenizer()), num_hidden_layers=LAYERS, **SHAPE)
        Qwen2Model(config).save_pretrained(inputs["pretrain"])
        tiny.tokenizer().save_pretrained(inputs["pretrain"])
        given = SimpleNamespace(
            recipe=recipe,
            seed=0,
            options=recipes.RECIPES[recipe].section(),
            training=sections.Training(total_steps=10, batch_size=batch, micro_batch=micro_batch),
            objective=sections.Objective(),
            backbone=sections.Backbone(),
            data=sections.Data(),
            template=sections.Template(max_user_tokens=tiny.LONGEST),
            lora=None,
        )
        pairs = batches.Pairs(inputs["tokens"], inputs["texts"], 12, 0)
        pairs.rows = lambda step: np.arange(batch) % 24  # type: ignore[method-assign]
        trainer = training.Trainer(towers.build_encoder(given, inputs), pairs, given)
    for parameter in trainer.encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    base, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    begin = time.perf_counter()
    trainer.train_step()
    seconds = time.perf_counter() - begin
    done.set()
    watcher.join()
    return {"mib": round((peak[0] - base) / 2**20, 1), "pairs_per_second": round(batch / seconds, 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--one", nargs=3, help="batch, micro-batch (0: none), recipe: measured in this process"
    )
    arguments = parser.parse_args()
    if arguments.one:
        batch, micro_batch, recipe = arguments.one
        print(json.dumps(measure(int(batch), int(micro_batch) or None, recipe)))
        sys.exit()
    found = {}
    for recipe in ("causal", "ggsm"):
        two = {}
        for label, one in {"small": ("32", "0"), "large": ("2048", "32")}.items():
            command = [sys.executable, __file__, "--one", *one, recipe]
            given = os.environ | GIVES_BACK
            out = subprocess.run(command, env=given, check=True, capture_output=True, text=True)
            two[label] = json.loads(out.stdout.splitlines()[-1])
        found[recipe] = two | {"ratio": round(two["large"]["mib"] / two["small"]["mib"], 3)}
    report.write("micro_batches", found)
