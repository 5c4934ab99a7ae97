"""A language model served on this machine: SmolLM2-135M from its package, behind `transformers serve`.

The paper's setting is a far larger model. Any OpenAI-compatible server takes this one's place, say
`vllm serve Qwen/Qwen3-30B-A3B`, with ``synthesis.server: environment``.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai

from ggsm_core.progress import Progress

MODEL = "SmolLM2-135M-Instruct"
"""The folder that is served, and the name that requests give."""
LOADING = 180.0
"""Seconds until a server must answer; loading takes about ten."""
STOPPING = 10.0
SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD", "SALT")
"""Parts of the names of variables that the server has no business with."""


class NoServer(ValueError):
    """The local server did not come up."""


def prepare(folder: Path) -> None:
    """Write model and tokenizer into ``folder / MODEL``, so that a request's temperature counts."""
    from ggsm_core.backbone import smollm2

    model, tokenizer = smollm2("sdpa")
    model.generation_config.do_sample = True  # else the server ignores a request's temperature
    model.bfloat16().save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)


@contextmanager
def serve(folder: Path, log: Path, loading: float = LOADING) -> Iterator[openai.OpenAI]:
    """Serve ``folder / MODEL`` on a free loopback port while the context lasts; gives a client of it.

    ``log`` gets the server's output. Raises ``NoServer`` if it ends or says nothing within ``loading`` s.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A relative name: the model's name in requests, cache and reports is no path of this machine.
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", MODEL, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    kept = {name: value for name, value in os.environ.items() if not any(s in name for s in SECRETS)}
    with log.open("ab") as output:
        process = subprocess.Popen(command, cwd=folder, env=kept | offline, stdout=output, stderr=output)
    try:
        _await(process, port, loading, log)
        direct = openai.DefaultHttpxClient(trust_env=False)  # no proxy on the way to this machine
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", http_client=direct
        ) as client:
            yield client
    finally:
        process.terminate()
        try:
            process.wait(STOPPING)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await(process: subprocess.Popen[bytes], port: int, loading: float, log: Path) -> None:
    deadline = time.monotonic() + loading
    while time.monotonic() < deadline:
        if process.poll() is not None:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            raise NoServer(f"transformers serve ended with status {process.returncode}: {' / '.join(tail)}")
        asking = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
        try:
            asking.request("GET", "/health")
            if asking.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            asking.close()
        time.sleep(0.1)
    raise NoServer(f"transformers serve said nothing for {loading:.0f} s; the machine may be too busy")


def run(params: Any, inputs: dict[str, Path], out: Path, progress: Progress) -> None:
    """Stage ``llm``: the folder that ``serve`` serves."""
    progress(0, 1, f"unpacking {MODEL}")
    prepare(out)
    progress(1, 1, "unpacked")
