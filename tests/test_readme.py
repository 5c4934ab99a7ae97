"""What the README prints is run as it is printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

from ggsm_core import evidence, params, verdicts

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ten_lines_embed_and_probe(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    code = (
        code.replace('Path("users.parquet")', "OUT")
        .replace('"users.parquet"', "OUT")
        .replace("quick", "smoke")
    )
    code = f"from pathlib import Path\nOUT = Path({str(tmp_path / 'users.parquet')!r})\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"GGSM_WORKERS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"AUC ([\d.]+) \[([\d.]+), ([\d.]+)\], n = (\d+)", done.stdout)
    assert found, done.stdout
    auc, low, high, n = map(float, found.groups())
    assert 0.5 < low < auc < high < 1 and n > 100


def test_every_make_target_named_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"(?:`|^|\| )make ([a-z][a-z-]*)", README, re.M))
    assert len(named) > 5 and named <= targets


def test_what_it_says_of_the_study_is_in_the_tables() -> None:
    """The numbers and verdicts under the picture."""
    study = evidence.load("study")
    said = [float(number) for number in re.findall(r"\b0\.7\d\d\b", README)]
    masks = [row for row in study.profile.recipes.active if row in study.seeds]
    auc = verdicts.points(study, masks)
    others = verdicts.points(study, ["oracle", "cpc", "handmade"])
    tuned = evidence.load("study_tuned")
    paced = verdicts.points(tuned, masks)
    numbers = (auc.min(), auc.max(), *others, paced.min(), paced.max(), *verdicts.points(tuned, ["cpc"]))
    assert said == [round(float(value), 3) for value in numbers]
    for one in (study, tuned):
        peers = one.has(*params.PEERS)
        assert peers[int(verdicts.points(one, peers).argmax())] == "cpc"
    assert (
        f"with {('', 'one', 'two', 'three', 'four', 'five')[min(study.seeds[m] for m in masks)]} seeds"
        in README
    )
    told = verdicts.gaps(study, list(combinations(masks, 2)))
    assert set(told["verdict"]) == {verdicts.NONE_SHOWN}
    above = verdicts.gaps(study, [("oracle", "bidirectional")])
    assert above["verdict"].to_list() == ["better"]
