"""Eq. 9-14: the order of the template, and the read-out at <USER> and <EOS>, on a small decoder."""

from __future__ import annotations

import re

import numpy as np
import pytest
import reference
import torch

from ggsm_core import backbone, collation, model, recipes, sections, template

HISTORY = {
    "app": ["visit to a store on a weekend evening"],
    "bill": ["soft drinks", "frozen pizza"],
    "tabular": ["age 45-54"],
}
QUERY = "What will this household buy next?"


@pytest.fixture(scope="module")
def encoder() -> model.UserEncoder:
    """A bidirectional two-layer encoder with random weights and plain text input."""
    torch.manual_seed(0)
    tokenizer = backbone.train_tokenizer(
        [QUERY, *(text for texts in HISTORY.values() for text in texts)], 512
    )
    options = sections.Backbone(layers=2, hidden=16, heads=2, intermediate=32, vocab=512)
    recipe = recipes.build("bidirectional", None, total_steps=1, hidden_size=16, max_length=96)
    decoder = backbone.new_decoder(options, len(tokenizer)).model
    return model.UserEncoder(decoder, tokenizer, recipe, features=None).eval()


@pytest.mark.parametrize("query", [None, QUERY])
def test_the_template_is_eq_9_and_10(query: str | None) -> None:
    """Six modalities in their order, a pair of tags even without a record, then [q], then <USER>."""
    user = template.User({name: [template.Record(text) for text in texts] for name, texts in HISTORY.items()})
    parts = reference.sequence({name: [] for name in HISTORY}, query)
    rendered = template.render(user, query)
    assert re.findall(r"</?\w+>|Instruction:", rendered) == [part for part in parts if part != query]
    place = 0
    for part in reference.sequence(HISTORY, query):
        assert part in rendered[place:], part
        place = rendered.index(part, place) + len(part)
    assert rendered.endswith("<USER>")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tower", ["user", "answer"])
def test_the_embedding_is_eq_11_to_14(encoder: model.UserEncoder, tower: str, side: str) -> None:
    """The final state at the last <USER> or at <EOS>, divided by its norm, wherever padding lies."""
    users = [
        template.User({"bill": [template.Record("soft drinks")] * n, "app": [template.Record("a visit")]})
        for n in (1, 4)
    ]
    if tower == "user":
        rows = [
            template.encode_user(user, encoder.tokenizer, QUERY, modality_input="text", max_tokens=96)
            for user in users
        ]
    else:
        rows = [
            template.encode_answer(text, encoder.tokenizer, max_tokens=32)
            for text in ("frozen pizza", "frozen pizza and soft drinks at the weekend")
        ]
    batch = collation.collate(rows, encoder.ids["<pad>"], None, side=side)  # type: ignore[arg-type]
    marker = encoder.ids["<USER>" if tower == "user" else "<EOS>"]
    with torch.no_grad():
        output = encoder(batch, tower=tower, site="final")  # type: ignore[arg-type]
    assert output.site is not None
    states = output.site.double().numpy()
    expected = reference.read_out(states, batch.input_ids.numpy(), marker)
    np.testing.assert_allclose(output.embedding.numpy(), expected, atol=1e-6)
    elsewhere = reference.read_out(np.roll(states, 1, axis=1), batch.input_ids.numpy(), marker)
    assert np.abs(output.embedding.numpy() - elsewhere).max() > 1e-3, "the state before it reads the same"
