"""Whether guidance finds a token that is known to matter."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from ggsm_core import planted
from ggsm_core.backbone import train_tokenizer
from ggsm_core.sections import Guidance


def batch(users: int = 50, seed: int = 0) -> planted.Planted:
    return planted.draw(train_tokenizer(["key noise answer 1"], 300), users, np.random.default_rng(seed))


def test_the_key_is_the_one_record_that_decides() -> None:
    """It alone has its kind's vector; its place says nothing, and all else is noise."""
    drawn = batch(400)
    assert (drawn.key.sum(1) == 1).all() and (drawn.records.sum(1) == planted.RECORDS).all()
    assert (drawn.records | ~drawn.key).all()
    assert drawn.user.features is not None
    keys = drawn.user.features[drawn.key].numpy()
    wanted = np.stack([planted.vector(f"key {kind}") for kind in drawn.kind.tolist()])
    assert np.array_equal(keys, wanted)
    place = drawn.key[drawn.records].view(400, -1).float().argmax(1)
    assert set(place.tolist()) == set(range(planted.RECORDS))
    assert abs(np.corrcoef(place, drawn.kind)[0, 1]) < 0.15


def test_found_is_a_chance() -> None:
    drawn = batch()
    key, noise = drawn.key.float(), torch.rand(drawn.key.shape, generator=torch.Generator().manual_seed(0))
    assert planted.found(key, drawn) == 1.0
    assert planted.found(1 - key, drawn) == 0.0
    assert planted.found(torch.ones_like(key), drawn) == 0.5
    assert planted.found(noise, drawn) == pytest.approx(0.5, abs=0.1)
    assert planted.found(noise + (~drawn.records).float() * 9, drawn) == planted.found(noise, drawn)


def test_the_final_layer_is_blind() -> None:
    seen = planted.experiment(Guidance(normalise="rank", grad_site="final", warm_steps=2), steps=3, users=8)
    assert seen["found"].to_list() == [0.5] * 3


def late(seen: pl.DataFrame) -> float:
    """Mean of the last ten steps."""
    return float(seen["found"][-10:].mean())  # type: ignore[arg-type]


@pytest.mark.slow
def test_guidance_finds_the_key_once_the_decoder_reads_it() -> None:
    """At the start it says nothing. Negative control: shuffled weights never find it."""
    seen = planted.experiment(Guidance(normalise="rank", warm_steps=40))
    assert seen["loss"][-10:].mean() < seen["loss"][:10].mean() / 2
    assert float(seen["found"][:20].mean()) == pytest.approx(0.5, abs=0.1)  # type: ignore[arg-type]
    assert late(seen) > 0.85
    shuffled = planted.experiment(Guidance(normalise="rank", source="shuffled", warm_steps=40))
    assert late(shuffled) == pytest.approx(0.5, abs=0.1)
