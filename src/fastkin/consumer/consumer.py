"""`fastkin.Consumer`: the calls one by one, and `stream()`, which reads all shards. It owns the client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator  # noqa: TC003 - who reads our annotations needs it
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, Self

from fastkin._codec import ConsumerRecord, Seen
from fastkin.aws.shards import Shard  # noqa: TC001
from fastkin.aws.transports import make_client
from fastkin.config import Kinesis
from fastkin.consumer.all_shards import AllShards
from fastkin.consumer.calls import Batch, Calls, check_limit
from fastkin.consumer.checkpoints import SHARD_END, Checkpoints, place
from fastkin.consumer.positions import Position, ShardIteratorType
from fastkin.consumer.shard_reader import Pace
from fastkin.errors import ClosedError, ConfigError, LibraryError
from fastkin.settings.arguments import check_arguments, check_keys

if TYPE_CHECKING:
    from fastkin.aws.client import Client
    from fastkin.consumer.shard_reader import Portion
    from fastkin.status.metrics import ConsumerCollector
else:
    ConsumerCollector = Any  # what get_type_hints() shows: the collector would load prometheus_client

_LOG = logging.getLogger("fastkin.consumer")

MOST_SEEN = 100_000_000
# Keys that tell one record from another: of a UUID drawn for it, or made from what it holds.
_TELLING_KEYS = frozenset({"uuid", "content"})


class Consumer:
    """Reads one stream.

        async with Consumer("welders", region="eu-west-1", checkpoints=FileCheckpoints("welders.json")) as consumer:
            async for record in consumer.stream("trim_horizon"):
                print(record.data)

    `stream` reads all shards, and goes on over splits and merges. `list_shards`, `get_shard_iterator` and
    `get_records` are the single calls, without retries.
    """

    # Large because it is a table, as that of `Producer`: each argument with its type, default and meaning.
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
        max_connections: int = 16,
        request_timeout_s: float = 30.0,
        raw: bool = False,
        strict: bool = False,
        as_stored: bool = False,
        dedupe: int = 0,
        partition_key: str = "uuid",
        checkpoints: Checkpoints | None = None,
        limit: int = 1000,
        poll_s: float = 0.25,
        patience_s: float | None = None,
    ) -> None:
        """One of `stream` and `stream_arn` is needed; credentials come from the SDK's chain unless given.

        raw: `record.data` is bytes; else the JSON value, and a record that is no JSON has `error` set and no data.
        strict: a record that is no JSON raises UnexpectedResponse, and the others of its call are not handed out.
        as_stored: KPL aggregates are not taken apart.
        dedupe: a record is left out by `stream` whose key, data and place in an aggregate were seen among the last so
            many, over all shards, so that what was sent twice is seen once; 40 bytes each. 0: everything is handed out.
        partition_key: what the writers' keys are made of, "uuid" or "content"; with any other, equal readings of one
            machine would look like one that was sent twice, so `dedupe` is refused. A record whose key is no UUID is
            never left out.
        checkpoints: keeps how far each shard was read, and `stream` goes on there.
        limit: records of one GetRecords, 1 to 10,000.
        poll_s: between two calls to a shard that has nothing new; a shard answers five a second (the API's page).
        patience_s: how long `stream` bears trouble on the way to Kinesis before it raises; None: for ever.

        LibraryError: an argument is wrong. Nothing is sent and no file or socket is opened here.
        """
        check_arguments({name: value for name, value in locals().items() if name != "partition_key"})
        if not (stream or stream_arn):
            raise LibraryError("Non empty argument required: stream or stream_arn")
        check_keys(access_key, secret_key)
        check_limit(limit)
        _check_number("dedupe", dedupe, 0, MOST_SEEN, "records", whole=True)
        _check_number("poll_s", poll_s, 0, 60, "s")
        if patience_s is not None:
            _check_number("patience_s", patience_s, 0, 86_400, "s")
        if dedupe and partition_key not in _TELLING_KEYS:
            raise LibraryError(
                f"dedupe: with partition_key {partition_key!r} equal readings cannot be told from one that was sent"
                ' twice: give "uuid" or "content" if that is what the writers use, or leave dedupe out'
            )
        settings = Kinesis(
            stream=stream, stream_arn=stream_arn, region=region, endpoint_url=endpoint_url,
            access_key=access_key, secret_key=secret_key, session_token=session_token,
            profile=profile, role_arn=role_arn, external_id=external_id, session_name=session_name,
            transport=transport, max_connections=max_connections, request_timeout_s=request_timeout_s,
        )  # fmt: skip
        self._name = stream or str(stream_arn)
        try:
            self._client: Client = make_client(settings, self._name)
        except ConfigError as error:
            raise LibraryError(str(error)) from None
        self._calls = Calls(self._client, raw=raw, strict=strict, as_stored=as_stored)
        self._pace = Pace(limit=limit, poll_s=poll_s, patience_s=patience_s)
        self._dedupe = dedupe
        self._checkpoints = checkpoints
        self._shards: list[AllShards] = []  # of each stream() at work
        self._starting = asyncio.Lock()
        self._started = False
        self._kept_open = False  # somebody else than a stream() started it, and will close it
        self._streams = 0  # at work
        self._closed = False
        self._told = False  # that records cannot be told apart
        self._stats = {"records": 0, "bytes": 0, "batches": 0, "duplicates": 0, "reseeks": 0}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Find credentials and endpoint, when it was not done yet. KinesisError or ConfigError when there are none."""
        await self._open()
        self._kept_open = True

    async def _open(self) -> None:
        async with self._starting:
            if self._closed:
                raise ClosedError(f"the consumer of {self._name} is closed: make another one")
            if not self._started:
                await self._client.start()
                self._started = True

    async def close(self) -> None:
        """End what is being read, and close connections."""
        self._closed = True
        for shards in list(self._shards):
            await shards.close()
        await self._client.close()

    async def list_shards(self) -> list[Shard]:
        """Every shard, those closed included, over all pages of the list. KinesisError."""
        await self.start()
        return await self._calls.list_shards()

    async def get_shard_iterator(
        self,
        shard_id: str,
        type: ShardIteratorType | str,  # noqa: A002 - as Kinesis calls it
        *,
        starting_sequence_number: str | None = None,
        timestamp: float | datetime | None = None,
    ) -> str:
        """Where to begin in one shard, good for five minutes.

        LibraryError, before anything is sent, for an unknown type, or without what the type needs. KinesisError.
        """
        if not isinstance(shard_id, str) or not shard_id:
            raise LibraryError("Non empty argument required: shard_id")
        position = Position(type, starting_sequence_number, timestamp)  # type: ignore[arg-type]  # checked there
        await self.start()
        return await self._calls.iterator(shard_id, position)

    async def get_records(self, iterator: str, limit: int | None = None) -> Batch:
        """One GetRecords: at most `limit` Kinesis records (an aggregate is one of them), or 10,000, or 10 MiB.

        LibraryError before anything is sent; KinesisError, of code ExpiredIteratorException after five minutes.
        """
        if not isinstance(iterator, str) or not iterator:
            raise LibraryError("Non empty argument required: iterator, a str as get_shard_iterator gives it")
        if limit is not None:
            check_limit(limit)
        await self.start()
        answer = await self._calls.records(iterator, limit)
        return Batch(await self._calls.whole(answer.records), *answer[1:])

    def stream(
        self, position: Position | ShardIteratorType | str | datetime = "latest"
    ) -> AsyncGenerator[ConsumerRecord, None]:
        """Every record of all shards from `position` on, parents before children; it ends when no shard is left.

        position: "trim_horizon", "latest", a time (RFC 3339, seconds or a datetime), or a Position of those kinds. A
            shard with a checkpoint goes on behind it, and one that follows such a shard begins at its beginning.

        A record counts as read when the next one is asked for; a checkpoint is kept when a batch of a shard was read to
        its end, so what is repeated after a kill is one batch at most. KinesisError for what does not pass by itself;
        LibraryError for a wrong position; CheckpointError when a checkpoint cannot be kept, or says that a shard was
        read to its end which is open: it is of a former stream of this name.

        Who cancels the wait for a record, as asyncio.wait_for does, ends this stream(), for so it is with generators:
        wait in a task of its own, or go on with another stream() and its checkpoints.
        """
        return self._stream(_position(position))

    @property
    def iterator_age_ms(self) -> int:
        """How far the shard that is furthest behind is behind its newest record (MillisBehindLatest); 0: caught up."""
        return max((reader.behind_ms for shards in self._shards for reader in shards.readers.values()), default=0)

    def stats(self) -> dict[str, Any]:
        """Counters of all `stream()` so far, and by shard how far reading is behind."""
        reading = [reader for shards in self._shards for reader in shards.readers.values()]
        return self._stats | {
            "reseeks": self._stats["reseeks"] + sum(shards.reseeks for shards in self._shards)
            + sum(reader.reseeks for reader in reading),
            "throttled": self._calls.throttled,
            "decode_errors": self._calls.decode_errors,
            "iterator_age_ms": self.iterator_age_ms,
            "iterator_age_ms_by_shard": {reader.shard_id: reader.behind_ms for reader in reading},
        }  # fmt: skip

    def metrics(self) -> ConsumerCollector:
        """For a prometheus_client registry: `registry.register(consumer.metrics())`, in the loop that reads.

        It may be scraped in any thread. The figures of stats(), by stream; `fastkin_consumer_iterator_age_ms` by shard.
        """
        from fastkin.status.metrics import ConsumerCollector  # prometheus_client is for who asks

        return ConsumerCollector(self._name, self.stats)

    async def _stream(self, begin: Position) -> AsyncGenerator[ConsumerRecord, None]:
        await self._open()
        self._streams += 1
        store, shards = self._checkpoints, None
        seen = Seen(self._dedupe) if self._dedupe else None
        try:
            marks = await store.load(self._name) if store is not None else {}
            shards = AllShards(self._calls, begin, marks, self._pace, place(store))
            self._shards.append(shards)
            while (portion := await shards.next()) is not None:
                self._stats["batches"] += not portion.more
                async with contextlib.aclosing(self._portion(portion, seen)) as records:
                    async for record in records:
                        yield record
        finally:
            if shards is not None:
                await shards.close()
                self._shards.remove(shards)
                self._stats["reseeks"] += shards.reseeks + sum(one.reseeks for one in shards.readers.values())
            if store is not None:
                await store.close()
            self._streams -= 1
            # Nobody else will close what was opened here. Another stream() may still need it.
            if not self._kept_open and not self._streams:
                self._started = False
                await self._client.close()

    async def _portion(self, portion: Portion, seen: Seen | None) -> AsyncGenerator[ConsumerRecord, None]:
        """The records of one portion, and the checkpoint behind those that were read."""
        stats = self._stats
        whole: str | None = None  # the last Kinesis record that was read whole
        at = portion.before
        try:
            for record in portion.records:
                # Records of an aggregate share a number, by which one cannot go on in its middle.
                if record.sequence_number != at:
                    whole, at = at, record.sequence_number
                if seen is not None and not seen.is_new(record):
                    stats["duplicates"] += 1
                    continue
                stats["records"] += 1
                stats["bytes"] += len(record.raw)
                yield record
            if not portion.more:  # else the next one may begin with more of the last Kinesis record
                whole = SHARD_END if portion.ended else at
            if seen is not None and seen.unknown and not self._told:
                self._told = True
                _LOG.warning(
                    "stage=read stream=%s dedupe: keys of records are no UUIDs: what is sent twice with such a key is"
                    " seen twice; write with partition_key uuid or content", self._name,
                )  # fmt: skip
        finally:
            if whole is not None and self._checkpoints is not None:
                await self._checkpoints.save(portion.shard_id, whole)


def _position(given: object) -> Position:
    if isinstance(given, str) and not isinstance(given, ShardIteratorType):
        given = Position.parse(given)
    elif isinstance(given, datetime):
        given = Position(ShardIteratorType.AT_TIMESTAMP, timestamp=given)
    elif not isinstance(given, Position):
        given = Position(given)  # type: ignore[arg-type]  # checked there
    if given.starting_sequence_number is not None:
        raise LibraryError(
            f"position: {given.kind} is a place in one shard: use get_shard_iterator, or give checkpoints a mark"
        )
    return given


def _check_number(name: str, value: object, least: float, most: float, unit: str, *, whole: bool = False) -> None:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        raise LibraryError(f"{name}: {value!r} is not {least:g} to {most:g} {unit}")
