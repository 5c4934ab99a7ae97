"""Fair tuning: every trained row has the same trials, scored inside the training period.

A trial is an ordinary run of the graph under the profile's own protocol, one step back in time: the last
training anchor is probed, models learn from the anchors whose future ends before it, and the probed
households are in no training. What the table is made from, the probe anchors, is not in any trial.

    python -m ggsm_core.tuning --profile params/study.yaml

writes results/<profile>/tuning.csv and prints what to put under ``tuned`` in the profile.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl

from ggsm_core import params
from ggsm_core.params import PEERS, Profile, Tuned

TRIALS = tuple(Tuned(rate=rate) for rate in (1.0, 0.2, 5.0))
"""The budget of every row; a tie goes to the earlier one, and so to the profile as it is.

A fifth and five times: five times the masks' learning rate is the peers' own, and the other way round.
"""


class TuningError(ValueError):
    """A profile that leaves nothing to tune on."""


def validation(profile: Profile, pace: Tuned, rows: Sequence[str] = ()) -> Profile:
    """The profile of one trial of ``rows`` (() for all that are trained). Raises ``TuningError``."""
    data, last = profile.data, max(profile.data.train_anchors)
    earlier = [anchor for anchor in data.train_anchors if anchor + data.future_days <= last]
    if not earlier:
        raise TuningError(
            f"data.train_anchors: {data.train_anchors}; no future ends before the anchor to "
            f"probe, {last}; give an earlier one"
        )
    peers = [name for name in profile.baselines if name in PEERS]
    known = [*profile.recipes.active, *peers]
    if unknown := [row for row in rows if row not in known]:
        raise TuningError(f"recipes: {unknown[0]!r} is not trained; these are: {', '.join(known)}")
    if not known:
        raise TuningError(
            "recipes, baselines: no row of this profile is trained, so there is nothing to tune"
        )
    kept = [row for row in known if not rows or row in rows]
    change = {
        "data": data.model_dump()
        | {"train_anchors": earlier, "probe_anchors": [last], "protocol": "new_users"},
        "seeds": profile.seeds[:1],
        "variants": {},
        "recipes": {
            name: section if name in kept else None for name, section in profile.recipes.model_dump().items()
        },
        "baselines": [name for name in peers if name in kept],
        "tuned": {row: pace.model_dump() for row in kept},
    }
    return Profile.model_validate(profile.model_dump() | change)


def choose(trials: pl.DataFrame) -> pl.DataFrame:
    """``trials`` (row, rate, auc) with ``chosen``: the best of each row, the first of equals."""
    first_best = pl.col("auc").arg_max().over("row") == pl.int_range(pl.len()).over("row")
    return trials.with_columns(chosen=first_best)


def tune(profile: Profile, rows: Sequence[str] = (), say: Callable[[str], None] = print) -> pl.DataFrame:
    """All trials of ``rows``, or of all: row, rate, auc (mean over tasks), run, commit, chosen."""
    from ggsm_core.jobs import run_missing
    from ggsm_core.runs import Run, Store
    from ggsm_core.stages import GRAPH, Plan

    lines = []
    for pace in TRIALS:
        plan = Plan(GRAPH, validation(profile, pace, rows), Store())
        nodes = plan.of_stage("probe")
        say(f"rate x {pace.rate:g}: {len(nodes)} rows")
        run_missing(plan, nodes, say)
        for node in nodes:
            run = Run(plan.store.folder(node.name))
            auc = pl.read_csv(run.folder / "auc.csv")["auc"].mean()
            lines.append((node.row, pace.rate, auc, node.name, run.provenance["commit"]))
    return choose(pl.DataFrame(lines, schema=["row", "rate", "auc", "run", "commit"], orient="row"))


def merged(trials: pl.DataFrame, earlier: Path) -> pl.DataFrame:
    """``trials``, and of the table ``earlier`` the rows that they are not about."""
    if not earlier.is_file():
        return trials
    others = pl.read_csv(earlier).filter(~pl.col("row").is_in(trials["row"].unique().to_list()))
    return pl.concat([others.cast(trials.schema), trials])


def as_yaml(trials: pl.DataFrame) -> str:
    """The section ``tuned`` of a profile; rows that stay as they are are left out."""
    chosen = trials.filter("chosen").filter(pl.col("rate") != 1)
    lines = [f"  {row}: {{rate: {rate}}}" for row, rate in chosen.select("row", "rate").iter_rows()]
    return "\n".join(["tuned:", *lines]) if lines else "tuned: {}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    from ggsm_core import evidence
    from ggsm_core.jobs import exit_status, listed

    parser = argparse.ArgumentParser(prog="python -m ggsm_core.tuning", description="Tune every trained row.")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--recipes", help="these rows alone, separated by commas")
    given = parser.parse_args(arguments)

    def act() -> int:
        profile = params.load(given.profile)
        evidence.check_own(profile)
        trials = tune(profile, listed(given.recipes, "--recipes"))
        out = evidence.folder(profile.name) / evidence.TRIALS
        out.parent.mkdir(parents=True, exist_ok=True)
        merged(trials, out).write_csv(out, float_precision=6)
        print(as_yaml(trials))
        return 0

    return exit_status(act)


if __name__ == "__main__":
    sys.exit(main())
