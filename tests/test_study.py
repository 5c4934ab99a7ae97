"""Computing a part of the evidence, and publishing what is whole."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from toygraph import Toy, small

from ggsm_core import params, provenance, study
from ggsm_core.params import Profile
from ggsm_core.stages import Plan, UnknownRun

ROOT = Path(__file__).resolve().parents[1]


def three() -> list[Profile]:
    return [params.load(ROOT / "params" / f"{name}.yaml") for name in study.evidence.PROFILES]


def rows_and_seeds(toy: Toy, profile: Profile, only: study.Only) -> list[str]:
    plan = Plan(toy.graph, profile, toy.plan().store, only)
    return [node.label for node in plan.of_stage("probe")]


def test_rows_are_found_where_they_first_stand(toy: Toy) -> None:
    """ggsm belongs to the study, though other profiles have it too; a control to its own profile."""
    (first, keep), (second, keep_too) = study.part(three(), ["ggsm_constant", "ggsm"], [1, 3])
    assert (first.name, second.name) == ("study", "controls")
    assert rows_and_seeds(toy, first, keep) == ["probe-ggsm-s1", "probe-ggsm-s3"]
    assert rows_and_seeds(toy, second, keep_too) == ["probe-ggsm_constant-s1", "probe-ggsm_constant-s3"]
    ((profile, every),) = study.part(three()[:1], [], [0])
    assert len(rows_and_seeds(toy, profile, every)) == 9 and every("handmade", None)


def test_a_row_or_seed_that_nobody_planned_is_named() -> None:
    with pytest.raises(UnknownRun, match=r"recipes: 'ggsmm' is a row of none of study, study_new_users"):
        study.part(three(), ["ggsm", "ggsmm"], [])
    with pytest.raises(UnknownRun, match=r"seeds: 7 is not planned; the seeds are \[0, 1, 2, 3, 4\]"):
        study.part(three(), ["ggsm"], [0, 7])


@pytest.fixture
def project(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.setattr(provenance, "ROOT", toy.folder)
    monkeypatch.setattr(study, "GRAPH", toy.graph)
    monkeypatch.setenv("GGSM_RUNS", str(toy.folder / "runs"))
    return toy


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--finished", "--seeds", "0"], "--finished"),
        (["--recipes", ","], "--recipes: ',' names nothing"),
        (["--recipes", ""], "--recipes: '' names nothing"),
        (["--seeds", "0,,1"], "--seeds: '0,,1' names nothing"),
        (["--profiles", ""], "--profiles: '' names nothing"),
    ],
)
def test_an_order_that_contradicts_itself_computes_nothing(
    given: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main(["--profiles", "study", *given]) == 1
    assert words in capsys.readouterr().err


def test_what_is_whole_is_published_and_nothing_else_is_computed(project: Toy) -> None:
    profile = small(name="study", seeds=[0, 1])
    with pytest.raises(UnknownRun, match="no row is computed yet; `make study`"):
        study.finished(profile)
    seen = study.again(profile, study.part([profile], ["ggsm"], [1])[0][1], project.lines.append)
    assert seen.rows() == [("ggsm", 1, 0.7, None)]
    runs = sorted(path.name for path in (project.folder / "runs").glob("contrast-*"))
    study.publish(profile, study.finished(profile), project.lines.append)
    assert sorted(path.name for path in (project.folder / "runs").glob("contrast-*")) == runs
    folder = project.folder / "results" / "study"
    assert [line.split(",")[:2] for line in (folder / "auc.csv").read_text().splitlines()[1:]] == [
        ["ggsm", "1"]
    ]
    told = json.loads((folder / "provenance.json").read_text())
    assert [(run["stage"], run["row"], run["seed"]) for run in told["runs"] if run["row"]] == [
        ("contrast", "ggsm", 1),
        ("probe", "ggsm", 1),
    ]
    assert told["tables"]["auc.csv"] == provenance.sha256(folder / "auc.csv")


def test_an_encoder_that_is_gone_is_made_again_or_its_row_left_out(project: Toy) -> None:
    """The tables tell what training did, so a score alone is not enough."""
    profile = small(name="study", seeds=[0, 1])
    study.publish(profile, say=project.lines.append)
    gone = next((project.folder / "runs").glob("contrast-ggsm-s1-*"))
    shutil.rmtree(gone)
    only = study.finished(profile)
    assert only("ggsm", 0) and not only("ggsm", 1) and only("causal", 1)
    study.publish(profile, only, project.lines.append)
    assert not gone.exists()
    study.publish(profile, say=project.lines.append)
    assert gone.exists()


def test_leaving_rows_out_changes_no_run(project: Toy) -> None:
    """What is computed in part is what the whole needs."""
    profile = small(seeds=[0, 1])
    whole = {node.name for node in project.plan(profile).all()}
    part = Plan(project.graph, profile, project.plan().store, lambda row, seed: (row, seed) == ("ggsm", 0))
    names = {node.name for node in part.all() if node.stage.name != "compare"}
    assert len(names) == 3 and names < whole


def test_make_study_takes_rows_and_seeds() -> None:
    line = ["make", "-n", "-o", "install", "study", "RECIPES=ggsm,causal", "SEEDS=0"]
    told = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "ggsm_core.study --recipes ggsm,causal --seeds 0" in told
