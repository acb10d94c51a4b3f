"""The embeddable producer: records in, receipts out, on the same stages as the service."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from fastkin._codec import DRAIN, FAILED, KeyPlan, Lane, ShardTable
from fastkin.aws.shards import ShardMap
from fastkin.aws.transports import make_client
from fastkin.config import MIB, Kinesis
from fastkin.delivery.backlog import Overflow, Policy, batch_limit, shares
from fastkin.delivery.flusher import Flusher
from fastkin.delivery.sender import Sender
from fastkin.delivery.turns import Turns
from fastkin.delivery.watchdog import Watchdog, unattended
from fastkin.errors import ClosedError, ConfigError, KinesisError, LibraryError, RecordFailed
from fastkin.formats.partition_key import KeySpecError, key_plan
from fastkin.runtime.deadline import Deadline
from fastkin.runtime.dropped import outlive, quiet
from fastkin.settings.arguments import check_arguments

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typing_extensions import Buffer

    from fastkin._codec import Batch, Receipt

_LOG = logging.getLogger("fastkin.producer")

_FIRST_LOOK_S = 3.0  # for the stream's mode and shards before the first put
_SHARDS_LOOK_S = 30.0  # how often to see whether an answer named a shard that the map does not have
_SPOOL_S = 5.0  # of the time that close() has, or a quarter of it: for what the spool has to take
_CLOSE_S = 1.0  # after that time: for what close() does besides
_SHARDS_LOOKS = 10  # the map is read again after this many looks in any case


class Producer:
    """Puts records into one stream; batching, pacing, retries and memory bounds included.

        async with Producer("welders", region="eu-west-1") as producer:
            receipt = await producer.put(b"...")
            result = await receipt        # PutResult(shard_id, sequence_number), or raises

    `put` waits only for room in the budget. A receipt costs next to nothing until it is awaited. Leaving the
    block flushes and waits until everything has ended.
    """

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
        partition_key: str = "uuid",
        linger_ms: float = 50.0,
        max_records: int = 500,
        max_batch_bytes: int = 5 * MIB,
        max_record_bytes: int = 1 * MIB,
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
    ) -> None:
        """One of `stream` and `stream_arn` is needed; credentials come from the SDK's chain unless given.

        partition_key: the default for `put`: "uuid", "static:X", "field:a.b", "none" (only on streams that
            choose shards themselves).
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

        LibraryError: an argument is wrong. Nothing is sent and no file or socket is opened here.
        """
        check_arguments(locals())
        if not (stream or stream_arn):
            raise LibraryError("Non empty argument required: stream or stream_arn")
        if (on_full == "spool") != (spool is not None):
            raise LibraryError('on_full="spool" and spool="FILE" go together')
        max_batch_bytes = batch_limit(max_batch_bytes, max_record_bytes, budget_bytes, on_full)
        try:
            kind, parts = key_plan(partition_key)
            if any(part[0] in {"topic", "level"} for part in parts):
                raise LibraryError(f"partition_key {partition_key!r}: what is put has no topic; name the key in put()")
            self._settings = Kinesis(
                stream=stream, stream_arn=stream_arn, region=region, endpoint_url=endpoint_url,
                access_key=access_key, secret_key=secret_key, session_token=session_token,
                profile=profile, role_arn=role_arn, external_id=external_id, session_name=session_name,
                transport=transport, max_connections=max_connections, request_timeout_s=request_timeout_s,
            )  # fmt: skip
            self._client = make_client(self._settings, stream or stream_arn)
            self._budget, self._rows = shares(budget_bytes - budget_bytes // 8, budget_records, on_full)
            self._lane = Lane(
                settler=None, budget=self._budget, frame="raw", key=KeyPlan(kind, parts),
                target=self._client.target_json(), max_records=max_records,
                max_batch_bytes=max_batch_bytes, max_record_bytes=max_record_bytes,
                aggregate_bytes=aggregate_bytes,
                rows=None if self._rows is None else self._rows.settler,
                replay=None if self._rows is None else self._rows.budget,
            )  # fmt: skip
        except (ConfigError, KeySpecError) as error:
            raise LibraryError(str(error)) from None
        # Nothing is aggregated before it is known that the stream does not choose shards itself.
        self._aggregate_bytes = self._lane.aggregate_bytes
        self._lane.aggregate_bytes = 0
        self._said = ""
        self._stream = stream or str(stream_arn)
        self._linger_s = linger_ms / 1000
        self._max_records = max_records
        self._max_batch_bytes = max_batch_bytes
        self._wants_shards = shard_map
        self._on_full: Policy = on_full
        self._spool = spool
        self._spool_max_bytes = spool_max_bytes
        self._spool_after_s = spool_after_s
        self._overflow: Overflow | None = None
        self._sender: Sender | None = None
        self._flusher: Flusher | None = None
        self._attend: Callable[[], None] | None = None  # the flusher's, from start() until close() is called
        self._watchdog: Watchdog | None = None
        self._turns = Turns(self._budget)
        self._closed = False
        self._closing: asyncio.Task[int] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._guard: asyncio.Task[None] | None = None
        self._flowing = False  # the first look at the stream is over
        self._hurry = asyncio.Event()  # who closes us will not wait
        self._starting = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Find credentials and endpoint, look at the stream for a moment.

        KinesisError when the credentials cannot be had; LibraryError when the stream takes no aggregates.
        """
        async with self._starting:
            if self._closed:
                raise self._not_open()
            if self._sender is not None:
                return
            try:
                await self._start()
            except BaseException:
                await self._client.close()
                raise

    async def _start(self) -> None:
        await self._client.start()
        sender = Sender(
            self._lane,
            self._client,
            name=self._stream,
            stream=self._stream,
            max_calls=self._settings.max_connections,
            set_aside=_refuse,
            on_settled=self._settled,
            max_records=self._max_records,
            max_batch_bytes=self._max_batch_bytes,
            harmless=self._client.harmless,
        )
        if self._wants_shards or self._aggregate_bytes:
            await self._first_look(sender)
        overflow: Overflow | None = None
        if self._on_full != "pause":
            overflow = Overflow(
                self._lane, sender, self._budget, name=self._stream, policy=self._on_full, on_settled=self._settled,
                rows=self._rows, path=self._spool, max_bytes=self._spool_max_bytes, after_s=self._spool_after_s,
                max_records=self._max_records, max_batch_bytes=self._max_batch_bytes,
            )  # fmt: skip
            await overflow.start()
        if self._closed:  # close() came while we were asking
            if overflow is not None:
                await overflow.close()
            await self._end_watch()
            raise self._not_open()
        loop = asyncio.get_running_loop()
        self._overflow = overflow
        self._flusher = Flusher(self._lane, overflow or sender, self._linger_s, loop)
        self._attend = self._flusher.attend
        self._sender = sender
        self._watchdog = Watchdog(self._stream, loop, self.stuck, self._wake)
        self._watchdog.start()
        self._guard = quiet(loop.create_task(outlive(self._loop_ended), name=f"fastkin[{self._stream}].guard"))

    def _loop_ended(self) -> None:
        if self._closed:
            return
        self._closed, self._attend = True, None
        if self._lane.in_flight:
            _LOG.warning(
                "pipeline=%s stage=engine the event loop ended and close() was never called: %d records were not"
                " stored; use `async with Producer(...)`", self._stream, self._lane.in_flight,
            )  # fmt: skip
        if self._sender is not None and self._flusher is not None:
            self._sender.abort()
            self._flusher.stop()
        self._client.abort()

    async def _first_look(self, sender: Sender) -> None:
        """At the stream's mode and shards. Not needed to put, so not waited for long."""
        first = asyncio.Event()
        watch = asyncio.create_task(self._watch(sender, first), name=f"fastkin[{self._stream}].shards")
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
        self._flowing = True
        if self._aggregate_bytes and not self._lane.aggregate_bytes:
            self._say(
                logging.WARNING,
                f"it is not known whether stream {self._stream} chooses shards itself, and there consumers drop"
                " aggregates: records go out one by one until it is; allow kinesis:DescribeStreamSummary",
            )

    async def _look_at_mode(self) -> None:
        """Aggregate on a stream that is known to take it."""
        if not self._aggregate_bytes:
            return
        try:
            summary = await self._client.describe()
        except KinesisError:
            return  # not known now: asked again
        if not summary.auto_keys:
            self._lane.aggregate_bytes = self._aggregate_bytes
        else:
            problem = f"stream {summary.name} chooses shards itself, and consumers drop aggregates on it"
            if not self._flowing:
                raise LibraryError(f"aggregate_bytes: {problem}; leave it 0")
            self._lane.aggregate_bytes = 0
            self._say(logging.ERROR, f"{problem}: records go out one by one; leave aggregate_bytes 0")
        if self._lane.attention and self._flusher is not None:
            self._flusher.attend()

    def _say(self, level: int, text: str) -> None:
        if text != self._said:
            _LOG.log(level, "pipeline=%s stage=batch %s", self._stream, text)
        self._said = text

    async def _read_shards(self, sender: Sender) -> None:
        try:
            shards = ShardMap(await self._client.list_shards())
            if sender.shards is None or sender.shards.ids != shards.ids:
                self._lane.shards = ShardTable(shards.ends)
                sender.set_shards(shards)
        except Exception as error:  # noqa: BLE001 - no answer may end what sends the records
            # not allowed, or the stream is not there yet: throttles are learned from answers
            _LOG.debug("pipeline=%s stage=send no shard map: %s", self._stream, error)

    async def _watch(self, sender: Sender, first: asyncio.Event) -> None:
        """Splits and merges: look again now and then, sooner when an answer names a shard that is not known."""
        looks = 0
        seen: set[str] = set()  # asked about once
        await self._look_at_mode()
        if self._wants_shards:
            await self._read_shards(sender)
        first.set()
        while True:
            await asyncio.sleep(_SHARDS_LOOK_S)
            looks += 1
            known = sender.shards
            strange = {s for s in sender.throttled if s and known is not None and known.ordinal(s) is None} - seen
            again = looks >= _SHARDS_LOOKS
            if again or not self._lane.aggregate_bytes:
                await self._look_at_mode()
            if self._wants_shards and (strange or again):
                seen |= strange
                await self._read_shards(sender)
            if again:
                looks = 0

    async def _end_watch(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    async def put(
        self,
        data: Buffer,
        partition_key: str | None = None,
        explicit_hash_key: str | None = None,
    ) -> Receipt:
        """Take one record; wait only while the budget is full.

        data: bytes, bytearray or memoryview, 0 bytes up to max_record_bytes less the key.
        partition_key: 1..256 characters; None: as the producer was told.
        explicit_hash_key: decimal, 0..2**128-1.

        RecordError: the record can never be stored. ClosedError: the producer is not open.
        """
        attend = self._attend
        if attend is None:
            raise self._not_open()
        if not self._turns.waiting:
            receipt = self._lane.put_if_room(data, partition_key, explicit_hash_key, attend)
            if receipt is not None:
                return receipt
        # not a lambda: its closure would make cells of the arguments on every call
        return await self._in_turn(attend, partial(self._lane.put, data, partition_key, explicit_hash_key))

    async def put_frame(self, payload: Buffer) -> Receipt:
        """Take every record of a bulk frame under one receipt (FrameResult). DataFormatError: none was taken."""
        attend = self._attend
        if attend is None:
            raise self._not_open()
        if self._budget.full or self._turns.waiting:
            return await self._in_turn(attend, partial(self._lane.put_frame, payload))
        receipt = self._lane.put_frame(payload)
        if self._lane.attention:
            attend()
        return receipt

    async def flush(self) -> None:
        """Send what is open now; return when every receipt given so far has ended, well or not, or is spooled."""
        if self._attend is None or self._flusher is None or self._sender is None:
            raise self._not_open()
        self._flusher.close(DRAIN)
        await self._sender.flush()

    async def close(self, timeout_s: float = 30.0) -> int:
        """Flush, then close. Returns how many records did not end in time: their receipts raise ClosedError.

        With a spool they go there instead, and do not count; the next producer that opens the file sends them.

        May be called again, and while another call is closing: all return the same. A `put` that waits for room
        raises ClosedError. When the caller is cancelled the flush is cut short, the rest is done all the same.
        """
        if self._closing is None:
            self._closed, self._attend = True, None
            self._closing = asyncio.create_task(self._close(timeout_s), name=f"fastkin[{self._stream}].close")
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
        sender, flusher = self._sender, self._flusher
        if self._guard is not None:
            self._guard.cancel()
        unsettled = 0
        limit = Deadline(timeout_s + _CLOSE_S, self._stream)
        await self._end_watch()
        try:
            if sender is not None and flusher is not None:
                flusher.close(DRAIN)
                if self._overflow is not None:
                    self._overflow.drain()
                flushed = asyncio.create_task(sender.flush())
                hurried = asyncio.create_task(self._hurry.wait())
                # with a spool, a part of the time is for what it has to take
                share = timeout_s - min(timeout_s / 4, _SPOOL_S) if self._on_full == "spool" else timeout_s
                await asyncio.wait([flushed, hurried], timeout=share, return_when=asyncio.FIRST_COMPLETED)
                for task in (flushed, hurried):
                    task.cancel()
                await asyncio.gather(flushed, hurried, return_exceptions=True)
        finally:
            if sender is not None and flusher is not None:
                self._flusher = None
                if self._watchdog is not None:
                    self._watchdog.stop()
                flusher.stop()
                await limit.wait(sender.close(), "ending the calls")
                if self._overflow is not None:
                    await self._overflow.close(limit.until(before=_CLOSE_S / 2))
                unsettled = self._lane.in_flight
                unsaved = self._overflow.unsaved() if self._overflow is not None else []
                for batch in (*sender.unsent(), *unsaved):
                    batch.finish(FAILED, error)
                self._lane.abandon(error)
            await limit.wait(self._client.close(), "closing the connections")
        return unsettled

    def stats(self) -> dict[str, Any]:
        """Counters, in records: received == stored + dead_lettered + dropped + in_flight + spooled.

        dropped: refused, given up by `on_full`, or closed too early; dead_lettered: damaged in the spool.
        """
        lane, sender = self._lane, self._sender
        return {
            "received": lane.received,
            "stored": lane.stored,
            "dropped": lane.dropped,
            "dead_lettered": lane.dead_lettered,
            "in_flight": lane.in_flight,
            "spooled": lane.spooled,
            "buffered_bytes": self._budget.bytes,
            "peak_bytes": self._budget.peak_bytes,
            "calls": sender.calls if sender else 0,
            "retries": sender.retried if sender else 0,
            "throttled": sum(sender.throttled.values()) if sender else 0,
            "duplicates_possible": sender.duplicates_possible if sender else 0,
            "last_error": sender.last_error if sender else None,
            "stalls": self._watchdog.stalls if self._watchdog else 0,
        } | (self._overflow.stats() if self._overflow is not None else {})

    def _not_open(self) -> ClosedError:
        if self._closed:
            return ClosedError("this producer is closed: make a new one")
        return ClosedError("this producer is not started: use `async with Producer(...)` or await start()")

    async def _in_turn(self, attend: Callable[[], None], put: Callable[[], Receipt]) -> Receipt:
        """The same when the budget is full, or somebody waits already."""

        def make_room() -> None:
            if self._flusher is not None:
                self._flusher.close(DRAIN)
            if self._overflow is not None:
                self._overflow.attend()

        async with self._turns.turn(make_room):
            if self._closed:  # meanwhile: nobody would send what we put
                raise self._not_open()
            receipt = put()
        if self._lane.attention:
            attend()
        return receipt

    def _settled(self) -> None:
        if self._overflow is not None and self._budget.full:
            self._overflow.attend()
        self._turns.call()

    def stuck(self) -> str | None:
        """What waits and will be looked at by nobody; None between any two callbacks, or there is a bug."""
        if self._sender is None or self._flusher is None:
            return None
        found = unattended(self._lane, self._sender, self._flusher, self._overflow)
        if found is None:
            found = self._turns.stuck(self._lane.in_flight)
        return found

    def _wake(self) -> None:
        if self._flusher is not None and self._sender is not None:
            self._flusher.attend()
            self._flusher.close(DRAIN)
            self._sender.pump()
            self._settled()


def _refuse(batch: Batch, reason: str) -> None:
    code, _, message = reason.partition(": ")
    if batch.restored:  # its receipts said "spooled" long ago: nobody is told of its end
        _LOG.error(
            "stage=send %d records that came back from the spool are refused for good and dropped: %s",
            batch.user_records, reason,
        )  # fmt: skip
    batch.finish(FAILED, RecordFailed(code, message))
