"""One run, however many processes and micro-batches compute it: real gloo processes, dropout on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fleet
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from ggsm_core import batches, distributed, dropout, gradcache

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CLOSE = {torch.float64: 1e-6, torch.float32: 1e-5}


@pytest.fixture(scope="module", autouse=True)
def warm_server() -> None:
    """The server that ranks fork from finds the tests' own modules."""
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return fleet.corpus(tmp_path_factory.mktemp("corpus"))


def trained(
    corpus: dict[str, Path], tmp_path: Path, world: int, given: Any, dtype: torch.dtype,
    function: Any = fleet.gradients_and_weights,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """What each rank found after 20 steps."""
    out = tmp_path / f"world-{world}-{given.training.micro_batch}"
    out.mkdir()
    fleet.together(world, function, corpus, given, dtype, fleet.LONG, out)
    return fleet.ranks(out)


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor; a tensor that only one has counts as infinite."""
    return {
        name: float((found[name].double() - expected[name].double()).nan_to_num().abs().max())
        if name in found and name in expected
        else float("inf")
        for name in found.keys() | expected.keys()
    }


GUIDED: dict[str, dict[str, Any]] = {
    "two_pass": {"warm_steps": 12, "freeze": "tower"},
    "previous_step": {"warm_steps": 12, "estimator": "previous_step", "normalise": "zscore"},
}
RUNS = [
    ("causal", {}),
    ("bidirectional", {"centre": True}),
    *(("ggsm", options) for options in GUIDED.values()),
]


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("recipe", "options"), RUNS)
def test_any_number_of_processes_computes_the_same_run(
    corpus: dict[str, Path], tmp_path: Path, recipe: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Losses, gradients and weights; 7 pairs, which neither 2 nor 4 share evenly, across epochs of 12."""
    # Adam steps by the learning rate even where a gradient is all rounding; this one is quick's.
    given = fleet.settings(recipe, learning_rate=2e-4, **options)
    (expected,) = trained(corpus, tmp_path, 1, given, dtype)
    for world in (2, 4):
        found = trained(corpus, tmp_path, world, given, dtype)
        assert len(found) == world
        for rank in found:
            assert max(differences(rank, expected).values()) <= CLOSE[dtype]
            assert max(differences(rank, found[0]).values()) == 0  # frozen weights included


def test_micro_batches_on_two_processes_compute_the_same_run(corpus: dict[str, Path], tmp_path: Path) -> None:
    whole = fleet.settings("ggsm", warm_steps=12)
    cached = fleet.settings("ggsm", warm_steps=12, micro_batch=2)
    (expected,) = trained(corpus, tmp_path, 1, whole, torch.float64)
    for rank in trained(corpus, tmp_path, 2, cached, torch.float64):
        assert max(differences(rank, expected).values()) <= 1e-6


@pytest.mark.parametrize("wrong", [fleet.without_others_terms, fleet.without_scaling])
def test_a_wrong_gradient_would_be_seen(corpus: dict[str, Path], tmp_path: Path, wrong: Any) -> None:
    """Negative controls of the tests above."""
    given = fleet.settings("causal")
    (expected,) = trained(corpus, tmp_path, 1, given, torch.float64)
    for rank in trained(corpus, tmp_path, 2, given, torch.float64, wrong):
        found = {k: v for k, v in differences(rank, expected).items() if k.startswith("gradient.")}
        assert max(found.values()) > 1e-3


# Cached gradients -------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerator() -> Any:
    yield
    AcceleratorState._reset_state(True)


CACHED = [
    ("causal", {}),
    ("hybrid_mlp", {}),
    ("hybrid_gq", {"lora": True}),
    ("ggsm", {"lora": True, **GUIDED["two_pass"]}),
    ("ggsm", GUIDED["previous_step"]),
    ("ggsm", {"centre": True, **GUIDED["two_pass"]}),
]


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize(("recipe", "options"), CACHED)
def test_cached_gradients_are_the_uncached_ones(
    corpus: dict[str, Path], tmp_path: Path, recipe: str, options: dict[str, Any]
) -> None:
    """Micro-batches of 3 and of 1 out of 7, with dropout on attention and LoRA, for two steps."""
    found = []
    for micro_batch in (None, 3, 1):
        out = tmp_path / str(micro_batch)
        out.mkdir()
        given = fleet.settings(recipe, micro_batch=micro_batch, **options)
        fleet.gradients_and_weights(corpus, given, torch.float64, 2, out)
        found += fleet.ranks(out)
    assert sum(name.startswith("gradient.") for name in found[0]) > 5
    for cached in found[1:]:
        assert max(differences(cached, found[0]).values()) <= 1e-6


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_second_pass_that_drops_otherwise_would_be_seen(
    corpus: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: random state that isn't replayed."""
    found = []
    by_row, streams = dropout.by_row, iter(range(2, 99))
    for micro_batch in (None, 3):
        out = tmp_path / str(micro_batch)
        out.mkdir()
        fleet.gradients_and_weights(
            corpus, fleet.settings("causal", micro_batch=micro_batch), torch.float64, 1, out
        )
        found += fleet.ranks(out)
        monkeypatch.setattr(dropout, "by_row", lambda a, b, _, rows: by_row(a, b, next(streams), rows))
    assert max(differences(found[1], found[0]).values()) > 1e-3


def test_one_micro_batch_is_encoded_once(corpus: dict[str, Path]) -> None:
    calls: list[int] = []

    class Two:
        embedding = torch.zeros(2, 3)

    def encode(chunk: int) -> Any:
        calls.append(chunk)
        return Two(), Two()

    for chunks, expected in ([0], [0]), ([0, 1], [0, 1, 0, 1]):
        calls.clear()
        passes = gradcache.TwoPasses(encode, chunks)
        passes.first()
        for chunk in chunks:
            passes.second(chunk)
        assert calls == expected


# Dropout by row ---------------------------------------------------------------------------------------------


def dropped(rows: list[int], length: int, p: float = 0.3, step: int = 0) -> Tensor:
    with dropout.by_row(0, step, 0, torch.tensor(rows)):
        return nn.functional.dropout(torch.ones(len(rows), 4, length, length), p)


def test_dropout_depends_on_the_row_and_not_on_its_company_or_padding() -> None:
    whole = dropped([0, 1, 2, 3, 4], 9)
    assert torch.equal(dropped([3, 1], 7), whole[[3, 1], :, :7, :7])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, dropped([0, 1, 2, 3, 4], 9, step=1))


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    """Like Bernoulli draws: the share, and no correlation between neighbours, rows or calls."""
    with dropout.by_row(3, 7, 0, torch.arange(8)):
        first, second = (nn.functional.dropout(torch.ones(8, 4, 64, 64), 0.3) for _ in range(2))
    assert set(first.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.7)}
    sigma = (0.3 * 0.7 / first.numel()) ** 0.5
    assert abs(float((first == 0).double().mean()) - 0.3) < 4 * sigma
    assert abs(float(first.mean()) - 1) < 0.01
    a = (first == 0).double() - 0.3
    b = (second == 0).double() - 0.3
    for left, right in ((a, b), (a[1:], a[:-1]), (a[..., 1:], a[..., :-1]), (a[:, :, 1:], a[:, :, :-1])):
        assert abs(float((left * right).mean())) < 4 * 0.21 / left.numel() ** 0.5


def test_attention_under_row_dropout_is_torch_s_own_where_nothing_is_dropped() -> None:
    """p so small that nothing falls: grouped queries, additive mask."""
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    bias = torch.randn(2, 1, 5, 5)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
    with dropout.by_row(0, 0, 0, torch.arange(2)):
        found = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=1e-12, enable_gqa=True
        )
    torch.testing.assert_close(found, expected)


def test_dropout_on_something_that_has_no_rows_is_refused() -> None:
    with dropout.by_row(0, 0, 0, torch.arange(3)), pytest.raises(dropout.DropoutError, match="3 rows"):
        nn.functional.dropout(torch.ones(2, 5), 0.1)


# Sharing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "world"), [(7, 2), (7, 4), (12, 4), (5, 5), (2048, 64), (3, 1)])
def test_every_row_has_one_process(batch: int, world: int) -> None:
    class Rank:
        num_processes = world

        def __init__(self, rank: int) -> None:
            self.process_index = rank

    own = [distributed.Shares(Rank(rank), batch).own for rank in range(world)]  # type: ignore[arg-type]
    assert [row for part in own for row in range(part.start, part.stop)] == list(range(batch))
    assert max(p.stop - p.start for p in own) - min(p.stop - p.start for p in own) <= 1
    with pytest.raises(distributed.TrainingError, match=f"{batch} pairs are too few for {batch + 1}"):
        Rank.num_processes = batch + 1
        distributed.Shares(Rank(0), batch)  # type: ignore[arg-type]


def test_micro_batches_cover_the_rows() -> None:
    parts = batches.split(slice(3, 10), 3)
    assert np.concatenate([np.arange(p.start, p.stop) for p in parts]).tolist() == list(range(3, 10))
    assert batches.split(slice(3, 10), None) == [slice(3, 10)]


def test_micro_batches_are_cut_in_the_order_of_length() -> None:
    """Each tower by its own, every row once; one micro-batch stays in the order of the pairs."""
    tokens = np.array([9, 1, 5, 2, 7]), np.array([1, 2, 3, 4, 5])  # of pairs 3 to 7

    def lengths(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tokens[0][rows - 3], tokens[1][rows - 3]

    def cut(size: int | None) -> tuple[list[list[int]], list[list[int]]]:
        parts = batches.chunks(slice(3, 8), size, lengths, NotImplemented)
        return [part.users.tolist() for part in parts], [part.answers.tolist() for part in parts]

    assert cut(2) == ([[4, 6], [5, 7], [3]], [[3, 4], [5, 6], [7]])
    assert cut(None) == ([[3, 4, 5, 6, 7]], [[3, 4, 5, 6, 7]])
