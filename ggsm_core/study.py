"""Compute the evidence, or a part of it, and publish its tables under ``results/``.

python -m ggsm_core.study                                   # all: hours, resumable run by run
python -m ggsm_core.study --recipes ggsm,causal --seeds 0   # these runs; theirs and the published numbers
python -m ggsm_core.study --finished                        # publishes what is whole, and trains nothing
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import polars as pl

from ggsm_core import book, evidence, provenance
from ggsm_core.comparison import MEAN
from ggsm_core.jobs import exit_status, listed, run_missing
from ggsm_core.params import Profile
from ggsm_core.runs import Store
from ggsm_core.stages import GRAPH, Plan, UnknownRun, check

Only = Callable[[str, int | None], bool]


def publish(profile: Profile, only: Only | None = None, say: Callable[[str], None] = print) -> None:
    """Compute what is missing of the rows and seeds that ``only`` lets through, and write their tables."""
    plan = Plan(GRAPH, profile, Store(), only)
    run_missing(plan, book.read(plan), say)
    build = provenance.ROOT / "build" / profile.name / "notebooks"
    book.write_results(plan, evidence.folder(profile.name), build)
    say(f"published results/{profile.name}")


def finished(profile: Profile) -> Only:
    """Lets those rows and seeds through of which all is whole. Raises ``UnknownRun`` where none are."""
    plan = Plan(GRAPH, profile, Store())
    scored = [node for node in plan.all() if node.stage.name in evidence.SCORED]
    made = [node for node in book.read(plan) if node.row is not None]
    whole = check([*scored, *made], plan.store)
    lost = {(node.row, node.seed) for node in made if node.name not in whole}
    kept = {(node.row, node.seed) for node in scored if node.name in whole} - lost
    if not kept:
        raise UnknownRun(f"profile {profile.name!r}: no row is computed yet; `make study` computes them")
    return lambda row, seed: (row, seed) in kept


def part(
    profiles: Sequence[Profile], rows: Sequence[str], seeds: Sequence[int]
) -> list[tuple[Profile, Only]]:
    """The profile in which each of ``rows`` ([] for all) is first found, with what keeps it and ``seeds``.

    Raises ``UnknownRun`` for a row or seed that no profile has.
    """
    known = {seed for profile in profiles for seed in profile.seeds}
    if unknown := sorted(set(seeds) - known):
        raise UnknownRun(f"seeds: {unknown[0]} is not planned; the seeds are {sorted(known)}")
    found, done = [], set[str]()
    for profile in profiles:
        here = {row for row in (*profile.trained, *profile.baselines) if not rows or row in rows} - done
        done |= here
        if here:
            found.append((profile, _only(here, set(seeds))))
    if unknown_rows := sorted(set(rows) - done):
        names = ", ".join(profile.name for profile in profiles)
        raise UnknownRun(f"recipes: {unknown_rows[0]!r} is a row of none of {names}")
    return found


def _only(rows: set[str], seeds: set[int]) -> Only:
    """Rows without a seed come with every one."""
    return lambda row, seed: row in rows and (seed is None or not seeds or seed in seeds)


def again(profile: Profile, only: Only, say: Callable[[str], None] = print) -> pl.DataFrame:
    """Compute the rows and seeds that ``only`` lets through: recipe, seed, mean AUC, the published one."""
    plan = Plan(GRAPH, profile, Store(), only)
    compare = plan.node("compare")
    run_missing(plan, [compare], say)
    mean = pl.read_csv(plan.store.folder(compare.name) / "auc.csv").filter(task=MEAN)
    published = evidence.find(profile.name)
    earlier = published.auc.filter(task=MEAN) if published else mean.clear()
    known = earlier.select("recipe", "seed", published="auc")
    return mean.select("recipe", "seed", "auc").join(
        known, on=["recipe", "seed"], how="left", maintain_order="left"
    )


def _number(seed: str) -> int:
    if not seed.isdigit():
        raise UnknownRun(f"seeds: {seed!r} is no number; write them as 0,1,2")
    return int(seed)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ggsm_core.study", description="Compute the evidence.")
    default = ",".join(evidence.PROFILES)
    parser.add_argument("--profiles", default=default, help=f"some of {default}")
    parser.add_argument("--recipes", help="these rows alone, separated by commas")
    parser.add_argument("--seeds", help="these seeds alone, separated by commas")
    parser.add_argument("--finished", action="store_true", help="publish what is whole; train nothing")
    given = parser.parse_args(arguments)

    def act() -> int:
        profiles = [evidence.profile(name) for name in listed(given.profiles, "--profiles")]
        rows = listed(given.recipes, "--recipes")
        seeds = [_number(seed) for seed in listed(given.seeds, "--seeds")]
        if rows or seeds:
            if given.finished:
                raise UnknownRun("--finished: publishes all that is whole; leave --recipes and --seeds out")
            for profile, only in part(profiles, rows, seeds):
                for row, seed, auc, published in again(profile, only).iter_rows():
                    told = "not published" if published is None else f"published {published:.6f}"
                    print(f"{profile.name}, {row}, seed {seed}: mean AUC {auc:.6f}, {told}")
            return 0
        for profile in profiles:
            publish(profile, finished(profile) if given.finished else None)
        return 0

    return exit_status(act)


if __name__ == "__main__":
    sys.exit(main())
