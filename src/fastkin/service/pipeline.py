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

from fastkin._codec import DRAIN, DROPPED, WINDOW, Budget, FormatSink, KeyPlan, Lane, StraySink
from fastkin.aws.transports import make_client
from fastkin.deadletter.handler import Aside, make_store
from fastkin.delivery.delivery import Delivery, Options
from fastkin.delivery.stream_watch import StreamWatch
from fastkin.errors import ConfigError, FastkinError, KinesisError
from fastkin.formats.partition_key import key_plan
from fastkin.formats.table import format_named
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
# KPL's AggregationMaxSize: a record costs a few bytes of overhead, and a retry stays cheap
_AGGREGATE_BYTES = 51_200
CLOSE_S = 1.0  # after the shutdown timeout: for the last acknowledgements and goodbyes
_LAST_ACKS_S = 0.6  # of that, what is kept from the spool
_SPOOL_S = 5.0  # of the shutdown timeout, or a quarter of it: for what the spool has to take
_LEAVE_S = 5.0  # for a run that lingers to leave the broker


def _options(pipeline: Pipeline) -> Options:
    return Options(
        budget_bytes=pipeline.budget_bytes,
        budget_records=pipeline.budget_records,
        max_records=pipeline.max_records,
        max_batch_bytes=pipeline.max_batch_bytes,
        max_record_bytes=pipeline.max_record_bytes,
        max_calls=pipeline.kinesis.max_connections,
        aggregate_bytes=min(_AGGREGATE_BYTES, pipeline.max_record_bytes) if pipeline.aggregation == "kpl" else 0,
        linger_s=pipeline.linger_ms / 1000,
        on_full=pipeline.on_full,
        spool=pipeline.spool,
        spool_max_bytes=pipeline.spool_max_bytes,
        spool_after_s=pipeline.spool_after_s,
        throttle_error_after_s=pipeline.throttle_error_after_s,
    )


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
        kind, parts = key_plan(pipeline.partition_key, client_id=broker.client_id, hostname=socket.gethostname())
        self.ledger = Ledger()
        # An eighth is left for what is not charged record by record: ledger, receive buffer, answers, allocator. And
        # one for WebSocket frames that were read: aiohttp counts their bytes, and an object each is much more.
        self.delivery = Delivery(
            self.client, _options(pipeline), name=self.name, stream=self._stream, key=KeyPlan(kind, parts),
            frame=format_named(pipeline.format), settler=self.ledger,
            keep_bytes=pipeline.budget_bytes // 8 * (2 if broker.scheme in {"ws", "wss"} else 1),
        )  # fmt: skip
        self._lane = self.delivery.lane
        self._static_key = kind == "parts" and all(part[0] == "text" for part in parts)
        self._router, several = self._routes()
        self._unrouted = 0  # of the router, when it was last looked at
        self._unrouted_at = -_UNROUTED_EVERY_S
        self.aside = Aside(
            self.name,
            self._lane,
            make_store(pipeline),
            topics=pipeline.topics,
            spawn=self._spawn,
            on_settled=self.delivery.settled,
            max_packet_bytes=broker.max_packet_bytes,
        )
        self.delivery.open(
            refused=self.aside.refused, rejected=self.aside.rejected, on_settled=self._settled, stuck=self.stuck,
            wake=self._wake,
        )  # fmt: skip
        self.watch = StreamWatch(
            self.delivery,
            shards=pipeline.startup_check != "none",
            limits=pipeline.startup_check != "none",
            misfit=lambda problem: ConfigError(
                f"pipeline {self.name!r} aggregation", problem, 'set aggregation = "none"'
            ),
            fits=self._fits,
            cure='set aggregation = "none"',
        )
        self.intake = Intake(
            broker,
            [(topic, pipeline.qos) for topic in pipeline.topics],
            router=self._router,
            ledger=self.ledger,
            on_read=self._read,
            set_apart=self.aside.carrier,
            name=self.name,
            identifiers={topic: format_named(kind).number for topic, kind in pipeline.formats} if several else {},
            linger_s=pipeline.linger_ms / 1000,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._progress = asyncio.Event()
        self._lines = Repeats(_LOG, self._loop.call_later, most=5, per_s=60.0)
        self.ready = False  # the stream was reached: it answered, or it stored something
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
        self.delivery.watchdog.start()
        self._spawn(self._run(), "run").add_done_callback(self._run_over)
        self._spawn(outlive(self._loop_ended), "guard")

    def _loop_ended(self) -> None:
        if self._stopping:
            return
        if self._lane.in_flight:
            _LOG.warning(
                "pipeline=%s stage=engine the event loop ended and stop() was never called: %d records are not"
                " acknowledged; use `async with Engine(...)`", self.name, self._lane.in_flight,
            )  # fmt: skip
        self.delivery.abort()
        self.intake.abort()

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
        backlog = self.delivery.backlog
        await backlog.start()
        if backlog.task is not None:
            backlog.task.add_done_callback(self._task_done)
        # Only the first look is waited for, and not for long: while Kinesis cannot be reached the messages are taken
        # up to the budget all the same, else the broker would not even know our session yet and drop them.
        first = self._spawn(self._prepare_first(), "prepare")
        await asyncio.wait([first], timeout=_FIRST_LOOK_S)
        if first.done() and not first.cancelled() and first.exception() is not None:
            self._first_failed = True
            return  # _task_done has it
        self.watch.settled_in = True
        self.watch.say_unknown_mode()
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
                await self.watch.look_at_stream()
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
        await self.watch.look()
        self._spawn(self.watch.run(), "shards")
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
        self.delivery.drain()
        try:
            self._drain = asyncio.timeout(None if linger and not self._hurried else self._drain_s)
            async with self._drain:
                while self.delivery.to_wait_for:
                    self._progress.clear()
                    self.delivery.attend()
                    await self._progress.wait()
        except TimeoutError:
            pass
        self._drain = None
        await self._close(Deadline(self.pipeline.shutdown_timeout_s - self._drain_s + CLOSE_S, self.name))
        unsettled = self._lane.in_flight
        say = _LOG.info if unsettled == 0 else _LOG.error
        say(
            "pipeline=%s stage=engine stopped: received=%d stored=%d dead_lettered=%d dropped=%d spooled=%d"
            " unsettled=%d%s",
            self.name, self._lane.received, self._lane.stored, self._lane.dead_lettered, self._lane.dropped,
            self._lane.spooled, unsettled,
            "" if unsettled == 0 else " (not acknowledged: the broker keeps QoS 1 and 2 of a persistent session)",
        )  # fmt: skip
        return unsettled

    async def _close(self, limit: Deadline) -> None:
        """Close every stage. One that hangs or fails does not keep the others from it."""
        self._lines.close()
        # What is on the disk by then is acknowledged by what comes next.
        await self.delivery.close(limit, spool_limit=limit.until(before=_LAST_ACKS_S))
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

    # -- the stream ----------------------------------------------------------------------------

    def _fits(self, summary: StreamSummary) -> None:
        """Do the settings fit the stream? ConfigError, or a WARNING."""
        if not summary.auto_keys and self.pipeline.partition_key == "none":
            raise ConfigError(
                f"pipeline {self.name!r} partition_key",
                f"'none' needs a stream with RecordDistributionStrategy AUTO, {summary.name} is not one",
                "use uuid",
            )
        self.delivery.sender.refusals.takes = summary.max_record_bytes
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
            target=self.client.target_json(), answer=self.client.destination.answer,
        )  # fmt: skip
        test = {"type": "connection_test", "host": socket.gethostname(), "data": "CONNECTION_TEST"}
        lane.add(orjson.dumps(test))
        lane.seal(DRAIN)
        batch = lane.take()
        assert batch is not None
        for failure in batch.settle(await self.client.put(batch)):
            failure.batch.finish(DROPPED)
            raise KinesisError(failure.code, failure.message)

    # -- what the stages call ------------------------------------------------------------------

    def _routes(self) -> tuple[Router, bool]:
        """One sink for each payload format, and whether there are several."""
        router = Router()
        kinds = dict.fromkeys(kind for _, kind in self.pipeline.formats)
        if len(kinds) == 1:
            sinks = {kind: self._tapped(self._lane) for kind in kinds}
        else:
            sinks = {kind: self._tapped(FormatSink(self._lane, format_named(kind))) for kind in kinds}
            filters = ", ".join(f"{topic!a} ({kind})" for topic, kind in self.pipeline.formats[:_FILTERS_SHOWN])
            router.otherwise = self._tapped(StraySink(self._lane, filters))
        for topic, kind in self.pipeline.formats:
            router.add(topic, sinks[kind], format_named(kind).number)
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
        delivery = self.delivery
        if self._lane.attention:
            delivery.attend()
        delivery.make_room()
        # Everything the broker will hand out is here: waiting for more records would only wait for the linger.
        intake = self.intake
        if self._lane.open_records and intake.window.exhausted(self.ledger.unacked, intake.last_read):
            delivery.flusher.close(WINDOW)

    def _settled(self) -> None:
        if not self.ready and self._lane.stored:
            self._reached()
        self.intake.flush_acks()
        if self.delivery.budget.low:
            self.intake.resume()
        self._progress.set()
        if self._hook is not None:
            self._hook(self.name)

    def stuck(self) -> str | None:
        """What waits and will be looked at by nobody; None between any two callbacks, or there is a bug."""
        found = self.delivery.stuck(aside=self.aside.waiting)
        if found is None and self.aside.waiting and not self.aside.writing:
            found = f"{self.aside.waiting} groups of dead letters wait and nobody writes them"
        # What is unacknowledged may be the broker's turn, or a message that is set aside piece by piece.
        open_ = self._lane.in_flight or self.ledger.unacked
        if found is None and self.intake.paused and not open_ and not self.intake.stopping:
            found = f"reading is paused after {self.intake.messages} messages, and nothing is in flight"
        if found is None and self.intake.forgotten:
            found = f"reading is paused after {self.intake.messages} messages, for a piece of one that nobody takes"
        return found

    def _wake(self) -> None:
        self.delivery.wake()
        self.intake.carry_on()

    # -- seen from outside ---------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """The figures of status/registry.py, by key."""
        return figures(self)

    @property
    def last_error(self) -> str | None:
        """What is wrong now, for a person; it clears when the same goes well."""
        return self.start_error or self.delivery.sender.last_error or self.intake.last_error

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
        if hangs := self.delivery.backlog.hangs:  # nothing passes it, in either direction
            return hangs
        if not self.ready:
            return f"the stream was not reached: {self.start_error or 'not tried yet'}"
        if unwell := self.delivery.sender.unwell:
            return f"the stream: {unwell}"
        if not self.intake.connected.is_set():
            return f"the broker: {self.intake.state}{f': {self.intake.last_error}' if self.intake.last_error else ''}"
        return None
