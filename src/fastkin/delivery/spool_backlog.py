"""What memory cannot hold goes to the disk, and comes back when Kinesis takes it. In the order things happen:

- It begins when the budget is at its high mark, when the oldest batch has waited for `spool_after_s`, or when a
  former run left something in the file.
- From then on all that waits goes to the disk, oldest first, several batches per commit. After the commit the
  batches end as SPOOLED, and their messages are acknowledged. Nothing new goes to Kinesis directly, so that
  records are sent for the first time in the order they came.
- The oldest rows are read back into a share of the budget that is theirs alone (replay.py), and sent like anything
  else: the sender's own gate and pacing say when.
- It ends when every row has been handed to the sender and Kinesis takes what it gets.

When the file takes nothing (disk full, read-only, broken), nothing more is acknowledged by it; batches stay in
memory and go straight to Kinesis, as without a spool, until it works again. A full disk still gives back and
deletes what is in the file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastkin._codec import DRAIN, SPOOLED, Budget
from fastkin.delivery.backlog import Backlog
from fastkin.delivery.replay import Replay, ReplayWindow, nothing
from fastkin.delivery.spool_file import Found, Put, Spool, row_size
from fastkin.errors import SpoolError
from fastkin.runtime.deadline import Deadline
from fastkin.runtime.dropped import quiet
from fastkin.runtime.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from fastkin._codec import Batch, Lane
    from fastkin.delivery.sender import Sender

_LOG = logging.getLogger("fastkin.spool")
T = TypeVar("T")

_TICK_S = 0.25  # how often to see whether something waits too long
_GROUP_S = 0.01  # between commits, so that they take several batches
_GROUP_BYTES = 4 << 20
_GROUP_BATCHES = 64
_RETRY_S = 2.0  # between attempts at a disk that takes nothing
_SAY_AGAIN_S = 300.0
_CLOSE_S = 30.0  # for a close() that was given no deadline
_SHARE = 4  # the part of the budget that is kept for what comes back from the disk


def split_budget(budget: Budget) -> tuple[Budget, ReplayWindow]:
    """What is left of it for the lane, and the window for what comes back from the disk."""
    back = Budget(max(1, budget.max_bytes // _SHARE), max(1, budget.max_records // _SHARE))
    lane = Budget(max(1, budget.max_bytes - back.max_bytes), max(1, budget.max_records - back.max_records))
    return lane, ReplayWindow(back)


class SpoolBacklog(Backlog):
    """`spool`. Its turns are a task of their own, and every touch of the disk is made by a thread (Worker)."""

    def __init__(
        self,
        lane: Lane,
        sender: Sender,
        budget: Budget,
        *,
        name: str,
        on_settled: Callable[[], None],
        window: ReplayWindow,
        path: str | Path,
        max_bytes: int,
        after_s: float,
        max_records: int,
        max_batch_bytes: int,
    ) -> None:
        super().__init__(lane, sender, budget, name=name, on_settled=on_settled)
        self._spool = self.spool = Spool(path, max_bytes=max_bytes)
        self.window = window
        window.on_ended = self._news
        self._replay = Replay(
            lane, sender, window, name=name, most_records=max_records, most_bytes=max_batch_bytes, news=self._news
        )
        self._proven = True  # no write failed since one went well: only then are calls cut short for the disk
        self._after_s = after_s
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._worker: Worker | None = None
        self._opened = False
        self._opening = asyncio.Lock()
        self._stopping = False
        self._draining = False  # no more rows are read
        self._withdrawn: deque[Batch] = deque()  # from the sender, not on the disk yet
        self._retry_at = 0.0
        self._room_at = 0.0  # when to see whether a full disk has room again
        self._said_at = -_SAY_AGAIN_S
        self._began_at = 0.0
        sender.source = self

    # -- what the flusher and the owner call -----------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing is on its way: see Flusher."""
        return self._sender.idle and not self.spooling

    def pump(self) -> None:
        """The lane has closed batches."""
        self._sender.pump()
        self.attend()

    def attend(self) -> None:
        """The budget may be full."""
        if self.spooling or self._budget.full:
            self._wake.set()

    @property
    def attended(self) -> bool:
        """The spool's own turn will look at what waits in the sender and in here."""
        return self.task is not None and not self.task.done() and self.spooling and self.broken is None

    @property
    def writing(self) -> bool:
        """Batches are on their way to the disk, and the spool's own turn is at it, however long the disk takes."""
        return bool(self._withdrawn) and self.task is not None and not self.task.done()

    @property
    def holds(self) -> bool:
        """Batches are in here: taken from the sender and not on the disk yet, or read back and not taken yet."""
        return bool(self._withdrawn or self._replay.ready)

    @property
    def safe(self) -> int:
        """Records in memory that are on the disk too."""
        return self.window.budget.records

    def stats(self) -> dict[str, Any]:
        spool = self._spool
        return super().stats() | {
            "spooled_ever": self.spooled_total,
            "spooling": self.spooling,
            "spool_rows": spool.rows,
            "spool_bytes": spool.bytes,
            "spool_bytes_limit": spool.max_bytes,
            "spool_error": self.broken,
            "spool_damaged_rows": self.damaged,
        }

    async def start(self) -> None:
        """Open the spool; trouble with it is logged and tried again."""
        self._worker = Worker(
            f"fastkin[{self._name}].spool", f"pipeline={self._name} stage=spool", f"spool {self._spool.path}"
        )
        try:
            await self._open()
        except SpoolError as error:
            self._trouble(error)
        self.task = quiet(self._loop.create_task(self._run(), name=f"fastkin[{self._name}].spool"))

    @property
    def damaged(self) -> int:
        return self._replay.damaged

    @property
    def hangs(self) -> str | None:
        """The disk has not answered for a while, in words."""
        return self._worker.hangs if self._worker is not None else None

    def drain(self) -> None:
        """Read no more rows: the owner is about to stop."""
        self._draining = True
        if self.spooling:
            self._go_direct()

    async def close(self, limit: Deadline | None = None) -> None:
        """After the sender was closed: everything that did not end goes to the disk, as far as it takes it by then."""
        if limit is None:
            limit = Deadline(_CLOSE_S, self._name)
        self._stopping = True
        self._wake.set()
        stuck = False
        if self.task is not None:
            await asyncio.wait([self.task], timeout=limit.left)
            if stuck := not self.task.done():
                # It waits for the disk, and only for that: what it was about to do did not happen.
                self.task.cancel()
                await asyncio.wait([self.task])
        if self._worker is None:
            return
        self._lane.seal(DRAIN)
        waiting = [*self._withdrawn, *self._sender.unsent(), *self._replay.ready]
        self._withdrawn.clear()
        self._replay.ready.clear()
        waiting += self._sender.withdraw()
        waiting.sort(key=lambda batch: batch.born or self._loop.time())
        self._leave(waiting)
        if not stuck:
            try:
                async with asyncio.timeout_at(limit.at):
                    await self._write_rest()
            except TimeoutError:
                stuck = True
            except SpoolError as error:
                _LOG.error("pipeline=%s stage=spool %s", self._name, error)
        self.window.closed = True
        for batch in [batch for batch in self._withdrawn if batch.restored]:
            self._withdrawn.remove(batch)
            batch.finish(SPOOLED)  # its row stays
        if stuck:
            _LOG.error(
                "pipeline=%s stage=spool spool %s takes too long: %d records did not reach it in time and are not"
                " acknowledged; look after the disk, or raise shutdown_timeout_s",
                self._name, self._spool.path, sum(batch.user_records for batch in self._withdrawn),
            )  # fmt: skip
        clean = not stuck and not self.window.loaded and not self.window.ended
        self._worker.leave(partial(self._spool.close, clean=clean))
        try:
            async with asyncio.timeout_at(limit.at):
                await self._worker.run(nothing)  # it was closed, unless the disk hangs
        except TimeoutError:
            pass  # then the thread does it whenever the disk answers, or the end of the process does
        self._worker.close()
        self._on_settled()

    async def _write_rest(self) -> None:
        if not self._opened:
            await self._open()
        if self.broken is not None:
            await self._in_thread(self._spool.open)
        while self._withdrawn:
            await self._write(bounded=False)
        while self.window.ended:
            await self._write()

    def unsaved(self) -> list[Batch]:
        """After close(): what the disk did not take, for the owner to fail or forget."""
        batches = list(self._withdrawn)
        self._withdrawn.clear()
        return batches

    def _leave(self, batches: list[Batch]) -> None:
        """Rows of which nothing has ended stay as they are; the others are written."""
        for batch in batches:
            rows = batch.rows()
            row, count = next(iter(rows.items()), (0, 0))
            loaded = self.window.loaded.get(row)
            if len(rows) == 1 and loaded is not None and loaded.records == loaded.pending == count:
                loaded.keep = True
                batch.finish(SPOOLED)
            else:
                self._withdrawn.append(batch)

    # -- where the sender's batches come from ----------------------------------------------------

    def next(self) -> Batch | None:
        if self._replay.ready:
            return self._replay.next()
        return self._lane.take() if self.direct() else None

    def direct(self) -> bool:
        return not self.spooling or self.broken is not None

    def _news(self) -> None:
        self._wake.set()

    # -- the disk's side -------------------------------------------------------------------------

    def _in_thread(self, work: Callable[..., T], *args: Any) -> Awaitable[T]:
        assert self._worker is not None, "start() first"
        return self._worker.run(work, *args)

    async def _open(self) -> None:
        async with self._opening:
            if not self._opened:
                await self._open_once(self._spool)

    async def _open_once(self, spool: Spool) -> None:
        found: Found = await self._in_thread(spool.open)
        self._opened = True
        self.broken = None
        if found.damaged:
            _LOG.warning(
                "pipeline=%s stage=spool spool %s keeps %d damaged batches of former runs",
                self._name, spool.path, found.damaged,
            )  # fmt: skip
        if not found.rows:
            return
        self._lane.found(found.records)
        self._replay.unread = found.rows
        if not found.clean:
            # What had been read back when the former run died may have been stored.
            share = self.window.budget.max_bytes
            self._sender.counters.duplicates_possible += await self._in_thread(spool.first_records, share)
        _LOG.info(
            "pipeline=%s stage=spool spool %s holds %d records (%d bytes) of a former run: they go first",
            self._name, spool.path, found.records, found.bytes,
        )  # fmt: skip

    async def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            worked = False
            if self.broken is None or self._loop.time() >= self._retry_at:
                try:
                    worked = await self._turn()
                except SpoolError as error:
                    self._trouble(error)
                except Exception as error:  # noqa: BLE001 - a bug: the spool must not stand still without a word
                    self._unforeseen(error)
            if not self._stopping:
                if worked:
                    await asyncio.sleep(_GROUP_S)
                else:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_TICK_S):
                            await self._wake.wait()

    async def _turn(self) -> bool:
        """One look at what is to be done: collect, write, read. False: nothing was."""
        if not self._opened:
            await self._open()
        elif self.broken is not None and not self._spool.tight:
            await self._in_thread(self._spool.open)
        tight = await self._tight(self._spool)
        if not tight:
            self._judge()
        if self.spooling and not tight:
            now = self._loop.time()
            silent = self._proven and now - self._sender.answered_at > self._after_s
            self._withdrawn.extend(self._sender.withdraw(called_before=now - self._after_s if silent else None))
        worked = False
        if self._withdrawn or self.window.ended:
            worked = await self._write()
        if not tight:
            self.broken = None
        if self._replay.unread and not self._draining and not self._stopping:
            assert self._worker is not None
            worked |= await self._replay.read(self._spool, self._worker)
        return worked

    async def _tight(self, spool: Spool) -> bool:
        """The disk is full: nothing is written, what is in the file goes on to Kinesis."""
        if not spool.tight:
            return False
        now = self._loop.time()
        if now >= self._room_at:
            self._room_at = now + _RETRY_S
            if await self._in_thread(spool.regain):
                await self._in_thread(spool.open)  # what a failed commit may have left
                return False
        if self.broken is None:  # it was found so at the start
            raise spool.no_room()
        self._retry_at = 0.0
        return True

    def _judge(self) -> None:
        """Begin to spool, or end it."""
        if self.spooling:
            self._go_direct()
            return
        now = self._loop.time()
        why = ""
        oldest = self._sender.oldest
        if self._replay.unread:
            why = "a former run left records in it"
        elif self._budget.full and self._sender.waiting:
            why = "memory is full"
        elif oldest is not None and now - oldest > self._after_s:
            why = f"records have waited for {now - oldest:.1f} s"
        if why:
            self.spooling = True
            self._began_at = now
            _LOG.warning("pipeline=%s stage=spool spooling to %s: %s", self._name, self._spool.path, why)

    def _go_direct(self) -> None:
        """End to spool, if nothing is before what comes next."""
        if self._replay.unread or self._replay.ready or self._withdrawn or not self._sender.flowing:
            return
        oldest = self._sender.oldest
        if oldest is not None and (
            self._sender.answered_at < self._began_at or self._loop.time() - oldest > self._after_s
        ):
            return  # it was handed over, and Kinesis does not take it
        self.spooling = False
        _LOG.info(
            "pipeline=%s stage=spool all of the spool is on its way after %.1f s: sending directly again",
            self._name, self._loop.time() - self._began_at,
        )  # fmt: skip
        self._sender.pump()

    async def _write(self, *, bounded: bool = True) -> bool:
        """One commit: the oldest batches that wait, the rows that have ended."""
        group: list[Batch] = []
        puts: list[Put] = []
        total = 0
        for batch in self._withdrawn:
            put = Put(batch, batch.counts, len(batch), batch.user_records)
            if group and (total + row_size(put) > _GROUP_BYTES or len(group) == _GROUP_BATCHES):
                break
            if bounded and not self._spool.fits([*puts, put]):
                break
            group.append(batch)
            puts.append(put)
            total += row_size(put)
        ended = list(self.window.ended)
        if not puts and not ended:
            self._is_full()
            return False
        ids = await self._in_thread(self._spool.write, puts, ended)
        del self.window.ended[: len(ended)]
        self.window.deleted(ended)
        if not group:
            return True
        self.full = False
        self._proven = True
        if self._said_at >= 0.0:
            _LOG.info("pipeline=%s stage=spool spool %s takes batches again", self._name, self._spool.path)
            self._said_at = -_SAY_AGAIN_S
        for batch in group:
            self._withdrawn.popleft()
            epoch, count, records = batch.epoch, len(batch), batch.user_records
            if not batch.restored:
                self.spooled_total += records
            batch.finish(SPOOLED)
            self._sender.forget(epoch, count)
        self._replay.unread += len(ids)
        self._on_settled()
        return True

    def _is_full(self) -> None:
        """What waits has no room in max_bytes."""
        if self._spool.rows == 0:
            # It never will have: let it be sent.
            self._sender.give_back(list(self._withdrawn))
            self._withdrawn.clear()
            self._sender.pump()
        elif not self.full:
            self.full = True
            _LOG.warning(
                "pipeline=%s stage=spool spool %s is full (spool_max_bytes = %d): intake pauses once memory is too",
                self._name, self._spool.path, self._spool.max_bytes,
            )  # fmt: skip

    def _trouble(self, error: SpoolError) -> None:
        """The file takes nothing now: say so once, hold the data, send what Kinesis takes."""
        now = self._loop.time()
        self._retry_at = now + _RETRY_S
        self.broken = str(error)
        self._proven = False
        self._sender.give_back(list(self._withdrawn))
        self._withdrawn.clear()
        if now - self._said_at >= _SAY_AGAIN_S:
            self._said_at = now
            _LOG.error(
                "pipeline=%s stage=spool %s; nothing is lost: records wait in memory and intake pauses when it is full;"
                " trying again every %.0f s", self._name, error, _RETRY_S,
            )  # fmt: skip
        self._sender.pump()

    def _unforeseen(self, error: Exception) -> None:
        self._loop.call_exception_handler(
            {"message": f"fastkin[{self._name}]: the spool failed", "exception": error, "task": self.task}
        )
        self._trouble(
            SpoolError(self._spool.path, f"unforeseen: {type(error).__name__}: {error}", "this is a bug: report it")
        )
