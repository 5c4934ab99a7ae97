"""What a training run tells: metrics (JSON lines, TensorBoard), a profiler's trace, the batch it died of.

tensorboard --logdir runs/
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ggsm_core import provenance

TRACED = 3
"""Steps that a trace shows, after two that warm up."""


class Log:
    """``metrics.jsonl`` and the folder ``tensorboard`` of a run, one entry a step."""

    def __init__(self, folder: Path, step: int) -> None:
        """Go on at ``step``; what was written of later steps, before a resume, is cut off."""
        from torch.utils.tensorboard import SummaryWriter  # half a second to import, for training alone

        self._lines = folder / "metrics.jsonl"
        old = self._lines.read_text(encoding="utf-8").splitlines(keepends=True) if step else []
        self._lines.write_text("".join(old[:step]), encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def write(self, metrics: dict[str, Any]) -> None:
        """Add the metrics of one step; lists go to the JSON lines alone."""
        with self._lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        for name, value in metrics.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, metrics["step"])

    def close(self) -> None:
        """Write what TensorBoard still buffers."""
        self._board.close()


def peak_memory_mib(device: torch.device) -> float:
    """The device's peak, or on a CPU the process's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    return round(provenance.peak_memory() / 2**20, 1)


@cache
def matmul_flops(device: torch.device, precision: torch.dtype) -> float:
    """Operations a second of a large matrix product here: the peak that MFU refers to, measured once.

    It is what this machine reaches with its threads, not what a data sheet says.
    """
    size, best = (8192, 0.0) if device.type == "cuda" else (768, 0.0)
    left = torch.ones(size, size, device=device, dtype=precision)
    for _ in range(4):
        begin = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def training_flops(decoder: nn.Module, config: Any, tokens: int, length: float) -> float:
    """Operations of one training pass, forward and backward: 6 N + 12 n_layers d L a token (PaLM, app. B).

    N are the decoder's weights beyond its embedding table, L the mean length; a frozen weight counts 4 times
    and not 6, since it needs no gradient of its own (as in ``cost``). A probe pass and GradCache's first pass
    are not counted, so both lower MFU: they are overhead.
    """
    trained = sum(p.numel() for p in decoder.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in decoder.parameters() if not p.requires_grad)
    table = config.vocab_size * config.hidden_size
    weights = 6 * trained + 4 * frozen - (4 if frozen else 6) * table  # with LoRA the table is frozen too
    return tokens * (weights + 12 * config.num_hidden_layers * config.hidden_size * length)


@contextmanager
def tracing(rank: int) -> Iterator[Any]:
    """Yields ``advance()``, to be called after each step.

    With GGSM_PROFILE_TRACE set (by ``--profile-trace FOLDER``) the profiler writes ``rank-N.json`` of a few
    steps into that folder, for chrome://tracing, Perfetto or TensorBoard.
    """
    folder = os.environ.get(provenance.TRACE)
    if not folder:
        yield lambda: None
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    from torch.profiler import profile, schedule

    with profile(
        schedule=schedule(wait=1, warmup=1, active=TRACED, repeat=1),
        on_trace_ready=lambda found: found.export_chrome_trace(str(Path(folder) / f"rank-{rank}.json")),
    ) as profiler:
        yield profiler.step


def save_batch(folder: Path, tensors: dict[str, Any], description: dict[str, Any]) -> None:
    """Keep a batch for inspection: ``batch.safetensors`` and ``batch.json``.

    ``tensors`` maps a prefix to a dataclass of tensors (``collation.Batch``) or a tensor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flat: dict[str, Tensor] = {}
    for prefix, value in tensors.items():
        if isinstance(value, Tensor):
            flat[prefix] = value
            continue
        for field in dataclasses.fields(value):
            tensor = getattr(value, field.name)
            if isinstance(tensor, Tensor):
                flat[f"{prefix}.{field.name}"] = tensor
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in flat.items()},
              folder / "batch.safetensors")  # fmt: skip
    (folder / "batch.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
