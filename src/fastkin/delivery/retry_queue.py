"""What waits to be sent, by what it waits for: who comes first goes first, shard by shard.

Each shard without room has a line. Its records stand in it by age, and new ones for this shard stand behind them, also
when they are small enough to go at once. So tokens add up for the head of the line, and a large record is not overtaken
for ever. Records of other shards pass: one hot shard must not stop the stream.

What failed for another reason waits in a queue of that reason, for its time. It holds back nobody. What may go is
gathered over all queues into one call, the oldest first: its acknowledgement holds back those of all later messages.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from typing import TYPE_CHECKING

from fastkin._codec import Batch
from fastkin.delivery.generations import NO_GENERATION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fastkin.delivery.generations import Generations
    from fastkin.delivery.pacing import CallSize, Pacer
    from fastkin.delivery.refusals import Refusals

LEAST_WAIT_S = 0.001  # a shorter one may vanish in the clock's rounding, and the pump would go round for ever
# Gathered into one call at most: source and copy are both there for a moment, and a call of this size is full enough.
_GATHER_BYTES = 1 << 20
EVEN = -1  # the line of keys that are spread evenly, or whose shard is not known


class Line:
    """What waits for one reason, oldest first."""

    __slots__ = ("alone", "batches", "doubted", "key", "line", "not_before", "why")

    def __init__(self, key: int | str, *, alone: bool = False) -> None:
        self.key: int | str = key  # of a line: the ordinal of its shard
        self.line: bool = isinstance(key, int)  # whatever comes for this shard stands behind it
        self.batches: deque[Batch] = deque()
        self.not_before: float = 0.0
        self.alone: bool = alone  # must not share a call: half of one that Kinesis refused
        self.doubted: bool = False  # a single record that was refused, perhaps through no fault of its own
        self.why: str | None = None  # what only an operator can mend, if that is what it waits for

    def put(self, batch: Batch) -> None:
        """Where its age belongs, behind those of the same age."""
        # The two ends first: nearly all come to the one or to the other, and a deque is slow in its middle.
        batches = self.batches
        if not batches or batches[-1].taken_at <= batch.taken_at:
            batches.append(batch)
        elif batch.taken_at < batches[0].taken_at:
            batches.appendleft(batch)
        else:
            at = len(batches)
            while at and batches[at - 1].taken_at > batch.taken_at:
                at -= 1
            batches.insert(at, batch)


class RetryQueue:
    """All that waits between the batcher and a call, except calls in flight. Times are the event loop's, in seconds."""

    def __init__(
        self, pacer: Pacer, sizes: CallSize, generations: Generations, refusals: Refusals, *,
        fresh: Callable[[], Batch | None], place: Callable[[Batch], object], most_records: int, most_bytes: int,
    ) -> None:  # fmt: skip
        """`fresh()`: the next new batch, if any. `place(batch)`: before its shards are asked for."""
        self._pacer = pacer
        self._generations = generations
        self._refusals = refusals
        self.sizes = sizes
        self._fresh = fresh
        self._place = place
        self._most_records = most_records
        self._gather_bytes = min(_GATHER_BYTES, most_bytes // 2)
        self.lines: dict[int | str, Line] = {}
        self.due: float = math.inf  # before this nothing in the lines can go
        self._even_waits = False  # a whole batch from the batcher stands in the line of even keys, so may the next
        self._serial = itertools.count()

    def __bool__(self) -> bool:
        return bool(self.lines)

    def taken_at(self) -> list[float]:
        """When the oldest batch of each line was taken from the batcher."""
        return [line.batches[0].taken_at for line in self.lines.values()]  # each is in the order of age

    @property
    def why(self) -> str | None:
        """What only an operator can mend, if something waits for that."""
        return next((line.why for line in self.lines.values() if line.why), None)

    def leave_lines(self) -> bool:
        """The shards are others now: who stood in a line of one goes back by age. False: nobody did."""
        # The ordinals of shards mean others now. A line that keeps its number would wait for the wrong bucket.
        lines = [line for line in self.lines.values() if line.line]
        for line in lines:
            del self.lines[line.key]
        for batch in sorted((batch for line in lines for batch in line.batches), key=age):
            self.put_back(batch)
        return bool(lines)

    def withdraw(self, *, alone: bool) -> list[Batch]:
        """What waits, but not what came back from the spool: that stays, and its time runs on. `alone`: also the
        halves of a call that Kinesis refused."""
        out: list[Batch] = []
        for key, line in list(self.lines.items()):
            if line.alone and not alone:
                continue
            # Who takes it away decides about it. In doubt it would hold memory back for a record that is gone.
            if line.doubted and not line.batches[0].restored:
                self._refusals.forget(line.batches[0])
            out += [batch for batch in line.batches if not batch.restored]
            line.batches = deque(batch for batch in line.batches if batch.restored)
            if not line.batches:
                del self.lines[key]
        return out

    def clear(self) -> list[Batch]:
        """All of it, at the end."""
        batches = [batch for line in self.lines.values() for batch in line.batches]
        self.lines.clear()
        return batches

    def line(self, key: int | str) -> Line:
        queue = self.lines.get(key)
        if queue is None:
            # Lines live only as long as something is in them, for keys name error codes, and peers choose these.
            queue = self.lines[key] = Line(key)
        return queue

    def put_back(self, batch: Batch) -> None:
        """It may go as soon as the gate is open, in its turn."""
        # No wait of its own: the gate is closed after a failed call, and that is wait enough.
        self.line("").put(batch)
        self.due = 0.0

    def wait_until(self, queue: Line, until: float) -> None:
        queue.not_before = until
        self.due = min(self.due, until)

    def put_by(self, key: int | str, batch: Batch, now: float, until: float) -> None:
        queue = self.line(key)
        queue.put(batch)
        # Others wait in it already. To set their time anew with each failure would put it off for ever.
        if queue.not_before <= now:
            self.wait_until(queue, until)

    def put_alone(self, batch: Batch) -> Line:
        """To be sent in a call of its own. No tokens are taken for it again: its call has stored nothing."""
        # A line of its own. In a shared one it would wait behind what it must not share a call with.
        key = f"alone-{next(self._serial)}"
        queue = self.lines[key] = Line(key, alone=True)
        queue.put(batch)
        self.due = 0.0
        return queue

    def halve(self, batch: Batch) -> None:
        """To be sent by halves, each in a call of its own. Of an aggregate there is one record more than before."""
        before = len(batch)
        halves = batch.halves()
        # Else the flush that waits for them would return one record too early.
        self._generations.grew(batch.flush_generation, sum(map(len, halves)) - before)
        for half in halves:
            self.put_alone(half)

    def admit_new(self, now: float) -> Batch | None:
        """What is new, as far as its shards have room and nothing stands in their lines."""
        while not (self._even_waits and EVEN in self.lines):
            batch = self._fresh()
            if batch is None:
                return None
            # Before tokens are taken: the rest of it takes its own.
            batch = self._trim(batch)
            part = self._admit(batch, now)
            if part is not None:
                return part
            # What waits for a shard gives way to other shards, so more is taken from the batcher. What is spread evenly
            # waits for all of them: no more than one such batch leaves the batcher before its turn.
        return None

    def due_call(self, now: float) -> Batch | None:
        """What waited and may go now, oldest first, gathered over the queues into one call. Its tokens are taken."""
        if now < self.due:
            return None
        # It is found anew while the queues are walked. Whatever is left behind below has to say when it may go.
        self.due = math.inf
        picked: list[Batch] = []
        records = size = nbytes = 0
        queues = list(self.lines.values())
        if len(queues) > 1:
            queues.sort(key=self._order)
        for queue in queues:
            if queue.not_before > now:
                self.due = min(self.due, queue.not_before)
                continue
            if queue.alone:
                # It must be alone in its call. So it is the first of the next one.
                if picked:
                    self.due = now
                    continue
                del self.lines[queue.key]
                self.due = now
                batch = queue.batches.popleft()
                # Calls have become smaller since it was put here. It is cut on its way like any other.
                if len(batch) == 1 or self.sizes.allows(batch.nbytes):
                    return batch
                self.put_back(batch)
                return self.due_call(now)
            while queue.batches:
                head = self._trim(queue.batches.popleft(), queue)
                if picked and (
                    records + len(head) > self._most_records
                    or size + head.size > self._gather_bytes
                    or not self._alike(picked[0], head)
                    or not self.sizes.allows(nbytes + head.nbytes)
                ):
                    queue.batches.appendleft(head)
                    self.due = now
                    break
                # A line waits as a whole: what is behind its head must not pass it. Other queues wait for a time, and
                # that has come.
                part = self._stand(queue, head, now) if queue.line else self._admit(head, now)
                if part is None:
                    if queue.line:
                        break
                    continue
                picked.append(part)
                records += len(part)
                size += part.size
                nbytes += part.nbytes
            if not queue.batches and self.lines.get(queue.key) is queue:
                del self.lines[queue.key]
        if not picked:
            return None
        return picked[0] if len(picked) == 1 else self._gather(picked)

    def _order(self, queue: Line) -> tuple[bool, float]:
        """By age. In doubt what was refused goes after all else: what else is stored ends the doubt."""
        # Of two that are alike the older one first, for its acknowledgement holds back more.
        return queue.doubted and self._refusals.doubting, queue.batches[0].taken_at

    def _stand(self, queue: Line, head: Batch, now: float) -> Batch | None:
        """The head of a line goes when there is room for it. Until then it stays, and the tokens add up."""
        load = head.shard_load()
        delay = self._pacer.wait(now, load)
        if delay > 0.0:
            queue.batches.appendleft(head)
            self.wait_until(queue, now + max(delay, LEAST_WAIT_S))
            return None
        # The batch that stood in front of the batcher goes now, so the batcher may be asked again.
        if queue.key == EVEN:
            self._even_waits = False
        self._pacer.sent(load)
        return head

    def _admit(self, batch: Batch, now: float) -> Batch | None:
        """What of it may go now; its tokens are taken. The records of shards without room, or with a line, stand in
        line; the others need not wait for them."""
        self._place(batch)
        load = batch.shard_load()
        held: dict[int, int] = {}  # shard as the batch says -> its line
        for shard, (records, nbytes) in load.items():
            line = shard if self._pacer.knows(shard) else EVEN
            # Also when there is room for it now: the others came first, and the tokens are for them.
            if line in self.lines:
                held[shard] = line
            elif (delay := self._pacer.shard_wait(now, shard, records, nbytes)) > 0.0:
                held[shard] = line
                self.wait_until(self.line(line), now + max(delay, LEAST_WAIT_S))
        if not held:
            self._pacer.sent(load)
            return batch
        # One copy for all shards without room, then by halves. Shard by shard the batch would be copied as often as
        # there are shards.
        waits, others = batch.split(held)
        if others is None and set(held.values()) == {EVEN}:
            self._even_waits = True
        if waits is not None:
            for shard, part in apart(waits, list(held)):
                self._line_up(self.lines[held[shard]], part)
        if others is not None:
            self._pacer.sent({shard: load[shard] for shard in load if shard not in held})
        return others

    def _line_up(self, queue: Line, part: Batch) -> None:
        """Small parts are gathered while they wait, those of like size: each record is copied a few times at most."""
        # Of like size and not all at once: else the one that grows would be copied with each that comes.
        while (
            queue.batches
            and (last := queue.batches[-1]).taken_at <= part.taken_at
            and len(last) <= len(part)
            and len(last) + len(part) <= self._most_records
            and last.size + part.size <= self._gather_bytes
            and self._alike(last, part)
        ):
            part = self._gather([queue.batches.pop(), part])
        queue.put(part)

    def _trim(self, batch: Batch, queue: Line | None = None) -> Batch:
        """As much of it as a call may carry now; the rest keeps its place."""
        # A single record goes however large it is: it cannot be cut.
        while len(batch) > 1 and not self.sizes.allows(batch.nbytes):
            batch, rest = batch.halves()
            if queue is not None:
                queue.batches.appendleft(rest)
            else:
                self.put_back(rest)
        return batch

    def _alike(self, one: Batch, other: Batch) -> bool:
        """May these share a call?

        Not when their attempts differ: a record would be given up for the failures of another. And not while
        somebody waits for a flush that concerns one of them only: under a lasting throttle what fails would
        take in what is newer again and again, and the flush would never return.
        """
        return (
            one.attempts == other.attempts
            and one.restored == other.restored
            and (one.flush_generation == other.flush_generation or not self._generations.awaited)
        )

    def _gather(self, picked: list[Batch]) -> Batch:
        flush_generation = min(batch.flush_generation for batch in picked)
        attempts = picked[0].attempts
        # What came back from the disk is never gathered with what did not, so all of them count or none does.
        if flush_generation != NO_GENERATION:
            for batch in picked:
                self._generations.move(batch, flush_generation)
        # More than one when their bytes do not fit into one batch: what is left goes next.
        first, *rest = Batch.gather(picked)
        for batch in (first, *rest):
            batch.flush_generation = flush_generation
            batch.attempts = attempts
        for batch in reversed(rest):
            self.line("").batches.appendleft(batch)
            self.due = 0.0
        return first

    def rows_in_doubt(self) -> dict[int, int]:
        """Rows of the spool, with how many of their records wait as single ones that were refused."""
        found: dict[int, int] = {}
        for queue in self.lines.values():
            # Only these: rows whose records wait for anything else will end by themselves.
            if queue.doubted and queue.batches and queue.batches[0].restored:
                for row, count in queue.batches[0].rows().items():
                    found[row] = found.get(row, 0) + count
        return found


def age(batch: Batch) -> float:
    return batch.taken_at


def apart(batch: Batch, shards: list[int]) -> Iterator[tuple[int, Batch]]:
    """The records of each of these shards by themselves; the batch has no others."""
    if len(shards) == 1:
        yield shards[0], batch
        return
    # by halves: each record is copied as often as the number of shards can be halved
    middle = len(shards) // 2
    one, other = batch.split(shards[:middle])
    if one is not None:
        yield from apart(one, shards[:middle])
    if other is not None:
        yield from apart(other, shards[middle:])
