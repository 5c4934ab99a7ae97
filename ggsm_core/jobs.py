"""From planned runs to processes: what is missing is computed, and what goes wrong is said in one place."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

from ggsm_core import provenance
from ggsm_core.runs import Run
from ggsm_core.scheduler import Job, JobFailed, Scheduler
from ggsm_core.stages import Node, Plan, UnknownRun, check, with_needs


def workers() -> int:
    """Processes at a time: ``GGSM_WORKERS``, or one a core. One that uses a GPU is alone (``Stage.gpu``)."""
    return provenance.positive("GGSM_WORKERS", provenance.cores())


def missing_jobs(plan: Plan, nodes: Iterable[Node], say: Callable[[str], None] = print) -> list[Job]:
    """A job for each of ``nodes`` and their needs that is not whole.

    A missing run whose only readers are whole is not needed, and not computed.
    """
    nodes = list(nodes)
    whole = check(with_needs(nodes), plan.store, say)
    wanted: dict[str, Node] = {}
    waiting = [node for node in nodes if node.name not in whole]
    while waiting:
        node = waiting.pop()
        wanted[node.name] = node
        waiting += [
            need for need in node.inputs.values() if need.name not in whole and need.name not in wanted
        ]
    measured = _measured(plan.store.runs())
    return [_job(plan, node, measured) for node in with_needs(nodes) if node.name in wanted]


def _measured(runs: Iterable[Run]) -> dict[str, float]:
    """Label -> seconds that its latest run took."""
    latest: dict[str, tuple[str, float]] = {}
    for run in runs:
        try:
            told = run.provenance
            entry = (str(told["ended"]), float(told["seconds"]))
            label = str(told["label"])
        except (OSError, ValueError, KeyError):
            continue  # a damaged run is dealt with where it is used
        latest[label] = max(entry, latest.get(label, entry))
    return {label: seconds for label, (_, seconds) in latest.items()}


def _job(plan: Plan, node: Node, measured: dict[str, float]) -> Job:
    request = {
        "graph": plan.graph.address,
        "runs": str(plan.store.root),
        "name": node.name,
        "config": node.config,
        "told": context(plan, node),
    }
    return Job(
        name=node.name,
        title=node.title,
        command=[sys.executable, "-m", "ggsm_core.worker"],
        stdin=json.dumps(request),
        needs=frozenset(need.name for need in node.inputs.values()),
        seconds=measured.get(node.label, node.stage.seconds),
        threads=workers() if node.stage.gpu and provenance.has_gpu() else node.stage.threads,
        progress_file=plan.store.progress_file(node.name),
        log=plan.store.progress_file(node.name).with_suffix(".log"),
    )


def context(plan: Plan, node: Node) -> dict[str, object]:
    """What goes into a run's provenance beside what the computing process sees itself."""
    source = plan.node(next(iter(plan.graph.stages))).config["sources"]
    commit, changed = provenance.commit()
    return {
        "label": node.label,
        "row": node.row,
        "seed": node.seed,
        "commit": commit,
        "uncommitted_changes": changed,
        "profile": plan.profile.name,
        "params": provenance.digest(plan.profile.model_dump(mode="json")),
        "data": provenance.digest(source),
    }


def run_missing(plan: Plan, nodes: Iterable[Node], say: Callable[[str], None] = print) -> None:
    """Compute those of ``nodes``, and of what they need, that are not whole. Raises ``JobFailed``."""
    jobs = missing_jobs(plan, nodes, say)
    if jobs:
        Scheduler(jobs, workers(), provenance.ROOT, say).run()


def listed(given: str | None, option: str) -> list[str]:
    """The names of ``a,b``, a command's ``option``; [] if there is none. Raises ``UnknownRun``."""
    names = [] if given is None else given.split(",")
    if "" in names:
        raise UnknownRun(f"{option}: {given!r} names nothing in one place; write ggsm,causal or 0,1")
    return names


def exit_status(action: Callable[[], int]) -> int:
    """Run a command; turn what may be expected to go wrong into a message and an exit status."""

    def ended(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, ended)
    try:
        provenance.check_variables()
        return action()
    except KeyboardInterrupt:
        print(
            "\nInterrupted; everything that ran has been ended. Whole runs are kept, and so are "
            "the checkpoints of training under way: the next `make book` (or the same command) goes on.",
            file=sys.stderr,
        )
        return 130
    except (JobFailed, ValueError) as problem:
        print(f"{problem}\nWhole runs are kept; the same command goes on from them.", file=sys.stderr)
        return 1
    except RuntimeError as problem:
        if not (full := memory_message(problem)):
            raise
        print(full, file=sys.stderr)
        return 1
    except OSError as problem:
        print(disk_message(problem, Path.cwd()) or f"{type(problem).__name__}: {problem}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def explain(problem: Exception, folder: Path) -> tuple[str, bool]:
    """What to tell of an error in a child, and whether that is all there is to know (else show its log)."""
    if full := disk_message(problem, folder) or memory_message(problem):
        return full, True
    if isinstance(problem, ModuleNotFoundError) and not (problem.name or "").startswith("ggsm_core"):
        return f"the package {problem.name} is not installed; `make install` installs it", True
    ours = isinstance(problem, ValueError) and type(problem).__module__.startswith(("ggsm_core", "__main__"))
    return f"{type(problem).__name__}: {problem}", ours


def memory_message(problem: BaseException) -> str | None:
    """What to say if ``problem`` is a GPU whose memory is full; None if it is not."""
    torch = sys.modules.get("torch")  # only if the work itself used it
    if torch is None or not isinstance(problem, torch.OutOfMemoryError):
        return None
    return (
        "the GPU's memory is full: set training.micro_batch, or lower it (`make gpu-check PROFILE=...` says "
        f"what fits), or free the GPU, and start again ({problem})"
    )


def disk_message(problem: BaseException | None, folder: Path) -> str | None:
    """What to say if ``problem``, or what caused it, is a full disk; None if it is not."""
    while problem is not None:
        # Libraries written in Rust report the system's words without its number.
        if "No space left on device" in str(problem) or "Disk quota exceeded" in str(problem):
            return (
                f"the disk is full (where {folder.name}/ lies). Free some space (`make clean` removes all "
                "runs and the built book) and start again: what is whole is kept"
            )
        problem = problem.__cause__ or problem.__context__
    return None
