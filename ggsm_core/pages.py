"""The parts of the book that are made from code and executed notebooks: commands, status, API reference."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ggsm_core import provenance
from ggsm_core.notebooks import PACKAGE, Notebook, reads_tables_alone

PROFILES = {
    "quick": "minutes on two cores",
    "study": "hours on two cores",
    "gpu": "needs a GPU, and the hub for the decoder's weights",
}
"""Profiles whose command every page shows, as far as ``params/`` has them."""
_MODULES = re.compile(r"<!-- modules: ([\w.\s]+?) -->")


def commands(name: str, published: bool = False) -> dict[str, str]:
    """Profile -> the command that executes notebook ``name`` under it, from the project's folder.

    A ``published`` page reads committed tables alone: every profile would show the same.
    """
    return {
        profile: f".venv/bin/python -m papermill notebooks/{name}.ipynb build/{name}.ipynb "
        f"-k python3 -p profile params/{profile}.yaml"
        for profile in list(PROFILES)[: 1 if published else None]
        if (provenance.ROOT / "params" / f"{profile}.yaml").is_file()
    }


def colophon(name: str, executed: dict[str, Any]) -> dict[str, Any]:
    """The last cell of a page: how long it took, how to execute it again, where its code is described."""
    published = reads_tables_alone(executed["metadata"].get("ggsm", {}))
    told = PROFILES | ({"quick": "seconds, from committed tables"} if published else {})
    lines = "\n".join(f"# {told[key]}\n{line}" for key, line in commands(name, published).items())
    used = sorted(Notebook(Path(f"{name}.ipynb"), (), (), executed).modules() - {PACKAGE.name})
    code = ", ".join(f"{{py:mod}}`{module}`" for module in used)
    took = _papermill(executed)["duration"]
    text = f"""::::{{dropdown}} Execute this page again
It took {took:.0f} s when this book was made; [Status](../status.md) has all pages. In the project's folder,
after `make install` (missing runs are computed first):

```bash
{lines}
```

Or open it with `make lab`. Code that it imports: {code}.
::::"""
    return {"cell_type": "markdown", "id": "colophon", "metadata": {}, "source": text}


def name_solutions(executed: dict[str, Any]) -> None:
    """Have the button of each folded solution say which exercise it is for."""
    solutions = [cell for cell in executed["cells"] if "solution" in cell["metadata"].get("tags", [])]
    for number, cell in enumerate(solutions, start=1):
        names = {f"code_prompt_{act.lower()}": f"{act} solution {number}" for act in ("Show", "Hide")}
        cell["metadata"]["mystnb"] = cell["metadata"].get("mystnb", {}) | names


def _papermill(executed: dict[str, Any]) -> dict[str, Any]:
    told = executed["metadata"]["papermill"]
    assert isinstance(told, dict)
    return told


def status(executed: Iterable[Path]) -> str:
    """CSV, one line a notebook: page, seconds, when it was executed and by what; papermill's own record."""
    rows = []
    for path in executed:
        content = json.loads(path.read_text(encoding="utf-8"))
        told = _papermill(content)
        title = "".join(content["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
        rows.append(
            (
                f"[{title}](notebooks/{path.name})",
                round(told["duration"]),
                told["end_time"][:16].replace("T", " "),
                content["metadata"]["language_info"]["version"],
                told["version"],
            )
        )
    return _csv(("page", "seconds", "executed (UTC)", "Python", "papermill"), rows)


def environment(told: dict[str, Any]) -> str:
    """CSV of profile, commit, machine and libraries, from ``provenance.json``."""
    commit = f"{told['commit']}{', with uncommitted changes' if told['uncommitted_changes'] else ''}"
    machine = {fact: value for fact, value in told["machine"].items() if value is not None}
    return _csv(
        ("what", "value"),
        ({"profile": told["profile"], "commit": commit} | machine | told["libraries"]).items(),
    )


def _csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def with_reference(text: str) -> str:
    """A page whose comment ``<!-- modules: masks loss -->`` has become a section for each of these modules.

    Sphinx describes them from their docstrings; ``ggsm_core`` is the package itself.
    """
    section = (
        "## {name}\n\n```{{eval-rst}}\n.. automodule:: {name}\n   :members:\n   :member-order: bysource\n```"
    )

    def sections(found: re.Match[str]) -> str:
        names = (name if name == PACKAGE.name else f"{PACKAGE.name}.{name}" for name in found[1].split())
        return "\n\n".join(section.format(name=name) for name in names)

    return _MODULES.sub(sections, text)
