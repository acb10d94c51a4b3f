"""One pipeline: wires intake, lane, sender, acknowledgements and dead letters together.

Each pipeline has its own MQTT connection, ledger, budget, lane and sender. That way a stream that is down
holds back its own pipeline only: acknowledgements leave in PUBLISH order per connection, so a shared
connection would make every pipeline wait for the slowest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import TYPE_CHECKING, Any

import orjson

from fastkin._codec import DRAIN, DROPPED, WINDOW, Budget, FormatSink, KeyPlan, Lane, ShardTable, StraySink
from fastkin.aws.shards import ShardMap
from fastkin.aws.transports import make_client
from fastkin.config import FORMAT_IDS
from fastkin.deadletter.handler import Aside, make_store
from fastkin.delivery.backlog import Overflow, batch_limit, shares
from fastkin.delivery.flusher import Flusher
from fastkin.delivery.sender import Sender
from fastkin.delivery.watchdog import Watchdog, unattended
from fastkin.errors import Action, ConfigError, FastkinError, KinesisError
from fastkin.formats.partition_key import key_plan
from fastkin.mqtt._core import CallbackSink, Ledger, Router
from fastkin.mqtt.subscriber import Intake
from fastkin.runtime.deadline import Deadline
from fastkin.runtime.dropped import outlive, quiet
from fastkin.status.logs import Repeats
from fastkin.status.registry import figures

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from fastkin._codec import Sink
    from fastkin.aws.client import Client, StreamSummary
    from fastkin.config import Broker, Pipeline

_LOG = logging.getLogger("fastkin.pipeline")

_FIRST_LOOK_S = 3.0  # for credentials and the stream before the broker is connected
_RETRY_S = 5.0  # between attempts at what an operator must mend
_UNROUTED_EVERY_S = 60.0  # how often to say that messages came which nobody wants
_FILTERS_SHOWN = 10
_SHARDS_LOOK_S = 30.0  # how often to see whether an answer named a shard that the map does not have
_SHARDS_LOOKS = 10  # the map is read again after this many looks in any case
# KPL's AggregationMaxSize: a record costs a few bytes of overhead, and a retry stays cheap
_AGGREGATE_BYTES = 51_200
CLOSE_S = 1.0  # after the shutdown timeout: for the last acknowledgements and goodbyes
_LAST_ACKS_S = 0.6  # of that, what is kept from the spool
_SPOOL_S = 5.0  # of the shutdown timeout, or a quarter of it: for what the spool has to take
_LEAVE_S = 5.0  # for a run that lingers to leave the broker


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
        self._stream = pipeline.kinesis.stream_arn or pipeline.kinesis.stream or ""
        self._hook = on_settled
        self._on_message = on_message
        self.failure: asyncio.Future[None] = self._loop.create_future()
        self.client: Client = make_client(pipeline.kinesis, pipeline.id)
        # An eighth is left for what is not charged record by record: ledger, receive buffer, answers, allocator. And
        # one for WebSocket frames that were read: aiohttp counts their bytes, and an object each is much more.
        self.budget, rows = shares(
            pipeline.budget_bytes - pipeline.budget_bytes // 8 * (2 if broker.scheme in {"ws", "wss"} else 1),
            pipeline.budget_records,
            pipeline.on_full,
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
        self._router, several = self._routes()
        self._unrouted = 0  # of the router, when it was last looked at
        self._unrouted_at = -_UNROUTED_EVERY_S
        self.aside = Aside(
            self.name,
            self.lane,
            make_store(pipeline),
            topics=pipeline.topics,
            spawn=self._spawn,
            on_settled=self._settled,
            max_packet_bytes=broker.max_packet_bytes,
        )
        self.sender = Sender(
            self.lane,
            self.client,
            name=self.name,
            stream=self._stream,
            max_calls=pipeline.kinesis.max_connections,
            set_aside=self.aside.refused,
            on_settled=self._settled,
            max_records=pipeline.max_records,
            max_batch_bytes=max_batch_bytes,
            throttle_error_after_s=pipeline.throttle_error_after_s,
            harmless=self.client.harmless,
        )
        # Nothing is aggregated before it is known that the stream does not choose shards itself.
        self._aggregate_bytes = self.lane.aggregate_bytes
        self.lane.aggregate_bytes = 0
        self._described = False
        self._describe_failed = False
        self._shards_failed = False
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
                max_records=pipeline.max_records,
                max_batch_bytes=max_batch_bytes,
            )
        self.flusher = Flusher(self.lane, self.overflow or self.sender, pipeline.linger_ms / 1000, self._loop)
        self.intake = Intake(
            broker,
            [(topic, pipeline.qos) for topic in pipeline.topics],
            router=self._router,
            ledger=self.ledger,
            on_read=self._read,
            set_apart=self.aside.carrier,
            name=self.name,
            identifiers={topic: FORMAT_IDS[kind] for topic, kind in pipeline.formats} if several else {},
            linger_s=pipeline.linger_ms / 1000,
        )
        self.watchdog = Watchdog(self.name, self._loop, self.stuck, self._wake)
        self._tasks: set[asyncio.Task[None]] = set()
        self._progress = asyncio.Event()
        self._lines = Repeats(_LOG, self._loop.call_later, most=5, per_s=60.0)
        self.ready = False  # the stream was reached: it answered, or it stored something
        self._flowing = False  # the broker is being connected, or was
        self.start_error: str | None = None  # why it was not yet
        self._hurried = False
        self._stopping = False
        self._first_failed = False
        self.left = asyncio.Event()  # the broker was left, by a run that lingers
        self._drain: asyncio.Timeout | None = None

    # -- life ----------------------------------------------------------------------------------

    def read_files(self) -> None:
        """Read the files that the settings name (the broker's were, when this was made), and open nothing.

        start() uses what was read, whatever becomes of the files until then. ConfigError names the file.
        """
        self.client.read_files()

    def start(self) -> None:
        self.aside.start()
        self.watchdog.start()
        self._spawn(self._run(), "run").add_done_callback(self._run_over)
        self._spawn(outlive(self._loop_ended), "guard")

    def _loop_ended(self) -> None:
        if self._stopping:
            return
        if self.lane.in_flight:
            _LOG.warning(
                "pipeline=%s stage=engine the event loop ended and stop() was never called: %d records are not"
                " acknowledged; use `async with Engine(...)`", self.name, self.lane.in_flight,
            )  # fmt: skip
        self.sender.abort()
        self.flusher.stop()
        self.intake.abort()
        self.client.abort()

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = quiet(self._loop.create_task(coroutine, name=f"fastkin[{self.name}].{name}"))
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (error := task.exception()) is None or self.failure.done():
            return
        # What gets here is a bug or a wrong setting: the engine must not look alive while a stage is dead.
        self.failure.set_exception(error)

    def _run_over(self, task: asyncio.Task[None]) -> None:
        """Nothing but stop() may end it: a pipeline that takes no more must not look alive."""
        if self._stopping or self.failure.done() or self._first_failed:
            return
        how = "was cancelled" if task.cancelled() else "ended by itself"
        self.failure.set_exception(FastkinError(f"pipeline {self.name!r}: its work {how}: this is a bug, report it"))

    async def _run(self) -> None:
        if self.overflow is not None:
            await self.overflow.start()
            if self.overflow.task is not None:
                self.overflow.task.add_done_callback(self._task_done)
        # Only the first look is waited for, and not for long: while Kinesis cannot be reached the messages are taken
        # up to the budget all the same, else the broker would not even know our session yet and drop them.
        first = self._spawn(self._prepare_first(), "prepare")
        await asyncio.wait([first], timeout=_FIRST_LOOK_S)
        if first.done() and not first.cancelled() and first.exception() is not None:
            self._first_failed = True
            return  # _task_done has it
        self._flowing = True
        if self._aggregate_bytes and not self._described:
            _LOG.warning(
                "pipeline=%s stage=batch it is not known whether stream %s chooses shards itself, and there consumers"
                " drop aggregates: records go out one by one until it is; allow kinesis:DescribeStreamSummary, and see"
                " that the control endpoint can be reached", self.name, self._stream,
            )  # fmt: skip
        await self.intake.run()

    async def _prepare_first(self) -> None:
        if not await self._prepare():
            self._spawn(self._prepare_later(), "prepare")

    async def _prepare(self) -> bool:
        """Find credentials and endpoint, try the stream. False: not now, for a reason that was logged."""
        check = self.pipeline.startup_check
        try:
            await self.client.start()
            if check == "dry_run":
                await self.client.dry_run()
            elif check == "put":
                await self._put_connection_test()
                self.client.took = True
            elif check == "describe":
                await self._look_at_stream()
        except KinesisError as error:
            if not self.ready:  # else records are stored: it is only the question that was not answered
                self.start_error = str(error)
                if error.code != "NoCredentials":  # who looks for them has told it
                    self._lines.say(
                        logging.ERROR, "not ready",
                        "pipeline=%s stage=send not ready: %s; trying again in %.0f s", self.name, error, _RETRY_S,
                    )  # fmt: skip
                return False
        self._reached()
        # What is asked from here on makes us better and is not needed: nothing waits for it but the first connect.
        await self._look_again()
        self._spawn(self._watch_stream(), "shards")
        return True

    async def _prepare_later(self) -> None:
        while True:
            await asyncio.sleep(_RETRY_S)
            if await self._prepare():
                return

    def _reached(self) -> None:
        self.ready = True
        self.start_error = None

    def hurry(self) -> None:
        """A stop() that lingers has a deadline from now on."""
        self._hurried = True
        if self._drain is not None and self._drain.when() is None:
            self._drain.reschedule(self._loop.time() + self._drain_s)

    @property
    def _drain_s(self) -> float:
        """How long Kinesis may take what is held: a part of the time belongs to the spool, which gets the rest."""
        limit = self.pipeline.shutdown_timeout_s
        return limit - min(limit / 4, _SPOOL_S) if self.pipeline.on_full == "spool" else limit

    async def stop(self, *, linger: bool = False) -> int:
        """Drain within the shutdown timeout; returns how many records did not end.

        `linger`: leave the broker first, for another run to take our place, and drain until hurry() is called.
        Whatever a disk, the broker or Kinesis does, this returns `CLOSE_S` after the shutdown timeout at the latest.
        """
        self._stopping = True
        await self.intake.stop()
        if linger:
            await Deadline(_LEAVE_S, self.name).wait(self.intake.close(), "leaving the broker")
            self.left.set()
        self.flusher.close(DRAIN)
        if self.overflow is not None:
            self.overflow.drain()
        try:
            self._drain = asyncio.timeout(None if linger and not self._hurried else self._drain_s)
            async with self._drain:
                while self._to_drain():
                    self._progress.clear()
                    self._attend()
                    await self._progress.wait()
        except TimeoutError:
            pass
        self._drain = None
        await self._close(Deadline(self.pipeline.shutdown_timeout_s - self._drain_s + CLOSE_S, self.name))
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

    async def _close(self, limit: Deadline) -> None:
        """Close every stage. One that hangs or fails does not keep the others from it."""
        self._lines.close()
        self.watchdog.stop()
        self.flusher.stop()
        await self._end(limit, self.sender.close(), "ending the calls")
        if self.overflow is not None:
            # what is on the disk by then is acknowledged by what comes next
            await self._end(limit, self.overflow.close(limit.until(before=_LAST_ACKS_S)), "closing the spool")
        await self._end(limit.until(before=_LAST_ACKS_S / 2), self.intake.close(), "leaving the broker")
        for task in self._tasks:
            task.cancel()
        await self._end(limit, asyncio.gather(*self._tasks, return_exceptions=True), "ending the tasks")
        await self._end(limit, self.client.close(), "closing the connections to Kinesis")
        await self._end(limit, self.aside.close(), "closing the dead letters")

    async def _end(self, limit: Deadline, work: Awaitable[object], what: str) -> None:
        try:
            await limit.wait(work, what)
        except Exception:  # noqa: BLE001 - whatever it is, the others are closed all the same
            _LOG.exception("pipeline=%s stage=engine %s failed", self.name, what)

    def _to_drain(self) -> bool:
        """Is there something that waiting for Kinesis may still settle?"""
        if self.overflow is not None and not self.sender.flowing:
            return self.lane.in_flight > self.overflow.safe
        return self.lane.in_flight > 0

    # -- the stream ----------------------------------------------------------------------------

    async def _look_at_stream(self) -> None:
        """What the stream is, if we may know. KinesisError: it is not there, or nobody answers."""
        try:
            summary = await self.client.describe()
        except KinesisError as error:
            if error.action is not Action.OPERATOR or "ResourceNotFound" in error.code:
                raise
            self._say_undescribed(error)
            return
        self._aggregate(summary)
        if self._described:
            return
        self._described = True
        self._fits(summary)

    async def _look_again(self) -> None:
        """What is optional: the stream's mode and limits, its shards."""
        wanted = self.pipeline.startup_check != "none"
        if (self._aggregate_bytes or wanted) and not (self._described or self._describe_failed):
            try:
                await self._look_at_stream()
            except KinesisError as error:
                self._say_undescribed(error)
        if wanted or self._described:
            await self._read_shards()

    def _say_undescribed(self, error: KinesisError) -> None:
        if not self._describe_failed:
            _LOG.warning(
                "pipeline=%s stage=send the stream cannot be described (%s): going on without its limits and shard"
                " map; allow kinesis:DescribeStreamSummary and kinesis:ListShards to pace by shard",
                self.name, error.code,
            )  # fmt: skip
        self._describe_failed = True

    def _aggregate(self, summary: StreamSummary) -> None:
        """Aggregate on a stream that is known to take it. One may be told to choose shards itself at any time."""
        if not self._aggregate_bytes:
            return
        if not summary.auto_keys:
            if not self.lane.aggregate_bytes:
                self.lane.aggregate_bytes = self._aggregate_bytes
                self._attend()
            return
        problem = (
            f"stream {summary.name} chooses shards itself (RecordDistributionStrategy AUTO) and consumers drop"
            " aggregates on it"
        )
        if not self._flowing:
            raise ConfigError(f"pipeline {self.name!r} aggregation", problem, 'set aggregation = "none"')
        if self.lane.aggregate_bytes or not self._described:
            self.lane.aggregate_bytes = 0
            self._attend()
            _LOG.error(
                "pipeline=%s stage=batch %s: records go out one by one from now on; set aggregation = \"none\"",
                self.name, problem,
            )  # fmt: skip

    def _fits(self, summary: StreamSummary) -> None:
        """Do the settings fit the stream? ConfigError, or a WARNING."""
        if not summary.auto_keys and self.pipeline.partition_key == "none":
            raise ConfigError(
                f"pipeline {self.name!r} partition_key",
                f"'none' needs a stream with RecordDistributionStrategy AUTO, {summary.name} is not one",
                "use uuid",
            )
        self.sender.refusals.takes = summary.max_record_bytes
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
            current = self.sender.shards
            if current is not None and current.ids == shards.ids:
                self._shards_failed = False
                return
            self.lane.shards = ShardTable(shards.ends)
            self.sender.set_shards(shards)
        except Exception as error:  # noqa: BLE001 - records go out without a map: no answer may end what sends them
            level = logging.DEBUG if self._shards_failed else logging.WARNING  # asked again and again, said once
            _LOG.log(
                level,
                "pipeline=%s stage=send no shard map (%s): throttles are learned from answers until there is one;"
                " allow kinesis:ListShards", self.name, error,
            )  # fmt: skip
            self._shards_failed = True
            return
        self._shards_failed = False
        _LOG.info("pipeline=%s stage=send %d open shards", self.name, len(shards))

    async def _watch_stream(self) -> None:
        """Splits and merges: look again now and then, sooner when an answer names a shard that is not known."""
        looks = 0
        seen: set[str] = set()  # shards that answers named and the map did not know: asked about once
        while True:
            await asyncio.sleep(_SHARDS_LOOK_S)
            looks += 1
            if self._aggregate_bytes and (not self._described or looks >= _SHARDS_LOOKS):
                with contextlib.suppress(KinesisError):  # said once
                    await self._look_at_stream()
            known = self.sender.shards
            if known is None:
                if self.pipeline.startup_check != "none":
                    await self._read_shards()
                continue
            strange = {s for s in self.sender.throttled if s and known.ordinal(s) is None} - seen
            if strange or looks >= _SHARDS_LOOKS:
                looks = 0
                seen |= strange
                await self._read_shards()

    # -- what the stages call ------------------------------------------------------------------

    def _routes(self) -> tuple[Router, bool]:
        """One sink for each payload format, and whether there are several."""
        router = Router()
        kinds = dict.fromkeys(kind for _, kind in self.pipeline.formats)
        if len(kinds) == 1:
            sinks = {kind: self._tapped(self.lane) for kind in kinds}
        else:
            sinks = {kind: self._tapped(FormatSink(self.lane, kind)) for kind in kinds}
            filters = ", ".join(f"{topic!a} ({kind})" for topic, kind in self.pipeline.formats[:_FILTERS_SHOWN])
            router.otherwise = self._tapped(StraySink(self.lane, filters))
        for topic, kind in self.pipeline.formats:
            router.add(topic, sinks[kind], FORMAT_IDS[kind])
        return router, len(kinds) > 1

    def _tapped(self, sink: Lane | FormatSink | StraySink) -> Sink:
        on_message = self._on_message
        if on_message is None:
            return sink

        def tap(topic: bytes, payload: bytes, token: int) -> int:
            taken = sink.offer(topic, payload, token)
            if taken >= 0:
                on_message(self.name, topic, payload)
            return taken

        return CallbackSink(tap)

    def _say_unrouted(self) -> None:
        self._unrouted = self._router.unrouted
        if (now := self._loop.time()) - self._unrouted_at < _UNROUTED_EVERY_S:
            return
        self._unrouted_at = now
        former = self._router.former
        _LOG.warning(
            "pipeline=%s stage=intake topic=%s matches a filter that was removed (%s%s) and none that is set:"
            " acknowledged and discarded, %d messages so far. The broker's session of client %s had them queued; to"
            " keep such messages set the filter again",
            self.name, ascii(self._router.stray.decode("utf-8", "replace")),
            ", ".join(map(ascii, former[:_FILTERS_SHOWN])), ", ..." if len(former) > _FILTERS_SHOWN else "",
            self._unrouted, ascii(self.intake.client_id),
        )  # fmt: skip

    def _read(self) -> None:
        if self._router.unrouted != self._unrouted:
            self._say_unrouted()
        if self.lane.attention:
            self._attend()
        if self.overflow is not None and self.budget.full:
            self.overflow.attend()
        # Everything the broker will hand out is here: waiting for more records would only wait for the linger.
        intake = self.intake
        if self.lane.open_records and intake.window.exhausted(self.ledger.unacked, intake.last_read):
            self.flusher.close(WINDOW)

    def _attend(self) -> None:
        for reject in self.lane.take_rejects():
            self.aside.rejected(reject)
        self.flusher.attend()

    def _settled(self) -> None:
        if not self.ready and self.lane.stored:
            self._reached()
        if self.overflow is not None and self.budget.full:
            self.overflow.attend()
        self.intake.flush_acks()
        if self.budget.low:
            self.intake.resume()
        self._progress.set()
        if self._hook is not None:
            self._hook(self.name)

    def stuck(self) -> str | None:
        """What waits and will be looked at by nobody; None between any two callbacks, or there is a bug."""
        found = unattended(self.lane, self.sender, self.flusher, self.overflow, aside=self.aside.waiting)
        if found is None and self.aside.waiting and not self.aside.writing:
            found = f"{self.aside.waiting} groups of dead letters wait and nobody writes them"
        # What is unacknowledged may be the broker's turn, or a message that is set aside piece by piece.
        open_ = self.lane.in_flight or self.ledger.unacked
        if found is None and self.intake.paused and not open_ and not self.intake.stopping:
            found = f"reading is paused after {self.intake.messages} messages, and nothing is in flight"
        if found is None and self.intake.forgotten:
            found = f"reading is paused after {self.intake.messages} messages, for a piece of one that nobody takes"
        return found

    def _wake(self) -> None:
        self._attend()
        self.flusher.close(DRAIN)
        self._settled()
        self.intake.carry_on()
        self.sender.pump()

    # -- seen from outside ---------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """The figures of status/registry.py, by key."""
        return figures(self)

    @property
    def last_error(self) -> str | None:
        """What is wrong now, for a person; it clears when the same goes well."""
        return self.start_error or self.sender.last_error or self.intake.last_error

    def oldest_s(self) -> float:
        """Age of the oldest message that is not acknowledged; 0.0 when there is none."""
        return self._loop.time() - self.ledger.oldest() if self.ledger.unacked else 0.0

    def failed(self) -> str | None:
        """Why this pipeline does nothing any more, or None."""
        if not self.failure.done() or self.failure.cancelled() or (error := self.failure.exception()) is None:
            return None
        return f"failed: {type(error).__name__}: {error}"

    def unready(self) -> str | None:
        """Why it does not do its work, or None when it is connected, subscribed and can store in its stream."""
        if reason := self.failed():
            return reason
        if self.overflow is not None and self.overflow.hangs:  # nothing passes it, in either direction
            return self.overflow.hangs
        if not self.ready:
            return f"the stream was not reached: {self.start_error or 'not tried yet'}"
        if self.sender.unwell:
            return f"the stream: {self.sender.unwell}"
        if not self.intake.connected.is_set():
            return f"the broker: {self.intake.state}{f': {self.intake.last_error}' if self.intake.last_error else ''}"
        return None
