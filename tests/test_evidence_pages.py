"""The pages of the evidence, executed on made-up tables: whole, and with whatever rows are published."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import polars as pl
import published
import pytest

from ggsm_core import planted, provenance
from ggsm_core.sections import Guidance

matplotlib.use("agg")
PAGES = ("11_does_the_gradient_matter", "15_the_study", "16_claims", "17_earns_its_place")
FEW = {
    "study": {"causal": 1, "bidirectional": 1, "ggsm": 2, "handmade": 1},
    "controls": {"ggsm": 2, "ggsm_embeddings_rank": 1, "ggsm_random": 1},
    "ablation": {
        "bidirectional": 1,
        "ggsm": 2,
        "ggsm_embeddings_rank": 1,
        "ggsm_layer0_none": 1,
    },
    "schedule": {"bidirectional": 1, "ggsm": 2, "ggsm_warm_25": 1},
}
LEAST = {
    "study": {"causal": 1, "bidirectional": 1, "ggsm": 1},
    "controls": {"ggsm": 1},
    "ablation": {"bidirectional": 1, "ggsm": 1},
    "schedule": {"bidirectional": 1, "ggsm": 1},
}
WHOLE = (
    *("study", "study_new_users", "controls", "ablation"),
    *("attempts", "study_wide", "study_full", "study_long", "study_centred", "study_asked"),
    *("study_asked_visits", "study_asked_offers"),
    *("study_answers", "study_anchors", "study_tuned", "schedule"),
)


whole = planted.experiment


@cache
def short(options: Guidance, *, steps: int = 41, users: int = 4) -> pl.DataFrame:
    return whole(options, steps=steps, users=min(users, 4))


@pytest.fixture(autouse=True)
def quick_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted experiment has tests of its own; here a page needs numbers from it, not minutes."""
    monkeypatch.setattr(planted, "experiment", short)


def execute(name: str, root: Path, rows: Mapping[str, Mapping[str, int]], monkeypatch: Any) -> dict[str, str]:
    """The page's code cells in order, in this process: what each cell's last line shows, by its id."""
    for profile, seeds in rows.items():
        published.publish(root, profile, seeds, lead={"ggsm_embeddings_rank": 0.02, "handmade": 0.03})
    (root / "params").symlink_to(published.ROOT / "params")
    monkeypatch.setattr(provenance, "ROOT", root)
    monkeypatch.chdir(root)  # the page changes it too: back to where it was afterwards
    content = json.loads((published.ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    space: dict[str, Any] = {}
    shown = {}
    for cell in content["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell["id"], "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), cell["id"], "eval"), space)
            shown[cell["id"].removeprefix(name.replace("_", "-") + "-")] = text_of(value)
    return shown


def text_of(value: Any) -> str:
    """Of a table its HTML, of prose its Markdown, of a figure its kind."""
    return str(getattr(value, "html", getattr(value, "data", type(value).__name__)))


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("rows", ["whole", "few", "least"])
def test_a_page_shows_what_there_is(
    name: str, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {profile: published.rows_of(profile) for profile in WHOLE}
    shown = execute(name, tmp_path, {"whole": whole, "few": FEW, "least": LEAST}[rows], monkeypatch)
    first = next(iter(shown.values()))
    assert ("none is missing" in first) == (rows == "whole")
    assert rows == "whole" or "missing: " in first
    assert "learned" in shown and "nan" not in shown["learned"].lower()


def test_the_verdict_comes_from_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that leads by 0.02 is supported; take one control away and it is only not shown."""
    rows = {profile: published.rows_of(profile) for profile in ("controls", "schedule", "ablation")}
    shown = execute(PAGES[0], tmp_path, rows, monkeypatch)
    assert "**That the gradient matters: supported.**" in shown["verdict"]
    assert "better 5, worse 0" in shown["verdict"]
    del rows["controls"]["ggsm_random"]
    (tmp_path / "less").mkdir()
    shown = execute(PAGES[0], tmp_path / "less", rows, monkeypatch)
    assert "**That the gradient matters: not shown.**" in shown["verdict"]
    assert "missing: ggsm_random." in shown["verdict"]


def test_claims_are_named_as_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = execute("16_claims", tmp_path, LEAST, monkeypatch)
    assert "results/study_new_users: not published yet." in shown["audit"]
    assert "results/study_new_users is not published" in shown["claims"]
    assert "one seed has no spread" in shown["claims"] or "are not in results/study" in shown["claims"]


def test_each_task_is_read_with_the_query_that_fits_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From three tables; of their mean the hand-made features' lead of 0.03 shows."""
    asked = ("study_asked", "study_asked_visits", "study_asked_offers")
    shown = execute(
        PAGES[3], tmp_path, {name: published.rows_of(name) for name in ("study", *asked)}, monkeypatch
    )
    lines = [line for line in shown["asked"].split("<tr") if "study_asked" in line]
    assert [sum(f">{name}<" in line for line in lines) for name in asked] == [5, 2, 2]
    assert all("redeem_known" in line or "mailer_share_hi" in line for line in lines if asked[2] in line)
    assert "on the mean of nine: minus `handmade` \N{MINUS SIGN}0.03" in shown["learned"]
