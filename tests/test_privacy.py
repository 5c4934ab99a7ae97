"""Nobody's identifier gets past the edge."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from ggsm_core import params, sections, stages
from ggsm_core.data import complete_journey, privacy, windows
from ggsm_core.provenance import package_files
from ggsm_core.runs import Store
from ggsm_core.template import render

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
HEX = re.compile(r"[0-9a-f]{20}")


def households() -> set[str]:
    """The raw numbers, read past the adapter."""
    (path,) = package_files(complete_journey.PACKAGE, "data/transactions.parquet")
    return set(
        pl.scan_parquet(path)
        .select(pl.col("household_id").cast(pl.String))
        .unique()
        .collect()["household_id"]
    )


def test_a_pseudonym_depends_on_the_salt_and_every_character() -> None:
    assert privacy.pseudonym("42", "a") == privacy.pseudonym("42", "a")
    names = {privacy.pseudonym(name, salt) for name in ("42", "4", "2", "42 ") for salt in ("a", "b", "ab")}
    assert len(names) == 12 and all(HEX.fullmatch(name) for name in names)


def test_a_column_is_hashed_value_by_value() -> None:
    frame = pl.DataFrame({"user": ["7", None, "8", "7"], "number": [7, None, 8, 7]})
    found = frame.select(privacy.hidden(pl.col(name), "salt") for name in frame.columns)
    expected = [privacy.pseudonym("7", "salt"), None, privacy.pseudonym("8", "salt")]
    assert found["user"].to_list() == found["number"].to_list() == [*expected, expected[0]]
    empty = frame.filter(pl.col("user").is_null())
    assert empty.select(privacy.hidden(pl.col("user"), "salt"))["user"].to_list() == [None]


def test_the_salt_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(privacy.SALT, raising=False)
    assert privacy.public_salt() == privacy.PUBLIC_SALT
    with pytest.raises(privacy.SaltError, match=privacy.SALT):
        privacy.secret_salt()
    monkeypatch.setenv(privacy.SALT, "short")
    with pytest.raises(privacy.SaltError, match="16 characters"):
        privacy.public_salt()
    monkeypatch.setenv(privacy.SALT, "sixteen letters and more")
    assert privacy.public_salt() == privacy.secret_salt() == "sixteen letters and more"


def test_another_salt_is_another_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Folds and draws follow the order of pseudonyms, so a run's id covers the salt and does not show it."""

    def node() -> stages.Node:
        return stages.Plan(stages.GRAPH, params.load("params/smoke.yaml"), Store(tmp_path)).node("tokens")

    monkeypatch.delenv(privacy.SALT, raising=False)
    before = node()
    monkeypatch.setenv(privacy.SALT, "sixteen letters and more")
    after = node()
    assert before.name != after.name
    assert "sixteen" not in json.dumps([after.config, after.inputs["windows"].config])


def test_adapter_tables_and_rendered_histories_hold_no_household() -> None:
    raw = households()
    assert len(raw) == 2_469
    tables = {
        "purchases": complete_journey.purchases(),
        "campaigns": complete_journey.campaigns(),
        "redemptions": complete_journey.redemptions(),
        "incomes": complete_journey.incomes(),
    }
    users = {privacy.pseudonym(number, privacy.public_salt()) for number in raw}
    for name, table in tables.items():
        assert "household_id" not in table.columns and set(table["user"]) <= users, name
    assert set(tables["purchases"]["user"]) == users
    some = tables["purchases"]["user"].unique().sort().head(3).to_list()
    events = complete_journey.events(tables["purchases"].filter(pl.col("user").is_in(some)))
    events = events.filter(pl.col("user").is_in(some))
    assert set(events["user"]) == set(some)
    found = pl.DataFrame({"sample": range(3), "user": some, "anchor": [300] * 3}).cast({"anchor": pl.Int32})
    for _, user in windows.users(windows.history(events, found, 300), sections.Template()):
        assert not HEX.search(render(user))  # not even the pseudonym


def test_notebooks_show_no_user_column() -> None:
    """What a cell shows names households by ``story.short_name`` alone: no table that is shown has users."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            shown = re.findall(r"(?:display|print|story\.table)\((?:[^()]|\([^()]*\))*\)", source)
            assert not [call for call in shown if re.search(r"""["']user["']|\.user\b""", call)], path.name
            assert "household_id" not in source, path.name


def test_a_log_made_elsewhere_keeps_no_raw_identifier(tmp_path: Path) -> None:
    """The real command on a real file, searched byte by byte."""
    rows = [f"ada.lovelace@example.org,2017-05-0{day}T10:00Z,bill,milk,2.5,milk,false" for day in range(1, 9)]
    (tmp_path / "log.csv").write_text("\n".join(["user,time,modality,text,amount,item,simulated", *rows]))
    command = [sys.executable, "-m", "ggsm_core.data.readers", "log.csv", "--out", "log.parquet"]
    environment = {"PYTHONPATH": str(NOTEBOOKS.parent), privacy.SALT: "sixteen letters and more"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ada" not in done.stdout + done.stderr
    assert b"lovelace" not in (tmp_path / "log.parquet").read_bytes()
