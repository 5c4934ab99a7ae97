"""Real processes, each a rank of a gloo group, and what they compute on the tiny corpus.

They fork from a server that has imported the libraries and computed nothing, so a rank starts in no time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ggsm_core import batches, recipes, sections, towers, training

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["fleet"])
LONG = 20


def settings(recipe: str = "ggsm", *, lora: bool = False, seed: int = 0, **more: Any) -> SimpleNamespace:
    """What the stage contrast sees of a profile. ``more``: of training, objective or the recipe."""

    def those(section: type[sections.Section]) -> dict[str, Any]:
        return {name: value for name, value in more.items() if name in section.model_fields}

    section = recipes.RECIPES[recipe].section
    schedule = {"total_steps": LONG, "batch_size": 7, "learning_rate": 1e-3, "checkpoint_every": 2}
    schedule["max_grad_norm"] = 1e6  # clipping would hide a gradient of the wrong size
    return SimpleNamespace(
        recipe=recipe,
        seed=seed,
        options=section(**those(section)),
        training=sections.Training(**(schedule | those(sections.Training))),
        objective=sections.Objective(**({"temperature": 0.5} | those(sections.Objective))),
        backbone=sections.Backbone(),
        data=sections.Data(),
        template=sections.Template(max_user_tokens=tiny.LONGEST),
        lora=sections.Lora(rank=2, alpha=2, dropout=0.2) if lora else None,
    )


def corpus(folder: Path) -> dict[str, Path]:
    """Finished runs of tokens, texts and pretrain, with a decoder that drops."""
    inputs = tiny.corpus(folder) | {"pretrain": folder / "pretrain"}
    tiny.decoder(layers=2, attention_dropout=0.2).save_pretrained(inputs["pretrain"])
    tiny.tokenizer().save_pretrained(inputs["pretrain"])
    return inputs


def trainer(inputs: dict[str, Path], given: SimpleNamespace, dtype: torch.dtype) -> training.Trainer:
    """Before its first step, in ``dtype``."""
    pairs = batches.Pairs(inputs["tokens"], inputs["texts"], given.training.batch_size, given.seed)
    return training.Trainer(towers.build_encoder(given, inputs).to(dtype), pairs, given)


def gradients_and_weights(
    inputs: dict[str, Path], given: SimpleNamespace, dtype: torch.dtype, steps: int, out: Path
) -> None:
    """Train; every rank writes its losses, the gradients of the first step and the final state."""
    of = trainer(inputs, given, dtype)
    found: dict[str, Tensor] = {}
    losses = []
    for step in range(steps):
        losses.append(of.train_step()["loss"])
        if step == 0:
            found = {
                f"gradient.{k}": p.grad.clone()
                for k, p in of.encoder.named_parameters()
                if p.grad is not None
            }
    found |= {f"weight.{k}": v for k, v in of.encoder.trained_state().items()}
    found["losses"] = torch.tensor(losses, dtype=torch.float64)
    save_file({k: v.contiguous() for k, v in found.items()}, out / f"rank-{of.accelerator.process_index}")


def without_others_terms(*arguments: Any) -> None:
    """Negative control, a gather without gradient: what the other rows' losses say of ours is lost."""
    objective = training.Trainer._objective

    def own_rows(self: training.Trainer, *given: Any) -> Any:
        training.split = lambda rows, size: [self.shares.own]  # type: ignore[attr-defined]
        self._check_loss = lambda loss, batch: None  # type: ignore[method-assign]
        return objective(self, *given)

    training.Trainer._objective = own_rows  # type: ignore[method-assign]
    gradients_and_weights(*arguments)


def without_scaling(*arguments: Any) -> None:
    """Negative control: the loss isn't multiplied by the number of processes that DDP averages over."""
    backward = training.Accelerator.backward
    training.Accelerator.backward = lambda self, loss: backward(self, loss / self.num_processes)
    gradients_and_weights(*arguments)


def ranks(out: Path) -> list[dict[str, Tensor]]:
    """What each rank wrote."""
    return [load_file(path) for path in sorted(out.glob("rank-*"))]


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(world: int, function: Callable[..., None], *arguments: Any) -> list[Any]:
    """Start ``function`` in ``world`` ranks."""
    port = free_port()
    processes = [
        CONTEXT.Process(target=_rank, args=(rank, world, port, function, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def together(world: int, function: Callable[..., None], *arguments: Any) -> None:
    """``start``, and wait; every rank must end well."""
    processes = start(world, function, *arguments)
    for process in processes:
        process.join(180)
    assert [process.exitcode for process in processes] == [0] * world


def _rank(rank: int, world: int, port: int, function: Callable[..., None], arguments: Any) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    os.environ["ACCELERATE_USE_CPU"] = "true"
    function(*arguments)


def run(inputs: dict[str, Path], given: SimpleNamespace, out: Path, pause: str | None = None) -> None:
    """The stage, as a launcher's process runs it; rank and step of ``pause`` ("1:3") hang."""
    step = training.Trainer.train_step

    def hang(self: training.Trainer) -> dict[str, Any]:
        if pause == f"{self.accelerator.process_index}:{self.step}":
            (out / "hangs").touch()
            signal.pause()
        return step(self)

    training.Trainer.train_step = hang  # type: ignore[method-assign]
    try:
        training.run(given, inputs, out, lambda done, total, message: None)
    except ValueError as problem:
        (out / f"problem-{os.environ.get('RANK', '0')}").write_text(f"{type(problem).__name__}: {problem}")
        raise SystemExit(3) from problem
