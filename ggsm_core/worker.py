"""Compute one run, in the process that was started for it or in the processes of a distributed launch.

The stage's function gets the typed sections that its config holds and nothing else of the profile. Before
it starts, all the code that the run's id covers is imported and hashed: what runs is what the id says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from filelock import Timeout
from pydantic import TypeAdapter

from ggsm_core import params, provenance, rendezvous, sections
from ggsm_core.codehash import closure, code_hash
from ggsm_core.jobs import context, exit_status, explain, run_missing
from ggsm_core.progress import Progress
from ggsm_core.runs import DamagedRun, Run, Store
from ggsm_core.stages import GRAPH, Graph, Node, Plan

ONE_PROCESS = ("random", "shuffled", "position")
"""Controls (``ggsm_core.ablation``) that each process would make from its own share of the batch."""


class Undeclared(AttributeError, ValueError):
    """A stage reads a part of the profile that its declaration does not list."""


class StaleCode(ValueError):
    """The code is no longer what the run's id was computed from."""


class Refused(ValueError):
    """A launch that could not do what is asked of it."""


class Declared:
    """The parameters that a stage declares, typed; everything else raises ``Undeclared``."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._stage: str = config["stage"]
        for section, value in config["sections"].items():
            setattr(self, section, _typed(params.Profile, section, value))
        for name in config.keys() & {"recipe", "seed", "name"}:
            setattr(self, name, config[name])
        if "options" in config:
            self.options = _typed(params.Recipes, config["recipe"], config["options"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = ", ".join(sorted(key for key in vars(self) if not key.startswith("_")))
        raise Undeclared(
            f"stage {self._stage!r} reads params.{name}, which its entry in ggsm_core/stages.py does not "
            f"declare (it declares: {known}); add it there, so that the ids of its runs cover it"
        )


def _typed(parent: type[sections.Section], field: str, value: Any) -> Any:
    adapter: TypeAdapter[Any] = TypeAdapter(parent.model_fields[field].annotation or type(None))
    return adapter.validate_python(value)


class Report:
    """Progress as a small file that the scheduler reads; at most two writes a second."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict[str, Any] = {}
        self._next = 0.0

    def __call__(self, done: float, total: float, message: str = "") -> None:
        self.content |= {"done": done, "total": total, "message": message}
        if time.monotonic() >= self._next:
            self.write()

    def write(self, **more: Any) -> None:
        self.content |= more
        provenance.write_atomically(self.path, json.dumps(self.content))
        self._next = time.monotonic() + 0.5


def compute(
    store: Store, graph: Graph, name: str, config: dict[str, Any], told: dict[str, Any], report: Report
) -> Run:
    """The run, computed unless another process has meanwhile. All that is printed goes to its log.txt."""
    stage = graph.stages[config["stage"]]
    with _locked(store, name, lambda: report(0, 0, "another process computes it; waiting")):
        existing = _existing(store, name)
        if existing is not None:
            return existing
        partial = store.begin(name, config, resume=stage.resumes)
        log = partial / "log.txt"
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), sys.stdout.fileno())
            os.dup2(file.fileno(), sys.stderr.fileno())
        report.write(log=str(log))
        return _make(store, graph, name, config, told, report)


def _make(
    store: Store, graph: Graph, name: str, config: dict[str, Any], told: dict[str, Any], progress: Progress,
    before_finish: Callable[[], None] = lambda: None,
) -> Run:  # fmt: skip
    started, clock = datetime.now(UTC), time.monotonic()
    run_stage(store, graph, name, config, progress)
    before_finish()
    return store.finish(name, _provenance(config, told, started, time.monotonic() - clock))


def run_stage(store: Store, graph: Graph, name: str, config: dict[str, Any], progress: Progress) -> None:
    """Call the stage's function on the partial folder. Raises ``StaleCode``."""
    stage = graph.stages[config["stage"]]
    for module in closure([stage.module], graph.package):
        importlib.import_module(module)
    # After all is in memory: a later edit can't reach this process, an earlier one shows here.
    if code_hash([stage.module], graph.package) != config["code"]:
        raise StaleCode(
            f"the code of stage {stage.name!r} changed after this run was planned; start again, so that the "
            "run gets the id of the code that makes it"
        )
    inputs = {key: store.folder(folder) for key, folder in config["inputs"].items()}
    importlib.import_module(stage.module).run(Declared(config), inputs, store.partial(name), progress)


def _provenance(
    config: dict[str, Any], told: dict[str, Any], started: datetime, seconds: float
) -> dict[str, Any]:
    return told | {
        "stage": config["stage"],
        "code": config["code"],
        "libraries": config["libraries"],
        "machine": provenance.machine(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "threads": provenance.threads(),
        "peak_memory_mib": provenance.peak_memory() // 2**20,
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
    }


def _existing(store: Store, name: str) -> Run | None:
    try:
        return store.find(name)
    except DamagedRun:
        return None  # said by whoever planned this run; ``finish`` replaces the folder


def _locked(store: Store, name: str, waiting: Callable[[], None]) -> Any:
    lock = store.lock(name)
    while True:
        try:
            return lock.acquire(timeout=2)
        except Timeout:
            waiting()


def together(
    profile: str | Path,
    stage: str,
    recipe: str | None = None,
    seed: int | None = None,
    *,
    graph: Graph = GRAPH,
) -> Run:
    """Compute a run in this process, or in all processes of a distributed launch, printing as it goes.

    For ``python -m`` entry points, also under torchrun or ``accelerate launch``, where every process calls
    this. The first process computes what the run needs and holds the lock; the others wait at the launcher's
    own store, not in a collective, so nothing times out. With shared folders it works over several machines.
    """
    store = Store()
    plan = Plan(graph, params.load(profile), store)
    node = plan.node(stage, recipe, seed)

    def say(done: float, total: float, message: str = "") -> None:
        # Written in one piece: the processes of a launch share their output.
        print(f"{node.title}: {done} of {total}  {message}\n", end="", flush=True)

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    gate = rendezvous.gate() if world > 1 else None
    if gate is not None and rank > 0:
        return _follow(gate, rank, plan, node, say)

    def tell(key: str, value: str = "") -> None:
        if gate is not None:
            gate.set(key, value)

    def all_ready() -> None:
        if gate is not None:
            gate.wait([f"ready {other}" for other in range(1, world)], timedelta(hours=1))

    try:
        if world > 1:
            _check_shared(node)
        run_missing(plan, node.inputs.values())
        with _locked(
            store, node.name, lambda: print("another process computes this run; waiting", flush=True)
        ):
            run = _existing(store, node.name)
            if run is None:
                store.begin(node.name, node.config, resume=node.stage.resumes)
                tell("verdict", "compute")
                run = _make(store, graph, node.name, node.config, context(plan, node), say, all_ready)
            elif os.environ.get(provenance.TRACE):
                raise Refused(
                    f"--profile-trace: {node.title} is whole and trains no more; remove {run.folder} first, "
                    "or set GGSM_RUNS to another folder for the trace"
                )
    except BaseException:
        tell("verdict", "failed")
        raise
    tell("verdict", "whole")
    tell("whole")
    return run


def _check_shared(node: Node) -> None:
    source = (node.config.get("options") or {}).get("source")
    if source in ONE_PROCESS:
        raise Refused(
            f"{node.title}: source: {source} is made by each process from its own share of the batch, so "
            "several would compute another run under the same id; start one process"
        )


def _follow(gate: Any, rank: int, plan: Plan, node: Node, say: Progress) -> Run:
    """What every process but the first does."""
    gate.wait(["verdict"], timedelta(days=7))
    verdict = gate.get("verdict").decode()
    if verdict == "failed":
        raise SystemExit(1)  # the first process says why
    if verdict == "compute":
        run_stage(plan.store, plan.graph, node.name, node.config, say)
        gate.set(f"ready {rank}", "")
    gate.wait(["whole"], timedelta(hours=1))
    return Run(plan.store.folder(node.name))


def command_line(stage: str, argv: list[str] | None = None) -> int:
    """``--profile P --recipe R --seed N`` for the module of a stage; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=f"Compute a run of stage {stage}, also under a distributed launcher."
    )
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--seed", type=int, help="default: the profile's first")
    parser.add_argument("--profile-trace", type=Path, help="folder for a profiler's trace of a few steps")
    arguments = parser.parse_args(argv)
    if arguments.profile_trace is not None:
        os.environ[provenance.TRACE] = str(arguments.profile_trace)

    def action() -> int:
        run = together(arguments.profile, stage, arguments.recipe, arguments.seed)
        if os.environ.get("RANK", "0") == "0":
            print(f"whole: {run.name}")
        return 0

    return exit_status(action)


def leave_with(parent: int) -> None:
    """End when the scheduler is gone: an orphan would compute for nobody, and hold the lock."""
    while os.getppid() == parent:
        time.sleep(1)
    if os.getpgrp() == os.getpid():  # the scheduler's child: what it started, say a server, goes with it
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> int:
    """Compute the run that stdin describes; returns the exit status."""
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
    request = json.load(sys.stdin)
    module, _, attribute = request["graph"].partition(":")
    graph: Graph = getattr(importlib.import_module(module), attribute)
    store = Store(Path(request["runs"]))
    report = Report(store.progress_file(request["name"]))
    try:
        compute(store, graph, request["name"], request["config"], request["told"], report)
    except Exception as problem:
        traceback.print_exc()
        message, complete = explain(problem, store.root)
        try:
            report.write(problem=message, complete=complete)
        except OSError:
            print(message, file=sys.stderr)  # a full disk may take not even this
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
