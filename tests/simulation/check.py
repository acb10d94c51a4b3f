"""The books: what was published, what is safe where, and what must be true at any moment.

- at each PUBACK or PUBREC: every record of that message is stored, in a dead letter, or durable in a spool, unless
  the user's own `on_full` or missing `dead_letter` gave it up;
- at each step: the accounting identity, no exception in the loop's handler, no failed run;
- when everything has healed and drained: nothing is lost, the budget is zero, every message is answered, and what was
  stored twice is within what the product itself says may have been.
"""

from __future__ import annotations

import gc
from collections import Counter
from typing import TYPE_CHECKING, Any

from fastkin._codec import Batch
from fastkin.errors import LibraryError
from simulation.loop import Finding

if TYPE_CHECKING:
    from simulation.broker import Message
    from simulation.disks import Letters, SpoolBooks
    from simulation.world import World


_ENTRY_BYTES = 32  # of codec/batch.pxi's struct


class Books:
    """Of one destination; a seed with several pipelines has one for each."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.messages: list[Message] = []
        self.stream_stored: Counter[bytes] = Counter()
        self.letters: Letters | None = None
        self.spool: SpoolBooks | None = None
        self.spools: list[SpoolBooks] = []  # of an engine: one for each pipeline
        self.drops = False  # on_full drops: a record may end nowhere, and is counted then
        self.unkept = False  # no dead letters are kept
        self.answers = 0
        self.excused = 0  # copies that the broker's own doing explains
        self.possible = 0  # duplicates that runs which have ended said are possible
        self.dropped = 0  # records that these gave up
        self.volatile = False  # QoS 0 or a clean session: a kill or a lost connection loses what nobody keeps

    # -- what is told -------------------------------------------------------------------------------

    def stored(self, record: bytes) -> None:
        self.stream_stored[record] += 1

    def excuse(self, message: Message) -> None:
        self.excused += len(message.records)

    def safe(self, record: bytes) -> bool:
        return (
            self.stream_stored.get(record, 0) > 0
            or (self.spool is not None and self.spool.has(record))
            or (self.letters is not None and self.letters.has(record))
            or any(spool.has(record) for spool in self.spools)
        )

    def unsafe(self, message: Message) -> list[bytes]:
        """Records of it that are nowhere."""
        if message.whole:
            kept = self.unkept or (self.letters is not None and self.letters.has(message.payload))
            return [] if kept else [message.payload]
        missing = [record for record in message.records if not self.safe(record)]
        if missing and self.letters is not None and self.letters.has(message.payload):
            return []
        return missing

    def _units(self, message: Message) -> list[bytes]:
        """What of it is lost, as the product counts: a payload that is set aside as a whole is one."""
        missing = self.unsafe(message)
        return missing[:1] if self.unkept and len(missing) == len(message.records) else missing

    def acknowledged(self, message: Message, name: str) -> None:
        self.answers += 1
        if self.drops or self.unkept:
            return
        if missing := self.unsafe(message):
            raise Finding(
                f"{name} of message {message.serial} too early: {len(missing)} of {len(message.records)} records are"
                f" nowhere, {missing[0][:40]!r} first"
            )

    # -- at the end -----------------------------------------------------------------------------------

    def settle(self, possible: int, dropped: int) -> None:
        """Everything has ended: do the sums balance?"""
        lost = [
            record
            for message in self.messages
            if not message.given_up and message.qos and (message.sent or not self.volatile)
            for record in self._units(message)
        ]
        allowed = self.dropped + dropped if self.drops or self.unkept else 0
        if self.volatile:
            lost = []
        if len(lost) > allowed:
            raise Finding(
                f"{len(lost)} records are lost, {allowed} were given up as told: {[each[:40] for each in lost[:3]]}"
            )
        unanswered = [
            each.serial for each in self.messages
            if each.qos and not each.given_up and not each.acked and not self.volatile
        ]  # fmt: skip
        if unanswered:
            raise Finding(f"{len(unanswered)} messages were never acknowledged: {unanswered[:5]}")
        twice = sum(count - 1 for count in self.stream_stored.values() if count > 1)
        bound = self.possible + possible + self.excused
        if twice > bound:
            raise Finding(
                f"{twice} duplicates, but only {bound} were said to be possible ({self.excused} of them the broker's)"
            )
        if twice:
            self.world.mark("duplicates within the bound")


def identity(stats: dict[str, Any]) -> None:
    ends = ("stored", "dead_lettered", "filtered", "dropped", "in_flight", "spooled")
    found = {name: stats.get(name, 0) for name in ends}
    if stats["received"] != sum(found.values()):
        raise Finding(f"identity: received {stats['received']} is not the sum of {found}")


def live_batches(batcher: Any) -> list[Batch]:
    """Every batch of this batcher that is not spent, whoever holds it."""
    found = []
    for each in gc.get_objects():
        if type(each) is Batch and each.batcher is batcher:
            try:
                each.counts  # noqa: B018 - raises when it is spent
            except LibraryError:
                continue
            found.append(each)
    return found


def memory(world: World, run: Any) -> None:
    """What the budget is charged with is what the batches cost that are alive, whoever holds them.

    Looked at when nothing is open, nothing waits to be set aside, and there are no aggregates, whose runs cannot be
    seen from outside.
    """
    batcher = run.delivery.batcher
    if (
        batcher.open_records
        or batcher.ready
        or run.dead_letters.waiting
        or run.dead_letters.writing
        or batcher.aggregate_bytes
    ):
        return
    charged = run.delivery.budget.bytes
    if run.delivery.backlog is not None and run.delivery.backlog.spool is not None:
        charged += run.delivery.backlog.window.budget.bytes
    frame = len(b'{"Records":[],}') - 1 + len(run.client.target_json())
    held = 0
    for batch in live_batches(batcher):
        if batch.overhead < Batch.__basicsize__:
            raise Finding(f"a batch of {len(batch)} records is charged {batch.overhead} bytes besides its entries")
        held += batch.overhead + batch.nbytes - frame + len(batch) * _ENTRY_BYTES
    if charged != held:
        raise Finding(f"the budget is charged with {charged} bytes, the batches that are alive cost {held}")
    if held:
        world.mark("memory charged is memory held")


def bugs(world: World) -> None:
    """What nobody caught, and what the watchdog had to wake."""
    if world.stalls:
        raise Finding(f"the watchdog fired: {world.stalls[0]}")
    for context in world.loop.bugs:
        error = context.get("exception")
        raise Finding(f"the loop's exception handler was told: {context.get('message')}: {error!r}") from error


def look(world: World, run: Any, stats: dict[str, Any]) -> None:
    """Marks for rare states of the product, seen from outside."""
    mark = world.mark
    for name, count in stats["flushed_by_reason"].items():
        if count:
            mark(f"a batch closed: {name}")
    if run.subscriber.paused:
        mark("reading is paused")
    if run.delivery.budget.full:
        mark("the budget is full")
    if stats["redelivered"]:
        mark("messages came again")
    if stats["throttled"]:
        mark("throttled")
    if run.delivery.sender.draws_for_room:
        mark("keys are drawn for room")
    if run.delivery.sender.operator_error:
        mark("an operator must act")
    if stats["dead_lettered"]:
        mark("dead-lettered")
    if stats["dropped"]:
        mark("dropped")
    if run.dead_letters.waiting:
        mark("dead letters wait")
    if run.acks.unacked > 10_000:
        mark("more than 10,000 unacknowledged")
    if stats.get("spooling"):
        mark("spooling")
    if stats.get("spool_error"):
        mark("the spool is broken")
    if run.delivery.backlog is not None and run.delivery.backlog.full:
        mark("the spool is full")
    if run.delivery.backlog is not None and run.delivery.backlog.safe:
        mark("spooled records are in memory again")
    if run.subscriber.granted_window < 20:
        mark("a small window was learned")
    if run.subscriber.coalescing:
        mark("reads are coalesced")
