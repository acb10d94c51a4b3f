"""Makes the calls: takes closed batches while calls are free and shards have room, and sends them.

    pump()    looks what may go now, and starts a call for it
    _call()   one call, and who judges how it ended: an answer (answers.py), or no answer (failed_calls.py)
    flush()   waits until all that was taken has ended (generations.py)
    withdraw() and requeue_front() are for the backlog, which keeps batches on a disk, or drops them

The order of what goes next is that in which the batches were taken, per shard. What failed before has kept its
place, so it goes first (its acknowledgements hold back all that came later), then the batcher's closed batches. A shard
without room has a line: what waits in it goes in its turn, and everything that comes for this shard later stands behind
it, also what is small enough to have passed. So the tokens that a large record needs add up, however busy its shard
is. Other shards do not wait for it: their records are split off and go on.

Nothing is dropped here: an entry leaves by being stored, or through `dead_letter` when Kinesis says it can never be
stored. And the sender does not decide whether a batch is sent or kept on a disk: it asks its `source`.
"""

from __future__ import annotations

import asyncio
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Protocol

from fastkin._codec import Batch
from fastkin.aws.destinations import KINESIS
from fastkin.aws.error_table import classify_record
from fastkin.delivery.alarm import Alarm
from fastkin.delivery.answers import Answers
from fastkin.delivery.failed_calls import FailedCalls
from fastkin.delivery.gate import Gate
from fastkin.delivery.generations import NO_GENERATION, Generations
from fastkin.delivery.open_calls import OpenCalls
from fastkin.delivery.pacing import CallSize, Pacer
from fastkin.delivery.refusals import Refusals
from fastkin.delivery.retry_queue import LEAST_WAIT_S, RetryQueue, age
from fastkin.delivery.send_counters import SendCounters
from fastkin.delivery.spreading import Spreading
from fastkin.delivery.trouble import Trouble
from fastkin.errors import Action, ClosedError, KinesisError, LibraryError
from fastkin.limits import CALL_RECORDS, DEFAULT_CALL_BYTES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import Buffer

    from fastkin._codec import Batcher
    from fastkin.aws.destinations import Destination
    from fastkin.aws.shards import ShardMap
    from fastkin.delivery.answers import Load

_FARTHEST_S = 60.0  # no wait of the sender's own is as long


class Client(Protocol):
    """What the sender needs of a Kinesis client."""

    on_resend: Callable[[Buffer], None] | None

    async def call(self, target: str, body: Batch) -> bytes: ...


class Source(Protocol):
    """What stands in front of the sender. It alone decides what is sent and what is kept elsewhere."""

    def next(self) -> Batch | None:
        """The next batch to be sent, if any."""

    def bypass_spool(self) -> bool:
        """What is new may be sent. False: it must not pass what is kept elsewhere, and waits for withdraw()."""
        ...


class _BatcherItself:
    """Nothing stands between the batcher and the sender."""

    def __init__(self, batcher: Batcher) -> None:
        self.next = batcher.take

    def bypass_spool(self) -> bool:
        return True


class Sender:
    """Sends one batcher's batches to one stream."""

    def __init__(
        self,
        batcher: Batcher,
        client: Client,
        *,
        name: str,
        stream: str,
        max_calls: int,
        dead_letter: Callable[[Batch, str], None],
        on_settled: Callable[[], None],
        destination: Destination = KINESIS,
        max_records: int = CALL_RECORDS,
        max_batch_bytes: int = DEFAULT_CALL_BYTES,
        throttle_error_after_s: float = 60.0,
        believe: bool = False,
        harmless: Callable[[], Awaitable[bool | None]] | None = None,
        random: Random | None = None,
    ) -> None:
        """`dead_letter(batch, reason)` takes over what can never be stored; `on_settled()` runs after each answer.

        `believe`: a single record that its call is refused for is always at fault itself, also when all are refused.
        `harmless()`: would the stream take a record that nobody can object to? None: that cannot be known.
        """
        self.batcher = batcher
        self.name = name
        self._client = client
        client.on_resend = self._resent
        self._destination = destination
        self._dead_letter = dead_letter
        self._on_settled = on_settled
        self._loop = loop = asyncio.get_running_loop()
        random = random or Random()  # noqa: S311 - jitter, not secrets
        self.source: Source = _BatcherItself(batcher)
        self.pacer: Pacer = Pacer(loop.time())
        refusals = Refusals(batcher.budget, trusted=believe, harmless=harmless, name=name)
        self.refusals: Refusals = refusals
        self.gate: Gate = Gate(max_calls, random)
        self.counters: SendCounters = SendCounters(max_records, max_batch_bytes)
        self._generations = generations = Generations()
        self._spreading = spreading = Spreading(batcher, self.pacer, name)
        self._waits = waits = RetryQueue(
            self.pacer, CallSize(), generations, refusals,
            fresh=self._fresh, place=spreading.place, most_records=max_records, most_bytes=max_batch_bytes,
        )  # fmt: skip
        self._trouble = trouble = Trouble(
            batcher, loop, name=name, stream=stream, permission=destination.permission,
            throttle_error_after_s=throttle_error_after_s,
        )  # fmt: skip
        # All waits of all parts end in the same look, so none of them has to know what comes next.
        self._alarm = alarm = Alarm(loop, self.pump)
        self._calls = OpenCalls(name, loop, self._call_ended)
        classify = partial(classify_record, own=destination.codes)
        judge = (waits, refusals, self.pacer, self.gate, alarm, trouble, self.counters, classify, self._give_up)
        self._answers = Answers(
            *judge, generations=generations, spreading=spreading, random=random, stored_at=loop.time()
        )
        self._failed_calls = FailedCalls(*judge)
        # What must not pass the source's other batches: calls that were cut short, and what a flush took.
        self._withdrawn: list[Batch] = []
        self._closing = False

    # -- what the owner calls ------------------------------------------------------------------

    def set_shards(self, shards: ShardMap | None) -> None:
        """Pace by these shards from now on; None: learn from throttles alone."""
        self._answers.shards = shards
        self._spreading.reset()  # its ordinals meant other shards
        if shards is None:
            self.pacer.clear_shards(self._loop.time())
        else:
            self.pacer.set_shards(self._loop.time(), [shard.share for shard in shards.shards])
        if self._waits.leave_lines():
            self.pump()

    def pump(self) -> None:
        """Start as many calls as may go now; set the alarm for the rest. Cheap when there is nothing to do."""
        if self._closing:
            return
        now = self._loop.time()
        gate, waits = self.gate, self._waits
        self._spreading.look(now, waits.lines)
        # No call ends while this runs: each is a task of its own.
        for _ in range(gate.limit - len(self._calls)):
            # Closed for all, also for what never failed: it is the way that is broken, not the batch.
            if now < gate.opens_at:
                self._alarm.set(gate.opens_at)
                return
            batch = self._probe(now) if self.refusals.probe else None
            batch = batch or waits.due_call(now) or waits.admit_new(now)
            if batch is None:
                # The one place where the alarm is set for what waits. Whoever puts something there need not do it.
                if waits:
                    self._alarm.set(max(waits.due, now + LEAST_WAIT_S))
                return
            # The load is asked for before the call. Afterwards the batch is settled and has none.
            self._calls.start(self._call(batch, batch.shard_load()), batch, now)

    async def flush(self) -> None:
        """Return when every record that the batcher has closed into batches so far has ended.

        ClosedError: the sender was closed before that.
        """
        # Those who ask in one turn of the loop share a mark: records of different ones do not share a call.
        await asyncio.sleep(0)
        if self._closing:
            raise _closed()
        while (batch := self.batcher.take()) is not None:
            self._adopt(batch)
            if self.source.bypass_spool():
                self._waits.put_back(batch)
            else:
                # It must not pass what is kept elsewhere, which is older.
                self._withdrawn.append(batch)
        mark = self._generations.close_generation()
        self.pump()
        await self._generations.wait(mark)

    def abort(self) -> None:
        """Begin no more calls: the event loop is about to end."""
        self._closing = True
        self._alarm.close()

    async def close(self) -> None:
        """Cancel the calls in flight. What has not ended stays unsettled: see `unsent`."""
        self._closing = True
        self._trouble.close()
        self._alarm.close()
        tasks = [*self._calls.tasks(), *self.refusals.tasks()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.gather(*tasks, return_exceptions=True)
        self._generations.fail(_closed())

    def unsent(self) -> list[Batch]:
        """After close(): the batches that never ended, for the owner to fail or forget."""
        batches = [*self._waits.clear(), *self._withdrawn]
        self._withdrawn = []
        return batches

    # -- what the owner asks -------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Calls open now."""
        return len(self._calls)

    @property
    def shards(self) -> ShardMap | None:
        """The map that calls are paced by."""
        return self._answers.shards

    @property
    def operator_error(self) -> str | None:
        """What only an operator can mend, since something was stored."""
        return self._trouble.operator_error

    @property
    def last_error(self) -> str | None:
        """What the last call failed with; None when it was answered."""
        return self._trouble.last_error

    @property
    def answered_at(self) -> float:
        """When Kinesis last took something (loop time)."""
        return self._answers.stored_at

    @property
    def draws_for_room(self) -> bool:
        """Keys are drawn for the shards that have room: some have less than their part."""
        return self._spreading.active

    def utilization(self) -> dict[str, float]:
        """Shard id to the share of its limit that was used lately; empty while the shards are not known."""
        if self.shards is None:
            return {}
        ids = (shard.id for shard in self.shards.shards)
        return dict(zip(ids, self.pacer.utilization(self._loop.time()), strict=True))

    @property
    def idle(self) -> bool:
        return not self._calls and not self._waits and not self.batcher.ready

    @property
    def waiting(self) -> bool:
        """Something waits to be sent."""
        return bool(self._waits) or self.batcher.ready > 0

    @property
    def attended(self) -> bool:
        """Somebody will pump: a call that ends, or the alarm."""
        return len(self._calls) > 0 or self._alarm.rings_by(self._loop.time() + _FARTHEST_S)

    @property
    def flowing(self) -> bool:
        """The last call was answered, nothing keeps the next one, and no call was cut short for want of an answer."""
        if self._calls.cutting or self._withdrawn or self.last_error is not None:
            return False
        return self.gate.opens_at <= self._loop.time()

    @property
    def oldest(self) -> float | None:
        """When the oldest batch that has not ended was taken (loop time); None without one."""
        taken_at = [*self._waits.taken_at(), *(batch.taken_at for batch in (*self._calls.batches(), *self._withdrawn))]
        return min(taken_at, default=None)

    def rows_in_doubt(self) -> dict[int, int]:
        """Rows of the spool, with how many of their records wait as single ones that were refused."""
        return self._waits.rows_in_doubt()

    # -- for who keeps batches elsewhere, or drops them ------------------------------------------

    def withdraw(self, *, called_before: float | None = None, alone: bool = True) -> list[Batch]:
        """Hand out the batches that wait, oldest first, but not what came back from the spool.

        Calls that were made before `called_before` (loop time) are cut short; their batches wait after that and
        come with the next withdrawal. `alone`: also the halves of a call that Kinesis refused. Whoever takes a
        batch tells `forget` when it has ended, or gives it back.
        """
        if called_before is not None:
            self._calls.cut_short(called_before)
        out, self._withdrawn = self._withdrawn, []
        out += self._waits.withdraw(alone=alone)
        out.sort(key=age)
        while (fresh := self.batcher.take()) is not None:
            self._adopt(fresh)
            out.append(fresh)
        return out

    def called(self) -> list[Batch]:
        """The batches of the calls that are open."""
        return list(self._calls.batches())

    def requeue_front(self, batches: list[Batch]) -> None:
        """What was withdrawn shall be sent after all, before everything else; also what waits for withdraw()."""
        # By age, for what was cut short comes later than it was taken.
        batches = sorted([*self._withdrawn, *batches], key=age)
        self._withdrawn = []
        for batch in batches:
            self._waits.put_back(batch)
        self.pump()

    def forget(self, flush_generation: int, count: int) -> None:
        """So many records of what was withdrawn have ended."""
        self._generations.ended(flush_generation, count)

    # -- what goes next ------------------------------------------------------------------------

    def _probe(self, now: float) -> Batch | None:
        """One new batch for each time the gate was closed in doubt of the destination: see Refusals.probe."""
        self.refusals.probe = False
        return self._waits.admit_new(now)

    def _fresh(self) -> Batch | None:
        batch = self.source.next()
        if batch is not None:
            self._adopt(batch)
        return batch

    def _adopt(self, batch: Batch) -> None:
        batch.taken_at = self._loop.time()
        # It was counted when it was taken for the first time, and its producer may be long gone.
        if batch.restored:
            batch.flush_generation = NO_GENERATION
            return
        self.counters.taken(batch)
        self._generations.take(batch)

    # -- one call ------------------------------------------------------------------------------

    async def _call(self, batch: Batch, load: Load) -> None:
        counters = self.counters
        counters.calls += 1
        counters.sent += batch.user_records
        began = self._loop.time()
        # A settled batch has neither any more.
        count, nbytes = len(batch), batch.nbytes
        try:
            try:
                answer = await self._client.call(self._destination.put, batch)
            finally:
                counters.call_seconds.observe(self._loop.time() - began)
            failures = batch.settle(answer)
        # The call may have arrived. Its batch is taken care of where its task ends: see OpenCalls.
        except asyncio.CancelledError:
            counters.duplicates_possible += batch.user_records
            batch.uncertain += 1
            raise
        except Exception as error:
            if isinstance(error, KinesisError) and not isinstance(error, LibraryError):
                self._failed_calls.failed(batch, error, self._loop.time())
            else:
                # Raised again, so that the loop hears of the bug; but first the batch is put where it waits.
                self._broke(batch, count, error)
                self._on_settled()
                raise
        else:
            self._waits.sizes.taken(nbytes)
            self._answers.answered(batch, count, load, failures, self._loop.time())
        self._on_settled()

    def _call_ended(self, batch: Batch, cancelled: bool, cut: bool) -> None:
        # Cancelled from outside, or the disk broke meanwhile: then it goes again as if nothing had been.
        if cancelled and cut and not self.source.bypass_spool():
            # Not into the queue: the pump would send it again at once.
            self._withdrawn.append(batch)
        elif cancelled:
            self._waits.put_back(batch)
        self.pump()

    def _broke(self, batch: Batch, count: int, error: Exception) -> None:
        """Something that is no answer of Kinesis: a bug, or a setting that shows only now. The data is kept."""
        try:
            batch.shard_load()
        except LibraryError:
            # It was settled, and one of those who were told raised. To send it again would store it twice.
            self._generations.ended(batch.flush_generation, count)
        else:
            batch.uncertain += 1  # nobody knows how far the call came
            unforeseen = KinesisError(type(error).__name__, str(error), action=Action.OPERATOR)
            self._failed_calls.failed(batch, unforeseen, self._loop.time())

    def _resent(self, body: Buffer) -> None:
        """The transport sent a call again at once: its connection died without an answer."""
        if isinstance(body, Batch):
            self.counters.duplicates_possible += body.user_records
            body.uncertain += 1

    def _give_up(self, batch: Batch, reason: str) -> None:
        """It can never be stored."""
        self._generations.ended(batch.flush_generation, len(batch))
        self._dead_letter(batch, reason)


def _closed() -> ClosedError:
    return ClosedError("closed before everything had ended")
