"""What a pipeline sets aside: bad frames, oversize records, records that Kinesis refuses for good.

Durable first, settled after: a record ends as dead-lettered only when its letter is stored, in a file or in another
stream, and its message is acknowledged then and not before. While letters cannot be stored the records wait, charged
to the budget, so that reading pauses in the end.

What Kinesis refused has no topic in its letter, unless the pipeline subscribes to a single topic: a batch holds
finished records, and keeping the topic of each beside it would cost every record for the sake of these few.

Messages that can be no records at all, too large or ill-formed, come in pieces (`Carrier`): a small one is kept in
memory like other bad payloads, a larger one goes to a file without a name beside the dead letters as it comes. Where
letters go to no file, only its beginning is kept, and the letter says so.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fastkin._codec import DEAD, DROPPED
from fastkin.deadletter.destination import destination
from fastkin.deadletter.file import DeadLetterError, DeadLetters, Spill
from fastkin.deadletter.files import LetterFiles
from fastkin.deadletter.insist import insist
from fastkin.deadletter.stream import LetterStream
from fastkin.mqtt.subscriptions import SHARED
from fastkin.runtime.worker import Worker
from fastkin.status.instruments import LabelledCounter
from fastkin.status.logs import Repeats

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from fastkin._codec import Batch, Batcher, Reject
    from fastkin.config import Pipeline
    from fastkin.files.files import Stream
    from fastkin.mqtt._core import Apart

_LOG = logging.getLogger("fastkin.pipeline")

_HEX_BYTES = 32  # of a bad payload shown in the log
_TOPIC_CHARS = 1024  # of a topic
_LINES_PER_S = 10  # of bad payloads of one kind; what is more is counted
_CHUNK_BYTES = 1 << 20  # of payload written at once, or one batch: bounds memory, and what a rotated file may exceed
_CHUNK_GROUPS = 1000
_MEMORY_BYTES = 1 << 20  # of a message that can be no record: more than that is not held in memory
_CARRIED_COST = 2048  # of one besides its bytes
_BEGINNING_BYTES = 1 << 16  # what is kept of it where letters go to no file


@dataclass(frozen=True, slots=True)
class _Group:
    """What is settled together, once its letters are stored."""

    kind: str
    letters: Callable[[], list[dict[str, Any]]]  # made when it is their turn: a batch is held once, not twice
    settle: Callable[[int], None]
    nbytes: int


class Store(Protocol):
    """Where dead letters go."""

    @property
    def deleted(self) -> int: ...  # letters that rotation deleted

    @property
    def place(self) -> str: ...  # for a log line

    def spill(self) -> Spill | None:
        """For a payload that memory shall not hold. None: this place takes none."""

    async def collect(self, spill: Spill, piece: bytes) -> None:
        """Return when the spill has the piece, however long that takes."""

    async def open(self) -> None:
        """Say as an ERROR what is wrong with the place; it may be mended later."""

    async def store(self, letters: Sequence[dict[str, Any]]) -> None:
        """Return when all are durable, however long that takes."""

    async def close(self) -> None: ...


def make_store(pipeline: Pipeline, letters: Stream | None = None) -> Store | None:
    """None: no `dead_letter`, what is set aside is only logged. `letters`: the files of `file_error_prefix`."""
    if letters is not None:
        return LetterFiles(pipeline.id, letters)
    place = pipeline.dead_letter
    if place in (None, "none"):
        return None
    if (kinesis := destination(pipeline)) is not None:
        return LetterStream(pipeline.id, kinesis)
    return FileStore(
        pipeline.id,
        DeadLetters(place, max_bytes=pipeline.dead_letter_max_bytes, keep=pipeline.dead_letter_keep),
    )


class FileStore:
    """Dead letters in a file, written in a thread."""

    def __init__(self, name: str, dead_letters: DeadLetters) -> None:
        self._name = name
        self._file = dead_letters
        # one thread, so that calls come one after the other: who awaits one may be cancelled while it goes on
        self._worker = Worker(f"fastkin[{name}].dead-letters", f"pipeline={name} stage=settle", self.place)

    @property
    def deleted(self) -> int:
        return self._file.deleted

    async def open(self) -> None:
        try:
            await self._thread(self._file.open)
        except DeadLetterError as error:
            _LOG.error("pipeline=%s stage=settle %s", self._name, error)

    @property
    def place(self) -> str:
        return f"file {self._file.path}"

    def spill(self) -> Spill | None:
        return Spill(self._file.path)

    async def collect(self, spill: Spill, piece: bytes) -> None:
        await self._insist("a message waits for it, and all that comes after that", spill.write, piece)

    async def store(self, letters: Sequence[dict[str, Any]]) -> None:
        waits = f"{len(letters)} dead letters and all that comes after them wait unacknowledged"
        waited_s = await self._insist(waits, self._file.write, letters)
        if waited_s is not None:
            _LOG.warning(
                "pipeline=%s stage=settle dead letter file %s takes letters again after %.0f s",
                self._name, self._file.path, waited_s,
            )  # fmt: skip

    async def _insist(self, waits: str, call: Callable[..., object], *args: object) -> float | None:
        """Try until the disk takes it, and say what waits for that. How many seconds it took; None: it did at once."""

        async def attempt() -> str | None:
            try:
                await self._thread(call, *args)
            except DeadLetterError as error:
                return str(error)
            return None

        def say(why: str, again_s: float) -> None:
            _LOG.error("pipeline=%s stage=settle %s; %s, trying again every %.0f s", self._name, why, waits, again_s)

        return await insist(attempt, say)

    async def close(self) -> None:
        self._file.give_up()
        self._worker.leave(self._file.close)  # after a call that the disk still has
        self._worker.close()

    async def _thread(self, call: Callable[..., object], *args: object) -> None:
        await self._worker.run(call, *args)


class DeadLetterHandler:
    """Takes over what can never be stored, and settles it."""

    def __init__(
        self,
        name: str,
        batcher: Batcher,
        store: Store | None,
        *,
        topics: Sequence[str] = (),
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
        on_settled: Callable[[], None],
        max_packet_bytes: int = 0,
    ) -> None:
        """`store` None: what is set aside is logged and counted as dropped. `topics`: what the pipeline subscribes to.
        `spawn(coroutine, name)` runs a task of the pipeline; `on_settled()` runs after each group that ended.
        `max_packet_bytes`: the intake's, for the log."""
        self._name = name
        self._batcher = batcher
        self._store = store
        self._spawn = spawn
        self._on_settled = on_settled
        self._max_packet_bytes = max_packet_bytes
        self._topic = _only(topics)
        self._lines = Repeats(_LOG, asyncio.get_running_loop().call_later, most=_LINES_PER_S, per_s=1.0)
        self.format_errors: dict[str, int] = {}  # kind -> payloads or records set aside
        # records, by kind of a bad payload or code of Kinesis: sums to batcher.dead_lettered
        self.dead_lettered_by: LabelledCounter = LabelledCounter()
        self.dropped: LabelledCounter = (
            LabelledCounter()
        )  # records that ended here without a letter, for there is no `dead_letter`
        self._deleted_said = 0
        self._carried_cost = 0  # of messages that can be no record and are not stored yet
        self._waiting: list[_Group] = []
        self._writing: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Open the place now, so that a wrong one shows at once."""
        if self._store is not None:
            self._spawn(self._store.open(), "dead-letter open")

    @property
    def writing(self) -> bool:
        return self._writing is not None

    @property
    def waiting(self) -> int:
        """Groups of letters that are not stored yet."""
        return len(self._waiting)

    @property
    def deleted(self) -> int:
        """Dead letters that rotation deleted with the oldest file."""
        return 0 if self._store is None else self._store.deleted

    def rejected(self, reject: Reject) -> None:
        """A payload, or one record of it, that is no record."""
        self.format_errors[reject.kind] = self.format_errors.get(reject.kind, 0) + 1
        topic = reject.topic.decode("utf-8", "replace")
        where = "" if reject.index is None else f" record={reject.index}"
        self._lines.say(
            logging.ERROR, reject.kind,
            "pipeline=%s stage=decode topic=%s%s byte %d: %s (%d bytes, first %s)",
            self._name, ascii(topic[:_TOPIC_CHARS]), where, reject.offset, reject.reason,
            len(reject.payload), reject.payload[:_HEX_BYTES].hex() or "none",
        )  # fmt: skip
        letter = {
            "time": time.time(),
            "topic": topic,
            "reason": reject.reason,
            "offset": reject.offset,
            "index": reject.index,
            "payload": reject.payload,
        }
        settle = self._batcher.settle_reject
        self._lay(_Group(reject.kind, lambda: [letter], lambda outcome: settle(reject, outcome), len(reject.payload)))

    def refused(self, batch: Batch, reason: str) -> None:
        """Kinesis will never take these records."""
        self._lines.say(
            logging.ERROR, "refused",
            "pipeline=%s stage=send %d records refused for good: %s", self._name, len(batch), reason,
        )  # fmt: skip
        now = time.time()

        def letters() -> list[dict[str, Any]]:
            return [
                {"time": now, "topic": self._topic, "reason": reason, "partition_key": key, "payload": data}
                for data, key, _ in batch.entries()
            ]

        code = reason.partition(":")[0]
        self._lay(_Group(code, letters, batch.finish, batch.nbytes))

    def carrier(self, message: Apart) -> Carrier:
        """Takes a message of the broker that can be no record."""
        return Carrier(message, self._store, self._carried)

    def _carried(self, message: Apart, payload: bytes | Spill) -> asyncio.Future[None] | None:
        """All of it is here, or as much as is to be kept. What is returned is done when there is room for more."""
        too_large = message.reason is None
        kind = "too_large" if too_large else "ill_formed"
        self.format_errors[kind] = self.format_errors.get(kind, 0) + 1
        if too_large:
            reason = f"a message of {message.nbytes} bytes, in a packet above max_packet_bytes"
            if self._max_packet_bytes:
                reason += f" ({self._max_packet_bytes})"
        else:
            reason = f"ill-formed PUBLISH: {message.reason}"
        kept = len(payload)
        letter = {
            "time": time.time(),
            "topic": message.topic,
            "reason": reason,
            "offset": message.offset,
            "payload": payload,
            "truncated": kept < message.nbytes,
            "payload_bytes": message.nbytes if kept < message.nbytes else None,
            "packet": not too_large,
        }
        held = payload if isinstance(payload, bytes) else b""
        # Counted as received and charged, though it was never offered: the books must know of what is acknowledged.
        reject = self._batcher.refuse(message.topic or b"", held, kind, reason, message.offset, message.token)
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        # A large one holds a file and a place in the queue: as many of them as would fill the bound are let through,
        # no more.
        cost = _MEMORY_BYTES if isinstance(payload, Spill) else kept + _CARRIED_COST

        def settle(outcome: int) -> None:
            self._carried_cost -= cost
            self._batcher.settle_reject(reject, outcome)
            self._say_carried(message, kept, kind, reason)
            if not stored.done():
                stored.set_result(None)

        self._carried_cost += cost
        self._lay(_Group(kind, lambda: [letter], settle, kept))
        # Many small ill-formed messages go on without a wait. When together they are as much as a large one, reading
        # waits.
        return stored if self._carried_cost >= _MEMORY_BYTES else None

    def _say_carried(self, message: Apart, kept: int, kind: str, reason: str) -> None:
        if self._store is None:
            fate = "acknowledged and dropped, for there is no dead_letter"
        elif kept < message.nbytes:
            fate = f"its first {kept} bytes are in dead letter {self._store.place}, the rest is gone"
        else:
            fate = f"it is in dead letter {self._store.place}"
        topic = (message.topic or b"").decode("utf-8", "backslashreplace")
        self._lines.say(
            logging.ERROR, kind,
            "pipeline=%s stage=intake topic=%s %s: %s%s",
            self._name, ascii(topic[:_TOPIC_CHARS]), reason, fate,
            f" ({message.nbytes} bytes, fault at byte {message.offset})" if message.reason
            else "; raise max_packet_bytes to take such messages",
        )  # fmt: skip

    async def close(self) -> None:
        """After the tasks of the pipeline have ended."""
        self._lines.close()
        if self._store is not None:
            await self._store.close()

    def _lay(self, group: _Group) -> None:
        self._waiting.append(group)
        # One writer: letters stay in the order in which they came, and a full disk is tried by one task, not by a
        # thousand.
        if self._writing is None:
            self._writing = self._spawn(self._write(), "dead-letters")

    async def _write(self) -> None:
        while self._waiting:
            # They stay in the list until they are settled: a stop in between must not end them.
            work = self._chunk()
            outcome = DROPPED
            if self._store is not None:
                outcome = DEAD
                await self._store.store([{"pipeline": self._name, **one} for group in work for one in group.letters()])
                self._say_deleted()
            # Durable from here on. They leave the list before they are settled, for a settlement may bring more
            # letters.
            del self._waiting[: len(work)]
            for group in work:
                self._settle(group, outcome)
            self._on_settled()
        self._writing = None

    def _chunk(self) -> list[_Group]:
        nbytes = 0
        for count, group in enumerate(self._waiting[:_CHUNK_GROUPS]):
            nbytes += group.nbytes
            if count and nbytes > _CHUNK_BYTES:
                return self._waiting[:count]
        return self._waiting[:_CHUNK_GROUPS]

    def _settle(self, group: _Group, outcome: int) -> None:
        dead, dropped = self._batcher.dead_lettered, self._batcher.dropped
        try:
            group.settle(outcome)
        finally:
            # taken from the batcher, which counts the records inside an aggregate: the sums are the same at any moment
            if more := self._batcher.dead_lettered - dead:
                self.dead_lettered_by.add(group.kind, more)
            if more := self._batcher.dropped - dropped:
                self.dropped.add("no_dead_letter", more)

    def _say_deleted(self) -> None:
        deleted = self.deleted
        if deleted > self._deleted_said:
            _LOG.warning(
                "pipeline=%s stage=settle rotation deleted the oldest dead letters: %d are gone, %d since the start;"
                " replay them in time (fastkin dead-letters), or raise dead_letter_keep or dead_letter_max_bytes",
                self._name, deleted - self._deleted_said, deleted,
            )  # fmt: skip
            self._deleted_said = deleted


class Carrier:
    """Takes one message that can be no record, piece by piece."""

    def __init__(
        self,
        message: Apart,
        store: Store | None,
        carried: Callable[[Apart, bytes | Spill], asyncio.Future[None] | None],
    ) -> None:
        """`carried(message, payload)` takes it over when all of it is here; see there for what it returns."""
        self._message = message
        self._store = store
        self._carried = carried
        self._kept = bytearray()
        self._spill: Spill | None = None
        self._most = message.nbytes
        if message.nbytes > _MEMORY_BYTES:
            self._spill = None if self._store is None else self._store.spill()
            self._most = _BEGINNING_BYTES

    async def take(self, piece: bytes) -> None:
        """Return when there is room for the next."""
        if self._spill is not None:
            assert self._store is not None
            await self._store.collect(self._spill, piece)
        elif len(self._kept) < self._most:
            self._kept += piece[: self._most - len(self._kept)]

    async def whole(self) -> None:
        """Return when there is room for the next message: a large one is stored by then."""
        payload = bytes(self._kept) if self._spill is None else self._spill
        self._kept.clear()
        room = self._carried(self._message, payload)
        if room is not None:
            await room


def _only(topics: Sequence[str]) -> str | None:
    """The topic of every message, when the subscription leaves no other."""
    if len(topics) != 1 or topics[0].startswith(SHARED) or "+" in topics[0] or "#" in topics[0]:
        return None
    return topics[0]
