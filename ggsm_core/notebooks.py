"""Execute the book's notebooks, each only when something that it declares or imports has changed.

A notebook's metadata declares the runs that it reads: ``"ggsm": {"recipes": ["ggsm"], "baselines": []}``
(or "all"). It is given a profile that holds those recipes and baselines and no others, and may read their
runs and no others, so its key covers what it shows. Stages that only one page is about (``Stage.aside``) are
declared too: ``"stages": ["synthesis"]``. So are tables that are committed under ``results/``:
``"results": ["study"]``; a page that reads those alone needs no run.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggsm_core import evidence, provenance
from ggsm_core.codehash import code_hash, imports, module_file
from ggsm_core.params import BASELINE_NAMES, RECIPE_NAMES, Profile
from ggsm_core.runs import READS
from ggsm_core.scheduler import Job
from ggsm_core.stages import GRAPH, Node, Plan

SECONDS = 20.0
INJECTED = "injected-parameters"  # papermill's tag of the cell that it adds
PACKAGE = Path(__file__).resolve().parent
EXECUTE = (
    "import sys; sys.modules['rfc3987_syntax'] = None; "
    "from ggsm_core import execute; sys.exit(execute.main())"
)
"""A notebook's process. jsonschema would build a grammar of international addresses, which takes half of the
start, and no notebook has one to check."""


class NotebookError(ValueError):
    """A notebook that can't be executed, or whose page can't be shown."""


@dataclass(frozen=True)
class Notebook:
    """A notebook's source and what it declares."""

    path: Path
    recipes: tuple[str, ...]
    baselines: tuple[str, ...]
    content: dict[str, Any]
    stages: tuple[str, ...] = ()
    results: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def published(self) -> bool:
        """Whether it reads committed tables and nothing else."""
        return reads_tables_alone(self.content["metadata"]["ggsm"])

    def narrowed(self, profile: Profile) -> dict[str, Any]:
        """The profile with the declared recipes and baselines alone, as a mapping."""
        dump = profile.model_dump(mode="json")
        dump["recipes"] = {
            recipe: options if recipe in self.recipes else None for recipe, options in dump["recipes"].items()
        }
        dump["baselines"] = [name for name in dump["baselines"] if name in self.baselines]
        if "synthesis" not in self.stages and not profile.mixes:
            dump["synthesis"] = None  # another page's matter
        return dump

    def reads(self, plan: Plan) -> list[Node]:
        """Runs that all rows share, those of its own rows and stages, the comparison if it has all rows."""
        if self.published:
            return []
        rows = {*self.recipes, *self.baselines}
        everything = rows >= {*plan.profile.recipes.active, *plan.profile.baselines}

        def read(node: Node) -> bool:
            if node.stage.aside:
                return node.stage.name in self.stages
            return node.row in rows if node.row else everything or not _reads_many(node)

        return [node for node in plan.all() if read(node)]

    def modules(self) -> set[str]:
        """Modules of this package that its cells import, or name in a command."""
        from IPython.core.inputtransformer2 import TransformerManager

        found: set[str] = set()
        for cell in self.content["cells"]:
            if cell["cell_type"] != "code":
                continue
            source = "".join(cell["source"])
            found |= imports(TransformerManager().transform_cell(source), self.name, PACKAGE)
            named = re.findall(rf"\b{PACKAGE.name}(?:\.\w+)+", source)
            found |= {name for name in named if module_file(name, PACKAGE)}
        return found


def reads_tables_alone(declared: Mapping[str, Any]) -> bool:
    """Whether a notebook's ``metadata.ggsm`` names committed tables and no run."""
    runs = any(declared.get(key) for key in ("recipes", "baselines", "stages"))
    return bool(declared.get("results")) and not runs


def _reads_many(node: Node) -> bool:
    return node.stage.per == "profile" and any(need.row for need in node.inputs.values())


def discover(folder: Path) -> list[Notebook]:
    """The numbered notebooks of ``folder``, in order. Raises ``NotebookError`` for a bad declaration."""
    return [_load(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]


def _load(path: Path) -> Notebook:
    content = json.loads(path.read_text(encoding="utf-8"))
    declared = content["metadata"].get("ggsm")
    if not isinstance(declared, dict) or set(declared) - {"stages", "results"} != {"recipes", "baselines"}:
        raise NotebookError(
            f"{path.name}: metadata.ggsm is {declared!r}; it must be "
            '{"recipes": [...], "baselines": [...]}, what the notebook reads (a list, or "all")'
        )
    stages, aside = declared.get("stages", []), [stage.name for stage in GRAPH.stages.values() if stage.aside]
    if not isinstance(stages, list) or not set(stages) <= set(aside):
        raise NotebookError(
            f"{path.name}: metadata.ggsm.stages: {stages!r}; allowed: some of {', '.join(aside)}"
        )
    results = declared.get("results", [])
    if not isinstance(results, list) or not set(results) <= set(evidence.PROFILES):
        allowed = ", ".join(evidence.PROFILES)
        raise NotebookError(f"{path.name}: metadata.ggsm.results: {results!r}; allowed: some of {allowed}")
    if not any("parameters" in cell["metadata"].get("tags", []) for cell in content["cells"]):
        raise NotebookError(
            f"{path.name}: no cell is tagged `parameters`, so the profile would not reach it; "
            "tag the one with `profile = ...`"
        )
    rows = []
    for key, known in (("recipes", RECIPE_NAMES), ("baselines", BASELINE_NAMES)):
        names = list(known) if declared[key] == "all" else declared[key]
        if not isinstance(names, list) or not set(names) <= set(known):
            raise NotebookError(
                f'{path.name}: metadata.ggsm.{key}: {names!r}; allowed: "all", or some of {", ".join(known)}'
            )
        rows.append(tuple(names))
    return Notebook(path, rows[0], rows[1], content, tuple(stages), tuple(results))


def key(notebook: Notebook, plan: Plan) -> str:
    """Hash of all that the executed notebook depends on."""
    return provenance.digest(
        {
            "cells": [
                [cell["cell_type"], "".join(cell["source"]), cell["metadata"]]
                for cell in notebook.content["cells"]
            ],
            "metadata": notebook.content["metadata"],
            "profile": notebook.narrowed(plan.profile),
            "runs": [node.name for node in notebook.reads(plan)],
            "results": {name: evidence.hashes(name) for name in notebook.results},
            "code": code_hash({__name__, *notebook.modules()}, PACKAGE),
            "process": [EXECUTE, provenance.sha256(PACKAGE / "execute.py")],
            "libraries": provenance.libraries()
            | provenance.versions("matplotlib", "seaborn", "papermill", "ipykernel"),
        }
    )


def is_executed(notebook: Notebook, notebook_key: str, folder: Path) -> bool:
    """Whether ``folder`` holds the notebook, executed from this very source, profile, runs and code."""
    record = _record(folder, notebook.name)
    executed = folder / notebook.path.name
    return (
        bool(record)
        and record["key"] == notebook_key
        and executed.is_file()
        and provenance.sha256(executed) == record["sha256"]
    )


def _record(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / ".keys" / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    assert isinstance(content, dict)
    return content


def seconds(folder: Path, name: str) -> float | None:
    """How long the notebook took when it was last executed."""
    return _record(folder, name).get("seconds")


def job(notebook: Notebook, notebook_key: str, plan: Plan, folder: Path, runs: Path) -> Job:
    """Execute ``notebook`` into ``folder``, where its partly executed form stays if a cell fails."""
    keys = folder / ".keys"
    profile, reads = keys / f"{notebook.name}.yaml", keys / f"{notebook.name}.reads.json"
    provenance.write_atomically(profile, json.dumps(notebook.narrowed(plan.profile), indent=1))
    allowed = notebook.reads(plan)
    provenance.write_atomically(
        reads,
        json.dumps(
            {
                "notebook": notebook.path.name,
                "runs": [node.name for node in allowed],
                "results": notebook.results,
            }
        ),
    )
    progress_file = keys / f"{notebook.name}.progress.json"
    request = {
        "source": str(notebook.path),
        "output": str(folder / notebook.path.name),
        "profile": str(
            profile.relative_to(provenance.ROOT) if profile.is_relative_to(provenance.ROOT) else profile
        ),
        "progress": str(progress_file),
        "record": str(keys / f"{notebook.name}.json"),
        "key": notebook_key,
    }
    return Job(
        name=notebook.path.name,
        title=f"notebook {notebook.name}",
        command=[sys.executable, "-c", EXECUTE],
        stdin=json.dumps(request),
        needs=frozenset(node.name for node in allowed),
        seconds=seconds(folder, notebook.name) or SECONDS,
        progress_file=progress_file,
        log=folder / f"{notebook.name}.log",
        environment={
            READS: str(reads.resolve()),
            "GGSM_RUNS": str(runs),
            "JUPYTER_PREFER_ENV_PATH": "1",  # this environment's kernel, whatever the user has installed
            "JUPYTER_PLATFORM_DIRS": "1",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        },
    )


def unfit(content: dict[str, Any], forbidden: tuple[str, ...]) -> Iterator[str]:
    """What in an executed notebook may not be shown: stderr, and paths of this machine. Names the cell."""
    for number, cell in enumerate(content["cells"]):
        for output in cell.get("outputs", []):
            text = _text(output)
            where = f"cell {number} ({first_line(cell)!r})"
            if output.get("name") == "stderr":
                yield f"{where} wrote to stderr: {text.strip()[:300]!r}"
            if path := shown_path(text, forbidden):
                yield f"{where} shows a path of this machine: {path!r}"


ABSOLUTE = re.compile(r"(?<![\w./:<-])/(?:home|root|Users|tmp|usr|opt|var|private|mnt|workspace)/[\w.~-]+")


def shown_path(text: str, forbidden: tuple[str, ...]) -> str | None:
    """The first path of this machine in ``text``, or None."""
    match = ABSOLUTE.search(text)
    return next((path for path in forbidden if path in text), match[0] if match else None)


def _text(output: dict[str, Any]) -> str:
    """All that a reader would see of one output, without pictures in binary."""
    parts = [output.get("text", ""), *output.get("traceback", [])]
    parts += [
        data
        for kind, data in output.get("data", {}).items()
        if kind.startswith("text/") or kind == "image/svg+xml"
    ]
    return "\n".join("".join(part) if isinstance(part, list) else str(part) for part in parts)


def first_line(cell: dict[str, Any]) -> str:
    """The first line of a cell that says something."""
    lines = (line.strip() for line in "".join(cell["source"]).splitlines())
    return next((line for line in lines if line and not line.startswith("#")), "")
