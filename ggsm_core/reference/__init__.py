"""Numbers that others published or counted, to hold ours against: never an input of any run."""

from __future__ import annotations

from importlib.resources import files

import polars as pl


def _read(name: str) -> pl.DataFrame:
    return pl.read_csv(files(__name__).joinpath(name).read_bytes())


def paper_table2() -> pl.DataFrame:
    """Table 2 of the paper as printed: group, method, recipe (our row), nine tasks, average."""
    return _read("paper_table2.csv")


def task_counts() -> pl.DataFrame:
    """Samples and share of positives of each task, counted independently of this code: task, n, positive."""
    return _read("task_counts.csv")
