"""All shards of a stream side by side, of those that were split or merged the parents to their end before the children.

So records of one key come in the order in which they were stored: after a split a key goes on in a child, and who read
it beside its parent would see new before old.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fastkin.consumer.checkpoints import SHARD_END
from fastkin.consumer.positions import TRIM_HORIZON, Position, ShardIteratorType, after
from fastkin.consumer.shard_reader import Pace, Portion, ShardReader
from fastkin.errors import CheckpointError, ClosedError, KinesisError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastkin.aws.shards import Shard
    from fastkin.consumer.calls import Calls, Patience

CHILDREN_S = 1.0  # until shards are listed again, when one has told of children that the list did not have
LOOKS = 5  # at a shard that was read to its end and is listed as open: a list may be older than the end


class AllShards:
    """Hands out portions. Per shard one waits here at most and one more is being read: memory stays bounded."""

    def __init__(self, calls: Calls, begin: Position, marks: Mapping[str, str], pace: Pace, place: str) -> None:
        self._calls = calls
        self._begin = begin
        self._marks = marks
        self._place = place  # of the marks, for errors
        self._pace = pace
        self._ready: asyncio.Queue[Portion | BaseException] = asyncio.Queue(1)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.readers: dict[str, ShardReader] = {}  # by shard, those at work
        self.reseeks: int = 0  # of readers that have ended
        self._ended: set[str] = {shard for shard, mark in marks.items() if mark == SHARD_END}
        self._children: set[str] = set()  # told by their parents
        self._opened = False
        self._handed: Portion | None = None

    async def next(self) -> Portion | None:
        """The next portion; None when all shards have ended and none follows. Call it when the last one was used up.

        Raises what ended the reading of a shard: the others alone would show a part as if it were all.
        """
        if not self._opened:
            await self._open(first=True)
            self._opened = True
        if self._handed is not None and self._handed.ended:
            self._end(self._handed.shard_id)
            await self._open(first=False)
        self._handed = None
        while True:
            missing = self._children - self._ended - self.readers.keys()
            if not self.readers and not missing:
                return None
            try:
                async with asyncio.timeout(CHILDREN_S if missing else None):
                    portion = await self._ready.get()
            except TimeoutError:
                await self._open(first=False)
                continue
            if isinstance(portion, BaseException):
                raise portion
            self._handed = portion
            return portion

    async def close(self) -> None:
        """End the reading of all shards. Who waits in next() gets ClosedError."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        while not self._ready.empty():
            self._ready.get_nowait()
        self._ready.put_nowait(ClosedError("the consumer was closed while its stream was read"))

    def _end(self, shard_id: str) -> None:
        self.reseeks += self.readers.pop(shard_id).reseeks
        self._tasks.pop(shard_id)
        self._ended.add(shard_id)

    async def _open(self, *, first: bool) -> None:
        """Start the shards whose turn it is."""
        shards = await self._list_of_this_stream()
        there = {shard.id for shard in shards}
        touched = self._touched(shards)
        for shard in shards:
            if shard.id in self._ended or shard.id in self.readers:
                continue
            mark = self._marks.get(shard.id)
            if mark is not None:
                self._start(shard.id, after(mark))
            elif first and self._begin.kind is ShardIteratorType.LATEST and shard.id not in touched:
                if shard.closed:
                    self._ended.add(shard.id)  # what it holds is older than now
                else:
                    self._start(shard.id, self._begin)
            # Parents that are no longer listed are older than what the stream keeps: nobody waits for them.
            elif _parents(shard) & there <= self._ended:
                self._start(shard.id, self._of_child(shard.id, touched, first=first))

    def _of_child(self, shard_id: str, touched: set[str], *, first: bool) -> Position:
        """Where a shard without a mark begins. One that follows a shard we have read begins at its beginning: what came
        between two looks would be missing else."""
        if shard_id in touched:
            return TRIM_HORIZON
        if first or self._begin.kind is ShardIteratorType.AT_TIMESTAMP:
            return self._begin
        return TRIM_HORIZON

    def _touched(self, shards: list[Shard]) -> set[str]:
        """The shards that were read in a former life, and those that came out of them."""
        touched = set(self._marks)
        more = True
        while more:
            found = {shard.id for shard in shards if _parents(shard) & touched} - touched
            touched |= found
            more = bool(found)
        return touched

    async def _list_of_this_stream(self) -> list[Shard]:
        """CheckpointError when the marks are of a stream that was deleted, and this one was made in its place: names
        and ids are the same, and what was read to its end there would never be read here."""
        former: list[str] = []
        for look in range(LOOKS):
            if look:
                await asyncio.sleep(CHILDREN_S)
            shards = await self._list()
            former = [shard.id for shard in shards if self._marks.get(shard.id) == SHARD_END and not shard.closed]
            if not former:
                return shards
        raise CheckpointError(
            f"{self._place}: shard {former[0]} was read to its end, and is open: the mark is of a former stream of this"
            " name; delete it and the others"
        )

    async def _list(self) -> list[Shard]:
        patience: Patience | None = None
        while True:
            try:
                return await self._calls.patiently(self._calls.list_shards, self._pace.patience_s)
            except KinesisError as error:
                if error.code != "ExpiredNextTokenException":
                    raise
                # A page's token lives for five minutes, and a throttle may be waited out for longer: from the first
                # page, at once. What expires again and again would be asked as fast as the peer answers.
                if patience is None:
                    patience = self._calls.patience(self._pace.patience_s)
                else:
                    await patience.bear(error)

    def _start(self, shard_id: str, position: Position) -> None:
        reader = self.readers[shard_id] = ShardReader(self._calls, shard_id, position, self._pace)
        self._tasks[shard_id] = asyncio.create_task(self._read(reader), name=f"fastkin read {shard_id}")

    async def _read(self, reader: ShardReader) -> None:
        try:
            async for portion in reader.portions():
                if portion.ended:
                    self._children.update(portion.child_shards)
                await self._ready.put(portion)
        except Exception as error:  # noqa: BLE001 - who reads hears of it, whatever it is
            await self._ready.put(error)


def _parents(shard: Shard) -> set[str]:
    return {parent for parent in (shard.parent, shard.adjacent_parent) if parent is not None}
