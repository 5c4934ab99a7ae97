"""The teaching plan names what is there, and the chapters work as slides in a browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from browser import browser as browser
from browser import needs_browser, serious

ROOT = Path(__file__).resolve().parents[1]
PLAN = (ROOT / "book" / "teaching.md").read_text(encoding="utf-8")
LECTURES = re.split(r"^## Lecture \d.*$", PLAN, flags=re.M)[1:]
BOOKS = sorted(
    (index.parent for index in ROOT.glob("build/*/book/_build/html/teaching.html")),
    key=lambda folder: folder.stat().st_mtime,
)
SHOWN = sorted(set(re.findall(r'href="(notebooks/\w+\.html)\?slides"', PLAN)))
needs_book = pytest.mark.skipif(not BOOKS, reason="no book is built here; `make book` builds one")


def source(chapter: str) -> str:
    (path,) = (ROOT / "notebooks").glob(f"{int(chapter):02}_*.ipynb")
    cells = nbformat.read(path, as_version=4)["cells"]
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_each_lecture_fills_ninety_minutes() -> None:
    assert len(LECTURES) == 2
    for lecture in LECTURES:
        minutes = [int(found) for found in re.findall(r"^\| (\d+) \|", lecture, re.M)]
        assert len(minutes) >= 5 and sum(minutes) == 90


def test_the_plan_names_sections_slides_and_exercises_that_exist() -> None:
    chapter = r"\| \[chapter (\d+)\]\(notebooks/(\w+)\.ipynb\) "
    parts = re.findall(chapter + r".*?notebooks/(\w+)\.html\?slides.*?</a>\)(.*?)\|", PLAN)
    assert len(parts) == len(SHOWN) >= 9
    for number, page, slides, shown in parts:
        assert page == slides and page.startswith(f"{int(number):02}_")
        headings = re.findall(r"^## (.+)$", source(number), re.M)
        assert {*re.findall(r"\*(.+?)\*", shown)} <= {*headings}, shown
    homework = re.findall(r"chapter (\d+),\s+exercises ([\d, and to]+)", PLAN)
    assert len(homework) >= 6
    for number, exercises in homework:
        asked = len(re.findall(r"^\d+\. \*", source(number).partition("## Exercises")[2], re.M))
        assert all(1 <= int(one) <= asked for one in re.findall(r"\d+", exercises))


# --- slides -----------------------------------------------------------------------------------------------


@pytest.fixture
def deck(browser: Any) -> Iterator[Any]:
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    yield page
    context.close()


def opened(deck: Any, name: str) -> int:
    """Open a chapter as slides; how many there are."""
    deck.goto((BOOKS[-1] / name).as_uri() + "?slides", wait_until="load")
    deck.evaluate("async () => { if (window.MathJax) await window.MathJax.startup.promise }")
    return int(deck.locator(".slides-bar output").inner_text().split()[-1])


def visible(deck: Any) -> list[str]:
    """The outer HTML of what a reader sees of the page's parts."""
    return deck.eval_on_selector_all(
        "article section > :not(section)", "all => all.filter(e => e.checkVisibility()).map(e => e.outerHTML)"
    )


@needs_book
@needs_browser
@pytest.mark.parametrize("name", SHOWN)
def test_slides_show_all_of_a_chapter_a_part_at_a_time(deck: Any, name: str) -> None:
    count = opened(deck, name)
    assert count >= 6
    outputs = deck.locator("article .cell:not(.tag_solution) > .cell_output").count()
    headings = deck.locator("article :is(h1, h2)").count()
    seen: list[str] = []
    for number in range(1, count + 1):
        assert deck.locator(".slides-bar output").inner_text() == f"{number} of {count}"
        parts = visible(deck)
        assert len(parts) >= 2 and sum(part.startswith("<h") for part in parts) == 1
        assert sum("cell_output" in part for part in parts) <= 1
        assert deck.locator("article .cell_input:visible").count() == 0
        seen += parts
        deck.keyboard.press("ArrowRight")
    assert sum("cell_output" in part for part in seen) == outputs
    assert len({part for part in seen if part.startswith("<h")}) == headings
    assert not any("tag_solution" in part for part in seen)
    assert deck.locator(".slides-bar output").inner_text() == f"{count} of {count}"  # the last one stays
    assert not deck.errors


@needs_book
@needs_browser
def test_slides_are_turned_found_again_and_left(deck: Any) -> None:
    name = "notebooks/05_causal.html"
    count = opened(deck, name)
    deck.get_by_label("Next slide").click()
    deck.keyboard.press("PageDown")
    deck.keyboard.press("ArrowLeft")
    assert deck.locator(".slides-bar output").inner_text() == f"2 of {count}"
    before = visible(deck)
    deck.reload()
    deck.evaluate("async () => { if (window.MathJax) await window.MathJax.startup.promise }")
    assert [part[:200] for part in visible(deck)] == [part[:200] for part in before]
    deck.keyboard.press("c")
    assert deck.locator("article .cell_input:visible").count() >= 1
    assert not serious(deck)
    deck.keyboard.press("Escape")
    deck.wait_for_url(lambda url: url.endswith(name))
    assert deck.locator(".slides-bar").count() == 0
    assert deck.locator("article h2:visible").count() > 3
