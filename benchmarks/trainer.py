"""Our trainer beside sentence-transformers', two processes beside one, and what checkpoints cost.

    python benchmarks/trainer.py

The decoder of profile quick, the same made-up pairs as the same tokens, causal mask, float32, AdamW, one
thread; each measurement in a process of its own, in turns. Goals, in pairs a second: 1.15 times the cached
loss at batch 512 in micro-batches of 32; 1.0 times the plain one at batch 64; both with no more memory; two
processes 1.5 times one. Checkpoints, as often as quick has them, take at most 1 % of a run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import report
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerFast

from ggsm_core import (
    batches,
    checkpoints,
    export,
    order,
    params,
    provenance,
    runs,
    telemetry,
    template,
    tokens,
    towers,
    training,
)

PROFILE = "params/quick.yaml"
WORK = {  # batch, micro-batch (0: none), steps of each of two epochs
    "cached": (512, 32, 3),
    "whole": (64, 0, 15),
    "profile": (128, 0, 8),
}
TURNS = 3


def made_up(folder: Path, count: int) -> list[tuple[str, str]]:
    """Write ``count`` pairs as tokens for our trainer; returns the same as texts for another."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(runs.ensure(PROFILE, "pretrain").folder)
    words = json.loads((runs.ensure(PROFILE, "texts").folder / "texts.json").read_text(encoding="utf-8"))
    draw = np.random.default_rng(0)
    users = [
        template.User({"bill": [template.Record(text) for text in draw.choice(words, draw.integers(1, 4))]})
        for _ in range(count)
    ]
    said = [", ".join(draw.choice(words, draw.integers(1, 4))) for _ in range(count)]
    longest = limits().max_user_tokens
    encoded = [
        template.encode_user(user, tokenizer, modality_input="text", max_tokens=longest) for user in users
    ]
    tokens.write(folder, "train_users", encoded)
    answers = [template.encode_answer(text, tokenizer, max_tokens=longest) for text in said]
    tokens.write(folder, "train_answers", answers)
    row = pl.arange(count, eager=True)
    pairs = pl.DataFrame({"sample": row, "granularity": ["visits"] * count, "answer_id": row, "user_id": row})
    pairs.write_parquet(folder / "pairs.parquet")
    order.save_indexes(folder, pairs, np.array([len(one.input_ids) for one in encoded]))
    (folder / "texts.json").write_text("[]")
    save_file({"features": np.zeros((1, 1), np.float32)}, folder / "texts.safetensors")
    return [
        (export.text_of(user, tokenizer, max_tokens=longest), export.answer_text(text))
        for user, text in zip(users, said, strict=True)
    ]


def limits() -> Any:
    """The template section: everything is text, and nothing is cut."""
    return params.load(PROFILE).template.model_copy(update={"modality_input": "text", "max_user_tokens": 256})


class Clock:
    """Seconds of a step, and the peak memory, also above what was there before the first."""

    def __init__(self) -> None:
        self.before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        self.ends: list[float] = []

    def tick(self) -> None:
        """A step has ended."""
        self.ends.append(time.perf_counter())

    @property
    def step(self) -> float:
        """The mean of the second epoch, which has the same pairs whoever deals them into batches."""
        half = len(self.ends) // 2
        return (self.ends[-1] - self.ends[half - 1]) / half

    def found(self, batch: int) -> dict[str, float]:
        """What was measured."""
        peak = provenance.peak_memory()
        return {
            "pairs_per_second": round(batch / self.step, 1),
            "peak_mib": round(peak / 2**20, 1),
            "peak_above_model_mib": round((peak - self.before) / 2**20, 1),
        }


def settings(batch: int, micro_batch: int, steps: int) -> SimpleNamespace:
    """What stage contrast sees of the profile."""
    loaded = params.load(PROFILE)
    changed = {"batch_size": batch, "micro_batch": micro_batch or None, "total_steps": 2 * steps}
    given = SimpleNamespace(**dict(loaded), recipe="causal", options=loaded.recipes.causal, seed=0)
    given.training = loaded.training.model_copy(update=changed)
    given.template = limits()
    return given


def ours(folder: Path, batch: int, micro_batch: int, steps: int) -> dict[str, float]:
    """Our loop with its log, in every process of a launch; and what share of it checkpoints would be."""
    made_up(folder, batch * steps)
    given = settings(batch, micro_batch, steps)
    pairs = batches.Pairs(folder, folder, batch, given.seed)
    trainer = training.Trainer(towers.build_encoder(given, inputs_in(folder)), pairs, given)
    log, clock = telemetry.Log(folder, 0), Clock()
    for _ in range(2 * steps):
        log.write(trainer.train_step())
        clock.tick()
    found = clock.found(batch)
    store = checkpoints.Store(folder / "checkpoints", given.training.keep_checkpoints, trainer.identity())
    begin = time.perf_counter()
    store.save(steps, trainer.state())
    seconds = time.perf_counter() - begin
    return found | {"checkpoints": round(seconds / (given.training.checkpoint_every * clock.step), 5)}


def theirs(folder: Path, batch: int, micro_batch: int, steps: int) -> dict[str, float]:
    """sentence-transformers' own loop, from our weights."""
    import datasets
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
    from sentence_transformers.sentence_transformer import losses
    from transformers import TrainerCallback

    texts = made_up(folder, batch * steps)
    given = settings(batch, micro_batch, steps)
    towers.build_encoder(given, inputs_in(folder)).save(folder / "saved")
    export.export(folder / "saved", folder / "exported")
    model = SentenceTransformer(str(folder / "exported"), device="cpu")
    kind = losses.CachedMultipleNegativesRankingLoss if micro_batch else losses.MultipleNegativesRankingLoss
    loss = kind(model, **({"mini_batch_size": micro_batch} if micro_batch else {}))
    anchors, positives = zip(*texts, strict=True)
    clocks = []

    class Watch(TrainerCallback):
        def on_train_begin(self, *_: Any, **more: Any) -> None:
            clocks.append(Clock())

        def on_step_end(self, *_: Any, **more: Any) -> None:
            clocks[0].tick()

    SentenceTransformerTrainer(
        model,
        Arguments(
            str(folder / "out"), per_device_train_batch_size=batch, max_steps=2 * steps, use_cpu=True,
            learning_rate=given.training.learning_rate, save_strategy="no", report_to="none",
        ),
        datasets.Dataset.from_dict({"anchor": anchors, "positive": positives}),
        loss=loss,
        callbacks=[Watch()],
    ).train()  # fmt: skip
    return clocks[0].found(batch)


def inputs_in(folder: Path) -> dict[str, Path]:
    """What stage contrast reads."""
    return {"tokens": folder, "texts": folder, "pretrain": runs.ensure(PROFILE, "pretrain").folder}


def measured(who: str, work: str, processes: int = 1) -> dict[str, float]:
    """``who`` doing ``work``, in new processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), __file__, "--one", who, work]
    given = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | given, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"pairs')))


def best(all_of: list[dict[str, float]]) -> dict[str, float]:
    """Of several turns: the most pairs a second, the least memory, the smallest share."""
    return {
        name: (max if name == "pairs_per_second" else min)(one[name] for one in all_of) for name in all_of[0]
    }


def main() -> None:
    """Measure in turns, report."""
    found: dict[str, Any] = {}
    kinds: dict[str, Any] = {
        "cached": {"ours": ("ours", "cached"), "sentence-transformers": ("theirs", "cached")},
        "whole": {"ours": ("ours", "whole"), "sentence-transformers": ("theirs", "whole")},
        "profile": {"one process": ("ours", "profile"), "two processes": ("ours", "profile", 2)},
    }
    for work, who in kinds.items():
        turns = [{name: measured(*asked) for name, asked in who.items()} for _ in range(TURNS)]
        each = {name: best([turn[name] for turn in turns]) for name in who}
        first, second = each.values()
        ratio = first["pairs_per_second"] / second["pairs_per_second"]
        batch, micro_batch, _ = WORK[work]
        found[work] = {"batch": batch, "micro_batch": micro_batch} | each
        if work == "profile":
            found[work] |= {"two processes over one": round(1 / ratio, 3)}
        else:
            memory = {name: round(first[name] / second[name], 3) for name in first if "mib" in name}
            found[work] |= {"ours over theirs": {"pairs_per_second": round(ratio, 3)} | memory}
    report.write("trainer", found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args().one
    if asked:
        with tempfile.TemporaryDirectory() as name:
            found = {"ours": ours, "theirs": theirs}[asked[0]](Path(name), *WORK[asked[1]])
        sys.stdout.write(json.dumps(found) + "\n")  # one write: two processes share the pipe
    else:
        main()
