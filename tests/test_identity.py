"""What changes a run's id and what does not, on the real graph: no stale result is shown as fresh."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ggsm_core import codehash, params, provenance, sections, stages
from ggsm_core.runs import Store
from ggsm_core.stages import GRAPH, Plan, UnknownRun

PACKAGE = Path(stages.__file__).parent
PER_RECIPE = {"contrast", "embed", "probe"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the package, to be edited."""
    folder = tmp_path / "ggsm_core"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "transactions.parquet"
    path.write_bytes(b"bought")
    return path


@pytest.fixture
def names(source: Path, data: Path, tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Label -> folder name of every run of the quick profile, with some of its fields changed."""

    def sources(stage: stages.Stage, profile: params.Profile) -> list[Path]:
        return [data] if stage.name == "windows" else []

    graph = dataclasses.replace(GRAPH, package=source, sources=sources)

    def plan(**changes: object) -> dict[str, str]:
        raw = params.load(PACKAGE.parent / "params" / "quick.yaml").model_dump(mode="json")
        for path, value in changes.items():
            section = raw
            *parents, last = path.split("__")
            for parent in parents:
                section = section[parent]
            assert last in section
            section[last] = value
        profile = params.Profile.model_validate(raw)
        return {node.label: node.name for node in Plan(graph, profile, Store(tmp_path / "runs")).all()}

    return plan


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {label for label in before if before[label] != after[label]}


def stages_of(labels: set[str]) -> set[str]:
    return {label.split("-")[0] for label in labels}


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def test_a_recipes_parameter_changes_that_recipe_and_the_comparison(
    names: Callable[..., dict[str, str]],
) -> None:
    assert changed(names(), names(recipes__ggsm__normalise="rank")) == {
        "contrast-ggsm-s0", "embed-ggsm-s0", "probe-ggsm-s0", "compare",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "first"),
    [
        ("data__history_days", 60, "windows"),
        ("pairs__facts", 3, "pairs"),
        ("template__bill", 12, "texts"),
        ("backbone__layers", 3, "pretrain"),
        ("pretraining__steps", 7, "pretrain"),
        ("objective__temperature", 0.1, "contrast"),
        ("training__learning_rate", 1e-4, "contrast"),
        ("evaluation__bootstrap", 200, "probe"),
    ],
)
def test_a_sections_field_changes_the_stages_that_declare_it_and_all_behind(
    names: Callable[..., dict[str, str]], field: str, value: object, first: str
) -> None:
    section = field.split("__")[0]
    expected = {stage.name for stage in GRAPH.stages.values() if section in stage.sections}
    assert first in expected
    for stage in GRAPH.stages.values():
        if set(stage.needs) & expected:
            expected.add(stage.name)
    before = names()
    expected &= stages_of(set(before))  # a profile has no run of a stage whose rows it leaves out
    assert stages_of(changed(before, names(**{field: value}))) == expected


def test_what_is_no_part_of_a_run_changes_no_run(names: Callable[..., dict[str, str]]) -> None:
    assert not changed(names(), names(name="other"))
    assert not changed(names(seeds=[0]), names(seeds=[0, 1])) - {"compare"}
    without = names(recipes__hybrid_gq=None)
    assert {label for label in without if names()[label] != without[label]} == {"compare"}


def test_code_behind_a_stage_changes_it(names: Callable[..., dict[str, str]], source: Path) -> None:
    before = names()
    append(source / "masks.py", "\nEXTRA = 1\n")
    after = stages_of(changed(before, names()))
    assert {"contrast", "embed", "probe", "compare"} <= after
    assert not after & {"windows", "pairs", "texts", "baseline"}


def test_a_module_far_behind_a_stage_changes_it(names: Callable[..., dict[str, str]], source: Path) -> None:
    (source / "far.py").write_text("VALUE = 1\n")
    (source / "near.py").write_text("def get():\n    from ggsm_core import far\n    return far.VALUE\n")
    append(source / "evaluation.py", "\nfrom . import near\n")
    before = names()
    (source / "far.py").write_text("VALUE = 2\n")
    assert stages_of(changed(before, names())) == {"probe", "baseline", "compare"}


def test_words_and_formatting_change_nothing(names: Callable[..., dict[str, str]], source: Path) -> None:
    before = names()
    for path in source.rglob("*.py"):
        text = path.read_text()
        path.write_text(text.replace('"""', '"""More words. ', 1) + "\n\n\n# a comment\n")
    assert not changed(before, names())


def test_what_only_a_command_line_runs_changes_nothing(
    names: Callable[..., dict[str, str]], source: Path
) -> None:
    before = names()
    append(
        source / "loss.py",
        '\nif __name__ == "__main__":\n    from ggsm_core import far_away\n    print(far_away)\n',
    )
    assert not changed(before, names())


def test_a_prompt_beside_a_module_changes_what_uses_the_module(
    names: Callable[..., dict[str, str]], source: Path
) -> None:
    before = names()
    (source / "data" / "prompts").mkdir()
    (source / "data" / "prompts" / "ask.txt").write_text("what will they buy?")
    between = names()
    assert "windows" in stages_of(changed(before, between))
    (source / "data" / "prompts" / "ask.txt").write_text("what will they not buy?")
    after = names()
    assert "windows" in stages_of(changed(between, after))
    (source / "data" / ".windows.py.swp").write_text("an editor is open")
    (source / "data" / ".ipynb_checkpoints").mkdir()
    (source / "data" / ".ipynb_checkpoints" / "ask-checkpoint.txt").write_text("what will they buy?")
    assert not changed(after, names())


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("pretrain", {"backbone": sections.Backbone(kind="pretrained", path="mine")}),
        ("text", {"text_models": sections.TextModels(kalm="mine")}),
    ],
)
def test_a_relative_folder_is_the_projects_wherever_a_run_is_planned(
    stage: str, changes: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker that reads it runs in the project's folder."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path / "mine")
    profile = params.Profile(name="mine").model_copy(update=changes)
    assert tmp_path / "mine" / "model.safetensors" in GRAPH.sources(GRAPH.stages[stage], profile)


def test_data_changes_everything(names: Callable[..., dict[str, str]], data: Path) -> None:
    before = names()
    data.write_bytes(b"borrowed")
    assert changed(before, names()) == before.keys() - {"llm"}  # the language model's folder holds no data


def test_same_size_and_later_time_is_read_again(names: Callable[..., dict[str, str]], data: Path) -> None:
    before = names()
    data.write_bytes(b"BOUGHT")
    assert changed(before, names()) == before.keys() - {"llm"}


def test_another_library_version_changes_everything(
    names: Callable[..., dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names()
    versions = provenance.libraries() | {"polars": "0.0.1"}
    monkeypatch.setattr(provenance, "libraries", lambda: versions)
    assert changed(before, names()) == before.keys()


def test_the_oracle_is_read_under_the_causal_mask_and_needs_no_training() -> None:
    plan = Plan(GRAPH, params.load(PACKAGE.parent / "params" / "quick.yaml"), Store())
    node = plan.node("embed", "oracle", 0)
    assert "contrast" not in node.inputs
    assert node.config["recipe"] == "causal"
    assert plan.node("probe", "oracle", 0).config["recipe"] == "oracle"


def test_every_stage_is_read_without_surprises() -> None:
    """Each stage's module is there, and nothing behind it imports what can't be seen by reading."""
    for stage in GRAPH.stages.values():
        assert codehash.closure([stage.module], PACKAGE)


def test_the_machinery_is_behind_no_stage() -> None:
    """Otherwise a better progress line would retrain every model."""
    for stage in GRAPH.stages.values():
        behind = codehash.closure([stage.module], PACKAGE)
        assert not behind.keys() & {
            f"ggsm_core.{name}" for name in ("runs", "stages", "jobs", "worker", "scheduler", "pipeline")
        }


@pytest.mark.parametrize(
    ("stage", "row", "seed", "words"),
    [
        ("contrastt", None, None, ["contrastt", "contrast"]),
        ("contrast", "oracle", None, ["oracle", "causal"]),
        ("windows", None, 1, ["seed", "windows"]),
        ("baseline", "handmaid", None, ["handmaid", "handmade"]),
        ("contrast", "ggsm", -1, ["seed: -1", "4294967295"]),
        ("contrast", "ggsm", 2**32, ["seed: 4294967296", "4294967295"]),
        ("probe", "oracle", 7, ["seed: 7", "oracle", "leave it out"]),
    ],
)
def test_an_unknown_run_is_refused(stage: str, row: str | None, seed: int | None, words: list[str]) -> None:
    plan = Plan(GRAPH, params.load(PACKAGE.parent / "params" / "quick.yaml"), Store())
    with pytest.raises(UnknownRun) as problem:
        plan.node(stage, row, seed)
    assert all(word in str(problem.value) for word in words)


@pytest.mark.parametrize(
    "line",
    [
        "import ggsm_core.loss",
        "from ggsm_core import loss",
        "from ggsm_core.loss import info_nce",
        "def f():\n    from ggsm_core.loss import info_nce",
        "import importlib\nimportlib.import_module('ggsm_core.loss')",
        "try:\n    import ggsm_core.loss as x\nexcept ImportError:\n    pass",
    ],
)
def test_imports_of_every_form_are_seen(line: str) -> None:
    assert "ggsm_core.loss" in codehash.imports(line, "somewhere", PACKAGE)


@pytest.mark.parametrize(
    "line",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ggsm_core import loss",
        "if __name__ == '__main__':\n    from ggsm_core import loss",
        "import losses, torch.nn",
        "'''from ggsm_core import loss'''",
    ],
)
def test_imports_that_do_not_run_are_not(line: str) -> None:
    assert "ggsm_core.loss" not in codehash.imports(line, "somewhere", PACKAGE)


def test_relative_imports(source: Path) -> None:
    (source / "data" / "near.py").write_text("from . import events\nfrom ..loss import info_nce\n")
    found = codehash.closure(["ggsm_core.data.near"], source)
    assert {"ggsm_core", "ggsm_core.data", "ggsm_core.data.events", "ggsm_core.loss"} <= found.keys()


def test_an_import_that_can_not_be_followed_is_refused() -> None:
    with pytest.raises(codehash.UnreadableCode, match="line 2"):
        codehash.imports("import importlib\nimportlib.import_module(name)", "somewhere", PACKAGE)
