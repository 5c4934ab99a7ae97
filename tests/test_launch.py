"""The launch files: their launchers take them as they stand, and what they start is our training."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from torch.distributed.run import get_args_parser

from ggsm_core import params, worker

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
CONFIGS = sorted(path.name for path in LAUNCH.glob("*.yaml") if path.name != "pytorchjob.yaml")
STARTED = ["params/paper.yaml", "ggsm", "0"]


def trains(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``python`` with these arguments would train; fails where a launcher or we would refuse them."""
    assert arguments[:2] == ["-m", "torch.distributed.run"]
    launched = get_args_parser().parse_args(arguments[2:])
    assert launched.module and launched.training_script == "ggsm_core.training"
    asked: list[Any] = []
    monkeypatch.setattr(worker, "together", lambda *args: asked.append(args) or sys.exit(0))
    with pytest.raises(SystemExit):
        worker.command_line("contrast", launched.training_script_args)
    profile, stage, recipe, seed = asked[0]
    assert recipe in params.load(ROOT / profile).recipes.active and seed == 0 and stage == "contrast"
    return vars(launched)


def stub(folder: Path, name: str, body: str) -> None:
    """A command of this name."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A launch script, with ``folder`` before all other commands."""
    settings = (
        os.environ
        | environment
        | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHON": str(folder / "python"),
        }
    )
    return subprocess.run([LAUNCH / script, *STARTED], env=settings, capture_output=True, text=True)


@pytest.mark.parametrize("script", ["torchrun.sh", "slurm.sh"])
def test_scripts_are_shell(script: str) -> None:
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    assert os.access(LAUNCH / script, os.X_OK)


def test_torchrun_starts_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one machine and on several, with arguments that both parsers take."""
    stub(tmp_path, "python", 'printf "%s\\n" "$@"')
    one = trains(run("torchrun.sh", tmp_path).stdout.splitlines(), monkeypatch)
    assert (one["nnodes"], one["nproc_per_node"], one["max_restarts"]) == ("1", "gpu", 3)
    settings = {"NODES": "8", "PROCESSES": "2", "MASTER_ADDR": "first", "MASTER_PORT": "1234", "JOB": "7"}
    many = trains(run("torchrun.sh", tmp_path, **settings).stdout.splitlines(), monkeypatch)
    assert (many["nnodes"], many["nproc_per_node"], many["rdzv_id"]) == ("8", "2", "7")
    assert many["rdzv_endpoint"] == "first:1234"
    nothing = subprocess.run([LAUNCH / "torchrun.sh"], capture_output=True, text=True)
    assert nothing.returncode != 0 and "profile" in nothing.stderr


def test_slurm_starts_torchrun_on_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(tmp_path, "scontrol", 'test "$1 $2 $3" = "show hostnames node[1-8]" && printf "node1\\nnode2\\n"')
    stub(tmp_path, "srun", 'test "$1" = --kill-on-bad-exit=1 && shift && exec "$@"')
    stub(tmp_path, "python", 'printf "%s\\n" "$@"')
    given = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NNODES": "8", "SLURM_JOB_ID": "42"}
    done = run("slurm.sh", tmp_path, SLURM_JOB_NODELIST="node[1-8]", **given)
    found = trains(done.stdout.splitlines(), monkeypatch)
    assert (found["nnodes"], found["rdzv_id"], found["rdzv_endpoint"]) == ("8", "42", "node1:29500")
    asked = dict(
        line.removeprefix("#SBATCH --").split("=")
        for line in (LAUNCH / "slurm.sh").read_text().splitlines()
        if line.startswith("#SBATCH --") and "=" in line
    )
    assert int(asked["nodes"]) * int(asked["gpus-per-node"]) == 64 and asked["ntasks-per-node"] == "1"


def test_the_pytorchjob_starts_training(monkeypatch: pytest.MonkeyPatch) -> None:
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    worker_ = job["spec"]["pytorchReplicaSpecs"]["Worker"]
    pod = worker_["template"]["spec"]
    container = pod["containers"][0]
    assert container["name"] == "pytorch"  # the operator looks for this name
    assert job["spec"]["elasticPolicy"]["minReplicas"] == worker_["replicas"] == 8
    assert int(job["spec"]["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    trains([*container["command"][1:], *container["args"]], monkeypatch)


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_its_configurations(name: str) -> None:
    """With its own reader; the command in the first line names the file and a profile of its precision."""
    text = (LAUNCH / name).read_text()
    config = load_config_from_file(str(LAUNCH / name))
    assert config.num_processes == 8 and not config.use_cpu
    command = shlex.split(text.splitlines()[0].removeprefix("# "))
    assert command[:4] == [".venv/bin/accelerate", "launch", "--config_file", f"launch/{name}"]
    profile = params.load(ROOT / command[command.index("--profile") + 1])
    assert command[command.index("--recipe") + 1] in profile.recipes.active
    if config.mixed_precision == "bf16":
        assert profile.training.precision == "bf16"
    if config.distributed_type == "FSDP":
        block = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
        assert hasattr(transformers.models.qwen2.modeling_qwen2, block)
        assert config.fsdp_config["fsdp_version"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_starts_two_processes_from_them(name: str, tmp_path: Path) -> None:
    """On the CPU: their own launcher, then gloo between two processes that know of each other."""
    (tmp_path / "count.py").write_text(
        "import os\nimport torch\nfrom accelerate import Accelerator\na = Accelerator()\n"
        "total = int(a.reduce(torch.tensor(a.process_index + 1)))\n"
        "os.write(1, f'sum {total} of {a.num_processes}\\n'.encode())\n"  # in one piece: they share the pipe
        "torch.distributed.destroy_process_group()\n"
    )
    command = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(LAUNCH / name),
        "--num_processes",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, *command, "--main_process_port", "0", str(tmp_path / "count.py")],
        env=os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("sum 3 of 2") == 2
