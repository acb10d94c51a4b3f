"""What becomes of batches that memory cannot hold: spooled to disk, or dropped because the user said so.

The spool, in the order things happen:

- It begins when the budget is at its high mark, when the oldest batch has waited for `spool_after_s`, or when a
  former run left something in the file.
- From then on all that waits goes to the disk, oldest first, several batches per commit. After the commit the
  batches end as SPOOLED, and their messages are acknowledged. Nothing new goes to Kinesis directly, so that
  records are sent for the first time in the order they came.
- The oldest rows are read back into a share of the budget that is theirs alone, and sent like anything else: the
  sender's own gate and pacing say when. A row is deleted when each of its records is stored or set aside, so a
  crash sends no more than that share a second time.
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
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastkin._codec import DEAD, DRAIN, DROPPED, SPOOLED, Batch, Budget, CallbackSettler
from fastkin.delivery.spool_file import ENTRY_BYTES, Found, Put, Spool, row_size
from fastkin.errors import DataFormatError, LibraryError, RecordDropped, SpoolError
from fastkin.runtime.deadline import Deadline
from fastkin.runtime.dropped import quiet
from fastkin.runtime.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fastkin._codec import Lane
    from fastkin.delivery.sender import Sender
    from fastkin.delivery.spool_file import Row

_LOG = logging.getLogger("fastkin.spool")

Policy = Literal["pause", "spool", "drop_oldest", "drop_newest"]
T = TypeVar("T")

_TICK_S = 0.25  # how often to see whether something waits too long
_GROUP_S = 0.01  # between commits, so that they take several batches
_GROUP_BYTES = 4 << 20
_GROUP_BATCHES = 64
_GATHER_BYTES = 1 << 20  # of restored rows in one call: source and copy are both there for a moment
_RETRY_S = 2.0  # between attempts at a disk that takes nothing
_SAY_AGAIN_S = 300.0
_WARN_EVERY_S = 5.0
_CLOSE_S = 30.0  # for a close() that was given no deadline
_DOUBTED_MOST = 8  # rows of refused records beside which one more is read
_SHARE = 4  # the part of the budget that is kept for what comes back from the disk
_MOST_OF_BUDGET = 16  # a batch is at most this part of the budget


class _Loaded:
    """A row whose records are in memory."""

    __slots__ = ("cost", "keep", "pending", "records", "size")

    def __init__(self, records: int, size: int, cost: int) -> None:
        self.records = self.pending = records
        self.size = size
        self.cost = cost
        self.keep = False  # it stays in the file


class Rows:
    """What of the spool is in memory. The lane tells it how restored records end."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.settler = CallbackSettler(self._ended)
        self.loaded: dict[int, _Loaded] = {}
        self.ended: list[tuple[int, int, int]] = []  # (id, records, size): to be deleted
        self.held = 0  # memory that loaded and not yet deleted rows were counted with
        self.closed = False
        self.on_ended: Callable[[], None] = _nothing
        self._costs: dict[int, int] = {}

    def load(self, row: int, records: int, size: int, cost: int) -> None:
        self.loaded[row] = _Loaded(records, size, cost)
        self.held += cost

    def deleted(self, rows: list[tuple[int, int, int]]) -> None:
        for row, _, _ in rows:
            self.held -= self._costs.pop(row, 0)

    def _ended(self, row: int, count: int, *_: object) -> None:
        if self.closed:  # a batch that nobody sends any more is freed: its row stays
            return
        loaded = self.loaded[row]
        loaded.pending -= count
        if loaded.pending:
            return
        del self.loaded[row]
        if loaded.keep:
            self.held -= loaded.cost
            return
        self._costs[row] = loaded.cost
        self.ended.append((row, loaded.records, loaded.size))
        self.on_ended()


def _nothing() -> None:
    pass


def shares(max_bytes: int, max_records: int, policy: Policy) -> tuple[Budget, Rows | None]:
    """The budget of a lane, and the rows that come back from a spool if there is one."""
    if policy != "spool":
        return Budget(max_bytes, max_records), None
    back = Budget(max(1, max_bytes // _SHARE), max(1, max_records // _SHARE))
    return Budget(max(1, max_bytes - back.max_bytes), max(1, max_records - back.max_records)), Rows(back)


def batch_limit(max_batch_bytes: int, max_record_bytes: int, budget_bytes: int, policy: Policy) -> int:
    """The most bytes of a batch: whoever splits or gathers has source and copy for a moment, beside the budget.

    With a spool several must fit in the share for what comes back, and a batch is what the other policies drop.
    """
    part = _MOST_OF_BUDGET // 2 if policy == "pause" else _MOST_OF_BUDGET
    return min(max_batch_bytes, max(max_record_bytes, budget_bytes // part))


class Overflow:
    """One lane's policy for when memory is full. Stands between the flusher and the sender."""

    def __init__(
        self,
        lane: Lane,
        sender: Sender,
        budget: Budget,
        *,
        name: str,
        policy: Policy,
        on_settled: Callable[[], None],
        rows: Rows | None = None,
        path: str | Path | None = None,
        max_bytes: int = 0,
        after_s: float = 5.0,
        max_records: int = 500,
        max_batch_bytes: int = 5 << 20,
    ) -> None:
        """`rows` and `path` belong to policy "spool". `on_settled()` runs after batches were spooled or dropped."""
        self.policy = policy
        self.spool: Spool | None = None
        if policy == "spool":
            if path is None or rows is None:
                raise LibraryError("on_full 'spool' needs a path")
            self.spool = Spool(path, max_bytes=max_bytes)
        self.dropped = 0  # records, by the policy
        self.spooled_total = 0  # records that this run wrote to the disk
        self.damaged = 0  # rows set aside
        self.spooling = False
        self.broken: str | None = None  # why the file takes nothing
        self._proven = True  # no write failed since one went well: only then are calls cut short for the disk
        self.full = False  # max_bytes is reached
        self._lane = lane
        self._sender = sender
        self._budget = budget
        self._name = name
        self._on_settled = on_settled
        self._rows = rows if rows is not None else Rows(budget)
        self._rows.on_ended = self._news
        self._after_s = after_s
        self._max_records = max_records
        self._gather_bytes = min(_GATHER_BYTES, max_batch_bytes // 2)
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._worker: Worker | None = None
        self._task: asyncio.Task[None] | None = None
        self._opened = False
        self._opening = asyncio.Lock()
        self._stopping = False
        self._draining = False  # no more rows are read
        self._held: deque[Batch] = deque()  # withdrawn, not on the disk yet
        self._ready: deque[Batch] = deque()  # restored, not handed to the sender yet
        self._unread = 0  # rows that are on the disk only
        self._after = 0  # the last row that was read
        self._retry_at = 0.0
        self._room_at = 0.0  # when to see whether a full disk has room again
        self._said_at = -_SAY_AGAIN_S
        self._began_at = 0.0
        self._dropped_unsaid = 0
        self._warned_at = -_WARN_EVERY_S
        if self.spool is not None:
            sender.source = self._next
            sender.direct = self._direct

    # -- what the flusher and the owner call -----------------------------------------------------

    @property
    def idle(self) -> bool:
        """Nothing is on its way: see Flusher."""
        return self._sender.idle and not self.spooling

    def pump(self) -> None:
        """The lane has closed batches."""
        self._sender.pump()
        if self.spooling or self._budget.full:
            self.attend()

    def attend(self) -> None:
        """The budget may be full."""
        if self.spool is not None:
            if self.spooling or self._budget.full:
                self._wake.set()
        elif self._budget.full:
            self._drop()

    @property
    def attended(self) -> bool:
        """The spool's own turn will look at what waits in the sender and in here."""
        return self._task is not None and not self._task.done() and self.spooling and self.broken is None

    @property
    def writing(self) -> bool:
        """Batches are on their way to the disk, and the spool's own turn is at it, however long the disk takes."""
        return bool(self._held) and self._task is not None and not self._task.done()

    @property
    def holds(self) -> bool:
        """Batches are in here: taken from the sender and not on the disk yet, or read back and not taken yet."""
        return bool(self._held or self._ready)

    @property
    def safe(self) -> int:
        """Records in memory that are on the disk too."""
        return self._rows.budget.records if self.spool is not None else 0

    def stats(self) -> dict[str, Any]:
        spool = self.spool
        return {
            "spooled": self._lane.spooled,
            "spooled_ever": self.spooled_total,
            "spooling": self.spooling,
            "spool_rows": spool.rows if spool is not None else 0,
            "spool_bytes": spool.bytes if spool is not None else 0,
            "spool_bytes_limit": spool.max_bytes if spool is not None else 0,
            "spool_error": self.broken,
            "spool_damaged_rows": self.damaged,
        }

    async def start(self) -> None:
        """Open the spool, if there is one; trouble with it is logged and tried again."""
        if self.spool is None:
            return
        self._worker = Worker(
            f"fastkin[{self._name}].spool", f"pipeline={self._name} stage=spool", f"spool {self.spool.path}"
        )
        try:
            await self._open()
        except SpoolError as error:
            self._trouble(error)
        self._task = quiet(self._loop.create_task(self._run(), name=f"fastkin[{self._name}].spool"))

    @property
    def hangs(self) -> str | None:
        """The disk has not answered for a while, in words."""
        return self._worker.hangs if self._worker is not None else None

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The work in the background: what it raises is a bug."""
        return self._task

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
        if self._task is not None:
            await asyncio.wait([self._task], timeout=limit.left)
            if stuck := not self._task.done():
                # It waits for the disk, and only for that: what it was about to do did not happen.
                self._task.cancel()
                await asyncio.wait([self._task])
        if self.spool is None or self._worker is None:
            return
        self._lane.seal(DRAIN)
        waiting = [*self._held, *self._sender.unsent(), *self._ready]
        self._held.clear()
        self._ready.clear()
        waiting += self._sender.withdraw()
        waiting.sort(key=lambda batch: batch.born or self._loop.time())
        self._leave(waiting)
        if not stuck:
            try:
                async with asyncio.timeout_at(limit.at):
                    await self._write_rest(self.spool)
            except TimeoutError:
                stuck = True
            except SpoolError as error:
                _LOG.error("pipeline=%s stage=spool %s", self._name, error)
        self._rows.closed = True
        for batch in [batch for batch in self._held if batch.restored]:
            self._held.remove(batch)
            batch.finish(SPOOLED)  # its row stays
        if stuck:
            _LOG.error(
                "pipeline=%s stage=spool spool %s takes too long: %d records did not reach it in time and are not"
                " acknowledged; look after the disk, or raise shutdown_timeout_s",
                self._name, self.spool.path, sum(batch.user_records for batch in self._held),
            )  # fmt: skip
        clean = not stuck and not self._rows.loaded and not self._rows.ended
        self._worker.leave(partial(self.spool.close, clean=clean))
        try:
            async with asyncio.timeout_at(limit.at):
                await self._worker.run(_nothing)  # it was closed, unless the disk hangs
        except TimeoutError:
            pass  # then the thread does it whenever the disk answers, or the end of the process does
        self._worker.close()
        self._on_settled()

    async def _write_rest(self, spool: Spool) -> None:
        if not self._opened:
            await self._open()
        if self.broken is not None:
            await self._in_thread(spool.open)
        while self._held:
            await self._write(bounded=False)
        while self._rows.ended:
            await self._write()

    def unsaved(self) -> list[Batch]:
        """After close(): what the disk did not take, for the owner to fail or forget."""
        batches = list(self._held)
        self._held.clear()
        return batches

    def _leave(self, batches: list[Batch]) -> None:
        """Rows of which nothing has ended stay as they are; the others are written."""
        for batch in batches:
            rows = batch.rows()
            row, count = next(iter(rows.items()), (0, 0))
            loaded = self._rows.loaded.get(row)
            if len(rows) == 1 and loaded is not None and loaded.records == loaded.pending == count:
                loaded.keep = True
                batch.finish(SPOOLED)
            else:
                self._held.append(batch)

    # -- where the sender's batches come from ----------------------------------------------------

    def _next(self) -> Batch | None:
        if self._ready:
            batch = self._gathered()
            if not self._ready:
                self._wake.set()
            return batch
        return self._lane.take() if self._direct() else None

    def _gathered(self) -> Batch:
        """The oldest rows that were read, as one call: each may hold a single record."""
        picked = [self._ready.popleft()]
        records, size = len(picked[0]), picked[0].size
        while self._ready:
            records += len(self._ready[0])
            size += self._ready[0].size
            if records > self._max_records or size > self._gather_bytes:
                break
            picked.append(self._ready.popleft())
        batch, *rest = Batch.gather(picked)
        self._ready.extendleft(reversed(rest))
        return batch

    def _direct(self) -> bool:
        return not self.spooling or self.broken is not None

    def _news(self) -> None:
        self._wake.set()

    # -- the disk's side -------------------------------------------------------------------------

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        assert self._worker is not None
        return await self._worker.run(work, *args)

    async def _open(self) -> None:
        assert self.spool is not None
        async with self._opening:
            if not self._opened:
                await self._open_once(self.spool)

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
        self._unread = found.rows
        if not found.clean:
            # What had been read back when the former run died may have been stored.
            share = self._rows.budget.max_bytes
            self._sender.duplicates_possible += await self._in_thread(spool.first_records, share)
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
        assert self.spool is not None
        if not self._opened:
            await self._open()
        elif self.broken is not None and not self.spool.tight:
            await self._in_thread(self.spool.open)
        tight = await self._tight(self.spool)
        if not tight:
            self._judge()
        if self.spooling and not tight:
            now = self._loop.time()
            silent = self._proven and now - self._sender.answered_at > self._after_s
            self._held.extend(self._sender.withdraw(called_before=now - self._after_s if silent else None))
        worked = False
        if self._held or self._rows.ended:
            worked = await self._write()
        if not tight:
            self.broken = None
        if self._unread and not self._draining and not self._stopping:
            worked |= await self._read()
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
        if self._unread:
            why = "a former run left records in it"
        elif self._budget.full and self._sender.waiting:
            why = "memory is full"
        elif oldest is not None and now - oldest > self._after_s:
            why = f"records have waited for {now - oldest:.1f} s"
        if why:
            assert self.spool is not None
            self.spooling = True
            self._began_at = now
            _LOG.warning("pipeline=%s stage=spool spooling to %s: %s", self._name, self.spool.path, why)

    def _go_direct(self) -> None:
        """End to spool, if nothing is before what comes next."""
        if self._unread or self._ready or self._held or not self._sender.flowing:
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
        assert self.spool is not None
        group: list[Batch] = []
        puts: list[Put] = []
        total = 0
        for batch in self._held:
            put = Put(batch, batch.counts, len(batch), batch.user_records)
            if group and (total + row_size(put) > _GROUP_BYTES or len(group) == _GROUP_BATCHES):
                break
            if bounded and not self.spool.fits([*puts, put]):
                break
            group.append(batch)
            puts.append(put)
            total += row_size(put)
        ended = list(self._rows.ended)
        if not puts and not ended:
            self._is_full()
            return False
        ids = await self._in_thread(self.spool.write, puts, ended)
        del self._rows.ended[: len(ended)]
        self._rows.deleted(ended)
        if not group:
            return True
        self.full = False
        self._proven = True
        if self._said_at >= 0.0:
            _LOG.info("pipeline=%s stage=spool spool %s takes batches again", self._name, self.spool.path)
            self._said_at = -_SAY_AGAIN_S
        for batch in group:
            self._held.popleft()
            epoch, count, records = batch.epoch, len(batch), batch.user_records
            if not batch.restored:
                self.spooled_total += records
            batch.finish(SPOOLED)
            self._sender.forget(epoch, count)
        self._unread += len(ids)
        self._on_settled()
        return True

    def _is_full(self) -> None:
        """What waits has no room in max_bytes."""
        assert self.spool is not None
        if self.spool.rows == 0:
            # It never will have: let it be sent.
            self._sender.give_back(list(self._held))
            self._held.clear()
            self._sender.pump()
        elif not self.full:
            self.full = True
            _LOG.warning(
                "pipeline=%s stage=spool spool %s is full (spool_max_bytes = %d): intake pauses once memory is too",
                self._name, self.spool.path, self.spool.max_bytes,
            )  # fmt: skip

    async def _read(self) -> bool:
        """The oldest rows, as many as their share of the budget has room for."""
        assert self.spool is not None
        share = self._rows.budget.max_bytes
        room = share - self._rows.held
        alone = not self._rows.ended and self._only_doubted()
        places = self._rows.budget.max_records - self._rows.budget.records
        if (room <= 0 or places <= 0) and not alone:
            return False
        # a part of the room: until a row is restored its bytes are there twice
        most = min(room, max(share // _SHARE, room // 2))
        rows: list[Row] = await self._in_thread(
            lambda spool: spool.read(self._after, most_bytes=most, most_records=places, at_least_one=alone), self.spool
        )
        for row in rows:
            await self._restore(row)
            self._after = row.id
            self._unread -= 1
        if not rows:
            if alone and not self._rows.loaded:
                self._unread = 0  # the file has none: rows that vanished must not hold up what comes
            return False
        self._sender.pump()
        return True

    def _only_doubted(self) -> bool:
        """Nothing is read back, or only records that Kinesis refuses one by one, nobody knows for whose fault.

        The next row may tell: if Kinesis stores it, the fault is theirs. A few rows may so be held beyond the share.
        """
        loaded = self._rows.loaded
        if not loaded:
            return True
        if len(loaded) > _DOUBTED_MOST:
            return False
        doubted = self._sender.rows_in_doubt()
        return all(doubted.get(row) == each.pending for row, each in loaded.items())

    async def _restore(self, row: Row) -> None:
        assert self.spool is not None
        fault = row.fault
        if fault is None:
            cost = row.size + row.entries * ENTRY_BYTES
            self._rows.load(row.id, row.records, row.size, cost)
            try:
                batch = self._lane.restore(row.body, row.counts, row.id)
            except BaseException as error:
                del self._rows.loaded[row.id]
                self._rows.held -= cost
                if not isinstance(error, DataFormatError):
                    raise
                fault = str(error)
            else:
                self._ready.append(batch)
                return
        await self._in_thread(self.spool.set_aside, row)  # else it is read again
        self.damaged += 1
        self._lane.settle_spooled(min(row.records, self._lane.spooled), DEAD)
        _LOG.error(
            "pipeline=%s stage=spool spool %s: batch %d with %d records is damaged (%s); it stays in the file, the"
            " others go on: look after the disk, and after the row with `sqlite3`",
            self._name, self.spool.path, row.id, row.records, fault,
        )  # fmt: skip

    def _trouble(self, error: SpoolError) -> None:
        """The file takes nothing now: say so once, hold the data, send what Kinesis takes."""
        now = self._loop.time()
        self._retry_at = now + _RETRY_S
        self.broken = str(error)
        self._proven = False
        self._sender.give_back(list(self._held))
        self._held.clear()
        if now - self._said_at >= _SAY_AGAIN_S:
            self._said_at = now
            _LOG.error(
                "pipeline=%s stage=spool %s; nothing is lost: records wait in memory and intake pauses when it is full;"
                " trying again every %.0f s", self._name, error, _RETRY_S,
            )  # fmt: skip
        self._sender.pump()

    def _unforeseen(self, error: Exception) -> None:
        assert self.spool is not None
        self._loop.call_exception_handler(
            {"message": f"fastkin[{self._name}]: the spool failed", "exception": error, "task": self._task}
        )
        self._trouble(
            SpoolError(self.spool.path, f"unforeseen: {type(error).__name__}: {error}", "this is a bug: report it")
        )

    # -- dropping --------------------------------------------------------------------------------

    def _drop(self) -> None:
        """Make room by the user's own rule: whole batches, counted, acknowledged."""
        self._lane.seal(DRAIN)
        waiting = deque(self._sender.withdraw(alone=False))
        dropped = 0
        error = RecordDropped(f"memory was full and on_full is {self.policy!r}")
        while waiting and self._budget.full:  # also when what comes next is larger than what is free at the low mark
            batch = waiting.popleft() if self.policy == "drop_oldest" else waiting.pop()
            epoch, count = batch.epoch, len(batch)
            dropped += batch.user_records
            batch.finish(DROPPED, error)
            self._sender.forget(epoch, count)
        if waiting:
            self._sender.give_back(list(waiting))
        if dropped:
            self._say_dropped(dropped)
        if dropped or not self._budget.full:  # to close the batch may have made room: who waits for it must hear so
            self._on_settled()
        self._sender.pump()

    def _say_dropped(self, dropped: int) -> None:
        self.dropped += dropped
        self._dropped_unsaid += dropped
        now = self._loop.time()
        if now - self._warned_at >= _WARN_EVERY_S:
            _LOG.warning(
                "pipeline=%s stage=batch memory is full: %d records dropped (on_full = %s)",
                self._name, self._dropped_unsaid, self.policy,
            )  # fmt: skip
            self._warned_at = now
            self._dropped_unsaid = 0
