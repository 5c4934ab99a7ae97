"""A made-up event log, for trying things out and for benchmarks. Nobody did any of this.

``FILE`` holds ``events(USERS)`` as a stranger might deliver it: users by name, and times without a zone.
Users differ in how often they come and in what they like, and some stop coming: there is something to find.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl

FILE = Path(__file__).with_name("events.parquet")
USERS = 300
"""Users in ``FILE``."""
DAYS = 240
START = datetime(2017, 1, 1)
TEXTS = {
    "bill": (
        *(f"{name} (bakery)" for name in ("rye bread", "rolls", "apple cake", "pretzels")),
        *(f"{name} (drinks)" for name in ("coffee", "black tea", "orange juice", "mineral water", "cider")),
        *(f"{name} (garden)" for name in ("tulip bulbs", "potting soil", "seeds", "watering cans")),
        *(f"{name} (books)" for name in ("crime novels", "cookery books", "atlases", "poetry", "comics")),
        *(f"{name} (tools)" for name in ("screws", "paint", "light bulbs", "drill bits")),
        *(f"{name} (music)" for name in ("jazz records", "piano scores", "guitar strings")),
    ),
    "minipro": ("spring campaign received", "voucher redeemed", "newsletter opened"),
    "spm": ("seen in the shop window", "seen at the end of a shelf", "seen at the checkout"),
    "app": ("visit to the market hall", "visit to the web shop", "visit to the corner shop"),
    "search": ("search for presents", "search for opening hours", "search for recipes"),
    "tabular": ("lives in the old town", "lives by the river", "lives out of town"),
}
SHARES = {"bill": 0.55, "minipro": 0.05, "spm": 0.1, "app": 0.25, "search": 0.05}
"""Of the dated events."""


def events(users: int, each: int = 60, seed: int = 0, first: int = 0) -> pl.DataFrame:
    """Some ``each`` events a user, over ``DAYS`` days, and one fact; in order of user and time.

    Columns as in ``data.events``, but ``time`` without a zone. ``first`` is the first user's number.
    """
    rng = np.random.default_rng([seed, first])
    dated = rng.poisson(rng.gamma(4.0, each / 4.0, users))
    until = np.where(rng.random(users) < 0.4, rng.uniform(0.3, 1.0, users), 1.0) * DAYS
    user = np.repeat(np.arange(users), dated)
    n = len(user)
    kind = rng.choice(len(SHARES), n, p=list(SHARES.values()))
    likes = rng.integers(0, len(TEXTS["bill"]), (users, 3))
    sizes = np.array([len(texts) for texts in TEXTS.values()])
    choice = rng.integers(0, sizes[kind])
    liked = (kind == 0) & (rng.random(n) < 0.7)
    choice[liked] = likes[user, rng.integers(0, 3, n)][liked]
    day = (rng.random(n) * until[user]).astype(np.int64)
    second = day * 86_400 + rng.integers(8 * 3600, 22 * 3600, n)  # shops are open from 8 to 22
    order = np.lexsort((choice, kind, second, user))
    facts = pl.DataFrame({"user": np.arange(users), "second": None, "kind": len(SHARES)}).with_columns(
        choice=pl.Series(rng.integers(0, len(TEXTS["tabular"]), users)), amount=pl.lit(None, pl.Float64)
    )
    rows = pl.DataFrame(
        {"user": user[order], "second": second[order], "kind": kind[order], "choice": choice[order]}
        | {"amount": np.round(rng.gamma(2.0, 6.0, n), 2)}
    )
    text = pl.Series([text for texts in TEXTS.values() for text in texts])
    code = pl.Series(np.cumsum([0, *sizes[:-1]])).gather(rows["kind"]) + rows["choice"]
    last = len(text) - len(TEXTS["tabular"]) + facts["choice"]
    both = pl.concat([facts.with_columns(code=last), rows.with_columns(code=code)], how="vertical_relaxed")
    return (
        both.sort("user", maintain_order=True)
        .select(
            user=pl.format("made-up-{}", (pl.col("user") + first).cast(pl.String).str.zfill(8)),
            time=pl.lit(START) + pl.duration(seconds="second"),
            modality=pl.lit(pl.Series(list(TEXTS))).gather("kind"),
            text=pl.lit(text).gather("code"),
            amount=pl.when(pl.col("kind").is_in([0, 2])).then("amount"),  # money
            item=pl.format("{}/{}", "kind", "choice"),
            simulated=False,
        )
        .unique(maintain_order=True)
    )
