"""One pipeline: wires intake, delivery, acknowledgements and dead letters together, and takes them apart at the end.

Each pipeline has its own MQTT connection, acks, budget, batcher and sender. That way a stream that is down holds back
its own pipeline only: acknowledgements leave in PUBLISH order per connection, so a shared connection would make every
pipeline wait for the slowest.

Which sink a message goes to is in `routes.py`, what is asked of the stream at the start in `preflight.py`, and how a
task that ends makes the run fail in `tasks.py`.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Any

from fastkin._codec import WINDOW, KeyPlan
from fastkin.deadletter.handler import DeadLetterHandler, make_store
from fastkin.delivery.delivery import Delivery, Options
from fastkin.errors import FastkinError
from fastkin.files.client import FileClient, client_of
from fastkin.formats.partition_key import key_plan
from fastkin.mqtt._core import AckTracker
from fastkin.mqtt.subscriber import Subscriber
from fastkin.runtime.deadline import Deadline
from fastkin.runtime.dropped import outlive
from fastkin.service.preflight import Preflight
from fastkin.service.routes import Routes
from fastkin.service.shapes import format_of
from fastkin.service.tasks import Tasks
from fastkin.service.tee import Tee
from fastkin.status.registry import figures

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fastkin.aws.client import Client
    from fastkin.config import Broker, Pipeline

_LOG = logging.getLogger("fastkin.pipeline")

_FIRST_LOOK_S = 3.0  # for credentials and the stream before the broker is connected
# KPL's AggregationMaxSize: a record costs a few bytes of overhead, and a retry stays cheap
_AGGREGATE_BYTES = 51_200
CLOSE_S = 1.0  # after the shutdown timeout: for the last acknowledgements and goodbyes
_LAST_ACKS_S = 0.6  # of that, what is kept from the spool
_SPOOL_S = 5.0  # of the shutdown timeout, or a quarter of it: for what the spool has to take
_LEAVE_S = 5.0  # for a run that lingers to leave the broker


def _options(pipeline: Pipeline) -> Options:
    aggregate = min(_AGGREGATE_BYTES, pipeline.max_record_bytes)
    return Options(
        budget_bytes=pipeline.budget_bytes,
        budget_records=pipeline.budget_records,
        max_records=pipeline.max_records,
        max_batch_bytes=pipeline.max_batch_bytes,
        max_record_bytes=pipeline.max_record_bytes,
        max_calls=pipeline.kinesis.max_connections,
        aggregate_bytes=aggregate if pipeline.aggregation == "kpl" else 0,
        line_bytes=aggregate if pipeline.aggregation == "lines" else 0,
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
        self.name: str = pipeline.id
        self._loop = asyncio.get_running_loop()
        self._hook = on_settled
        self._tasks = Tasks(self.name)
        self.failure: asyncio.Future[None] = self._tasks.failure
        self.client: Client = client_of(pipeline)
        kind, parts = key_plan(pipeline.partition_key, client_id=broker.client_id, hostname=socket.gethostname())
        self.acks: AckTracker = AckTracker()
        files = self.client if isinstance(self.client, FileClient) else None
        raw = None if files is None else files.raw
        # An eighth is left for what is not charged record by record: acks, receive buffer, answers, allocator. And
        # one for WebSocket frames that were read: aiohttp counts their bytes, and an object each is much more.
        self.delivery: Delivery = Delivery(
            self.client, _options(pipeline), name=self.name, stream=pipeline.target, key=KeyPlan(kind, parts),
            frame=format_of(pipeline, pipeline.format), settler=self.acks,
            keep_bytes=pipeline.budget_bytes // 8 * (1 + broker.websocket + (raw is not None)),
        )  # fmt: skip
        self._batcher = self.delivery.batcher
        self._tee: Tee | None = None
        if raw is not None:
            self._tee = Tee(
                raw, self.acks, name=self.name, separator=pipeline.separator, most_bytes=pipeline.budget_bytes // 8,
                spawn=self._tasks.spawn, on_settled=self.delivery.settled,
            )  # fmt: skip
        self._routes = Routes(pipeline, self._batcher, on_message, self._tee)
        self.dead_letters: DeadLetterHandler = DeadLetterHandler(
            self.name, self._batcher, make_store(pipeline, None if files is None else files.letters),
            topics=pipeline.topics, spawn=self._tasks.spawn, on_settled=self.delivery.settled,
            max_packet_bytes=broker.max_packet_bytes,
        )  # fmt: skip
        self.delivery.open(
            refused=self.dead_letters.refused, rejected=self.dead_letters.rejected, on_settled=self._settled,
            stuck=self.stuck, wake=self._wake,
        )  # fmt: skip
        static_key = kind == "parts" and all(part[0] == "text" for part in parts)
        self._preflight = Preflight(
            pipeline, self.client, self.delivery, static_key=static_key, spawn=self._tasks.spawn
        )
        asked = [] if pipeline.left_over else [(each, pipeline.qos) for each in pipeline.filters]
        self.subscriber: Subscriber = Subscriber(
            broker, asked, router=self._routes.router,
            acks=self.acks, on_read=self._read, set_apart=self.dead_letters.carrier, name=self.name,
            identifiers=self._routes.identifiers, linger_s=pipeline.linger_ms / 1000,
        )  # fmt: skip
        self._progress = asyncio.Event()  # something was settled: stop() looks again
        self._hurried = False
        self._leave: asyncio.Task[None] | None = None  # saying goodbye to the broker, of a stop() that lingers
        self._stopping = False
        self._first_failed = False
        self.left: asyncio.Event = asyncio.Event()  # the broker was left, or nobody has time to wait for that
        self._drain: asyncio.Timeout | None = None

    # -- life ----------------------------------------------------------------------------------

    def read_files(self) -> None:
        """Read the files that the settings name (the broker's were, when this was made), and open nothing.

        start() uses what was read, whatever becomes of the files until then. ConfigError names the file.
        """
        self.client.read_files()

    def start(self) -> None:
        self.dead_letters.start()
        self.delivery.watchdog.start()
        self._tasks.spawn(self._run(), "run").add_done_callback(self._run_over)
        self._tasks.spawn(outlive(self._loop_ended), "guard")

    def _loop_ended(self) -> None:
        if self._stopping:
            return
        if self._batcher.in_flight:
            _LOG.warning(
                "pipeline=%s stage=engine the event loop ended and stop() was never called: %d records are not"
                " acknowledged; use `async with Engine(...)`", self.name, self._batcher.in_flight,
            )  # fmt: skip
        self.delivery.abort()
        self.subscriber.abort()

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
            backlog.task.add_done_callback(self._tasks.ended)
        # Only the first look is waited for, and not for long: while Kinesis cannot be reached the messages are taken
        # up to the budget all the same, else the broker would not even know our session yet and drop them.
        first = self._tasks.spawn(self._preflight.first(), "prepare")
        await asyncio.wait([first], timeout=_FIRST_LOOK_S)
        if first.done() and not first.cancelled() and first.exception() is not None:
            self._first_failed = True
            return  # its error is in `failure`
        self._preflight.settle_in()
        await self.subscriber.run()

    def hurry(self) -> None:
        """A stop() that lingers has a deadline from now on."""
        self._hurried = True
        # A broker that is deaf may hold up the goodbye for longer than whoever hurries us has time for. The drain
        # begins at once then, and close() says goodbye again, within its own limit.
        if self._leave is not None:
            self._leave.cancel()
        if self._drain is not None and self._drain.when() is None:
            self._drain.reschedule(self._loop.time() + self._drain_s)

    async def _say_goodbye(self) -> None:
        # Made in here: hurry() may cancel the task before its first step, and then there must be nothing to await.
        await Deadline(_LEAVE_S, self.name).wait(self.subscriber.close(), "leaving the broker")

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
        await self.subscriber.stop()
        if linger and not self._hurried:
            self._leave = asyncio.create_task(self._say_goodbye())
            # Not awaited itself: hurry() cancels it, and that is no cancellation of this stop().
            try:
                await asyncio.wait([self._leave])
            finally:
                self._leave.cancel()  # for who cancels this stop(); nothing when it has ended
            if not self._leave.cancelled():
                self._leave.result()
        self.left.set()
        self.delivery.drain()
        try:
            self._drain = asyncio.timeout(None if linger and not self._hurried else self._drain_s)
            async with self._drain:
                while self.delivery.to_wait_for or (self._tee is not None and self._tee.waiting):
                    self._progress.clear()
                    self.delivery.attend()
                    await self._progress.wait()
                await self.client.finish()
        except TimeoutError:
            pass
        self._drain = None
        await self._close(Deadline(self.pipeline.shutdown_timeout_s - self._drain_s + CLOSE_S, self.name))
        unsettled = self._batcher.in_flight
        say = _LOG.info if unsettled == 0 else _LOG.error
        say(
            "pipeline=%s stage=engine stopped: received=%d stored=%d dead_lettered=%d dropped=%d spooled=%d"
            " unsettled=%d%s",
            self.name, self._batcher.received, self._batcher.stored, self._batcher.dead_lettered, self._batcher.dropped,
            self._batcher.spooled, unsettled,
            "" if unsettled == 0 else " (not acknowledged: the broker keeps QoS 1 and 2 of a persistent session)",
        )  # fmt: skip
        return unsettled

    async def _close(self, limit: Deadline) -> None:
        """Close every stage. One that hangs or fails does not keep the others from it."""
        self._preflight.close()
        # What is on the disk by then is acknowledged by what comes next.
        await self.delivery.close(limit, spool_limit=limit.until(before=_LAST_ACKS_S))
        await self._end(limit.until(before=_LAST_ACKS_S / 2), self.subscriber.close(), "leaving the broker")
        await self._end(limit, self._tasks.cancel(), "ending the tasks")
        await self._end(limit, self.client.close(), "closing the connections to Kinesis")
        await self._end(limit, self.dead_letters.close(), "closing the dead letters")

    async def _end(self, limit: Deadline, work: Awaitable[object], what: str) -> None:
        try:
            await limit.wait(work, what)
        except Exception:  # noqa: BLE001 - whatever it is, the others are closed all the same
            _LOG.exception("pipeline=%s stage=engine %s failed", self.name, what)

    # -- what the stages call ------------------------------------------------------------------

    def _read(self) -> None:
        routes = self._routes
        if routes.router.unrouted != routes.seen:
            routes.say_unrouted(self.subscriber.client_id)
        delivery = self.delivery
        if self._batcher.dirty:
            delivery.attend()
        delivery.make_room()
        # Everything the broker will hand out is here: waiting for more records would only wait for the linger.
        subscriber = self.subscriber
        if self._batcher.open_records and subscriber.window.exhausted(self.acks.unacked, subscriber.last_read):
            delivery.flusher.close(WINDOW)

    def _settled(self) -> None:
        preflight = self._preflight
        if not preflight.ready and self._batcher.stored:
            preflight.reached()
        self.subscriber.flush_acks()
        if self.delivery.budget.low:
            self.subscriber.resume()
        self._progress.set()
        if self._hook is not None:
            self._hook(self.name)

    def stuck(self) -> str | None:
        """What waits and will be looked at by nobody; None between any two callbacks, or there is a bug."""
        found = self.delivery.stuck(aside=self.dead_letters.waiting)
        if found is None and self.dead_letters.waiting and not self.dead_letters.writing:
            found = f"{self.dead_letters.waiting} groups of dead letters wait and nobody writes them"
        # What is unacknowledged may be the broker's turn, or a message that is set aside piece by piece.
        open_ = self._batcher.in_flight or self.acks.unacked
        subscriber = self.subscriber
        if found is None and subscriber.paused and not open_ and not subscriber.stopping:
            found = f"reading is paused after {subscriber.traffic.messages} messages, and nothing is in flight"
        if found is None and subscriber.forgotten:
            found = (
                f"reading is paused after {subscriber.traffic.messages} messages, for a piece of one that nobody takes"
            )
        return found

    def _wake(self) -> None:
        self.delivery.wake()
        self.subscriber.carry_on()

    # -- seen from outside ---------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """The figures of status/registry.py, by key."""
        return figures(self)

    @property
    def ready(self) -> bool:
        """The stream was reached: it answered, or it stored something."""
        return self._preflight.ready

    @property
    def start_error(self) -> str | None:
        """Why it was not reached yet."""
        return self._preflight.start_error

    @property
    def last_error(self) -> str | None:
        """What is wrong now, for a person; it clears when the same goes well."""
        return self.start_error or self.delivery.sender.last_error or self.client.trouble or self.subscriber.last_error

    def oldest_s(self) -> float:
        """Age of the oldest message that is not acknowledged; 0.0 when there is none."""
        return self._loop.time() - self.acks.oldest() if self.acks.unacked else 0.0

    def failed(self) -> str | None:
        """Why this pipeline does nothing any more, or None."""
        return self._tasks.failed()

    def unready(self) -> str | None:
        """Why it does not do its work, or None when it is connected, subscribed and can store in its stream."""
        if reason := self.failed():
            return reason
        if hangs := self.delivery.backlog.hangs:  # nothing passes it, in either direction
            return hangs
        if not self.ready:
            return f"the stream was not reached: {self.start_error or 'not tried yet'}"
        if operator_error := self.delivery.sender.operator_error or self.client.trouble:
            return f"the stream: {operator_error}"
        subscriber = self.subscriber
        if not subscriber.connected.is_set():
            return f"the broker: {subscriber.state}{f': {subscriber.last_error}' if subscriber.last_error else ''}"
        return None
