"""Dead letters in another stream: one JSON record each, with the fields of a line of the file.

A letter larger than a record is split: its parts have the same fields and partition key, a slice of the payload each,
and besides `id`, `part` (from 0) and `parts`. Nothing is cut off and nothing is held back for its size.

The letters have a batcher, a budget and a sender of their own. One that the stream refuses does not become a dead
letter in its turn: it is put again until it is taken, and what it came from waits unacknowledged.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import uuid
from typing import TYPE_CHECKING, Any

from fastkin._codec import KeyPlan
from fastkin.aws.transports import make_client
from fastkin.deadletter.file import as_json, fields_of
from fastkin.deadletter.insist import insist
from fastkin.delivery.delivery import Delivery, Options
from fastkin.errors import Action, ClosedError, ConfigError, KinesisError
from fastkin.limits import DEFAULT_CALL_BYTES, RECORD_BYTES
from fastkin.runtime.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from fastkin._codec import Receipt
    from fastkin.aws.client import Client
    from fastkin.config import Kinesis
    from fastkin.deadletter.file import Spill
    from fastkin.results import PutResult

_LOG = logging.getLogger("fastkin.pipeline")

_KEY_BYTES = 36  # a UUID
_HEAD_BYTES = 160  # id, part and parts
_BUDGET_BYTES = 1 << 40  # bounded by who calls: one chunk at a time
_CLOSE_S = 30.0  # for ending the calls: they are cancelled, so this is never used up


def records_of(letter: Mapping[str, Any]) -> Iterator[tuple[bytes, str]]:
    """Data and partition key of the record, or of the parts, of one letter."""
    fields = fields_of(letter)
    key = str(uuid.uuid4())
    data = as_json(fields)
    if len(data) + _KEY_BYTES <= RECORD_BYTES:
        yield data, key
        return
    payload: bytes = letter["payload"]
    head = len(data) - len(fields["payload"]) + _HEAD_BYTES + _KEY_BYTES
    size = (RECORD_BYTES - head) // 4 * 3
    parts = -(-len(payload) // size)
    for part in range(parts):
        piece = base64.b64encode(payload[part * size : (part + 1) * size]).decode("ascii")
        yield as_json({"id": key, "part": part, "parts": parts, **fields, "payload": piece}), key


class Post:
    """A delivery of its own, opened when it is first needed: what is put has a receipt, what is refused fails it."""

    def __init__(self, name: str, kinesis: Kinesis, *, max_calls: int = 1, trusted: bool = False) -> None:
        """`name` is that of the log lines, `trusted` is the delivery's. Nothing is opened here."""
        self.stream: str = kinesis.target
        self.client: Client = make_client(kinesis, name)
        self._name = name
        self._max_calls = max_calls
        self._trusted = trusted
        self._delivery: Delivery | None = None
        self._starting = asyncio.Lock()

    async def start(self, *, key: KeyPlan | None = None, max_record_bytes: int = RECORD_BYTES) -> None:
        """Find credentials and endpoint, once. ConfigError, KinesisError."""
        async with self._starting:
            if self._delivery is not None:
                return
            await self.client.start()
            options = Options(
                budget_bytes=_BUDGET_BYTES, budget_records=1 << 30, max_record_bytes=max_record_bytes,
                max_batch_bytes=max(DEFAULT_CALL_BYTES, max_record_bytes), max_calls=self._max_calls,
                trusted=self._trusted,
            )  # fmt: skip
            delivery = Delivery(self.client, options, name=self._name, stream=self.stream, key=key or KeyPlan("uuid"))
            delivery.open()
            delivery.watchdog.start()
            self._delivery = delivery

    def put(self, data: bytes, key: str | None) -> Receipt[PutResult]:
        """RecordError: it can never be stored as it is."""
        assert self._delivery is not None, "start() first"
        return self._delivery.batcher.put(data, key)

    async def flush(self) -> None:
        """Every receipt so far has ended, well or not; failures that pass are waited out."""
        assert self._delivery is not None, "start() first"
        await self._delivery.flush()

    async def close(self) -> None:
        """What was not stored by then fails with ClosedError."""
        limit = Deadline(_CLOSE_S, self._name)
        if self._delivery is not None:
            await self._delivery.close(limit, spool_limit=limit)
            self._delivery.give_up(ClosedError("closed before the record was stored"))
        await self.client.close()


class LetterStream:
    """Where dead letters go: a stream."""

    deleted = 0

    def __init__(self, pipeline: str, kinesis: Kinesis) -> None:
        self._pipeline = pipeline
        self._post = Post(f"{pipeline}:dead-letters", kinesis)

    @property
    def place(self) -> str:
        return f"stream {self._post.stream}"

    def spill(self) -> None:
        """A stream takes no payload that memory shall not hold."""

    async def collect(self, spill: Spill, piece: bytes) -> None:
        raise NotImplementedError

    async def open(self) -> None:
        """Say at once what is wrong with the stream."""
        try:
            await self._post.start()
            await self._post.client.describe()
        except (KinesisError, ConfigError) as error:
            if isinstance(error, KinesisError) and error.action is Action.OPERATOR and "AccessDenied" in error.code:
                return  # to put is enough; whether that is allowed will show
            _LOG.error(
                "pipeline=%s stage=settle dead letter stream %s: %s; check `dead_letter`, dead letters wait"
                " unacknowledged until it can be written to", self._pipeline, self._post.stream, error,
            )  # fmt: skip

    async def store(self, letters: Sequence[dict[str, Any]]) -> None:
        todo = [record for letter in letters for record in records_of(letter)]

        async def attempt() -> str | None:
            nonlocal todo
            try:
                # Only what was refused goes again. What was stored must not come twice because of its neighbours.
                todo, problem = await self._put(todo)
            except (KinesisError, ConfigError) as error:
                problem = str(error)
            return problem if todo else None

        def say(why: str, again_s: float) -> None:
            _LOG.error(
                "pipeline=%s stage=settle dead letter stream %s takes no dead letters: %s; check the stream or set"
                " another `dead_letter`; %d wait unacknowledged, trying again every %.0f s",
                self._pipeline, self._post.stream, why, len(todo), again_s,
            )  # fmt: skip

        await insist(attempt, say)

    async def _put(self, records: list[tuple[bytes, str]]) -> tuple[list[tuple[bytes, str]], str]:
        """What the stream refused, and why."""
        await self._post.start()
        # All are put before the first is waited for: they share calls, and one round trip.
        receipts = [self._post.put(data, key) for data, key in records]
        await self._post.flush()
        left, problem = [], ""
        for record, receipt in zip(records, receipts, strict=True):
            if (error := receipt.exception()) is not None:
                left.append(record)
                problem = str(error)
        return left, problem

    async def close(self) -> None:
        await self._post.close()
