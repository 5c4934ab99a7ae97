"""Two processes, started by launch/fsdp2.yaml: DDP, then FSDP2, then FSDP2 from DDP's checkpoint, as JSON.

accelerate turns to FSDP2 on accelerators alone. On the CPU it is told that it has; the rest is its own path.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import test_training
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor
from torch.distributed.tensor import DTensor

from ggsm_core import training

CASES: dict[str, dict[str, Any]] = {
    "ggsm": {"recipe": "ggsm"},
    "previous_step": {"recipe": "ggsm", "estimator": "previous_step", "freeze": "segment"},
    "lora": {"recipe": "hybrid_gq", "lora": True},
}
STOP = 3


def trainer(kind: DistributedType, inputs: dict[str, Path], case: dict[str, Any]) -> training.Trainer:
    """A trainer whose accelerator is of this kind."""
    AcceleratorState._reset_state()
    PartialState(cpu=True).distributed_type = kind
    Accelerator(mixed_precision="no")
    if kind is DistributedType.FSDP:
        AcceleratorState().fsdp_plugin = FullyShardedDataParallelPlugin()  # as launch/fsdp2.yaml says
    return test_training.trainer(inputs, test_training.settings(**case))


def losses(of: training.Trainer, steps: int) -> list[float]:
    """The losses of the next steps."""
    return [of.train_step()["loss"] for _ in range(steps)]


def copied(of: training.Trainer) -> dict[str, Tensor]:
    """Its checkpoint, as a file would hold it."""
    return {name: tensor.detach().clone() for name, tensor in of.state().items()}


def main(folder: Path) -> None:
    """Run all cases; the first process writes ``found.json``."""
    inputs = {name: folder / name for name in ("tokens", "texts", "pretrain")}
    rest = test_training.TOTAL - STOP
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        whole = trainer(DistributedType.MULTI_CPU, inputs, case)
        ddp, checkpoint = losses(whole, STOP), copied(whole)
        ddp += losses(whole, rest)
        sharded = trainer(DistributedType.FSDP, inputs, case)
        fsdp, own = losses(sharded, STOP), copied(sharded)
        fsdp += losses(sharded, rest)
        checkpoints_apart = apart(checkpoint, own)  # before it is resumed from, which takes its tensors over
        resumed = trainer(DistributedType.FSDP, inputs, case)
        resumed.load_state(checkpoint)
        again, state = losses(resumed, rest), sharded.encoder.trained_state()
        if PartialState().is_main_process:
            sharded.encoder.save(folder / name, state)
        found[name] = {
            "ddp": ddp,
            "fsdp": fsdp,
            "resumed": again,
            "spread": sum(isinstance(p, DTensor) for p in sharded.encoder.parameters()),
            "checkpoints_apart": checkpoints_apart,
            "encoders_apart": apart(whole.encoder.trained_state(), state),
        }
    if PartialState().is_main_process:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference between two states of equal names and shapes, the state of random numbers aside."""
    assert one.keys() == other.keys()
    return max(
        float((one[k].double().nan_to_num() - other[k].double().nan_to_num()).abs().max()) for k in one
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
