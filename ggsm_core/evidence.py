"""The evidence: tables of computations that take hours, committed under ``results/``, read and checked.

    from ggsm_core import evidence
    study = evidence.load("study")
    study.rows          # mean over seeds of each row on each task, domain and the mean, with its interval

A page that declares ``"results": ["study"]`` in its metadata shows these tables and needs no run. They are
published by ``.venv/bin/python -m ggsm_core.study``; no other hand may change them, and ``load`` notices it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from ggsm_core import params, provenance
from ggsm_core.runs import READS, UndeclaredRun

PROFILES = (
    "study",
    "study_new_users",
    "controls",
    "ablation",
    "attempts",
    "study_wide",
    "study_full",
    "study_long",
    "study_asked",
    "study_asked_visits",
    "study_asked_offers",
    "study_tuned",
    "mixes",
)
"""Profiles whose results are published as they are computed, in that order."""
TABLES = {
    "auc": ("recipe", "seed", "task", "auc", "ci_low", "ci_high", "n"),
    "rows": ("recipe", "seeds", "task", "auc", "ci_low", "ci_high"),
    "differences": ("row", "reference", "task", "difference", "ci_low", "ci_high", "p_holm", "verdict"),
    "covariance": ("task", "row", "other", "covariance"),
    "labels": ("recipe", "seed", "task", "share", "auc", "households"),
    "costs": ("recipe", "seed", "dimension", "training_seconds", "embedding_seconds"),
}
"""Table -> its columns."""
LEARNING = "learning"
"""What training did in each run (``story.outcome``): a table that older publications lack."""
SYNTHESIS = "synthesis"
"""What the language model wrote, step by step: a table of profiles whose rows train on D_qa."""
KEPT = {LEARNING: ("recipe", "seed"), SYNTHESIS: ("step", "asked", "yielded")}
"""Tables that a publication may lack -> their columns."""
TRIALS = "tuning.csv"
"""What ``tuning`` found for each row, where it was asked; no part of what ``study`` publishes."""
SCORED = ("probe", "baseline", "joined")
"""Stages that give a row its numbers."""


class EvidenceError(ValueError):
    """Published tables that are missing, incomplete or at odds with their provenance."""


COLLAPSED = 0.99
"""Mean cosine of a user to the answers of others, as training ends, above which nothing is told apart."""
LISTED = 10
"""So many missing rows are named, one by one; of more, the first three."""


@dataclass(frozen=True)
class Evidence:
    """The tables of one profile, each with the columns that ``TABLES`` says, and where they come from."""

    name: str
    auc: pl.DataFrame
    rows: pl.DataFrame
    differences: pl.DataFrame
    covariance: pl.DataFrame
    labels: pl.DataFrame
    costs: pl.DataFrame
    learning: pl.DataFrame | None
    synthesis: pl.DataFrame | None
    provenance: dict[str, Any]
    profile: params.Profile

    @property
    def seeds(self) -> dict[str, int]:
        """Row -> training seeds behind its numbers; 1 for a row that draws nothing by them."""
        counts = dict(self.rows.select("recipe", "seeds").unique(maintain_order=True).iter_rows())
        return {row: 1 if row in params.UNSEEDED_BASELINES else count for row, count in counts.items()}

    def has(self, *rows: str) -> list[str]:
        """Those of ``rows`` that have numbers, in the given order."""
        return [row for row in rows if row in self.seeds]

    @property
    def absent(self) -> list[str]:
        """Rows that the profile asks for and that have no numbers yet."""
        return [row for row in (*self.profile.trained, *self.profile.baselines) if row not in self.seeds]

    def told(self) -> str:
        """For readers: how many rows and seeds there are, what is missing, and where they come from."""
        counts = [count for row, count in self.seeds.items() if row not in params.UNSEEDED_BASELINES]
        said = f"results/{self.name}: {len(self.seeds)} rows"
        if counts:
            least, most = min(counts), max(counts)
            said += f", trained with {least if least == most else f'{least} to {most}'} seed"
            said += "" if most == 1 else "s"
        planned = len(self.profile.seeds)
        if counts and min(counts) < planned:
            said += f" of {planned} planned"
        if not self.absent:
            said += "; none is missing."
        elif len(self.absent) > LISTED:
            said += f"; missing: {len(self.absent)} rows, among them {', '.join(self.absent[:3])}."
        else:
            said += f"; missing: {', '.join(self.absent)}."
        if counts and max(counts) == 1:
            said += " An interval from one seed is over households alone."
        elif counts and min(counts) == 1:
            said += (
                " A row with one seed is compared on that seed, and borrows the spread of those with several."
            )
        return f"{said} {self.origin()}"

    def origin(self) -> str:
        """``Computed from commit 8654283, finished 2026-11-26, on 2 cores.``"""
        ended = max(str(run["ended"])[:10] for run in self.provenance["runs"])
        commit, cores = self.provenance["commit"][:7], self.provenance["machine"]["cores"]
        return f"Computed from commit {commit}, finished {ended}, on {cores} cores."

    def ended(self) -> pl.DataFrame:
        """Mean cosine of a user to the own answer and to the others as training ended: row, own, others.

        Means over seeds; no line for a row that was not trained, or published before this was kept.
        """
        if self.learning is None:
            return pl.DataFrame(schema={"row": pl.String, "own": pl.Float64, "others": pl.Float64})
        means = pl.col("positive", "negative").mean()
        ended = self.learning.group_by(row="recipe", maintain_order=True).agg(means)
        return ended.rename({"positive": "own", "negative": "others"})

    def collapsed(self) -> str:
        """For readers: how many runs ended with all users nearly one way; "" where that was not kept."""
        if self.learning is None:
            return ""
        many = (self.learning["negative"] > COLLAPSED).sum()
        return (
            f"Of {len(self.learning)} training runs {many} ended with all users nearly one way (mean cosine "
            f"above {COLLAPSED})."
        )

    def budgets(self) -> pl.DataFrame:
        """What the trained rows may spend: rows, learning rate, at most, stops early, size."""
        t, p, b, pre = (
            self.profile.training,
            self.profile.peers,
            self.profile.backbone,
            self.profile.pretraining,
        )
        before = (
            f"; before that, once for all, {pre.steps} steps as a language model and {pre.adapter_steps} "
            "with adapters"
            if pre
            else ""
        )
        peers = [row for row in self.profile.baselines if row in params.PEERS]
        lines = [
            (
                "the masks",
                f"{t.learning_rate:g}, falling",
                f"{t.total_steps} steps of {t.batch_size} pairs",
                "never",
                f"{b.layers} blocks, d = {b.hidden}{before}",
            ),
            (
                ", ".join(peers),
                f"{p.learning_rate:g}, constant",
                f"{p.epochs} epochs in steps of {p.batch_size}",
                f"{p.patience} epochs without gain on {p.held_out:.0%} of the training households",
                f"d = {p.hidden}, but for those around the masks' decoder",
            ),
        ]
        columns = ["rows", "learning rate", "at most", "stops early", "size"]
        return pl.DataFrame(lines, schema=columns, orient="row")

    def tuned(self) -> str:
        """For readers: what tuning found, which rows are shown without it, and which had no trial."""
        path = folder(self.name) / TRIALS
        if not path.is_file():
            return "No row was tuned: each has the learning rate that the profile gives it."
        trials, plain = pl.read_csv(path), params.Tuned()
        best = dict(trials.filter("chosen").select("row", "rate").iter_rows())
        found = dict[str, list[str]]()
        for row, rate in best.items():
            moved = "the profile's own pace" if rate == plain.rate else f"learning rate × {rate:g}"
            found.setdefault(moved, []).append(row)
        rows = [*self.profile.recipes.active, *(row for row in self.profile.baselines if row in params.PEERS)]
        without = [row for row, rate in best.items() if self.profile.tuned.get(row, plain).rate != rate]
        everyone = "all of them" if without == list(best) else ""
        untried = [row for row in rows if row not in best]
        return " ".join(
            [
                f"Tuned inside the training period, {len(trials) // len(best)} trials for each of "
                f"{len(best)} rows (`results/{self.name}/{TRIALS}`).",
                *(f"Best at {pace}: {', '.join(some)}." for pace, some in found.items()),
                *([f"Shown here without it: {everyone or ', '.join(without)}."] if without else []),
                *([f"Not tuned: {', '.join(untried)}."] if untried else []),
            ]
        )


def folder(name: str) -> Path:
    """Where the tables of a profile lie."""
    return provenance.ROOT / "results" / name


def profile(name: str) -> params.Profile:
    """The profile ``name`` of params/. Raises ``params.ProfileError``."""
    return params.load(provenance.ROOT / "params" / f"{name}.yaml")


def check_own(given: params.Profile) -> None:
    """Raises ``EvidenceError`` if ``given`` has the name of a profile of params/ and is another."""
    path = provenance.ROOT / "params" / f"{given.name}.yaml"
    if path.is_file() and profile(given.name) != given:
        raise EvidenceError(
            f"name: {given.name!r} is that of params/{path.name}, whose results this profile, which differs, "
            "would be taken for; give it a name of its own"
        )


def hashes(name: str) -> dict[str, str]:
    """File -> sha256 of all that a page may read; {} where nothing is published."""
    files = (*(f"{table}.csv" for table in (*TABLES, *KEPT)), "provenance.json", TRIALS)
    paths = [folder(name) / file for file in files]
    return {path.name: provenance.sha256(path) for path in paths if path.is_file()}


def find(name: str) -> Evidence | None:
    """As ``load``, or None where nothing at all is published under this name."""
    _declared(name)
    return load(name) if hashes(name).keys() - {TRIALS} else None


def load(name: str) -> Evidence:
    """The committed tables of profile ``name``.

    Raises ``EvidenceError`` if a table or a column is missing, if a table is not the one whose hash
    provenance.json holds, or if the rows of auc.csv are not those of the runs named there.
    """
    _declared(name)
    told = _provenance(name)
    tables = {table: _table(name, table) for table in TABLES}
    for file, expected in told["tables"].items():
        if (folder(name) / file).is_file() and provenance.sha256(folder(name) / file) != expected:
            raise EvidenceError(
                f"results/{name}/{file} is not the table that provenance.json is about; {_mend(name)}"
            )
    runs = {(run["row"], run["seed"] or 0) for run in told["runs"] if run["stage"] in SCORED}
    shown = set(tables["auc"].select("recipe", "seed").unique().iter_rows())
    if strange := sorted(runs ^ shown):
        row, seed = strange[0]
        where = (
            "auc.csv but not in provenance.json"
            if strange[0] in shown
            else "provenance.json but not in auc.csv"
        )
        raise EvidenceError(f"results/{name}: row {row!r}, seed {seed} is in {where}; {_mend(name)}")
    if lost := sorted({row for row, _ in shown} ^ set(tables["rows"]["recipe"])):
        raise EvidenceError(f"results/{name}: rows.csv and auc.csv differ in row {lost[0]!r}; {_mend(name)}")
    kept = {table: _table(name, table) if f"{table}.csv" in told["tables"] else None for table in KEPT}
    return Evidence(
        name,
        **tables,
        learning=kept[LEARNING],
        synthesis=kept[SYNTHESIS],
        provenance=told,
        profile=profile(name),
    )


def _mend(name: str) -> str:
    return f"publish it again: `.venv/bin/python -m ggsm_core.study --profiles {name}`"


def _provenance(name: str) -> dict[str, Any]:
    path = folder(name) / "provenance.json"
    if not path.is_file():
        raise EvidenceError(f"results/{name}/provenance.json is missing; {_mend(name)}")
    told = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(told, dict) or told.get("profile") != name:
        raise EvidenceError(f"results/{name}/provenance.json is about another profile; {_mend(name)}")
    if lacking := [key for key in ("tables", "runs") if key not in told]:
        raise EvidenceError(f"results/{name}/provenance.json has no {lacking[0]!r}; {_mend(name)}")
    return told


def _table(name: str, table: str) -> pl.DataFrame:
    path = folder(name) / f"{table}.csv"
    if not path.is_file():
        raise EvidenceError(f"results/{name}/{table}.csv is missing; {_mend(name)}")
    found = pl.read_csv(path, infer_schema_length=None)
    if lacking := [column for column in (TABLES | KEPT)[table] if column not in found.columns]:
        raise EvidenceError(
            f"results/{name}/{table}.csv has no column {lacking[0]!r}, only {', '.join(found.columns)}; "
            f"{_mend(name)}"
        )
    return found


def _declared(name: str) -> None:
    if name not in PROFILES:
        raise EvidenceError(f"profile: {name!r} is not published; published are {', '.join(PROFILES)}")
    if reads := os.environ.get(READS):
        allowed = json.loads(Path(reads).read_text(encoding="utf-8"))
        if name not in allowed["results"]:
            raise UndeclaredRun(
                f"{allowed['notebook']} reads results/{name}, which its metadata does not declare; name it "
                'there, "ggsm": {"results": [...]}, so that the page follows these tables'
            )
