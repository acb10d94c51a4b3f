"""`SyncProducer`: a producer for programs without an event loop, and for many threads.

A `Producer` belongs to one loop. This one has a thread with a loop of its own, in which a `Producer` works, and a queue
between: threads append to it, and the loop takes what is there in one go. So a put costs a thread no switch to another
one, unless the queue is full.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence  # noqa: TC003 - who reads our annotations needs it
from functools import partial
from pathlib import Path  # noqa: TC003
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypedDict, TypeVar, Unpack

from fastkin.delivery.backlog import Policy  # noqa: TC001
from fastkin.errors import ClosedError, LibraryError, RecordsLost
from fastkin.producer import Buffer, Producer
from fastkin.record import Record  # noqa: TC001
from fastkin.results import PutRecordsResult, PutResult  # noqa: TC001
from fastkin.runtime.forks import OfThisProcess
from fastkin.runtime.loops import loop_factory

if TYPE_CHECKING:
    from fastkin._codec import Receipt
    from fastkin.status.metrics import ProducerCollector
else:
    ProducerCollector = Any  # as in producer.py

_LOG = logging.getLogger("fastkin.producer")
T = TypeVar("T")

# Of what waits for the loop. It comes round in well under a millisecond, so this is full only when the budget is.
_QUEUE_RECORDS = 10_000
_QUEUE_BYTES = 8 * 1024 * 1024
_LEAVE_S = 5.0  # close() waits for the thread so long beyond its time, and leaves it behind then


class ProducerOptions(TypedDict, total=False):
    """The keyword arguments of `Producer`, which says what each one does."""

    stream_arn: str | None
    region: str | None
    endpoint_url: str | None
    access_key: str | None
    secret_key: str | None
    session_token: str | None
    profile: str | None
    role_arn: str | None
    external_id: str | None
    session_name: str | None
    transport: Literal["auto", "native", "sdk"]
    api: Literal["put_records", "put_record"]
    partition_key: str
    linger_ms: float
    max_records: int
    max_batch_bytes: int
    max_record_bytes: int
    max_connections: int
    request_timeout_s: float
    budget_bytes: int
    budget_records: int
    aggregate_bytes: int
    shard_map: bool
    on_full: Policy
    spool: str | Path | None
    spool_max_bytes: int
    spool_after_s: float
    delivery_timeout_s: float | None
    close_timeout_s: float


class _Waiting(NamedTuple):
    """A record on its way to the loop."""

    outcome: concurrent.futures.Future[PutResult]
    data: bytes
    partition_key: str | None
    explicit_hash_key: str | None


class _Outcomes:
    """Futures of records. `open` has those without an outcome: close() finds them when the thread tells nothing."""

    def __init__(self) -> None:
        self.open: set[concurrent.futures.Future[PutResult]] = set()

    def tell(self, outcome: concurrent.futures.Future[PutResult], found: PutResult | BaseException) -> None:
        """Of two threads that tell the first one counts."""
        self.open.discard(outcome)
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if isinstance(found, BaseException):
                outcome.set_exception(found)
            else:
                outcome.set_result(found)

    def settle(self, outcome: concurrent.futures.Future[PutResult], receipt: Receipt[PutResult]) -> None:
        error = receipt.exception()
        self.tell(outcome, receipt.result() if error is None else error)

    def fail(self, outcomes: list[concurrent.futures.Future[PutResult]], error: BaseException) -> None:
        for outcome in outcomes:
            self.tell(outcome, error)


class SyncProducer:
    """Puts records into one stream from any thread.

        with SyncProducer("welders", region="eu-west-1") as producer:
            result = producer.put(b"...").result(timeout=5)

    `put` returns a concurrent.futures.Future, which has result(timeout), exception(timeout) and add_done_callback, and
    works with concurrent.futures.wait. Callbacks run in the producer's own thread: they may put, and must not wait.
    What was put is drained when the block is left, or by close(), and else when the interpreter exits.
    """

    def __init__(self, stream: str | None = None, **options: Unpack[ProducerOptions]) -> None:
        """The arguments are those of `Producer`. LibraryError: one of them is wrong. No thread is started here."""
        self._producer = Producer(stream, **options)
        self._close_timeout_s = options.get("close_timeout_s", 30.0)
        self._name = stream or str(options.get("stream_arn"))
        self._room = threading.Condition()  # guards what follows
        self._queue: deque[_Waiting] = deque()
        self._queued_bytes = 0
        self._outcomes = _Outcomes()
        self._state: Literal["new", "open", "closed"] = "new"
        self._forked = False
        self._thread: threading.Thread | None = None
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._ended: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._limit_s = 0.0  # of close()
        self._woken = False  # the loop was told to look at the queue, and has not yet
        # Of the loop; they bind to it when it waits for them.
        self._arrived = asyncio.Event()  # there is something in the queue
        self._empty = asyncio.Event()  # there is nothing in it, and nothing on its way from it
        self._closing = asyncio.Event()

    # -- for any thread ------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        lost = self.close()
        # Another error is on its way and must not be hidden by this one, which was logged.
        if lost and error is None:
            raise RecordsLost(lost, self._producer.last_error)

    def start(self) -> None:
        """Start the thread, find credentials and endpoint. May be called again.

        KinesisError: the credentials cannot be had. ClosedError: it was closed before.
        """
        self._not_in_the_loop("start")
        with self._room:
            if self._forked or self._state == "closed":
                raise self._not_open()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=f"fastkin[{self._name}]", daemon=True)
                self._thread.start()
        self._started.result()

    def put(
        self, data: Buffer, partition_key: str | None = None, explicit_hash_key: str | None = None
    ) -> concurrent.futures.Future[PutResult]:
        """Take one record; wait only while the budget is full. The arguments are those of `Producer.put`.

        The future has the PutResult, or what a receipt would raise; also RecordError, for what can never be stored.
        ClosedError: the producer is not open.
        """
        # Without the lock: in a forked process a thread that is gone may have held it for ever.
        if self._state != "open":
            raise self._not_open()
        outcome: concurrent.futures.Future[PutResult] = concurrent.futures.Future()
        # Nobody can cancel it, for the record is on its way.
        outcome.set_running_or_notify_cancel()
        # A copy of what the caller may change. Not bytes(data): of a number that would be so many zeros.
        kept = data if type(data) is bytes else bytes(memoryview(data))
        waiting = _Waiting(outcome, kept, partition_key, explicit_hash_key)
        with self._room:
            # A callback runs in the loop's thread: to wait there for what the loop does would be for ever.
            if threading.current_thread() is not self._thread:
                while self._is_full() and self._state == "open":
                    self._room.wait()
            if self._state != "open":
                raise self._not_open()
            self._queue.append(waiting)
            self._outcomes.open.add(outcome)
            self._queued_bytes += len(waiting.data)
            if self._woken:
                return outcome
            self._woken = True
        self._call(self._look)
        return outcome

    def put_and_wait(
        self,
        data: Buffer,
        partition_key: str | None = None,
        explicit_hash_key: str | None = None,
        timeout_s: float | None = None,
    ) -> PutResult:
        """put() and its outcome in one. TimeoutError: there is none within `timeout_s`; the record goes on."""
        self._not_in_the_loop("put_and_wait")
        return self.put(data, partition_key, explicit_hash_key).result(timeout_s)

    def put_record(self, record: Record) -> PutResult:
        """As Producer.put_record: exactly one request, and its outcome."""
        return self._ask("put_record", lambda: self._producer.put_record(record))

    def put_records(self, records: Sequence[Record]) -> PutRecordsResult:
        """As Producer.put_records: exactly one request, and its outcome."""
        return self._ask("put_records", lambda: self._producer.put_records(records))

    def flush(self, timeout_s: float | None = None) -> None:
        """Return when every record put so far has ended. TimeoutError: not within `timeout_s`, and they go on."""
        self._ask("flush", self._flush, timeout_s)

    def stats(self) -> dict[str, Any]:
        """Counters, in records: see Producer.stats. What waits for the loop is not in them yet."""

        async def read() -> dict[str, Any]:
            return self._producer.stats()

        if self._state != "open" or threading.current_thread() is self._thread:
            return self._producer.stats()
        return self._ask("stats", read)

    def metrics(self) -> ProducerCollector:
        """For a prometheus_client registry; it may be scraped in any thread, until the producer is closed."""

        async def make() -> ProducerCollector:
            return self._producer.metrics()

        return self._ask("metrics", make)

    def close(self, timeout_s: float | None = None) -> int:
        """Flush, then close, within `timeout_s` (None: `close_timeout_s`). Returns how many records have no outcome:
        their futures raise ClosedError, and one ERROR counts them. May be called again, from any thread.

        When the producer's thread does not answer, as when a callback waits, it is left behind 5 s after that time.
        """
        self._not_in_the_loop("close")
        if self._forked:
            return 0
        if timeout_s is None:
            timeout_s = self._close_timeout_s
        with self._room:
            first = self._state != "closed"
            self._state = "closed"
            self._room.notify_all()
            if self._thread is None and not self._ended.done():
                self._ended.set_result(0)
        if self._thread is None:
            return self._ended.result()
        # A callback may wait in the thread for something that never comes, and at exit nobody could end this wait.
        limit = time.monotonic() + timeout_s + _LEAVE_S
        if first:
            # Whoever closes while another thread is starting it waits for that: there is no loop before.
            concurrent.futures.wait([self._started], _left(limit))
            self._call(self._begin_close, timeout_s)
        try:
            lost = self._ended.result(_left(limit))
        except TimeoutError:
            return self._leave_thread()
        self._thread.join(_LEAVE_S)
        return lost

    def _leave_thread(self) -> int:
        """The thread does not answer: what has no outcome gets one from here, and nobody waits for it any more."""
        error = ClosedError("the producer was closed, and its thread did not answer: a callback may be waiting in it")
        with self._room:
            lost = list(self._outcomes.open)
            if not self._end(len(lost)):
                return self._ended.result()
            self._queue.clear()
            self._queued_bytes = 0
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self._started.set_exception(error)
        _LOG.error(
            "pipeline=%s stage=engine closed with %d records whose outcome is not known: the producer's thread does not"
            " answer; let no callback of a future wait", self._name, len(lost),
        )  # fmt: skip
        # Their callbacks may wait as well, and must not do it here. A late interpreter starts no thread: then nobody
        # is left who could wait for them.
        with contextlib.suppress(RuntimeError):
            threading.Thread(target=self._outcomes.fail, args=(lost, error), daemon=True).start()
        return len(lost)

    def _end(self, lost: int) -> bool:
        """Say how it ended; False when that was said before."""
        try:
            self._ended.set_result(lost)
        except concurrent.futures.InvalidStateError:
            return False
        return True

    def _is_full(self) -> bool:
        return len(self._queue) >= _QUEUE_RECORDS or self._queued_bytes >= _QUEUE_BYTES

    def _call(self, work: Callable[..., object], *args: Any) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(work, *args)

    def _ask(self, method: str, work: Callable[[], Coroutine[Any, Any, T]], timeout_s: float | None = None) -> T:
        self._not_in_the_loop(method)
        if self._state != "open" or self._loop is None:
            raise self._not_open()
        coroutine = work()
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:  # the loop was closed meanwhile
            coroutine.close()
            raise self._not_open() from None
        # Also the other one: a loop that is just being closed takes work, and never does it.
        either: list[concurrent.futures.Future[Any]] = [future, self._ended]
        concurrent.futures.wait(either, timeout_s, concurrent.futures.FIRST_COMPLETED)
        if future.cancelled() or (self._ended.done() and not future.done()):
            raise self._not_open()
        return future.result(0 if timeout_s is not None else None)

    def _not_in_the_loop(self, method: str) -> None:
        if threading.current_thread() is self._thread:
            raise LibraryError(
                f"{method} waits for the producer's own thread: call it from another, not from a callback"
            )

    def _not_open(self) -> ClosedError:
        if self._forked:
            return ClosedError(
                "this producer was made before the fork and belongs to the parent process: make a new one here"
            )
        if self._state == "closed":
            return ClosedError("this producer is closed: make a new one")
        return ClosedError("this producer is not started: use `with SyncProducer(...)` or call start()")

    # -- in its thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(self._work())
        except BaseException as error:  # noqa: BLE001 - whoever waits in another thread must hear of it
            if not self._started.done():
                self._started.set_exception(error)
        finally:
            self._end(self._fail_queue())

    async def _work(self) -> None:
        self._empty.set()
        self._loop = asyncio.get_running_loop()
        try:
            await self._producer.start()
        except BaseException:
            with self._room:
                self._state = "closed"
            raise
        with self._room:
            if self._state == "new":
                self._state = "open"
        _LIVE.add(self)
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # close() waited no longer
            self._started.set_result(None)
        taking = asyncio.create_task(self._take(), name=f"fastkin[{self._name}].queue")
        await self._closing.wait()
        limit = self._loop.time() + self._limit_s
        await asyncio.wait([asyncio.ensure_future(self._empty.wait()), taking], timeout=self._limit_s,
                           return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        left = self._fail_queue()
        if left:
            _LOG.error(
                "pipeline=%s stage=engine closed with %d records that found no room in the budget and are lost; raise"
                " close_timeout_s or budget_bytes", self._name, left,
            )  # fmt: skip
        lost = await self._producer.close(max(0.0, limit - self._loop.time()))
        self._end(lost + left)

    def _begin_close(self, timeout_s: float) -> None:
        self._limit_s = timeout_s
        self._closing.set()

    def _look(self) -> None:
        self._empty.clear()
        self._arrived.set()

    async def _take(self) -> None:
        """Put what is in the queue, in its order."""
        arrived, empty = self._arrived, self._empty
        while True:
            await arrived.wait()
            arrived.clear()
            while self._queue:
                waiting = self._queue[0]
                try:
                    receipt = await self._producer.put(*waiting[1:])
                except Exception as error:  # noqa: BLE001 - it belongs to who put
                    self._taken()
                    self._outcomes.tell(waiting.outcome, error)
                else:
                    self._taken()
                    receipt.add_done_callback(partial(self._outcomes.settle, waiting.outcome))
            with self._room:
                # Whoever appended since then has seen that the loop was woken, and did not do it again.
                if self._queue:
                    arrived.set()
                    continue
                self._woken = False
                empty.set()

    def _taken(self) -> None:
        with self._room:
            full = self._is_full()
            if not self._queue:  # close() has left this thread behind
                return
            self._queued_bytes -= len(self._queue.popleft().data)
            if full:
                self._room.notify_all()

    async def _flush(self) -> None:
        # The thread that flushes has put before: what it put is in the queue, or was taken from it.
        while self._queue:
            self._look()
            await self._empty.wait()
        await self._producer.flush()

    def _fail_queue(self) -> int:
        """What nobody will take any more."""
        with self._room:
            left = list(self._queue)
            self._queue.clear()
            self._queued_bytes = 0
            self._room.notify_all()
        for waiting in left:
            self._outcomes.tell(
                waiting.outcome, ClosedError("the producer was closed before there was room for the record")
            )
        return len(left)

    def _leave_behind(self) -> None:
        """In a forked process: its thread and its connections are the parent's."""
        self._state, self._forked = "closed", True
        self._room = threading.Condition()


def _left(limit: float) -> float:
    """Seconds until then, as a lock takes them."""
    return min(max(0.0, limit - time.monotonic()), threading.TIMEOUT_MAX)


# A child's atexit must not wait for threads that only the parent has.
_LIVE: OfThisProcess[SyncProducer] = OfThisProcess(lambda producer: producer._leave_behind())


# While atexit runs, daemon threads still do: those of the producers drain what was put.
@atexit.register
def _drain_all() -> None:
    for producer in _LIVE:
        producer.close()
