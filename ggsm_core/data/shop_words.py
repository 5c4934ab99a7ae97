"""The Complete Journey's codes and abbreviations as words: a text encoder knows the words."""

from __future__ import annotations

import re

import polars as pl

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

_SPELLED = """
frzn=frozen refrgratd=refrigerated drnks=drinks drnk=drink sald=salad drsng=dressing sndwch=sandwich
sprd=spread bkd=baked fd=food flvrd=flavored brkfst=breakfast whlsm=wholesome mxs=mixes mx=mix bn=bean
veg=vegetable dsh=dish trsh=trash bg=bag wtr=water pnt=peanut btr=butter sply=supply tiss=tissue
dnr=dinner pkld=pickled pwdr=powder crystl=crystal jce=juice conc=concentrate snks=snacks ckys=cookies
crkr=crackers cndy=candy pckgd=packaged pkgd=packaged sherbts=sherbets cleang=cleaning misc=other
"""
SPELLED = dict(pair.split("=") for pair in _SPELLED.split())


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
