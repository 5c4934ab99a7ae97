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


# Colours are most of axe-core's work, and one is enough of all words that look alike in a part of the page.
SHOW_ONE = """() => {
  const behind = (node) => {
    const colour = node && getComputedStyle(node).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" ? behind(node.parentElement) : colour;
  };
  const through = (node) => node ? getComputedStyle(node).opacity * through(node.parentElement) : 1;
  const seen = new Set(), alike = [];
  for (const word of document.querySelectorAll("body *:not(:has(*), svg *, script, style)")) {
    const { color, fontSize, fontWeight, visibility, textDecorationLine } = getComputedStyle(word);
    if (!word.textContent.trim() || visibility !== "visible") continue;
    const around = getComputedStyle(word.parentElement).color;
    const part = word.closest("header, nav, aside, main, footer, pre, table, .admonition")?.className;
    const look = [word.tagName, color, around, behind(word), through(word), fontSize, fontWeight,
                  textDecorationLine, part].join();
    if (seen.has(look)) alike.push(word);
    seen.add(look);
  }
  for (const word of alike) {
    word.style.visibility = "hidden";  // keeps its room: what scrolls still scrolls
    word.dataset.alike = "";
  }
}"""
SHOW_ALL = """() => {
  for (const word of document.querySelectorAll("[data-alike]")) {
    word.style.removeProperty("visibility");
    delete word.dataset.alike;
  }
}"""
COLOURS = ["color-contrast", "link-in-text-block"]
PICTURES = ["image-alt", "role-img-alt", "svg-img-alt"]


def serious(page: Any, looks: bool = False) -> list[str]:
    """What axe-core finds on an opened page and calls serious or critical: the rule and where.

    ``looks``: only the rules that another colour scheme with its own pictures could break.
    """
    from axe_playwright_python.sync_playwright import Axe

    def violations(**options: Any) -> list[dict[str, Any]]:
        given = {"resultTypes": ["violations"], **options}
        return list(Axe().run(page, options=given).response["violations"])

    if looks:
        found = violations(runOnly={"type": "rule", "values": PICTURES})
    else:
        found = violations(rules={rule: {"enabled": False} for rule in COLOURS})
    page.evaluate(SHOW_ONE)
    found += violations(runOnly={"type": "rule", "values": COLOURS})
    page.evaluate(SHOW_ALL)
    return [
        f"{fault['id']}: {node['target']} {node['html'][:120]}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]
