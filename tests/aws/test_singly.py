"""`api = "put_record"` (SP-04): every record by a call of its own, where PutRecords is denied."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from fastkin import Producer, RecordFailed
from fastkin.aws.destinations import KINESIS_SINGLY
from fastkin.aws.transports import make_client
from fastkin.config import Kinesis
from fastkin.emulator import Emulator
from fastkin.errors import Action, KinesisError
from support.fake_http import FakeServer
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.fake_http import Link, Request

TRANSPORTS = pytest.mark.parametrize("transport", ["native", "sdk"])
DENIED = "AccessDeniedException"


def producer(url: str, **options: Any) -> Producer:
    keys: dict[str, Any] = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "shard_map": False}
    return Producer("welders", region="us-east-1", endpoint_url=url, api="put_record", **(keys | options))


class Script:
    """Answers PutRecord; `fate(data, times it came)` is (status, code, message), None: stored."""

    def __init__(self, fate: Callable[[bytes, int], tuple[int, str, str] | None]) -> None:
        self.fate = fate
        self.asked: list[tuple[str, bytes]] = []
        self.stored: list[bytes] = []

    async def __call__(self, link: Link, request: Request) -> None:
        body = json.loads(request.body)
        operation, data = request.target.rpartition(".")[2], base64.b64decode(body["Data"])
        self.asked.append((operation, data))
        why = self.fate(data, sum(each == data for _, each in self.asked))
        if why is None:
            self.stored.append(data)
            link.reply(200, b'{"ShardId":"shardId-000000000000","SequenceNumber":"%d"}' % len(self.stored))
        else:
            link.reply(why[0], json.dumps({"__type": why[1], "message": why[2]}).encode())


@TRANSPORTS
async def test_records_are_stored_where_put_records_is_denied(transport: str) -> None:
    """SP-04: data, key, hash key and receipt are what PutRecords makes of them."""
    async with Emulator({"welders": 2}) as emulator:
        emulator.faults.call(DENIED, operation="PutRecords")
        async with producer(emulator.url, transport=transport) as one:
            receipts = [await one.put(b"%d" % n, f"welder-{n}") for n in range(120)]
            receipts.append(await one.put(b"high", "k", str(2**128 - 1)))
            results = [await receipt for receipt in receipts]
        stored = {each.data: each for each in emulator.stored("welders")}
        counted = emulator.counters.operations
    assert set(stored) == {b"%d" % n for n in range(120)} | {b"high"}
    assert counted["PutRecord"] == 121
    assert "PutRecords" not in counted
    for n, result in enumerate(results[:120]):
        found = stored[b"%d" % n]
        assert (found.partition_key, found.shard_id) == (f"welder-{n}", result.shard_id)
        assert found.sequence_number == result.sequence_number
    assert stored[b"high"].shard_id == "shardId-000000000001"


async def test_one_bad_record_stops_no_other() -> None:
    """A record that is refused for good fails alone, wherever it stands; a throttled one goes again."""

    def fate(data: bytes, times: int) -> tuple[int, str, str] | None:
        if data in {b"0", b"7"}:
            return 400, "ValidationException", "no"
        if data == b"3" and times < 3:
            return 400, "ProvisionedThroughputExceededException", "Rate exceeded for shard shardId-000000000000"
        return None

    script = Script(fate)
    async with FakeServer(script) as server, producer(server.url) as one:
        receipts = [await one.put(b"%d" % n, "k") for n in range(10)]
        results = await asyncio.gather(*receipts, return_exceptions=True)
    assert [isinstance(each, RecordFailed) for each in results] == [n in {0, 7} for n in range(10)]
    assert sorted(script.stored) == [b"%d" % n for n in range(10) if n not in {0, 7}]


async def test_trouble_of_the_destination_keeps_the_rest_for_later() -> None:
    """After an answer that is not about the record the rest is not tried, and nothing is given up."""

    def fate(data: bytes, times: int) -> tuple[int, str, str] | None:
        return (500, "InternalFailure", "oops") if data == b"4" and times < 3 else None

    script = Script(fate)
    async with FakeServer(script) as server, producer(server.url) as one:
        receipts = [await one.put(b"%d" % n, "k") for n in range(8)]
        for receipt in receipts:
            await receipt
        possible = one.stats()["duplicates_possible"]
    assert script.stored[:4] == [b"0", b"1", b"2", b"3"]
    assert script.asked[4][1] == b"4"
    assert sorted(script.stored) == [b"%d" % n for n in range(8)]
    assert possible >= 1  # a 500 may hide that it was stored


async def test_a_call_that_stores_nothing_fails_as_one() -> None:
    """What is no record's own fault is told first, with its action."""

    def fate(data: bytes, _times: int) -> tuple[int, str, str] | None:
        return (400, "ValidationException", "no") if data == b"0" else (400, DENIED, "not authorized")

    script = Script(fate)
    body = {"Records": [{"Data": base64.b64encode(b"%d" % n).decode(), "PartitionKey": "k"} for n in range(5)]}
    async with FakeServer(script) as server:
        keys: dict[str, Any] = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
        client = make_client(
            Kinesis(stream="welders", region="us-east-1", endpoint_url=server.url, api="put_record", **keys)
        )
        assert client.destination is KINESIS_SINGLY
        assert client.destination.permission == "kinesis:PutRecord"
        await client.start()
        with pytest.raises(KinesisError) as raised:
            await client.put(json.dumps({**body, "StreamName": "welders"}).encode())
        await client.close()
    assert (raised.value.code, raised.value.action) == (DENIED, Action.OPERATOR)
    assert [data for _, data in script.asked] == [b"0", b"1"]  # nobody is asked again what was answered for all
