"""The command as launchers start it: a worker killed, two hosts, peers that are not there, a trace.

Real processes, from events to weights.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import fleet
import psutil
import pytest
import torch
from safetensors.torch import load_file

from ggsm_core import params, stages
from ggsm_core.runs import Store

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
PROFILE = f"""
extends: {ROOT}/params/smoke.yaml
name: launched
training: {{total_steps: 20, batch_size: 7, learning_rate: 1.0e-4, checkpoint_every: 2}}
recipes: {{ggsm: {{warm_steps: 12}}}}
"""
CLOSE = 1e-5  # two sum in another order than one; Adam makes steps of the learning rate even of rounding
HOSTS = {"first": "10.77.0.1", "second": "10.77.0.2"}


def ours(profile: Path) -> list[str]:
    """The command without a launcher."""
    return ["-m", "ggsm_core.training", "--profile", str(profile), "--recipe", "ggsm", "--seed", "0"]


def environment(runs: Path, **more: str) -> dict[str, str]:
    """One thread, no GPU, runs in a folder of the test's."""
    given = {"GGSM_RUNS": str(runs), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return os.environ | given | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | more


def start(command: list[str], runs: Path, **settings: str) -> subprocess.Popen[str]:
    """The command with its folder of runs; what it says goes to ``<runs>.log``."""
    with runs.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            command, env=environment(runs, **settings), stdout=log, stderr=log, text=True,
            start_new_session=True,
        )  # fmt: skip


def torchrun(processes: int, restarts: int, profile: Path) -> list[str]:
    """As many on this machine."""
    options = ["--standalone", "--nproc_per_node", str(processes), "--max_restarts", str(restarts)]
    return [sys.executable, "-m", "torch.distributed.run", *options, *ours(profile)]


def ended(process: subprocess.Popen[str], seconds: int = 120) -> int:
    """The exit status; whatever still runs then is ended with it."""
    try:
        return process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with profile, trace, and the runs of one undisturbed process.

    What its training needs is linked where the smoke book has left it, else computed.
    """
    folder = tmp_path_factory.mktemp("launched")
    (folder / "profile.yaml").write_text(PROFILE)
    (folder / "one").mkdir()
    plan = stages.Plan(stages.GRAPH, params.load(folder / "profile.yaml"), Store())
    needed = stages.with_needs(plan.node("contrast", "ggsm", 0).inputs.values())
    for name in stages.check(needed, plan.store):
        (folder / "one" / name).symlink_to(plan.store.folder(name))
    command = [sys.executable, *ours(folder / "profile.yaml"), "--profile-trace", str(folder / "trace")]
    done = subprocess.run(command, env=environment(folder / "one"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def fresh(one: Path, name: str) -> Path:
    """A folder of runs that has all that contrast needs, and no result of it."""
    runs = one / name
    runs.mkdir()
    for needed in (one / "one").glob("[!.c]*"):
        (runs / needed.name).symlink_to(needed)
    return runs


def weights(runs: Path) -> dict[str, torch.Tensor]:
    """Of the finished run."""
    (folder,) = runs.glob("contrast-*")
    return load_file(folder / "encoder.safetensors")


def apart(found: Path, expected: Path) -> float:
    """The largest difference of a weight."""
    a, b = weights(found), weights(expected)
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).nan_to_num().abs().max()) for k in b)


@pytest.fixture(scope="module")
def two(one: Path) -> Path:
    """The runs of two undisturbed processes."""
    runs = fresh(one, "two")
    process = start(torchrun(2, 0, one / "profile.yaml"), runs)
    assert ended(process) == 0, runs.with_suffix(".log").read_text()
    return runs


def test_a_trace_is_written_where_the_command_says(one: Path) -> None:
    (trace,) = (one / "trace").iterdir()
    events = json.loads(trace.read_text())["traceEvents"]
    assert trace.name == "rank-0.json" and any("backward" in event["name"].lower() for event in events)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_after_a_worker_is_killed_all_start_again_and_end_with_the_same_weights(
    one: Path, two: Path, rank: str
) -> None:
    """kill -9 after the second checkpoint; bitwise the undisturbed run of as many processes."""
    runs = fresh(one, f"killed-{rank}")
    process = start(torchrun(2, 1, one / "profile.yaml"), runs)
    while not list(runs.glob(".partial-*/checkpoints/step-4")):
        assert process.poll() is None, runs.with_suffix(".log").read_text()
        time.sleep(0.005)
    (worker,) = [
        child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == rank
    ]
    worker.kill()
    assert ended(process) == 0, runs.with_suffix(".log").read_text()
    resumed = re.findall(r"resumed at step (\d+)", runs.with_suffix(".log").read_text())
    assert len(resumed) == 2 and int(resumed[0]) == int(resumed[1]) >= 4
    assert apart(runs, two) == 0


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[dict[str, list[str]]]:
    """Two hosts that see each other alone: name -> the beginning of a command that runs there."""
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for n, a in HOSTS.items()))
    first, second = spaces = [f"ggsm-{name}-{os.getpid()}" for name in HOSTS]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs the right to make network namespaces: ip {words[0]}: {done.stderr.strip()}")

    with ExitStack() as stack:
        for space in spaces:
            ip("netns", "add", space)
            stack.callback(subprocess.run, ["ip", "netns", "del", space], check=True)
        ip("link", "add", "wire", "netns", first, "type", "veth", "peer", "name", "wire", "netns", second)
        for space, address in zip(spaces, HOSTS.values(), strict=True):
            ip("-n", space, "addr", "add", f"{address}/24", "dev", "wire")
            for device in ("lo", "wire"):
                ip("-n", space, "link", "set", device, "up")
        alone = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'  # and its own name
        yield {
            name: ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", alone, "sh", name,
                   str(tmp_path / "hosts")]
            for name, space in zip(HOSTS, spaces, strict=True)
        }  # fmt: skip


def test_two_hosts_compute_the_run_of_one_process(one: Path, two: Path, hosts: dict[str, list[str]]) -> None:
    """An agent on each, a folder that both see, gloo over the wire between them; bitwise two on one host."""
    runs = fresh(one, "hosts")
    settings = {"NODES": "2", "PROCESSES": "1", "MASTER_ADDR": "first", "GLOO_SOCKET_IFNAME": "wire"}
    launch = [str(ROOT / "launch" / "torchrun.sh"), str(one / "profile.yaml"), "ggsm", "0"]
    started = [start([*host, *launch], runs, **settings) for host in hosts.values()]
    assert [ended(process) for process in started] == [0, 0], runs.with_suffix(".log").read_text()
    (run,) = runs.glob("contrast-*")
    assert json.loads((run / "provenance.json").read_text())["processes"] == 2
    assert apart(runs, two) == 0 and apart(runs, one / "one") <= CLOSE


@pytest.mark.parametrize(
    ("master", "words"), [("second", "connect to (second, "), ("first", "RendezvousTimeout")]
)
def test_a_host_that_does_not_come_is_named(
    tmp_path: Path, hosts: dict[str, list[str]], master: str, words: str
) -> None:
    """The first host of two is alone: torchrun says so in time, whether it is the master or not."""
    launch = [str(ROOT / "launch" / "torchrun.sh"), str(ROOT / "params" / "smoke.yaml"), "ggsm", "0"]
    settings = {"NODES": "2", "PROCESSES": "1", "MASTER_ADDR": master, "GGSM_RENDEZVOUS_SECONDS": "2"}
    process = start([*hosts["first"], *launch], tmp_path / "runs", **settings)
    assert ended(process, 60) != 0
    assert words in (tmp_path / "runs.log").read_text()


@pytest.mark.parametrize(("rank", "world"), [("1", "2"), ("0", "3")])
def test_peers_that_are_not_there_are_named(tmp_path: Path, rank: str, world: str) -> None:
    """The first process is nowhere; or it waits for more than were started."""
    (tmp_path / "profile.yaml").write_text(PROFILE)
    launched = {"RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "GGSM_RENDEZVOUS_SECONDS": "1"}
    done = subprocess.run(
        [sys.executable, *ours(tmp_path / "profile.yaml")],
        env=environment(tmp_path / "runs", MASTER_PORT=str(fleet.free_port()), **launched),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"process {rank} of {world} did not meet the others at 127.0.0.1" in done.stderr


def test_more_processes_than_pairs_are_refused(one: Path) -> None:
    """All end by themselves, and say why."""
    runs = fresh(one, "many")
    (one / "small.yaml").write_text(PROFILE.replace("batch_size: 7", "batch_size: 2"))
    process = start(torchrun(3, 0, one / "small.yaml"), runs)
    assert ended(process) != 0
    assert "batch_size: 2 pairs are too few for 3 processes" in runs.with_suffix(".log").read_text()
