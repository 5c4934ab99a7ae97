"""A graph of tiny stages in a package of its own, to try the run cache without computing anything real."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ggsm_core.jobs import run_missing
from ggsm_core.params import RECIPE_NAMES, Profile
from ggsm_core.runs import Run, Store
from ggsm_core.stages import Graph, Node, Plan

SOURCES = {
    "__init__.py": "",
    "shared.py": "def double(x):\n    return 2 * x\n",
    "windows.py": """
from pathlib import Path
SOURCE = Path(__file__).parent.parent / "events.txt"
def run(params, inputs, out, progress):
    progress(1, 1, "read")
    (out / "windows.txt").write_text(f"{SOURCE.read_text()} {params.data.households}")
""",
    "contrast.py": """
import json
from pathlib import Path
def run(params, inputs, out, progress):
    from toy.shared import double
    behaviour = Path(__file__).parent.parent / "behaviour.py"
    if behaviour.exists():
        exec(behaviour.read_text())
    with (out / "metrics.jsonl").open("a") as file:
        measured = {"true_negatives": 3.0, "positive": 0.9, "negative": 0.1}
        file.write(json.dumps({"step": 1, "loss": float(double(params.seed))} | measured) + "\\n")
    read = (inputs["windows"] / "windows.txt").read_text()
    (out / "weights.txt").write_text(f"{params.recipe} {params.options} {read}")
    print("trained")
""",
    "probe.py": """
def run(params, inputs, out, progress):
    text = (inputs["contrast"] / "weights.txt").read_text() if "contrast" in inputs else "untrained"
    (out / "auc.csv").write_text(f"{params.recipe},{params.seed},mean,0.7,0.6,0.8,{text}\\n")
""",
    "compare.py": """
def run(params, inputs, out, progress):
    rows = [(folder / "auc.csv").read_text() for name, folder in sorted(inputs.items())]
    (out / "auc.csv").write_text("recipe,seed,task,auc,ci_low,ci_high,note\\n" + "".join(rows))
    for name in ("differences", "rows", "covariance"):
        (out / f"{name}.csv").write_text(",".join(sorted(inputs)))
    (out / "labels.csv").write_text("recipe,seed,task,share,auc,households\\n")
""",
    "graph.py": """
from pathlib import Path
from ggsm_core.stages import Graph, Stage
def sources(stage, profile):
    return [Path(__file__).parent.parent / "events.txt"] if stage.name == "windows" else []
STAGES = (
    Stage("windows", "toy.windows", ("data",), threads=2),
    Stage("contrast", "toy.contrast", ("training",), ("windows",), per="recipe", options=True, resumes=True),
    Stage("probe", "toy.probe", ("evaluation",), ("contrast",), per="recipe", baselines=("oracle",)),
    Stage("compare", "toy.compare", (), ("probe",)),
)
GRAPH = Graph({stage.name: stage for stage in STAGES}, Path(__file__).parent, sources, "toy.graph:GRAPH")
""",
}


@dataclass
class Toy:
    """The package's folder, and plans over it."""

    folder: Path  # holds events.txt, behaviour.py and toy/
    lines: list[str]

    @property
    def graph(self) -> Graph:
        graph: Graph = importlib.import_module("toy.graph").GRAPH
        return graph

    def plan(self, profile: Profile | None = None) -> Plan:
        return Plan(self.graph, profile or small(), Store(self.folder / "runs"))

    def compute(self, plan: Plan, *nodes: Node) -> list[Run]:
        run_missing(plan, nodes or plan.all(), self.lines.append)
        return [Run(plan.store.folder(node.name)) for node in nodes or plan.all()]

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.folder / "toy" / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def behave(self, code: str) -> None:
        """Run this inside stage contrast. No id covers it: to interrupt and break, not to change results."""
        (self.folder / "behaviour.py").write_text(code)


def small(**changes: object) -> Profile:
    """A profile with two recipes, a seed, and the decoder before training."""
    raw: dict[str, object] = {
        "name": "toy",
        "recipes": dict.fromkeys(set(RECIPE_NAMES) - {"causal", "ggsm"}),
        "baselines": ["oracle"],
    }
    return Profile.model_validate(raw | changes)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    (tmp_path / "toy").mkdir()
    for name, source in SOURCES.items():
        (tmp_path / "toy" / name).write_text(source)
    (tmp_path / "events.txt").write_text("events")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("GGSM_WORKERS", "2")
    yield Toy(tmp_path, [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy"]:
        del sys.modules[name]
