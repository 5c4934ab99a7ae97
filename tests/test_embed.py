"""Embedding an event log: one row a user, the same however it is cut up, resumable, bad rows named."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny

from ggsm_core import collation, embed, model, sections, template
from ggsm_core.data import bulk, windows
from ggsm_core.data.events import EPOCH, SCHEMA, EventError, validate

ANCHOR = date(2017, 7, 26)  # the day after the last event
TEMPLATED = {"anchor": ANCHOR, "history_days": 90, "template": sections.Template()}
TEXTS = tiny.WORDS.split(", ")


def log(users: int, seed: int = 0) -> pl.DataFrame:
    """Some events of each user over 200 days; user 3 alone has none in the last 90."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "user": f"u{user:05d}",
            "time": datetime(2017, 1, 2, tzinfo=UTC)
            + timedelta(days=int(rng.integers(0, 40) if user == 3 else rng.integers(0 if n else 150, 200))),
            "modality": str(rng.choice(["bill", "app", "spm"])),
            "text": str(rng.choice(TEXTS)),
            "amount": float(rng.normal(5, 2)),
            "item": None,
            "simulated": False,
        }
        for user in range(users)
        for n in range(int(rng.integers(1, 9)))
    ]
    rows.append(rows[0] | {"time": datetime(2017, 7, 25, tzinfo=UTC)})
    shuffled = pl.DataFrame(rows, schema_overrides={"item": pl.String}).sample(
        fraction=1, shuffle=True, seed=seed
    )
    return shuffled.with_columns(pl.col("time").cast(pl.Datetime("us", "UTC")))


def encoder(days: int = 90, **more: Any) -> model.UserEncoder:
    """With adapters and a template of its own, for histories of so many days."""
    built = tiny.encoder("ggsm", **({"features": tiny.FEATURES, "layers": 2} | more))
    built.template = sections.Template(bill=3, app=2, max_user_tokens=tiny.LONGEST)
    built.history_days = days
    return built


def vectors(texts: list[str]) -> np.ndarray:
    """Float[n, F], in place of MiniLM."""
    return np.stack([tiny.feature_of(text) for text in texts])


def run(folder: Path, events: pl.DataFrame, name: str = "out", **more: Any) -> pl.DataFrame:
    """What `embed` writes."""
    folder.mkdir(exist_ok=True)
    events.write_parquet(folder / "events.parquet")
    given = {"texts": vectors, "part_size": 7} | more
    embed.embed(given.pop("encoder", None) or encoder(), folder / "events.parquet", folder / name, **given)
    return pl.read_parquet(folder / name)


@pytest.mark.parametrize(("days", "breakdowns", "without"), [(90, False, 1), (90, True, 1), (12, False, 13)])
def test_each_user_has_the_embedding_of_its_own_history(
    tmp_path: Path, days: int, breakdowns: bool, without: int
) -> None:
    """Against windows, template and encoder, one user at a time; the encoder says what a history is."""
    events, used = log(20), encoder(days)
    used.breakdowns = breakdowns
    used.template = used.template.model_copy(update={"query": "What next?" if breakdowns else None})
    out = run(tmp_path, events, encoder=used)
    assert out["user"].to_list() == [f"u{i:05d}" for i in range(20)]
    broken = 0
    whole = validate(events.with_columns(item=pl.lit(None, pl.String)))
    anchor = int((whole["time"].dt.date().max() - EPOCH).days) + 1  # type: ignore[operator]
    for row in out.rows(named=True):
        found = pl.DataFrame({"sample": [0], "user": [row["user"]], "anchor": [anchor]}).cast(
            {"anchor": pl.Int32}
        )
        records = windows.history(whole, found, days, breakdowns=breakdowns)
        broken += records["text"].str.starts_with("visits on a ").sum()
        made = list(windows.users(records, used.template))
        if not made:
            assert row["records"] == 0 and row["embedding"] is None
            continue
        asked = used.template.query
        encoded = template.encode_user(made[0][1], used.tokenizer, asked, max_tokens=tiny.LONGEST)
        batch = collation.collate([encoded], tiny.pad_id(), tiny.feature_of)
        assert row["records"] == len(encoded.records) > 0
        np.testing.assert_allclose(row["embedding"], used.embed(batch)[0].numpy(), atol=1e-5)
    nobody = out.filter(pl.col("records") == 0)["user"]
    assert "u00003" in nobody and len(nobody) == without
    assert (broken > 0) == breakdowns


def test_parts_do_not_matter(tmp_path: Path) -> None:
    events = log(20)
    first = run(tmp_path / "a", events, part_size=3)
    second = run(tmp_path / "b", events.sort("user"), part_size=1000)
    assert first.drop("embedding").equals(second.drop("embedding"))
    both = [np.array([e for e in t["embedding"].to_list() if e is not None]) for t in (first, second)]
    np.testing.assert_allclose(*both, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_type_is_the_one_asked_for(tmp_path: Path, dtype: Any) -> None:
    out = run(tmp_path, log(5), dtype=dtype)
    kind = pl.Float16 if dtype == "float16" else pl.Float32
    assert out.schema["embedding"] == pl.Array(kind, tiny.HIDDEN)


def test_text_input_needs_no_text_encoder(tmp_path: Path) -> None:
    used = encoder(features=None)
    used.template = sections.Template(
        modality_input="text", bill=1, app=1, spm=1, max_user_tokens=tiny.LONGEST
    )
    # A byte is a token here, and 64 are all there are.
    short = log(5).with_columns(text=pl.lit("tea"), modality=pl.lit("app"))
    out = run(tmp_path, short, encoder=used, texts=None)
    assert out.filter(pl.col("embedding").is_null())["user"].to_list() == ["u00003"]


class Cut(Exception):
    """A machine that went away."""


def test_an_interrupted_call_goes_on_from_its_parts(tmp_path: Path) -> None:
    """The finished parts are not embedded again, and the result is the undisturbed one."""
    events = log(20)
    expected = run(tmp_path / "whole", events)

    def stop(done: float, total: float, message: str) -> None:
        if done >= 14:
            raise Cut

    with pytest.raises(Cut):
        run(tmp_path / "cut", events, progress=stop)
    assert not (tmp_path / "cut" / "out").exists()
    calls: list[int] = []
    used = encoder()
    honest = used.embed
    used.embed = lambda batch, *a: calls.append(len(batch.input_ids)) or honest(batch, *a)  # type: ignore[method-assign,func-returns-value]
    out = run(tmp_path / "cut", events, encoder=used)
    assert out.equals(expected) and sum(calls) == 6
    assert not list((tmp_path / "cut").glob("*.parts"))


def test_parts_of_another_call_are_not_mixed_in(tmp_path: Path) -> None:
    def stop(done: float, total: float, message: str) -> None:
        raise Cut

    with pytest.raises(Cut):
        run(tmp_path, log(20), progress=stop)
    other = encoder()
    other.template = sections.Template(bill=4, app=2, max_user_tokens=tiny.LONGEST)
    for more in ({"encoder": encoder(30)}, {"dtype": "float16"}, {"encoder": other}):
        with pytest.raises(embed.EmbedError, match="another model, log or setting"):
            run(tmp_path, log(20), **more)
    with pytest.raises(embed.EmbedError, match="another"):
        run(tmp_path, log(21))


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """Neither taken for the output at the end of the work, nor for the parts, which are deleted."""
    mine = tmp_path / "out.parts" / "mine"
    mine.parent.mkdir()
    mine.write_text("kept")
    with pytest.raises(embed.EmbedError, match=r"out\.parts: is there and was not made by this command"):
        run(tmp_path, log(3))
    assert [path.name for path in mine.parent.iterdir()] == ["mine"]
    mine.unlink()
    run(tmp_path, log(3))  # empty, as a call leaves it that was cut off at once
    (tmp_path / "folder").mkdir()
    path = tmp_path / "events.parquet"
    for work in (partial(embed.embed, encoder()), partial(bulk.local, **TEMPLATED)):
        with pytest.raises(EventError, match=r"--out: .*folder is a folder"):
            work(path, tmp_path / "folder")
    assert not list(tmp_path.glob("*.parts"))


def test_a_last_event_that_is_still_to_come_sets_no_anchor(tmp_path: Path) -> None:
    """One mistyped date would leave everybody without a history."""
    row = pl.int_range(pl.len())
    late = log(5).with_columns(
        time=pl.when(row == 4).then(pl.datetime(2107, 7, 25, time_zone="UTC")).otherwise("time")
    )
    with pytest.raises(embed.EmbedError, match="latest is of 2107-07-25 00:00 UTC, still to come"):
        run(tmp_path, late)
    assert [path.name for path in tmp_path.iterdir()] == ["events.parquet"]
    assert run(tmp_path, late, anchor=ANCHOR)["embedding"].count() >= 4


@pytest.mark.parametrize("out", ["events.parquet", "more/../events.parquet", "linked"])
def test_the_input_is_never_the_output(tmp_path: Path, out: str) -> None:
    (tmp_path / "more").mkdir()
    log(3).write_parquet(tmp_path / "events.parquet")
    (tmp_path / "linked").hardlink_to(tmp_path / "events.parquet")
    with pytest.raises(EventError, match=r"--out: .* is the input"):
        embed.embed(encoder(), tmp_path / "events.parquet", tmp_path / out, texts=vectors)
    assert pl.read_parquet(tmp_path / "events.parquet").equals(log(3))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"anchor": date(1999, 1, 1)},
            "1998-10-03 to 1998-12-31; .*events.parquet has 2017-01-.* 2017-07-25",
        ),
        ({"part_size": 0}, "part_size: 0"),
    ],
)
def test_settings_that_embed_nobody_are_refused(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(tmp_path, log(5), **more)
    assert [path.name for path in tmp_path.iterdir()] == ["events.parquet"]
    time, amount = pl.lit(None, pl.Datetime("us", "UTC")), pl.lit(None, pl.Float64)
    facts = log(2).with_columns(time=time, modality=pl.lit("tabular"), amount=amount)
    assert run(tmp_path, facts, anchor=date(1999, 1, 1))["records"].min() == 1  # facts have no time


def foreign_file(kind: str, path: Path) -> Path:
    """What is no log, under the name of one."""
    if kind == "folder":
        path.mkdir()
    elif kind == "csv":
        log(3).write_csv(path)
    elif kind == "damaged":
        log(50).write_parquet(path)
        content = path.read_bytes()
        path.write_bytes(content[:40] + bytes(len(content) // 3) + content[40 + len(content) // 3 :])
    else:
        path.touch()
    return path


@pytest.mark.parametrize("kind", ["folder", "csv", "damaged", "empty"])
def test_a_file_that_is_no_log_is_named(tmp_path: Path, kind: str) -> None:
    path = foreign_file(kind, tmp_path / "events.parquet")
    for work in (
        lambda: embed.embed(encoder(), path, tmp_path / "out", texts=vectors),
        lambda: bulk.local(path, tmp_path / "out", **TEMPLATED),
    ):
        with pytest.raises(EventError, match=r"events\.parquet.*python -m ggsm_core\.data\.readers"):
            work()
    assert [p.name for p in tmp_path.iterdir()] == ["events.parquet"]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("user", pl.col("user").str.slice(1).cast(pl.Int64)),
        ("user", pl.concat_list("user")),
        ("text", pl.col("text").cast(pl.Binary)),
        ("amount", pl.lit(True)),
        ("simulated", pl.lit(7)),
        ("time", pl.col("time").dt.replace_time_zone(None)),
    ],
)
def test_a_column_of_another_type_is_named(tmp_path: Path, column: str, values: pl.Expr) -> None:
    said = rf"events\.parquet: {column}: .*python -m ggsm_core\.data\.readers"
    events = log(3).with_columns(values.alias(column))
    with pytest.raises(EventError, match=said):
        run(tmp_path, events)
    with pytest.raises(EventError, match=said):
        bulk.local(tmp_path / "events.parquet", tmp_path / "o", **TEMPLATED)


def test_bad_rows_are_named_by_line_and_field(tmp_path: Path) -> None:
    events = log(10).with_row_index("i")
    at = pl.col("i")
    events = events.with_columns(
        amount=pl.when(at == 4).then(float("nan")).otherwise("amount"),
        text=pl.when(at == 6).then(pl.lit(" ")).otherwise("text"),
        modality=pl.when(at == 8).then(pl.lit("shop")).otherwise("modality"),
        time=pl.when(at.is_in([6, 9])).then(None).otherwise("time"),
    ).drop("i")
    with pytest.raises(EventError) as error:
        run(tmp_path, events)
    lines = str(error.value).splitlines()[1:]
    assert lines[0] == "line 5: amount: not finite"
    assert lines[1] == "line 7: text: null or empty, time: null away from tabular"
    assert lines[2].startswith("line 9: modality: not Enum")
    assert lines[3] == "line 10: time: null away from tabular"
    assert not (tmp_path / "out").exists()
    many = log(10).with_columns(user=pl.lit(None, pl.String))
    with pytest.raises(EventError, match="and more"):
        run(tmp_path, many)


@pytest.mark.parametrize("column", SCHEMA)
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    with pytest.raises(EventError, match=column):
        run(tmp_path, log(3).drop(column))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    used = encoder(features=None)
    used.template = sections.Template(
        modality_input="text", bill=1, app=1, spm=1, max_user_tokens=tiny.LONGEST
    )
    used.save(tmp_path / "model")
    log(5).write_parquet(tmp_path / "events.parquet")
    arguments = [
        f"--{k}={tmp_path / v}" for k, v in (("model", "model"), ("events", "events.parquet"), ("out", "o"))
    ]
    assert embed.main(arguments) == 0
    told = capsys.readouterr().out
    assert "5 of 5 users embedded" in told
    assert "history: 90 days before anchor 2017-07-26; 2 of 5 users have no embedding" in told
    assert pl.read_parquet(tmp_path / "o").height == 5
    log(5).drop("text").write_parquet(tmp_path / "events.parquet")
    assert embed.main(arguments) == 1
    assert "text" in capsys.readouterr().err
    ray = ["--engine", "ray", "--anchor", "2017-07-26", "--part-size", "7"]
    assert embed.main([*arguments, *ray]) == 1 and "--part-size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        embed.main([*arguments, "--anchor", "2017-02-30"])
    assert "--anchor: '2017-02-30' is no day of the calendar; write it as" in capsys.readouterr().err
    for name in ("template", "history_days"):
        unknown = encoder()
        setattr(unknown, name, None)
        with pytest.raises(embed.EmbedError, match="without template or history_days"):
            embed.embed(unknown, tmp_path / "events.parquet", tmp_path / "p")
