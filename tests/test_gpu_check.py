"""Whether a profile fits: the rules against machines as plain data, the looking on this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from ggsm_core import backbone, cost, gpu_check, jobs, params, provenance, runs, sections, stages
from ggsm_core.gpu_check import Gpu, Machine

PARAMS = Path(__file__).resolve().parents[1] / "params"
GPU = params.load(PARAMS / "gpu.yaml")
BIG = Gpu("big", 80e9, True)


def problems(profile: params.Profile, machine: Machine, processes: int | None = None) -> dict[str, str]:
    return {line.about: line.text for line in gpu_check.checks(profile, machine, processes) if not line.good}


def with_training(**changes: Any) -> params.Profile:
    return GPU.model_copy(update={"training": GPU.training.model_copy(update=changes)})


def test_the_gpu_profile_fits_what_it_was_made_for() -> None:
    assert not problems(GPU, Machine((BIG,)))
    assert not problems(GPU, Machine((BIG,) * 3))  # shares of a batch may differ by one
    lines = [str(line) for line in gpu_check.checks(GPU, Machine((BIG,)))]
    assert all(line.startswith("ok ") for line in lines)
    assert {"gpu", "processes", "batch", "precision", "weights", "mask", "memory"} == {
        line.split()[1] for line in lines
    }


def test_without_a_gpu_it_says_so() -> None:
    assert problems(GPU, Machine(())).keys() == {"gpu"}
    assert "nvidia-smi" in problems(GPU, Machine(()))["gpu"]


def test_each_problem_is_told_with_its_mend() -> None:
    assert problems(GPU, Machine((BIG,), weights="no weights")) == {"weights": "no weights"}
    assert problems(GPU, Machine((BIG,), mask="deaf")) == {"mask": "deaf"}
    assert problems(GPU, Machine((BIG,)), processes=2) == {"processes": "2 on 1 GPU(s); start at most 1"}
    old = Gpu("old", 80e9, False)
    assert problems(GPU, Machine((BIG, old))) == {
        "precision": "old can't compute it; set training.precision: fp32"
    }
    assert not problems(GPU, Machine((BIG, old)), processes=1)
    assert not problems(with_training(precision="fp32", micro_batch=16), Machine((old,)))
    assert "start fewer" in problems(with_training(batch_size=2), Machine((BIG,) * 3))["batch"]
    assert problems(GPU, Machine((BIG, Gpu("taken", 1e9, True)))).keys() == {"memory"}
    hub = GPU.model_copy(update={"backbone": GPU.backbone.model_copy(update={"path": "some/body"})})
    assert "can't be told" in problems(hub, Machine((BIG,)))["memory"]
    assert not problems(hub, Machine((BIG,), config=cost.QWEN_05B))


def test_memory_is_that_of_the_neediest_row() -> None:
    larger = {"wide": {"recipe": "causal", "training": {"batch_size": 4096, "micro_batch": None}}}
    changed = params.Profile.model_validate(GPU.model_dump() | {"variants": larger})
    assert "4096 pairs of wide at a time" in problems(changed, Machine((BIG,)))["memory"]
    none = GPU.model_copy(update={"recipes": params.Recipes(**dict.fromkeys(params.RECIPE_NAMES))})
    assert "no row of this profile is trained" in problems(none, Machine((BIG,)))["memory"]


@given(free=st.floats(1e9, 100e9), processes=st.integers(1, 8))
def test_memory_is_what_the_cost_model_says_and_its_mend_mends(free: float, processes: int) -> None:
    whole = with_training(micro_batch=None)
    machine = Machine((Gpu("some", free, True),) * processes)
    work = cost.Work.of(whole, "causal")
    rows = -(-whole.training.batch_size // processes)
    found = problems(whole, machine).get("memory")
    assert (found is None) == (work.states(processes) + rows * work.kept <= cost.ROOM * free)
    if found and "micro_batch" in found:
        fitting = int(found.rpartition(" ")[2])
        assert fitting < rows
        assert not problems(with_training(micro_batch=fitting), machine)
        assert "memory" in problems(with_training(micro_batch=fitting + 1), machine)
    elif found:
        assert "memory" in problems(with_training(micro_batch=1), machine) and "LoRA" in found


def test_weights_are_looked_for_where_they_should_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> str | None:
        return gpu_check.missing_weights(sections.Backbone(kind="pretrained", path=path))

    assert gpu_check.missing_weights(sections.Backbone()) is None
    assert missing(str(tmp_path)) == f"{tmp_path}: lacks config.json, tokenizer, weights"
    tiny.decoder().save_pretrained(tmp_path)
    assert missing(str(tmp_path)) == f"{tmp_path}: lacks tokenizer"
    tiny.tokenizer().save_pretrained(tmp_path)
    assert missing(str(tmp_path)) is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for nowhere in ("no/such-decoder", str(tmp_path / "absent")):
        assert "give the folder in backbone.path" in (missing(nowhere) or "")


@pytest.mark.parametrize("half", [False, True])
def test_the_mask_is_tried_on_the_device(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_check.mask_problem("sdpa", "cpu", half=half) is None
    assert gpu_check.mask_problem("eager", "cpu", half=half) is None
    honest = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, attn_mask=None, **more: honest(*args, **more),  # a kernel that drops its mask
    )
    assert "does not honour" in (gpu_check.mask_problem("sdpa", "cpu", half=half) or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_the_command_on_a_machine_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_check.main(["--profile", str(PARAMS / "quick.yaml")]) == 1
    told = capsys.readouterr().out.splitlines()
    assert [line for line in told if line.startswith("PROBLEM")] == [told[0]] and "none" in told[0]
    assert gpu_check.main(["--profile", str(tmp_path / "no.yaml")]) == 1
    assert "no such profile" in capsys.readouterr().err


def test_a_real_decoder_in_a_folder_is_told_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``look`` finds it: the configuration of the folder decides, not the one that the name stands for.

    A relative folder is the project's, wherever one stands: for this check, the costs and the run itself.
    """
    tiny.decoder().save_pretrained(tmp_path / "mine")
    tiny.tokenizer().save_pretrained(tmp_path / "mine")
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    own = GPU.model_copy(update={"backbone": sections.Backbone(kind="pretrained", path="mine")})
    seen = gpu_check.look(own)
    assert cost._decoder(own, None).hidden == tiny.HIDDEN
    assert backbone.load_pretrained(own.backbone)[0].config.hidden_size == tiny.HIDDEN
    assert seen.weights is None and seen.config.hidden_size == tiny.HIDDEN
    assert not problems(own, Machine((Gpu("small", 2e9, True),), config=seen.config))


@pytest.mark.parametrize("there", [True, False])
def test_a_run_that_uses_the_gpu_has_it_to_itself(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is checked is the memory of one run."""
    monkeypatch.setattr(provenance, "has_gpu", lambda: there)
    monkeypatch.setenv("GGSM_WORKERS", "4")
    profile = GPU.model_copy(update={"baselines": ["minilm"]})
    plan = stages.Plan(stages.GRAPH, profile, runs.Store(tmp_path))
    threads = {job.title: job.threads for job in jobs.missing_jobs(plan, plan.all())}
    wide = {title for title, number in threads.items() if number == 4}
    uses = {node.title for node in plan.all() if node.stage.name in ("contrast", "embed", "text")}
    assert wide == (uses if there else set())
