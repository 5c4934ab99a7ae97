"""The nine downstream tasks, one for each of the paper's (Table 1).

A label is 1, 0 or null: null where the task's filter leaves the sample out. Labels (but ``income_ge75k``, a
trait) look at the future window [a, a + future_days) of a sample with anchor day a, filters at the history,
except ``mailer_share_hi``, whose filter (enough items at covered stores) is part of what makes the label
computable.
"""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

DOMAINS = ("user prediction", "preference", "marketing")


@dataclass(frozen=True, slots=True)
class Task:
    """A binary task: which of the paper's it stands for, and what a 1 means."""

    name: str
    domain: str
    stands_for: str
    meaning: str


TASKS = (
    Task(
        "event_purchase", DOMAINS[0], "Concert", "bought an occasion item (cards, seasonal, toys, floral ...)"
    ),
    Task("login_7d", DOMAINS[0], "User log-in", "at least one basket in the first 7 days"),
    Task("mau_loss_30d", DOMAINS[0], "MAU loss", "no basket at all"),
    Task("fuel_30d_no_recent", DOMAINS[1], "Transit", "bought fuel, having bought none in the last 30 days"),
    Task(
        "income_ge75k", DOMAINS[1], "Power", "household income is 75K or more (a trait, not a future event)"
    ),
    Task("seafood_30d", DOMAINS[1], "Food", "bought from a seafood category"),
    Task("media_30d", DOMAINS[1], "Movie", "bought magazines, newspapers, books, audio or video"),
    Task(
        "redeem_known", DOMAINS[2], "Achiev.", "redeemed a coupon, with a campaign running on the anchor day"
    ),
    Task("mailer_share_hi", DOMAINS[2], "Physical", "share of items from a mailer page above the median"),
)
NAMES = tuple(task.name for task in TASKS)

OCCASIONS = (
    "GREETING CARDS/WRAP/PARTY SPLY",
    "CHRISTMAS  SEASONAL",
    "FALL AND WINTER SEASONAL",
    "SEASONAL",
    "SPRING/SUMMER SEASONAL",
    "HALLOWEEN",
    "EASTER",
    "VALENTINE",
    "FIREWORKS",
    "TICKETS",
    "PARTY TRAYS",
    "BAKERY PARTY TRAYS",
    "TOYS AND GAMES",
)
MEDIA = ("MAGAZINE", "NEWSPAPER", "BOOKSTORE", "AUDIO/VIDEO PRODUCTS")
HIGH_INCOMES = ("75-99K", "100-124K", "125-149K", "150-174K", "175-199K", "200-249K", "250K+")
LOGIN_DAYS = 7
RECENT_DAYS = 30
COVERED_ITEMS = 15
"""Fewest items at covered stores for a mailer share."""


def labels(
    samples: pl.DataFrame,
    bought: pl.DataFrame,
    campaigns: pl.DataFrame,
    redemptions: pl.DataFrame,
    incomes: pl.DataFrame,
    future_days: int,
) -> pl.DataFrame:
    """Labels of ``samples`` (sample, user, anchor): sample and a nullable Int8 column for each of ``NAMES``.

    The other tables are those of ``complete_journey``. The median of ``mailer_share_hi`` is taken over all
    the samples given, so give all of them and select afterwards.
    """
    category, department = pl.col("category").fill_null(""), pl.col("department").fill_null("")
    after = pl.col("day") - pl.col("anchor")
    ahead = after.is_between(0, future_days - 1)
    covered = ahead & pl.col("covered")
    mailed = pl.col("mailer").fill_null("0") != "0"
    items = bought.lazy().select(
        "user",
        "day",
        "covered",
        "fuel",
        mailed=mailed,
        occasion=category.is_in(OCCASIONS) | (department == "FLORAL"),
        seafood=category.str.contains("SEAFOOD", literal=True),
        media=category.is_in(MEDIA),
    )
    windows = samples.lazy().select("sample", "user", "anchor")
    per_sample = (
        windows.join(items, on="user")
        .filter(after.is_between(-RECENT_DAYS, future_days - 1))
        .group_by("sample")
        .agg(
            ahead=ahead.any(),
            login=after.is_between(0, LOGIN_DAYS - 1).any(),
            occasion=(ahead & pl.col("occasion")).any(),
            seafood=(ahead & pl.col("seafood")).any(),
            media=(ahead & pl.col("media")).any(),
            fuel=(ahead & pl.col("fuel")).any(),
            fuel_recent=(after.is_between(-RECENT_DAYS, -1) & pl.col("fuel")).any(),
            covered=covered.sum(),
            mailed=(covered & pl.col("mailed")).sum(),
        )
    )
    running = (
        windows.join(campaigns.lazy(), on="user")
        .filter(pl.col("anchor").is_between("start", "end"))
        .select("sample", running=True)
        .unique()
    )
    redeemed = (
        windows.join(redemptions.lazy(), on="user").filter(ahead).select("sample", redeemed=True).unique()
    )
    known = incomes.lazy().select("user", rich=pl.col("income").is_in(HIGH_INCOMES))

    def flag(name: str) -> pl.Expr:
        return pl.col(name).fill_null(False)

    share = pl.when(pl.col("covered") >= COVERED_ITEMS).then(pl.col("mailed") / pl.col("covered"))
    return (
        windows.join(per_sample, on="sample", how="left")
        .join(running, on="sample", how="left")
        .join(redeemed, on="sample", how="left")
        .join(known, on="user", how="left")
        .select(
            "sample",
            event_purchase=flag("occasion"),
            login_7d=flag("login"),
            mau_loss_30d=~flag("ahead"),
            fuel_30d_no_recent=pl.when(~flag("fuel_recent")).then(flag("fuel")),
            income_ge75k=pl.col("rich"),
            seafood_30d=flag("seafood"),
            media_30d=flag("media"),
            redeem_known=pl.when(flag("running")).then(flag("redeemed")),
            mailer_share_hi=share > share.median(),
        )
        .select("sample", *(pl.col(name).cast(pl.Int8) for name in NAMES))
        .sort("sample")
        .collect()
    )


def comes_back(samples: pl.DataFrame, future: pl.DataFrame) -> pl.DataFrame:
    """A label that any log supports: sample, comes_back (Int8), 1 if anything is seen in the future window.

    ``samples`` and ``future`` are those of ``windows``; visits and purchases count, campaigns do not.
    """
    acts = future.filter(pl.col("modality").is_in(["bill", "app"])).select("sample").unique()
    return samples.select("sample").with_columns(
        comes_back=pl.col("sample").is_in(acts["sample"].implode()).cast(pl.Int8)
    )
