"""Ray itself, started once: templates with the same bytes in any order, each user embedded once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
import test_bulk
from polars.testing import assert_frame_equal
from test_embed import ANCHOR, Cut, encoder, log, run

from ggsm_core import embed
from ggsm_core.data import bulk
from ggsm_core.data.events import EventError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Ray's own
]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One Ray for all calls, since starting it takes longer than they do."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        # Workers without work stay: each takes seconds to start.
        patch.setenv("RAY_num_workers_soft_limit", "32")
        patch.setenv("RAY_idle_worker_killing_time_threshold_ms", "600000")
        with bulk.connected() as ray:
            yield ray


def test_ray_writes_the_same_bytes(tmp_path: Path) -> None:
    """The command; Ray gets the log in another order."""
    events = test_bulk.log(60)
    events.write_parquet(tmp_path / "sorted.parquet")
    events.sample(fraction=1, shuffle=True, seed=2).write_parquet(tmp_path / "shuffled.parquet")
    for log_name, engine in (("sorted.parquet", "local"), ("shuffled.parquet", "ray")):
        more = ["--out", str(tmp_path / engine), "--anchor", "2017-07-01", "--engine", engine]
        assert bulk.main([str(tmp_path / log_name), *more]) == 0
    assert (tmp_path / "local").read_bytes() == (tmp_path / "ray").read_bytes()
    assert pq.read_metadata(tmp_path / "ray").num_rows == 60


def test_ray_embeds_each_user_once_however_often_it_is_cut_off(tmp_path: Path) -> None:
    """Cut off after three shards; those stay as they are, and all rows are those of one machine."""
    events, used = log(20), encoder(features=384)  # MiniLM's, which every worker loads
    expected = run(tmp_path, events, encoder=used, texts=None)
    given = {"anchor": ANCHOR, "texts": None}

    def stop(done: float, total: float, message: str) -> None:
        if done >= 3:
            raise Cut

    with pytest.raises(Cut):
        embed.on_ray(used, tmp_path / "events.parquet", tmp_path / "shards", progress=stop, **given)
    parts = tmp_path / "shards.parts"
    kept = {part.name: part.stat().st_mtime_ns for part in parts.glob("*.parquet")}
    assert len(kept) >= 3 and not (tmp_path / "shards").exists()
    with pytest.raises(embed.EmbedError, match="another model, log or setting"):
        other = encoder(9, features=384)
        embed.on_ray(other, tmp_path / "events.parquet", tmp_path / "shards", **given)
    embed.on_ray(used, tmp_path / "events.parquet", tmp_path / "shards", **given)
    shards = sorted((tmp_path / "shards").iterdir())
    assert not parts.exists() and len(shards) > len(kept)
    assert kept == {part.name: part.stat().st_mtime_ns for part in shards if part.name in kept}
    assert_frame_equal(pl.read_parquet(tmp_path / "shards").sort("user"), expected, abs_tol=1e-5)
    with pytest.raises(embed.EmbedError, match="is there already"):
        embed.on_ray(used, tmp_path / "events.parquet", tmp_path / "shards", **given)
    events.clear().write_parquet(tmp_path / "none.parquet")
    with pytest.raises(EventError, match=r"none\.parquet: holds not one event"):
        embed.on_ray(used, tmp_path / "none.parquet", tmp_path / "nobody", **given)
