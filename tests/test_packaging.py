"""The wheel: what it carries, and what of it imports where no extra is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ggsm_core

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = {
    "papermill": {"ggsm_core.execute"},
    "openai": {f"ggsm_core.synthesis.{name}" for name in ("client", "questions", "rules", "server", "steps")},
    "faiss": {"ggsm_core.synthesis.scenarios"},
}
"""Import name -> the modules that can't do without it."""
IMPORT_ALL = """
import importlib, json, pkgutil, sys
from importlib.machinery import PathFinder

absent = set(json.loads(sys.argv[1]))


class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Without
import ggsm_core

failed, imported = {}, []
for module in pkgutil.walk_packages(ggsm_core.__path__, "ggsm_core."):
    try:
        importlib.import_module(module.name)
        imported.append(module.name)
    except ModuleNotFoundError as problem:
        failed.setdefault(problem.name, []).append(module.name)

from importlib.metadata import version
from ggsm_core.data import made_up
from ggsm_core.synthesis import prompts

assert prompts.text("plain_words") and made_up.FILE.is_file()
told = {"file": ggsm_core.__file__, "version": version("ggsm-core"), "failed": failed, "imported": imported}
print(json.dumps(told))
"""


def behind(requirements: Iterable[str], found: set[str]) -> set[str]:
    """Names of ``requirements`` and of all that these need in turn, added to ``found``."""
    for requirement in map(Requirement, requirements):
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and name not in found:
            found.add(name)
            behind(requires(name) or [], found)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, since setuptools builds beside them."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "ggsm_core", folder / "ggsm_core", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--no-build-isolation", "--no-index", "-w", folder / "out", folder]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = (folder / "out").glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_carries_every_file_of_the_package(wheel: Path) -> None:
    carried = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("ggsm_core/")}
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ggsm_core").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert carried == files
    assert "ggsm_core/py.typed" in carried and any(name.endswith(".txt") for name in carried)


@pytest.mark.slow
def test_it_imports_without_the_extras(wheel: Path, tmp_path: Path) -> None:
    """All modules but those that an extra is for. Extras stay installed here, but no import finds them."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)  # a wheel of Python alone is installed by unpacking it
    listed = [one for extra in PROJECT["optional-dependencies"].values() for one in extra]
    extras = {canonicalize_name(Requirement(one).name) for one in listed} - behind(
        PROJECT["dependencies"], set()
    )
    owned = packages_distributions().items()
    absent = [name for name, owners in owned if extras & {canonicalize_name(one) for one in owners}]
    assert {*NEEDED, "IPython", "ray", "playwright"} <= {*absent}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, json.dumps(absent)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert Path(told["file"]).is_relative_to(site) and told["version"] == ggsm_core.__version__
    assert {name: {*modules} for name, modules in told["failed"].items()} == NEEDED
    assert len(told["imported"]) > 60
