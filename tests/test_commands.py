"""Every command that a reader is shown is executed by a test, or says what it needs that a test has not.

``HOW`` is the whole list: a command that no row matches fails, and so does a row that matches none. So a bare
``python`` fails: a reader who has activated nothing would run another one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
STARTS = (
    r"(?:\.ci/run|\.venv/bin/\w+|accelerate|export|kubectl|launch/\w+\.sh|make|pip|python|sbatch|vllm)(?: |$)"
)
MAKE = ["make", "--no-print-directory", "-o", "install"]  # what is installed stays as it is


class Printed(NamedTuple):
    """A command, and the text that it stands in."""

    command: str
    page: str
    text: str


def printed(page: str, text: str) -> Iterator[Printed]:
    """Lines of code blocks, and code within a sentence; a comment behind a command is none of it."""
    blocks = [*re.split(r"^```(.*?)\n(.*?)^```$", text, flags=re.M | re.S), "", ""]
    for prose, language, block in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
        lines = block.splitlines() if language in ("", "bash") else []
        for one in [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", prose)] + lines:
            for command in re.split(r" \| (?=make )", re.sub(r"\s+# .*", "", one)):
                if re.match(STARTS, command):
                    yield Printed(command.strip(), page, text)


def everything() -> list[Printed]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "book").glob("*.md"))]
    texts = {path.name: path.read_text(encoding="utf-8") for path in pages}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
        texts[path.name] = "\n\n".join(prose)
    return [one for name, text in texts.items() for one in printed(name, text)]


# --- how each of them is executed -------------------------------------------------------------------------


def needs(*words: str) -> Callable[[Printed], None]:
    """Not executed: the page that shows it says what it takes."""

    def check(shown: Printed) -> None:
        assert any(word in shown.text for word in words), f"{shown.page}: does not say that it needs {words}"

    return check


def by(file: str, test: str) -> Callable[[Printed], None]:
    """Executed by that test."""

    def check(shown: Printed) -> None:
        assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.M)

    return check


def in_ci(shown: Printed) -> None:
    """Executed as it stands by the continuous integration, which makes all of this from a fresh clone."""
    scripts = [ROOT / ".ci" / "run", *(ROOT / ".github" / "workflows").glob("*.yml")]
    lines = "\n".join(path.read_text(encoding="utf-8") for path in scripts)
    assert re.search(rf"(?:^ *|run: ){re.escape(shown.command)}(?: </dev/null)?$", lines, re.M)


HOW: dict[str, Callable[[Printed], None]] = {
    r"\.ci/run": in_ci,
    r"make book( PROFILE=smoke)?": in_ci,
    r"make (test|test-slow|lint)": in_ci,
    r"make book PROFILE=gpu": needs("On a GPU"),
    r"pip install \.": by("test_packaging.py", "test_it_imports_without_the_extras"),
    r"make book PROFILE=study": by(
        "test_pipeline.py", "test_a_published_book_is_made_from_its_tables_without_a_run"
    ),
    r"make study( RECIPES=\w+ SEEDS=0)?": by("test_study.py", "test_make_study_takes_rows_and_seeds"),
    r"\.venv/bin/python -m ggsm_core\.study --finished": by(
        "test_study.py", "test_what_is_whole_is_published_and_nothing_else_is_computed"
    ),
    r"make print": by("test_book.py", "test_the_book_prints_on_one_page"),
    r"make params( PROFILE=gpu)?": by(
        "test_params.py", "test_make_params_prints_every_field_with_its_meaning"
    ),
    r"make (results|bench)": by("test_commands.py", "test_make_starts_what_is_there"),
    r"make gpu-check( PROCESSES=1| PROFILE=paper)?": by("test_commands.py", "test_make_gpu_check_tells"),
    r"make lab": by("test_commands.py", "test_jupyterlab_opens_with_a_kernel_that_works"),
    r"make clean": by("test_commands.py", "test_make_clean_removes_what_was_built"),
    r"\.venv/bin/python -m ggsm_core\.stages list .*": by("test_commands.py", "test_runs_are_listed"),
    r"\.venv/bin/python -m ggsm_core\.stages run .*": needs("Hugging Face hub"),
    r"\.venv/bin/python -m ggsm_core\.training .*": by("test_commands.py", "test_one_training_run"),
    r"\.venv/bin/python -m papermill .*": by("test_book.py", "test_the_command_on_a_page_works"),
    r"\.venv/bin/python -m ggsm_core\.data\.readers .*": by("test_readers.py", "test_the_command_line"),
    r"\.venv/bin/python -m ggsm_core\.embed( .*)?": by("test_embed.py", "test_the_command_line"),
    r"\.venv/bin/python -m ggsm_core\.cost --profile FILE": by(
        "test_cost.py", "test_what_cannot_be_told_is_said"
    ),
    r"\.venv/bin/accelerate launch --num_processes 8 .*": needs("On a GPU"),
    r"\.venv/bin/accelerate launch --config_file .*": by(
        "test_launch.py", "test_accelerate_starts_two_processes_from_them"
    ),
    r"launch/torchrun\.sh .*": by("test_launch.py", "test_torchrun_starts_training"),
    r"sbatch launch/slurm\.sh .*": by("test_launch.py", "test_slurm_starts_torchrun_on_every_machine"),
    r"kubectl apply .*": by("test_launch.py", "test_the_pytorchjob_starts_training"),
    r"vllm serve .*|export OPENAI_BASE_URL=.*": needs("on a machine with a GPU"),
}


@pytest.mark.parametrize("shown", everything(), ids=lambda shown: f"{shown.page}: {shown.command}"[:90])
def test_every_command_is_executed_or_says_what_it_needs(shown: Printed) -> None:
    (how,) = [how for pattern, how in HOW.items() if re.fullmatch(pattern, shown.command)]
    how(shown)


def test_the_list_holds_nothing_else() -> None:
    commands = {one.command for one in everything()}
    assert len(commands) > 25
    unused = [pattern for pattern in HOW if not any(re.fullmatch(pattern, one) for one in commands)]
    assert not unused


def test_commands_are_found_where_they_hide() -> None:
    text = "Run `make\nbook`, `makefile`, `x`.\n\n```\nmake a   # why\nmake b | make c\nls\n```\n"
    text += "\n```{python}\nmake d\n```\n\nand `make e`"
    found = [one.command for one in printed("p", text)]
    assert found == ["make book", "make a", "make b", "make c", "make e"]


# --- those that are executed here -------------------------------------------------------------------------


def python(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A printed ``python`` line under profile smoke."""
    words = shlex.split(line.replace("quick", "smoke"))
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


def first(pattern: str) -> str:
    return next(one.command for one in everything() if re.fullmatch(pattern, one.command))


def test_runs_are_listed() -> None:
    done = python(first(r"\.venv/bin/python -m ggsm_core\.stages list .*"))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^(whole|missing) +contrast-ggsm-s0-\w+$", done.stdout, re.M)


def test_one_training_run() -> None:
    done = python(first(r"\.venv/bin/python -m ggsm_core\.training .*"), GGSM_WORKERS="2")
    assert done.returncode == 0, done.stderr


def test_make_starts_what_is_there() -> None:
    """Each target's lines, not executed: every module and script in them exists."""
    for target in ("results", "bench"):
        lines = subprocess.run(
            ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        modules = [name.replace(".", "/") + ".py" for name in re.findall(r"-m (ggsm_core[\w.]+)", lines)]
        files = [*modules, *re.findall(r"(?:benchmarks|\.ci)/\w+\.py", lines)]
        assert files and all((ROOT / name).is_file() for name in files)


def test_make_gpu_check_tells() -> None:
    command = [*MAKE, "gpu-check", "PROFILE=smoke", "PROCESSES=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    told = done.stdout.splitlines()
    assert {line.split()[0] for line in told} <= {"ok", "PROBLEM"} and len(told) >= 3
    assert (done.returncode == 0) == all(line.startswith("ok") for line in told)


def test_make_clean_removes_what_was_built(tmp_path: Path) -> None:
    for name in ("build", "runs", "results", ".venv"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    subprocess.run(
        ["make", "-C", tmp_path, "-f", ROOT / "Makefile", "clean"], check=True, capture_output=True
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == [".venv", "results"]


def test_jupyterlab_opens_with_a_kernel_that_works(tmp_path: Path) -> None:
    line = subprocess.run([*MAKE, "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = [sys.executable, *shlex.split(line)[1:], "--no-browser", "--allow-root", "--ServerApp.port=0"]
    place = {"JUPYTER_RUNTIME_DIR": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    server = subprocess.Popen(words, cwd=ROOT, env=os.environ | place, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (found := list(tmp_path.glob("jpserver-*.json"))):
            assert server.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        told = json.loads(found[0].read_text(encoding="utf-8"))

        def ask(path: str, body: dict[str, str] | None = None) -> bytes:
            request = urllib.request.Request(
                told["url"] + path, json.dumps(body).encode() if body else None,
                {"Authorization": f"token {told['token']}"},
            )  # fmt: skip
            with urllib.request.urlopen(request, timeout=30) as answer:
                content: bytes = answer.read()
            return content

        assert b"JupyterLab" in ask("lab")
        kernel = json.loads(ask("api/kernels", {"name": "python3"}))["id"]
        assert talked(tmp_path / f"kernel-{kernel}.json") == "ggsm_core 2\n"
    finally:
        server.terminate()
        server.wait(30)


def talked(connection: Path) -> str:
    """What a kernel that a server has started says to a line that needs this project."""
    from jupyter_client.blocking.client import BlockingKernelClient

    said: list[str] = []
    client = BlockingKernelClient(connection_file=str(connection))
    client.load_connection_file()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        client.execute_interactive(
            "import ggsm_core; print(ggsm_core.__name__, 1 + 1)",
            timeout=60,
            output_hook=lambda message: said.append(message["content"].get("text", "")),
        )
    finally:
        client.stop_channels()
    return "".join(said)
