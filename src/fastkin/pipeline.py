"""One pipeline: wires intake, lane, sender, acknowledgements and dead letters together.

Each pipeline has its own MQTT connection, ledger, budget, lane and sender. That way a stream that is down
holds back its own pipeline only: acknowledgements leave in PUBLISH order per connection, so a shared
connection would make every pipeline wait for the slowest.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Any

import orjson

from fastkin._codec import DEAD, DRAIN, DROPPED, WINDOW, Budget, KeyPlan, Lane, ShardTable
from fastkin._mqtt import CallbackSink, Ledger, Router
from fastkin.deadletter import DeadLetterError, DeadLetters
from fastkin.errors import Action, ConfigError, KinesisError
from fastkin.flusher import Flusher
from fastkin.intake import Intake
from fastkin.keys import key_plan
from fastkin.kinesis import make_client
from fastkin.overflow import Overflow, batch_limit, shares
from fastkin.sender import Sender
from fastkin.shards import ShardMap

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fastkin._codec import Batch, Reject, Sink
    from fastkin.config import Broker, Pipeline
    from fastkin.kinesis import Client

_LOG = logging.getLogger("fastkin.pipeline")

_RETRY_S = 5.0  # between attempts at what an operator must mend: credentials, a dead-letter disk
_SHARDS_LOOK_S = 30.0  # how often to see whether an answer named a shard that the map does not have
_SHARDS_LOOKS = 10  # the map is read again after this many looks in any case
_HEX_BYTES = 32  # of a bad payload shown in the log
# KPL's AggregationMaxSize: a record costs a few bytes of overhead, and a retry stays cheap
_AGGREGATE_BYTES = 51_200


class PipelineRun:
    """One pipeline at work."""

    def __init__(
        self,
        pipeline: Pipeline,
        broker: Broker,
        *,
        on_settled: Callable[[str], None] | None = None,
        on_message: Callable[[str, bytes, bytes], None] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.name = pipeline.id
        self._loop = asyncio.get_running_loop()
        self._hook = on_settled
        self._on_message = on_message
        self.failure: asyncio.Future[None] = self._loop.create_future()
        self.client: Client = make_client(pipeline.kinesis)
        # An eighth is left for what is not charged record by record: ledger, receive buffer, answers, allocator.
        self.budget, rows = shares(
            pipeline.budget_bytes - pipeline.budget_bytes // 8, pipeline.budget_records, pipeline.on_full
        )
        max_batch_bytes = batch_limit(
            pipeline.max_batch_bytes, pipeline.max_record_bytes, pipeline.budget_bytes, pipeline.on_full
        )
        self.ledger = Ledger()
        kind, parts = key_plan(pipeline.partition_key, client_id=broker.client_id, hostname=socket.gethostname())
        self.lane = Lane(
            settler=self.ledger,
            budget=self.budget,
            frame=pipeline.format,
            key=KeyPlan(kind, parts),
            target=self.client.target_json(),
            max_records=pipeline.max_records,
            max_batch_bytes=max_batch_bytes,
            max_record_bytes=pipeline.max_record_bytes,
            aggregate_bytes=min(_AGGREGATE_BYTES, pipeline.max_record_bytes) if pipeline.aggregation == "kpl" else 0,
            rows=None if rows is None else rows.settler,
            replay=None if rows is None else rows.budget,
        )
        self._static_key = kind == "parts" and all(part[0] == "text" for part in parts)
        router = Router()
        sink: Sink = self.lane if on_message is None else CallbackSink(self._tap)
        for topic in pipeline.topics:
            router.add(topic, sink)
        self.sender = Sender(
            self.lane,
            self.client,
            name=self.name,
            max_calls=pipeline.kinesis.max_connections,
            set_aside=self._set_aside,
            on_settled=self._settled,
            max_records=pipeline.max_records,
            max_batch_bytes=max_batch_bytes,
        )
        self.overflow: Overflow | None = None
        if pipeline.on_full != "pause":
            self.overflow = Overflow(
                self.lane,
                self.sender,
                self.budget,
                name=self.name,
                policy=pipeline.on_full,
                on_settled=self._settled,
                rows=rows,
                path=pipeline.spool,
                max_bytes=pipeline.spool_max_bytes,
                after_s=pipeline.spool_after_s,
            )
        self.flusher = Flusher(self.lane, self.overflow or self.sender, pipeline.linger_ms / 1000, self._loop)
        self.intake = Intake(
            broker,
            [(topic, pipeline.qos) for topic in pipeline.topics],
            router=router,
            ledger=self.ledger,
            on_read=self._read,
            name=self.name,
        )
        self.dead_letters = None if pipeline.dead_letter in (None, "none") else DeadLetters(pipeline.dead_letter)
        self.format_errors: dict[str, int] = {}  # kind -> payloads or records set aside
        # dead letters to write, each group with what settles it once it is on the disk
        self._aside: list[tuple[list[dict[str, Any]], Callable[[int], None]]] = []
        self._writing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._progress = asyncio.Event()
        self.ready = False

    # -- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        self._spawn(self._run(), "run")

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine, name=f"fastkin[{self.name}].{name}")
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None or self.failure.done():
            return
        # What gets here is a bug or a wrong setting: the engine must not look alive while a stage is dead.
        self.failure.set_exception(error)

    async def _run(self) -> None:
        if self.overflow is not None:
            await self.overflow.start()
            if self.overflow.task is not None:
                self.overflow.task.add_done_callback(self._task_done)
        # Only the first look is waited for: while Kinesis cannot be reached the messages are taken up to the
        # budget all the same, else the broker would not even know our session yet and drop them.
        if not await self._prepare():
            self._spawn(self._prepare_later(), "prepare")
        await self.intake.run()

    async def _prepare(self) -> bool:
        """Find credentials and endpoint, look at the stream. False: not now, for a reason that was logged."""
        try:
            await self.client.start()
            await self._look_at_stream()
        except KinesisError as error:
            _LOG.error("pipeline=%s stage=send not ready: %s; trying again in %.0f s", self.name, error, _RETRY_S)
            return False
        self.ready = True
        self._spawn(self._watch_shards(), "shards")
        return True

    async def _prepare_later(self) -> None:
        while True:
            await asyncio.sleep(_RETRY_S)
            if await self._prepare():
                return

    async def stop(self) -> int:
        """Drain within the shutdown timeout; returns how many records did not end."""
        await self.intake.stop()
        self.flusher.close(DRAIN)
        if self.overflow is not None:
            self.overflow.drain()
        try:
            async with asyncio.timeout(self.pipeline.shutdown_timeout_s):
                while self._to_drain():
                    self._progress.clear()
                    self._attend()
                    await self._progress.wait()
        except TimeoutError:
            pass
        self.flusher.stop()
        await self.sender.close()
        if self.overflow is not None:
            await self.overflow.close()
        await self.intake.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.client.close()
        if self.dead_letters is not None and self._writing is None:  # else a thread may still have the file
            self.dead_letters.close()
        unsettled = self.lane.in_flight
        say = _LOG.info if unsettled == 0 else _LOG.error
        say(
            "pipeline=%s stage=engine stopped: received=%d stored=%d dead_lettered=%d dropped=%d spooled=%d"
            " unsettled=%d%s",
            self.name, self.lane.received, self.lane.stored, self.lane.dead_lettered, self.lane.dropped,
            self.lane.spooled, unsettled,
            "" if unsettled == 0 else " (not acknowledged: the broker keeps QoS 1 and 2 of a persistent session)",
        )  # fmt: skip
        return unsettled

    def _to_drain(self) -> bool:
        """Is there something that waiting for Kinesis may still settle?"""
        if self.overflow is not None and not self.sender.flowing:
            return self.lane.in_flight > self.overflow.safe
        return self.lane.in_flight > 0

    # -- the stream ----------------------------------------------------------------------------

    async def _look_at_stream(self) -> None:
        check = self.pipeline.startup_check
        if check == "dry_run":
            await self.client.dry_run()
        elif check == "put":
            await self._put_connection_test()
        if check == "none" and self.pipeline.aggregation == "none":
            return
        try:
            summary = await self.client.describe()
        except KinesisError as error:
            if error.action is not Action.OPERATOR or "ResourceNotFound" in error.code:
                raise
            _LOG.warning(
                "pipeline=%s stage=send the stream cannot be described (%s): going on without its limits and shard"
                " map; allow kinesis:DescribeStreamSummary and kinesis:ListShards to pace by shard",
                self.name, error.code,
            )  # fmt: skip
            return
        if summary.auto_keys and self.pipeline.aggregation == "kpl":
            raise ConfigError(
                f"pipeline {self.name!r} aggregation",
                f"stream {summary.name} chooses shards itself (RecordDistributionStrategy AUTO) and"
                " consumers drop aggregates on it",
                'set aggregation = "none"',
            )
        if not summary.auto_keys and self.pipeline.partition_key == "none":
            raise ConfigError(
                f"pipeline {self.name!r} partition_key",
                f"'none' needs a stream with RecordDistributionStrategy AUTO, {summary.name} is not one",
                "use uuid",
            )
        if self.pipeline.max_record_bytes > summary.max_record_bytes:
            _LOG.warning(
                "pipeline=%s stage=send max_record_bytes %d is above what stream %s takes (%d): larger records"
                " will be dead-lettered one by one", self.name, self.pipeline.max_record_bytes, summary.name,
                summary.max_record_bytes,
            )  # fmt: skip
        if self._static_key and summary.shard_count > 1:
            _LOG.warning(
                "pipeline=%s stage=send one static partition key on %d shards: everything goes to one shard, which"
                " takes 1 MiB/s; use partition_key = uuid or topic to use all", self.name, summary.shard_count,
            )  # fmt: skip
        await self._read_shards()

    async def _put_connection_test(self) -> None:
        """One real record, for permission systems that know no dry run; consumers are told to ignore it."""
        budget = Budget(1 << 16, 1)
        lane = Lane(
            settler=None, budget=budget, frame="raw", key=KeyPlan("parts", [("text", "key")]),
            target=self.client.target_json(),
        )  # fmt: skip
        test = {"type": "connection_test", "host": socket.gethostname(), "data": "CONNECTION_TEST"}
        lane.add(orjson.dumps(test))
        lane.seal(DRAIN)
        batch = lane.take()
        assert batch is not None
        for failure in batch.settle(await self.client.call("PutRecords", batch)):
            failure.batch.finish(DROPPED)
            raise KinesisError(failure.code, failure.message)

    async def _read_shards(self) -> None:
        try:
            shards = ShardMap(await self.client.list_shards())
        except (KinesisError, ValueError) as error:
            _LOG.warning(
                "pipeline=%s stage=send no shard map (%s): throttles are learned from answers", self.name, error
            )
            return
        current = self.sender.shards
        if current is not None and [s.id for s in current.shards] == [s.id for s in shards.shards]:
            return
        self.lane.shards = ShardTable(shards.ends)
        self.sender.set_shards(shards)
        _LOG.info("pipeline=%s stage=send %d open shards", self.name, len(shards))

    async def _watch_shards(self) -> None:
        """Splits and merges: look again now and then, sooner when an answer names a shard that is not known."""
        looks = 0
        seen: set[str] = set()  # shards that answers named and the map did not know: asked about once
        while True:
            await asyncio.sleep(_SHARDS_LOOK_S)
            known = self.sender.shards
            if known is None:
                return
            looks += 1
            strange = {s for s in self.sender.throttled if s and known.ordinal(s) is None} - seen
            if strange or looks >= _SHARDS_LOOKS:
                looks = 0
                seen |= strange
                await self._read_shards()

    # -- what the stages call ------------------------------------------------------------------

    def _tap(self, topic: bytes, payload: bytes, token: int) -> int:
        taken = self.lane.offer(topic, payload, token)
        if taken >= 0 and self._on_message is not None:
            self._on_message(self.name, topic, payload)
        return taken

    def _read(self) -> None:
        if self.lane.attention:
            self._attend()
        if self.overflow is not None and self.budget.full:
            self.overflow.attend()
        # Everything the broker will hand out is here: waiting for more records would only wait for the linger.
        if self.lane.open_records and self.ledger.unacked >= self.intake.granted_window:
            self.flusher.close(WINDOW)

    def _attend(self) -> None:
        for reject in self.lane.take_rejects():
            self._rejected(reject)
        self.flusher.attend()

    def _settled(self) -> None:
        self.intake.flush_acks()
        if self.budget.low:
            self.intake.resume()
        self._progress.set()
        if self._hook is not None:
            self._hook(self.name)

    # -- dead letters --------------------------------------------------------------------------

    def _rejected(self, reject: Reject) -> None:
        self.format_errors[reject.kind] = self.format_errors.get(reject.kind, 0) + 1
        topic = reject.topic.decode("utf-8", "replace")
        where = "" if reject.index is None else f" record={reject.index}"
        _LOG.error(
            "pipeline=%s stage=decode topic=%s%s byte %d: %s (%d bytes, first %s)",
            self.name, ascii(topic), where, reject.offset, reject.reason,
            len(reject.payload), reject.payload[:_HEX_BYTES].hex() or "none",
        )  # fmt: skip
        letter = {
            "topic": topic,
            "reason": reject.reason,
            "offset": reject.offset,
            "index": reject.index,
            "payload": reject.payload,
        }
        self._lay_aside([letter], lambda outcome: self.lane.settle_reject(reject, outcome))

    def _set_aside(self, batch: Batch, reason: str) -> None:
        """Kinesis will never take these records."""
        _LOG.error("pipeline=%s stage=send %d records refused for good: %s", self.name, len(batch), reason)
        letters = [{"reason": reason, "partition_key": key, "payload": data} for data, key, _ in batch.entries()]
        self._lay_aside(letters, batch.finish)

    def _lay_aside(self, letters: list[dict[str, Any]], settle: Callable[[int], None]) -> None:
        self._aside.append((letters, settle))
        if self._writing is None:
            self._writing = self._spawn(self._write_dead_letters(), "dead-letters")

    async def _write_dead_letters(self) -> None:
        """Durable first, settled after: a record ends as dead-lettered only when it is on the disk."""
        while self._aside:
            # They stay in the list until they are settled: a stop in between must not end them.
            work = list(self._aside)
            outcome = DROPPED
            if self.dead_letters is not None:
                outcome = DEAD
                letters = [{"pipeline": self.name, **one} for group, _ in work for one in group]
                await self._write_until_durable(self.dead_letters, letters)
            del self._aside[: len(work)]
            for _, settle in work:
                settle(outcome)
            self._settled()
        self._writing = None

    async def _write_until_durable(self, dead_letters: DeadLetters, letters: list[dict[str, Any]]) -> None:
        while True:
            try:
                await asyncio.to_thread(dead_letters.write, letters)
            except DeadLetterError as error:
                _LOG.error(
                    "pipeline=%s stage=settle %s; %d records wait, trying again in %.0f s",
                    self.name, error, len(letters), _RETRY_S,
                )  # fmt: skip
                await asyncio.sleep(_RETRY_S)
            else:
                return

    # -- seen from outside ---------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        lane, sender, intake = self.lane, self.sender, self.intake
        return {
            "received": lane.received,
            "stored": lane.stored,
            "dead_lettered": lane.dead_lettered,
            "filtered": lane.filtered,
            "dropped": lane.dropped,
            "in_flight": lane.in_flight,
            "spooled": lane.spooled,
            "buffered_bytes": self.budget.bytes,
            "peak_bytes": self.budget.peak_bytes,
            "calls": sender.calls,
            "calls_failed": sender.calls_failed,
            "calls_open": sender.in_flight,
            "retries": sender.retried,
            "throttled": sum(sender.throttled.values()),
            "duplicates_possible": sender.duplicates_possible,
            "format_errors": dict(self.format_errors),
            "unacked": self.ledger.unacked,
            "messages": intake.messages,
            "connects": intake.connects,
            "state": intake.state,
            "flushes": lane.flushes,
            "last_error": sender.last_error or intake.last_error,
        } | (self.overflow.stats() if self.overflow is not None else {})
