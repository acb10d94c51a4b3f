"""The single calls, arguments, and what a record is."""

from __future__ import annotations

import json
import subprocess
import sys
import typing
from typing import Any

import pytest

import fastkin
from consumer.rig import FIRST, HALF, consumer, put, take
from fastkin import ClosedError, Consumer, KinesisError, LibraryError, UnexpectedResponse
from fastkin.emulator import Emulator
from fastkin.emulator.control import Control
from support.fake_http import FakeServer, Link, Request
from support.readback import kinesis_client
from support.servers import kinesalite, kinesis_mock

GOOD = {"stream": "s", "region": "us-east-1", "access_key": "a", "secret_key": "b"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stream", None), ("stream", ""), ("region", ""), ("access_key", None), ("access_key", ""),
        ("secret_key", None), ("secret_key", ""),
    ],
)  # fmt: skip
def test_wrong_initial_arguments(name: str, value: Any) -> None:
    """EI-22, EI-05: the reference system's cases. No region is the SDK's, here."""
    with pytest.raises(LibraryError, match=name):
        Consumer(**(GOOD | {name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("limit", 0), ("limit", 10_001), ("limit", "5"), ("dedupe", -1), ("dedupe", 1.5), ("dedupe", True),
        ("poll_s", -1), ("poll_s", "1"), ("patience_s", -1), ("max_connections", 0), ("transport", "carrier pigeon"),
    ],
)  # fmt: skip
def test_an_argument_that_is_wrong_is_named(name: str, value: Any) -> None:
    with pytest.raises(LibraryError, match=name):
        Consumer(**(GOOD | {name: value}))


@pytest.mark.process
def test_producer_and_consumer_load_no_mqtt() -> None:
    """EI-01: usable alone."""
    code = "import sys, fastkin; fastkin.Producer, fastkin.Consumer; print([m for m in sys.modules if 'mqtt' in m])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    "of",
    [
        Consumer.__init__, Consumer.start, Consumer.close, Consumer.list_shards, Consumer.get_shard_iterator,
        Consumer.get_records, Consumer.stream, Consumer.stats, fastkin.Position.parse, fastkin.Position,
        fastkin.FileCheckpoints.load, fastkin.FileCheckpoints.save, fastkin.MemoryCheckpoints.load, fastkin.Batch,
    ],
)  # fmt: skip
def test_its_types_can_be_asked_for(of: Any) -> None:
    assert typing.get_type_hints(of)


async def test_every_shard_is_listed_over_several_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """EI-24: closed ones too, with MaxResults 2."""
    whole = Control.list_shards
    monkeypatch.setattr(Control, "list_shards", lambda self, body: whole(self, {**body, "MaxResults": 2}))
    async with Emulator({"s": 3}) as emulator, consumer(emulator.url) as one:
        async with kinesis_client(emulator.url) as client:
            await client.split_shard(StreamName="s", ShardToSplit=FIRST, NewStartingHashKey="1000")
        shards = await one.list_shards()
    assert [shard.id for shard in shards] == [f"shardId-{n:012}" for n in range(5)]
    assert [shard.closed for shard in shards] == [True, False, False, False, False]
    assert [shard.parent for shard in shards] == [None, None, None, FIRST, FIRST]


async def test_a_merged_shard_names_both_parents() -> None:
    """EI-29: the adjacent parent too, for both must be read before it."""
    async with Emulator({"s": 2}) as emulator, consumer(emulator.url) as one:
        async with kinesis_client(emulator.url) as client:
            await client.merge_shards(StreamName="s", ShardToMerge=FIRST, AdjacentShardToMerge="shardId-000000000001")
        merged = (await one.list_shards())[2]
    assert {merged.parent, merged.adjacent_parent} == {FIRST, "shardId-000000000001"}


async def test_get_records_goes_from_batch_to_batch() -> None:
    """EI-27, EI-28, EI-30: limit, next iterator, 0 ms behind when caught up."""
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url) as one:
        await put(emulator.url, [b'{"n":%d}' % n for n in range(5)])
        iterator = await one.get_shard_iterator(FIRST, "TRIM_HORIZON")
        batch = await one.get_records(iterator, limit=3)
        assert [record.data for record in batch.records] == [{"n": 0}, {"n": 1}, {"n": 2}]
        assert batch.next_iterator is not None
        assert batch.child_shards == []
        rest = await one.get_records(batch.next_iterator)
        assert [record.data for record in rest.records] == [{"n": 3}, {"n": 4}]
        assert rest.millis_behind_latest == 0


async def test_each_kind_of_iterator_begins_where_it_says() -> None:
    """EI-25: all five, against the records."""
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url) as one:
        await put(emulator.url, [b"%d" % n for n in range(4)])
        first = (await one.get_records(await one.get_shard_iterator(FIRST, "TRIM_HORIZON"))).records
        number = first[1].sequence_number

        async def read(kind: str, **more: Any) -> list[int]:
            batch = await one.get_records(await one.get_shard_iterator(FIRST, kind, **more))
            return [record.data for record in batch.records]

        assert await read("TRIM_HORIZON") == [0, 1, 2, 3]
        assert await read("AT_SEQUENCE_NUMBER", starting_sequence_number=number) == [1, 2, 3]
        assert await read("AFTER_SEQUENCE_NUMBER", starting_sequence_number=number) == [2, 3]
        assert await read("AT_TIMESTAMP", timestamp=0) == [0, 1, 2, 3]
        assert await read("AT_TIMESTAMP", timestamp=first[0].timestamp + 3600) == []
        assert await read("LATEST") == []


async def test_the_end_of_a_shard_has_no_next_iterator_and_names_its_children() -> None:
    """EI-28."""
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url) as one:
        iterator = await one.get_shard_iterator(FIRST, "TRIM_HORIZON")
        async with kinesis_client(emulator.url) as client:
            await client.split_shard(StreamName="s", ShardToSplit=FIRST, NewStartingHashKey=HALF)
        batch = await one.get_records(iterator)
    assert batch.next_iterator is None
    assert batch.child_shards == ["shardId-000000000001", "shardId-000000000002"]


async def test_a_single_call_raises_what_kinesis_says() -> None:
    """EI-27: no retry, the code and status of the answer."""
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url) as one:
        emulator.faults.call("ProvisionedThroughputExceededException", times=1, operation="GetRecords")
        iterator = await one.get_shard_iterator(FIRST, "LATEST")
        with pytest.raises(KinesisError) as refused:
            await one.get_records(iterator)
        assert (refused.value.code, refused.value.http_status) == ("ProvisionedThroughputExceededException", 400)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'""', ""), (b"null", None), (b'"abc"', "abc"), (b"12345", 12345), (b"true", True), (b"[]", []),
        (b'["x1","x2"]', ["x1", "x2"]), (b"{}", {}), (b'{"x3":"x4","x5":123}', {"x3": "x4", "x5": 123}),
        (b"9223372036854775808", 2**63), (b'{"a":123456789123456789}', {"a": 123456789123456789}),
    ],
)  # fmt: skip
async def test_data_is_the_json_value(data: bytes, value: Any) -> None:
    """EI-22, EI-14, EI-34: the reference system's list of data, read back."""
    async with Emulator({"s": 1}) as emulator:
        await put(emulator.url, [data])
        [record] = await take(consumer(emulator.url), 1)
    assert (record.data, record.raw, record.error) == (value, data, None)


async def test_raw_data_is_bytes() -> None:
    """EI-22."""
    async with Emulator({"s": 1}) as emulator:
        await put(emulator.url, [b"", b'{"a":1}', b"\xff\x00"])
        records = await take(consumer(emulator.url, raw=True), 3)
    assert [record.data for record in records] == [b"", b'{"a":1}', b"\xff\x00"]
    assert all(record.error is None for record in records)


async def test_a_record_tells_where_it_is_from() -> None:
    """EI-19: key, number, time in seconds and in milliseconds, encryption."""
    async with Emulator({"s": 1}) as emulator:
        await put(emulator.url, [b"1"], key="machine")
        [stored] = emulator.stored("s")
        [record] = await take(consumer(emulator.url), 1)
    assert (record.partition_key, record.shard_id) == ("machine", FIRST)
    assert (record.sequence_number, record.subsequence_number) == (stored.sequence_number, None)
    assert record.timestamp_ms == round(record.timestamp * 1000)
    assert record.encryption_type is None


async def test_an_encrypted_record_of_a_stream_that_chooses_shards() -> None:
    """EI-19, EI-20: KMS, no key, and the milliseconds that whole seconds would lose."""
    told = {
        "Data": "MQ==",
        "SequenceNumber": "7",
        "ApproximateArrivalTimestamp": 1_764_000_000.123,
        "EncryptionType": "KMS",
    }
    answer = {"Records": [told], "MillisBehindLatest": 0, "NextShardIterator": "next"}

    async def script(link: Link, _: Request) -> None:
        link.reply(200, json.dumps(answer).encode())

    async with FakeServer(script) as server, consumer(server.url) as one:
        [record] = (await one.get_records("iterator")).records
    assert (record.data, record.partition_key, record.encryption_type) == (1, None, fastkin.EncryptionType.KMS)
    assert (record.timestamp, record.timestamp_ms) == (1_764_000_000.123, 1_764_000_000_123)


async def test_one_record_that_is_no_json_costs_no_other() -> None:
    """EI-23: `error` is set, the others are delivered."""
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url) as one:
        await put(emulator.url, [b"1", b'{"\xc3\xa9": x}', b"3"], key="k")
        good, bad, last = await take(one, 3)
        assert one.stats()["decode_errors"] == 1
    assert (good.data, last.data) == (1, 3)
    assert bad.data is None
    assert bad.raw == b'{"\xc3\xa9": x}'
    assert isinstance(bad.error, fastkin.DataFormatError)
    assert bad.error.offset == 7  # bytes, though orjson counts characters


async def test_strict_refuses_the_whole_call() -> None:
    """EI-23: as the reference system does."""
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url, strict=True) as one:
        await put(emulator.url, [b"1", b"x"], key="k")
        iterator = await one.get_shard_iterator(FIRST, "TRIM_HORIZON")
        with pytest.raises(UnexpectedResponse, match="no JSON"):
            await one.get_records(iterator)
        with pytest.raises(UnexpectedResponse, match="no JSON"):
            await take(one, 2)


@pytest.mark.parametrize(
    "body",
    [
        b"[]", b"{}", b"no json", b'{"Records":{}}', b'{"Records":[7]}', b'{"Records":[{"SequenceNumber":"1"}]}',
        b'{"Records":[{"SequenceNumber":1,"Data":""}]}', b'{"Records":[{"SequenceNumber":"1","Data":"?"}]}',
        b'{"Records":[{"SequenceNumber":"1","Data":"","PartitionKey":7}]}', b'{"Records":[],"NextShardIterator":7}',
        b'{"Records":[],"MillisBehindLatest":"x"}', b'{"Records":[],"ChildShards":"x"}',
    ],
)  # fmt: skip
async def test_an_answer_that_makes_no_sense_is_told(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """EI-12 for reading: what is missing or of another type raises UnexpectedResponse, and nothing else."""
    one = consumer("http://localhost:1")

    async def call(target: str, sent: bytes) -> bytes:
        return body

    monkeypatch.setattr(one._client, "call", call)
    with pytest.raises(UnexpectedResponse):
        await one.get_records("iterator")
    await one.close()


async def test_an_answer_that_makes_no_sense_is_told_with_its_request() -> None:
    async with Emulator({"s": 1}) as emulator, consumer(emulator.url) as one:
        iterator = await one.get_shard_iterator(FIRST, "LATEST")
        for operation in ("GetRecords", "GetShardIterator", "ListShards"):
            emulator.faults.garbage(b"[]", operation=operation)
        for asking in (
            one.get_records(iterator), one.get_shard_iterator(FIRST, "LATEST"), one.list_shards(),
        ):  # fmt: skip
            with pytest.raises(UnexpectedResponse, match=r"request [0-9a-f-]{36}") as caught:
                await asking
            assert caught.value.request_id


async def test_a_closed_consumer_says_so() -> None:
    async with Emulator({"s": 1}) as emulator:
        one = consumer(emulator.url)
        await one.start()
        await one.close()
        with pytest.raises(ClosedError):
            await one.list_shards()


@pytest.mark.process
async def test_kinesalite_lists_shards_though_it_cannot() -> None:
    """EI-24: an endpoint that does not know ListShards is asked DescribeStream."""
    with kinesalite() as server:
        server.create_stream("s", 3)
        async with consumer(server.url) as one:
            shards = await one.list_shards()
            assert [shard.id for shard in shards] == [f"shardId-{n:012}" for n in range(3)]
            await put(server.url, [b"%d" % n for n in range(300)])
            assert sorted(record.data for record in await take(one, 300)) == list(range(300))


@pytest.mark.process
async def test_kinesis_mock_is_read_with_every_kind_of_iterator() -> None:
    """EI-25."""
    with kinesis_mock() as server:
        server.create_stream("s", 1)
        async with consumer(server.url) as one:
            await put(server.url, [b"%d" % n for n in range(3)])
            first = await take(one, 3)
            number = first[0].sequence_number
            shard = first[0].shard_id
            for kind, more, expected in (
                ("TRIM_HORIZON", {}, [0, 1, 2]),
                ("AT_SEQUENCE_NUMBER", {"starting_sequence_number": number}, [0, 1, 2]),
                ("AFTER_SEQUENCE_NUMBER", {"starting_sequence_number": number}, [1, 2]),
                ("AT_TIMESTAMP", {"timestamp": first[0].timestamp - 60}, [0, 1, 2]),
                ("LATEST", {}, []),
            ):
                batch = await one.get_records(await one.get_shard_iterator(shard, kind, **more))
                assert [record.data for record in batch.records] == expected
