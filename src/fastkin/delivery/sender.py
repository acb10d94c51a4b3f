"""Calls in flight: takes closed batches, applies pacing, sends, settles entry by entry, sends again what failed.

The order of what goes next is that in which the batches were taken, per shard. What failed before has kept its
place, so it goes first (its acknowledgements hold back all that came later), then the lane's closed batches. A shard
without room has a line: what waits in it goes in its turn, and everything that comes for this shard later stands behind
it, also what is small enough to have passed. So the tokens that a large record needs add up, however busy its shard
is. Other shards do not wait for it: their records are split off and go on.

A failed entry goes again as the same bytes with the same key, so a duplicate can be recognised. Nothing is dropped
here: an entry leaves by being stored, or through `set_aside` when Kinesis says it can never be stored.

Three kinds of failure are kept apart. An entry that was throttled says something about its shard: it goes back to the
head of the shard's line. One that failed for another reason waits for its time and holds back nobody. A call that
failed says something about the way to Kinesis: the gate closes for a while that grows with each failure, and fewer
calls are kept open.
"""

from __future__ import annotations

import asyncio
import logging
from random import Random
from typing import TYPE_CHECKING, Protocol

from fastkin._codec import Batch
from fastkin.aws.destinations import KINESIS
from fastkin.aws.error_table import classify_record
from fastkin.aws.shards import shard_in_message
from fastkin.delivery.generations import NO_GENERATION, Generations
from fastkin.delivery.pacing import Backoff, CallSize, Concurrency, Pacer
from fastkin.delivery.refusals import Refusals
from fastkin.delivery.retry_queue import (
    CLAIM_AFTER_S,
    CLAIM_EVERY_S,
    CLAIM_S,
    EVEN,
    LEAST_WAIT_S,
    RetryQueue,
    age,
    apart,
)
from fastkin.errors import (
    Action,
    ClosedError,
    KinesisError,
    LibraryError,
    NotSent,
    TransportError,
    UnexpectedResponse,
    printable,
)
from fastkin.limits import CALL_RECORDS, DEFAULT_CALL_BYTES
from fastkin.status.instruments import Histogram, LabelledCounter
from fastkin.status.logs import Repeats

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from typing_extensions import Buffer

    from fastkin._codec import Failure, Lane
    from fastkin.aws.destinations import Destination
    from fastkin.aws.shards import ShardMap

_LOG = logging.getLogger("fastkin.send")

# Attempts for an entry whose error code nobody documented, before it is set aside: with the waits in between some ten
# minutes, in which something else must have been stored. A destination in trouble of a new kind costs no data so, and
# one bad record does not hold back for ever what comes after it.
_STRANGE_ATTEMPTS = 36
_STRANGE_CAP_S = 30.0
_STORED_LATELY_S = 60.0
_WARN_EVERY_S = 5.0
# Nothing but a person, or new keys, helps: tried for ever, slowly, said as an ERROR, not ready.
_HOPELESS = frozenset({Action.OPERATOR, Action.CREDENTIALS, Action.CLOCK})
# The service gave up on a call that it may have carried out, whatever the status says.
_OUTCOME_UNKNOWN = frozenset({"RequestTimeout", "RequestTimeoutException", "RequestAborted", "RequestAbortedException"})
# When somebody must act, ask again slowly and keep the data.
_OPERATOR_BASE_S = 5.0
_OPERATOR_CAP_S = 30.0
_PATIENCE = 2  # calls in a row that failed for keys or clock, before it shows as not ready
_SAY_OPERATOR_EVERY_S = 30.0
# Keys come back without anybody telling us. A look costs one call at most, and what is held waits no longer than this.
_CREDENTIALS_BASE_S = 1.0
_CREDENTIALS_CAP_S = 10.0
_ENTRY_BASE_S = 0.03
_THROTTLE_CAP_S = 0.3  # the pacer keeps the rate: the wait only needs to spread the retries
_ENTRY_CAP_S = 5.0
_CALL_BASE_S = 0.05
_CALL_CAP_S = 5.0
_FARTHEST_S = 60.0  # no wait of the sender's own is as long


# upper bounds: seconds of one call, and how full a batch is of what it may hold (records or bytes, the fuller)
_CALL_BOUNDS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_FILL_BOUNDS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_SHARDS_COUNTED = 256  # shards with a throttle counter of their own
Load = dict[int, tuple[int, int]]


class Client(Protocol):
    """What the sender needs of a Kinesis client."""

    on_resend: Callable[[Buffer], None] | None

    async def call(self, target: str, body: Batch) -> bytes: ...


class Sender:
    """Sends one lane's batches to one stream."""

    def __init__(
        self,
        lane: Lane,
        client: Client,
        *,
        name: str,
        stream: str,
        max_calls: int,
        set_aside: Callable[[Batch, str], None],
        on_settled: Callable[[], None],
        destination: Destination = KINESIS,
        max_records: int = CALL_RECORDS,
        max_batch_bytes: int = DEFAULT_CALL_BYTES,
        throttle_error_after_s: float = 60.0,
        believe: bool = False,
        harmless: Callable[[], Awaitable[bool | None]] | None = None,
        random: Random | None = None,
    ) -> None:
        """`set_aside(batch, reason)` takes over what can never be stored; `on_settled()` runs after each answer.

        `believe`: a single record that its call is refused for is always at fault itself, also when all are refused.
        `harmless()`: would the stream take a record that nobody can object to? None: that cannot be known.
        """
        self.lane = lane
        self.name = name
        self._stream = stream
        self._client = client
        client.on_resend = self._resent
        self._destination = destination
        self._set_aside = set_aside
        self._on_settled = on_settled
        self._max_records = max_records
        self._max_bytes = max_batch_bytes
        self._throttle_error_after_s = throttle_error_after_s
        self._loop = asyncio.get_running_loop()
        self._random = random or Random()  # noqa: S311 - jitter, not secrets
        self.pacer = Pacer(self._loop.time())
        self.shards: ShardMap | None = None
        self._concurrency = Concurrency(max_calls)
        self._gate_backoff = Backoff(_CALL_BASE_S, _CALL_CAP_S, self._random)
        self._operator_backoff = Backoff(_OPERATOR_BASE_S, _OPERATOR_CAP_S, self._random)
        self._credentials_backoff = Backoff(_CREDENTIALS_BASE_S, _CREDENTIALS_CAP_S, self._random)
        self._gate = 0.0  # no call before this time
        self._claim_at = 0.0  # not before this one more for whose shard is not known
        self._tasks: dict[asyncio.Task[None], Batch] = {}  # calls in flight
        self._began: dict[asyncio.Task[None], float] = {}  # when each was made
        self._cut: set[asyncio.Task[None]] = set()  # those that withdraw() cut short
        self._withdrawn: list[Batch] = []  # what they had: for the next withdraw()
        self.source: Callable[[], Batch | None] = lane.take  # where new batches come from
        self.direct: Callable[[], bool] = _always  # may what is new be sent, or does it go to the spool?
        self.answered_at = self._loop.time()  # when Kinesis last took something
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._generations = Generations()
        self.refusals = Refusals(lane.budget, trusted=believe, harmless=harmless, name=name)
        self._waits = RetryQueue(
            self.pacer, CallSize(), self._generations, self.refusals,
            fresh=self._fresh, most_records=max_records, most_bytes=max_batch_bytes,
        )  # fmt: skip
        self._probe = False  # in doubt about the destination: something new goes before what was refused
        self._closing = False
        self._warnings = Repeats(_LOG, self._loop.call_later, most=1, per_s=_WARN_EVERY_S)
        self._errors = Repeats(_LOG, self._loop.call_later, most=1, per_s=_SAY_OPERATOR_EVERY_S)
        self._throttled_since: float | None = None
        self._throttled_stored = 0  # what the lane had stored then
        self.unwell: str | None = None  # what only an operator can mend, since something was stored
        self._hopeless = 0  # calls in a row that failed so
        self.last_error: str | None = None
        self.calls = 0
        self.calls_failed = 0
        self.retried = 0  # records sent again
        self.throttled = LabelledCounter(_SHARDS_COUNTED)  # shard id ("" when not told) -> records
        self.failed_by_code = LabelledCounter()
        # These count records as they were given: an aggregate counts as what is in it.
        self.batched = 0  # records of batches taken from the lane
        self.sent = 0  # records of calls made, repeats included
        self.retried_by_code = LabelledCounter()  # records that go again, by what failed
        self.calls_failed_by_code = LabelledCounter()
        self.call_seconds = Histogram(_CALL_BOUNDS_S)
        self.batch_fill = Histogram(_FILL_BOUNDS)
        self.duplicates_possible = 0  # records of calls whose outcome stayed unknown
        self.max_in_flight = 0

    # -- what the owner calls ------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Calls open now."""
        return len(self._tasks)

    @property
    def idle(self) -> bool:
        return not self._tasks and not self._waits and not self.lane.ready

    def heat(self) -> dict[str, float]:
        """Shard id to the share of its limit that was used lately; empty while the shards are not known."""
        if self.shards is None:
            return {}
        ids = (shard.id for shard in self.shards.shards)
        return dict(zip(ids, self.pacer.heat(self._loop.time()), strict=True))

    def set_shards(self, shards: ShardMap | None) -> None:
        """Pace by these shards from now on; None: learn from throttles alone."""
        self.shards = shards
        if shards is None:
            self.pacer.clear_shards(self._loop.time())
        else:
            self.pacer.set_shards(self._loop.time(), [shard.share for shard in shards.shards])
        if self._waits.leave_lines():
            self.pump()

    def pump(self) -> None:
        """Start as many calls as may go now; arm a timer for the rest. Cheap when there is nothing to do."""
        if self._closing:
            return
        now = self._loop.time()
        while len(self._tasks) < self._concurrency.limit:
            if now < self._gate:
                self._wake_at(self._gate)
                return
            batch = self._probed(now) or self._waits.due_call(now) or self._waits.admit_new(now)
            if batch is None:
                if self._waits:  # the one place where the timer is set for what waits
                    self._wake_at(max(self._waits.due, now + LEAST_WAIT_S))
                return
            load = batch.shard_load()
            task = self._loop.create_task(self._call(batch, load), name=f"fastkin[{self.name}].call")
            self._tasks[task] = batch
            self._began[task] = now
            self.max_in_flight = max(self.max_in_flight, len(self._tasks))
            task.add_done_callback(self._call_done)

    async def flush(self) -> None:
        """Return when every record that the lane has closed into batches so far has ended.

        ClosedError: the sender was closed before that.
        """
        # Those who ask in one turn of the loop share a mark: records of different ones do not share a call.
        await asyncio.sleep(0)
        if self._closing:
            raise _closed()
        while (batch := self.lane.take()) is not None:
            self._queue_fresh(batch)
        mark = self._generations.close_generation()
        self.pump()
        await self._generations.wait(mark)

    def abort(self) -> None:
        """Begin no more calls: the event loop is about to end."""
        self._closing = True

    async def close(self) -> None:
        """Cancel the calls in flight. What has not ended stays unsettled: see `unsent`."""
        self._closing = True
        self._warnings.close()
        self._errors.close()
        if self._timer is not None:
            self._timer.cancel()
        tasks: list[asyncio.Task[None]] = [*self._tasks]
        tasks += self.refusals.tasks()
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

    @property
    def flowing(self) -> bool:
        """The last call was answered, nothing keeps the next one, and no call was cut short for want of an answer."""
        if self._cut or self._withdrawn or self.last_error is not None:
            return False
        return self._gate <= self._loop.time()

    @property
    def oldest(self) -> float | None:
        """When the oldest batch that has not ended was taken (loop time); None without one."""
        born = [*self._waits.born(), *(batch.born for batch in (*self._tasks.values(), *self._withdrawn))]
        return min(born, default=None)

    @property
    def waiting(self) -> bool:
        """Something waits to be sent."""
        return bool(self._waits) or self.lane.ready > 0

    @property
    def attended(self) -> bool:
        """Somebody will pump: a call that ends, or the timer."""
        if self._tasks:
            return True
        return self._timer is not None and self._timer_at <= self._loop.time() + _FARTHEST_S

    def withdraw(self, *, called_before: float | None = None, alone: bool = True) -> list[Batch]:
        """Hand out the batches that wait, oldest first, but not what came back from the spool.

        Calls that were made before `called_before` (loop time) are cut short; their batches wait after that and
        come with the next withdrawal. `alone`: also the halves of a call that Kinesis refused. Whoever takes a
        batch tells `forget` when it has ended, or gives it back.
        """
        if called_before is not None:
            for task, began in self._began.items():
                if began < called_before and not self._tasks[task].restored:
                    self._cut.add(task)
                    task.cancel()
        out, self._withdrawn = self._withdrawn, []
        out += self._waits.withdraw(alone=alone)
        out.sort(key=age)
        while (fresh := self.lane.take()) is not None:
            self._adopt(fresh)
            out.append(fresh)
        return out

    def give_back(self, batches: list[Batch]) -> None:
        """What was withdrawn shall be sent after all, before everything else; also what waits for withdraw()."""
        batches = sorted([*self._withdrawn, *batches], key=age)
        self._withdrawn = []
        for batch in batches:
            self._waits.put_back(batch)
        self.pump()

    def rows_in_doubt(self) -> dict[int, int]:
        """Rows of the spool, with how many of their records wait as single ones that were refused."""
        return self._waits.rows_in_doubt()

    def forget(self, epoch: int, count: int) -> None:
        """So many records of what was withdrawn have ended."""
        self._generations.ended(epoch, count)

    # -- what goes next ------------------------------------------------------------------------

    def _probed(self, now: float) -> Batch | None:
        """One new batch for each time the gate was closed in doubt.

        If it is stored, it was the records that were refused, and not the destination that refuses everything.
        """
        if not self._probe:
            return None
        self._probe = False
        return self._waits.admit_new(now)

    def _fresh(self) -> Batch | None:
        batch = self.source()
        if batch is not None:
            self._adopt(batch)
        return batch

    def _adopt(self, batch: Batch) -> None:
        batch.born = self._loop.time()
        if batch.restored:
            batch.epoch = NO_GENERATION
            return
        self.batched += batch.user_records
        self.batch_fill.observe(max(len(batch) / self._max_records, batch.size / self._max_bytes))
        self._generations.take(batch)

    def _queue_fresh(self, batch: Batch) -> None:
        self._adopt(batch)
        if self.direct():
            self._waits.put_back(batch)
        else:
            self._withdrawn.append(batch)  # not past what is in the spool

    def _wake_at(self, when: float) -> None:
        if self._closing:
            return
        if self._timer is not None:
            if self._timer_at <= when:
                return
            self._timer.cancel()
        self._timer_at = when
        # uvloop rounds timers down to a millisecond: waking early would spin
        self._timer = self._loop.call_at(when + 0.001, self._woken)

    def _woken(self) -> None:
        self._timer = None
        self.pump()

    # -- one call ------------------------------------------------------------------------------

    async def _call(self, batch: Batch, load: Load) -> None:
        self.calls += 1
        self.sent += batch.user_records
        began = self._loop.time()
        count = len(batch)
        epoch, attempts = batch.epoch, batch.attempts
        nbytes = batch.nbytes
        try:
            try:
                answer = await self._client.call(self._destination.put, batch)
            finally:
                self.call_seconds.observe(self._loop.time() - began)
            failures = batch.settle(answer)
        except KinesisError as error:
            self._call_failed(batch, error)
        except asyncio.CancelledError:
            self.duplicates_possible += batch.user_records
            raise
        except Exception as error:
            self._broke(batch, epoch, count, error)
            self._on_settled()
            raise
        else:
            self._waits.sizes.taken(nbytes)
            self._answered(epoch, attempts, count, load, failures)
        self._on_settled()

    def _call_done(self, task: asyncio.Task[None]) -> None:
        batch = self._tasks.pop(task)
        del self._began[task]
        if task.cancelled() and task in self._cut and not self.direct():
            self._withdrawn.append(batch)  # not for the pump to send again at once
        elif task.cancelled():
            # Perhaps before its first step, so this cannot be left to the task itself.
            self._waits.put_back(batch)
        elif (error := task.exception()) is not None:
            # Nothing may fail here: what does is a bug, and hiding it would lose data quietly.
            self._loop.call_exception_handler(
                {
                    "message": f"fastkin[{self.name}]: the sender failed",
                    "exception": error,
                    "task": task,
                }
            )
        self._cut.discard(task)
        self.pump()

    def _broke(self, batch: Batch, epoch: int, count: int, error: Exception) -> None:
        """Something that is no answer of Kinesis: a bug, or a setting that shows only now. The data is kept."""
        try:
            batch.shard_load()
        except LibraryError:
            self._generations.ended(epoch, count)  # it was settled, and one of those who were told raised
        else:
            self._call_failed(batch, KinesisError(type(error).__name__, str(error), action=Action.OPERATOR))

    def _resent(self, body: Buffer) -> None:
        """The transport sent a call again at once: its connection died without an answer."""
        if isinstance(body, Batch):
            self.duplicates_possible += body.user_records

    def _answered(self, epoch: int, attempts: int, count: int, load: Load, failures: list[Failure]) -> None:
        now = self._loop.time()
        if len(failures) != 1 or len(failures[0].batch) < count:
            self.answered_at = now
        self._concurrency.succeeded()
        self._gate_backoff.reset()
        self._operator_backoff.reset()
        self._credentials_backoff.reset()
        self.last_error = self.unwell = self._waits.why
        self._hopeless = 0
        if len(failures) != 1 or len(failures[0].batch) < count:
            self._probe = False
            self.refusals.stored()
        if not failures:
            self.pacer.stored(now, load)
            self._throttled_since = None
            self._generations.ended(epoch, count)
            return
        failed = sum(len(failure.batch) for failure in failures)
        if failed < count:
            self.pacer.stored(now, _less(load, failures))
        self._generations.ended(epoch, count - failed)
        waits = []
        for failure in failures:
            failure.batch.epoch = epoch
            failure.batch.attempts = attempts
            waits.append(self._entry_failed(failure, now))
        if failed == count and (delay := min(waits)) > 0.0:
            # The same for every record: it is the destination's trouble, and what is new would only share it.
            self._gate = max(self._gate, now + delay)
            self._wake_at(self._gate)

    def _entry_failed(self, failure: Failure, now: float) -> float:
        """One kind of failure in an answer. Returns how long to wait when only an operator can mend it, else 0.0."""
        batch = failure.batch
        code, message = printable(failure.code, 128), printable(failure.message)
        self.failed_by_code.add(code, len(batch))
        action = classify_record(code)
        if action is not Action.THROTTLE:
            batch.attempts += 1
        if action is Action.REJECTED or (action is Action.STRANGE and self._given_up(batch, now)):
            if batch.user_records > len(batch) and not batch.single:
                self._halve(batch)  # the others of an aggregate are not lost with the one that is at fault
                return 0.0
            self._generations.ended(batch.epoch, len(batch))
            self._set_aside(batch, f"{code}: {message}")
            return 0.0
        self.retried += len(batch)
        self.retried_by_code.add(code, batch.user_records)
        if action in _HOPELESS:
            return self._entry_waits(batch, KinesisError(code, message, action=action), now)
        shard_id = shard_in_message(message) or ""
        least, most = _ENTRY_BASE_S, min(_ENTRY_CAP_S, _ENTRY_BASE_S * 2.0 ** min(batch.attempts, 10))
        if action is Action.THROTTLE:
            most = _ENTRY_BASE_S * 2 if self._throttled_since is None else _THROTTLE_CAP_S
            self.throttled.add(shard_id, batch.user_records)
            ordinal = self.shards.ordinal(shard_id) if self.shards is not None else None
            self.pacer.throttled(now, ordinal, even=-1 in batch.shard_load())
            self._say_throttled(now, shard_id, len(batch))
        elif action is Action.STRANGE:
            most = min(_STRANGE_CAP_S, _ENTRY_BASE_S * 2.0 ** min(batch.attempts, 20))
            least = most / 2
            shard_id = code
            self._errors.say(
                logging.ERROR, code,
                "pipeline=%s stage=send %d records failed with %s, which is no code of Kinesis: %s; they go again, and"
                " after some ten minutes in which others are stored they become dead letters",
                self.name, len(batch), code, message,
            )  # fmt: skip
        else:
            self._warn("%d records failed with %s: %s; they go again", len(batch), code, message)
        until = now + self._random.uniform(least, most)
        if action is not Action.THROTTLE:
            self._waits.put_by(f"{action.value} {shard_id}", batch, now, until)
            return 0.0
        load = batch.shard_load()
        for shard, part in apart(batch, list(load)):
            if self.pacer.knows(shard):
                self._waits.put_by(shard, part, now, until)
            elif now - batch.born > CLAIM_AFTER_S and now >= self._claim_at:
                self._claim_at = now + CLAIM_EVERY_S
                self._waits.put_by(EVEN, part, now, now + CLAIM_S)
            else:
                self._waits.put_by(f"throttled {shard_id}", part, now, until)
        return 0.0

    def _given_up(self, batch: Batch, now: float) -> bool:
        """A record failed with a code that nobody documented: has it failed for long enough?"""
        if batch.attempts < _STRANGE_ATTEMPTS:
            return False
        if batch.user_records > len(batch) and not batch.single:
            return True  # its parts are judged
        if now - self.answered_at <= _STORED_LATELY_S:
            return True
        # Nothing else is stored, perhaps because nothing else can come before this one has ended.
        self.refusals.ask()
        return len(batch) == 1 and self.refusals.may_give_up(now)

    def _entry_waits(self, batch: Batch, error: KinesisError, now: float) -> float:
        """An entry failed with what a call may fail with as well: it is kept and tried again as a call would be."""
        queue = self._waits.line(f"operator {error.code}")
        queue.put(batch)
        if queue.not_before <= now:
            keys = error.action is Action.CREDENTIALS
            delay = (self._credentials_backoff if keys else self._operator_backoff).next()
            self._waits.wait_until(queue, now + delay)
            self._errors.say(
                logging.ERROR, error.code,
                "pipeline=%s stage=send %d records failed with %s; the data is kept and tried again in %.0f s%s",
                self.name, len(batch), error, delay, _cure(error, self._destination.permission),
            )  # fmt: skip
        queue.why = str(error)
        self.last_error = self.unwell = queue.why
        return queue.not_before - now

    def _call_failed(self, batch: Batch, error: KinesisError) -> None:
        now = self._loop.time()
        self.calls_failed += 1
        self.last_error = str(error)
        self.failed_by_code.add(error.code, len(batch))
        self.calls_failed_by_code.add(error.code, 1)
        doubted = False
        if error.action is Action.REJECTED:
            if not batch.single:
                self._refused_call(batch, error)
                return
            if self.refusals.at_fault(batch, now):
                self._generations.ended(batch.epoch, 1)
                self._set_aside(batch, f"{error.code}: {error.message}")
                return
            # Nothing is taken, or nothing any more: the fault may be not this record's but the destination's or ours.
            self._probe = doubted = True
            error = _as_operator(error, untold=self.refusals.untold)
        elif len(batch) > 1 and _not_taken(error):
            self._waits.sizes.late(batch.nbytes)
        if error.action in _HOPELESS:
            self._hopeless += 1
            # keys and clock may be right again with the next attempt
            if error.action is Action.OPERATOR or self._hopeless > _PATIENCE:
                self.unwell = str(error)
        self._concurrency.failed()
        if error.action is Action.THROTTLE:
            self.pacer.throttled(now, None, even=True)
        if _maybe_stored(error):
            self.duplicates_possible += batch.user_records
        self.retried += len(batch)
        self.retried_by_code.add(error.code, batch.user_records)
        if doubted:
            self._waits.put_alone(batch).doubted = True
        else:
            self._waits.put_back(batch)
        if self._gate <= now:
            if error.action in _HOPELESS:
                keys = error.action is Action.CREDENTIALS or error.code == "NoCredentials"
                delay = (self._credentials_backoff if keys else self._operator_backoff).next()
                self._errors.say(
                    logging.ERROR, error.code,
                    "pipeline=%s stage=send %s; the data is kept and tried again in %.0f s%s",
                    self.name, error, delay, _cure(error, self._destination.permission),
                )  # fmt: skip
            else:
                delay = self._gate_backoff.next()
                if error.action is not Action.THROTTLE or not self._throttled_for_long(now, ""):
                    self._warn("call failed: %s; again in %.2f s", error, delay)
            self._gate = now + max(delay, min(error.retry_after or 0.0, _OPERATOR_CAP_S))
        self._wake_at(self._gate)

    def _refused_call(self, batch: Batch, error: KinesisError) -> None:
        """Kinesis refuses a whole call for one bad record: halve it until the bad one stands alone."""
        if len(batch) > 1 and _too_large(error) and self._waits.sizes.late(batch.nbytes):
            self.retried += len(batch)
            self.retried_by_code.add(error.code, batch.user_records)
            self._waits.put_back(batch)  # it is cut on its way, and so are the next ones
            return
        self._halve(batch)

    def _halve(self, batch: Batch) -> None:
        """To be sent by halves. Of an aggregate there is one record more than before, so the flush counts anew."""
        before = len(batch)
        halves = batch.halves()
        self._generations.grew(batch.epoch, sum(map(len, halves)) - before)
        for half in halves:
            self._waits.put_alone(half)

    # -- bookkeeping ---------------------------------------------------------------------------

    def _warn(self, message: str, *args: object) -> None:
        self._warnings.say(logging.WARNING, message, "pipeline=%s stage=send " + message, self.name, *args)

    def _say_throttled(self, now: float, shard_id: str, records: int) -> None:
        if not self._throttled_for_long(now, shard_id):
            self._warn("throttled at %s: %d records go again, slower", shard_id or "the stream", records)

    def _throttled_for_long(self, now: float, shard_id: str) -> bool:
        """Say so as an error, once per `throttle_error_after_s` without a call that went through whole."""
        if self._throttled_since is None:
            self._throttled_since, self._throttled_stored = now, self.lane.stored
        lasted = now - self._throttled_since
        if lasted <= self._throttle_error_after_s:
            return False
        rate = (self.lane.stored - self._throttled_stored) / lasted
        self._throttled_since, self._throttled_stored = now, self.lane.stored
        _LOG.error(
            "pipeline=%s stage=send throttled for %.0f s at %s, %.0f records/s are stored;"
            " data is kept: add shards, use keys that spread, or send less",
            self.name, lasted, f"{shard_id} of {self._stream}" if shard_id else f"stream {self._stream}", rate,
        )  # fmt: skip
        return True


def _less(load: Load, failures: list[Failure]) -> Load:
    """What of the load was stored."""
    rest = dict(load)
    for failure in failures:
        for shard, (records, nbytes) in failure.batch.shard_load().items():
            have = rest.get(shard)
            if have is not None:
                rest[shard] = (have[0] - records, have[1] - nbytes)
    return rest


def _too_large(error: KinesisError) -> bool:
    return error.http_status == 413 or "EntityTooLarge" in error.code


def _not_taken(error: KinesisError) -> bool:
    """The body of the call had not wholly left when it ended for want of time: a smaller one may."""
    return bool(isinstance(error, TransportError) and error.unsent_bytes) or error.http_status == 408


def _always() -> bool:
    return True


def _closed() -> ClosedError:
    return ClosedError("closed before everything had ended")


def _maybe_stored(error: KinesisError) -> bool:
    """Whether the records of a failed call may be in the stream: the outcome is unknown, or a 5xx hides it."""
    if isinstance(error, UnexpectedResponse | TransportError):
        return not isinstance(error, NotSent)
    return error.code in _OUTCOME_UNKNOWN or (error.http_status is not None and error.http_status >= 500)


def _as_operator(error: KinesisError, *, untold: bool) -> KinesisError:
    """`untold`: it cannot be known either whether a harmless record would be taken."""
    cure = ', or set startup_check = "put": then a test record tells whose fault it is' if untold else ""
    return KinesisError(
        error.code,
        f"{error.message}; even single records are refused and none is stored: check the destination and its"
        f" limits{cure}",
        action=Action.OPERATOR,
        http_status=error.http_status,
        request_id=error.request_id,
    )


def _cure(error: KinesisError, permission: str) -> str:
    if error.action is Action.CLOCK:
        return ": set this machine's clock"
    if error.action is Action.CREDENTIALS:
        return ": check the credentials"
    if "ResourceNotFound" in error.code:
        return ": check stream name, region and account"
    if "AccessDenied" in error.code:
        return f": allow {permission} on the stream"
    return ""
