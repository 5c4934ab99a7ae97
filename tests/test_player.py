"""The visibility player: a film holds what the run did, and the page shows what the film holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from browser import browser as browser
from browser import needs_browser, serious

from ggsm_core import guidance, masks, player, recipes, sections
from ggsm_core.collation import Batch
from ggsm_core.template import SEGMENTS

L, TOTAL, WARM = 9, 12, 4
WORDS = ["<bill>", "milk & <b>bread</b>", "x", "</bill>", "<app>", "</app>", "what", "next", "<USER>"]
KINDS = [0, 0, 0, 0, 3, 3, 6, 6, SEGMENTS["user"]]
BATCH = Batch(torch.arange(L)[None], torch.ones(1, L, dtype=torch.bool), torch.tensor([KINDS]))


def build(name: str, **options: Any) -> recipes.Recipe:
    section = recipes.RECIPES[name].section
    return recipes.build(name, section(**options), total_steps=TOTAL, hidden_size=4, max_length=L)


def guided(name: str = "ggsm", **options: Any) -> tuple[recipes.Recipe, pl.DataFrame]:
    """A recipe at the end of a run, and what its trainer would have logged of a batch as long as ours."""
    recipe = build(name, warm_steps=WARM, **options)
    draw = torch.Generator().manual_seed(0)
    rows = []
    for step in range(TOTAL):
        weights = torch.rand(1, L, generator=draw) if step < WARM else recipe.recall(*BATCH_AREAS, step)
        if step == WARM - 1:
            recipe.freeze(weights, *BATCH_AREAS)
        rows.append(
            {
                "loss": 3.0 - step / 10,
                "weights_by_position": guidance.by_position(weights, BATCH.valid, L).tolist(),
                "weights_by_segment": guidance.by_segment(weights, *BATCH_AREAS, len(SEGMENTS)).tolist(),
            }
        )
    return recipe, pl.DataFrame(rows)


BATCH_AREAS = (BATCH.valid, BATCH.segments)
LOSSES = pl.DataFrame({"loss": np.linspace(3, 2, TOTAL)})


@pytest.mark.parametrize("freeze", ["position", "segment"])
def test_a_film_shows_what_the_recipe_showed(freeze: str) -> None:
    recipe, metrics = guided(freeze=freeze)
    film = player.film(recipe, metrics, BATCH)
    assert film.steps.tolist() == [player.BEFORE, *range(TOTAL), player.AFTER]
    assert (film.visibility[0] == 0).all() and (film.visibility[-1] == 1).all()
    for step in range(WARM, TOTAL):
        view = recipes.View(*BATCH_AREAS, torch.zeros(1, L, 4), step)
        assert film.visibility[1 + step] == pytest.approx(recipe.visibility(view)[0].numpy(), abs=1e-6)
    for step in range(WARM):
        logged = metrics["weights_by_position"][step].to_list()
        assert film.visibility[1 + step] == pytest.approx(logged[::-1])
    assert film.openness[0] == 0 and film.openness[-1] == pytest.approx(1)


@pytest.mark.parametrize("name", ["causal", "bidirectional", "hybrid_segment", "scheduler"])
def test_openness_is_the_mean_visibility_that_runs_log(name: str) -> None:
    recipe = build(name, **({"schedule": "span_linear"} if name == "scheduler" else {}))
    film = player.film(recipe, LOSSES, BATCH, frames=5)
    for step, openness in zip(film.steps[1:], film.openness[1:], strict=True):
        view = recipes.View(*BATCH_AREAS, torch.zeros(1, L, 4), None if step == player.AFTER else int(step))
        assert openness == pytest.approx(masks.mean_visibility(recipe.visibility(view), BATCH.valid))


def test_a_batch_shorter_than_the_sequence_is_continued_as_by_position_does() -> None:
    recipe, metrics = guided()
    short = metrics.with_columns(pl.col("weights_by_position").list.head(5))
    film = player.film(recipe, short, BATCH)
    first = metrics["weights_by_position"][0].to_list()
    assert film.visibility[1] == pytest.approx([first[4]] * (L - 5) + first[:5][::-1])


def test_what_no_run_logs_is_refused() -> None:
    with pytest.raises(player.PlayerError, match="hybrid_mlp learns its mask"):
        player.film(build("hybrid_mlp"), LOSSES, BATCH)
    two = Batch(*(tensor.repeat(2, 1) for tensor in (BATCH.input_ids, BATCH.valid, BATCH.segments)))
    with pytest.raises(player.PlayerError, match="one sequence"):
        player.film(build("causal"), LOSSES, two)
    film = player.film(build("causal"), LOSSES, BATCH)
    with pytest.raises(player.PlayerError, match="9 tokens, not 12 and 8"):
        player.show({"causal": film}, WORDS[:-1], caption="c")


def pairs() -> dict[str, player.Film]:
    recipe, metrics = guided()
    span = player.film(build("scheduler", schedule="span_linear"), LOSSES, BATCH)
    return {"ggsm": player.film(recipe, metrics, BATCH), "scheduler": span}


def test_a_page_holds_everything_and_asks_for_nothing() -> None:
    html = player.show(pairs(), WORDS, caption="<i>us</i>")._repr_html_()
    assert html == player.show(pairs(), WORDS, caption="<i>us</i>")._repr_html_()
    assert "<i>" not in html and "<b>bread" not in html and "milk &amp; &lt;b&gt;bread" in html
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", html)
    assert not re.search(r"https?://|import\(|fetch\(", html)
    assert re.findall(r'alt="([^"]{20,})"', html)


def test_a_long_run_of_a_long_sequence_stays_small() -> None:
    length = 128
    batch = Batch(
        torch.arange(length)[None], torch.ones(1, length, dtype=torch.bool), torch.zeros(1, length).long()
    )
    recipe = recipes.build(
        "scheduler",
        sections.Scheduler(schedule="span_cosine"),
        total_steps=2000,
        hidden_size=4,
        max_length=length,
    )
    film = player.film(recipe, pl.DataFrame({"loss": np.random.default_rng(0).random(2000)}), batch)
    html = player.show({"a": film, "b": film}, ["a token"] * length, caption="c").html
    assert len(html) < 400e3
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', html, re.S)
    assert len(data) < 300e3


@pytest.fixture(scope="module")
def html() -> str:
    return player.show(pairs(), WORDS, caption="our household").html


@pytest.fixture
def opened(browser: Any, tmp_path: Path, html: str) -> Any:
    def open_page(**options: Any) -> Any:
        head = (
            '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>player</title>'
        )
        (tmp_path / "page.html").write_text(
            f'<!doctype html><html lang="en"><head>{head}</head>'
            f"<body><main><h1>t</h1>{html}</main></body></html>",
            encoding="utf-8",
        )
        page = browser.new_context(offline=True, **options).new_page()
        page.goto((tmp_path / "page.html").as_uri())
        return page

    return open_page


@needs_browser
def test_keys_move_through_the_frames_and_the_picture_follows(opened: Any) -> None:
    page, films = opened(), pairs()
    slider, output = page.locator("input"), page.locator("output")
    assert page.locator("label").get_attribute("for") == slider.get_attribute("id")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")  # past the button
    frames = [player.BEFORE, *range(TOTAL), player.AFTER]
    for frame, step in enumerate(frames):
        where = {player.BEFORE: "before training", player.AFTER: "after training"}
        assert output.inner_text() == where.get(step, f"step {step} of {TOTAL - 1}")
        assert slider.get_attribute("aria-valuetext") == output.inner_text()
        for index, film in enumerate(films.values()):
            figure = page.locator("figure").nth(index)
            shown = [float(text) for text in figure.locator("li b").all_inner_texts()[1:]]
            assert shown == pytest.approx(film.weights[frame][1:].tolist(), abs=6e-4)
            told = re.search(r"visibility ([\d.]+)", figure.locator(".player-said").inner_text())
            assert told and float(told[1]) == pytest.approx(film.openness[frame], abs=6e-4)
            assert pixels(figure) == pytest.approx(seen(film, frame), abs=0.011)
        page.keyboard.press("ArrowRight")


def pixels(figure: Any) -> np.ndarray:
    """Float[L, L]: the visibility that the canvas shows, read back from its colours."""
    data = figure.locator("canvas").evaluate(
        "c => [...c.getContext('2d').getImageData(2, 0, c.width - 2, c.height - 2).data]"
    )
    colours = np.array(data).reshape(L, L, 4)[..., :3]
    page = json.loads(figure.page.locator('script[type="application/json"]').inner_text())
    palette = np.array([[int(shade[at : at + 2], 16) for at in (1, 3, 5)] for shade in page["palette"]])
    return np.abs(colours[:, :, None] - palette).sum(-1).argmin(-1) / 100


def seen(film: player.Film, frame: int) -> np.ndarray:
    grid = np.broadcast_to(film.visibility[frame], (L, L)).copy()
    grid[np.tril_indices(L)] = 1
    return grid


@needs_browser
def test_play_runs_to_the_end_and_stops(opened: Any) -> None:
    page = opened()
    page.locator("button").focus()
    page.keyboard.press("Enter")
    assert page.locator("button").inner_text() == "Stop"
    page.wait_for_function("document.querySelector('output').textContent === 'after training'")
    assert page.locator("button").inner_text() == "Play"


@needs_browser
def test_without_script_and_in_print_there_are_still_pictures(opened: Any) -> None:
    page = opened(java_script_enabled=False)
    assert page.locator(".player-still img").is_visible()
    assert not page.locator("input").is_visible() and not page.locator("canvas").first.is_visible()
    page = opened()
    assert page.locator("canvas").first.is_visible() and not page.locator(".player-still img").is_visible()
    page.emulate_media(media="print")
    assert page.locator(".player-still img").is_visible() and page.locator(".player-curve img").is_visible()
    assert not page.locator("input").is_visible() and not page.locator("canvas").first.is_visible()


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_for_everyone_at_every_frame(opened: Any, scheme: str) -> None:
    page = opened(color_scheme=scheme, viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for _ in range(4):
        assert not serious(page)
        page.locator("input").focus()
        for _ in range(4):
            page.keyboard.press("ArrowRight")
