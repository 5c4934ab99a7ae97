"""The page on differences names tests that exist; what it says of the others' arithmetic is so."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    line.strip("|\n ").split(" | ")
    for line in (ROOT / "book" / "differences.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith(("| ---", "| point"))
]


def names_in(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_is_held_by_a_test_that_exists(row: list[str]) -> None:
    assert len(row) == 5 and all(row)
    named = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", row[-1])
    assert named
    for path, name in named:
        assert name in names_in(path), f"{path} has no {name}"


def test_the_page_covers_the_points_that_matter() -> None:
    points = {row[0] for row in ROWS}
    assert {
        "Pooling",
        "Read-out token",
        "Same-side negatives",
        "Padding in training",
        "Which state is $h_j$",
        "Negatives across processes",
        "Mask of evaluation",
    } <= points
    assert len(points) == len(ROWS)


def test_a_test_that_is_not_there_would_be_seen() -> None:
    assert "test_nothing_of_the_kind" not in names_in("tests/test_loss.py")


def test_a_mask_of_ones_hides_nothing() -> None:
    """Added to the scores it changes no softmax; a mask that hides padding does."""
    scores = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose((scores + torch.ones(5, 5)).softmax(-1), scores.softmax(-1), atol=1e-6)
    hidden = torch.zeros(5, 5).index_fill(1, torch.tensor([4]), torch.finfo(scores.dtype).min)
    assert not torch.allclose((scores + hidden).softmax(-1), scores.softmax(-1), atol=1e-3)


def test_under_mean_pooling_every_token_has_the_same_gradient() -> None:
    """Negative control: with one token's state as the embedding, all the gradient is there."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 6, 8, generator=draw, requires_grad=True)
    answer = torch.randn(3, 8, generator=draw)
    valid = torch.tensor([[1.0] * 6, [1.0] * 4 + [0.0] * 2, [1.0] * 5 + [0.0]])
    pooled = (hidden * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
    (gradient,) = torch.autograd.grad(cosine_similarity(pooled, answer).sum(), hidden)
    for row, real in zip(gradient.norm(dim=-1), valid.bool(), strict=True):
        assert row[real].std() <= 1e-6 * row[real].mean() and row[real].mean() > 0
        assert (row[~real] == 0).all()
    (last,) = torch.autograd.grad(cosine_similarity(hidden[:, 3], answer).sum(), hidden)
    assert (last.norm(dim=-1) > 0).sum(1).tolist() == [1, 1, 1]
