"""Where the processes of a distributed launch meet, before and beside their process group."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from ggsm_core import provenance

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store as KeyValueStore

_held: list[KeyValueStore] = []  # what this process serves or has joined lasts as long as it does


class NoRendezvous(ValueError):
    """The processes of a distributed launch do not find each other."""


def gate() -> KeyValueStore:
    """The launcher's key-value store under a prefix of ours, once all processes are there.

    Raises ``NoRendezvous`` after GGSM_RENDEZVOUS_SECONDS, 60 unless set.
    """
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    seconds = provenance.positive("GGSM_RENDEZVOUS_SECONDS", 60)
    try:
        agents = _moved(seconds) if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None
        store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(seconds=seconds))))
    except (RuntimeError, ValueError, OSError) as problem:
        raise NoRendezvous(
            f"MASTER_ADDR, MASTER_PORT: process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} "
            f"did not meet the others at {address} within {seconds} s (GGSM_RENDEZVOUS_SECONDS); check the "
            f"address, the network and that so many were started ({problem})"
        ) from problem
    _held.append(store)
    # The agents' outlasts the first process, for which the others need not hurry.
    return PrefixStore(f"ggsm_runs {os.environ['MASTER_PORT']}", agents or store)


def _moved(seconds: int) -> KeyValueStore:
    """torchrun's store; the processes, and the process group after them, meet at another from here on.

    torchrun (2.13) hands processes that it starts again the store of those before, with the addresses of the
    dead in it. So the first process opens one for this attempt and leaves its port in torchrun's. A port that
    a dead one left answers nobody; the others ask until one does.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, wait, until = os.environ["MASTER_ADDR"], timedelta(seconds=seconds), time.monotonic() + seconds
    agents = TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=wait)
    if os.environ["RANK"] == "0":
        own = TCPStore(host, 0, is_master=True, timeout=wait, wait_for_workers=False, multi_tenant=True)
        _held.append(own)
        port = own.port
        agents.set("ggsm_port", str(port))
    else:
        while not _answers(host, port := int(agents.get("ggsm_port"))):
            if time.monotonic() > until:
                raise TimeoutError(f"the first process does not answer at {host}:{port}")
            time.sleep(0.1)
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    return agents


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True
