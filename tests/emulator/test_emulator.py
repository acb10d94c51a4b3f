"""The emulator by itself: limits, faults, the HTTP side, and what it gives back.

The limits and error types are AWS's; the page that says so stands beside each test.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import math
import os
import socket
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from botocore.exceptions import ClientError, ReadTimeoutError

from fastkin.emulator import Emulator, StreamSpec, serve
from fastkin.emulator.server import parse_streams
from support.readback import kinesis_client, read_stream

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

KIB, MIB = 1 << 10, 1 << 20
THROTTLED = "ProvisionedThroughputExceededException"


@dataclass
class Clock:
    """A clock that stands still until it is told to go on."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool = True
    json: Any = field(init=False)

    def __post_init__(self) -> None:
        with contextlib.suppress(orjson.JSONDecodeError):
            self.json = orjson.loads(self.body)


def entries(count: int, size: int = 1, *, key: str | None = None) -> list[dict[str, str]]:
    data = base64.b64encode(bytes(size)).decode()
    return [{"Data": data, "PartitionKey": key or str(uuid.uuid4())} for _ in range(count)]


def encode(body: Any, operation: str = "PutRecords", headers: Mapping[str, str] | None = None) -> bytes:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    lines = {
        "Host": "localhost",
        "X-Amz-Target": f"Kinesis_20131202.{operation}",
        "Content-Type": "application/x-amz-json-1.1",
        "Content-Length": str(len(data)),
        **(headers or {}),
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST / HTTP/1.1\r\n{head}\r\n".encode() + data


async def read_reply(reader: asyncio.StreamReader) -> Reply:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest if line)}
    length = int(headers["content-length"])
    body, complete = b"", True
    try:
        body = await reader.readexactly(length)
    except asyncio.IncompleteReadError as error:
        body, complete = error.partial, False
    return Reply(int(first.split()[1]), headers, body, complete)


async def call(
    emulator: Emulator,
    body: Any,
    operation: str = "PutRecords",
    headers: Mapping[str, str] | None = None,
) -> Reply:
    reader, writer = await asyncio.open_connection("127.0.0.1", emulator.port)
    try:
        writer.write(encode(body, operation, headers))
        return await read_reply(reader)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def put(emulator: Emulator, records: list[Any], stream: str = "s") -> Reply:
    return await call(emulator, {"StreamName": stream, "Records": records})


def failures(reply: Reply) -> list[str]:
    codes = [entry["ErrorCode"] for entry in reply.json["Records"] if "ErrorCode" in entry]
    assert reply.json["FailedRecordCount"] == len(codes)
    return codes


# --- limits per shard: docs.aws.amazon.com/streams/latest/dev/service-sizes-and-limits.html ---


async def test_a_shard_takes_a_thousand_records_a_second() -> None:
    clock = Clock()
    async with Emulator({"s": 1}, wall=clock, clock=clock) as emulator:
        for expected in (0, 0, 500):
            assert len(failures(await put(emulator, entries(500)))) == expected
        clock.now += 0.125
        reply = await put(emulator, entries(175))
        assert failures(reply) == [THROTTLED] * 50
        # API_PutRecords.html: the message has account, stream and shard
        assert reply.json["Records"][-1]["ErrorMessage"] == (
            "Rate exceeded for shard shardId-000000000000 in stream s under account 123456789012."
        )
        assert reply.status == 200
        clock.now += 60  # nothing is saved up beyond one second's worth
        for expected in (0, 0, 500):
            assert len(failures(await put(emulator, entries(500)))) == expected
        counters = emulator.counters
        assert (counters.records, counters.throttled) == (2125, 1050)
        assert len(emulator.stored("s")) == emulator.stored_count("s") == 2125


async def test_a_shard_takes_a_mebibyte_a_second_keys_included() -> None:
    clock = Clock()
    async with Emulator({"s": 1}, wall=clock, clock=clock) as emulator:
        reply = await put(emulator, entries(8, 256 * KIB - 36))
        assert failures(reply) == [THROTTLED] * 4
        clock.now += 0.5
        reply = await put(emulator, entries(4, 256 * KIB - 36))
        assert failures(reply) == [THROTTLED] * 2
        assert emulator.counters.record_bytes == 6 * 256 * KIB


async def test_one_hot_shard_does_not_stall_the_others() -> None:
    clock = Clock()
    async with Emulator({"s": 4}, wall=clock, clock=clock) as emulator:
        low, high = "0", str((1 << 128) - 1)
        for _ in range(3):
            hot = [{**entry, "ExplicitHashKey": low} for entry in entries(400)]
            cold = [{**entry, "ExplicitHashKey": high} for entry in entries(100)]
            reply = await put(emulator, hot + cold)
        assert failures(reply) == [THROTTLED] * 200
        assert all("ShardId" in entry for entry in reply.json["Records"][400:])
        assert emulator.service.streams["s"].shards[0].throttled == 200


async def test_limits_can_be_scaled_and_switched_off() -> None:
    clock = Clock()
    async with Emulator({"s": 1, "t": 1}, wall=clock, clock=clock) as emulator:
        emulator.scale_limits("s", 0.1)
        assert len(failures(await put(emulator, entries(500)))) == 400
        assert failures(await put(emulator, entries(500), "t")) == []
        emulator.scale_limits(1.0)
        clock.now += 1
        assert failures(await put(emulator, entries(500))) == []
        emulator.set_limits(False)
        for _ in range(5):
            assert failures(await put(emulator, entries(500))) == []
        emulator.set_limits(True, "s")
        clock.now += 1
        for expected in (0, 0, 500):
            assert len(failures(await put(emulator, entries(500)))) == expected


async def test_a_record_larger_than_the_scaled_bucket_still_passes_once_it_is_full() -> None:
    clock = Clock()
    async with Emulator({"s": 1}, wall=clock, clock=clock) as emulator:
        emulator.scale_limits("s", 0.01)
        assert failures(await put(emulator, entries(1, 512 * KIB))) == []
        clock.now += 10
        assert failures(await put(emulator, entries(1, 100))) == [THROTTLED]
        clock.now += 42
        assert failures(await put(emulator, entries(1, 512 * KIB))) == []


async def test_put_record_is_refused_as_a_call() -> None:
    clock = Clock()
    async with Emulator({"s": 1}, wall=clock, clock=clock) as emulator:
        for _ in range(2):
            await put(emulator, entries(500))
        reply = await call(emulator, {"StreamName": "s", **entries(1)[0]}, "PutRecord")
        assert (reply.status, reply.json["__type"]) == (400, THROTTLED)
        assert reply.headers["x-amzn-errortype"] == THROTTLED


# --- limits per call and record: API_PutRecords.html, streams/latest/dev/large-records.html ---


@pytest.mark.parametrize("limit", [10 * MIB, 5 * MIB])
async def test_a_request_may_hold_so_many_bytes_and_none_more(limit: int) -> None:
    async with Emulator({"s": 1}, limits=False, max_request_bytes=limit) as emulator:
        count = limit // MIB
        full = entries(count, MIB - 36)
        assert failures(await put(emulator, full)) == []
        reply = await put(emulator, [*full, *entries(1, 0, key="k")])
        assert (reply.status, reply.json["__type"]) == (400, "InvalidArgumentException")
        assert emulator.stored_count("s") == count


async def test_a_record_is_data_and_key_and_the_stream_says_how_much() -> None:
    streams = {"s": 1, "large": StreamSpec(shards=1, max_record_kib=10_240)}
    async with Emulator(streams, limits=False) as emulator:
        exact = entries(1, MIB - 36)
        assert failures(await put(emulator, exact)) == []
        one_more = entries(1, MIB - 35)
        reply = await put(emulator, [*exact, *one_more])
        assert (reply.status, reply.json["__type"]) == (400, "InvalidArgumentException")
        assert "Record 2 " in reply.json["message"]
        assert failures(await put(emulator, one_more, "large")) == []
        assert failures(await put(emulator, entries(1, 10 * MIB - 36), "large")) == []
        reply = await put(emulator, entries(1, 10 * MIB + 1), "large")
        assert (reply.status, reply.json["__type"]) == (400, "ValidationException")
        assert emulator.stored_count("s") == 1


async def test_five_hundred_records_are_the_most() -> None:
    async with Emulator({"s": 1}, limits=False) as emulator:
        assert failures(await put(emulator, entries(500))) == []
        reply = await put(emulator, entries(501))
        assert (reply.status, reply.json["__type"]) == (400, "ValidationException")
        assert "less than or equal to 500" in reply.json["message"]
        reply = await put(emulator, [])
        assert (reply.status, reply.json["__type"]) == (400, "ValidationException")
    async with Emulator({"s": 1}, limits=False, max_records=10) as emulator:
        reply = await put(emulator, entries(11))
        assert "less than or equal to 10" in reply.json["message"]


# API_PutRecords.html: DryRunOperationException "because the DryRun parameter was specified"
async def test_a_dry_run_is_validated_and_stores_nothing() -> None:
    async with Emulator({"s": 1}) as emulator:
        for body, operation in (
            ({"Records": entries(1)}, "PutRecords"),
            (entries(1)[0], "PutRecord"),
        ):
            request = {"StreamName": "s", "DryRun": True, **body}
            reply = await call(emulator, request, operation)
            assert (reply.status, reply.json["__type"]) == (400, "DryRunOperationException")
        reply = await call(emulator, {"StreamName": "absent", "DryRun": True, "Records": entries(1)})
        assert reply.json["__type"] == "ResourceNotFoundException"
        assert emulator.stored_count("s") == 0


# streams/latest/dev/service-managed-pk: the key is optional and ignored, reads return none,
# SequenceNumberForOrdering is refused
async def test_a_stream_that_chooses_shards_itself() -> None:
    spec = StreamSpec(shards=4, mode="ON_DEMAND", auto_keys=True)
    async with Emulator({"s": spec}) as emulator, kinesis_client(emulator.url) as client:
        keyless = [{"Data": "eA=="}] * 300
        same = [{"Data": "eA==", "PartitionKey": "same", "ExplicitHashKey": "0"}] * 100
        assert failures(await put(emulator, keyless + same)) == []
        used = [shard.stored for shard in emulator.service.streams["s"].shards]
        assert sum(used) == 400
        assert min(used) > 40
        assert {record.key for record in await read_stream(emulator.url, "s")} == {None}
        summary = await client.describe_stream_summary(StreamName="s")
        assert summary["StreamDescriptionSummary"]["RecordDistributionStrategy"] == "AUTO"
        reply = await call(
            emulator,
            {"StreamName": "s", "Data": "eA==", "SequenceNumberForOrdering": "1"},
            "PutRecord",
        )
        assert reply.json["__type"] == "InvalidArgumentException"
        with pytest.raises(ClientError, match="ON_DEMAND"):
            await client.create_stream(StreamName="t", ShardCount=1, RecordDistributionStrategy="AUTO")


async def test_a_new_stream_is_not_found_by_writers_until_it_is_active() -> None:
    clock = Clock()
    async with Emulator(create_ms=500, wall=clock, clock=clock) as emulator:
        await call(emulator, {"StreamName": "s", "ShardCount": 2}, "CreateStream")
        reply = await call(emulator, {"StreamName": "s"}, "DescribeStreamSummary")
        assert reply.json["StreamDescriptionSummary"]["StreamStatus"] == "CREATING"
        assert (await put(emulator, entries(1))).json["__type"] == "ResourceNotFoundException"
        clock.now += 0.5
        assert failures(await put(emulator, entries(1))) == []


# firehose/latest/APIReference/API_PutRecordBatch.html
async def test_firehose_takes_500_records_of_a_thousand_kib_and_4_mib() -> None:
    async with (
        Emulator(firehose=["d"]) as emulator,
        kinesis_client(emulator.url, service="firehose") as client,
    ):
        answer = await client.put_record_batch(
            DeliveryStreamName="d", Records=[{"Data": b"%d" % n} for n in range(500)]
        )
        assert answer["FailedPutCount"] == 0
        assert len({each["RecordId"] for each in answer["RequestResponses"]}) == 500
        assert [record.data for record in emulator.stored("d")] == [b"%d" % n for n in range(500)]
        target = {"X-Amz-Target": "Firehose_20150804.PutRecordBatch"}
        for count, size, code in (
            (4, 1000 * KIB, None),
            (5, 1000 * KIB, "InvalidArgumentException"),
            (1, 1000 * KIB + 1, "ValidationException"),
            (501, 1, "ValidationException"),
        ):
            batch = [{"Data": entry["Data"]} for entry in entries(count, size)]
            reply = await call(emulator, {"DeliveryStreamName": "d", "Records": batch}, headers=target)
            assert reply.json.get("__type") == code
        with pytest.raises(ClientError, match="ResourceNotFoundException"):
            await client.put_record_batch(DeliveryStreamName="no", Records=[{"Data": b"x"}])
        emulator.faults.record("ServiceUnavailableException", contains=b"bad")
        answer = await client.put_record_batch(DeliveryStreamName="d", Records=[{"Data": b"good"}, {"Data": b"bad"}])
        assert answer["FailedPutCount"] == 1
        assert answer["RequestResponses"][1]["ErrorCode"] == "ServiceUnavailableException"
        assert emulator.stored_count("d") == 505


# --- reading: API_GetRecords.html ---


async def test_get_records_gives_ten_mebibytes_or_ten_thousand_records() -> None:
    async with (
        Emulator({"s": 1, "t": 1}, limits=False) as emulator,
        kinesis_client(emulator.url) as client,
    ):
        for _ in range(2):
            await put(emulator, entries(10, MIB - 36))
        for _ in range(21):
            await put(emulator, entries(500, 1), "t")
        found = {}
        for stream in ("s", "t"):
            answer = await client.get_shard_iterator(
                StreamName=stream,
                ShardId="shardId-000000000000",
                ShardIteratorType="TRIM_HORIZON",
            )
            page = await client.get_records(ShardIterator=answer["ShardIterator"])
            found[stream] = len(page["Records"])
            rest = await client.get_records(ShardIterator=page["NextShardIterator"])
            assert rest["MillisBehindLatest"] == 0
            found[stream + " rest"] = len(rest["Records"])
        assert found == {"s": 10, "s rest": 10, "t": 10_000, "t rest": 500}


async def test_a_reader_learns_how_far_behind_it_is() -> None:
    clock = Clock()
    async with (
        Emulator({"s": 1}, wall=clock, clock=clock) as emulator,
        kinesis_client(emulator.url) as client,
    ):
        await put(emulator, entries(3))
        clock.now += 7
        answer = await client.get_shard_iterator(
            StreamName="s", ShardId="shardId-000000000000", ShardIteratorType="TRIM_HORIZON"
        )
        page = await client.get_records(ShardIterator=answer["ShardIterator"], Limit=2)
        assert page["MillisBehindLatest"] == 7000
        clock.now += 301  # iterators live for five minutes
        with pytest.raises(ClientError, match="ExpiredIteratorException"):
            await client.get_records(ShardIterator=page["NextShardIterator"])
        with pytest.raises(ClientError, match="Invalid ShardIterator"):
            await client.get_records(ShardIterator="nonsense")


async def test_the_end_of_a_closed_shard_names_its_children() -> None:
    async with Emulator({"s": 2}) as emulator, kinesis_client(emulator.url) as client:
        await client.merge_shards(
            StreamName="s",
            ShardToMerge="shardId-000000000000",
            AdjacentShardToMerge="shardId-000000000001",
        )
        answer = await client.get_shard_iterator(
            StreamName="s", ShardId="shardId-000000000001", ShardIteratorType="TRIM_HORIZON"
        )
        page = await client.get_records(ShardIterator=answer["ShardIterator"])
        assert "NextShardIterator" not in page
        (child,) = page["ChildShards"]
        assert child["ShardId"] == "shardId-000000000002"
        assert child["ParentShards"] == ["shardId-000000000000", "shardId-000000000001"]
        shards = await client.list_shards(StreamName="s", ShardFilter={"Type": "AT_LATEST"})
        assert [shard["ShardId"] for shard in shards["Shards"]] == ["shardId-000000000002"]
        for shard in ("shardId-000000000000", "shardId-000000000002"):
            with pytest.raises(ClientError, match="InvalidArgumentException"):
                await client.merge_shards(
                    StreamName="s", ShardToMerge=shard, AdjacentShardToMerge="shardId-000000000002"
                )
        with pytest.raises(ClientError, match="NewStartingHashKey"):
            await client.split_shard(StreamName="s", ShardToSplit="shardId-000000000002", NewStartingHashKey="1")


async def test_shards_are_listed_in_pages() -> None:
    async with Emulator({"s": 7}) as emulator, kinesis_client(emulator.url) as client:
        pages = []
        request: dict[str, Any] = {"StreamName": "s", "MaxResults": 3}
        while True:
            page = await client.list_shards(**request)
            pages.append([int(shard["ShardId"][-1]) for shard in page["Shards"]])
            if "NextToken" not in page:
                break
            request = {"NextToken": page["NextToken"], "MaxResults": 3}
        assert pages == [[0, 1, 2], [3, 4, 5], [6]]
        page = await client.list_shards(StreamName="s", ExclusiveStartShardId="shardId-000000000004")
        assert len(page["Shards"]) == 2


async def test_reading_is_limited_to_five_calls_a_second_when_asked() -> None:
    clock = Clock()
    async with (
        Emulator({"s": 1}, read_limits=True, wall=clock, clock=clock) as emulator,
        kinesis_client(emulator.url) as client,
    ):
        answer = await client.get_shard_iterator(
            StreamName="s", ShardId="shardId-000000000000", ShardIteratorType="LATEST"
        )
        for _ in range(5):
            await client.get_records(ShardIterator=answer["ShardIterator"])
        with pytest.raises(ClientError, match=THROTTLED):
            await client.get_records(ShardIterator=answer["ShardIterator"])
        clock.now += 0.2
        await client.get_records(ShardIterator=answer["ShardIterator"])


# --- faults ---


async def test_single_records_fail_and_the_others_are_stored() -> None:
    async with Emulator({"s": 4}, limits=False) as emulator:
        fault = emulator.faults.record("InternalFailure", every=3)
        reply = await put(emulator, entries(9))
        codes = [entry.get("ErrorCode") for entry in reply.json["Records"]]
        assert codes == [None, None, "InternalFailure"] * 3
        assert reply.json["FailedRecordCount"] == 3
        assert reply.json["Records"][2]["ErrorMessage"] == "Internal service failure."
        assert (fault.hits, emulator.stored_count("s"), emulator.counters.failed) == (3, 6, 3)
        fault.remove()
        assert failures(await put(emulator, entries(9))) == []


async def test_faults_choose_records_by_shard_key_payload_and_rule() -> None:
    async with Emulator({"s": 4}, limits=False) as emulator:
        emulator.faults.record(shard=2, times=5)
        reply = await put(emulator, entries(100))
        failed = [entry for entry in reply.json["Records"] if "ErrorCode" in entry]
        assert len(failed) == 5
        assert "shardId-000000000002" in failed[0]["ErrorMessage"]
        assert failed[0]["ErrorCode"] == THROTTLED

        emulator.faults.clear()
        emulator.faults.record("A", key="k7")
        emulator.faults.record("B", "text", contains=b"poison")
        emulator.faults.record("C", match=lambda shard, key, data: data == b"c")
        poison = base64.b64encode(b"a poisoned one").decode()
        reply = await put(
            emulator,
            [
                {"Data": "eA==", "PartitionKey": "k7"},
                {"Data": poison, "PartitionKey": "k8"},
                {"Data": "Yw==", "PartitionKey": "k9"},
                {"Data": "eA==", "PartitionKey": "k9"},
            ],
        )
        assert failures(reply) == ["A", "B", "C"]
        assert reply.json["Records"][1]["ErrorMessage"] == "text"


async def test_a_probable_fault_is_the_same_for_the_same_seed() -> None:
    found = []
    for _ in range(2):
        async with Emulator({"s": 1}, limits=False) as emulator:
            emulator.faults.record("InternalFailure", probability=0.3, seed=42)
            reply = await put(emulator, entries(200))
            found.append([entry.get("ErrorCode") for entry in reply.json["Records"]])
    assert found[0] == found[1]
    assert 30 < sum(code is not None for code in found[0]) < 90


async def test_calls_fail_as_often_as_said() -> None:
    async with Emulator({"s": 1}) as emulator:
        emulator.faults.call("ServiceUnavailable", times=2)
        emulator.faults.call("ThrottlingException", skip=2, times=1)
        seen = []
        for _ in range(5):
            reply = await put(emulator, entries(1))
            seen.append((reply.status, reply.json.get("__type")))
        # The second fault sees every call as well: its third is the third.
        assert seen == [
            (503, "ServiceUnavailable"),
            (503, "ServiceUnavailable"),
            (400, "ThrottlingException"),
            (200, None),
            (200, None),
        ]
        assert emulator.stored_count("s") == 2
        assert len(emulator.faults) == 0
        assert emulator.counters.refused == 3


async def test_faults_last_as_long_as_said() -> None:
    clock = Clock()
    async with Emulator({"s": 1}, wall=clock, clock=clock) as emulator:
        emulator.faults.throttle(after_s=1, for_s=2)
        seen = []
        for _ in range(5):
            seen.append((await put(emulator, entries(1))).status)
            clock.now += 0.75
        assert seen == [200, 200, 400, 400, 200]


async def test_a_front_end_answers_in_html() -> None:
    async with Emulator({"s": 1}) as emulator:
        emulator.faults.html(502, times=1)
        reply = await put(emulator, entries(1))
        assert (reply.status, reply.headers["content-type"]) == (502, "text/html")
        assert b"<html>" in reply.body
        assert emulator.stored_count("s") == 0


@pytest.mark.parametrize("kind", ["call", "html"])
async def test_an_error_may_hide_that_the_records_are_stored(kind: str) -> None:
    async with Emulator({"s": 1}) as emulator:
        if kind == "call":
            emulator.faults.call("InternalFailure", stored=True, times=1)
        else:
            emulator.faults.html(500, stored=True, times=1)
        reply = await put(emulator, entries(3))
        assert reply.status == 500
        assert emulator.stored_count("s") == 3
        assert [(put.stored, put.answered) for put in emulator.puts] == [(3, False)]


async def test_one_record_spoils_the_call_it_is_in() -> None:
    async with Emulator({"s": 1}) as emulator:
        emulator.faults.call("ValidationException", contains=b"bad")
        good, bad = entries(2), [{"Data": base64.b64encode(b"a bad one").decode(), "PartitionKey": "k"}]
        assert (await put(emulator, good)).status == 200
        assert (await put(emulator, good + bad)).json["__type"] == "ValidationException"
        assert emulator.stored_count("s") == 2


async def test_the_journal_says_which_calls_were_answered() -> None:
    async with Emulator({"s": 1}) as emulator:
        for add in (
            lambda: emulator.faults.garbage(b"not json", times=1),
            lambda: emulator.faults.wrong_count(times=1),
            lambda: emulator.faults.slow(50, times=1),
            lambda: emulator.faults.call("SlowDown", times=1),
            lambda: emulator.faults.latency(1, times=1),
        ):
            add()
            await put(emulator, entries(2))
        assert [(put.stored, put.answered) for put in emulator.puts] == [(2, False), (2, False), (2, True), (2, True)]
        emulator.faults.cut("after", times=1)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await put(emulator, entries(2))
        assert not emulator.puts[-1].answered


async def test_an_answer_to_one_who_has_left_is_no_answer() -> None:
    """What is written to a closing connection is dropped without a word; the journal must not say "answered"."""
    async with Emulator({"s": 1}, latency_ms=300) as emulator:  # so late that a busy machine does not come after it
        with socket.create_connection(("127.0.0.1", emulator.port)) as caller:
            caller.sendall(encode({"StreamName": "s", "Records": entries(2)}))
            while not emulator.puts:
                await asyncio.sleep(0)
            caller.shutdown(socket.SHUT_WR)
            time.sleep(0.35)  # the loop learns in one turn that the caller has left and that the answer is due
            await asyncio.sleep(0.01)
            assert caller.recv(100) == b""
        assert [(put.stored, put.answered) for put in emulator.puts] == [(2, False)]


async def test_an_expired_token() -> None:
    async with Emulator({"s": 1}) as emulator:
        emulator.faults.expired_token(times=1)
        reply = await put(emulator, entries(1))
        assert (reply.status, reply.json["__type"]) == (400, "ExpiredTokenException")


@pytest.mark.parametrize("stored", [False, True])
async def test_a_silent_call_is_never_answered(stored: bool) -> None:
    async with Emulator({"s": 1}) as emulator:
        fault = emulator.faults.silent(stored=stored, times=1)
        async with kinesis_client(emulator.url, read_timeout=0.3) as client:
            with pytest.raises(ReadTimeoutError):
                await client.put_record(StreamName="s", Data=b"x", PartitionKey="k")
            assert fault.hits == 1
            assert emulator.stored_count("s") == stored
            await client.put_record(StreamName="s", Data=b"y", PartitionKey="k")
        assert emulator.stored("s")[-1].data == b"y"


@pytest.mark.parametrize(("where", "stored"), [("before", 0), ("after", 3), ("inside", 3)])
async def test_connections_are_cut_where_asked(where: Any, stored: int) -> None:
    async with Emulator({"s": 1}) as emulator:
        emulator.faults.cut(where, times=1)
        if where == "inside":
            reply = await put(emulator, entries(3))
            assert (reply.status, reply.complete) == (200, False)
            assert 0 < len(reply.body) < int(reply.headers["content-length"])
        else:
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await put(emulator, entries(3))
        assert emulator.stored_count("s") == stored
        assert failures(await put(emulator, entries(1))) == []
        assert emulator.counters.cut == 1


async def test_latency_delays_the_answer_and_calls_overlap() -> None:
    async with Emulator({"s": 1}, latency_ms=50) as emulator:
        emulator.faults.latency(100, times=1)
        begin = time.monotonic()
        replies = await asyncio.gather(*(put(emulator, entries(1)) for _ in range(5)))
        took = time.monotonic() - begin
        assert all(reply.status == 200 for reply in replies)
        assert 0.15 <= took < 1.0
        assert emulator.counters.max_concurrent == 5
        assert emulator.counters.calls == 5


async def test_an_answer_may_dribble() -> None:
    async with Emulator({"s": 1}) as emulator:
        emulator.faults.slow(100, times=1)
        begin = time.monotonic()
        reply = await put(emulator, entries(50))
        assert time.monotonic() - begin > 0.08
        assert failures(reply) == []
        assert len(reply.json["Records"]) == 50


@pytest.mark.parametrize("delta", [-2, 1])
async def test_an_answer_may_have_the_wrong_number_of_entries(delta: int) -> None:
    async with Emulator({"s": 1}) as emulator:
        emulator.faults.wrong_count(delta, times=1)
        reply = await put(emulator, entries(5))
        assert len(reply.json["Records"]) == 5 + delta
        assert emulator.stored_count("s") == 5


async def test_an_answer_may_come_before_the_body() -> None:
    async with Emulator({"s": 1}) as emulator:
        emulator.faults.early(times=1)
        reader, writer = await asyncio.open_connection("127.0.0.1", emulator.port)
        request = encode({"StreamName": "s", "Records": entries(1, 1000)})
        writer.write(request[:400])
        reply = await read_reply(reader)
        assert (reply.status, reply.json["__type"]) == (413, "RequestEntityTooLarge")
        writer.write(request[400:])
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        assert emulator.stored_count("s") == 0


async def test_faults_keep_to_their_stream_and_operation() -> None:
    async with Emulator({"s": 1, "t": 1}) as emulator:
        emulator.faults.call("AccessDeniedException", stream="t")
        emulator.faults.call("LimitExceededException", operation="ListShards", times=1)
        assert (await put(emulator, entries(1))).status == 200
        assert (await put(emulator, entries(1), "t")).status == 400
        for status in (400, 200):
            assert (await call(emulator, {"StreamName": "s"}, "ListShards")).status == status


async def test_faults_are_read_from_a_file(tmp_path: Path) -> None:
    lines = tmp_path / "faults.jsonl"
    lines.write_text(
        '# one record in two\n{"kind": "record", "code": "InternalFailure", "every": 2}\n\n'
        '{"kind": "latency", "ms": 1}\n{"kind": "record", "contains": "x", "times": 1}\n'
    )
    tables = tmp_path / "faults.toml"
    tables.write_text('[[fault]]\nkind = "cut"\nwhere = "before"\ntimes = 1\n')
    async with Emulator({"s": 1}) as emulator:
        assert [fault.kind for fault in emulator.faults.load(lines)] == [
            "record",
            "latency",
            "record",
        ]
        (cut,) = emulator.faults.load(tables)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await put(emulator, entries(1))
        assert cut.hits == 1
        assert failures(await put(emulator, entries(4))) == ["InternalFailure"] * 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "f.jsonl:1: not JSON"),
        ('{"kind": "quake"}', "kind 'quake' is unknown"),
        ('{"kind": "cut", "where": "sideways"}', "sideways"),
        ('{"kind": "record", "evry": 2}', "unknown key 'evry'"),
        ('{"kind": "call"}', "needs a code"),
        ('{"kind": "latency", "every": 0}', "every must be"),
        ("[]", "not an object"),
    ],
)
def test_a_faults_file_with_a_mistake_is_refused(line: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=r"f\.jsonl:1") as caught:
        Emulator().faults.load(path)
    assert problem in str(caught.value)


# --- the HTTP side ---


async def test_one_connection_carries_many_calls_and_pipelined_ones_in_order() -> None:
    async with Emulator({"s": 1}, latency_ms=5) as emulator:
        reader, writer = await asyncio.open_connection("127.0.0.1", emulator.port)
        writer.write(b"".join(encode({"StreamName": "s", "Records": entries(n)}) for n in (1, 2, 3)))
        sizes = [len((await read_reply(reader)).json["Records"]) for _ in range(3)]
        assert sizes == [1, 2, 3]
        for byte in encode({"StreamName": "s", "Records": entries(4)}):
            writer.write(bytes([byte]))
            await writer.drain()
        assert len((await read_reply(reader)).json["Records"]) == 4
        writer.write(encode({"StreamName": "s", "Records": entries(1)}, headers={"Connection": "close"}))
        await read_reply(reader)
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        assert emulator.counters.connections == 1


async def test_a_client_may_wait_for_the_go_ahead() -> None:
    async with Emulator({"s": 1}) as emulator:
        reader, writer = await asyncio.open_connection("127.0.0.1", emulator.port)
        request = encode({"StreamName": "s", "Records": entries(1)}, headers={"Expect": "100-continue"})
        head, _, body = request.partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await read_reply(reader)).status == 200
        writer.close()
        await writer.wait_closed()


async def test_what_is_no_call_gets_an_answer_and_no_traceback() -> None:
    async with Emulator({"s": 1}) as emulator:
        unknown = await call(emulator, {}, "LaunchRocket")
        assert (unknown.status, unknown.json["__type"]) == (400, "UnknownOperationException")
        broken = await call(emulator, b"{", "PutRecords")
        assert (broken.status, broken.json["__type"]) == (400, "SerializationException")
        listed = await call(emulator, b"[]", "PutRecords")
        assert listed.json["__type"] == "SerializationException"
        plain = await call(emulator, b"", "PutRecords", {"Content-Type": "text/plain"})
        assert plain.status == 404
        nameless = await call(emulator, {"Records": entries(1)})
        assert nameless.json["__type"] == "InvalidArgumentException"
        cbor = await call(emulator, b"\xbf\x61", "PutRecords", {"Content-Type": "application/x-amz-cbor-1.1"})
        assert (cbor.status, cbor.headers["content-type"]) == (400, "application/x-amz-cbor-1.1")
        assert b"SerializationException" in cbor.body


@pytest.mark.parametrize("noise", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n"])
async def test_noise_ends_the_connection_only(noise: bytes) -> None:
    async with Emulator({"s": 1}) as emulator:
        reader, writer = await asyncio.open_connection("127.0.0.1", emulator.port)
        writer.write(noise + b"\r\n" * 10)
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
        writer.close()
        await writer.wait_closed()
        assert (await put(emulator, entries(1))).status == 200


async def test_closing_cuts_what_is_still_connected() -> None:
    async with Emulator({"s": 1}, latency_ms=60_000) as emulator:
        waiting = asyncio.create_task(put(emulator, entries(1)))
        await emulator.wait_stored("s", 1)
        assert emulator.drop_connections() == 1
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await waiting
        again = asyncio.create_task(put(emulator, entries(1)))
        await emulator.wait_stored("s", 2)
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await again
    assert emulator.counters.max_concurrent == 1


# --- the ledger and the counters ---


async def test_the_ledger_gives_back_what_was_stored() -> None:
    clock = Clock()
    async with Emulator({"s": 4}, wall=clock, clock=clock) as emulator:
        payloads = [os.urandom(20) for _ in range(40)]
        for n, payload in enumerate(payloads):
            clock.now += 1
            record = {"Data": base64.b64encode(payload).decode(), "PartitionKey": f"k{n}"}
            if n == 7:
                record["ExplicitHashKey"] = "12"
            await put(emulator, [record])
        stored = emulator.stored("s")
    assert [record.data for record in stored] == payloads
    assert [record.partition_key for record in stored] == [f"k{n}" for n in range(40)]
    assert stored[7].explicit_hash_key == "12"
    assert stored[7].shard_id == "shardId-000000000000"
    assert stored[0].arrival == 1_800_000_001.0
    assert len({record.sequence_number for record in stored}) == 40


async def test_counting_keeps_nothing() -> None:
    async with Emulator({"s": 2}, limits=False, keep="count") as emulator:
        for _ in range(3):
            assert failures(await put(emulator, entries(100))) == []
        assert emulator.stored_count("s") == 300
        assert emulator.stored("s") == []
        assert emulator.counters.record_bytes == 300 * 37
        assert emulator.counters.max_records_in_call == 100
    async with Emulator({"s": 2}, count_only=True) as emulator:
        reply = await put(emulator, [{"Data": "eA==", "PartitionKey": '"Data":'}] * 20)
        assert (len(reply.json["Records"]), emulator.counters.records) == (20, 20)
        emulator.faults.call("ServiceUnavailable", times=1)
        emulator.faults.html(times=1, skip=1)
        emulator.faults.cut("before", skip=2, times=1)
        assert (await put(emulator, entries(1))).status == 503
        assert (await put(emulator, entries(1))).headers["content-type"] == "text/html"
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await put(emulator, entries(1))
        assert emulator.counters.records == 20


async def test_waiting_for_records_says_how_many_came() -> None:
    async with Emulator({"s": 1}) as emulator:
        await put(emulator, entries(2))
        await emulator.wait_stored("s", 2)
        with pytest.raises(TimeoutError, match=r"s holds 2 records .* not 3"):
            await emulator.wait_stored("s", 3, timeout=0.01)


async def test_another_process_looks_and_steers_over_http() -> None:
    async def admin(method: str, page: str, body: bytes = b"") -> tuple[int, Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", emulator.port)
        head = f"{method} /_emulator/{page} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        reply = await read_reply(reader)
        writer.close()
        await writer.wait_closed()
        return reply.status, reply.json

    async with Emulator({"s": 1}) as emulator:
        assert await admin("POST", "faults", b'{"kind": "call", "code": "X"}') == (200, 1)
        assert (await put(emulator, entries(1))).json["__type"] == "X"
        assert await admin("DELETE", "faults") == (200, 0)
        assert await admin("POST", "limits", b'{"stream": "s", "factor": 0.001}') == (200, True)
        assert len(failures(await put(emulator, entries(3)))) == 2
        assert await admin("POST", "limits", b'{"on": false}') == (200, True)
        assert failures(await put(emulator, entries(3))) == []
        status, counters = await admin("GET", "counters")
        assert (status, counters["records"], counters["streams"]) == (200, 4, {"s": 4})
        assert (await admin("POST", "faults", b"{"))[0] == 400
        assert (await admin("GET", "nothing"))[0] == 404


async def test_the_command_serves_until_it_is_cancelled(tmp_path: Path) -> None:
    faults = tmp_path / "faults.jsonl"
    faults.write_text('{"kind": "record", "code": "InternalFailure", "times": 1}\n')
    ready: asyncio.Future[Emulator] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(port=0, streams=["a:2", "b"], faults_path=faults, ready=ready.set_result))
    emulator = await ready
    assert failures(await put(emulator, entries(2), "a")) == ["InternalFailure"]
    assert len(emulator.service.streams["b"].shards) == 1
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    with pytest.raises(ConnectionRefusedError):
        await put(emulator, entries(1), "a")


def test_streams_are_named_in_three_ways() -> None:
    parsed = parse_streams(["a:3", "b", ("c", 2)])
    assert {name: spec.shards for name, spec in parsed.items()} == {"a": 3, "b": 1, "c": 2}
    assert parse_streams({"d": StreamSpec(shards=9)})["d"].shards == 9
    for wrong in (["a:x"], ["a:0"]):
        with pytest.raises(ValueError, match="a"):
            parse_streams(wrong)


def test_it_is_not_the_bottleneck() -> None:
    """Generous: the figures stand in the package's docstring; here only the order of magnitude."""
    from fastkin.emulator.connection import Request

    body = orjson.dumps({"StreamName": "s", "Records": entries(500, 200)})
    headers = {
        "x-amz-target": "Kinesis_20131202.PutRecords",
        "content-type": "application/x-amz-json-1.1",
    }
    request = Request("POST", "/", headers, body)
    for options, most_us in (({"keep": "count"}, 12.0), ({"count_only": True}, 2.0)):
        emulator = Emulator({"s": 4}, limits=False, **options)
        best = math.inf
        for _ in range(5):
            begin = time.perf_counter()
            emulator.answer(request)
            best = min(best, time.perf_counter() - begin)
        assert best / 500 * 1e6 < most_us
