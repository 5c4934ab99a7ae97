"""The notebooks' sources keep the rules of the book; executing them is the pipeline's work."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from ggsm_core import charts, figures, notebooks, pages
from ggsm_core.codehash import closure

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
PAPER = re.findall(
    r"automodule:: ggsm_core\.(\S+)", pages.with_reference((FOLDER.parent / "book" / "api.md").read_text())
)
"""The modules that the book calls the paper's."""
MOST_CELLS, MOST_LINES, LINE = 26, 15, 120
DRAWN = {
    f"{module.__name__.rpartition('.')[2]}.{name}"
    for module in (figures, charts)
    for name, one in vars(module).items()
    if inspect.isfunction(one) and one.__annotations__.get("return") == "Figure"
}
LIBRARY = {
    node.name
    for module in (*PAPER, "figures", "story")
    for node in ast.parse((notebooks.PACKAGE / f"{module}.py").read_text(encoding="utf-8")).body
    if isinstance(node, (ast.FunctionDef, ast.ClassDef))
}
"""What the paper's modules define, and those that every page draws on."""


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Any:
    return nbformat.read(request.param, as_version=4) | {"path": request.param}


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell.cell_type == "code"]


def solutions(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if "solution" in cell.metadata.get("tags", [])]


def page(notebook: Any) -> list[Any]:
    """The cells that a reader goes through: all but the folded solutions."""
    hidden = {cell.id for cell in solutions(notebook)}
    return [cell for cell in notebook["cells"] if cell.id not in hidden]


def prose(notebook: Any) -> str:
    return "\n\n".join(cell.source for cell in notebook["cells"] if cell.cell_type == "markdown")


def called_figures(source: str) -> list[str]:
    """Functions of ``figures`` and ``charts`` that a cell calls."""
    return [
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in DRAWN
    ]


def test_the_paper_imports_no_data_no_baseline_and_no_synthesis() -> None:
    assert len(PAPER) == 7
    behind = closure([f"{notebooks.PACKAGE.name}.{module}" for module in PAPER], notebooks.PACKAGE)
    assert not [name for name in behind if name.split(".")[1:2] in (["data"], ["baselines"], ["synthesis"])]


def test_there_are_notebooks_and_the_pipeline_takes_them() -> None:
    assert [one.path for one in notebooks.discover(FOLDER)] == PATHS
    assert len(PATHS) >= 9
    assert {"figures.forest", "charts.over"} <= DRAWN


def test_nothing_executed_is_committed(notebook: Any) -> None:
    for cell in code(notebook):
        assert cell.outputs == [] and cell.execution_count is None
    nbformat.validate(nbformat.from_dict({k: v for k, v in notebook.items() if k != "path"}))


def test_cell_ids_are_stable(notebook: Any) -> None:
    stem = notebook["path"].stem.replace("_", "-")
    ids = [cell.id for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(rf"{stem}-[\w-]+", one) for one in ids)


def test_it_is_short(notebook: Any) -> None:
    assert len(page(notebook)) <= MOST_CELLS
    for cell in code(notebook):
        lines = cell.source.splitlines()
        assert len(lines) <= MOST_LINES, lines[0]
        assert max(map(len, lines)) <= LINE, max(lines, key=len)


def test_it_opens_with_its_question(notebook: Any) -> None:
    first = notebook["cells"][0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S", first.source)
    assert re.search(r"^\*\*Question\.\*\* .+\?", first.source, re.M)
    assert re.search(r"\*\*You need\*\*", first.source)
    assert re.search(r"\*\*Time\*\* \d+ minutes", first.source)
    assert len(re.findall(r"^# ", prose(notebook), re.M)) == 1


def test_it_ends_with_what_was_learned_and_exercises(notebook: Any) -> None:
    text = prose(notebook)
    learned, exercises = text.index("## What we learned"), text.index("## Exercises")
    assert learned < exercises
    after = next(i for i, cell in enumerate(page(notebook)) if cell.source.startswith("## What we learned"))
    said = [cell for cell in page(notebook)[after:] if cell.cell_type == "code"]
    assert "Markdown(f" in said[-1].source and "{" in said[-1].source, "the take-away is made from numbers"


def test_exercises_are_graded_and_each_has_a_solution_that_runs(notebook: Any) -> None:
    text = prose(notebook).partition("## Exercises")[2]
    asked = re.findall(r"^(\d+)\. \*(Easy|Medium|Hard)\.\* \S", text, re.M)
    assert [int(number) for number, _ in asked] == list(range(1, len(asked) + 1))
    grades = [("Easy", "Medium", "Hard").index(grade) for _, grade in asked]
    assert len(asked) >= 3 and grades == sorted(grades) and {*grades} == {0, 1, 2}
    found = solutions(notebook)
    assert notebook["cells"][-len(found) :] == found, "solutions close the page"
    assert len(found) == len(asked)
    for number, cell in enumerate(found, start=1):
        assert cell.source.startswith(f"# Solution {number}.") and "hide-cell" in cell.metadata.tags
        tree = ast.walk(ast.parse(cell.source))
        says = [
            node
            for node in tree
            if isinstance(node, ast.Assert)
            or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
        ]
        assert says, f"{cell.id} neither asserts nor prints"


def test_one_household_goes_through_the_book(notebook: Any) -> None:
    if int(notebook["path"].stem[:2]) <= 10:
        source = "\n".join(cell.source for cell in code(notebook))
        assert "who = story.example(" in source and "who.name" in source


def test_the_profile_is_its_only_parameter(notebook: Any) -> None:
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell.metadata.get("tags", [])]
    assert [cell.source for cell in tagged] == ['profile = "params/quick.yaml"']


def test_it_defines_nothing_that_the_library_has(notebook: Any) -> None:
    own = {"recipes.Recipe"}
    for cell in code(notebook):
        tree = ast.parse(cell.source)  # plain Python: no magics, no shell
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.name not in LIBRARY, f"{node.name}: import it"
            if isinstance(node, ast.ClassDef):  # a reader's own recipe, and nothing else
                own.add(node.name)
                assert ast.unparse(node.bases[0]) in own


def test_every_picture_has_words(notebook: Any) -> None:
    alts = []
    for cell in code(notebook):
        drawn = called_figures(cell.source)
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if drawn:
            assert len(alt) >= 40, f"{notebook['path'].name}: {drawn} needs alternative text"
            alts.append(alt)
        else:
            assert not alt, f"{notebook['path'].name}: alternative text without a picture: {alt}"
    assert len(set(alts)) == len(alts)
    assert alts


def test_no_path_of_a_machine(notebook: Any) -> None:
    for cell in notebook["cells"]:
        assert not re.search(r"(?<![\w.:/<])/(?:home|root|Users|tmp|work|usr)/", cell.source)
