"""What flush() waits for: every record taken from the batcher before it was called, and none that came after.

Without that bound a flush would never return while somebody else goes on to put. Records are counted and not calls, for
splits and retries turn one call into several and gather several into one.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from fastkin.runtime.waiters import fail_all

if TYPE_CHECKING:
    from fastkin._codec import Batch

# Of a batch that came back from the spool: nobody waits for it, its producer may be long gone.
NO_GENERATION = -1


class Generations:
    """Counts records that have not ended, by the flush that they belong to.

    A flush closes the generation of now: what is taken later counts for the next. Batches of different generations
    may share a call only while nobody waits, else the older one would wait for the younger.
    """

    def __init__(self) -> None:
        self._now = 0
        self._open: dict[int, int] = {0: 0}  # generation -> records taken and not ended
        self._oldest = 0  # the first of these
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def awaited(self) -> bool:
        """A flush is waiting."""
        return bool(self._waiters)

    def take(self, batch: Batch) -> None:
        """A new batch belongs to the generation of now."""
        batch.flush_generation = self._now
        self._open[self._now] += len(batch)

    def move(self, batch: Batch, generation: int) -> None:
        """It shares a call with an older one, so it counts with it."""
        # Towards the older one only. What a flush waits for may become more so, and never less.
        if batch.flush_generation != generation:
            self._open[batch.flush_generation] -= len(batch)
            self._open[generation] += len(batch)

    def grew(self, generation: int, records: int) -> None:
        """So many more records than were taken: one that was an aggregate became two."""
        if generation != NO_GENERATION:
            self._open[generation] += records

    def ended(self, generation: int, records: int) -> None:
        """So many records have an outcome: whoever waits for no more of them is woken."""
        if generation != NO_GENERATION:
            self._open[generation] -= records
        if not self._waiters:
            return
        still = []
        for mark, waiter in self._waiters:
            if not self._over(mark):
                still.append((mark, waiter))
            # It may have been cancelled, and not have run since.
            elif not waiter.done():
                waiter.set_result(None)
        self._waiters = still

    def close_generation(self) -> int:
        """What is taken from now on is not waited for. Gives the mark for `wait`."""
        # With nothing open the generation can be used again. A flush in a loop would else make one each time.
        if self._open[self._now]:
            self._now += 1
            self._open[self._now] = 0
        return self._now - 1

    async def wait(self, mark: int) -> None:
        """Until all up to this generation have ended. The error of `fail` when that comes first."""
        # Without this a flush of nothing would wait for the next record that ends.
        if self._over(mark):
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((mark, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            # ended() may have taken it out a moment ago.
            with contextlib.suppress(ValueError):
                self._waiters.remove((mark, waiter))
            raise

    def fail(self, error: Exception) -> None:
        """Nothing ends any more: whoever waits raises `error`."""
        fail_all((waiter for _, waiter in self._waiters), error)
        self._waiters.clear()

    def _over(self, mark: int) -> bool:
        # Those that are over are forgotten here, so the table stays as long as what is under way.
        while self._oldest < self._now and not self._open[self._oldest]:
            del self._open[self._oldest]
            self._oldest += 1
        return self._oldest > mark
