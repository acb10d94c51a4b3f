"""A thread for calls that may never return: a disk may hang, and somebody else may hold a lock for ever.

The executors of asyncio and concurrent.futures will not do: the interpreter waits for their threads when it exits. This
thread is a daemon, and whoever awaits a call may leave it behind.

A disk that hangs makes no call fail, so what waits for it would stand still without a word. A worker that is told the
name of its place says that the place does not answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import weakref
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_LOG = logging.getLogger("fastkin.disk")
T = TypeVar("T")

HANGS_S = 10.0


# One call after the other, because a file has one state: two threads in one SQLite connection, or two that rotate one
# file, would need locks of their own.
class Worker:
    """One thread, one call after the other. It starts with the first call, and ends after close() or with its owner."""

    def __init__(self, name: str, where: str = "", place: str = "") -> None:
        """`where` (pipeline and stage) and `place` are for the line that says that it does not answer; without a place
        nothing is said."""
        self._name = name
        self._where = where
        self._place = place
        self.hangs: str | None = None  # what has not answered, in words
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._started = False
        # An owner that is dropped without close() would leave its thread waiting for jobs for ever.
        self._end = weakref.finalize(self, self._jobs.put, None)

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """What `work(*args)` returns or raises. Cancelled: a call that has not begun is not made."""
        loop = asyncio.get_running_loop()
        job = _Job(work, args, loop)
        assert job.future is not None
        self._put(job)
        began = loop.time()
        timer = loop.call_later(HANGS_S, self._say_hangs)
        try:
            result: T = await job.future
        finally:
            timer.cancel()
            if job.future.done() and not job.future.cancelled():
                self._say_answers(loop.time() - began)
        return result

    def _say_hangs(self) -> None:
        if self.hangs is not None or not self._place:
            return  # one call waits behind another
        self.hangs = f"{self._place} has not answered for {HANGS_S:g} s"
        _LOG.error(
            "%s %s: what waits for it is kept and not acknowledged, and nothing goes on that comes after it; look after"
            " the disk", self._where, self.hangs,
        )  # fmt: skip

    def _say_answers(self, seconds: float) -> None:
        if self.hangs is not None:
            self.hangs = None
            _LOG.warning("%s %s answers again after %.0f s", self._where, self._place, seconds)

    def leave(self, work: Callable[..., object], *args: Any) -> None:
        """Make the call when its turn comes; nobody hears how it ended."""
        self._put(_Job(work, args, None))

    def close(self) -> None:
        """End the thread after the calls that it has; never waits."""
        self._end()

    def _put(self, job: _Job) -> None:
        if not self._started:
            self._started = True
            threading.Thread(target=_work, args=(self._jobs,), name=self._name, daemon=True).start()
        self._jobs.put(job)


class _Job:
    __slots__ = ("args", "future", "loop", "work")

    def __init__(self, work: Callable[..., Any], args: tuple[Any, ...], loop: asyncio.AbstractEventLoop | None) -> None:
        self.work = work
        self.args = args
        self.loop = loop
        self.future: asyncio.Future[Any] | None = None if loop is None else loop.create_future()

    def __call__(self) -> None:
        # Nobody waits for it any more. A write that was given up must not happen later, behind the back of what came
        # instead.
        if self.future is not None and self.future.cancelled():
            return
        result: Any = None
        error: BaseException | None = None
        try:
            result = self.work(*self.args)
        except BaseException as raised:  # noqa: BLE001 - it belongs to whoever awaits the call
            error = raised
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody awaits any more
                self.loop.call_soon_threadsafe(self._tell, result, error)

    def _tell(self, result: Any, error: BaseException | None) -> None:
        assert self.future is not None
        # Cancelled while the call was made: it cannot be undone, and its end is news to nobody.
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # what it returned is not kept until the next one comes
