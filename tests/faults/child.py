"""`fastkin` in a process that a test can bend: `python child.py run settings.toml`.

LEDGER_PATCH is a JSON object of what to change before the command starts:
    "set"      {"module:NAME": value}: constants, such as a backoff that a test cannot wait for
    "fsync_s"  every os.fsync takes that much longer: a slow disk
    "slow"     {"module:Class.method": seconds}: that much longer each time
    "lies"     a failed call ends its records as if they were handled: what the suite must notice
    "load"     modules: they belong to what the process takes before its memory is looked at
    "unknown"  a file: while it exists no host name resolves but those that are addresses
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1


def main() -> None:
    # A test run that is killed takes its services along: one that lived on would knock at ports of later cases.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    patch = json.loads(os.environ.pop("LEDGER_PATCH", "{}"))
    if "fsync_s" in patch:
        _slow_disk(float(patch["fsync_s"]))
    if "unknown" in patch:
        _no_names(Path(patch["unknown"]))
    for module in patch.get("load", ()):
        importlib.import_module(module)
    for place, value in patch.get("set", {}).items():
        module, _, name = place.partition(":")
        owner = importlib.import_module(module)
        getattr(owner, name)  # a constant that is gone must not be set in vain
        setattr(owner, name, value)
    for place, seconds in patch.get("slow", {}).items():
        module, _, path = place.partition(":")
        owner_name, _, name = path.partition(".")
        _slow(getattr(importlib.import_module(module), owner_name), name, float(seconds))
    if "lies" in patch:
        _lie()
    from fastkin.commands.cli import main as fastkin

    sys.argv[0] = "fastkin"
    fastkin()


def _lie() -> None:
    from fastkin._codec import DROPPED
    from fastkin.delivery.failed_calls import FailedCalls

    def failed(self: Any, batch: Any, error: Any, now: float) -> None:
        batch.finish(DROPPED)

    FailedCalls.failed = failed  # type: ignore[method-assign]


def _slow(owner: Any, name: str, seconds: float) -> None:
    real = getattr(owner, name)

    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return real(*args, **kwargs)

    setattr(owner, name, late)


def _slow_disk(seconds: float) -> None:
    real = os.fsync

    def fsync(fd: Any) -> None:
        time.sleep(seconds)
        real(fd)

    os.fsync = fsync


def _no_names(path: Path) -> None:
    """uvloop asks the C library; asyncio's own loop asks `socket`, which can be told to fail."""
    import fastkin.commands.run as run

    run.loop_factory = lambda: None
    real = socket.getaddrinfo

    def getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        if path.exists() and isinstance(host, str) and not host.replace(".", "").isdigit():
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return real(host, *args, **kwargs)

    socket.getaddrinfo = getaddrinfo


if __name__ == "__main__":
    main()
