"""The tasks of one run, and how one of them makes the whole run fail.

Nobody awaits them: an error in one would only be seen in its log line, and the run would look alive with a stage dead.
So the first error is kept in `failure`, which the engine watches.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastkin.runtime.dropped import quiet

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine


class Tasks:
    """Of one run; `name` is in the name of each."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._running: set[asyncio.Task[None]] = set()
        self.failure: asyncio.Future[None] = self._loop.create_future()  # raises what the first failed task raised

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = quiet(self._loop.create_task(coroutine, name=f"fastkin[{self._name}].{name}"))
        self._running.add(task)
        task.add_done_callback(self.ended)
        return task

    def ended(self, task: asyncio.Task[None]) -> None:
        """For tasks that others made: what they raise counts as well."""
        self._running.discard(task)
        if task.cancelled() or (error := task.exception()) is None or self.failure.done():
            return
        # What gets here is a bug or a wrong setting: the engine must not look alive while a stage is dead.
        self.failure.set_exception(error)

    def cancel(self) -> Awaitable[object]:
        """Cancel all; await the result for their ends."""
        for task in self._running:
            task.cancel()
        return asyncio.gather(*self._running, return_exceptions=True)

    def failed(self) -> str | None:
        """Why the run does nothing any more, or None."""
        if not self.failure.done() or self.failure.cancelled() or (error := self.failure.exception()) is None:
            return None
        return f"failed: {type(error).__name__}: {error}"
