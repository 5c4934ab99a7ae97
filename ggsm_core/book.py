"""Assemble prose, executed notebooks and result tables into one folder, and let Jupyter Book render it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from safetensors import safe_open

from ggsm_core import pages, provenance
from ggsm_core.baselines.base import SYSTEM
from ggsm_core.codehash import code_hash
from ggsm_core.jobs import context
from ggsm_core.notebooks import INJECTED, PACKAGE, Notebook, seconds, shown_path
from ggsm_core.runs import Run
from ggsm_core.scheduler import Job
from ggsm_core.stages import Node, Plan
from ggsm_core.stages import check as whole_runs

SECONDS = 45.0
TOOLS = ("jupyter-book", "sphinx", "myst-nb", "myst-parser", "sphinx-book-theme", "sphinx-mathjax-offline")
SHARED = ("libraries", "params", "data", "profile", "label")  # told once, not with each run
TABLES = ("auc.csv", "rows.csv", "differences.csv", "covariance.csv", "labels.csv")
COSTS, LEARNING, SYNTHESIS = "costs.csv", "learning.csv", "synthesis.csv"
CITATION = provenance.ROOT / "CITATION.cff"
PICTURE = "_static/result.png"
"""The comparison at a glance. The copy in ``book/`` is the README's; a book shows its own results."""


class BookError(ValueError):
    """The book can't be built, or what was built may not be shown."""


def write_results(plan: Plan, folder: Path, notebooks: Path) -> None:
    """The tables of the comparison, and provenance.json: where every number comes from.

    All of it is read from the runs, so nothing changes while no run changes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compare = plan.node("compare")
    for table in TABLES:
        provenance.write_atomically(
            folder / table, (plan.store.folder(compare.name) / table).read_text(encoding="utf-8")
        )
    provenance.write_atomically(folder / COSTS, costs(plan).write_csv(float_precision=1))
    provenance.write_atomically(folder / LEARNING, learning(plan).write_csv(float_precision=6))
    written = [*TABLES, COSTS, LEARNING]
    if plan.profile.mixes:
        provenance.write_atomically(folder / SYNTHESIS, synthesis(plan).write_csv())
        written.append(SYNTHESIS)
    whole = whole_runs(plan.all(), plan.store)  # all but those that only a page is about
    runs = [run.provenance | {"run": name} for name, run in whole.items()]
    last = runs[-1]
    now = context(plan, compare)
    result: dict[str, Any] = {
        "profile": now["profile"],
        "params": now["params"],
        "data": now["data"],
        **{key: last[key] for key in ("commit", "uncommitted_changes", "libraries", "machine")},
        "seconds": round(sum(run["seconds"] for run in runs), 1),
        "runs": [
            {key: value for key, value in run.items() if key not in SHARED}
            for run in runs
        ],
        "tables": {name: provenance.sha256(folder / name) for name in written},
        "notebooks": {path.stem: seconds(notebooks, path.stem) for path in sorted(notebooks.glob("*.ipynb"))},
    }  # fmt: skip
    provenance.write_atomically(folder / "provenance.json", json.dumps(result, indent=1) + "\n")


def read(plan: Plan) -> list[Node]:
    """The runs that ``write_results`` reads."""
    stages = [name for name, stage in plan.graph.stages.items() if stage.embeds or name == "contrast"]
    nodes = [node for name in stages for node in plan.of_stage(name)]
    return [plan.node("compare"), *nodes, *([plan.node("synthesis")] if plan.profile.mixes else [])]


def costs(plan: Plan) -> pl.DataFrame:
    """What each embedding costs: its dimension d, seconds of training and of embedding all probe samples.

    Training of a mask is the sum of its logged steps, also where it was interrupted, and embedding the wall
    time of a run; a baseline measures both itself. Two runs share two cores. A frozen decoder or text encoder
    trains nothing. Columns: recipe, seed, dimension, training_seconds, embedding_seconds.
    """
    table = []
    for stage in (name for name, stage in plan.graph.stages.items() if stage.embeds):
        for node in plan.of_stage(stage):
            folder = plan.store.folder(node.name)
            with safe_open(folder / "embeddings.safetensors", framework="numpy") as file:
                dimension = file.get_slice("embeddings").get_shape()[1]
            if stage == "embed":
                trained = node.inputs.get("contrast")
                steps = Run(plan.store.folder(trained.name)).metrics()["seconds"] if trained else None
                training = float(steps.sum()) if steps is not None else 0.0
                embedding = Run(folder).provenance["seconds"]
            else:
                measured = json.loads((folder / SYSTEM).read_text(encoding="utf-8"))
                training, embedding = measured["fit_seconds"], measured["embed_seconds"]
            table.append((node.row, node.seed, dimension, training, embedding))
    kinds = (pl.String, pl.Int64, pl.Int64, pl.Float64, pl.Float64)
    columns = ("recipe", "seed", "dimension", "training_seconds", "embedding_seconds")
    return pl.DataFrame(table, schema=dict(zip(columns, kinds, strict=True)), orient="row")


def learning(plan: Plan) -> pl.DataFrame:
    """What contrastive training did in each of its runs: recipe, seed and ``story.outcome``."""
    from ggsm_core import story  # draws, and is slow to import

    nodes = plan.of_stage("contrast") if "contrast" in plan.graph.stages else []
    table = [
        {"recipe": node.row, "seed": node.seed, **story.outcome(Run(plan.store.folder(node.name)).metrics())}
        for node in nodes
    ]
    return pl.DataFrame(table, schema=None if table else ["recipe", "seed"])


def synthesis(plan: Plan) -> pl.DataFrame:
    """What each step asked of the language model and got, for rows that train on D_qa."""
    report = plan.store.folder(plan.node("synthesis").name) / "report.parquet"
    counts = ("asked", "answered", "yielded", "prompt_tokens", "completion_tokens", "malformed", "cut")
    return pl.read_parquet(report, columns=["step", *counts])


def key(prose: Path, executed: list[Path], results: Path) -> str:
    """Hash of all that the rendered book depends on."""
    files = [path for path in sorted(prose.rglob("*")) if path.is_file() and "_build" not in path.parts]
    return provenance.digest(
        {
            "prose": {path.relative_to(prose).as_posix(): provenance.sha256(path) for path in files},
            "notebooks": {path.name: provenance.sha256(path) for path in executed},
            "results": {path.name: provenance.sha256(path) for path in sorted(results.iterdir())},
            "code": code_hash([__name__], PACKAGE),
            "docstrings": [provenance.sha256(path) for path in sorted(PACKAGE.rglob("*.py"))],
            "citation": provenance.sha256(CITATION),
            "tools": provenance.versions(*TOOLS),
        }
    )


def is_built(folder: Path, book_key: str) -> bool:
    """Whether ``folder`` holds the rendered book of this key."""
    record = folder / ".key"
    return record.is_file() and record.read_text(encoding="utf-8") == book_key and index(folder).is_file()


def index(folder: Path) -> Path:
    """The page to open."""
    return folder / "_build" / "html" / "index.html"


def check_configuration(prose: Path) -> None:
    """Raises ``BookError`` if the configuration would let Jupyter Book execute notebooks itself."""
    configuration = yaml.safe_load((prose / "_config.yml").read_text(encoding="utf-8"))
    execute = (configuration.get("execute") or {}).get("execute_notebooks")
    if execute not in ("off", False):  # YAML reads a bare off as false
        raise BookError(
            f'book/_config.yml: execute.execute_notebooks is {execute!r}; it must be "off": '
            "notebooks come executed"
        )


def assemble(prose: Path, executed: list[Path], results: Path, folder: Path) -> None:
    """Fill ``folder`` from scratch: Sphinx repeats no warning for a page that it has rendered before."""
    from ggsm_core import figures  # slow to import, and a book that is whole needs none

    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(prose, folder, ignore=shutil.ignore_patterns("_build"))
    shutil.copytree(results, folder / "results")
    if not (results / LEARNING).is_file():  # tables that were published before it was kept
        (folder / "results" / LEARNING).write_text("recipe,seed\n", encoding="utf-8")
    (folder / PICTURE).parent.mkdir(exist_ok=True)
    figures.result(pl.read_csv(results / "auc.csv")).savefig(folder / PICTURE, dpi=150)
    told = json.loads((results / "provenance.json").read_text(encoding="utf-8"))
    (folder / "results" / "status.csv").write_text(pages.status(executed), encoding="utf-8")
    (folder / "results" / "environment.csv").write_text(pages.environment(told), encoding="utf-8")
    for path in folder.glob("*.md"):
        path.write_text(pages.with_reference(path.read_text(encoding="utf-8")), encoding="utf-8")
    shutil.copy(CITATION, folder)
    (folder / "notebooks").mkdir(exist_ok=True)
    for path in executed:
        content = json.loads(path.read_text(encoding="utf-8"))
        for cell in content["cells"]:
            if INJECTED in cell["metadata"].get("tags", []):
                cell["metadata"]["tags"].append("remove-cell")
        pages.name_solutions(content)
        content["cells"].append(pages.colophon(path.stem, content))
        (folder / "notebooks" / path.name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    _leave_out(folder, {path.stem for path in executed})


def _leave_out(folder: Path, chapters: set[str]) -> None:
    """Take all but ``chapters`` from the table of contents; a link to one of the others becomes its words."""
    toc = folder / "_toc.yml"
    content = yaml.safe_load(toc.read_text(encoding="utf-8"))
    absent: set[str] = set()

    def kept(entry: dict[str, Any]) -> bool:
        place, _, name = str(entry.get("file", "")).rpartition("/")
        if place != "notebooks" or name in chapters:
            return True
        absent.add(name)
        return False

    parts = content.get("parts", [content])
    for part in parts:
        part["chapters"] = [entry for entry in part["chapters"] if kept(entry)]
    if not absent:
        return
    if "parts" in content:
        content["parts"] = [part for part in parts if part["chapters"]]
    toc.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    link = re.compile(rf"\[([^\[\]]*)\]\([^)\s]*\b(?:{'|'.join(sorted(absent))})\.ipynb[^)]*\)")
    for path in folder.glob("*.md"):
        path.write_text(link.sub(r"\1", path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in (folder / "notebooks").glob("*.ipynb"):
        page = json.loads(path.read_text(encoding="utf-8"))
        for cell in page["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = link.sub(r"\1", "".join(cell["source"]))
        path.write_text(json.dumps(page, indent=1), encoding="utf-8")


def job(folder: Path, notebooks: list[Notebook]) -> Job:
    """Render the assembled ``folder``; a warning is an error, and all of them are reported."""
    shown = folder.relative_to(provenance.ROOT) if folder.is_relative_to(provenance.ROOT) else folder
    return Job(
        name="book",
        title="book",
        command=[
            sys.executable,
            "-c",
            "from jupyter_book.cli.main import main; main()",
            "build",
            "-W",
            "--keep-going",
            str(shown),
        ],
        needs=frozenset(notebook.path.name for notebook in notebooks),
        seconds=SECONDS,
        progress_file=folder / ".progress.json",
        log=folder.parent / "book.log",
    )


def check(folder: Path) -> None:
    """Look at every rendered page. Raises ``BookError`` naming page and fault."""
    forbidden = (str(provenance.ROOT), sys.prefix)
    for page in sorted((folder / "_build" / "html").rglob("*.html")):
        text = page.read_text(encoding="utf-8")
        name = page.relative_to(folder / "_build" / "html").as_posix()
        if re.search(r'class="[^"]*\bstderr\b', text):
            raise BookError(f"{name}: shows a block of stderr")
        # Links may hold paths of the web; the words, and this very folder anywhere, may not.
        inside = next((path for path in forbidden if path in text), None)
        if path := inside or shown_path(re.sub(r"<[^>]*>", "", text), ()):
            raise BookError(f"{name}: shows a path of this machine: {path!r}")
