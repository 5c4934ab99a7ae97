"""Make .venv hold exactly what requirements.lock says, with a line of progress every few seconds.

Runs with nothing but the standard library. Does nothing when lock, project file and Python are those of the
last whole installation.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
LOCK = ROOT / "requirements.lock"
LOG = ROOT / "build" / "install.log"
WANTED = (3, 11)
EVERY = 8.0  # seconds between lines of progress
USUAL = 130.0  # seconds, with packages cached, on two cores; only said until there is something to measure


def python() -> str:
    """A Python of the version that the lock was made for."""
    name = ".".join(map(str, WANTED))
    found = sys.executable if sys.version_info[:2] == WANTED else shutil.which(f"python{name}")
    if found is None:
        raise SystemExit(
            f"Python {name} is needed and {sys.executable} is {sys.version.split()[0]}; install it, "
            f"or name one that is there: make PYTHON=/path/to/python{name}"
        )
    return found


def state() -> str:
    """Hash of what the environment is made from."""
    parts = [path.read_bytes() for path in (LOCK, ROOT / "pyproject.toml", Path(__file__))]
    return hashlib.sha256(b"\0".join([*parts, str(WANTED).encode()])).hexdigest()


def pins() -> dict[str, str]:
    """Name -> version, from the lock."""
    lines = (line.split("#")[0].strip() for line in LOCK.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if line)


def progress(began: float, total: int, what: str) -> None:
    """One line: packages that pip has looked at, packages that lie in the environment, time left."""
    log = LOG.read_text(encoding="utf-8", errors="replace")
    looked = log.count("\nCollecting ") + log.count("\nRequirement already satisfied: ")
    there = sum(1 for _ in VENV.glob("lib/python*/site-packages/*.dist-info"))
    torch = any(VENV.glob("lib/python*/site-packages/torch-*.dist-info"))
    # As the time goes: torch a third, fetching the rest a third, unpacking it a third.
    share = min(0.99, (torch + min(1, looked / total) + min(1, there / total)) / 3)
    elapsed = time.monotonic() - began
    left = elapsed / share - elapsed if share > 0.1 else max(USUAL - elapsed, 0)
    print(
        f"[{elapsed:4.0f} s] install {share:4.0%}: {what}, {there} of {total} packages there, "
        f"about {left:.0f} s left",
        flush=True,
    )


def pip(arguments: list[str], began: float, total: int, what: str) -> None:
    """Run pip with its words in the log. Raises ``SystemExit`` with the end of the log."""
    command = [
        str(VENV / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-compile",  # of 26,000 files a few thousand are ever imported, and compiled then
        *arguments,
    ]
    with LOG.open("ab") as log:
        log.write(f"\n$ pip install {' '.join(arguments)}\n".encode())
        log.flush()
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            progress(began, total, what)
            while process.poll() is None:
                try:
                    process.wait(EVERY)
                except subprocess.TimeoutExpired:
                    progress(began, total, what)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise SystemExit("\ninterrupted; the same command goes on with what is installed") from None
    if process.returncode:
        tail = "\n".join(LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise SystemExit(f"installing failed ({what}). The end of {LOG.relative_to(ROOT)}:\n{tail}")


def main() -> None:
    """Install if anything changed since the last whole installation."""
    stamp = VENV / ".installed"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == state():
        return
    began, wanted = time.monotonic(), pins()
    print(
        f"installing {len(wanted)} packages into .venv (once; again only when requirements.lock changes)",
        flush=True,
    )
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_bytes(b"")
    if not (VENV / "bin" / "python").exists():
        subprocess.run([python(), "-m", "venv", str(VENV)], check=True)
    # torch first, with its dependencies: what a GPU build needs beside it is not in the lock.
    torch = f"torch=={wanted['torch']}"
    pip([torch, "-c", LOCK.name], began, len(wanted), "torch")
    # Two packages are wanted for the files inside them; their dependencies are not (one compiles long).
    pip(["--no-deps", "-r", LOCK.name], began, len(wanted), "all other packages")
    pip(["--no-deps", "--no-build-isolation", "-e", "."], began, len(wanted), "this project")
    stamp.write_text(state(), encoding="utf-8")
    print(f"[{time.monotonic() - began:4.0f} s] install 100%", flush=True)


if __name__ == "__main__":
    main()
