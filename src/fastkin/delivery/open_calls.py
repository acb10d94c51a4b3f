"""Calls without an answer yet: a task each, with the batch that it carries.

A batch is either waiting or in one call, and its call owns it until it ends. However the call ends, it must be told
here, from the task's own callback: a task that is cancelled before its first step runs no line of its code, and its
batch would be in nobody's hands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine, Iterator

    from fastkin._codec import Batch


class _Open:
    """One call."""

    __slots__ = ("batch", "began", "cut")

    def __init__(self, batch: Batch, began: float) -> None:
        self.batch = batch
        self.began = began
        self.cut = False  # it was cancelled for want of an answer


class OpenCalls:
    """The calls in flight, oldest first. Times are the event loop's, in seconds."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop, ended: Callable[[Batch, bool, bool], None]) -> None:
        """`ended(batch, cancelled, cut)` runs after each call; `cancelled`: its batch has no outcome."""
        self._name = name
        self._loop = loop
        self._ended = ended
        self._calls: dict[asyncio.Task[None], _Open] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def start(self, call: Coroutine[None, None, None], batch: Batch, now: float) -> None:
        task = self._loop.create_task(call, name=f"fastkin[{self._name}].call")
        self._calls[task] = _Open(batch, now)
        # A callback and no `finally` in the call: see the head of this module.
        task.add_done_callback(self._done)

    def batches(self) -> Iterator[Batch]:
        return (call.batch for call in self._calls.values())

    @property
    def cutting(self) -> bool:
        """A call was cut short and has not ended yet."""
        return any(call.cut for call in self._calls.values())

    def cut_short(self, began_before: float) -> None:
        """Cancel what was made before that time, for want of an answer."""
        for task, call in self._calls.items():
            # What came back from the spool is on the disk already: to cut it short would save nothing.
            if call.began < began_before and not call.batch.restored:
                call.cut = True
                task.cancel()

    def tasks(self) -> list[asyncio.Task[None]]:
        """To be cancelled at the end, and waited for."""
        return list(self._calls)

    def _done(self, task: asyncio.Task[None]) -> None:
        call = self._calls.pop(task)
        # A cancelled task has no exception to ask for: it raises.
        if not task.cancelled() and (error := task.exception()) is not None:
            # Nothing may fail here. What does is a bug, and hiding it would lose data quietly.
            self._loop.call_exception_handler(
                {"message": f"fastkin[{self._name}]: the sender failed", "exception": error, "task": task}
            )
        self._ended(call.batch, task.cancelled(), call.cut)
