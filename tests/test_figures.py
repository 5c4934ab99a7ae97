"""Pictures and tables of the book: what they say is what they were given."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import polars as pl
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from ggsm_core import batches, charts, figures, story, workbench
from ggsm_core.data import privacy
from ggsm_core.loss import info_nce_rows
from ggsm_core.params import RECIPE_NAMES
from ggsm_core.sections import Lora
from ggsm_core.template import MODALITIES, SEGMENTS, SPECIAL_TOKENS, Record, User, encode_user, render

matplotlib.use("agg")
KINDS = np.array([0, 0, 1, 2, 3, 4, 5, 6, 7])
ROWS = ["causal", "ggsm", "handmade", "mine"]
FOREST = pl.DataFrame(
    [(p, r, 0.6 + i / 50, 0.55, 0.75) for p in ("a", "b", "c", "d") for i, r in enumerate(ROWS)],
    schema=["panel", "row", "value", "ci_low", "ci_high"],
    orient="row",
)
AUC = FOREST.head(4).select("ci_low", "ci_high", recipe="row", auc="value", task=pl.lit("mean"))
EVENTS = pl.DataFrame({"day": [120, 150, 205, 215], "modality": ["bill", "app", "bill", "spm"]})
EXAMPLES: dict[str, Callable[[], Figure]] = {
    "timeline": lambda: figures.timeline(EVENTS, 210, 90, 30),
    "histogram": lambda: figures.histogram({"a": [1, 2, 2, 3], "b": [5]}, "tokens", limit=9),
    "bars": lambda: figures.bars({"a": 0.1, "b": 0.0}, "share", limit=1),
    "masks": lambda: figures.masks({"a": np.zeros(9), "b": np.eye(9)}, KINDS, read_out=8),
    "grid": lambda: figures.grid(np.random.rand(40, 20), rows="r", columns="c", label="w", low=0, high=1),
    "attention": lambda: figures.attention({"a": np.tril(np.full((9, 9), 0.1))}, KINDS),
    "embedding_map": lambda: figures.embedding_map(
        np.random.rand(30, 2), {"a": np.arange(30) % 2 == 0, "b": np.zeros(30)}, axes_label="components"
    ),
    "negatives": lambda: figures.negatives({"u-a": np.eye(5, dtype=int) * 4}),
    "curves": lambda: figures.curves({n: ([0, 1], [1, 0.5]) for n in ROWS}, label="loss", warm_steps=1),
    "many curves": lambda: figures.curves({n: ([0, 1], [1, 2]) for n in MODALITIES}, label="w", log=True),
    "per_token": lambda: figures.per_token({"a": np.arange(9), "b": np.ones(9)}, KINDS, label="norm"),
    "forest": lambda: figures.forest(FOREST, label="AUC", zero=0.6),
    "result": lambda: figures.result(AUC),
    "nothing": lambda: figures.forest(FOREST.clear(), label="AUC"),
    "named_grid": lambda: charts.named_grid(
        [[0.1, np.nan]], [["+0.1", "not run"]], rows=["r"], columns=["a", "b"], label="w"
    ),
    "over": lambda: charts.over(
        FOREST.with_columns(at=pl.col("panel").rank("dense") - 1), ticks=list("abcd"), steps="s", label="AUC"
    ),
    "critical_difference": lambda: charts.critical_difference(
        {row: 0.7 + i / 50 for i, row in enumerate(ROWS)}, [ROWS[:2], ROWS[1:3]], label="AUC"
    ),
    "cost": lambda: charts.cost(AUC.select(row="recipe", auc="auc", seconds=9.0, dimension=64), label="s"),
    "orders": lambda: charts.orders({"a": 0.1, "b": 0.2}, {"a": 2.0, "b": 1.0}, sides=("l", "r")),
}


def pixels(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return plt.imread(buffer)  # [height, width, RGBA]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_figure_shows_something_on_an_opaque_white_ground(name: str) -> None:
    seen = pixels(EXAMPLES[name]())
    assert (seen[..., 3] == 1).all()  # opaque: readable on a dark page too
    assert (seen[0, 0, :3] == 1).all()
    assert (seen[..., :3].min(axis=2) < 0.5).mean() > 0.002
    assert 300 < seen.shape[1] < 1000


@pytest.mark.parametrize("name", ["masks", "curves", "forest"])
def test_a_figure_is_made_alike_each_time_and_leaves_nothing_open(name: str) -> None:
    assert np.array_equal(pixels(EXAMPLES[name]()), pixels(EXAMPLES[name]()))
    assert plt.get_fignums() == []


def luminance(colour: str) -> float:
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_rows_differ_without_colour() -> None:
    assert set(RECIPE_NAMES) <= figures.LOOKS.keys()
    markers = [look.marker for look in figures.LOOKS.values()]
    assert len(set(markers)) == len(markers)
    assert len({(look.marker, look.line) for look in figures.FREE}) == len(figures.FREE)
    new = figures.looks(["mine", "yours", "causal"])
    assert new["mine"] != new["yours"] and new["causal"] == figures.LOOKS["causal"]


def test_visibility_is_told_by_brightness_alone() -> None:
    colours = plt.get_cmap(figures.VISIBILITY)(np.linspace(0, 1, 50))
    shades = [luminance(matplotlib.colors.to_hex(colour)) for colour in colours]
    assert np.all(np.diff(shades) > 0)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.integers(0, 100), st.booleans())
def test_masks_show_the_past_and_leave_the_future_alone(length: int, seed: int, per_key: bool) -> None:
    given_ = np.random.default_rng(seed).random((length,) if per_key else (length, length))
    shown = figures.whole(given_, length)
    future = np.triu_indices(length, 1)
    assert (shown[np.tril_indices(length)] == 1).all()
    assert np.array_equal(shown[future], np.broadcast_to(given_, (length, length))[future])


def test_a_forest_puts_each_row_where_its_number_is() -> None:
    figure = figures.forest(FOREST, label="AUC")
    panels = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title(loc="left") for axis in panels] == ["a", "b", "c", "d"]
    found = [float(line.get_xdata()[0]) for line in panels[0].lines if len(line.get_xdata()) == 1]
    assert found == pytest.approx(FOREST["value"].head(4).to_list())


# --- what the chapters share ------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 9), st.integers(0, 1000), st.sampled_from([None, 0.0, 0.1, 0.5]))
def test_cells_are_those_that_the_loss_counts(batch: int, seed: int, margin: float | None) -> None:
    draw = torch.Generator().manual_seed(seed)
    user, answer = (
        torch.nn.functional.normalize(torch.randn(batch, 4, generator=draw, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    ids = {name: torch.randint(0, batch, (batch,), generator=draw) for name in ("answer_ids", "user_ids")}
    cells = workbench.negatives(user, answer, margin=margin, **ids)
    _, counted = info_nce_rows(user, answer, margin=margin, **ids)
    assert sum(int((cell == 0).sum()) for cell in cells) / batch == pytest.approx(counted.kept)
    shares = (counted.masked_user_answer, counted.masked_user_user, counted.masked_answer_answer)
    for cell, masked in zip(cells, shares, strict=True):
        candidates = int((cell <= 1).sum())
        assert int((cell == 1).sum()) / max(candidates, 1) == pytest.approx(masked if candidates else 0)
        assert (np.diag(cell) == figures.KINDS.index("positive, or itself")).all()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=2)])
def test_attention_is_what_the_mask_allows(lora: Lora | None) -> None:
    batch = tiny.users([5], adapter=False)
    length = batch.valid.shape[1]
    for name, open_ in (("causal", False), ("bidirectional", True)):
        encoder = tiny.encoder(name, layers=2, lora=lora)
        before = encoder.embed(batch)
        found = workbench.attention(encoder, batch)
        assert found.shape == (2, length, length)
        assert found.sum(2) == pytest.approx(1, abs=1e-5)
        assert bool((found[:, 0, 1:] > 0).all()) == open_
        assert (np.triu(found[0], 1) > 0).any() == open_
        assert torch.equal(encoder.embed(batch), before)  # back on its fused kernel, no hook left


@pytest.mark.parametrize("mode", ["adapter", "text"])
def test_words_are_what_a_reader_would_call_the_tokens(mode: Literal["adapter", "text"]) -> None:
    user = tiny.user(4)
    sequence = encode_user(user, tiny.tokenizer(), tiny.QUERY, modality_input=mode, max_tokens=999)
    words = workbench.words(sequence, tiny.tokenizer())
    assert len(words) == len(sequence.input_ids)
    assert (words[0], words[-1]) == ("<bill>", "<USER>") and "<record>" not in words
    texts = [record.text for records in user.records.values() for record in records]
    assert all(text in (words if mode == "adapter" else "".join(words)) for text in texts)


def test_short_names_come_from_pseudonyms_and_look_like_no_number() -> None:
    users = [privacy.pseudonym(str(number), privacy.PUBLIC_SALT) for number in range(1, 200)]
    names = {story.short_name(user) for user in users}
    assert len(names) > 190 and not any(re.search(r"\d", name) for name in names)
    assert users[41] not in repr(story.Example(users[41], 7, 210, story.short_name(users[41])))


@pytest.mark.parametrize("seed", range(8))
def test_the_example_does_not_depend_on_the_order_of_rows(tmp_path: Path, seed: int) -> None:
    samples = pl.DataFrame(
        {"sample": range(12), "user": [str(i // 2) for i in range(12)], "anchor": [180, 210] * 6}
    ).with_columns(split=pl.lit("train"))
    records = pl.DataFrame(
        {
            "sample": np.repeat(range(12), 3),
            "modality": ["bill", "app", "tabular"] * 12,
            "last_day": [100, 100, None] * 12,
            "count": np.arange(36) % 17 + 1,
        }
    )
    chosen = []
    for order in (None, seed):
        for name, table in (("samples", samples), ("records", records)):
            drawn = table if order is None else table.sample(fraction=1.0, shuffle=True, seed=order)
            drawn.write_parquet(tmp_path / f"{name}.parquet")
        chosen.append(story.example(tmp_path))
    assert chosen[0] == chosen[1]
    assert chosen[0].anchor == 210


def test_a_batch_led_by_the_example(tmp_path: Path) -> None:
    """Its pair comes first and once; the others keep their order; the batch keeps its size."""
    inputs = tiny.corpus(tmp_path)
    pairs = batches.Pairs(inputs["tokens"], inputs["texts"], 6, seed=0)
    plain = pairs.rows(0)
    for sample in range(12):
        rows = workbench.led_by(story.Example("u", sample, 0, "household u"), pairs, inputs)
        samples = pairs.samples(rows)
        assert len(rows) == 6 and samples[0] == sample and samples.count(sample) == 1
        assert rows[1:].tolist() == [row for row in plain if pairs.samples(np.array([row])) != [sample]][:5]


def test_no_example_is_an_error_that_says_why(tmp_path: Path) -> None:
    samples = pl.DataFrame({"sample": [0], "user": ["1"], "anchor": [240], "split": ["probe"]})
    records = pl.DataFrame({"sample": [0], "modality": ["bill"], "last_day": [1], "count": [1]})
    samples.write_parquet(tmp_path / "samples.parquet")
    records.write_parquet(tmp_path / "records.parquet")
    with pytest.raises(story.StoryError, match="train_anchors"):
        story.example(tmp_path)


def test_tables_show_their_numbers_and_no_markup_of_others() -> None:
    frame = pl.DataFrame({"name": ["<b>a</b>", "b"], "x": [1234.5678, None], "n": [12345, 1]})
    html = story.table(frame, decimals=2, caption="<i>", bold=["b"])._repr_html_()
    assert "&lt;b&gt;a" in html and "<i>" not in html
    assert "1,234.57" in html and "12,345" in html and "–" in html
    assert html.count("<strong>") == 3


def test_a_template_in_colour_is_the_template() -> None:
    user = User({"bill": [Record("<script>x</script> & co")], "app": [Record("visit")]})
    html = story.coloured(render(user, "what <next>?"))._repr_html_()
    assert "<script>" not in html
    for token in ("<bill>", "</bill>", "<USER>"):
        assert f"<strong>{token.replace('<', '&lt;').replace('>', '&gt;')}</strong>" in html
    assert html.count("border-left") == len(MODALITIES) + 1
    assert len(SPECIAL_TOKENS) == 16 and len(SEGMENTS) == 9


def test_sentences_carry_sign_interval_and_verdict() -> None:
    line = ("ggsm", "causal", "mean", -0.00214, -0.01, 0.004, "no difference shown")
    columns = ["row", "reference", "task", "difference", "ci_low", "ci_high", "verdict"]
    table = pl.DataFrame([line], schema=columns, orient="row")
    said = story.compared(table, "ggsm", "causal")
    assert "−0.0021 [−0.0100, +0.0040]" in said and "**no difference shown**" in said
    with pytest.raises(story.StoryError, match="scheduler"):
        story.compared(table, "scheduler", "causal")
