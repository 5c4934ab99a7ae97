"""The rendered book, opened from disk in a real browser with the network off.

Skipped where no book has been built or there is no Chromium; continuous integration has both.
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PROSE = ROOT / "book"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
]


def built() -> Path | None:
    """The book that was built last, of whichever profile."""
    found = [index.parent for index in ROOT.glob("build/*/book/_build/html/intro.html")]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def toc() -> list[str]:
    content = yaml.safe_load((PROSE / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter["file"] for part in content["parts"] for chapter in part["chapters"]]
    return [content["root"], *chapters]


BOOK, PAGES = built(), toc()
needs_book = pytest.mark.skipif(BOOK is None, reason="no book is built here; `make book` builds one")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine; Debian's package `chromium` has one"
)


def page_file(name: str) -> Path:
    assert BOOK is not None
    return BOOK / f"{name}.html"


# --- the sources ------------------------------------------------------------------------------------------


def test_every_page_is_in_the_table_of_contents() -> None:
    prose = {path.stem for path in PROSE.glob("*.md")}
    notebooks = {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert sorted(PAGES) == sorted(prose | notebooks)


@pytest.mark.parametrize("path", sorted(PROSE.glob("*.md")), ids=lambda path: path.stem)
def test_prose_has_title_question_and_take_away(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.match(r"# \S", text)
    assert re.search(r"^\*\*Question\.\*\* .+", text, re.M)
    assert re.search(r"^## What we learned\n\n\S", text, re.M)


def test_equations_lead_to_code_and_tests_that_exist() -> None:
    text = (PROSE / "equations.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`(ggsm_core\.[\w.]+)`", text))
    assert len(names) > 15
    for name in names:
        parts = name.split(".")
        module = next(".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1) if _is_module(parts[:n]))
        reduce(getattr, parts[len(module.split(".")) :], importlib.import_module(module))
    assert all((ROOT / path).is_file() for path in re.findall(r"`(tests/\w+\.py)`", text))


def _is_module(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


# --- the rendered files -----------------------------------------------------------------------------------


@dataclass
class Loads(HTMLParser):
    """What a page makes a browser load."""

    found: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        loaded = given.get("src") if tag != "a" else None
        if tag == "link" and given.get("rel") not in ("canonical", "search", "next", "prev", "index"):
            loaded = given.get("href")
        if loaded:
            self.found.append(loaded)


@needs_book
@pytest.mark.parametrize("name", [*PAGES, "search", "genindex"])
def test_no_page_loads_from_outside(name: str) -> None:
    loads = Loads()
    loads.feed(page_file(name).read_text(encoding="utf-8"))
    assert loads.found
    assert not [url for url in loads.found if re.match(r"(?:[a-z]+:)?//", url)]


@needs_book
@pytest.mark.parametrize("name", PAGES)
def test_no_page_shows_stderr_or_this_machine(name: str) -> None:
    text = page_file(name).read_text(encoding="utf-8")
    assert not re.search(r'class="[^"]*\bstderr\b', text)
    assert str(ROOT) not in text
    visible = re.sub(r"<[^>]*>", "", text)
    assert not re.search(r"(?<![\w./-])/(?:home|root|Users|tmp|usr|var|private|mnt)/\w", visible)


@needs_book
def test_no_raw_household_is_shown() -> None:
    """Where tables name a household they do it by pseudonym."""
    for name in PAGES:
        visible = re.sub(r"<[^>]*>", "", page_file(name).read_text(encoding="utf-8"))
        assert not re.search(r"household[ _](?:id )?\d{1,4}\b(?!\s*(?:households|days))", visible), name


# --- in a browser -----------------------------------------------------------------------------------------


@dataclass
class Seen:
    """One opened page."""

    page: Any
    errors: list[str]
    requests: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(params=PAGES)
def seen(request: pytest.FixtureRequest, browser: Any) -> Iterator[Seen]:
    context = browser.new_context(offline=True, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    opened = Seen(page, [], [])
    page.on("console", lambda m: opened.errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: opened.errors.append(str(error)))
    page.on("request", lambda r: opened.requests.append(r.url))
    page.goto(page_file(request.param).as_uri(), wait_until="load")
    page.wait_for_function("!window.MathJax || window.MathJax.startup?.promise", timeout=20_000)
    page.evaluate("async () => { if (window.MathJax) await window.MathJax.startup.promise }")
    yield opened
    context.close()


@needs_book
@needs_browser
def test_a_page_opens_from_disk(seen: Seen) -> None:
    page = seen.page
    assert not seen.errors
    assert not [url for url in seen.requests if not url.startswith(("file:", "data:", "blob:"))]

    assert len(page.locator("article h1").all()) == 1
    assert page.locator("article h1").inner_text().strip("#\n ")
    assert page.locator("article strong", has_text="Question.").count() == 1
    take_away = page.locator("section#what-we-learned")
    assert take_away.count() == 1
    assert len(take_away.inner_text()) > 100

    written = page.locator("article .math").count()
    typeset = page.locator("article mjx-container").count()
    assert typeset >= written > 0 or written == typeset == 0
    assert page.locator("mjx-merror, [data-mjx-error]").count() == 0

    for image in page.locator("img").all():
        alt = (image.get_attribute("alt") or "").strip()
        assert alt and not re.search(r"\.(?:png|svg)$", alt), image.get_attribute("src")
        assert image.evaluate("i => i.complete && i.naturalWidth") > 0, f"{alt}: an empty picture"


@needs_book
@needs_browser
def test_the_check_notices_a_request_and_an_error(browser: Any, tmp_path: Path) -> None:
    """Negative control: what the test above looks for is really seen."""
    bad = tmp_path / "bad.html"
    bad.write_text('<script src="https://example.org/x.js"></script><script>nothing()</script>')
    page = browser.new_page()
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda r: requests.append(r.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(bad.as_uri(), wait_until="load")
    page.close()
    assert [url for url in requests if url.startswith("https:")]
    assert errors
