"""What memory cannot hold goes to the disk, and comes back when Kinesis takes it. In the order things happen:

- It begins when the budget is at its high mark, when the oldest batch has waited for `spool_after_s`, or when a
  former run left something in the file.
- From then on all that waits goes to the disk, oldest first, several batches per commit (spool_writer.py). After the
  commit the batches end as SPOOLED, and their messages are acknowledged. Nothing new goes to Kinesis directly, so that
  records are sent for the first time in the order they came.
- The oldest rows are read back into a share of the budget that is theirs alone (replay.py), and sent like anything
  else: the sender's own gate and pacing say when.
- It ends when every row has been handed to the sender and Kinesis takes what it gets.

When the file takes nothing (disk full, read-only, broken: spool_disk.py), nothing more is acknowledged by it; batches
stay in memory and go straight to Kinesis, as without a spool, until it works again.

Here is only the decision, and the turn that makes it again and again. The sender asks `direct()` and `next()`, and
knows nothing else of the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from fastkin._codec import DRAIN, Budget
from fastkin.delivery.backlog import Backlog, Parts
from fastkin.delivery.replay import Replay, ReplayWindow
from fastkin.delivery.spool_disk import SpoolDisk
from fastkin.delivery.spool_writer import SpoolWriter
from fastkin.errors import SpoolError
from fastkin.runtime.deadline import Deadline
from fastkin.runtime.dropped import quiet

if TYPE_CHECKING:
    from pathlib import Path

    from fastkin._codec import Batch
    from fastkin.delivery.spool_file import Spool

_LOG = logging.getLogger("fastkin.spool")

_TICK_S = 0.25  # how often to see whether something waits too long
_GROUP_S = 0.01  # between commits, so that they take several batches
_CLOSE_S = 30.0  # for a close() that was given no deadline
_SHARE = 4  # the part of the budget that is kept for what comes back from the disk


def split_budget(budget: Budget) -> tuple[Budget, ReplayWindow]:
    """What is left of it for the batcher, and the window for what comes back from the disk."""
    # With one budget for both, a full disk and a full memory would wait for each other: nothing can be read back, so
    # nothing can be deleted, so nothing can be written.
    back = Budget(max(1, budget.max_bytes // _SHARE), max(1, budget.max_records // _SHARE))
    batcher = Budget(max(1, budget.max_bytes - back.max_bytes), max(1, budget.max_records - back.max_records))
    return batcher, ReplayWindow(back)


class SpoolBacklog(Backlog):
    """`spool`. Its turns are a task of their own."""

    def __init__(
        self,
        parts: Parts,
        *,
        window: ReplayWindow,
        path: str | Path,
        max_bytes: int,
        after_s: float,
        max_records: int,
        max_batch_bytes: int,
    ) -> None:
        super().__init__(parts)
        sender, name = parts.sender, parts.name
        self.window = window
        self._disk = SpoolDisk(path, max_bytes=max_bytes, name=name)
        self._replay = Replay(
            parts.batcher, sender, window, self._disk,
            name=name, most_records=max_records, most_bytes=max_batch_bytes, news=self._news,
        )  # fmt: skip
        self._writer = SpoolWriter(sender, self._disk, window, self._replay, name=name, on_settled=parts.on_settled)
        self._after_s = after_s
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._opening = asyncio.Lock()
        self._stopping = False
        self._draining = False  # no more rows are read
        self._began_at = 0.0  # when spooling began
        window.on_ended = self._news
        sender.source = self

    # -- what the flusher and the owner call -----------------------------------------------------

    def pump(self) -> None:
        """The batcher has closed batches."""
        self._sender.pump()
        self.attend()

    def attend(self) -> None:
        """The budget may be full."""
        # Otherwise the next tick is soon enough. This runs for every batch.
        if self.spooling or self._budget.full:
            self._wake.set()

    async def start(self) -> None:
        """Open the spool; trouble with it is logged and tried again."""
        self._disk.start()
        try:
            await self._open()
        except SpoolError as error:
            self._trouble(error)
        self.task = quiet(self._loop.create_task(self._run(), name=f"fastkin[{self._name}].spool"))

    def drain(self) -> None:
        """Read no more rows: the owner is about to stop."""
        # Rows that are read now would have to be written again at the end.
        self._draining = True
        if self.spooling:
            self._go_direct()

    # -- what the owner asks ---------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing is on its way: see Flusher."""
        return self._sender.idle and not self.spooling

    @property
    def attended(self) -> bool:
        """The spool's own turn will look at what waits in the sender and in here."""
        return self.task is not None and not self.task.done() and self.spooling and self.broken is None

    @property
    def writing(self) -> bool:
        """Batches are on their way to the disk, and the spool's own turn is at it, however long the disk takes."""
        return bool(self._writer.waiting) and self.task is not None and not self.task.done()

    @property
    def holds(self) -> bool:
        """Batches are in here: taken from the sender and not on the disk yet, or read back and not taken yet."""
        return bool(self._writer.waiting or self._replay.ready)

    @property
    def safe(self) -> int:
        """Records in memory that are on the disk too."""
        return self.window.budget.records

    @property
    def spool(self) -> Spool:
        return self._disk.spool

    @property
    def broken(self) -> str | None:
        return self._disk.broken

    @property
    def full(self) -> bool:
        return self._writer.full

    @property
    def spooled_total(self) -> int:
        return self._writer.spooled_total

    @property
    def damaged(self) -> int:
        return self._replay.damaged

    @property
    def hangs(self) -> str | None:
        return self._disk.hangs

    def stats(self) -> dict[str, Any]:
        spool = self.spool
        return super().stats() | {
            "spooled_ever": self.spooled_total,
            "spooling": self.spooling,
            "spool_rows": spool.rows,
            "spool_bytes": spool.bytes,
            "spool_bytes_limit": spool.max_bytes,
            "spool_error": self.broken,
            "spool_damaged_rows": self.damaged,
        }

    # -- where the sender's batches come from: its Source ------------------------------------------

    def next(self) -> Batch | None:
        # Older than anything in the batcher.
        if self._replay.ready:
            return self._replay.next()
        return self._batcher.take() if self.bypass_spool() else None

    def bypass_spool(self) -> bool:
        # With a broken disk order is given up, and not availability: rows that cannot be read wait until somebody
        # mends it, and what comes meanwhile goes to Kinesis if it can.
        return not self.spooling or self.broken is not None

    # -- the turn --------------------------------------------------------------------------------

    def _news(self) -> None:
        self._wake.set()

    async def _run(self) -> None:
        while not self._stopping:
            # Before the look: what happens while it is under way wakes the next one.
            self._wake.clear()
            worked = False
            if self._disk.may_be_tried:
                try:
                    worked = await self._turn()
                except SpoolError as error:
                    self._trouble(error)
                except Exception as error:  # noqa: BLE001 - a bug: the spool must not stand still without a word
                    self._unforeseen(error)
            # A short wait after work, so that the next commit takes several batches; a long one when there was none.
            if not self._stopping:
                if worked:
                    await asyncio.sleep(_GROUP_S)
                else:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_TICK_S):
                            await self._wake.wait()

    async def _turn(self) -> bool:
        """One look at what is to be done: collect, write, read. False: nothing was."""
        disk = self._disk
        if not disk.opened:
            await self._open()
        else:
            await disk.mend()
        full = await disk.full()
        if not full:
            self._judge()
        if self.spooling and not full:
            now = self._loop.time()
            # A call without an answer holds its batches in memory. It is cut short for the disk, but not for one that
            # may fail: then its records would be sent twice for nothing.
            silent = disk.proven and now - self._sender.answered_at > self._after_s
            called_before = now - self._after_s if silent else None
            self._writer.waiting.extend(self._sender.withdraw(called_before=called_before))
        worked = False
        if self._writer.waiting or self.window.ended:
            worked = await self._writer.write()
        # It went through: the file works. A full disk has not shown that.
        if not full:
            disk.broken = None
        if self._replay.unread and not self._draining and not self._stopping:
            worked |= await self._replay.read()
        return worked

    async def _open(self) -> None:
        # The turn, the start and the end may come here at the same time. Rows of a former run are counted once.
        async with self._opening:
            if not self._disk.opened:
                await self._replay.adopt(await self._disk.open())

    def _judge(self) -> None:
        """Begin to spool, or end it."""
        if self.spooling:
            self._go_direct()
            return
        now = self._loop.time()
        why = ""
        oldest = self._sender.oldest
        # What is new must not pass what a former run left: it is older.
        if self._replay.unread:
            why = "a former run left records in it"
        elif self._budget.full and self._sender.waiting:
            why = "memory is full"
        elif oldest is not None and now - oldest > self._after_s:
            why = f"records have waited for {now - oldest:.1f} s"
        if why:
            self.spooling = True
            self._began_at = now
            _LOG.warning("pipeline=%s stage=spool spooling to %s: %s", self._name, self.spool.path, why)

    def _go_direct(self) -> None:
        """End to spool, if nothing is before what comes next."""
        # What comes next would pass these.
        if self._replay.unread or self._replay.ready or self._writer.waiting or not self._sender.flowing:
            return
        oldest = self._sender.oldest
        # It was handed over, and Kinesis does not take it. An endpoint that hangs would else see new records pass the
        # older ones, and the log would say every half second that the outage has ended.
        if oldest is not None and (
            self._sender.answered_at < self._began_at or self._loop.time() - oldest > self._after_s
        ):
            return
        self.spooling: bool = False
        _LOG.info(
            "pipeline=%s stage=spool all of the spool is on its way after %.1f s: sending directly again",
            self._name, self._loop.time() - self._began_at,
        )  # fmt: skip
        self._sender.pump()

    def _trouble(self, error: SpoolError) -> None:
        """The file takes nothing now: hold the data, send what Kinesis takes."""
        self._disk.failed(error)
        self._writer.requeue_front()

    def _unforeseen(self, error: Exception) -> None:
        self._loop.call_exception_handler(
            {"message": f"fastkin[{self._name}]: the spool failed", "exception": error, "task": self.task}
        )
        self._trouble(
            SpoolError(self.spool.path, f"unforeseen: {type(error).__name__}: {error}", "this is a bug: report it")
        )

    # -- the end ---------------------------------------------------------------------------------

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
        if not self._disk.started:
            return
        self._collect_rest()
        # After a disk that hangs nothing more is asked of it: the thread still waits.
        if not stuck:
            stuck = not await self._write_rest(limit)
        # From here on freed batches do not count as ended, or their rows would be deleted.
        self.window.closed = True
        self._writer.leave_rows()
        if stuck:
            _LOG.error(
                "pipeline=%s stage=spool spool %s takes too long: %d records did not reach it in time and are not"
                " acknowledged; look after the disk, or raise shutdown_timeout_s",
                self._name, self.spool.path, sum(batch.user_records for batch in self._writer.waiting),
            )  # fmt: skip
        await self._disk.close(limit, clean=not stuck and not self.window.loaded and not self.window.ended)
        self._on_settled()

    def _collect_rest(self) -> None:
        """All that is in memory and has not ended, oldest first."""
        self._batcher.close_batch(DRAIN)
        rest = [*self._writer.take_rest(), *self._sender.unsent(), *self._replay.ready]
        self._replay.ready.clear()
        rest += self._sender.withdraw()
        # What was read back and never handed over was taken_at at no time: it is as old as now.
        rest.sort(key=lambda batch: batch.taken_at or self._loop.time())
        self._writer.keep(rest)

    async def _write_rest(self, limit: Deadline) -> bool:
        """False: the disk takes too long."""
        try:
            async with asyncio.timeout_at(limit.at):
                if not self._disk.opened:
                    await self._open()
                if self.broken is not None:
                    await self._disk.run(self.spool.open)
                await self._writer.write_rest()
        except TimeoutError:
            return False
        except SpoolError as error:
            _LOG.error("pipeline=%s stage=spool %s", self._name, error)
        return True

    def unsaved(self) -> list[Batch]:
        """After close(): what the disk did not take, for the owner to fail or forget."""
        return self._writer.take_rest()
