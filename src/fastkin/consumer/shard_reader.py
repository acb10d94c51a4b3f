"""One shard from a position to its end, at the pace that AWS allows.

A shard answers five GetRecords a second, for all readers together, so calls keep a fifth of a second between them, and
`poll_s` while there is nothing new. An iterator lives for five minutes: one that has expired is asked for anew behind
the last record that was handed out, so there is neither a gap nor a duplicate.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from fastkin.consumer.calls import EXPIRED
from fastkin.consumer.positions import Position, ShardIteratorType, after
from fastkin.errors import KinesisError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fastkin._codec import ConsumerRecord
    from fastkin.consumer.calls import Answer, Calls, Patience

CALL_EVERY_S = 0.2  # a shard answers five GetRecords a second to all its readers (the API's page)
# An iterator is good for five minutes. One that has expired before this is no matter of time: to ask for another one at
# once, and for the next, would go on as fast as the peer answers.
YOUNG_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a shard is read."""

    limit: int  # records of one call
    poll_s: float  # between calls while there is nothing new
    patience_s: float | None  # how long trouble on the way is borne; None: for ever


class Portion(NamedTuple):
    """Records of one answer of a shard.

    ended: it is the last one of the shard, which is followed by `child_shards`
    before: sequence number of the record before it in the answer; the first record may be of the same aggregate
    more: another one of the same answer follows
    """

    shard_id: str
    records: list[ConsumerRecord]
    ended: bool
    before: str | None
    more: bool
    child_shards: list[str]


@dataclass(slots=True)
class ShardReader:
    """What is in one shard. An iterator that has expired is replaced by one behind the last record."""

    calls: Calls
    shard_id: str
    start: Position
    pace: Pace
    behind_ms: int = 0
    reseeks: int = 0
    _last: str | None = field(default=None, init=False)
    _patience: Patience | None = field(default=None, init=False)  # of iterators that expire, one after the other

    async def portions(self) -> AsyncIterator[Portion]:
        """Until the shard ends; the last one has `ended` set. Empty ones in between are left out."""
        iterator: str | None = None
        made = 0.0  # when the iterator was
        while True:
            if iterator is None:
                iterator = await self._seek()
                made = time.monotonic()
            called = time.monotonic()
            try:
                answer = await self._read(iterator)
            except KinesisError as error:
                if error.code not in EXPIRED:
                    raise
                self.reseeks += 1
                iterator = None
                await self._expired(error, time.monotonic() - made)
                continue
            made = time.monotonic()
            self._patience = None
            self.behind_ms = answer.millis_behind_latest
            iterator = answer.next_iterator
            before: str | None = None
            async for records, more in self.calls.portions(answer.records):
                ended = iterator is None and not more
                if records:
                    self._last = records[-1].sequence_number
                if records or ended or before is not None:
                    yield Portion(self.shard_id, records, ended, before, more, answer.child_shards)
                before = self._last
            if iterator is None:
                return
            pause = self.pace.poll_s if not answer.millis_behind_latest else min(self.pace.poll_s, CALL_EVERY_S)
            await asyncio.sleep(called + pause - time.monotonic())

    async def _expired(self, error: KinesisError, age_s: float) -> None:
        """Go on at once when the iterator was old, as after a slow reader; wait when it cannot be for its age."""
        again = self._patience is not None
        if self._patience is None:
            self._patience = self.calls.patience(self.pace.patience_s)
        if again or age_s < YOUNG_S:
            await self._patience.bear(error)

    async def _read(self, iterator: str) -> Answer:
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
