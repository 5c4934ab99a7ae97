"""The rendered book, opened from disk in a real browser with the network off.

Skipped where no book has been built or there is no Chromium; continuous integration has both.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import reduce
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import browser as browser
from browser import needs_browser, serious

from ggsm_core import pages
from ggsm_core.notebooks import reads_tables_alone

ROOT = Path(__file__).resolve().parents[1]
PROSE = ROOT / "book"


def built() -> Path | None:
    """The book with all chapters that was built last, of whichever profile."""
    found = [index.parent.parent for index in ROOT.glob("build/*/book/_build/html/notebooks/08_*.html")]
    return max(found, key=lambda folder: folder.stat().st_mtime, default=None)


def toc() -> list[str]:
    content = yaml.safe_load((PROSE / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter["file"] for part in content["parts"] for chapter in part["chapters"]]
    return [content["root"], *chapters]


BOOK, PAGES = built(), toc()
needs_book = pytest.mark.skipif(BOOK is None, reason="no book is built here; `make book` builds one")


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


def test_the_bibliography_holds_what_is_cited_and_nothing_else() -> None:
    entries = re.findall(r"^@\w+\{(\w+),", (PROSE / "references.bib").read_text(encoding="utf-8"), re.M)
    sources = [*PROSE.glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    cited = {
        key
        for path in sources
        for keys in re.findall(r"\{cite(?::\w)?\}`([^`]+)`", path.read_text(encoding="utf-8"))
        for key in keys.split(",")
    }
    assert len(set(entries)) == len(entries)
    assert cited == set(entries)


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
    text = re.sub(
        r"<(pre|code|dt|script|style)\b.*?</\1>", "", page.locator("article").inner_html(), flags=re.S
    )
    assert not re.search(r"\$[^$<]+\$", re.sub(r"<[^>]*>", "", text)), "a formula that was not set"

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


# --- for everyone -----------------------------------------------------------------------------------------


KINDS = {
    "intro", "equations", "results", "api", "search", "genindex",
    "notebooks/01_data_template", "notebooks/08_ggsm_warmup", "notebooks/10_auc_comparison",
}  # fmt: skip
"""A page of every kind: prose, mathematics, tables, code, a film, plots."""


@needs_book
@needs_browser
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
        for name in [*PAGES, "search", "genindex"]
    ],
)
def test_everyone_can_read_a_page(browser: Any, name: str) -> None:
    """A phone does not scroll sideways, and axe-core finds nothing serious in either colour scheme."""
    page = browser.new_page(offline=True, color_scheme="light", viewport={"width": 390, "height": 844})
    page.goto(page_file(name).as_uri(), wait_until="load")
    page.evaluate("async () => { if (window.MathJax) await window.MathJax.startup.promise }")
    widths = page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.add_style_tag(content="* { transition: none !important }")  # no colour half way to the other scheme
    found = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function("wanted => document.documentElement.dataset.theme === wanted", arg=scheme)
        found[scheme] = serious(page, looks=scheme == "dark")
    page.close()
    assert max(widths) <= 390
    assert found == {"light": [], "dark": []}


@needs_browser
def test_axe_and_the_phone_notice_a_fault(browser: Any, tmp_path: Path) -> None:
    """Negative control: a picture without words, grey on grey, also in code, wider than a phone."""
    bad = tmp_path / "bad.html"
    picture = '<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=" style="width:900px;height:9px">'
    bad.write_text(
        '<html lang="en"><meta name="viewport" content="width=device-width"><title>t</title>'
        f'<main><h1>t</h1><p style="color:#aaa;background:#999">grey</p>{picture}'
        '<pre><span>plain</span> <span>plain</span> <span style="color:#ddd">pale</span></pre>'
        '<p><b>plain</b></p><p style="opacity:.2"><b>veiled</b></p>'
        '<p>a <a href="#" style="color:#111;text-decoration:none">hidden link</a> in a block of text that '
        "goes on</p></main></html>"
    )
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(bad.as_uri())
    faults = serious(page)
    looks = serious(page, looks=True)
    rules = {found.split(":")[0] for found in faults}
    wide = page.evaluate("document.documentElement.scrollWidth")
    page.close()
    assert {"image-alt", "color-contrast"} <= rules
    assert all(any(word in fault for fault in faults) for word in ("pale", "veiled", "hidden link"))
    assert {found.split(":")[0] for found in looks} == {"image-alt", "color-contrast", "link-in-text-block"}
    assert wide > 390


@needs_book
@needs_browser
def test_search_finds_soft_mask(browser: Any) -> None:
    page = browser.new_page()
    page.goto(f"{page_file('search').as_uri()}?q=soft+mask", wait_until="load")
    page.locator("#search-results li a").first.wait_for(timeout=20_000)
    found = page.locator("#search-results li a").all_inner_texts()
    page.close()
    assert any("GG-SM" in title for title in found)
    assert any("Glossary" in title for title in found)


@needs_book
@needs_browser
def test_the_player_opens_the_mask_by_keyboard(browser: Any) -> None:
    page = browser.new_page()
    page.goto(page_file("notebooks/08_ggsm_warmup").as_uri(), wait_until="load")
    slider = page.locator(".player input[type=range]")
    said = page.locator(".player .player-said")
    slider.focus()
    page.keyboard.press("Home")
    assert all(text.startswith("causal") for text in said.all_inner_texts())
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert all(text.startswith("half-open") for text in said.all_inner_texts())
    page.keyboard.press("End")
    assert slider.get_attribute("aria-valuetext") == "after training"
    assert all(text.startswith("open") for text in said.all_inner_texts())
    page.close()


@needs_book
def test_equations_and_reference_lead_to_each_other() -> None:
    names = re.findall(r"`(ggsm_core\.[\w.]+)`", (PROSE / "equations.md").read_text(encoding="utf-8"))
    equations = page_file("equations").read_text(encoding="utf-8")
    library = {name: page_file(name).read_text(encoding="utf-8") for name in PAGES if name.startswith("api")}
    for name in names:
        (page,) = [page for page, text in library.items() if f'id="{name}"' in text]
        assert f'href="{page}.html#{name}"' in equations, name
    assert library["api"].count('href="notebooks/08_ggsm_warmup.html"') >= 3


@needs_book
def test_every_chapter_says_how_to_execute_it_again() -> None:
    status = page_file("status").read_text(encoding="utf-8")
    for name in (page for page in PAGES if page.startswith("notebooks/")):
        text = re.sub(r"<[^>]*>", "", page_file(name).read_text(encoding="utf-8"))
        stem = name.removeprefix("notebooks/")
        source = json.loads((ROOT / f"{name}.ipynb").read_text(encoding="utf-8"))
        published = reads_tables_alone(source["metadata"]["ggsm"])
        assert all(line in text for line in pages.commands(stem, published).values())
        assert f'href="{name}.html"' in status


@needs_book
def test_the_book_is_small() -> None:
    assert BOOK is not None
    sizes = {path: path.stat().st_size for path in BOOK.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 40e6
    players = [
        json.loads(data)
        for path in BOOK.rglob("*.html")
        for data in re.findall(
            r'class="player".*?<script type="application/json">(.*?)</script>', path.read_text("utf-8"), re.S
        )
    ]
    assert players and all(len(json.dumps(data)) < 300e3 for data in players)


@needs_book
def test_the_command_on_a_page_works(tmp_path: Path) -> None:
    """As printed, but under the smallest profile, and with its output elsewhere."""
    name = "04_objective"
    line = pages.commands(name)["quick"].replace("params/quick", "params/smoke")
    words = [word.replace(f"build/{name}", str(tmp_path / name)) for word in line.split()]
    done = subprocess.run([sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    executed = json.loads((tmp_path / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert executed["metadata"]["papermill"]["exception"] is None


@needs_book
@pytest.mark.slow
def test_the_book_prints_on_one_page() -> None:
    """``make print``, without making the book again."""
    assert BOOK is not None
    profile = BOOK.parents[2].name
    done = subprocess.run(
        ["make", "--no-print-directory", "-o", "book", "print", f"PROFILE={profile}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder = ROOT / Path(done.stdout.split()[-1]).parent
    text = (folder / "intro.html").read_text(encoding="utf-8")
    heading = r'<h\d>([^<]*)<a class="headerlink"'
    titles = [re.findall(heading, page_file(name).read_text(encoding="utf-8"))[0] for name in PAGES]
    assert set(titles) <= set(re.findall(heading, text))
    assert 'class="player-still"' in text
