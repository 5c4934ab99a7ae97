"""A real HTTP server on loopback that speaks chat completions, or misbehaves as told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai

KEY = "a-key-that-nobody-may-see"
PROMPT, COMPLETION = 50, 10
"""Tokens that the server counts for every answer."""


@dataclass
class Act:
    """What to do with one request."""

    text: str = '{"word": "yes"}'
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0
    finish: str = "stop"
    body: bytes | None = None  # instead of a completion
    torn: bool = False  # close in the middle
    usage: bool = True


@dataclass
class Server:
    """The requests that came, and how many tokens were charged for."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    authorisations: list[str] = field(default_factory=list)
    charged: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=KEY)


@contextmanager
def serving(act: Callable[[int, dict[str, Any]], Act]) -> Iterator[Server]:
    """``act(number of the request from 0, its body)`` decides what happens to each."""
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with server.lock:
                number = len(server.requests)
                server.requests.append(body)
                server.authorisations.append(self.headers["authorization"])
            told = act(number, body)
            time.sleep(told.wait)
            content = told.body if told.body is not None else completion(told, body)
            if told.status == 200:
                with server.lock:
                    server.charged += PROMPT + COMPLETION
            try:
                self.send_response(told.status)
                for name, value in {"content-type": "application/json", **told.headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if told.torn else content)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client gave up waiting
            self.close_connection = told.torn or told.status != 200

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    server.url = f"http://127.0.0.1:{httpd.server_address[1]}/v1"
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def completion(told: Act, body: dict[str, Any]) -> bytes:
    answer: dict[str, Any] = {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [
            {
                "index": 0,
                "finish_reason": told.finish,
                "message": {"role": "assistant", "content": told.text},
            }
        ],
    }
    if told.usage:
        answer["usage"] = {
            "prompt_tokens": PROMPT,
            "completion_tokens": COMPLETION,
            "total_tokens": PROMPT + COMPLETION,
        }
    return json.dumps(answer).encode()
