"""The cache of runs: one folder for each result, named by the hash of everything that it depends on.

A run is computed in a partial folder under a lock and takes its name only when it is whole, so a folder
without the word partial is a result. Its ``manifest.json`` tells a damaged one, which is never used.

    from ggsm_core import runs
    run = runs.ensure("params/quick.yaml", "contrast", recipe="ggsm", seed=0)
    run.metrics()
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ggsm_core.provenance import ROOT, named_folder, sha256, write_atomically

if TYPE_CHECKING:
    import polars as pl

    from ggsm_core.params import Profile

MANIFEST = "manifest.json"
READS = "GGSM_READS"
"""Environment variable: a file that names the runs which the executing notebook declared, and no other."""
CONFIG = "run.json"
"""Not config.json: that is a decoder's, where a run saves one."""
SCRATCH = "checkpoints"
"""What an interrupted attempt goes on from: no part of a finished run, and kept until there is one."""
UNCHECKED = {MANIFEST, "log.txt"}  # the log may still grow by what the interpreter says when it ends


class DamagedRun(ValueError):
    """A run's folder is not what was once finished in it."""


class UndeclaredRun(ValueError):
    """A notebook reads a run that its metadata does not declare, so its key would not cover it."""


@dataclass(frozen=True)
class Run:
    """A finished run: its folder holds run.json, provenance.json, log.txt and what the stage wrote."""

    folder: Path

    @property
    def name(self) -> str:
        """``stage[-row[-s<seed>]]-<id>``."""
        return self.folder.name

    @property
    def config(self) -> dict[str, Any]:
        """All that the run depends on; the hash of this is its id."""
        return self._json(CONFIG)

    @property
    def provenance(self) -> dict[str, Any]:
        """Commit, versions, machine, wall time."""
        return self._json("provenance.json")

    def metrics(self) -> pl.DataFrame:
        """What the run logged, one row a step. Raises ``ValueError`` for a stage without steps."""
        import polars as pl

        path = self.folder / "metrics.jsonl"
        if not path.is_file():
            raise ValueError(
                f"{self.name}: a run of stage {self.config['stage']!r} has no steps and logs no metrics"
            )
        return pl.read_ndjson(path)

    def _json(self, name: str) -> dict[str, Any]:
        content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content


class Store:
    """A folder of runs. ``GGSM_RUNS`` puts it elsewhere than ``runs/`` (``provenance.named_folder``)."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = (root or named_folder("GGSM_RUNS", ROOT / "runs")).resolve()

    def folder(self, name: str) -> Path:
        """Where the finished run lies."""
        return self.root / name

    def partial(self, name: str) -> Path:
        """Where the run is computed."""
        return self.root / f".partial-{name}"

    def progress_file(self, name: str) -> Path:
        """Where a run under way says how far it is."""
        return self.root / ".progress" / f"{name}.json"

    def lock(self, name: str) -> FileLock:
        """Held by whoever computes the run; released by the system if that process dies."""
        path = self.root / ".locks" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def find(self, name: str, *, deep: bool = False) -> Run | None:
        """The finished run, or None if there is none. ``deep`` compares contents too, not sizes alone.

        Raises ``DamagedRun``.
        """
        folder = self.folder(name)
        if not folder.exists():
            return None
        problem = _damage(folder, deep)
        if problem:
            raise DamagedRun(f"{name}: {problem}")
        return Run(folder)

    def begin(self, name: str, config: dict[str, Any], *, resume: bool) -> Path:
        """The partial folder, ready to be written to. Call under the lock.

        ``resume`` keeps the files of an interrupted attempt, which has the same config or another name.
        """
        folder = self.partial(name)
        if folder.exists() and not resume:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / CONFIG, json.dumps(config, indent=1))
        return folder

    def finish(self, name: str, provenance: dict[str, Any]) -> Run:
        """Make the partial folder the result. Call under the lock; replaces a damaged folder."""
        partial, folder = self.partial(name), self.folder(name)
        write_atomically(partial / "provenance.json", json.dumps(provenance, indent=1))
        files = [path for path in sorted(partial.rglob("*")) if path.is_file() and path.name not in UNCHECKED]
        manifest = {
            path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in files
            if path.relative_to(partial).parts[0] != SCRATCH
        }
        write_atomically(partial / MANIFEST, json.dumps(manifest, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)  # last: a kill before this costs no checkpoint
        return Run(folder)

    def runs(self) -> list[Run]:
        """Every finished folder, whole or not."""
        return [Run(path) for path in sorted(self.root.glob("[!.]*")) if path.is_dir()]


def _damage(folder: Path, deep: bool) -> str | None:
    try:
        manifest: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"its {MANIFEST} is missing or unreadable"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
        if deep and sha256(path) != expected["sha256"]:
            return f"the content of {name} has changed"
    return None


def ensure(
    profile: Profile | str | Path, stage: str, recipe: str | None = None, seed: int | None = None
) -> Run:
    """The finished run of ``stage`` under ``profile``; computes what is missing, with lines of progress.

    ``recipe`` names the row for a stage that has one (a baseline's name for stage ``baseline``), ``seed``
    defaults to the profile's first. While the book's notebooks execute nothing is computed, and a run that
    the notebook does not declare raises ``UndeclaredRun``.
    """
    from ggsm_core import params, stages
    from ggsm_core.jobs import run_missing

    loaded = params.load(profile) if isinstance(profile, str | Path) else profile
    store = Store()
    plan = stages.Plan(stages.GRAPH, loaded, store)
    node = plan.node(stage, recipe, seed)
    if reads := os.environ.get(READS):
        _declared(node.name, node.title, Path(reads))
        run = store.find(node.name)
        if run is None:
            raise DamagedRun(
                f"{node.title}: its run is gone since the notebook was started; run `make book` again"
            )
        return run
    run_missing(plan, [node])
    run = store.find(node.name)
    assert run is not None, "run_missing computes it or raises"
    return run


def _declared(name: str, title: str, reads: Path) -> None:
    allowed = json.loads(reads.read_text(encoding="utf-8"))
    if name not in allowed["runs"]:
        raise UndeclaredRun(
            f"{allowed['notebook']} reads the run {title!r}, which its metadata does not declare (or code "
            "changed since it was started); name its recipe or baseline in the notebook's metadata, "
            '"ggsm": {"recipes": [...], "baselines": [...]}, so that the page follows that run'
        )
