"""When each message was published, in memory that publisher and endpoint share: a double per message."""

from __future__ import annotations

import mmap
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastkin.bench.plan import Plan

_ITEM = 8


def make(plan: Plan, block: int) -> None:
    """A file of zeros, room for every message of the plan."""
    first, count = plan.runs(block)[-1]
    with plan.path("times").open("wb") as file:
        file.truncate((first + max(count, 1)) * _ITEM)


def share(plan: Plan) -> memoryview[float]:
    """The times, to read and to write; the clock is CLOCK_MONOTONIC, one for the machine."""
    with plan.path("times").open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 0)).cast("d")


def mark(times: memoryview[float], first: int, count: int, now: float) -> None:
    """Messages were published; the first time counts, for a repetition is not another message."""
    if times[first] and times[first + count - 1]:
        return
    if count == 1:
        times[first] = now
    else:
        times[first : first + count] = array("d", [now]) * count
