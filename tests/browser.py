"""A real browser without a network, for tests that open pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

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
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine; Debian's package `chromium` has one"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


# Contrast is most of axe-core's work, and one for all words of a page that look alike: code has thousands.
HIDE_ALIKE = """() => {
  const behind = (node) => {
    const colour = node && getComputedStyle(node).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? behind(node.parentElement) : colour;
  };
  for (const word of document.querySelectorAll("[data-alike]")) {
    word.style.removeProperty("visibility");
    delete word.dataset.alike;
  }
  const seen = new Set(), alike = [];
  for (const word of document.querySelectorAll(":is(pre, dt) span:not(:has(*), a span, button span)")) {
    const { color, opacity, fontSize, fontWeight, visibility } = getComputedStyle(word);
    const look = [color, opacity, fontSize, fontWeight, visibility, behind(word)].join();
    if (seen.has(look)) alike.push(word);
    seen.add(look);
  }
  for (const word of alike) {
    word.style.visibility = "hidden";  // keeps its room: what scrolls still scrolls
    word.dataset.alike = "";
  }
}"""


def serious(page: Any) -> list[str]:
    """What axe-core finds on an opened page and calls serious or critical: the rule and where."""
    from axe_playwright_python.sync_playwright import Axe

    page.evaluate(HIDE_ALIKE)
    violations = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        f"{found['id']}: {node['target']} {node['html'][:120]}"
        for found in violations
        if found["impact"] in ("serious", "critical")
        for node in found["nodes"]
    ]
