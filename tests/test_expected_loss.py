"""A short loss curve of two recipes, stored: a change of the loop that changes the numbers shows here.

After a change that is meant to: ``python tests/test_expected_loss.py`` writes tests/expected_loss.json anew.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import fleet
import pytest
import torch
from accelerate.state import AcceleratorState

STORED = Path(__file__).with_name("expected_loss.json")
STEPS = 12
TOLERANCE = 1e-3
"""Relative: other processors and builds of torch round otherwise; a changed algorithm moves it by more."""


def curve(recipe: str) -> list[float]:
    """Losses of the first steps on the tiny corpus, in float64 and with dropout."""
    options = {"warm_steps": 4} if recipe == "ggsm" else {}
    with tempfile.TemporaryDirectory() as name:
        of = fleet.trainer(
            fleet.corpus(Path(name)),
            fleet.settings(recipe, total_steps=STEPS, learning_rate=1e-2, **options),
            torch.float64,
        )
    losses = [of.train_step()["loss"] for _ in range(STEPS)]
    AcceleratorState._reset_state(True)
    return losses


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("recipe", ["causal", "ggsm"])
def test_the_loss_curve_is_the_stored_one(recipe: str) -> None:
    assert curve(recipe) == pytest.approx(json.loads(STORED.read_text())[recipe], rel=TOLERANCE)


def test_the_tolerance_tells_the_recipes_apart() -> None:
    """Negative control: each recipe's stored curve fails as the other's."""
    stored = json.loads(STORED.read_text())
    assert stored["causal"] != pytest.approx(stored["ggsm"], rel=10 * TOLERANCE)


if __name__ == "__main__":
    STORED.write_text(json.dumps({name: curve(name) for name in ("causal", "ggsm")}, indent=1) + "\n")
