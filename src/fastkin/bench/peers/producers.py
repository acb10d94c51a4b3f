"""Producers, each behind the same two calls. All of them know at the end that every record was stored."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import fastkin
from fastkin.bench.plan import EMULATOR, KEY, Plan
from fastkin.bench.service import value_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

_CALLS = 8  # at a time
_RECORDS = 500  # of one call


class Putter(Protocol):
    """A producer at work."""

    async def send(self, records: list[bytes]) -> None:
        """Take them; their outcomes may come later."""

    async def flush(self) -> None:
        """Every record so far is stored, or this raises."""


class _Fastkin:
    def __init__(self, producer: fastkin.Producer) -> None:
        self._producer = producer
        self._open: deque[Any] = deque()

    async def send(self, records: list[bytes]) -> None:
        put, receipts = self._producer.put, self._open
        for record in records:
            receipts.append(await put(record))
        # what has ended is looked at and let go: a receipt that failed raises here
        while receipts and receipts[0].done():
            receipts.popleft().result()

    async def flush(self) -> None:
        await self._producer.flush()
        while self._open:
            self._open.popleft().result()


class _Calls:
    """Full calls, some at a time, the outcome of each looked at."""

    def __init__(self, call: Callable[[list[bytes]], Awaitable[None]]) -> None:
        self._call = call
        self._open: set[asyncio.Task[None]] = set()

    async def send(self, records: list[bytes]) -> None:
        for at in range(0, len(records), _RECORDS):
            while len(self._open) >= _CALLS:
                await self._some()
            self._open.add(asyncio.create_task(self._one(records[at : at + _RECORDS])))

    async def _one(self, records: list[bytes]) -> None:
        await self._call(records)

    async def _some(self) -> None:
        done, self._open = await asyncio.wait(self._open, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            each.result()

    async def flush(self) -> None:
        while self._open:
            await self._some()


class _Waited:
    """A producer whose put gives something to wait for, or whose flush waits for all."""

    def __init__(self, put: Callable[[bytes], Awaitable[Any]], flush: Callable[[], Awaitable[None]]) -> None:
        self._put = put
        self._flush = flush

    async def send(self, records: list[bytes]) -> None:
        for record in records:
            await self._put(record)

    async def flush(self) -> None:
        await self._flush()


def _entries(records: list[bytes]) -> list[dict[str, Any]]:
    return [{"Data": record, "PartitionKey": str(uuid.uuid4())} for record in records]


def _check(answer: dict[str, Any]) -> None:
    if not all("SequenceNumber" in entry for entry in answer["Records"]):
        raise RuntimeError("records failed, and this producer has no retry: run it without --limits")


@contextlib.asynccontextmanager
async def putter(plan: Plan) -> AsyncIterator[Putter]:
    """The producer that the plan names, open."""
    async with _MAKERS[plan.peer](plan) as made:
        yield made


@contextlib.asynccontextmanager
async def _with_fastkin(plan: Plan) -> AsyncIterator[Putter]:
    options: dict[str, Any] = {key: value_of(value) for key, value in plan.option.items()}
    if plan.endpoint == EMULATOR:
        options |= {"access_key": KEY, "secret_key": KEY}
    async with fastkin.Producer(
        plan.stream, region=plan.region, endpoint_url=plan.endpoint_url, **options
    ) as producer:  # fmt: skip
        yield _Fastkin(producer)


@contextlib.asynccontextmanager
async def _with_aiobotocore(plan: Plan) -> AsyncIterator[Putter]:
    from aiobotocore.session import get_session
    from botocore.config import Config

    config = Config(retries={"total_max_attempts": 1}, max_pool_connections=16)
    async with get_session().create_client("kinesis", config=config, **_sdk(plan)) as made:
        client: Any = made  # its methods are made of a description that type checkers do not read

        async def call(records: list[bytes]) -> None:
            _check(await client.put_records(StreamName=plan.stream, Records=_entries(records)))

        yield _Calls(call)


@contextlib.asynccontextmanager
async def _with_boto3(plan: Plan) -> AsyncIterator[Putter]:
    import boto3
    from botocore.config import Config

    config = Config(retries={"total_max_attempts": 1}, max_pool_connections=16)
    client: Any = boto3.client("kinesis", config=config, **_sdk(plan))

    def call(records: list[bytes]) -> None:
        _check(client.put_records(StreamName=plan.stream, Records=_entries(records)))

    yield _Calls(lambda records: asyncio.to_thread(call, records))


@contextlib.asynccontextmanager
async def _with_capo(plan: Plan) -> AsyncIterator[Putter]:
    from capo_kinesis import AsyncKinesisClient

    keys = {"access_key": KEY, "secret_key": KEY}
    make: Any = AsyncKinesisClient  # its types want classes where it takes dicts
    async with make(region=plan.region, endpoint=plan.endpoint_url, credentials=keys) as client:

        async def call(records: list[bytes]) -> None:
            entries = [{"data": record, "partition_key": str(uuid.uuid4())} for record in records]
            answer: Any = await client.put_records(entries, stream_name=plan.stream)
            if answer["failed_record_count"]:
                raise RuntimeError("records failed, and this producer has no retry: run it without --limits")

        yield _Calls(call)


@contextlib.asynccontextmanager
async def _with_aiokpl(plan: Plan) -> AsyncIterator[Putter]:
    from aiokpl import Config, Producer

    config = Config(
        region=plan.region, endpoint_url=plan.endpoint_url, aws_access_key_id=KEY, aws_secret_access_key=KEY,
        rate_limit_records_per_sec_per_shard=1e9, rate_limit_bytes_per_sec_per_shard=1e12,
    )  # fmt: skip
    async with Producer(config) as producer:
        outcomes: list[Any] = []

        async def put(record: bytes) -> None:
            outcomes.append(await producer.put_record(stream=plan.stream, partition_key=str(uuid.uuid4()), data=record))

        async def flush() -> None:
            for outcome in outcomes:
                if not (await outcome.wait()).success:
                    raise RuntimeError("a record failed")
            outcomes.clear()

        yield _Waited(put, flush)


@contextlib.asynccontextmanager
async def _with_async_kinesis(plan: Plan) -> AsyncIterator[Putter]:
    from kinesis import Producer
    from kinesis.processors import StringProcessor

    async with Producer(
        stream_name=plan.stream, region_name=plan.region, endpoint_url=plan.endpoint_url, buffer_time=0.05,
        put_rate_limit_per_shard=10_000_000, put_bandwidth_limit_per_shard=10_000_000, processor=StringProcessor(),
    ) as made:  # fmt: skip
        producer: Any = made  # what it enters is declared as its base

        async def put(record: bytes) -> None:
            await producer.put(record.decode())

        yield _Waited(put, producer.flush)


def _sdk(plan: Plan) -> dict[str, Any]:
    keys = {"aws_access_key_id": KEY, "aws_secret_access_key": KEY} if plan.endpoint == EMULATOR else {}
    return {"region_name": plan.region, "endpoint_url": plan.endpoint_url, "verify": plan.endpoint_ca, **keys}


_MAKERS: dict[str, Callable[[Plan], contextlib.AbstractAsyncContextManager[Putter]]] = {
    "fastkin": _with_fastkin,
    "aiobotocore": _with_aiobotocore,
    "boto3": _with_boto3,
    "capo-kinesis": _with_capo,
    "aiokpl": _with_aiokpl,
    "async-kinesis": _with_async_kinesis,
}
