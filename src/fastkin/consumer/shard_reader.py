"""One shard from a position to its end, at the pace that AWS allows."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastkin.consumer.calls import EXPIRED
from fastkin.consumer.positions import Position, ShardIteratorType, after
from fastkin.errors import KinesisError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastkin.consumer.calls import Batch, Calls

CALL_EVERY_S = 0.2  # a shard answers five GetRecords a second to all its readers (the API's page)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a shard is read."""

    limit: int  # records of one call
    poll_s: float  # between calls while there is nothing new
    patience_s: float | None  # how long trouble on the way is borne; None: for ever


@dataclass(slots=True)
class ShardReader:
    """The batches of one shard. An iterator that has expired is replaced by one behind the last record."""

    calls: Calls
    shard_id: str
    start: Position
    pace: Pace
    behind_ms: int = 0
    reseeks: int = 0
    _last: str | None = field(default=None, init=False)

    async def batches(self) -> AsyncIterator[Batch]:
        """Until the shard ends; the last one has no `next_iterator`. Empty batches in between are left out."""
        iterator: str | None = None
        while True:
            if iterator is None:
                iterator = await self._seek()
            called = time.monotonic()
            try:
                batch = await self._read(iterator)
            except KinesisError as error:
                if error.code not in EXPIRED:
                    raise
                self.reseeks += 1
                iterator = None
                continue
            self.behind_ms = batch.millis_behind_latest
            if batch.records:
                self._last = batch.records[-1].sequence_number
            if batch.records or batch.next_iterator is None:
                yield batch
            iterator = batch.next_iterator
            if iterator is None:
                return
            pause = self.pace.poll_s if not batch.millis_behind_latest else min(self.pace.poll_s, CALL_EVERY_S)
            await asyncio.sleep(called + pause - time.monotonic())

    async def _read(self, iterator: str) -> Batch:
        return await self.calls.patiently(
            lambda: self.calls.records(iterator, self.pace.limit, self.shard_id), self.pace.patience_s
        )

    async def _seek(self) -> str:
        position = self.start if self._last is None else after(self._last)
        asked = self.calls.now()
        iterator = await self.calls.patiently(
            lambda: self.calls.iterator(self.shard_id, position), self.pace.patience_s
        )
        if position.kind is ShardIteratorType.LATEST:
            # Should this iterator expire before it has given a record, "latest" would be another place by then, and
            # what came meanwhile would be missing.
            self.start = Position(ShardIteratorType.AT_TIMESTAMP, timestamp=asked)
        return iterator
