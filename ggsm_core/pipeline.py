"""The whole path for one profile: runs, notebooks, book. What is whole and current is not made again.

The book of a profile whose results are committed (``evidence.PROFILES``) is made from them: the pages that
read such tables alone, and the prose around them. Nothing is trained for it.

python -m ggsm_core.pipeline --profile params/quick.yaml [--target results|notebooks|book]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from ggsm_core import book, evidence, notebooks, params, provenance
from ggsm_core.jobs import exit_status, missing_jobs, workers
from ggsm_core.runs import Store
from ggsm_core.scheduler import Scheduler
from ggsm_core.stages import GRAPH, Node, Plan

TARGETS = ("results", "notebooks", "book")


def make(profile: Path, target: str = "book", say: Callable[[str], None] = print) -> None:
    """Bring ``target`` up to date. Raises ``JobFailed``, or a ``ValueError`` that says what to do."""
    began = time.monotonic()
    loaded = params.load(profile)
    evidence.check_own(loaded)
    if not (loaded.trained or loaded.baselines):
        raise params.ProfileError(f"{profile}: recipes, variants, baselines: not one row is left to compare")
    root = provenance.ROOT
    build, results = root / "build" / loaded.name, root / "results" / loaded.name
    if target == "book":
        book.check_configuration(root / "book")
    with _alone(build, say):
        plan = Plan(GRAPH, loaded, Store())
        pages = [] if target == "results" else notebooks.discover(root / "notebooks")
        if pages and loaded.name in evidence.PROFILES:
            evidence.load(loaded.name)  # what is wrong with the tables is said before any page is made
            pages = [page for page in pages if page.published]
            _run(plan, [], pages, say)
        else:
            _run(plan, plan.all(), pages, say)
            book.write_results(plan, results, build / "notebooks")
        if target == "book":
            _book(build, results, pages, say)
    say(f"{target} of profile {loaded.name!r} whole after {time.monotonic() - began:.0f} s")


def _run(plan: Plan, nodes: list[Node], pages: list[notebooks.Notebook], say: Callable[[str], None]) -> None:
    folder = provenance.ROOT / "build" / plan.profile.name / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    gone = {path for path in folder.glob("*.ipynb") if path.name not in {page.path.name for page in pages}}
    for path in gone if pages else ():
        path.unlink()  # a page whose source was removed is no page of the book
    jobs = missing_jobs(plan, nodes, say)
    for page in pages:
        page_key = notebooks.key(page, plan)
        if not notebooks.is_executed(page, page_key, folder):
            jobs.append(notebooks.job(page, page_key, plan, folder, plan.store.root))
    if not jobs:
        say("every run and every notebook is whole and current")
        return
    say(f"{len(jobs)} steps to make, {workers()} at a time")
    Scheduler(jobs, workers(), provenance.ROOT, say).run()


def _book(build: Path, results: Path, pages: list[notebooks.Notebook], say: Callable[[str], None]) -> None:
    folder, prose = build / "book", provenance.ROOT / "book"
    executed = [build / "notebooks" / page.path.name for page in pages]
    book_key = book.key(prose, executed, results)
    if not book.is_built(folder, book_key):
        say(f"assembling {len(executed)} chapters and the pages around them")
        book.assemble(prose, executed, results, folder)
        Scheduler([book.job(folder, pages)], workers(), provenance.ROOT, say).run()
        book.check(folder)
        (folder / ".key").write_text(book_key, encoding="utf-8")
    say(f"open {book.index(folder).relative_to(provenance.ROOT)}")


def _alone(build: Path, say: Callable[[str], None]) -> AcquireReturnProxy:
    """Two pipelines share runs, but not a profile's pages: the second waits here."""
    build.mkdir(parents=True, exist_ok=True)
    lock = FileLock(build / ".lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say("another process makes this profile's book; waiting for it")
        return lock.acquire()


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m ggsm_core.pipeline", description="Make results, notebooks or the book."
    )
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--target", choices=TARGETS, default="book")
    arguments = parser.parse_args(argv)

    def action() -> int:
        make(arguments.profile, arguments.target, lambda line: print(line, flush=True))
        return 0

    return exit_status(action)


if __name__ == "__main__":
    sys.exit(main())
