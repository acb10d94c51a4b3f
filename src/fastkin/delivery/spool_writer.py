"""Batches on their way to the disk: taken from the sender, and not durable yet.

Several go into one commit, oldest first, together with the rows that have ended. Only after the commit a batch ends as
SPOOLED, and its messages are acknowledged: a batch that is acknowledged before it is durable is lost by a crash.

What the disk does not take stays here until somebody decides: it is written later, or given back to the sender.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from fastkin._codec import SPOOLED
from fastkin.delivery.spool_file import Put, row_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastkin._codec import Batch
    from fastkin.delivery.replay import Replay, ReplayWindow
    from fastkin.delivery.sender import Sender
    from fastkin.delivery.spool_disk import SpoolDisk

_LOG = logging.getLogger("fastkin.spool")

_GROUP_BYTES = 4 << 20
_GROUP_BATCHES = 64


class SpoolWriter:
    """One commit at a time. Whoever calls `write` handles its SpoolError: then nothing has happened."""

    def __init__(
        self,
        sender: Sender,
        disk: SpoolDisk,
        window: ReplayWindow,
        replay: Replay,
        *,
        name: str,
        on_settled: Callable[[], None],
    ) -> None:
        """`on_settled()` runs after batches were spooled. `name` is that of the log lines."""
        self._sender = sender
        self._disk = disk
        self._window = window
        self._replay = replay
        self._name = name
        self._on_settled = on_settled
        self.waiting: deque[Batch] = deque()  # from the sender, oldest first
        self.full: bool = False  # max_bytes is reached
        self.spooled_total: int = 0  # records that this run wrote

    async def write(self, *, bounded: bool = True) -> bool:
        """The oldest batches that wait, and the rows that have ended. False: nothing was to be done, or nothing fits.

        `bounded`: within max_bytes.
        """
        spool = self._disk.spool
        group, puts = self._group(bounded=bounded)
        # Batches and rows may be added while the disk is at it. Only what is in this commit has changed after it.
        ended = list(self._window.ended)
        if not puts and not ended:
            self._say_full()
            return False
        ids = await self._disk.run(spool.write, puts, ended)
        # From the front: more may have ended meanwhile.
        del self._window.ended[: len(ended)]
        self._window.deleted(ended)
        if not group:
            return True
        self.full = False
        self._disk.took()
        for batch in group:
            self.waiting.popleft()
            # A finished batch has none of them.
            flush_generation, count, records = batch.flush_generation, len(batch), batch.user_records
            # It was counted when it was spooled for the first time.
            if not batch.restored:
                self.spooled_total += records
            batch.finish(SPOOLED)
            self._sender.forget(flush_generation, count)
        self._replay.unread += len(ids)
        self._on_settled()
        return True

    def _group(self, *, bounded: bool) -> tuple[list[Batch], list[Put]]:
        """What goes into the next commit. The first batch goes alone if it must, however large it is."""
        group: list[Batch] = []
        puts: list[Put] = []
        total = 0
        for batch in self.waiting:
            put = Put(batch, batch.counts, len(batch), batch.user_records)
            # A commit is one wait for the disk. But it holds the thread: a long one would keep rows from being read.
            if group and (total + row_size(put) > _GROUP_BYTES or len(group) == _GROUP_BATCHES):
                break
            # What comes behind may be smaller and fit. It is not written: it would be sent before what is older.
            if bounded and not self._disk.spool.fits([*puts, put]):
                break
            group.append(batch)
            puts.append(put)
            total += row_size(put)
        return group, puts

    def _say_full(self) -> None:
        """What waits has no room in max_bytes."""
        spool = self._disk.spool
        # The file is empty, and still this batch does not fit.
        if spool.rows == 0:
            # It never will have: let it be sent.
            self.requeue_front()
        elif not self.full:
            self.full = True
            _LOG.warning(
                "pipeline=%s stage=spool spool %s is full (spool_max_bytes = %d): intake pauses once memory is too",
                self._name, spool.path, spool.max_bytes,
            )  # fmt: skip

    def requeue_front(self) -> None:
        """Let the sender have all of it."""
        batches = list(self.waiting)
        self.waiting.clear()
        self._sender.requeue_front(batches)

    # -- the end -------------------------------------------------------------------------------

    def keep(self, batches: list[Batch]) -> None:
        """After the last call: these shall be on the disk. Rows of which nothing has ended stay as they are."""
        for batch in batches:
            rows = batch.rows()
            row, count = next(iter(rows.items()), (0, 0))
            loaded = self._window.loaded.get(row)
            # Written again it would be there twice. So the old row stays, and only parts of rows are written.
            if len(rows) == 1 and loaded is not None and loaded.records == loaded.pending == count:
                loaded.keep = True
                batch.finish(SPOOLED)
            else:
                self.waiting.append(batch)

    async def write_rest(self) -> None:
        """All that waits, beyond max_bytes too: it is this or to lose it. SpoolError."""
        while self.waiting:
            await self.write(bounded=False)
        while self._window.ended:
            await self.write()

    def leave_rows(self) -> None:
        """What came back from the disk and was not written again is still there, in the row that it came from."""
        for batch in [batch for batch in self.waiting if batch.restored]:
            self.waiting.remove(batch)
            batch.finish(SPOOLED)

    def take_rest(self) -> list[Batch]:
        """What the disk did not take, for the owner to fail or forget."""
        batches = list(self.waiting)
        self.waiting.clear()
        return batches
