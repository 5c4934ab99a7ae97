"""A Sphinx extension: our docstrings as reStructuredText, with the way back to equations and chapters.

Docstrings are written to be read in an editor: ``||x||`` and ``*`` mean what they say, an indented block is a
picture or code. What ``equations.md`` says of a function is added to its description.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LITERAL = re.compile(r"(``.+?``)")
_LETTER = re.compile(r"^(\s*(?:\w+: )?)([A-Za-z][.)](?:\s|$))")  # "d." is no first item of a list
_SECTION = re.compile(r"^(?:Args|Returns|Raises|Yields|Note|Example):$")
_ROW = re.compile(r"^\|(?P<paper>[^|]+)\|[^|]+\|(?P<code>[^|]+)\|[^|]+\|(?P<chapter>[^|]+)\|$", re.M)


def plain(lines: list[str]) -> list[str]:
    """Docstring lines whose every mark means itself to reStructuredText, but for ````literals````."""
    result: list[str] = []
    section = False
    for number, line in enumerate(lines):
        starts = bool(line.strip()) and (number == 0 or not lines[number - 1].strip())
        if line and not line.startswith(" "):
            section = bool(_SECTION.match(line))
        if starts and line.startswith("    ") and not section and not _inside(result):
            result += ["::", ""]
        parts = _LITERAL.split(line)
        escaped = [
            part if at % 2 else re.sub(r"([|*`\\]|_(?=\W|$))", r"\\\1", part) for at, part in enumerate(parts)
        ]
        result.append(_LETTER.sub(r"\1\\\2", "".join(escaped)))
    return result


def _inside(lines: list[str]) -> bool:
    """Whether the last block of ``lines`` is an indented one already."""
    return next((line.startswith("    ") for line in reversed(lines) if line.strip()), False)


def seen_at(equations: str) -> dict[str, list[str]]:
    """Full name -> sentences that lead from it to paper and chapter, from the table of equations."""
    found: dict[str, list[str]] = {}
    for row in _ROW.finditer(equations):
        chapter = re.search(r"\[(\d+)\]\((notebooks/\w+)\.ipynb\)", row["chapter"])
        where = f"; at work in :doc:`chapter {chapter[1]} </{chapter[2]}>`" if chapter else ""
        for name in re.findall(r"`(ggsm_core\.[\w.]+)`", row["code"]):
            found.setdefault(name, []).append(f"In the paper: {row['paper'].strip()}{where}.")
    return found


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this."""
    seen: dict[str, list[str]] = {}

    def read(_app: Any) -> None:
        seen.update(seen_at((Path(app.srcdir) / "equations.md").read_text(encoding="utf-8")))

    def process(_app: Any, _what: str, name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
        lines[:] = [*plain(lines), *(line for said in seen.get(name, []) for line in ("", said))]

    app.setup_extension("sphinx.ext.autodoc")
    app.connect("builder-inited", read)
    app.connect("autodoc-process-docstring", process)
    app.setup_extension("sphinx.ext.napoleon")  # after us: it makes markup, which must not be escaped
    return {"parallel_read_safe": True}
