"""Brings back what is in the spool: the oldest rows, in order, into a share of the budget that is theirs alone.

With one budget for both sides a full disk and a full memory would wait for each other. Memory that is full of new
records has no room for a row. A row that is not read back is never sent, so it is never deleted. And a full disk takes
none of the new records off memory.

A row stays in the file until each of its records is stored or set aside. So a crash sends no more than that share a
second time, and nobody but `ReplayWindow` needs to know which rows are in memory.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from fastkin._codec import DEAD, Batch, Budget, CallbackSettler
from fastkin.delivery.spool_file import ENTRY_BYTES
from fastkin.errors import DataFormatError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin._codec import Batcher
    from fastkin.delivery.sender import Sender
    from fastkin.delivery.spool_disk import SpoolDisk
    from fastkin.delivery.spool_file import Found, Row

_LOG = logging.getLogger("fastkin.spool")

_GATHER_BYTES = 1 << 20  # of restored rows in one call: source and copy are both there for a moment
_DOUBTED_MOST = 8  # rows of refused records beside which one more is read
_SHARE = 4  # the part of the window that one read may fill


class _Loaded:
    """A row whose records are in memory."""

    __slots__ = ("cost", "keep", "pending", "records", "size")

    def __init__(self, records: int, size: int, cost: int) -> None:
        self.records = self.pending = records
        self.size = size
        self.cost = cost
        self.keep = False  # it stays in the file


class ReplayWindow:
    """What of the spool is in memory. The batcher tells it how restored records end."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.settler: CallbackSettler = CallbackSettler(self._ended)
        self.loaded: dict[int, _Loaded] = {}
        self.ended: list[tuple[int, int, int]] = []  # (id, records, size): to be deleted
        self.held: int = 0  # memory that loaded and not yet deleted rows were counted with
        self.closed = False
        self.on_ended: Callable[[], None] = nothing
        self._costs: dict[int, int] = {}

    def load(self, row: int, records: int, size: int, cost: int) -> None:
        self.loaded[row] = _Loaded(records, size, cost)
        self.held += cost

    def deleted(self, rows: list[tuple[int, int, int]]) -> None:
        for row, _, _ in rows:
            self.held -= self._costs.pop(row, 0)

    def _ended(self, row: int, count: int, *_: object) -> None:
        # A batch that nobody sends any more is freed, and its row stays.
        if self.closed:
            return
        # A row may be in several batches by now, and each tells of its own part.
        loaded = self.loaded[row]
        loaded.pending -= count
        if loaded.pending:
            return
        del self.loaded[row]
        # It was left in the file at the end, and must not be deleted from it.
        if loaded.keep:
            self.held -= loaded.cost
            return
        # Its memory is free, but it is still in the file: a crash now sends it again. So it counts until it is deleted.
        self._costs[row] = loaded.cost
        self.ended.append((row, loaded.records, loaded.size))
        self.on_ended()


def nothing() -> None:
    pass


class Replay:
    """Reads rows, makes batches of them, and hands these to the sender when it asks for more."""

    def __init__(
        self, batcher: Batcher, sender: Sender, window: ReplayWindow, disk: SpoolDisk, *, name: str, most_records: int,
        most_bytes: int, news: Callable[[], None],
    ) -> None:  # fmt: skip
        """`most_records`, `most_bytes` of one call; `news()` is called when there is room for more rows."""
        self._batcher = batcher
        self._sender = sender
        self._window = window
        self._disk = disk
        self._name = name
        self._most_records = most_records
        self._gather_bytes = min(_GATHER_BYTES, most_bytes // 2)
        self._news = news
        self.ready: deque[Batch] = deque()  # restored, not handed to the sender yet
        self.unread: int = 0  # rows that are on the disk only
        self.damaged: int = 0  # rows set aside
        self._after = 0  # the last row that was read

    async def adopt(self, found: Found) -> None:
        """Take up what a former run left in the file. SpoolError."""
        if not found.rows:
            return
        self._batcher.adopt_spooled(found.records)
        self.unread = found.rows
        spool = self._disk.spool
        if not found.clean:
            # What had been read back when the former run died may have been stored.
            share = self._window.budget.max_bytes
            self._sender.counters.duplicates_possible += await self._disk.run(spool.first_records, share)
        _LOG.info(
            "pipeline=%s stage=spool spool %s holds %d records (%d bytes) of a former run: they go first",
            self._name, spool.path, found.records, found.bytes,
        )  # fmt: skip

    def next(self) -> Batch | None:
        """The oldest rows that were read, as one call: each may hold a single record."""
        if not self.ready:
            return None
        picked = [self.ready.popleft()]
        records, size = len(picked[0]), picked[0].size
        # As full as a call may be: rows of single records would each be a call of their own.
        while self.ready:
            records += len(self.ready[0])
            size += self.ready[0].size
            if records > self._most_records or size > self._gather_bytes:
                break
            picked.append(self.ready.popleft())
        batch, *rest = Batch.gather(picked)
        self.ready.extendleft(reversed(rest))
        # There is room for more rows, and the turn that reads them may be asleep.
        if not self.ready:
            self._news()
        return batch

    async def read(self) -> bool:
        """The oldest rows, as many as their share of the budget has room for. False: none. SpoolError."""
        share = self._window.budget.max_bytes
        # What ended and is not deleted yet counts too. It is what a crash could send twice.
        room = share - self._window.held
        alone = not self._window.ended and self._only_doubted()
        places = self._window.budget.max_records - self._window.budget.records
        if (room <= 0 or places <= 0) and not alone:
            return False
        # a part of the room: until a row is restored its bytes are there twice
        most = min(room, max(share // _SHARE, room // 2))
        spool = self._disk.spool
        rows: list[Row] = await self._disk.run(
            lambda: spool.read(self._after, most_bytes=most, most_records=places, at_least_one=alone)
        )
        for row in rows:
            # After each row and not after all: when one fails, those before it are not read again.
            await self._restore(row)
            self._after = row.id
            self.unread -= 1
        # The first row did not fit, or there is none.
        if not rows:
            if alone and not self._window.loaded:
                self.unread = 0  # the file has none: rows that vanished must not hold up what comes
            return False
        self._sender.pump()
        return True

    def _only_doubted(self) -> bool:
        """Nothing is read back, or only records that Kinesis refuses one by one, nobody knows for whose fault.

        The next row may tell: if Kinesis stores it, the fault is theirs. A few rows may so be held beyond the share.
        """
        loaded = self._window.loaded
        if not loaded:
            return True
        # These rows are held beyond the share. A few are all that memory can bear.
        if len(loaded) > _DOUBTED_MOST:
            return False
        doubted = self._sender.rows_in_doubt()
        return all(doubted.get(row) == each.pending for row, each in loaded.items())

    async def _restore(self, row: Row) -> None:
        fault = row.fault
        if fault is None:
            cost = row.size + row.entries * ENTRY_BYTES
            # Before it is restored: from then on the batcher may tell how its records end.
            self._window.load(row.id, row.records, row.size, cost)
            try:
                batch = self._batcher.restore(row.body, row.counts, row.id)
            except BaseException as error:
                del self._window.loaded[row.id]
                self._window.held -= cost
                # Another error says nothing about the row. It must not be marked as damaged for that.
                if not isinstance(error, DataFormatError):
                    raise
                fault = str(error)
            else:
                self.ready.append(batch)
                return
        spool = self._disk.spool
        # Else it would be read again with each turn, and nothing behind it.
        await self._disk.run(spool.quarantine, row)
        self.damaged += 1
        # Its number of records may be rotten as well. More than are in the file can never end.
        self._batcher.settle_spooled(min(row.records, self._batcher.spooled), DEAD)
        _LOG.error(
            "pipeline=%s stage=spool spool %s: batch %d with %d records is damaged (%s); it stays in the file, the"
            " others go on: look after the disk, and after the row with `sqlite3`",
            self._name, spool.path, row.id, row.records, fault,
        )  # fmt: skip
