"""The way of a record into a stream, in one piece. A pipeline, a producer, the dead letter stream and replay use it.

    put(), or what a session offers
      |
    batcher       a record becomes an entry of the open batch: its key, its shard, base64, what it costs
      |        a batch closes when it holds max_records or max_batch_bytes: 500 or 5 MiB, unless told
    flusher    ... or is taken open, once its time has come: linger, an idle sender, an exhausted window, the end
      |
    backlog    what memory cannot hold goes to the disk, or is dropped, as `on_full` says
      |
    sender     takes batches as long as shards have room (pacing) and calls are free, and makes the call
      |
    answer     entry by entry: stored         -> the settler or the receipt is told, the budget has room again
                               failed for now -> the retry queue; it goes again, first come first served per shard
                               refused        -> `refused`: dead letters, or an error for who holds the receipt

Everything that ends, ends in the batcher's books: received = stored + dead-lettered + filtered + dropped + in flight
+ spooled, after every callback. `stuck` says in words what would wait for ever, and the watchdog asks it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastkin._codec import DRAIN, FAILED, Batcher, Budget, KeyPlan
from fastkin.delivery.backlog import Backlog, DropBacklog, Parts, Policy, batch_limit
from fastkin.delivery.expiry import Expiry
from fastkin.delivery.flusher import Flusher
from fastkin.delivery.sender import Sender
from fastkin.delivery.watchdog import Watchdog, unattended
from fastkin.errors import LibraryError, RecordFailed
from fastkin.limits import CALL_RECORDS, DEFAULT_CALL_BYTES, RECORD_BYTES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from fastkin._codec import Batch, PayloadFormat, Reject, Settler
    from fastkin.aws.client import Client
    from fastkin.delivery.replay import ReplayWindow
    from fastkin.runtime.deadline import Deadline

_LOG = logging.getLogger("fastkin.pipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Limits and times. Bytes of records are data before base64 plus key, as Kinesis counts them."""

    budget_bytes: int  # what may be held, buffered and in flight together
    budget_records: int
    max_records: int = CALL_RECORDS  # of one call
    max_batch_bytes: int = DEFAULT_CALL_BYTES
    max_record_bytes: int = RECORD_BYTES
    max_calls: int = 16  # open at a time
    aggregate_bytes: int = 0  # of a KPL aggregate
    line_bytes: int = 0  # of a Kinesis record of JSON lines
    linger_s: float = 0.0
    on_full: Policy = "pause"
    spool: str | Path | None = None
    spool_max_bytes: int = 0
    spool_after_s: float = 5.0
    throttle_error_after_s: float = 60.0
    delivery_timeout_s: float | None = None  # given up when it has no outcome by then; None: never
    trusted: bool = False  # a single record that is refused is at fault itself, also when all are


class Delivery:
    """Batcher, flusher, backlog, sender and watchdog of one stream. Made anywhere; open() needs the running loop."""

    def __init__(
        self,
        client: Client,
        options: Options,
        *,
        name: str,
        stream: str,
        key: KeyPlan,
        frame: PayloadFormat | str = "raw",
        settler: Settler | None = None,
        keep_bytes: int = 0,
    ) -> None:
        """`name` is that of the log lines. `keep_bytes` of the budget are for what is not charged record by record."""
        self.client = client
        self.name = name
        self.stream = stream
        # Whoever splits or gathers has a batch twice for a moment, so one may be no large part of the budget.
        limit = batch_limit(options.max_batch_bytes, options.max_record_bytes, options.budget_bytes, options.on_full)
        to = client.destination
        self._options = options = replace(
            options,
            max_records=min(options.max_records, to.call_records),
            max_batch_bytes=min(limit, to.call_bytes),
            max_record_bytes=min(options.max_record_bytes, to.record_bytes),
        )
        self.budget: Budget = Budget(options.budget_bytes - keep_bytes, options.budget_records)
        self._window: ReplayWindow | None = None
        # Before the batcher is made: both parts are charged by it.
        if options.on_full == "spool":
            from fastkin.delivery.spool_backlog import split_budget  # SQLite is 2 MB, for who spools

            self.budget, self._window = split_budget(self.budget)
        self.batcher: Batcher = Batcher(
            settler=settler, budget=self.budget, frame=frame, key=key if to.keyed else KeyPlan("none"),
            target=client.target_json(), answer=to.answer,
            max_records=options.max_records, max_batch_bytes=options.max_batch_bytes,
            max_record_bytes=options.max_record_bytes, aggregate_bytes=options.aggregate_bytes,
            line_bytes=options.line_bytes,
            rows=None if self._window is None else self._window.settler,
            replay=None if self._window is None else self._window.budget,
        )  # fmt: skip
        self.sender: Sender  # these four from open() on
        self.backlog: Backlog
        self.flusher: Flusher
        self.watchdog: Watchdog
        self.expiry: Expiry | None = None  # with a delivery_timeout_s; its owner starts and stops it
        self.opened: bool = False
        self._on_settled: Callable[[], None] = _nothing
        self._rejected: Callable[[Reject], None] | None = None

    def open(
        self,
        *,
        refused: Callable[[Batch, str], None] | None = None,
        on_settled: Callable[[], None] | None = None,
        rejected: Callable[[Reject], None] | None = None,
        stuck: Callable[[], str | None] | None = None,
        wake: Callable[[], None] | None = None,
    ) -> None:
        """Make what sends. `refused(batch, reason)` and `rejected(reject)` take over what can never be stored, without
        them it fails; `on_settled()` runs whenever something has ended. `stuck`, `wake`: the owner has more to see to.
        """
        options = self._options
        loop = asyncio.get_running_loop()
        self._on_settled = on_settled or _nothing
        self._rejected = rejected
        self.sender = Sender(
            self.batcher, self.client, name=self.name, stream=self.stream, max_calls=options.max_calls,
            dead_letter=refused or self.fail, on_settled=self.settled, max_records=options.max_records,
            max_batch_bytes=options.max_batch_bytes, throttle_error_after_s=options.throttle_error_after_s,
            destination=self.client.destination, believe=options.trusted, harmless=self.client.harmless,
        )  # fmt: skip
        self.backlog = self._make_backlog(options)
        self.flusher = Flusher(self.batcher, self.backlog, options.linger_s, loop)
        self.watchdog = Watchdog(self.name, loop, stuck or self.stuck, wake or self.wake)
        if options.delivery_timeout_s is not None:
            self.expiry = Expiry(self.batcher, self.sender, loop, options.delivery_timeout_s, self.settled)
        self.opened = True

    def _make_backlog(self, options: Options) -> Backlog:
        parts = Parts(self.batcher, self.sender, self.budget, self.name, self.settled)
        if options.on_full == "pause":
            return Backlog(parts)
        if options.on_full != "spool":
            return DropBacklog(parts, options.on_full)
        if options.spool is None or self._window is None:
            raise LibraryError("on_full 'spool' needs a path")
        from fastkin.delivery.spool_backlog import SpoolBacklog

        return SpoolBacklog(
            parts, window=self._window, path=options.spool, max_bytes=options.spool_max_bytes,
            after_s=options.spool_after_s, max_records=options.max_records, max_batch_bytes=options.max_batch_bytes,
        )  # fmt: skip

    # -- while it runs -------------------------------------------------------------------------

    def attend(self) -> None:
        """The batcher has news: what was rejected is handed over, what is closed is sent, what is open has its time."""
        if self._rejected is not None:
            for reject in self.batcher.take_rejects():
                self._rejected(reject)
        self.flusher.attend()

    def make_room(self) -> None:
        """The budget may be full: that is when a backlog has work."""
        # This runs after each answer. So it costs nothing while there is room.
        if self.budget.full:
            self.backlog.attend()

    def settled(self) -> None:
        """Something has ended."""
        self.make_room()
        self._on_settled()

    def drain(self) -> None:
        """Send all that is here, read nothing more from the disk: the owner is about to stop."""
        # The open batch first. With a spool it may still go directly.
        self.flusher.close(DRAIN)
        self.backlog.drain()

    async def flush(self) -> None:
        """Until all that was taken so far has ended, well or not, or is spooled. ClosedError: closed before."""
        # Else a flush would wait the whole linger for the last records.
        self.flusher.close(DRAIN)
        await self.sender.flush()

    @property
    def to_wait_for(self) -> bool:
        """Waiting for Kinesis may still settle something: what is on the disk too needs no waiting for."""
        # While calls flow, what came back from the disk ends soon too. Without them the file keeps it.
        return self.batcher.in_flight > (0 if self.sender.flowing else self.backlog.safe)

    def stuck(self, *, aside: int = 0) -> str | None:
        """What waits and will be looked at by nobody; None between any two callbacks, or there is a bug.

        `aside`: groups of dead letters that the owner has.
        """
        return unattended(self.batcher, self.sender, self.flusher, self.backlog, aside=aside)

    def wake(self) -> None:
        """Look at everything once, as if all of it had just happened."""
        self.attend()
        self.flusher.close(DRAIN)
        self.sender.pump()
        self.settled()

    # -- the end -------------------------------------------------------------------------------

    def abort(self) -> None:
        """The event loop is about to end, and nobody called close()."""
        self.sender.abort()
        self.flusher.stop()
        self.client.abort()

    async def close(self, limit: Deadline, *, spool_limit: Deadline) -> None:
        """End the calls; what has not ended then goes to the disk, if there is one, as far as it takes it in time.

        The rest stays unsettled: see give_up(). A part that fails or hangs does not keep the others from closing.
        """
        # The watchdog would find what is taken apart below, and call it a stall.
        self.watchdog.stop()
        self.flusher.stop()
        await self._end(limit, self.sender.close(), "ending the calls")
        # After the sender: what its calls leave unsettled is what goes to the disk.
        # Nothing but a disk takes time there.
        if self.backlog.spool is not None:
            await self._end(limit, self.backlog.close(spool_limit), "closing the spool")

    async def _end(self, limit: Deadline, work: Awaitable[object], what: str) -> None:
        try:
            await limit.wait(work, what)
        except Exception:  # noqa: BLE001 - whatever it is, the others are closed all the same
            _LOG.exception("pipeline=%s stage=engine %s failed", self.name, what)

    def fail(self, batch: Batch, reason: str) -> None:
        """It can never be stored: who holds its receipts is told."""
        # Its receipts said "spooled" long ago, so nobody would hear of it.
        if batch.restored:
            _LOG.error(
                "pipeline=%s stage=send %d records that came back from the spool are refused for good and dropped: %s",
                self.name, batch.user_records, reason,
            )  # fmt: skip
        # As Answers and FailedCalls write it.
        code, _, message = reason.partition(": ")
        batch.finish(FAILED, RecordFailed(code, message))

    def give_up(self, error: Exception) -> int:
        """After close(): what has not ended fails with `error`, for who holds receipts. Returns how many records."""
        left = self.batcher.in_flight
        # Batches first. What is left in the batcher after that is in none.
        for batch in (*self.sender.unsent(), *self.backlog.unsaved()):
            batch.finish(FAILED, error)
        self.batcher.abandon(error)
        return left

    # -- seen from outside ---------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters, in records unless the name says otherwise."""
        # A delivery that was never opened has no sender, and says zero.
        batcher, sender = self.batcher, self.sender if self.opened else None
        return {
            "received": batcher.received,
            "stored": batcher.stored,
            "dropped": batcher.dropped,
            "dead_lettered": batcher.dead_lettered,
            "in_flight": batcher.in_flight,
            "spooled": batcher.spooled,
            "buffered_bytes": self.budget.bytes,
            "peak_bytes": self.budget.peak_bytes,
            "calls": sender.counters.calls if sender else 0,
            "retries": sender.counters.retried if sender else 0,
            "throttled": sum(sender.counters.throttled.values()) if sender else 0,
            "duplicates_possible": sender.counters.duplicates_possible if sender else 0,
            "last_error": sender.last_error if sender else None,
            "stalls": self.watchdog.stalls if sender else 0,
        } | (self.backlog.stats() if self.opened else {})


def _nothing() -> None:
    pass
