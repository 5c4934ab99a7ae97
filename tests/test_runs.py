"""The run cache: what is computed when, what survives an accident, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from toygraph import Toy, small

from ggsm_core import params, provenance, runs, sections, stages, worker
from ggsm_core.jobs import disk_message, exit_status, explain
from ggsm_core.runs import SCRATCH, DamagedRun, Run, Store, UndeclaredRun
from ggsm_core.scheduler import JobFailed
from ggsm_core.stages import UnknownRun
from ggsm_core.worker import Declared, Undeclared


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def gone(pid: str) -> bool:
    """Ended, or a zombie that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_all_is_computed_once(toy: Toy) -> None:
    found = toy.compute(toy.plan())
    last = (found[-1].folder / "auc.csv").read_text().splitlines()[-1]
    assert last == "oracle,0,mean,0.7,0.6,0.8,untrained"
    assert (found[-1].folder / "differences.csv").read_text() == "probe:causal:0,probe:ggsm:0,probe:oracle:0"
    started = [run.provenance["started"] for run in found]
    toy.lines.clear()
    assert [run.provenance["started"] for run in toy.compute(toy.plan())] == started
    assert not toy.lines


def test_a_run_tells_where_it_comes_from(toy: Toy) -> None:
    plan = toy.plan()
    (run,) = toy.compute(plan, plan.node("contrast", "ggsm"))
    assert run.config == plan.node("contrast", "ggsm").config
    assert run.metrics().select("step", "loss").to_dicts() == [{"step": 1, "loss": 0.0}]
    assert (run.folder / "log.txt").read_text() == "trained\n"
    told = run.provenance
    assert told["row"] == "ggsm" and told["seed"] == 0 and told["threads"] == 1
    assert told["libraries"] == provenance.libraries()
    assert told["machine"]["cores"] and told["machine"]["memory_gib"] > 0
    assert told["seconds"] >= 0 and told["started"] <= told["ended"]
    assert {"commit", "uncommitted_changes", "params", "data", "code"} <= told.keys()
    text = (run.folder / "provenance.json").read_text()
    assert os.uname().nodename not in text.replace("Linux", "") and str(Path.home()) not in text


def test_what_a_run_depends_on_outlives_a_stage_that_saves_a_decoder(toy: Toy) -> None:
    toy.behave('(out / "config.json").write_text("{}")')
    node = toy.plan().node("contrast", "ggsm")
    (run,) = toy.compute(toy.plan(), node)
    assert (run.folder / "config.json").read_text() == "{}" and run.config == node.config
    assert run.name.endswith(provenance.digest(run.config)[:12])


def test_a_change_recomputes_what_depends_on_it_and_nothing_else(toy: Toy) -> None:
    toy.compute(toy.plan())
    toy.lines.clear()
    toy.compute(toy.plan(small(recipes=small().recipes.model_dump() | {"ggsm": {"warm_steps": 3}})))
    made = {line.split("whole: ")[1].rsplit(" (", 1)[0] for line in toy.lines}
    assert made == {"contrast ggsm s0", "probe ggsm s0", "compare"}


def test_changed_code_is_a_new_run(toy: Toy) -> None:
    before = toy.plan().node("contrast", "ggsm")
    toy.compute(toy.plan(), before)
    toy.edit("shared.py", "2 * x", "2 * x + 1")
    plan = toy.plan()
    after = plan.node("contrast", "ggsm")
    (run,) = toy.compute(plan, after)
    assert after.name != before.name and after.inputs["windows"].name == before.inputs["windows"].name
    assert run.metrics()["loss"].item() == 1.0


def test_code_that_changes_between_plan_and_run_is_not_passed_off_as_the_old(toy: Toy) -> None:
    plan = toy.plan()
    node = plan.node("contrast", "ggsm")  # planned with the old code
    toy.edit("shared.py", "2 * x", "3 * x")
    with pytest.raises(JobFailed, match="changed after this run was planned"):
        toy.compute(plan, node)
    assert plan.store.find(node.name) is None


@pytest.mark.parametrize("harm", ["truncate", "remove", "manifest"])
def test_a_damaged_run_is_refused_and_made_again(toy: Toy, harm: str) -> None:
    plan = toy.plan()
    (run,) = toy.compute(plan, plan.node("contrast", "ggsm"))
    weights = run.folder / "weights.txt"
    whole = weights.read_text()
    if harm == "truncate":
        weights.write_text(whole[:-1])
    elif harm == "remove":
        weights.unlink()
    else:
        (run.folder / runs.MANIFEST).unlink()
    with pytest.raises(DamagedRun):
        plan.store.find(run.name)
    toy.lines.clear()
    toy.compute(plan, plan.node("contrast", "ggsm"))
    assert weights.read_text() == whole
    assert "not used" in toy.lines[0] and len(toy.lines) == 2


def test_verify_finds_a_change_of_the_same_size(toy: Toy) -> None:
    plan = toy.plan()
    (run,) = toy.compute(plan, plan.node("contrast", "ggsm"))
    weights = run.folder / "weights.txt"
    weights.write_text(weights.read_text().swapcase())
    assert plan.store.find(run.name) is not None
    with pytest.raises(DamagedRun, match="weights"):
        plan.store.find(run.name, deep=True)


def test_a_failed_run_leaves_no_result_and_says_why(toy: Toy) -> None:
    toy.behave("print('so far'); raise ValueError('batch_size: 0 is too small')")
    plan = toy.plan()
    with pytest.raises(JobFailed) as problem:
        toy.compute(plan)
    message = str(problem.value)
    assert "contrast" in message and "batch_size: 0 is too small" in message and "so far" in message
    assert plan.store.find(plan.node("contrast", "ggsm").name) is None
    assert plan.store.find(plan.node("windows").name) is not None
    (toy.folder / "behaviour.py").unlink()
    toy.compute(plan)


def test_a_missing_package_is_named(toy: Toy) -> None:
    toy.behave("import no_such_package")
    with pytest.raises(JobFailed, match=r"no_such_package is not installed; `make install`"):
        toy.compute(toy.plan())


@pytest.mark.parametrize(
    "code",
    [
        "import errno; raise OSError(errno.ENOSPC, 'No space left on device')",
        "try:\n    raise OSError('IoError: No space left on device (os error 28)')\n"
        "except OSError as e:\n    raise RuntimeError('write failed') from e",
    ],
)
def test_a_full_disk_is_said_plainly(toy: Toy, code: str) -> None:
    toy.behave(code)
    with pytest.raises(JobFailed, match="the disk is full") as problem:
        toy.compute(toy.plan())
    assert "Traceback" not in str(problem.value)


def test_not_every_error_is_a_full_disk() -> None:
    assert disk_message(OSError(5, "Input/output error"), Path("runs")) is None


def test_a_half_written_folder_is_wiped_or_resumed(toy: Toy) -> None:
    plan = toy.plan()
    nodes = [plan.node("windows"), plan.node("contrast", "ggsm")]
    for node in nodes:
        folder = plan.store.partial(node.name)
        folder.mkdir(parents=True)
        (folder / "half.txt").write_text("half")
        (folder / SCRATCH).mkdir()
    windows, contrast = toy.compute(plan, *nodes)
    assert not (windows.folder / "half.txt").exists()
    assert (contrast.folder / "half.txt").exists()  # training goes on from its checkpoints
    assert not (contrast.folder / SCRATCH).exists()  # which are of no use once it is whole
    assert not plan.store.partial(windows.name).exists()


def test_a_file_takes_its_name_when_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    monkeypatch.setattr(Path, "replace", lambda self, target: synced.append(-1))
    provenance.write_atomically(tmp_path / "one.json", "{}")
    assert synced == [2, -1]


@pytest.mark.parametrize("last", ["before its name", "after its name"])
def test_a_kill_while_a_run_is_finished_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    store = Store(tmp_path)
    partial, folder = store.begin("one", {}, resume=True), store.folder("one")
    (partial / SCRATCH / "step-1").mkdir(parents=True)
    (partial / SCRATCH / "step-1" / "state").write_text("weights")

    replace = Path.replace

    def killed(self: Path, target: str = "", **more: object) -> None:
        if self == (partial if last == "before its name" else folder / SCRATCH):
            raise KeyboardInterrupt
        replace(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        patch.setattr(runs.shutil, "rmtree", killed)
        store.finish("one", {})
    if last == "before its name":
        assert (partial / SCRATCH / "step-1" / "state").exists() and store.find("one") is None
        assert not (store.finish("one", {}).folder / SCRATCH).exists()
    assert store.find("one", deep=True) == Run(folder)


def test_a_stage_sees_what_it_declares_and_nothing_else() -> None:
    given = {"training": sections.Training().model_dump(), "lora": None}
    declared = Declared(
        {"stage": "contrast", "sections": given, "recipe": "ggsm", "seed": 3, "options": {"ramp": True}}
    )
    assert declared.training == sections.Training() and declared.lora is None
    assert declared.options == sections.Guidance(ramp=True) and (declared.recipe, declared.seed) == (
        "ggsm",
        3,
    )
    with pytest.raises(Undeclared, match=r"params\.evaluation.*ggsm_core/stages\.py"):
        _ = declared.evaluation
    with pytest.raises(ValueError):
        _ = declared.name


def test_an_undeclared_section_stops_the_run(toy: Toy) -> None:
    toy.behave("params.objective")
    with pytest.raises(JobFailed, match=r"params\.objective"):
        toy.compute(toy.plan())


def test_two_processes_compute_a_run_once(toy: Toy) -> None:
    count = toy.folder / "count.txt"
    toy.behave(f"import time; open({str(count)!r}, 'a').write('x'); time.sleep(1.5)")
    plan = toy.plan()
    toy.compute(plan, plan.node("windows"))
    node = plan.node("contrast", "ggsm")
    threads = [threading.Thread(target=toy.compute, args=(toy.plan(), node)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count.read_text() == "x"
    assert plan.store.find(node.name) is not None


INTERRUPTED = """
import sys
from pathlib import Path
from ggsm_core.jobs import exit_status, run_missing
from ggsm_core.runs import Store
from ggsm_core.stages import Plan
from toygraph import small
from toy.graph import GRAPH
plan = Plan(GRAPH, small(), Store(Path(sys.argv[1])))
sys.exit(exit_status(lambda: run_missing(plan, plan.all()) or 0))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_children_and_says_what_is_kept(toy: Toy, number: signal.Signals) -> None:
    pids = toy.folder / "pids.txt"
    toy.behave(
        f"import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "(out / 'checkpoint.txt').write_text('step 20'); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(toy.folder), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(toy.folder / "runs")],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: pids.exists() and pids.read_text().count("\n") == 2)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Interrupted" in said and "make book" in said and "Traceback" not in said
    for pid in pids.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    # The next start keeps the whole run and goes on from the checkpoint.
    (toy.folder / "behaviour.py").write_text("assert (out / 'checkpoint.txt').read_text() == 'step 20'")
    plan = toy.plan()
    assert plan.store.find(plan.node("windows").name) is not None
    toy.compute(plan)
    assert not any("windows" in line for line in toy.lines)


def test_an_orphan_does_not_compute_on(toy: Toy) -> None:
    """The parent is killed without a chance to end its children, nor they theirs."""
    pids = toy.folder / "pids.txt"
    toy.behave(
        "import os, subprocess, time; child = subprocess.Popen(['sleep', '60']); "
        f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n{{child.pid}}\\n'); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(toy.folder), *sys.path])}
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, str(toy.folder / "runs")], env=environment)
    until(lambda: pids.exists() and pids.read_text().count("\n") == 4)
    process.kill()
    process.wait()
    until(lambda: all(map(gone, pids.read_text().split())), 50)  # of themselves they would go on for a minute


def test_ensure_refuses_what_a_notebook_does_not_declare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = tmp_path / "reads.json"
    reads.write_text(json.dumps({"notebook": "04_causal.ipynb", "runs": []}))
    monkeypatch.setenv(runs.READS, str(reads))
    monkeypatch.setenv("GGSM_RUNS", str(tmp_path / "runs"))
    with pytest.raises(UndeclaredRun, match=r"04_causal.ipynb reads the run 'contrast ggsm s0'"):
        runs.ensure(params.Profile(name="quick"), "contrast", recipe="ggsm")


def test_ensure_refuses_a_recipe_that_the_profile_does_not_run() -> None:
    with pytest.raises(UnknownRun, match="bidirectional"):
        runs.ensure(small(), "contrast", recipe="bidirectional")


def test_a_stage_without_steps_has_no_metrics(toy: Toy) -> None:
    plan = toy.plan()
    (run,) = toy.compute(plan, plan.node("windows"))
    with pytest.raises(ValueError, match="no steps"):
        run.metrics()


def test_the_store_lies_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGSM_RUNS", str(tmp_path))
    assert Store().folder("x") == tmp_path / "x"
    assert Run(tmp_path / "x").name == "x"


@pytest.mark.parametrize(
    ("given", "folder"), [("there", provenance.ROOT / "there"), ("~/there", Path.home() / "there")]
)
def test_a_folder_of_the_environment_is_one_wherever_a_process_runs(
    given: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GGSM_RUNS", given)
    assert Store().root == folder.resolve()


def test_a_variable_that_nothing_reads_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GGSM_RUN", "/elsewhere")
    assert stages.main(["verify"]) == 1
    assert re.search(r"^GGSM_RUN: .*unknown.*GGSM_RUNS", capsys.readouterr().err)


def test_every_variable_of_ours_is_known() -> None:
    sources = "".join(path.read_text() for path in Path(runs.__file__).parent.rglob("*.py"))
    assert set(re.findall(r"\bGGSM_[A-Z_]+", sources)) - {"GGSM_"} == set(provenance.VARIABLES)


@pytest.mark.parametrize(
    ("given", "threads"), [("4,2", 4), ("3", 3), ("", 5), ("0", 5), ("many", 5), (None, 5)]
)
def test_the_threads_of_a_run_are_told_whatever_the_environment_holds(
    given: str | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "cores", lambda: 5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert provenance.threads() == threads


def test_a_full_gpu_is_said_plainly(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def work() -> int:
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    assert exit_status(work) == 1
    in_a_child, complete = explain(torch.OutOfMemoryError("Tried to allocate 20 GiB"), Path("runs"))
    assert complete
    for told in (in_a_child, capsys.readouterr().err):
        assert all(words in told for words in ("training.micro_batch", "make gpu-check", "20 GiB"))
    assert not explain(RuntimeError("mat1 and mat2 shapes"), Path("runs"))[1]


DISTRIBUTED = """
import sys
from ggsm_core.worker import together
from toy.graph import GRAPH
run = together(sys.argv[1], "contrast", "ggsm", 0, graph=GRAPH)
sys.stdout.write(f"has {run.name}\\n")  # in one piece: two processes share the pipe
"""


def launch(toy: Toy, *launcher: str, **more: str) -> subprocess.CompletedProcess[str]:
    (toy.folder / "main.py").write_text(DISTRIBUTED)
    (toy.folder / "toy.yaml").write_text(json.dumps(small().model_dump(mode="json")))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(toy.folder), *sys.path]), "GGSM_RUNS": str(toy.folder / "runs"),
        "OMP_NUM_THREADS": "1",
    } | more  # fmt: skip
    command = [sys.executable, *launcher, str(toy.folder / "main.py"), str(toy.folder / "toy.yaml")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def test_the_processes_of_a_distributed_launch_compute_one_run_together(toy: Toy) -> None:
    toy.behave(
        "import os, time, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "seen = [None, None]; dist.all_gather_object(seen, os.environ['RANK'])\n"
        "assert seen == ['0', '1']\n"
        "if dist.get_rank() == 0: (out / 'seen.txt').write_text('-'.join(seen))\n"
        "dist.destroy_process_group()\n"
    )
    finished = launch(toy, *TORCHRUN)
    assert finished.returncode == 0, finished.stderr
    node = toy.plan().node("contrast", "ggsm")
    assert finished.stdout.count(f"has {node.name}") == 2
    run = toy.plan().store.find(node.name)
    assert run is not None and (run.folder / "seen.txt").read_text() == "0-1"
    assert run.provenance["processes"] == 2
    again = launch(toy, *TORCHRUN)  # nothing left to do, and nobody waits for ever
    assert again.returncode == 0 and again.stdout.count(f"has {node.name}") == 2


def test_a_distributed_launch_whose_first_process_fails_ends(toy: Toy) -> None:
    toy.edit("windows.py", "progress(1", "raise ValueError('no events')\n    progress(1")
    finished = launch(toy, *TORCHRUN)
    assert finished.returncode != 0 and "no events" in finished.stderr


def test_one_process_needs_no_launcher(toy: Toy) -> None:
    finished = launch(toy)
    assert finished.returncode == 0 and "has contrast-ggsm-s0" in finished.stdout, finished.stderr
    again = launch(toy, GGSM_PROFILE_TRACE=str(toy.folder / "trace"))
    assert again.returncode == 1
    assert re.search(r"--profile-trace: contrast ggsm s0 is whole.*remove .*/contrast-ggsm-s0", again.stderr)


@pytest.mark.parametrize("source", ["random", "shuffled", "position"])
def test_a_control_that_each_process_would_draw_is_refused_for_several(
    source: str, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = small().recipes.model_dump() | {"ggsm": {"source": source}}
    (toy.folder / "toy.yaml").write_text(json.dumps(small(recipes=recipes).model_dump(mode="json")))
    monkeypatch.setenv("GGSM_RUNS", str(toy.folder / "runs"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    told: dict[str, str] = {}
    monkeypatch.setattr(worker.rendezvous, "gate", lambda: SimpleNamespace(set=told.__setitem__))
    with pytest.raises(worker.Refused, match=rf"contrast ggsm s0: source: {source} .*one process"):
        worker.together(toy.folder / "toy.yaml", "contrast", "ggsm", graph=toy.graph)
    assert told == {"verdict": "failed"}  # nobody waits for ever


def test_the_command_verify_compares_contents(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = toy.plan()
    (run,) = toy.compute(plan, plan.node("windows"))
    monkeypatch.setenv("GGSM_RUNS", str(plan.store.root))
    assert stages.main(["verify"]) == 0
    path = next(path for path in run.folder.glob("*.txt") if path.name != "log.txt")
    path.write_text(path.read_text().swapcase())  # of the same size
    assert stages.main(["verify"]) == 1
    assert f"the content of {path.name} has changed" in capsys.readouterr().out
