"""The spool's file behind its thread: is it open, does it take anything now, when is it tried again.

Every touch of the disk is made by a thread (Worker), for a disk may hang, and the loop must go on. One call is under
way at a time, so the file needs no lock of its own.

When the file takes nothing (read-only, broken, full), that is said once and then every five minutes, and it is tried
every two seconds. A full disk is a state of its own: it takes nothing, and still gives back and deletes what is in the
file. Nothing here knows a batch: what becomes of those is decided in spool_backlog.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastkin.delivery.spool_file import Found, Spool
from fastkin.runtime.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from fastkin.errors import SpoolError
    from fastkin.runtime.deadline import Deadline

_LOG = logging.getLogger("fastkin.spool")
T = TypeVar("T")

_RETRY_S = 2.0  # between attempts at a disk that takes nothing
_SAY_AGAIN_S = 300.0


class SpoolDisk:
    """One spool and its thread. Times are the event loop's, in seconds."""

    def __init__(self, path: str | Path, *, max_bytes: int, name: str) -> None:
        """`name` is that of the log lines. Nothing is touched here."""
        self.spool: Spool = Spool(path, max_bytes=max_bytes)
        self.opened: bool = False  # it was, once
        self.broken: str | None = None  # why the file takes nothing
        self.proven: bool = True  # no write failed since one went well
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._worker: Worker | None = None
        self._retry_at = 0.0
        self._room_at = 0.0  # when to see whether a full disk has room again
        self._said_at = -_SAY_AGAIN_S

    def start(self) -> None:
        self._worker = Worker(
            f"fastkin[{self._name}].spool", f"pipeline={self._name} stage=spool", f"spool {self.spool.path}"
        )

    @property
    def started(self) -> bool:
        return self._worker is not None

    @property
    def hangs(self) -> str | None:
        """The disk has not answered for a while, in words."""
        return self._worker.hangs if self._worker is not None else None

    def run(self, work: Callable[..., T], *args: Any) -> Awaitable[T]:
        """`work(*args)` in the thread."""
        assert self._worker is not None, "start() first"
        return self._worker.run(work, *args)

    async def open(self) -> Found:
        """For the first time. SpoolError."""
        found: Found = await self.run(self.spool.open)
        # From here on its rows are counted. To adopt them a second time would count them twice.
        self.opened = True
        self.broken = None
        # They stay in the file for whoever looks after it, and would else be forgotten.
        if found.damaged:
            _LOG.warning(
                "pipeline=%s stage=spool spool %s keeps %d damaged batches of former runs",
                self._name, self.spool.path, found.damaged,
            )  # fmt: skip
        return found

    async def mend(self) -> None:
        """Open it again after trouble: a failed commit may have left something. SpoolError."""
        if self.broken is not None and not self.spool.disk_full:
            await self.run(self.spool.open)

    async def full(self) -> bool:
        """The disk is full: nothing is written, what is in the file goes on to Kinesis. SpoolError."""
        if not self.spool.disk_full:
            return False
        now = self._loop.time()
        # To see whether there is room costs a write of the whole reserve. So not with each turn.
        if now >= self._room_at:
            self._room_at = now + _RETRY_S
            if await self.run(self.spool.regain):
                # A failed commit may have left something.
                await self.run(self.spool.open)
                return False
        # It was found so at the start: said as an error, once, like any other trouble.
        if self.broken is None:
            raise self.spool.no_room()
        # The file still gives back and deletes. So the turn goes on without a wait.
        self._retry_at = 0.0
        return True

    @property
    def may_be_tried(self) -> bool:
        """It works, or the wait after its last failure is over."""
        return self.broken is None or self._loop.time() >= self._retry_at

    def failed(self, error: SpoolError) -> None:
        """It takes nothing now: say so once in a while."""
        # The wait counts from the failure. A disk that fails slowly is not asked all the time.
        now = self._loop.time()
        self._retry_at = now + _RETRY_S
        self.broken = str(error)
        self.proven = False
        if now - self._said_at >= _SAY_AGAIN_S:
            self._said_at = now
            _LOG.error(
                "pipeline=%s stage=spool %s; nothing is lost: records wait in memory and intake pauses when it is full;"
                " trying again every %.0f s", self._name, error, _RETRY_S,
            )  # fmt: skip

    def took(self) -> None:
        """Batches were written."""
        self.proven = True
        if self._said_at >= 0.0:
            _LOG.info("pipeline=%s stage=spool spool %s takes batches again", self._name, self.spool.path)
            self._said_at = -_SAY_AGAIN_S

    async def close(self, limit: Deadline, *, clean: bool) -> None:
        """Close the file, and wait for that as long as there is time. `clean` is Spool.close()'s."""
        assert self._worker is not None, "start() first"
        # Left with the thread and not awaited: the caller may have no time, and the file must be closed all the same.
        self._worker.leave(partial(self.spool.close, clean=clean))
        # If the disk hangs, the thread closes it whenever the disk answers, or the end of the process does.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(limit.at):
                await self._worker.run(_nothing)
        self._worker.close()


def _nothing() -> None:
    pass
