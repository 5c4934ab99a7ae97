"""The cost model against what torch counts and keeps, and what it says of the paper's run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, Qwen2Config, Qwen2Model

from ggsm_core import cost, masks, params, sections, telemetry
from ggsm_core.model import _with_lora

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
PARAMS = Path(__file__).resolve().parents[1] / "params"
SHAPES = [(64, 160, 4, 2, 2), (48, 128, 3, 3, 3)]
USER, ANSWER, ROWS = 44, 20, 4
TOLERANCE = 0.05
"""Of operations and of kept bytes."""


def case(shape: tuple[int, ...], rank: int | None, half: bool = False, attention: str = "eager") -> Any:
    """A decoder of this shape, and the work of training it."""
    hidden, inner, heads, groups, layers = shape
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        attn_implementation=attention,  # type: ignore[call-arg]
    )
    lora = sections.Lora(rank=rank, alpha=1) if rank else None
    model: Any = Qwen2Model(config)
    model = model if lora is None else _with_lora(model, lora, [1])
    work = cost.Work(cost.Decoder.of(config), lora, 0, 0, (USER, ANSWER), ROWS, 10, 5, half)
    return model, work


def towers(model: Any, half: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Sum of both towers' states, and what entered the first block."""
    found, entered = torch.zeros(()), []
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        for length in (USER, ANSWER):
            valid = torch.ones(ROWS, length, dtype=torch.bool)
            kind = torch.bfloat16 if half else torch.float32
            bias = masks.additive_bias(masks.bidirectional(valid), valid, kind)
            embeddings = torch.randn(ROWS, length, model.config.hidden_size, requires_grad=True)
            entered.append(embeddings.clone())
            states = model(inputs_embeds=entered[-1], attention_mask=bias, use_cache=False)
            found = found + states.last_hidden_state.float().sum()
    return found, entered


def counted(action: Callable[[], Any]) -> int:
    """Operations, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [None, 8])
def test_operations_are_those_that_torch_counts(shape: tuple[int, ...], rank: int | None) -> None:
    model, work = case(shape, rank)
    assert counted(lambda: towers(model)) == pytest.approx(ROWS * work.forward, rel=TOLERANCE)
    assert counted(lambda: towers(model)[0].backward()) == pytest.approx(ROWS * work.train, rel=TOLERANCE)
    probe = counted(lambda: torch.autograd.grad(*towers(model)))
    assert probe == pytest.approx(ROWS * work.probe, rel=TOLERANCE)
    assert work.forward < work.probe < work.train


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("half", [False, True])
def test_kept_bytes_are_those_that_autograd_keeps(
    shape: tuple[int, ...], rank: int | None, half: bool
) -> None:
    """Each distinct storage once; parameters aside, and autocast's copies of them."""
    model, work = case(shape, rank, half, "sdpa")
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        copy = tensor.dtype is torch.bfloat16 and tuple(tensor.shape) in shapes
        if tensor.untyped_storage().data_ptr() not in own and not copy:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _ = towers(model, half)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert measured == pytest.approx(ROWS * work.kept, rel=TOLERANCE)


@pytest.mark.parametrize("rank", [None, 8])
def test_parameters_are_the_decoders(rank: int | None) -> None:
    model, work = case(SHAPES[0], rank)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert work.trained == pytest.approx(trained, rel=TOLERANCE)
    assert work.parameters == pytest.approx(sum(p.numel() for p in model.parameters()), rel=TOLERANCE)


def test_the_published_decoder_has_its_published_size() -> None:
    """0.49 B parameters, 0.36 B of them outside the embeddings."""
    decoder = cost.Decoder.of(cost.QWEN_05B)
    assert round(decoder.parameters / 1e9, 2) == 0.49 and round(decoder.matrices / 1e9, 2) == 0.36


def test_what_the_paper_profile_needs() -> None:
    """One GPU caches its batch, 64 hold it; more GPUs, a better one or a better use are faster."""
    work = cost.Work.of(params.load(PARAMS / "paper.yaml"), "ggsm")
    need = {n: cost.estimate(work, cost.A100, n) for n in (1, 8, 64)}
    assert need[1].cached and not need[64].cached and need[64].rows == 2048 // 64
    assert all(found.memory < 80e9 and (2048 // n) % found.rows == 0 for n, found in need.items())
    assert need[1].hours > 7 * need[8].hours > 49 * need[64].hours
    assert cost.estimate(work, cost.A100, 1, mfu=0.2).hours == pytest.approx(2 * need[1].hours)
    assert cost.estimate(work, cost.H100, 8).hours < need[8].hours
    causal = cost.Work.of(params.load(PARAMS / "paper.yaml"), "causal")
    probes = need[1].hours / cost.estimate(causal, cost.A100, 1).hours
    assert 1.03 < probes < 1.1  # a tenth of all steps probes
    sharded = cost.estimate(work, cost.A100, 64, sharded=True)
    assert sharded.memory < need[64].memory and sharded.hours > need[64].hours


def test_what_cannot_be_told_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    quick = params.load(PARAMS / "quick.yaml")
    work = cost.Work.of(quick, "ggsm")
    for devices, mfu, words in (
        (0, 0.4, "devices: 0"),
        (-2, 0.4, "devices: -2"),
        (1, 0.0, "mfu"),
        (1, -3.0, "mfu"),
    ):
        with pytest.raises(cost.CostError, match=words):
            cost.estimate(work, cost.A100, devices, mfu=mfu)
    with pytest.raises(cost.CostError, match="devices: 3 can't share a batch of 128"):
        cost.estimate(work, cost.A100, 3)
    with pytest.raises(cost.CostError, match=r"small.*leave no room.*LoRA"):
        cost.estimate(work, cost.Device("small", 1e12, 1e6, 1e9), 1)
    with pytest.raises(cost.CostError, match="nobody"):
        cost.Work.of(quick, "nobody")
    with pytest.raises(cost.CostError, match="smollm2"):
        cost.Work.of(params.load(PARAMS / "smollm2.yaml"), "ggsm")
    assert cost.main(["--profile", str(PARAMS / "paper.yaml")]) == 0
    assert "64 x H100" in capsys.readouterr().out
    assert cost.main(["--profile", str(PARAMS / "paper.yaml"), "--devices", "3"]) == 1
    assert "devices: 3" in capsys.readouterr().err


def test_a_micro_batch_limits_what_is_in_memory() -> None:
    work = cost.Work.of(params.load(PARAMS / "paper.yaml"), "ggsm")
    whole = replace(work, micro_batch=None)
    few, all_ = cost.estimate(work, cost.A100, 64), cost.estimate(whole, cost.A100, 64)
    assert work.micro_batch == 64 and few.rows == all_.rows == 32
    small = cost.estimate(replace(work, micro_batch=8), cost.A100, 64)
    assert small.rows == 8 and small.cached and small.memory < few.memory
    # Cached, a step costs a forward pass more, and a step that probes two.
    share, peak = 2048 // 64, cost.MFU * cost.A100.peak_flops
    more = share * work.forward * (1 + work.probes / work.steps) / peak
    assert small.step_seconds - few.step_seconds == pytest.approx(more)


def test_a_frozen_tower_is_a_second_set_of_weights() -> None:
    paper = params.load(PARAMS / "paper.yaml")
    plain = cost.Work.of(paper, "ggsm")
    guided = sections.Guidance(warm_steps=10, freeze="tower")
    tower = paper.model_copy(update={"recipes": paper.recipes.model_copy(update={"ggsm": guided})})
    assert cost.Work.of(tower, "ggsm").states() - plain.states() == 4 * plain.parameters


@pytest.mark.parametrize("rank", [None, 8])
def test_the_use_that_a_run_logs_is_the_one_that_is_asked_for(rank: int | None) -> None:
    """``--mfu`` of the cost and ``mfu`` of a log count the same operations."""
    model, work = case(SHAPES[0], rank)
    tokens = ROWS * (USER + ANSWER)
    logged = telemetry.training_flops(model, model.config, tokens, (USER + ANSWER) / 2)
    assert logged == pytest.approx(ROWS * work.train, rel=0.1)


def test_an_unknown_kind_of_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(cost.CostError, match=r"config\.json.*'intermediate_size'"):
        cost.Decoder.of(GPT2Config())
    (tmp_path / "config.json").write_text("{")
    own = params.load(PARAMS / "paper.yaml")
    damaged = own.model_copy(update={"backbone": own.backbone.model_copy(update={"path": str(tmp_path)})})
    with pytest.raises(cost.CostError, match=r"backbone\.path"):
        cost.Work.of(damaged, "ggsm")
