"""The row of the records as numbers: its table against a slow reference, and what it can and can't tell."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from test_baselines import log, write

from ggsm_core import sections
from ggsm_core.baselines import records
from ggsm_core.data import windows
from ggsm_core.template import NUMBERS, Record, User


def user(*kinds: str, first: float = 1.0) -> User:
    return User(
        {"bill": [Record(kind, (first, *(float(i) for i in range(1, len(NUMBERS))))) for kind in kinds]}
    )


def test_the_table_holds_each_kind_and_its_numbers() -> None:
    """As many dimensions as columns: the decomposition only turns the table, and all distances stay."""
    users = [user("beef", first=3.0), user("milk", "beef"), user("milk", first=-2.0), User({}), user("rare")]
    system = records.Records(100, at_least=2).fit(users)
    assert system.kinds == {("bill", "beef"): 0, ("bill", "milk"): 1}
    table = np.zeros((5, 2 * records.WIDTH))
    for row, one in enumerate(users):
        for record in one.records.get("bill", []):
            if record.text != "rare":
                at = ["beef", "milk"].index(record.text) * records.WIDTH
                table[row, at : at + records.WIDTH] = 1.0, *record.numbers
    largest = np.abs(table).max(0)
    table /= np.where(largest == 0, 1.0, largest)
    got = system.embed(users)
    assert got @ got.T == pytest.approx(table @ table.T, abs=1e-9)
    assert not got[3].any() and not got[4].any(), "nothing that is known is shown of these"


def test_one_kind_in_two_modalities_is_two_kinds() -> None:
    both = User({"bill": [Record("all")], "app": [Record("all")]})
    system = records.Records(4, at_least=1).fit([both, user("all")])
    assert set(system.kinds) == {("app", "all"), ("bill", "all")}


def test_the_stage_sees_what_the_template_shows(tmp_path: Path) -> None:
    """A record that the template leaves out changes nothing; one that it shows does (the control)."""
    from safetensors.numpy import load_file

    folder = write(tmp_path / "w", log(60), users=60)
    events, samples = (pl.read_parquet(folder / f"{name}.parquet") for name in ("events", "samples"))
    found = windows.history(events, samples, 90)
    shown = sections.Template(tabular=2)
    asked = SimpleNamespace(recipe="records", template=shown, backbone=sections.Backbone(hidden=8))

    def embedded(table: pl.DataFrame) -> np.ndarray:
        table.write_parquet(folder / "records.parquet")
        records.run(asked, {"windows": folder}, tmp_path, lambda *_: None)
        stored = load_file(tmp_path / "embeddings.safetensors")
        assert stored["sample"].tolist() == samples.filter(pl.col("split") == "probe")["sample"].to_list()
        return stored["embeddings"]

    def louder(*, is_shown: bool) -> pl.DataFrame:
        fits = pl.col("rank") < shown.tabular
        hit = (pl.col("modality") == "tabular") & (fits if is_shown else ~fits)
        assert found.filter(hit).height, "the test needs such records"
        grown = pl.when(hit).then(pl.col("log_amount") + 1 + pl.col("sample") % 3).otherwise("log_amount")
        return found.with_columns(log_amount=grown)

    before = embedded(found)
    assert np.isfinite(before).all() and before.std() > 0
    assert np.array_equal(embedded(louder(is_shown=False)), before)
    assert not np.allclose(embedded(louder(is_shown=True)), before)
