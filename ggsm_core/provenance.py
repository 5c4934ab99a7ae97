"""Where a result comes from: commit, versions, data, machine. Nothing that names a person or a host."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "safetensors",
    "scikit-learn",
    "scipy",
    "numpy",
    "polars",
    "sentence-transformers",
    "faiss-cpu",
)
"""What computes. Another version of one of these is another result."""

ROOT = Path(__file__).resolve().parents[1]
TRACE = "GGSM_PROFILE_TRACE"
"""Environment variable: the folder for a profiler's trace (``telemetry.tracing``)."""
VARIABLES = (
    "GGSM_LLM_CACHE",
    TRACE,
    "GGSM_READS",
    "GGSM_RENDEZVOUS_SECONDS",
    "GGSM_RUNS",
    "GGSM_SALT",
    "GGSM_WORKERS",
)
"""What of the environment is ours."""


class MissingPackage(ValueError):
    """A package that the work needs is not installed."""


class UnknownVariable(ValueError):
    """A variable of the environment that begins as ours do and is none of them."""


def digest(value: Any) -> str:
    """Hex sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def versions(*names: str) -> dict[str, str]:
    """Name -> installed version. Raises ``MissingPackage``."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            raise MissingPackage(
                f"{name} is not installed; `make install` installs all that is needed"
            ) from None
    return found


@cache
def libraries() -> dict[str, str]:
    """Name -> installed version of Python and of each of ``LIBRARIES``. Raises ``MissingPackage``."""
    return {"python": ".".join(platform.python_version_tuple()[:2])} | versions(*LIBRARIES)


def package_files(package: str, pattern: str) -> list[Path]:
    """Data files inside an installed package, found without importing it. Raises ``MissingPackage``."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(path for path in Path(folders[0]).glob(pattern) if path.is_file()) if folders else []
    if not files:
        raise MissingPackage(
            f"the package {package} with its files {pattern} is not installed; "
            "`make install` installs all that is needed"
        )
    return files


def file_hashes(files: Iterable[Path], cache_file: Path) -> dict[str, str]:
    """Path below the files' common folder -> sha256.

    A file whose size and time of change are known from ``cache_file`` is not read again.
    """
    files = list(files)
    if not files:
        return {}
    common = os.path.commonpath([path.parent for path in files])
    try:
        known: dict[str, list[Any]] = json.loads(cache_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    result, fresh = {}, {}
    for path in files:
        state = path.stat()
        entry = known.get(str(path))
        if entry is None or entry[:2] != [state.st_size, state.st_mtime_ns]:
            entry = [state.st_size, state.st_mtime_ns, sha256(path)]
            fresh[str(path)] = entry
        result[path.relative_to(common).as_posix()] = str(entry[2])
    if fresh:
        write_atomically(cache_file, json.dumps(known | fresh))
    return result


def sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
    draft.replace(path)


@cache
def commit() -> tuple[str | None, bool | None]:
    """The commit of the working tree, and whether code differs from it; (None, None) outside git.

    ``results/`` is written by the pipeline itself and does not count as a difference.
    """
    try:
        head = _git("rev-parse", "HEAD").strip()
        return head, bool(_git("status", "--porcelain", "--", ".", ":!results").strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def has_gpu() -> bool:
    """Whether this machine shows an NVIDIA GPU; without torch, which is slow to import."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


@cache
def machine() -> dict[str, Any]:
    """Processor, usable cores, memory in GiB, GPU if torch sees one. No host name, no user name."""
    model = platform.processor() or platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines())
        model = next((value.strip() for key, _, value in lines if key.strip() == "model name"), model)
    torch = sys.modules.get("torch")  # only if the run itself used it
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    return {
        "cpu": model,
        "cores": cores(),
        "memory_gib": round(memory, 1),
        "gpu": gpu,
        "system": platform.system(),
    }


def positive(name: str, default: int) -> int:
    """The whole number of 1 or more in the variable ``name`` of the environment. Raises ``ValueError``."""
    asked = os.environ.get(name)
    if asked is None:
        return default
    if not asked.isdigit() or int(asked) < 1:
        raise ValueError(f"{name}: {asked!r}; give a whole number of 1 or more")
    return int(asked)


def named_folder(name: str, default: Path) -> Path:
    """The folder in the variable ``name`` of the environment; a relative one lies below ``ROOT``.

    Not below the working directory: that is another one in a process that the scheduler starts.
    """
    given = os.environ.get(name)
    return ROOT / Path(given).expanduser() if given else default


def check_variables() -> None:
    """Raise ``UnknownVariable`` for one that is named like ours, which nothing reads."""
    unknown = sorted(name for name in os.environ if name.startswith("GGSM_") and name not in VARIABLES)
    if unknown:
        raise UnknownVariable(
            f"{', '.join(unknown)}: set in the environment and unknown; correct the name or unset it. Known: "
            f"{', '.join(VARIABLES)}"
        )


def threads() -> int:
    """Threads of this process's libraries: the first number in OMP_NUM_THREADS, or one a core."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return (int(first) if first.isdecimal() else 0) or cores()


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux, where ``ru_maxrss`` would begin with what the parent held
        lines = status.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
