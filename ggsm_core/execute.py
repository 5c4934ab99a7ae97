"""Execute one notebook for the scheduler: papermill, progress by cell, and the checks of its page.

Started in the project's folder, where the notebook's relative paths begin too.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import papermill
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config

from ggsm_core import provenance
from ggsm_core.jobs import explain
from ggsm_core.notebooks import INJECTED, NotebookError, first_line, unfit
from ggsm_core.worker import Report, leave_with

SHOWN = 3
"""Faults of a page that an error tells of."""


class _Reporting(NBClientEngine):
    """papermill's engine, which also says which cell it is at."""

    report: Report

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: NotebookExecutionManager, kernel_name: str, **options: Any
    ) -> Any:
        start = nb_man.cell_start

        def cell_start(cell: Any, cell_index: int | None = None, **more: Any) -> Any:
            total = len(nb_man.nb.cells)
            cls.report(cell_index or 0, total, f"cell {cell_index} of {total}")
            return start(cell, cell_index, **more)

        nb_man.cell_start = cell_start
        # Sockets in a folder of our own: with TCP, two kernels that start together may take the same port.
        with tempfile.TemporaryDirectory(prefix="ggsm-") as folder:
            config = Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})
            return super().execute_managed_notebook(nb_man, kernel_name, config=config, **options)


def execute(request: dict[str, str], report: Report) -> None:
    """Execute and check. Raises ``NotebookError`` naming the notebook and the cell."""
    source, output, record = (Path(request[key]) for key in ("source", "output", "record"))
    record.unlink(missing_ok=True)
    _Reporting.report = report
    papermill_engines.register("reporting", _Reporting)
    clock = time.monotonic()
    try:
        papermill.execute_notebook(
            source, output, parameters={"profile": request["profile"]}, engine_name="reporting",
            kernel_name="python3", progress_bar=False, cwd=Path.cwd(),
        )  # fmt: skip
    except PapermillExecutionError as problem:
        raise NotebookError(
            f"{source.name}, cell {_number(output)} ({first_line({'source': problem.source})!r}) failed: "
            f"{problem.ename}: {problem.evalue}. What ran before it is in {_shown(output)}"
        ) from problem
    content = json.loads(output.read_text(encoding="utf-8"))
    forbidden = (str(Path.cwd()), sys.prefix, str(Path.home()) + os.sep)
    problems = list(dict.fromkeys(unfit(content, forbidden)))
    if problems:
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        told_of = "; ".join([*problems[:SHOWN], *more])
        raise NotebookError(f"{source.name}: {told_of}. It is in {_shown(output)}")
    told = {
        "key": request["key"],
        "sha256": provenance.sha256(output),
        "seconds": round(time.monotonic() - clock, 1),
    }
    provenance.write_atomically(record, json.dumps(told))


def _number(output: Path) -> int:
    """The failed cell's number in the notebook's source, counted from 0, markdown cells included."""
    cells = json.loads(output.read_text(encoding="utf-8"))["cells"]
    # papermill adds cells of its own: the parameters, and the mark of the error.
    own = [
        cell
        for cell in cells
        if not {INJECTED, "papermill-error-cell-tag"} & set(cell["metadata"].get("tags", []))
    ]
    return next(
        i for i, cell in enumerate(own) if any(o["output_type"] == "error" for o in cell.get("outputs", []))
    )


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name)


def main() -> int:
    """Execute the notebook that stdin describes; returns the exit status."""
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()
    request = json.load(sys.stdin)
    report = Report(Path(request["progress"]))
    try:
        execute(request, report)
    except Exception as problem:
        traceback.print_exc()
        message, complete = explain(problem, Path(request["output"]).parent)
        report.write(problem=message.removeprefix("NotebookError: "), complete=complete)
        return 1
    return 0
