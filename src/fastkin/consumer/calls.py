"""The three calls of a reader: arguments that are checked in, answers that are checked out.

An answer is checked because it may come from anything that stands in for Kinesis; what is missing in it is an
UnexpectedResponse that names it, where a KeyError from within would tell nobody what went wrong.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import orjson

from fastkin._codec import ConsumerRecord, Reading
from fastkin.aws.error_table import telling_requests
from fastkin.errors import Action, KinesisError, LibraryError, UnexpectedResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from fastkin.aws.client import Client
    from fastkin.aws.shards import Shard
    from fastkin.consumer.positions import Position

log: logging.Logger = logging.getLogger("fastkin.consumer")

MOST_RECORDS = 10_000  # of one GetRecords: the API's page
# Records that are made in one go, some 10 ms at worst: of aggregates an answer of 10 MiB may have 1.7 million, and
# nobody else gets on meanwhile.
PORTION = 4096
BACKOFF_S = (0.1, 10.0)  # first and longest wait of a call that goes again
WARN_EVERY_S = 5.0
T = TypeVar("T")
EXPIRED = frozenset({"ExpiredIteratorException", "ExpiredNextTokenException"})


class Batch(NamedTuple):
    """What one GetRecords gave.

    millis_behind_latest: how far behind the newest record of the shard it ends; 0 when there is nothing more
    next_iterator: for the next call, good for five minutes; None only at the end of a shard that was split or merged
    child_shards: ids of the shards that follow it, told with its end
    """

    records: list[ConsumerRecord]
    millis_behind_latest: int
    next_iterator: str | None
    child_shards: list[str]


class Answer(NamedTuple):
    """The same, while its records are not made yet."""

    records: Reading
    millis_behind_latest: int
    next_iterator: str | None
    child_shards: list[str]


class Calls:
    """Calls about one stream. KinesisError for what Kinesis refuses; LibraryError before anything is sent."""

    def __init__(self, client: Client, *, raw: bool, strict: bool, as_stored: bool) -> None:
        self._client = client
        self._raw = raw
        self._strict = strict
        self._as_stored = as_stored
        self._warned = float("-inf")
        self.throttled: int = 0
        self.decode_errors: int = 0

    def now(self) -> float:
        """The time of the service, as well as it is known."""
        return time.time() + self._client.clock_offset

    async def list_shards(self) -> list[Shard]:
        return await self._client.list_shards()

    async def iterator(self, shard_id: str, position: Position) -> str:
        if not isinstance(shard_id, str) or not shard_id:
            raise LibraryError("Non empty argument required: shard_id")
        request = {**self._target(), "ShardId": shard_id, **position.members()}
        with telling_requests():
            answer = await self._ask("GetShardIterator", request)
            iterator = answer.get("ShardIterator")
            if not isinstance(iterator, str) or not iterator:
                raise UnexpectedResponse("UnexpectedResponse", "GetShardIterator: no ShardIterator in the answer")
            return iterator

    async def records(self, iterator: str, limit: int | None, shard_id: str | None = None) -> Answer:
        """One GetRecords. `portions` or `whole` makes the records of its answer."""
        if not isinstance(iterator, str) or not iterator:
            raise LibraryError("Non empty argument required: iterator, a str as get_shard_iterator gives it")
        request: dict[str, Any] = {"ShardIterator": iterator}
        if limit is not None:
            check_limit(limit)
            request["Limit"] = limit
        if arn := self._client.kinesis.stream_arn:
            request["StreamARN"] = arn
        with telling_requests():
            return self._answer(await self._ask("GetRecords", request), shard_id)

    async def portions(self, reading: Reading) -> AsyncIterator[tuple[list[ConsumerRecord], bool]]:
        """The records of an answer in portions, each with whether another one follows; the last may be empty."""
        if self._strict:
            # One that is no JSON refuses them all, so none is handed out before the last was looked at.
            yield await self.whole(reading), False
            return
        more = True
        while more:
            records = self._take(reading)
            more = reading.more
            yield records, more

    async def whole(self, reading: Reading) -> list[ConsumerRecord]:
        """All records of an answer; others get on in between."""
        records = self._take(reading)
        while reading.more:
            await asyncio.sleep(0)
            records += self._take(reading)
        return records

    def _take(self, reading: Reading) -> list[ConsumerRecord]:
        before = reading.wrong
        records = reading.take(PORTION)
        first = reading.first_wrong
        if first is not None and self._strict:
            with telling_requests():
                raise UnexpectedResponse(
                    "UnexpectedResponse", f"record {first.sequence_number} of the answer: {first.error}"
                )
        self.decode_errors += reading.wrong - before
        return records

    def _answer(self, answer: dict[str, Any], shard_id: str | None) -> Answer:
        told, behind = answer.get("Records"), answer.get("MillisBehindLatest") or 0
        following, children = answer.get("NextShardIterator"), answer.get("ChildShards") or []
        if (
            not isinstance(told, list)
            or not isinstance(behind, int)
            or not isinstance(following, str | None)
            or not isinstance(children, list)
        ):
            raise UnexpectedResponse("UnexpectedResponse", "GetRecords: a member is missing or of another type")
        records = Reading(told, shard_id, self._raw, self._as_stored)
        ids = [str(child["ShardId"]) for child in children if isinstance(child, dict) and child.get("ShardId")]
        return Answer(records, behind, following or None, ids)

    async def patiently(self, call: Callable[[], Awaitable[T]], patience_s: float | None) -> T:
        """Make a call again while what fails may pass: throttles, and trouble on the way for at most `patience_s`.

        Raises what does not pass, and what says that an iterator or a page has expired.
        """
        patience = self.patience(patience_s)
        while True:
            try:
                return await call()
            except UnexpectedResponse:
                raise  # who answers nonsense would answer it again
            except KinesisError as error:
                if error.code in EXPIRED or error.action not in (Action.THROTTLE, Action.RETRY):
                    raise
                await patience.bear(error)

    def patience(self, patience_s: float | None) -> Patience:
        """For trouble that begins now."""
        return Patience(self, patience_s)

    def warn(self, error: KinesisError) -> None:
        # Five calls a second are what a shard gives to all its readers together: to meet that bound is no trouble.
        now = time.monotonic()
        if error.action is Action.THROTTLE or now - self._warned < WARN_EVERY_S:
            log.debug("stage=read goes again: %s", error)
            return
        self._warned = now
        log.warning("stage=read goes again: %s", error)

    def _target(self) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(b"{" + self._client.target_json() + b"}")
        return found

    async def _ask(self, target: str, request: dict[str, Any]) -> dict[str, Any]:
        body = await self._client.call(target, orjson.dumps(request))
        try:
            answer = orjson.loads(body)
        except orjson.JSONDecodeError:
            answer = None
        if not isinstance(answer, dict):
            raise UnexpectedResponse("UnexpectedResponse", f"{target}: the answer is no JSON object")
        return answer


class Patience:
    """Growing waits while a call fails, and the end of them: throttles are always borne, other trouble `patience_s`."""

    def __init__(self, calls: Calls, patience_s: float | None) -> None:
        self._calls = calls
        self._patience_s = patience_s
        self._wait = BACKOFF_S[0]
        self._began = time.monotonic()

    async def bear(self, error: KinesisError) -> None:
        """Wait, with a WARNING. Raises the error when it has lasted too long."""
        if error.action is Action.THROTTLE:
            self._calls.throttled += 1
        elif self._patience_s is not None and time.monotonic() - self._began >= self._patience_s:
            raise error
        self._calls.warn(error)
        self._wait = min(BACKOFF_S[1], random.uniform(BACKOFF_S[0], 3 * self._wait))  # noqa: S311
        await asyncio.sleep(max(self._wait, error.retry_after or 0.0))


def check_limit(limit: int) -> None:
    """LibraryError when one GetRecords cannot be asked for so many records."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MOST_RECORDS:
        raise LibraryError(f"limit: {limit!r} is not 1 to {MOST_RECORDS} records")
