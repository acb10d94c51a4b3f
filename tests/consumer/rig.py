"""What the tests of the consumer share: a consumer of an endpoint, and records put into it."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from fastkin.consumer import Consumer
from support.readback import kinesis_client
from support.servers import ACCESS_KEY, SECRET_KEY

FIRST = "shardId-000000000000"
HALF = str(1 << 127)


def consumer(url: str, stream: str = "s", **options: Any) -> Consumer:
    keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "poll_s": 0.02}
    return Consumer(stream, region="us-east-1", endpoint_url=url, **(keys | options))


async def put(url: str, payloads: list[bytes], stream: str = "s", *, key: str | None = None) -> None:
    """Each with a key of its own, or all with one."""
    async with kinesis_client(url, attempts=5) as client:
        for at in range(0, len(payloads), 500):
            records = [
                {"Data": data, "PartitionKey": key or f"k{at + n}"} for n, data in enumerate(payloads[at : at + 500])
            ]
            answer = await client.put_records(StreamName=stream, Records=records)
            assert answer["FailedRecordCount"] == 0


async def take(consuming: Consumer, count: int, position: Any = "trim_horizon") -> list[Any]:
    """So many records of its stream; then it is left, with what was read counted as far as it was asked for."""
    taken: list[Any] = []
    records = consuming.stream(position)
    try:
        async for record in records:
            taken.append(record)
            if len(taken) == count:
                break
    finally:
        await records.aclose()
    return taken


def told(data: bytes, key: str | None = "k", sequence: str = "7") -> dict[str, Any]:
    """A record as GetRecords tells it."""
    return {
        "Data": base64.b64encode(data).decode(),
        "PartitionKey": key,
        "SequenceNumber": sequence,
        "ApproximateArrivalTimestamp": 1_764_000_000.5,
    }


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def aggregate(records: list[tuple[int, bytes]], keys: list[str]) -> bytes:
    message = b"".join(field(1, key.encode()) for key in keys)
    message += b"".join(field(3, field(1, index) + field(3, data)) for index, data in records)
    return sealed(message)


def sealed(message: bytes) -> bytes:
    return b"\xf3\x89\x9a\xc2" + message + hashlib.md5(message).digest()
