"""Puts COUNT records of SIZE bytes with one producer, an outcome per record; prints its own CPU time.

python produce.py NAME URL COUNT SIZE
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from typing import Any

import uvloop
from _measure import Meter

name, url, count, size = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
RECORDS = [b"%08d" % n + b"x" * (size - 8) for n in range(1000)]
KEYS = {"region_name": "us-east-1", "aws_access_key_id": "AK", "aws_secret_access_key": "SK"}


async def with_fastkin() -> Meter:
    import fastkin

    async with fastkin.Producer(
        "bench", region="us-east-1", endpoint_url=url, access_key="AK", secret_key="SK", shard_map=False
    ) as producer:
        meter = Meter()
        receipts = [await producer.put(RECORDS[n % 1000]) for n in range(count)]
        await producer.flush()
        assert all(receipt.done() for receipt in receipts)
        assert receipts[-1].result().sequence_number
    return meter


async def with_fastkin_many() -> Meter:
    """The same from lists of 500, as put_records() of an SDK has them."""
    import fastkin

    async with fastkin.Producer(
        "bench", region="us-east-1", endpoint_url=url, access_key="AK", secret_key="SK", shard_map=False
    ) as producer:
        meter = Meter()
        receipts = []
        for first in range(0, count, 500):
            batch = [RECORDS[n % 1000] for n in range(first, min(first + 500, count))]
            receipts += await producer.put_many(batch)
        await producer.flush()
        assert all(receipt.done() for receipt in receipts)
        assert receipts[-1].result().sequence_number
    return meter


async def with_calls(put: Any) -> None:
    """Full calls, eight at a time, the outcome of each record looked at."""

    async def call(first: int) -> None:
        batch = [
            {"Data": RECORDS[n % 1000], "PartitionKey": str(uuid.uuid4())}
            for n in range(first, min(first + 500, count))
        ]
        await put(batch)

    limit = asyncio.Semaphore(8)

    async def limited(first: int) -> None:
        async with limit:
            await call(first)

    await asyncio.gather(*(limited(first) for first in range(0, count, 500)))


async def with_aiobotocore() -> Meter:
    from aiobotocore.session import get_session
    from botocore.config import Config

    config = Config(retries={"total_max_attempts": 1}, max_pool_connections=16)
    async with get_session().create_client("kinesis", endpoint_url=url, config=config, **KEYS) as client:

        async def put(batch: list[dict[str, Any]]) -> None:
            answer = await client.put_records(StreamName="bench", Records=batch)
            assert all("SequenceNumber" in entry for entry in answer["Records"])

        meter = Meter()
        await with_calls(put)
    return meter


async def with_capo() -> Meter:
    from capo_kinesis import AsyncKinesisClient

    async with AsyncKinesisClient(
        region="us-east-1", endpoint=url, credentials={"access_key": "AK", "secret_key": "SK"}
    ) as client:

        async def put(batch: list[dict[str, Any]]) -> None:
            records = [{"data": record["Data"], "partition_key": record["PartitionKey"]} for record in batch]
            answer = await client.put_records(records, stream_name="bench")
            assert answer["failed_record_count"] == 0

        meter = Meter()
        await with_calls(put)
    return meter


async def with_aiokpl() -> Meter:
    from aiokpl import Config, Producer

    config = Config(
        region="us-east-1", endpoint_url=url, aws_access_key_id="AK", aws_secret_access_key="SK",
        rate_limit_records_per_sec_per_shard=1e9, rate_limit_bytes_per_sec_per_shard=1e12,
    )  # fmt: skip
    async with Producer(config) as producer:
        meter = Meter()
        outcomes = [
            await producer.put_record(stream="bench", partition_key=str(uuid.uuid4()), data=RECORDS[n % 1000])
            for n in range(count)
        ]
        for outcome in outcomes:
            assert (await outcome.wait()).success
    return meter


makers = {
    "fastkin": with_fastkin,
    "fastkin-many": with_fastkin_many,
    "aiobotocore": with_aiobotocore,
    "capo-kinesis": with_capo,
    "aiokpl": with_aiokpl,
}
uvloop.run(makers[name]()).report(count)
