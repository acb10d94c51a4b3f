"""The embeddable producer: records in, receipts out, on the same stages as the service.

It is `Delivery` without an intake: what waits for room is the caller's `put`, and what hears of the end is a receipt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence  # noqa: TC003 - who reads our annotations needs it
from enum import Enum
from functools import partial
from pathlib import Path  # noqa: TC003
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from fastkin._codec import DRAIN, KeyPlan, Receipt
from fastkin.aws.transports import make_client
from fastkin.config import Kinesis
from fastkin.delivery.backlog import Policy  # noqa: TC001
from fastkin.delivery.delivery import Delivery, Options
from fastkin.delivery.stream_watch import StreamWatch
from fastkin.delivery.turns import Turns
from fastkin.errors import BudgetFull, ClosedError, ConfigError, LibraryError, RecordError, RecordsLost
from fastkin.formats.partition_key import KeySpecError, key_plan
from fastkin.limits import CALL_RECORDS, DEFAULT_CALL_BYTES, MIB, RECORD_BYTES
from fastkin.one_call import OneCall
from fastkin.record import Record
from fastkin.results import FrameResult, PutRecordsResult, PutResult  # noqa: TC001
from fastkin.runtime.deadline import Deadline
from fastkin.runtime.dropped import outlive, quiet
from fastkin.runtime.forks import OfThisProcess
from fastkin.settings.arguments import check_arguments, check_keys

if TYPE_CHECKING:
    from typing_extensions import Buffer as Buffer

    from fastkin.status.metrics import ProducerCollector
else:
    # What get_type_hints() shows. Python has a Buffer from 3.12 on, and the collector would load prometheus_client.
    Buffer = bytes | bytearray | memoryview
    ProducerCollector = Any

_LOG = logging.getLogger("fastkin.producer")
T = TypeVar("T")

_FIRST_LOOK_S = 3.0  # for the stream's mode and shards before the first put
_SPOOL_S = 5.0  # of the time that close() has, or a quarter of it: for what the spool has to take
_CLOSE_S = 1.0  # after that time: for what close() does besides

_running_loop = asyncio._get_running_loop  # None outside of a loop, where get_running_loop() raises
# What a child would send on its parent's sockets would be nonsense in the middle of a call.
_LIVE: OfThisProcess[Producer] = OfThisProcess(lambda producer: producer._leave_behind())


class _End(Enum):
    """What follows the last of some records: any other object, None too, may be one of them that is wrong."""

    END = 0


# Large because it is the public face: each way to put is a method of its own, and half of it is what they promise.
class Producer:
    """Puts records into one stream; batching, pacing, retries and memory bounds included.

        async with Producer("welders", region="eu-west-1") as producer:
            receipt = await producer.put(b"...")
            result = await receipt        # PutResult(shard_id, sequence_number), or raises

    `put` waits only for room in the budget. A receipt costs next to nothing until it is awaited. Leaving the
    block flushes and waits until everything has ended.
    """

    # Large because it is a table: each argument with its type and default on a line, as who calls it reads them, and
    # then its place in what it belongs to. A helper for either half would have to name most of them a third time.
    def __init__(
        self,
        stream: str | None = None,
        *,
        stream_arn: str | None = None,
        region: str | None = None,
        endpoint_url: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        session_token: str | None = None,
        profile: str | None = None,
        role_arn: str | None = None,
        external_id: str | None = None,
        session_name: str | None = None,
        transport: Literal["auto", "native", "sdk"] = "auto",
        api: Literal["put_records", "put_record"] = "put_records",
        partition_key: str = "uuid",
        linger_ms: float = 50.0,
        max_records: int = CALL_RECORDS,
        max_batch_bytes: int = DEFAULT_CALL_BYTES,
        max_record_bytes: int = RECORD_BYTES,
        max_connections: int = 16,
        request_timeout_s: float = 30.0,
        budget_bytes: int = 64 * MIB,
        budget_records: int = 1_000_000,
        aggregate_bytes: int = 0,
        shard_map: bool = True,
        on_full: Policy = "pause",
        spool: str | Path | None = None,
        spool_max_bytes: int = 1024 * MIB,
        spool_after_s: float = 5.0,
        delivery_timeout_s: float | None = None,
        close_timeout_s: float = 30.0,
    ) -> None:
        """One of `stream` and `stream_arn` is needed; credentials come from the SDK's chain unless given.

        api: "put_record": a call for each record, where kinesis:PutRecords is denied; slower and
            dearer, all else is the same.
        partition_key: the default for `put`: "uuid", "content" (made from the data by `content_key`: what is put
            again has the same key), "static:X", "field:a.b", "none" (only on streams that choose shards themselves).
        max_records, max_batch_bytes, max_record_bytes: limits of one call and one record; data before base64
            plus the UTF-8 bytes of the partition key (the API's PutRecords page).
        budget_bytes, budget_records: what may be held, buffered and in flight together.
        aggregate_bytes: above 0, records are packed in KPL aggregates up to that size, once it is known that the
            stream does not choose shards itself (needs kinesis:DescribeStreamSummary; without it they go one by one).
        shard_map: read the stream's shards to pace by shard (needs kinesis:ListShards; without the permission
            limits are learned from throttles).
        on_full: what happens when the budget is full, or when Kinesis has taken nothing for `spool_after_s`: "pause",
            `put` waits; "spool", batches go to the file `spool` (at most `spool_max_bytes`, one producer per file), and
            their receipts resolve to a PutResult with `spooled` set and no place, for the record is sent later, perhaps
            by the next producer that opens the file; "drop_oldest" and "drop_newest", whole batches are given up, and
            their receipts raise RecordDropped.
        delivery_timeout_s: a receipt without an outcome raises DeliveryTimeout so long after its `put` (and up to an
            eighth more), which says whether the record may have been stored; None: it waits as long as Kinesis fails.
            Not with a spool: what is there has its outcome.
        close_timeout_s: how long close() waits for outcomes, and leaving the block, which raises RecordsLost when some
            are missing then.

        A producer belongs to the event loop that started it: use from another thread, loop or forked process raises
        LibraryError or ClosedError; SyncProducer is for these.

        LibraryError: an argument is wrong. Nothing is sent and no file or socket is opened here.
        """
        check_arguments(locals())
        if not (stream or stream_arn):
            raise LibraryError("Non empty argument required: stream or stream_arn")
        check_keys(access_key, secret_key)
        if (on_full == "spool") != (spool is not None):
            raise LibraryError('on_full="spool" and spool="FILE" go together')
        if on_full == "spool" and delivery_timeout_s is not None:
            raise LibraryError("delivery_timeout_s: a spool gives every record its outcome; leave out one of them")
        try:
            kind, parts = key_plan(partition_key)
            if any(part[0] in {"topic", "level"} for part in parts):
                raise LibraryError(f"partition_key {partition_key!r}: what is put has no topic; name the key in put()")
            settings = Kinesis(
                stream=stream, stream_arn=stream_arn, region=region, endpoint_url=endpoint_url,
                access_key=access_key, secret_key=secret_key, session_token=session_token,
                profile=profile, role_arn=role_arn, external_id=external_id, session_name=session_name,
                transport=transport, api=api, max_connections=max_connections, request_timeout_s=request_timeout_s,
            )  # fmt: skip
            self._name = stream or str(stream_arn)
            self._client = make_client(settings, self._name)
            options = Options(
                budget_bytes=budget_bytes, budget_records=budget_records, max_records=max_records,
                max_batch_bytes=max_batch_bytes, max_record_bytes=max_record_bytes, max_calls=max_connections,
                aggregate_bytes=aggregate_bytes, linger_s=linger_ms / 1000, on_full=on_full, spool=spool,
                spool_max_bytes=spool_max_bytes, spool_after_s=spool_after_s, delivery_timeout_s=delivery_timeout_s,
            )  # fmt: skip
            # An eighth is left for what is not charged record by record: answers, buffers, the allocator.
            self._delivery = Delivery(
                self._client, options, name=self._name, stream=self._name, key=KeyPlan(kind, parts),
                keep_bytes=budget_bytes // 8,
            )  # fmt: skip
        except (ConfigError, KeySpecError) as error:
            raise LibraryError(str(error)) from None
        self._batcher = self._delivery.batcher
        self._calls = OneCall(self._client, max_record_bytes)
        self._watch = StreamWatch(
            self._delivery, shards=shard_map, limits=False, cure="leave aggregate_bytes 0",
            misfit=lambda problem: LibraryError(f"aggregate_bytes: {problem}; leave it 0"),
        )  # fmt: skip
        self._looks = shard_map or aggregate_bytes > 0
        self._spools = on_full == "spool"
        self._attend: Callable[[], None] | None = None  # from start() until close() is called
        self._turns = Turns(self._delivery.budget)
        self._close_timeout_s = close_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None  # the one that started it
        self._opened = False  # what sends was made
        self._closed = False
        self._forked = False
        self._last_error: str | None = None  # once it is closed
        self._closing: asyncio.Task[int] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._guard: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()  # who closes us will not wait
        self._starting = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        lost = await self.close()
        # Another error is on its way and must not be hidden by this one, which was logged.
        if lost and error is None:
            raise RecordsLost(lost, self._last_error)

    async def start(self) -> None:
        """Find credentials and endpoint, look at the stream for a moment.

        KinesisError when the credentials cannot be had; LibraryError when the stream takes no aggregates.
        """
        async with self._starting:
            if self._closed:
                raise self._not_open()
            if self._attend is not None:
                return
            try:
                await self._start()
            except BaseException:
                await self._client.close()
                raise

    async def _start(self) -> None:
        delivery = self._delivery
        self._loop = asyncio.get_running_loop()
        _LIVE.add(self)
        await self._client.start()
        delivery.open(on_settled=self._turns.call, stuck=self.stuck)
        if self._looks:
            await self._first_look()
        await delivery.backlog.start()
        if self._closed:  # close() came while we were asking
            await delivery.backlog.close()
            await self._end_watch()
            raise self._not_open()
        self._opened = True
        self._attend = delivery.flusher.attend
        self._batcher.belong(self._loop.is_running, self._attend)
        delivery.watchdog.start()
        if delivery.expiry is not None:
            delivery.expiry.start()
        guard = asyncio.get_running_loop().create_task(outlive(self._loop_ended), name=f"fastkin[{self._name}].guard")
        self._guard = quiet(guard)

    def _loop_ended(self) -> None:
        if self._closed:
            return
        self._take_no_more()
        if self._batcher.in_flight:
            _LOG.warning(
                "pipeline=%s stage=engine the event loop ended and close() was never called: %d records were not"
                " stored; use `async with Producer(...)`", self._name, self._batcher.in_flight,
            )  # fmt: skip
        self._delivery.abort()

    async def _first_look(self) -> None:
        """At the stream's mode and shards. Not needed to put, so not waited for long."""
        first = asyncio.Event()
        watch = asyncio.create_task(self._watch_stream(first), name=f"fastkin[{self._name}].shards")
        self._watching = quiet(watch)
        looked = asyncio.create_task(first.wait())
        try:
            await asyncio.wait([looked, self._watching], timeout=_FIRST_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            if self._watching.done() and not self._watching.cancelled():  # close() may have come
                self._watching.result()  # an argument that the stream does not fit
        except BaseException:
            await self._end_watch()
            raise
        finally:
            looked.cancel()
        self._watch.settled_in = True
        self._watch.say_unknown_mode()

    async def _watch_stream(self, first: asyncio.Event) -> None:
        await self._watch.look()
        first.set()
        await self._watch.run()

    async def _end_watch(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def put(
        self,
        data: Buffer,
        partition_key: str | None = None,
        explicit_hash_key: str | None = None,
    ) -> Receipt[PutResult]:
        """Take one record; wait only while the budget is full.

        data: bytes, bytearray or memoryview, 0 bytes up to max_record_bytes less the key.
        partition_key: 1..256 characters; None: as the producer was told.
        explicit_hash_key: decimal, 0..2**128-1.

        RecordError: the record can never be stored. ClosedError: the producer is not open.
        """
        receipt = self._batcher.put_if_room(data, partition_key, explicit_hash_key)
        if receipt is not None:
            return receipt
        # not a lambda: its closure would make cells of the arguments on every call
        return await self._in_turn(partial(self._batcher.put, data, partition_key, explicit_hash_key))

    def put_nowait(
        self,
        data: Buffer,
        partition_key: str | None = None,
        explicit_hash_key: str | None = None,
        *,
        callback: Callable[[BaseException | None, PutResult | None], object] | None = None,
    ) -> Receipt[PutResult]:
        """Take one record now, without waiting: from a callback, or where nobody awaits.

        callback(error, result): called once when the outcome is known, with one of the two and None for the other. It
        runs where answers are settled, so it should be short; what it raises goes to sys.unraisablehook.

        BudgetFull: there is no room; nothing was taken. Else as put().
        """
        receipt = self._batcher.put_if_room(data, partition_key, explicit_hash_key)
        if receipt is None:
            if self._attend is None or _running_loop() is not self._loop:
                raise self._not_usable()
            raise BudgetFull("no room in the budget: await put(), which waits for it, or raise budget_bytes")
        if callback is not None:
            receipt.add_done_callback(partial(_tell, callback))
        return receipt

    async def put_and_wait(
        self, data: Buffer, partition_key: str | None = None, explicit_hash_key: str | None = None
    ) -> PutResult:
        """put() and its outcome in one: where the record is stored, or what its receipt raises."""
        return await (await self.put(data, partition_key, explicit_hash_key))

    async def put_many(self, records: Iterable[Buffer | Record]) -> list[Receipt[PutResult]]:
        """put() for each, in their order; a Record has its own key, the others the producer's.

        RecordError says which one can never be stored, LibraryError which one is none, ClosedError at which one the
        producer was closed; each has the receipts of those before it, which were taken, in `receipts`.
        `prev_sequence_number` of a Record is not sent.
        """
        receipts: list[Receipt[PutResult]] = []
        rest = iter(records)
        try:
            # Most are taken in compiled code; what is left is what must wait, has a key of its own, or is wrong.
            while (each := self._batcher.put_while_room(rest, receipts, _End.END)) is not _End.END:
                if isinstance(each, Record):
                    receipts.append(await self.put(each.payload, each.partition_key, each.explicit_hash_key))
                else:
                    receipts.append(await self.put(each))
        except (RecordError, LibraryError, ClosedError) as error:
            told = type(error)(f"records[{len(receipts)}]: {error}")
            told.receipts = tuple(receipts)
            raise told from None
        return receipts

    async def put_frame(self, payload: Buffer) -> Receipt[FrameResult]:
        """Take every record of a bulk frame under one receipt (FrameResult). DataFormatError: none was taken."""
        attend = self._attend
        if attend is None or _running_loop() is not self._loop:
            raise self._not_usable()
        if self._delivery.budget.full or self._delivery.budget.waiting:
            return await self._in_turn(partial(self._batcher.put_frame, payload))
        receipt = self._batcher.put_frame(payload)
        if self._batcher.dirty:
            attend()
        return receipt

    async def put_record(self, record: Record) -> PutResult:
        """Store one record now: exactly one PutRecord request, no batching, no pacing, no retry. Not in stats().

        LibraryError: the argument is wrong, nothing was sent. RequestFailed: Kinesis said no, or nobody answered;
        whether the record is stored is unknown for a TransportError that is not NotSent, and for a status of 500 or
        more. UnexpectedResponse: the answer cannot be read. ClosedError: the producer is not open.
        """
        if self._attend is None or _running_loop() is not self._loop:
            raise self._not_usable()
        return await self._calls.put_record(record, auto_keys=self._watch.auto_keys)

    async def put_records(self, records: Sequence[Record]) -> PutRecordsResult:
        """Store up to 500 records now: exactly one PutRecords request, no pacing, no retry. Not in stats().

        Results are in the order of the records; what failed alone has an `error_code` and is for the caller to send
        again. `prev_sequence_number` of a record is not sent, for PutRecords knows none. Errors as of `put_record`,
        when the call failed as a whole; `failed_record_count` is the number of records then.
        """
        if self._attend is None or _running_loop() is not self._loop:
            raise self._not_usable()
        return await self._calls.put_records(records)

    async def flush(self) -> None:
        """Send what is open now; return when every receipt given so far has ended, well or not, or is spooled."""
        if self._attend is None or _running_loop() is not self._loop:
            raise self._not_usable()
        await self._delivery.flush()

    async def close(self, timeout_s: float | None = None) -> int:
        """Flush, then close. Returns how many records did not end in time: their receipts raise ClosedError, and one
        ERROR says how many and why. timeout_s: None for `close_timeout_s`.

        With a spool they go there instead, and do not count; the next producer that opens the file sends them.

        May be called again, and while another call is closing: all return the same. A `put` that waits for room
        raises ClosedError. When the caller is cancelled the flush is cut short, the rest is done all the same.
        """
        if self._loop is not None and _running_loop() is not self._loop and self._closing is None and not self._closed:
            raise self._not_usable()
        if self._closing is None:
            if timeout_s is None:
                timeout_s = self._close_timeout_s
            self._take_no_more()
            self._closing = asyncio.create_task(self._close(timeout_s), name=f"fastkin[{self._name}].close")
        closing = self._closing
        try:
            return await asyncio.shield(closing)
        except asyncio.CancelledError:
            if not closing.done():
                self._hurry.set()
                await asyncio.wait([closing])
            raise

    async def _close(self, timeout_s: float) -> int:
        error = ClosedError("the producer was closed before Kinesis stored the record")
        self._turns.close(error)
        if self._delivery.expiry is not None:
            self._delivery.expiry.stop()
        if self._guard is not None:
            self._guard.cancel()
        unsettled = 0
        limit = Deadline(timeout_s + _CLOSE_S, self._name)
        await self._end_watch()
        try:
            if self._opened:
                await self._drain(timeout_s)
        finally:
            if self._opened:
                self._last_error = self._delivery.sender.last_error
                await self._delivery.close(limit, spool_limit=limit.until(before=_CLOSE_S / 2))
                unsettled = self._delivery.give_up(error)
                if unsettled:
                    _LOG.error(
                        "pipeline=%s stage=engine closed with %d records without an outcome, which may be lost (last"
                        " error: %s); raise close_timeout_s, or give on_full=\"spool\"",
                        self._name, unsettled, self._last_error or "none",
                    )  # fmt: skip
            await limit.wait(self._client.close(), "closing the connections")
        return unsettled

    async def _drain(self, timeout_s: float) -> None:
        """Until all has ended, or the time for that is over, or somebody is in a hurry."""
        self._delivery.drain()
        flushed = asyncio.create_task(self._delivery.sender.flush())
        hurried = asyncio.create_task(self._hurry.wait())
        # with a spool, a part of the time is for what it has to take
        share = timeout_s - min(timeout_s / 4, _SPOOL_S) if self._spools else timeout_s
        await asyncio.wait([flushed, hurried], timeout=share, return_when=asyncio.FIRST_COMPLETED)
        for task in (flushed, hurried):
            task.cancel()
        await asyncio.gather(flushed, hurried, return_exceptions=True)

    @property
    def last_error(self) -> str | None:
        """What kept records from being stored lately, in words; None when nothing did."""
        if self._opened and not self._closed:
            return self._delivery.sender.last_error
        return self._last_error

    def stats(self) -> dict[str, Any]:
        """Counters, in records: received == stored + dead_lettered + dropped + in_flight + spooled.

        dropped: refused, given up by `on_full`, or closed too early; dead_lettered: damaged in the spool.
        """
        return self._delivery.stats()

    def metrics(self) -> ProducerCollector:
        """For a prometheus_client registry: `registry.register(producer.metrics())`, in this loop, after start().

        ClosedError, LibraryError: as put().
        """
        if self._attend is None or _running_loop() is not self._loop:
            raise self._not_usable()
        from fastkin.status.metrics import ProducerCollector  # prometheus_client is for who asks

        return ProducerCollector(self._name, self._delivery)

    def _not_usable(self) -> ClosedError | LibraryError:
        if self._attend is None:
            return self._not_open()
        return LibraryError(
            "this producer belongs to another event loop or thread, the one that started it: make one in each loop, or"
            " use SyncProducer, which every thread may use"
        )

    def _take_no_more(self) -> None:
        self._closed, self._attend = True, None
        self._batcher.leave()

    def _leave_behind(self) -> None:
        """In a forked process: its loop and its connections are the parent's."""
        self._take_no_more()
        self._forked = True

    def _not_open(self) -> ClosedError:
        if self._forked:
            return ClosedError(
                "this producer was made before the fork and belongs to the parent process: make a new one here"
            )
        if self._closed:
            return ClosedError("this producer is closed: make a new one")
        return ClosedError("this producer is not started: use `async with Producer(...)` or await start()")

    async def _in_turn(self, put: Callable[[], Receipt[T]]) -> Receipt[T]:
        """The same when the budget is full, or somebody waits already, or whoever calls must not."""
        attend = self._attend
        if attend is None or _running_loop() is not self._loop:
            raise self._not_usable()

        def make_room() -> None:
            self._delivery.flusher.close(DRAIN)
            self._delivery.backlog.attend()

        async with self._turns.turn(make_room):
            if self._closed:  # meanwhile: nobody would send what we put
                raise self._not_open()
            receipt = put()
        if self._batcher.dirty:
            attend()
        return receipt

    def stuck(self) -> str | None:
        """What waits and will be looked at by nobody; None between any two callbacks, or there is a bug."""
        if self._attend is None:
            return None
        return self._delivery.stuck() or self._turns.stuck(self._batcher.in_flight)


def _tell(callback: Callable[[BaseException | None, PutResult | None], object], receipt: Receipt[PutResult]) -> None:
    error = receipt.exception()
    callback(error, None if error is not None else receipt.result())
