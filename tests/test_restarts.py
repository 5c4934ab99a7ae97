"""Checkpoints, and runs that are cut off: killed, hung, out of disk, in another run's folder."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fleet
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor

from ggsm_core import batches, checkpoints, rendezvous, telemetry, training

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
IDENTITY = {"recipe": "ggsm", "vocabulary": "abc"}


@pytest.fixture(scope="module", autouse=True)
def warm_server() -> None:
    """The server that ranks fork from finds the tests' own modules."""
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return fleet.corpus(tmp_path_factory.mktemp("corpus"))


def state(value: float, size: int = 4) -> dict[str, Tensor]:
    return {"w": torch.full((size,), value), "step": torch.tensor(int(value))}


# One store --------------------------------------------------------------------------------------------------


def test_the_last_k_are_kept_and_an_abandoned_folder_is_cleared(tmp_path: Path) -> None:
    store = checkpoints.Store(tmp_path, 2, IDENTITY)
    assert store.latest() is None
    (tmp_path / ".partial-1").mkdir(parents=True)
    for step in (1, 2, 3):
        store.save(step, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-3"]
    latest = store.latest()
    assert latest is not None and int(latest["step"]) == 3


def test_a_folder_set_aside_is_no_checkpoint(tmp_path: Path) -> None:
    store = checkpoints.Store(tmp_path, 1, IDENTITY)
    store.save(1, state(1))
    for name in ("step-20.old", "step-", "step-2 (copy)"):
        (tmp_path / name).mkdir()
    store.save(2, state(2))
    latest = store.latest()
    assert latest is not None and int(latest["step"]) == 2
    assert (tmp_path / "step-20.old").is_dir() and not (tmp_path / "step-1").exists()


@pytest.mark.parametrize("damage", ["cut", "bit", "no manifest", "half a manifest", "no list", "empty"])
def test_a_torn_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    store = checkpoints.Store(tmp_path, 2, IDENTITY)
    for step in (1, 2):
        store.save(step, state(step))
    weights, manifest = (tmp_path / "step-2" / name for name in ("state.safetensors", "manifest.json"))
    content = weights.read_bytes()
    if damage == "cut":
        weights.write_bytes(content[:-3])
    elif damage == "bit":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:20])
    elif damage == "no list":
        manifest.write_text(json.dumps({"identity": IDENTITY, "files": {}}))
    else:
        weights.unlink()
    latest = store.latest()
    assert latest is not None and int(latest["step"]) == 1
    assert "step-2: torn" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["recipe", "vocabulary"])
def test_another_run_s_checkpoint_is_refused_and_stays(tmp_path: Path, name: str) -> None:
    checkpoints.Store(tmp_path, 1, IDENTITY).save(1, state(1))
    other = checkpoints.Store(tmp_path, 1, IDENTITY | {name: "other"})
    with pytest.raises(checkpoints.CheckpointError, match=rf"step-1: of another run \({name} .*'other'"):
        other.latest()
    assert (tmp_path / "step-1" / "state.safetensors").is_file()


def test_a_full_disk_is_named_and_costs_nothing(tmp_path: Path) -> None:
    """A real file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        store = checkpoints.Store(disk / "checkpoints", 2, IDENTITY)
        store.save(1, state(1))
        with pytest.raises(checkpoints.CheckpointError, match=r"step-2: can't be written.*space.*step-1"):
            store.save(2, state(2, 10**6))
        assert [path.name for path in store.folder.iterdir()] == ["step-1"]
        latest = store.latest()
        assert latest is not None and int(latest["step"]) == 1
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_refuses_another_recipe_s_checkpoints(corpus: dict[str, Path], tmp_path: Path) -> None:
    of = fleet.trainer(corpus, fleet.settings("causal"), torch.float32)
    checkpoints.Store(tmp_path / "checkpoints", 1, of.identity()).save(1, of.state())
    with pytest.raises(checkpoints.CheckpointError, match="recipe 'causal', here 'bidirectional'"):
        training.run(fleet.settings("bidirectional"), corpus, tmp_path, lambda *a: None)


# What a run tells -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are poisoned at step 1; the samples named are those of that batch."""
    step = training.Trainer.train_step

    def poisoned(self: training.Trainer) -> dict[str, Any]:
        if self.step == 1:
            with torch.no_grad():
                next(self.encoder.parameters()).fill_(torch.nan)
        return step(self)

    monkeypatch.setattr(training.Trainer, "train_step", poisoned)
    with pytest.raises(training.Diverged, match=r"step 1: .*not finite.*diverged/rank-0"):
        training.run(fleet.settings("causal"), corpus, tmp_path, lambda *a: None)
    folder = tmp_path / "diverged" / "rank-0"
    told = json.loads((folder / "batch.json").read_text())
    rows = batches.Pairs(corpus["tokens"], corpus["texts"], 7, 0).rows(1)
    assert told["step"] == 1 and told["samples"] == [int(row) // 2 for row in rows]
    assert len(load_file(folder / "batch.safetensors")["user.input_ids"]) == 7


@pytest.mark.usefixtures("fresh_accelerator")
def test_an_exploding_loss_stops_before_the_update(corpus: dict[str, Path]) -> None:
    of = fleet.trainer(corpus, fleet.settings("causal"), torch.float32)
    before = {k: v.clone() for k, v in of.encoder.state_dict().items()}
    of._check_loss(5.5, 7)  # as pre-trained; log(21) + 2 / tau is above
    with pytest.raises(training.Diverged, match=r"step 0: loss nan is not below 7.045"):
        of._check_loss(math.nan, 7)
    of.step = of.params.training.total_steps - 1
    of._check_loss(2.0 + 3.0, 7)  # log(21) + 1 / tau is just above
    with pytest.raises(training.Diverged, match=r"loss 5.5 is not below 5.045"):
        of._check_loss(5.5, 7)
    assert all(torch.equal(v, before[k]) for k, v in of.encoder.state_dict().items())


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_run_tells_lines_board_and_trace(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("GGSM_PROFILE_TRACE", str(tmp_path / "trace"))
    training.run(fleet.settings("ggsm", total_steps=6, warm_steps=2), corpus, tmp_path, lambda *a: None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    wanted = {
        "loss", "positive", "negative", "true_negatives", "gradient_norm", "visibility", "guidance_spread",
        "tokens_per_second", "mfu", "peak_memory_mib",
    }  # fmt: skip
    assert all(wanted <= line.keys() and line["mfu"] > 0 for line in lines)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert wanted <= set(board.Tags()["scalars"])
    shown = [event.value for event in board.Scalars("loss")]
    assert shown == pytest.approx([line["loss"] for line in lines])
    assert "traceEvents" in json.loads((tmp_path / "trace" / "rank-0.json").read_text())


def test_the_log_goes_on_after_the_resumed_step(tmp_path: Path) -> None:
    first = telemetry.Log(tmp_path, 0)
    for step in range(4):
        first.write({"step": step, "loss": 1.0})
    first.close()
    second = telemetry.Log(tmp_path, 2)
    second.write({"step": 2, "loss": 2.0})
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 1.0), (1, 1.0), (2, 2.0)]


# Cut off ----------------------------------------------------------------------------------------------------


def final(out: Path) -> dict[str, Tensor]:
    return load_file(out / "encoder.safetensors")


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[k].nan_to_num(), v.nan_to_num()) for k, v in expected.items()
    )


@pytest.mark.slow
def test_a_run_killed_twenty_times_is_the_undisturbed_one(corpus: dict[str, Path], tmp_path: Path) -> None:
    """kill -9 at random moments, five of them while a checkpoint is being written."""
    given = fleet.settings("ggsm", total_steps=150, warm_steps=20, freeze="tower", checkpoint_every=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    fleet.together(1, fleet.run, corpus, given, whole)
    draw = random.Random(0)
    for kill in range(20):
        (process,) = fleet.start(1, fleet.run, corpus, given, cut)
        seen = set((cut / "checkpoints").glob("step-*"))
        deadline = time.monotonic() + 60
        while set((cut / "checkpoints").glob("step-*")) <= seen and time.monotonic() < deadline:
            time.sleep(0.002)
        if kill % 4 == 0:
            while not list((cut / "checkpoints").glob(".partial-*")) and time.monotonic() < deadline:
                pass
        else:
            time.sleep(draw.random() * 0.1)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    fleet.together(1, fleet.run, corpus, given, cut)
    assert same(final(cut), final(whole))


@pytest.mark.slow
def test_a_hung_process_ends_the_run_in_time_and_another_number_goes_on(
    corpus: dict[str, Path], tmp_path: Path
) -> None:
    """Of two, one hangs at step 3; the other says so. One process then ends the run as one would have."""
    # A step of Adam is of the size of the learning rate, and so is what rounding makes of it.
    given = fleet.settings("causal", total_steps=6, learning_rate=1e-4, timeout_seconds=5)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    fleet.together(1, fleet.run, corpus, given, whole)
    first, second = fleet.start(2, fleet.run, corpus, given, cut, "1:3")
    first.join(60)
    assert first.exitcode == 3
    assert "timeout_seconds = 5" in (cut / "problem-0").read_text()
    second.kill()
    second.join()
    fleet.together(1, fleet.run, corpus, given, cut)
    found, expected = final(cut), final(whole)
    worst = max(float((found[k].double() - v.double()).abs().max()) for k, v in expected.items())
    assert worst <= 1e-5


def test_an_unreachable_rendezvous_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(fleet.free_port())),
                        ("RANK", "1"), ("WORLD_SIZE", "2"), ("GGSM_RENDEZVOUS_SECONDS", "1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(rendezvous.NoRendezvous, match=r"process 1 of 2 did not meet.*127\.0\.0\.1"):
        rendezvous.gate()
