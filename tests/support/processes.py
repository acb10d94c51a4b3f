"""A test that starts a process says so: by the mark `process`, or by a fixture that asks for the fixture `process`.

`make unit` leaves these tests out. A list of them kept by hand would soon be wrong, so the interpreter itself is asked:
it tells its audit hooks of each process before it starts one, and where the mark is missing the test fails, in every
run and not only in `make unit`.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

# subprocess and asyncio tell the first, multiprocessing forks
_STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"})
_unmarked = ""


def watch(item: pytest.Item | None) -> None:
    """From now on this test runs; None when it has ended."""
    global _unmarked
    _unmarked = item.nodeid if item is not None and item.get_closest_marker("process") is None else ""


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if _unmarked and event in _STARTS:
        pytest.fail(
            f"{_unmarked} starts a process ({event} {arguments[:1]}) and does not say so: mark it with "
            "@pytest.mark.process, or let the fixture that starts it ask for the fixture `process`"
        )


sys.addaudithook(_hear)  # for good: an interpreter never lets go of a hook
