"""FSDP2 on two gloo processes: DDP's losses, checkpoints that either reads, encoders saved whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import sharded_worker
import tiny
import torch

from ggsm_core import model, sharding, training

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.slow
def test_fsdp2_gives_the_losses_of_ddp(tmp_path: Path) -> None:
    """Every case of the worker; its parameters really are spread."""
    tiny.corpus(tmp_path)
    tiny.decoder(layers=2).save_pretrained(tmp_path / "pretrain")
    tiny.tokenizer().save_pretrained(tmp_path / "pretrain")
    root = Path(__file__).resolve().parents[1]
    settings = {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{root}:{root / 'tests'}",
    }
    config = ["--config_file", str(root / "launch" / "fsdp2.yaml"), "--num_processes", "2"]
    launcher = ["-m", "accelerate.commands.launch", *config, "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *launcher, sharded_worker.__file__, str(tmp_path)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == sharded_worker.CASES.keys()
    for name, case in found.items():
        assert case["spread"] > 10
        assert case["fsdp"] == pytest.approx(case["ddp"], rel=1e-5), name
        assert case["resumed"] == pytest.approx(case["ddp"][sharded_worker.STOP :], rel=1e-5), name
        assert case["checkpoints_apart"] < 1e-4 and case["encoders_apart"] < 1e-4
        base = tmp_path / "pretrain" if name == "lora" else None
        model.UserEncoder.load(tmp_path / name, base=base).embed(tiny.users([2, 3]))


def test_what_is_not_spread_stays_as_it_is() -> None:
    tensor = torch.arange(3.0)
    assert sharding.whole(tensor) is tensor and sharding.spread_like(tensor, torch.ones(3)) is tensor


@pytest.mark.parametrize(("option", "value"), [("freeze", "tower"), ("source", "attention")])
def test_what_needs_the_whole_encoder_is_refused_under_fsdp2(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process has a part of the weights."""
    monkeypatch.setattr(training.Accelerator, "is_fsdp2", True)
    monkeypatch.setattr(training.Accelerator, "prepare", lambda self, *args: args)
    used = tiny.encoder("ggsm", **{option: value})
    params = SimpleNamespace(
        training=sharded_worker.test_training.settings().training, options=used.recipe.options, seed=0
    )
    with pytest.raises(training.TrainingError, match=rf"{option}: {value}.*DDP"):
        training.Trainer(used, None, params)  # type: ignore[arg-type]
