"""What the book makes from code and executed notebooks: commands, status, docstrings as reference."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import docutils.core
import pytest
from sphinx.ext.napoleon import Config, GoogleDocstring

from ggsm_core import docstrings, pages, params

ROOT = Path(__file__).resolve().parents[1]
EXECUTED: dict[str, Any] = {
    "cells": [
        {"cell_type": "markdown", "metadata": {}, "source": ["# Masks, and more\n", "\n", "text"]},
        {
            "cell_type": "code",
            "metadata": {},
            "source": ["from ggsm_core import masks, runs\n", "masks.causal"],
        },
    ],
    "metadata": {
        "language_info": {"version": "3.11.9"},
        "papermill": {"duration": 12.3, "end_time": "2026-01-02T03:04:05.6+00:00", "version": "2.7.0"},
    },
}


def test_commands_name_profiles_that_exist_and_are_valid() -> None:
    lines = pages.commands("08_ggsm_warmup")
    assert {"quick", "gpu"} <= lines.keys()
    for profile, line in lines.items():
        words = shlex.split(line)
        assert words[1:5] == [
            "-m",
            "papermill",
            "notebooks/08_ggsm_warmup.ipynb",
            "build/08_ggsm_warmup.ipynb",
        ]
        assert words[words.index("-p") + 1] == "profile"
        assert params.load(ROOT / words[words.index("-p") + 2]).name == profile


def test_a_page_ends_with_its_commands_and_the_code_that_it_imports() -> None:
    cell = pages.colophon("08_ggsm_warmup", EXECUTED)
    assert cell["cell_type"] == "markdown" and "It took 12 s" in cell["source"]
    assert "{py:mod}`ggsm_core.masks`, {py:mod}`ggsm_core.runs`." in cell["source"]
    assert all(line in cell["source"] for line in pages.commands("08_ggsm_warmup").values())


def test_solutions_are_named_after_their_exercises() -> None:
    folded = {"tags": ["hide-cell", "solution"], "mystnb": {"image": {"alt": "a picture"}}}
    cells: list[dict[str, Any]] = [{"metadata": {}}, {"metadata": dict(folded)}, {"metadata": dict(folded)}]
    pages.name_solutions({"cells": cells})
    assert cells[0] == {"metadata": {}}
    for number, cell in enumerate(cells[1:], start=1):
        assert cell["metadata"]["mystnb"] == {
            "image": {"alt": "a picture"},
            "code_prompt_show": f"Show solution {number}",
            "code_prompt_hide": f"Hide solution {number}",
        }


def test_status_says_what_papermill_wrote_down(tmp_path: Path) -> None:
    path = tmp_path / "05_causal.ipynb"
    path.write_text(json.dumps(EXECUTED), encoding="utf-8")
    header, row = csv.reader(io.StringIO(pages.status([path])))
    assert dict(zip(header, row, strict=True)) == {
        "page": "[Masks, and more](notebooks/05_causal.ipynb)",
        "seconds": "12",
        "executed (UTC)": "2026-01-02 03:04",
        "Python": "3.11.9",
        "papermill": "2.7.0",
    }


def test_every_module_is_on_exactly_one_page_of_the_reference() -> None:
    prose = [path.read_text(encoding="utf-8") for path in (ROOT / "book").glob("api*.md")]
    described = re.findall(r"^\.\. automodule:: (\S+)$", "\n".join(map(pages.with_reference, prose)), re.M)
    files = [path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / "ggsm_core").rglob("*.py")]
    modules = [".".join(parts[:-1] if parts[-1] == "__init__" else parts) for parts in files]
    assert sorted(described) == sorted(modules)


def documented() -> list[tuple[str, str]]:
    found = []
    for path in sorted((ROOT / "ggsm_core").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                name = f"{path.relative_to(ROOT).as_posix()}:{getattr(node, 'name', '')}"
                if text := ast.get_docstring(node):
                    found.append((name, text))
    return found


def complaints(lines: list[str]) -> list[str]:
    said = io.StringIO()
    settings = {"warning_stream": said, "report_level": 1}
    text = str(GoogleDocstring(lines, Config(napoleon_use_param=False, napoleon_use_rtype=False)))
    docutils.core.publish_doctree(text, settings_overrides=settings)
    return said.getvalue().splitlines()


def test_every_docstring_is_clean_markup() -> None:
    texts = documented()
    assert len(texts) > 200
    bad = {name: found for name, text in texts if (found := complaints(docstrings.plain(text.split("\n"))))}
    assert not bad


def test_marks_mean_themselves() -> None:
    text = [
        "The norms ||dL/dh_j|| of *all* h_ and `x`, but ``a | b`` stays.",
        "",
        "    <bill> a; b </bill>",
        "",
        "End.",
    ]
    assert complaints(text)
    made = docstrings.plain(text)
    assert not complaints(made)
    shown = docutils.core.publish_doctree("\n".join(made)).astext()
    assert "||dL/dh_j|| of *all* h_ and `x`, but a | b stays." in shown
    assert made.count("::") == 1


def test_functions_lead_to_the_paper_and_their_chapters() -> None:
    seen = docstrings.seen_at((ROOT / "book" / "equations.md").read_text(encoding="utf-8"))
    assert len(seen) > 15
    (said,) = seen["ggsm_core.masks.additive_bias"]
    assert said == "In the paper: Eq. 4; at work in :doc:`chapter 5 </notebooks/05_causal>`."


@pytest.mark.parametrize("commit", [("abc", True, "abc, with uncommitted changes"), ("abc", False, "abc")])
def test_environment_says_whether_the_commit_is_all(commit: tuple[str, bool, str]) -> None:
    told = {
        "profile": "smoke",
        "commit": commit[0],
        "uncommitted_changes": commit[1],
        "machine": {"cpu": "c", "gpu": None},
        "libraries": {"torch": "2"},
    }
    rows = dict(csv.reader(io.StringIO(pages.environment(told))))
    assert rows == {"what": "value", "profile": "smoke", "commit": commit[2], "cpu": "c", "torch": "2"}
