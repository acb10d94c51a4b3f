"""Reads a whole stream back with aiobotocore: what the end-to-end tests believe.

    records = await read_stream(server.url, "welders")

Works with kinesalite, kinesis-mock and the emulator, and is told nothing but the URL.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class ReadRecord(NamedTuple):
    key: str | None
    data: bytes
    shard: str


@contextlib.asynccontextmanager
async def kinesis_client(
    url: str, *, attempts: int = 1, service: str = "kinesis", **options: Any
) -> AsyncIterator[Any]:
    """aiobotocore's client for a local server; no retries unless asked for."""
    config = AioConfig(
        retries={"total_max_attempts": attempts, "mode": "standard"},
        connect_timeout=5,
        read_timeout=options.pop("read_timeout", 30),
        **options.pop("config", {}),
    )
    arguments = {
        "region_name": "us-east-1",
        "endpoint_url": url,
        "aws_access_key_id": ACCESS_KEY,
        "aws_secret_access_key": SECRET_KEY,
        **options,
    }
    async with get_session().create_client(service, config=config, **arguments) as client:
        yield client


async def read_stream(url: str, stream: str, *, timeout: float = 120.0) -> list[ReadRecord]:
    """Every record of every shard, closed ones included, from TRIM_HORIZON to the end.

    Ordered by shard, within a shard as stored.
    """
    async with asyncio.timeout(timeout), kinesis_client(url, attempts=5) as client:
        shards: list[str] = []
        request: dict[str, Any] = {"StreamName": stream}
        while True:
            page = await client.list_shards(**request)
            shards += [shard["ShardId"] for shard in page["Shards"]]
            if not page.get("NextToken"):
                break
            request = {"NextToken": page["NextToken"]}
        records: list[ReadRecord] = []
        for shard in shards:
            records += await _read_shard(client, stream, shard)
        return records


async def _read_shard(client: Any, stream: str, shard: str) -> list[ReadRecord]:
    answer = await client.get_shard_iterator(StreamName=stream, ShardId=shard, ShardIteratorType="TRIM_HORIZON")
    iterator = answer["ShardIterator"]
    records: list[ReadRecord] = []
    while iterator:
        page = await client.get_records(ShardIterator=iterator, Limit=10_000)
        records += [ReadRecord(record.get("PartitionKey"), record["Data"], shard) for record in page["Records"]]
        # kinesalite says 0 although more follows: only an empty page is the end.
        if not page["Records"] and not page["MillisBehindLatest"]:
            break
        iterator = page.get("NextShardIterator")
    return records
