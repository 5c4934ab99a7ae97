"""Run jobs in processes, one a core, with a line of progress at least every ten seconds."""

from __future__ import annotations

import heapq
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EVERY = 8.0  # seconds between lines of progress; the promise is ten
GRACE = 5.0  # seconds that an ended child may take
TAIL = 15  # lines of a failed job's log that are shown


@dataclass
class Job:
    """One process to run. ``stdin`` is its request.

    In ``progress_file`` it reports ``done``, ``total`` and ``message``; before it fails ``problem``, and
    ``complete`` where that needs no traceback beside it.
    """

    name: str
    title: str
    command: list[str]
    progress_file: Path
    log: Path  # where its own words go until it has a better place, which its report names as "log"
    needs: frozenset[str] = frozenset()
    seconds: float = 10.0
    threads: int = 1
    stdin: str = ""
    environment: dict[str, str] = field(default_factory=dict)


class JobFailed(RuntimeError):
    """A job ended with an error; the message names it and quotes its log."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    started: float

    def report(self) -> dict[str, Any]:
        try:
            content = json.loads(self.job.progress_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def share(self) -> float:
        """What is done of the job, by its own report where it makes one."""
        report = self.report()
        total = report.get("total") or 0
        return min(1.0, report.get("done", 0) / total) if total else 0.0


def thread_environment(threads: int) -> dict[str, str]:
    """Holds every library of a child to ``threads`` threads, and its tongue about progress bars."""
    names = ("OMP", "MKL", "OPENBLAS", "NUMEXPR")
    return {f"{name}_NUM_THREADS": str(threads) for name in names} | {
        "POLARS_MAX_THREADS": str(threads),
        "RAYON_NUM_THREADS": str(threads),
        "LOKY_MAX_CPU_COUNT": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def _inherited() -> dict[str, str]:
    """The environment without what a distributed launcher put there: a child is a process of its own."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_")
    return {key: value for key, value in os.environ.items() if not key.startswith(launcher)}


class Scheduler:
    """Runs ``jobs`` on ``workers`` cores: what can start starts, the head of the longest chain first.

    A job that needs more threads than there are workers gets all of them. Needs that are no job of this
    scheduler are taken as met.
    """

    def __init__(
        self, jobs: Iterable[Job], workers: int, folder: Path, say: Callable[[str], None] = print
    ) -> None:
        self.waiting = {job.name: job for job in jobs}
        self.jobs = dict(self.waiting)
        self.workers, self.folder, self.say = max(1, workers), folder, say
        self.running: dict[str, _Running] = {}
        self.done: set[str] = set()
        self.measured = self.estimated = 0.0  # seconds of the finished jobs, as they were and as expected
        self.priority: dict[str, float] = {}
        for name in self.jobs:
            self._chain(name)
        self.began = time.monotonic()

    def _chain(self, name: str) -> float:
        """Seconds from the start of this job to the end of the longest chain of jobs behind it."""
        if name not in self.priority:
            behind = [self._chain(other.name) for other in self.jobs.values() if name in other.needs]
            self.priority[name] = self.jobs[name].seconds + max(behind, default=0.0)
        return self.priority[name]

    def _threads(self, job: Job) -> int:
        return min(job.threads, self.workers)

    def run(self) -> None:
        """Run all. Raises ``JobFailed`` at the first failure, when all children have been ended."""
        said = time.monotonic()
        try:
            while self.waiting or self.running:
                self._start_ready()
                time.sleep(0.1)
                self._collect()
                if time.monotonic() - said >= EVERY and self.running:
                    self.say(self.line())
                    said = time.monotonic()
        finally:
            self._end()

    def _start_ready(self) -> None:
        free = self.workers - sum(self._threads(running.job) for running in self.running.values())
        ready = [
            job
            for job in self.waiting.values()
            if not job.needs & (self.waiting.keys() | self.running.keys())
        ]
        if not ready and not self.running:
            raise ValueError(f"jobs that need each other in a circle: {', '.join(self.waiting)}")
        for job in sorted(ready, key=lambda job: -self.priority[job.name]):
            if self._threads(job) > free:
                break  # keep the room for the most urgent one
            free -= self._threads(job)
            self._start(self.waiting.pop(job.name))

    def _start(self, job: Job) -> None:
        job.progress_file.parent.mkdir(parents=True, exist_ok=True)
        job.progress_file.unlink(missing_ok=True)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        environment = _inherited() | thread_environment(self._threads(job)) | job.environment
        with job.log.open("wb") as log:
            process = subprocess.Popen(
                job.command, cwd=self.folder, env=environment, stdin=subprocess.PIPE, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,  # Ctrl-C is ours to pass on
            )  # fmt: skip
        self.running[job.name] = _Running(job, process, time.monotonic())
        assert process.stdin is not None
        try:
            process.stdin.write(job.stdin.encode())
            process.stdin.close()
        except BrokenPipeError:
            pass  # it ended before it read its request: its exit status and log say why

    def _collect(self) -> None:
        for name, running in list(self.running.items()):
            status = running.process.poll()
            if status is None:
                continue
            if status != 0:
                raise JobFailed(self._failure(running, status))
            seconds = time.monotonic() - running.started
            del self.running[name]
            self.done.add(name)
            self.measured += seconds
            self.estimated += running.job.seconds
            running.job.progress_file.unlink(missing_ok=True)
            running.job.log.unlink(missing_ok=True)
            self.say(
                f"[{_clock(time.monotonic() - self.began)}] whole: {running.job.title} ({seconds:.0f} s)"
            )

    def _failure(self, running: _Running, status: int) -> str:
        report = running.report()
        log = Path(report.get("log", running.job.log))
        how = f"was ended by signal {-status}" if status < 0 else "failed"
        if status == -signal.SIGKILL:
            how += " (if nobody ended it, the machine was short of memory: try with GGSM_WORKERS=1)"
        lines = [f"{running.job.title} {how}" + (f": {report['problem']}" if "problem" in report else "")]
        if log.is_file():
            shown = log.relative_to(self.folder if log.is_relative_to(self.folder) else log.parents[1])
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
            # A message that tells the whole story needs no traceback below it.
            lines.append(f"log: {shown}" if report.get("complete") else f"the end of its log, {shown}:")
            lines += [] if report.get("complete") else [f"    {line}" for line in tail]
        return "\n".join(lines)

    def _end(self) -> None:
        """End what still runs, children of children too."""
        for running in self.running.values():
            _signal(running.process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for running in self.running.values():
            try:
                running.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(running.process, signal.SIGKILL)
                running.process.wait()
        self.running.clear()

    def line(self) -> str:
        """Elapsed, share done, what runs and how far it is, time left."""
        total = sum(job.seconds for job in self.jobs.values())
        finished = sum(self.jobs[name].seconds for name in self.done)
        states = []
        for running in self.running.values():
            report = running.report()
            finished += running.job.seconds * running.share()
            detail = f" ({report['message']})" if report.get("message") else ""
            states.append(f"{running.job.title} {running.share():.0%}{detail}")
        return (
            f"[{_clock(time.monotonic() - self.began)}] {finished / total:4.0%} done, "
            f"{len(self.done)} of {len(self.jobs)} steps whole, about {_clock(self.remaining())} left; "
            f"now: {', '.join(states)}"
        )

    def remaining(self) -> float:
        """Seconds left, by playing the rest of the schedule with what has been measured so far."""
        # Before anything is measured the estimates are all there is; then they are scaled to this machine.
        pace = (self.measured + 10.0) / (self.estimated + 10.0)
        ends: list[tuple[float, str]] = []
        for name, running in self.running.items():
            elapsed, share = time.monotonic() - running.started, running.share()
            left = (
                elapsed * (1 - share) / share
                if share > 0.05
                else max(1.0, running.job.seconds * pace - elapsed)
            )
            heapq.heappush(ends, (left, name))
        waiting, met, now = dict(self.waiting), set(self.done), 0.0
        free = self.workers - sum(self._threads(self.jobs[name]) for _, name in ends)
        while waiting or ends:
            for job in sorted(waiting.values(), key=lambda job: -self.priority[job.name]):
                if not (job.needs & self.jobs.keys()) - met and self._threads(job) <= free:
                    free -= self._threads(job)
                    heapq.heappush(ends, (now + job.seconds * pace, waiting.pop(job.name).name))
            if not ends:
                break
            now, name = heapq.heappop(ends)
            met.add(name)
            free += self._threads(self.jobs[name])
        return now


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:2d}:{rest:02d}"
