"""Files of records at work: data is written to a part and synced, and a part that is large or old enough is finished.

    put()       waits for the next sync; what comes while one is under way shares the next
    _finishing  makes the finished file of a part that is closed, in a thread of its own: to compress takes a while
    uploader    takes finished files to S3, if that is wanted

Nothing here is given up: what fails is said once a minute and tried again, and `trouble` tells it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from fastkin.errors import Action, KinesisError
from fastkin.files import naming
from fastkin.files.directory import UPLOAD, Directory
from fastkin.runtime.worker import Worker
from fastkin.status.instruments import FileCounters
from fastkin.status.logs import Repeats

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typing_extensions import Buffer

    from fastkin.files.part import Part
    from fastkin.files.upload import Uploader

_LOG = logging.getLogger("fastkin.files")

_AGAIN_S = 5.0
# For parts that nobody writes any more: soon after the start, for who was here before a reload lets go of his only now;
# then now and then, for others may die.
_LOOK_S = (1.0, 60.0)
_SAY_EVERY_S = 60.0


class Limits(NamedTuple):
    """When a file is finished: whatever comes first."""

    interval_s: float  # since its first record
    max_bytes: int  # before compression; one write may pass it


class Files:
    """One pipeline's files. Made anywhere; open() needs the running loop."""

    def __init__(
        self, directory: Directory, limits: Limits, *, name: str, gzip: bool, uploader: Uploader | None
    ) -> None:
        """`name` of the pipeline: for log lines, and in the names of files."""
        self.directory = directory
        self.limits = limits
        self.name = name
        self.gzip = gzip
        self.counters: FileCounters = FileCounters()
        self.uploader = uploader
        place = f"directory {directory.path}"
        self.disk: Worker = Worker(f"fastkin[{name}].files", f"pipeline={name} stage=send", place)
        self._press = Worker(f"fastkin[{name}].finish", f"pipeline={name} stage=send", place)
        self._streams: list[Stream] = []
        self._closed: deque[Part] = deque()  # to be finished
        self._wake = asyncio.Event()
        self._progress = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._looks: asyncio.Task[None] | None = None
        self._strange: set[Path] = set()  # what was told of
        self._lines: Repeats | None = None
        self._finish_error: str | None = None
        self._opened = False

    def stream(self, prefix: str, extension: str) -> Stream:
        """Files with a prefix of their own."""
        made = Stream(self, prefix, extension)
        self._streams.append(made)
        return made

    async def open(self) -> None:
        """Make the directory, and take over what a former run left. Again: nothing. KinesisError."""
        if self._opened:
            return
        await self.disk.run(self.directory.open)
        if self._opened:
            return  # two opened it at once
        self._opened = True
        self._lines = Repeats(_LOG, asyncio.get_running_loop().call_later, most=1, per_s=_SAY_EVERY_S)
        self._take_left("a former run")
        self._task = asyncio.create_task(self._finishing(), name=f"fastkin[{self.name}].files")
        self._looks = asyncio.create_task(self._looking(), name=f"fastkin[{self.name}].left")
        if self.uploader is not None:
            self.uploader.start(self)
        elif waiting := await self._press.run(self.directory.waiting):
            _LOG.warning(
                "pipeline=%s stage=send %d finished files wait in %s, and nobody takes them to S3: set s3 again, or"
                " move them away", self.name, len(waiting), self.directory.path / UPLOAD,
            )  # fmt: skip

    def _take_left(self, who: str) -> None:
        for path in self.directory.strange:
            if path not in self._strange:
                self._strange.add(path)
                _LOG.error(
                    "pipeline=%s stage=send %s is no part of a file that fastkin can read: it is left as it is; look"
                    " what is in it, and move it away", self.name, path,
                )  # fmt: skip
        for path, why in self.directory.unread.items():
            if path not in self._strange:
                self._strange.add(path)
                _LOG.error(
                    "pipeline=%s stage=send %s cannot be read: %s; it is kept and tried again every minute; look after"
                    " the disk, and see that this user may read it", self.name, path, why,
                )  # fmt: skip
        left, self.directory.left = self.directory.left, []
        if left:
            _LOG.warning(
                "pipeline=%s stage=send %s left %d unfinished files in %s: they are finished now",
                self.name, who, len(left), self.directory.path,
            )  # fmt: skip
            self.close_part(*left)

    async def _looking(self) -> None:
        wait_s, often_s = _LOOK_S
        while True:
            await asyncio.sleep(wait_s)
            wait_s = often_s
            try:
                await self._press.run(self.directory.look_for_left)
            except Exception as error:  # noqa: BLE001 - the next look may find it mended
                assert self._lines is not None
                self._lines.say(logging.ERROR, "look", "pipeline=%s stage=send %s", self.name, error)
            self._take_left("a process that has ended")

    def close_part(self, *parts: Part) -> None:
        """Nothing more is written to them."""
        self._closed.extend(parts)
        self._wake.set()

    async def in_thread(self, work: Callable[..., object], *args: object) -> object:
        """A call to the disk that is not on the way of a record."""
        return await self._press.run(work, *args)

    def leave(self, work: Callable[..., object], *args: object) -> None:
        """The same behind what the thread has to do; nobody waits for it."""
        self._press.leave(work, *args)

    @property
    def hangs(self) -> str | None:
        """The disk has not answered for a while, in words."""
        return self.disk.hangs or self._press.hangs

    @property
    def trouble(self) -> str | None:
        """What keeps files from being finished or taken to S3, in words."""
        return self._finish_error or (self.uploader.trouble if self.uploader is not None else None)

    def progress(self) -> None:
        """Something has ended that finish() may wait for."""
        self._progress.set()

    # -- finishing -----------------------------------------------------------------------------

    async def _finishing(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._closed:
                # One that cannot be finished keeps nobody from those behind it.
                finished = [await self._finish_first() for _ in range(len(self._closed))]
                if all(finished):
                    self._finish_error = None
                elif not any(finished):
                    await asyncio.sleep(_AGAIN_S)

    async def _finish_first(self) -> bool:
        part = self._closed[0]
        try:
            nbytes = await self._press.run(self.directory.finish, part)
        except Exception as error:  # noqa: BLE001 - a part that is given up is data lost: whatever it is, try again
            self._finish_error = why = str(error) or type(error).__name__
            assert self._lines is not None
            self._lines.say(
                logging.ERROR, "finish",
                "pipeline=%s stage=send %s: %d unfinished files are kept and tried again",
                self.name, why, len(self._closed),
            )  # fmt: skip
            self._closed.rotate(-1)
            return False
        self._closed.popleft()
        if part.damaged:
            at, lost = part.damaged[0][0], sum(each for _, each in part.damaged)
            _LOG.error(
                "pipeline=%s stage=send %s is damaged at offset %d: %d bytes in %d places cannot be read, and the"
                " others are in %s; it is kept: look after the disk, take from it what can be read, and move it away",
                self.name, part.path, at, lost, len(part.damaged), part.target,
            )  # fmt: skip
        if nbytes:
            self.counters.finished += 1
        if self.uploader is not None:
            self.uploader.look()
        self._progress.set()
        return True

    async def finish(self) -> None:
        """Return when all is finished and, with S3, uploaded, however long that takes."""
        if not self._opened:
            return
        for stream in self._streams:
            await stream.close()
        while self._closed or (self.uploader is not None and self.uploader.busy):
            self._progress.clear()
            await self._progress.wait()

    async def close(self) -> None:
        """End the work. What is not finished or uploaded stays, and the next run finds it."""
        for stream in self._streams:
            stream.stop()
        tasks = [task for task in (self._task, self._looks) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.uploader is not None:
            await self.uploader.close()
        if self._lines is not None:
            self._lines.close()
        left = len(self._closed) + self.counters.waiting
        if left and self._opened:
            _LOG.warning(
                "pipeline=%s stage=send %d files are not %s yet: they wait in %s for the next start",
                self.name, left, "finished" if self.uploader is None else "in S3", self.directory.path,
            )  # fmt: skip
        # Behind what the threads still do: a part is closed when nobody writes to it any more.
        for part in self._closed:
            self._press.leave(part.leave)
        self._press.leave(self.directory.leave_left)
        for worker in (self.disk, self._press):
            worker.close()


class _Put(NamedTuple):
    body: Buffer
    decode: Callable[[Buffer], tuple[int, bytes]]
    waiter: asyncio.Future[int]


class Stream:
    """What goes into the files of one prefix."""

    def __init__(self, files: Files, prefix: str, extension: str) -> None:
        self._files = files
        self._prefix = prefix
        self._extension = extension
        self._part: Part | None = None  # of the thread that writes
        self._retired: deque[Part] = deque()  # filled by the thread, emptied by the loop: never replaced
        self._pending: list[_Put] = []
        self._group: list[_Put] = []  # being written
        self._stopped = False
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timed: Part | None = None

    @property
    def place(self) -> str:
        """For a log line."""
        return f"{self._prefix}* in {self._files.directory.path}"

    async def put(self, body: Buffer, decode: Callable[[Buffer], tuple[int, bytes]]) -> int:
        """Return when it is synced: how many records `decode(body)` told. KinesisError: nothing of it is written."""
        if self._stopped:
            raise KinesisError(
                "FilesClosed",
                f"files {self.place} are closed: nothing is written any more; make a new client",
                action=Action.OPERATOR,
            )
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pending.append(_Put(body, decode, waiter))
        if self._task is None:
            self._task = asyncio.create_task(self._write(), name=f"fastkin[{self._files.name}].write")
        return await waiter

    async def _write(self) -> None:
        while self._pending:
            group = self._group = [put for put in self._pending if not put.waiter.done()]
            self._pending.clear()
            if not group:
                break
            try:
                await self._files.open()
                counts = await self._files.disk.run(self._append, group)
            except Exception as error:  # noqa: BLE001 - it belongs to who waits for the write
                self._fail(group, error)
            else:
                for put, count in zip(group, counts, strict=True):
                    if not put.waiter.done():
                        put.waiter.set_result(count)
            self._group = []
            self._after()
        self._task = None

    @staticmethod
    def _fail(group: list[_Put], error: Exception) -> None:
        if not isinstance(error, KinesisError):
            error = KinesisError(type(error).__name__, str(error), action=Action.OPERATOR)
        for put in group:
            if not put.waiter.done():
                put.waiter.set_exception(error)

    def _append(self, group: list[_Put]) -> list[int]:
        """In the thread that writes. One sync for all."""
        files = self._files
        told = [put.decode(put.body) for put in group]
        files.directory.room_for(sum(len(data) for _, data in told))
        part = self._part
        if part is None:
            began = time.time()
            when = datetime.fromtimestamp(began, UTC)
            target = naming.path_of(self._prefix, files.name, self._extension, when, gzip=files.gzip)
            part = self._part = files.directory.make(target, gzip=files.gzip, began=began)
        try:
            files.directory.append(part, [data for _, data in told])
        finally:
            if part.spoiled or part.nbytes >= files.limits.max_bytes:
                self._retire()
        return [count for count, _ in told]

    def _retire(self) -> None:
        if self._part is not None:
            self._retired.append(self._part)
            self._part = None

    def _after(self) -> None:
        """Back in the loop: hand over what is closed, and have the open part closed in time."""
        while self._retired:
            self._files.close_part(self._retired.popleft())
        part = self._part
        if part is not self._timed:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._timed = part
            if part is not None:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(self._files.limits.interval_s, self._due)

    def _due(self) -> None:
        self._timer = None
        part = self._timed
        # The thread that writes closes it: a write may be under way.
        task = asyncio.ensure_future(self._files.disk.run(self._retire_if, part))
        task.add_done_callback(self._closed)

    def _closed(self, task: asyncio.Future[None]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._after()

    def _retire_if(self, part: Part | None) -> None:
        if self._part is part:
            self._retire()

    async def close(self) -> None:
        """Have the open part finished now."""
        if self._task is not None:
            await asyncio.wait([self._task])
        await self._files.disk.run(self._retire)
        self._after()

    def stop(self) -> None:
        """No more timers and writes; who waits for one is cancelled. An open part is closed when its thread has
        nothing else to do."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None:
            self._task.cancel()
            self._task = None
        for put in (*self._group, *self._pending):
            put.waiter.cancel()
        self._files.disk.leave(self._leave)

    def _leave(self) -> None:
        for part in (*self._retired, *([] if self._part is None else [self._part])):
            part.leave()
        self._part = None
