"""Some 260 hand-made features for gradient-boosted trees: what a data scientist would build instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
import polars as pl
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ggsm_core.baselines.base import ACTS, Baseline, Histories, commonest, scatter, total
from ggsm_core.data.windows import GROUP

if TYPE_CHECKING:
    from ggsm_core.intervals import Floats

KEPT = {"bill": 48, "minipro": 8, "spm": 12, "app": 8, "search": 8}  # texts that get counts of their own
GROUPS = 16  # wider groups, named in brackets at the end of a text: "soft drinks (grocery)"
FACTS = 32
HOURS = 4  # length of an hour band


class Handmade(Baseline[Histories, Histories]):
    """Per modality, over a week, a month and the whole history: events, amounts, active days; days since the
    last and the first event, and the variety of texts. Counts and amounts of the commonest texts (categories,
    campaigns, displays, stores) and groups (departments). Hours and weekdays of visits. Facts as 0/1.
    """

    name = "handmade"

    def fit(self, train: Histories) -> Self:
        """Find the modalities, texts, groups and facts that get features, by how many samples have them."""
        timed = train.timed
        present = set(timed["modality"].unique())
        self.channels = [name for name in KEPT if name in present]
        self.texts = {
            m: commonest(timed.filter(pl.col("modality") == m), "text", KEPT[m]) for m in self.channels
        }
        bills = timed.filter(pl.col("modality") == "bill").with_columns(group=GROUP)
        self.groups = commonest(bills, "group", GROUPS)
        self.facts = commonest(train.events.filter(pl.col("before").is_null()), "text", FACTS)
        return self

    def embed(self, users: Histories) -> Floats:
        """Features Float[n, k]; k depends on what ``fit`` found, 262 for Complete Journey."""
        n, timed = len(users.samples), users.timed
        acts = timed.filter(pl.col("modality").is_in(ACTS))
        bills = timed.filter(pl.col("modality") == "bill").with_columns(group=GROUP)
        span = users.spans
        count = {s: (pl.col("before") <= d).sum().alias(f"count_{s}") for s, d in span.items()}
        amount = {s: total(d).alias(f"amount_{s}") for s, d in span.items()}
        days = [
            pl.col("before").filter(pl.col("before") <= d).n_unique().alias(f"days_{s}")
            for s, d in span.items()
        ]
        totals = [*count.values(), *amount.values(), *days, pl.col("text").n_unique().alias("variety")]
        ends = [pl.col("before").min().alias("last"), pl.col("before").max().alias("first")]

        by_channel = timed.group_by("row", "modality")
        visits = acts.unique(["row", "time"]).with_columns(
            weekday=pl.col("time").dt.weekday().cast(pl.String),
            band=(pl.col("time").dt.hour() // HOURS).cast(pl.String),
        )
        facts = users.events.filter(pl.col("before").is_null()).select("row", "text").unique()
        blocks = [
            scatter(by_channel.agg(totals), "modality", self.channels, n),
            scatter(by_channel.agg(ends), "modality", self.channels, n, empty=users.days + 1),
        ]
        for channel, texts in self.texts.items():
            events = timed.filter(pl.col("modality") == channel).group_by("row", "text")
            blocks.append(scatter(events.agg(count["month"], count["all"]), "text", texts, n))
        blocks += [
            scatter(
                bills.drop_nulls("group").group_by("row", "group").agg(count["week"], amount["all"]),
                "group",
                self.groups,
                n,
            ),
            scatter(visits.group_by("row", "weekday").len(), "weekday", [str(d) for d in range(1, 8)], n),
            scatter(visits.group_by("row", "band").len(), "band", [str(b) for b in range(24 // HOURS)], n),
            scatter(facts.with_columns(has=1), "text", self.facts, n),
        ]
        return np.concatenate(blocks, axis=1)


class HandmadeLinear(Handmade):
    """The same features under the linear probe, which wants no long tails: x becomes sign(x) log(1 + |x|).

    Below ``handmade`` by what trees add; an embedding below this row is not short of trees alone.
    """

    name = "handmade_linear"

    def embed(self, users: Histories) -> Floats:
        """As ``Handmade.embed``, scaled."""
        features = super().embed(users)
        scaled: Floats = np.sign(features) * np.log1p(np.abs(features))
        return scaled


class Handmade128(HandmadeLinear):
    """The same in as many dimensions as an embedding of the study: those in which training users vary most.

    Below ``handmade_linear`` by what so few numbers can't hold if nobody says which will be asked for.
    """

    name = "handmade_128"

    def fit(self, train: Histories) -> Self:
        """Find the features, their scale and the 128 directions (all, where there are fewer)."""
        super().fit(train)
        features = super().embed(train)
        kept = PCA(min(128, *features.shape), svd_solver="full")
        self.narrow = make_pipeline(StandardScaler(), kept).fit(features)
        return self

    def embed(self, users: Histories) -> Floats:
        """Float[n, 128]."""
        vectors: Floats = self.narrow.transform(super().embed(users))
        return vectors
