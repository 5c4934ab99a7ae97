"""What the decoder learns before contrastive training: from which tokens to predict which."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy

from ggsm_core import adapters, backbone, collation, pretraining, sections, template

USERS = {sample: tiny.user(records, seed=sample) for sample, records in ((0, 2), (1, 5), (2, 3))}
PAIRS = pl.DataFrame(
    {
        "sample": [0, 1, 2],
        "query": [tiny.QUERY, None, tiny.QUERY],
        "answer": ["frozen pizza", "soft drinks (grocery), once", "homeowner"],
    }
)
ROOM = tiny.LONGEST + 32


@pytest.fixture(scope="module")
def decoder() -> Any:
    torch.manual_seed(0)
    return backbone.new_decoder(sections.Backbone(layers=1, hidden=32, heads=2), len(tiny.tokenizer()))


@pytest.fixture(scope="module")
def soft(decoder: Any) -> adapters.Adapters:
    torch.manual_seed(1)
    return adapters.Adapters(tiny.FEATURES, decoder.get_input_embeddings())


def record_loss(decoder: Any, soft: adapters.Adapters, pairs: pl.DataFrame) -> torch.Tensor:
    return pretraining._record_loss(decoder, soft, tiny.tokenizer(), USERS, ROOM, tiny.feature_of, pairs)


def test_the_second_part_predicts_the_answer_from_user_on_and_nothing_else(
    decoder: Any, soft: adapters.Adapters
) -> None:
    """One sequence at a time and without padding: the answer and <EOS>, the first of them at <USER>."""
    record = tiny.tokenizer().convert_tokens_to_ids(template.RECORD_TOKEN)
    losses = []
    for sample, query, answer in PAIRS.rows():
        user = template.encode_user(USERS[sample], tiny.tokenizer(), query, max_tokens=ROOM)
        end = template.encode_answer(answer, tiny.tokenizer(), max_tokens=ROOM)
        head = collation.collate([user], tiny.pad_id(), tiny.feature_of)
        words = decoder.get_input_embeddings()
        told = soft.insert(words(head.input_ids), head, record)
        answered = torch.as_tensor(end.input_ids)
        whole = torch.cat([told, words(answered)[None]], dim=1)
        logits = decoder(inputs_embeds=whole).logits[0, len(user.input_ids) - 1 : -1]
        losses += cross_entropy(logits, answered, reduction="none").tolist()
    expected = sum(losses) / len(losses)
    assert record_loss(decoder, soft, PAIRS).item() == pytest.approx(expected, rel=1e-5)


def test_adapters_learn_in_the_second_part(decoder: Any, soft: adapters.Adapters) -> None:
    """Else all users would look alike where contrastive training starts."""
    used = [parameter for name in ("bill", "app") for parameter in soft[name].parameters()]
    gradients = torch.autograd.grad(record_loss(decoder, soft, PAIRS), used)
    assert all(bool(gradient.abs().max() > 0) for gradient in gradients)


def test_the_first_part_predicts_every_token_of_the_plain_text_and_nothing_after_it(decoder: Any) -> None:
    losses = []
    for sample, query, answer in PAIRS.rows():
        text = template.encode_user(
            USERS[sample], tiny.tokenizer(), query, modality_input="text", max_tokens=ROOM
        )
        end = template.encode_answer(answer, tiny.tokenizer(), max_tokens=ROOM)
        ids = torch.as_tensor([*text.input_ids, *end.input_ids])
        logits = decoder(input_ids=ids[None]).logits[0, :-1]
        losses += cross_entropy(logits, ids[1:], reduction="none").tolist()
    found = pretraining._text_loss(decoder, tiny.tokenizer(), USERS, ROOM, PAIRS)
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


TEMPLATE = SimpleNamespace(
    modality_input="adapter", query=None, max_user_tokens=tiny.LONGEST, max_answer_tokens=32
)


@pytest.mark.parametrize(
    ("limit", "error"),
    [
        ({"max_answer_tokens": 2}, template.AnswerTooLong),
        ({"max_user_tokens": 13}, template.QueryTooLong),
        ({"query": "what " * 99}, template.QueryTooLong),
    ],
)
def test_what_no_sequence_can_hold_is_refused_before_training(
    limit: dict[str, Any], error: type[Exception]
) -> None:
    check = partial(pretraining._check_lengths, PAIRS.drop_nulls(), tiny.tokenizer())
    check(TEMPLATE, 128)
    with pytest.raises(error):
        check(SimpleNamespace(**vars(TEMPLATE) | limit), 128)
    with pytest.raises(template.QueryTooLong, match=r"pretraining\.sequence_tokens: 32 has no room"):
        check(TEMPLATE, 32)


@pytest.mark.parametrize("steps", [1, 10, 11])
def test_any_number_of_steps_trains_and_a_loss_that_is_no_number_stops_it(steps: int, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(()))
    settings = sections.Pretraining(learning_rate=0.1)

    def train(loss_of: Any) -> None:
        said: list[Any] = []
        log = tmp_path / "log.jsonl"
        pretraining._train(
            settings, PAIRS, log, steps, lambda *told: said.append(told), [weight], loss_of, 0, steps, 2
        )
        assert len(log.read_text().splitlines()) == len(said) == steps

    train(lambda pairs: weight**2)
    assert weight.item() < 1
    with pytest.raises(pretraining.Diverged, match=r"pretraining\.learning_rate.*step 0 is nan"):
        train(lambda pairs: weight * float("nan"))
