"""One budget of time for everything that a shutdown has to wait for.

Each part gets what is left of it. If each had a time of its own, their sum would be longer than the time that the user
set, and whoever stops the process would kill it before its end.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable

_LOG = logging.getLogger("fastkin.engine")
T = TypeVar("T")


# Each part of a shutdown gets what is left, and not a time of its own: the sum is what the user was promised.
class Deadline:
    """A moment, and waits that end with it at the latest: what is not done by then is cancelled and left behind."""

    def __init__(self, seconds: float, name: str) -> None:
        """`name` is that of the log lines."""
        self._loop = asyncio.get_running_loop()
        self._name = name
        self.at: float = self._loop.time() + seconds

    @property
    def left(self) -> float:
        return max(0.0, self.at - self._loop.time())

    def until(self, *, before: float = 0.0) -> Deadline:
        """An earlier one, so that something is left for what comes after."""
        other = Deadline(0.0, self._name)
        other.at = max(self._loop.time(), self.at - before)
        return other

    async def wait(self, work: Awaitable[T], what: str) -> T | None:
        """What `work` returns or raises; None when it was left behind, which is told.

        It gets a turn of the loop also when no time is left, so that what needs no waiting is done all the same.
        """
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait([task], timeout=max(self.left, 0.001))
        except asyncio.CancelledError:
            task.cancel()
            raise
        if task.done():
            return task.result()
        task.cancel()
        task.add_done_callback(_forget)
        _LOG.warning("pipeline=%s stage=engine %s did not end in time and is left behind", self._name, what)
        return None


def _forget(task: asyncio.Future[Any]) -> None:
    """Nobody waits for it: what it raises is not told as lost."""
    if not task.cancelled():
        task.exception()
