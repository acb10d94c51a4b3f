"""The emulator beside kinesalite and kinesis-mock: the same requests, the same answers.

Where a peer is known to differ from AWS it is left out of that row, and the reason stands there.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import uuid
from typing import TYPE_CHECKING, Any

import pytest
from botocore.exceptions import ClientError

from fastkin.emulator import Emulator
from support.readback import kinesis_client, read_stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from support import servers

PEERS = ("emulator", "kinesalite", "kinesis-mock")
TOP = 1 << 128


@contextlib.asynccontextmanager
async def peer(name: str, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """The URL of the emulator or of one of its peers."""
    if name == "emulator":
        async with Emulator(limits=False) as emulator:
            yield emulator.url
    else:
        server: servers.KinesisServer = request.getfixturevalue(
            f"{name.replace('-', '_').removesuffix('_server')}_server"
        )
        yield server.url


@contextlib.asynccontextmanager
async def stream(name: str, request: pytest.FixtureRequest, shards: int = 4) -> AsyncIterator[tuple[Any, str, str]]:
    """Client, stream name and URL, with a new ACTIVE stream."""
    async with peer(name, request) as url, kinesis_client(url) as client:
        label = f"s-{uuid.uuid4().hex}"
        await client.create_stream(StreamName=label, ShardCount=shards)
        await client.get_waiter("stream_exists").wait(
            StreamName=label, WaiterConfig={"Delay": 0.02, "MaxAttempts": 500}
        )
        yield client, label, url
        await client.delete_stream(StreamName=label)


def on_all(*names: str) -> Callable[[Any], Any]:
    values = [
        pytest.param(name, marks=() if name == "emulator" else pytest.mark.process)  # it runs within the tests
        for name in names or PEERS
    ]
    return pytest.mark.parametrize("name", values)


@on_all()
async def test_records_go_where_the_md5_of_their_key_says(name: str, request: pytest.FixtureRequest) -> None:
    keys = [str(uuid.UUID(int=hash((7, n)) % TOP)) for n in range(200)]
    # The JavaScript peers count UTF-16 units, AWS's page says characters: 128 of these fit both.
    keys += ["ü" * 256, "schweißer-7", "🔥" * 128, "a" * 256, " ", '"\\\n']
    async with stream(name, request, 5) as (client, label, _):
        answer = await client.put_records(
            StreamName=label, Records=[{"Data": b"x", "PartitionKey": key} for key in keys]
        )
    width = TOP // 5
    for key, entry in zip(keys, answer["Records"], strict=True):
        index = min(int.from_bytes(hashlib.md5(key.encode()).digest(), "big") // width, 4)
        assert entry["ShardId"] == f"shardId-{index:012d}", key


@on_all()
async def test_explicit_hash_keys_override_the_partition_key(name: str, request: pytest.FixtureRequest) -> None:
    width = TOP // 3
    edges = [0, 1, width - 1, width, 2 * width - 1, 2 * width, TOP - 1]
    async with stream(name, request, 3) as (client, label, _):
        answer = await client.put_records(
            StreamName=label,
            Records=[{"Data": b"x", "PartitionKey": "same", "ExplicitHashKey": str(edge)} for edge in edges],
        )
        one = await client.put_record(StreamName=label, Data=b"x", PartitionKey="same", ExplicitHashKey=str(TOP - 1))
    found = [entry["ShardId"][-1] for entry in answer["Records"]]
    assert found == ["0", "0", "0", "1", "1", "2", "2"]
    assert one["ShardId"] == "shardId-000000000002"


# kinesis-mock divides 2^128 - 1, so its ranges are one short where the count divides 2^128; AWS
# shows 170141183460469231731687303715884105728 = 2^127 for the second of two (DescribeStream).
@on_all("emulator", "kinesalite")
@pytest.mark.parametrize("shards", [1, 2, 3, 4, 7])
async def test_shards_share_the_hash_space_evenly(name: str, shards: int, request: pytest.FixtureRequest) -> None:
    width = TOP // shards
    async with stream(name, request, shards) as (client, label, _):
        answer = await client.list_shards(StreamName=label)
        described = await client.describe_stream(StreamName=label)
    ranges = [shard["HashKeyRange"] for shard in answer["Shards"]]
    assert [int(each["StartingHashKey"]) for each in ranges] == [n * width for n in range(shards)]
    assert [int(each["EndingHashKey"]) for each in ranges] == [
        *((n + 1) * width - 1 for n in range(shards - 1)),
        TOP - 1,
    ]
    assert [shard["ShardId"] for shard in answer["Shards"]] == [f"shardId-{n:012d}" for n in range(shards)]
    listed = described["StreamDescription"]["Shards"]
    assert [shard["HashKeyRange"] for shard in listed] == ranges
    for shard in listed:  # 56 digits, as real ones
        assert len(shard["SequenceNumberRange"]["StartingSequenceNumber"]) == 56


@on_all()
async def test_sequence_numbers_ascend_within_a_shard(name: str, request: pytest.FixtureRequest) -> None:
    async with stream(name, request, 2) as (client, label, _):
        entries = []
        for call in range(3):
            answer = await client.put_records(
                StreamName=label,
                Records=[{"Data": b"x", "PartitionKey": f"{call}-{n}"} for n in range(40)],
            )
            assert answer["FailedRecordCount"] == 0
            entries += answer["Records"]
    for shard in {entry["ShardId"] for entry in entries}:
        numbers = [int(e["SequenceNumber"]) for e in entries if e["ShardId"] == shard]
        assert numbers == sorted(set(numbers))
        assert all(len(e["SequenceNumber"]) == 56 for e in entries)


@on_all()
async def test_every_kind_of_iterator(name: str, request: pytest.FixtureRequest) -> None:
    async def read(client: Any, **where: Any) -> list[bytes]:
        answer = await client.get_shard_iterator(ShardId="shardId-000000000000", **where)
        page = await client.get_records(ShardIterator=answer["ShardIterator"])
        return [record["Data"] for record in page["Records"]]

    async with stream(name, request, 1) as (client, label, _):
        latest = await client.get_shard_iterator(
            StreamName=label, ShardId="shardId-000000000000", ShardIteratorType="LATEST"
        )
        numbers = []
        for n in range(4):
            answer = await client.put_record(StreamName=label, Data=b"%d" % n, PartitionKey="k")
            numbers.append(answer["SequenceNumber"])
        at = {"StreamName": label, "StartingSequenceNumber": numbers[1]}
        assert await read(client, **at, ShardIteratorType="AT_SEQUENCE_NUMBER") == [
            b"1",
            b"2",
            b"3",
        ]
        assert await read(client, **at, ShardIteratorType="AFTER_SEQUENCE_NUMBER") == [b"2", b"3"]
        everything = [b"0", b"1", b"2", b"3"]
        assert await read(client, StreamName=label, ShardIteratorType="TRIM_HORIZON") == everything
        assert await read(client, StreamName=label, ShardIteratorType="LATEST") == []
        assert await read(client, StreamName=label, ShardIteratorType="AT_TIMESTAMP", Timestamp=1.0) == everything
        page = await client.get_records(ShardIterator=latest["ShardIterator"])
        assert [record["Data"] for record in page["Records"]] == everything
        assert page["Records"][0]["PartitionKey"] == "k"
        assert page["MillisBehindLatest"] == 0
        page = await client.get_records(ShardIterator=page["NextShardIterator"])
        assert page["Records"] == []


@on_all()
async def test_get_records_obeys_its_limit_and_goes_on(name: str, request: pytest.FixtureRequest) -> None:
    async with stream(name, request, 1) as (client, label, _):
        await client.put_records(
            StreamName=label,
            Records=[{"Data": b"%d" % n, "PartitionKey": "k"} for n in range(7)],
        )
        answer = await client.get_shard_iterator(
            StreamName=label, ShardId="shardId-000000000000", ShardIteratorType="TRIM_HORIZON"
        )
        iterator, found = answer["ShardIterator"], []
        for _ in range(3):
            page = await client.get_records(ShardIterator=iterator, Limit=3)
            found.append([record["Data"] for record in page["Records"]])
            iterator = page["NextShardIterator"]
    assert found == [[b"0", b"1", b"2"], [b"3", b"4", b"5"], [b"6"]]


@on_all()
async def test_split_and_merge_close_parents_and_open_children(name: str, request: pytest.FixtureRequest) -> None:
    half = TOP // 2
    async with stream(name, request, 1) as (client, label, url):
        await client.put_record(StreamName=label, Data=b"before", PartitionKey="k")

        async def active() -> None:
            await client.get_waiter("stream_exists").wait(
                StreamName=label, WaiterConfig={"Delay": 0.02, "MaxAttempts": 500}
            )

        await client.split_shard(StreamName=label, ShardToSplit="shardId-000000000000", NewStartingHashKey=str(half))
        await active()
        low = await client.put_record(StreamName=label, Data=b"low", PartitionKey="k", ExplicitHashKey=str(half - 1))
        high = await client.put_record(StreamName=label, Data=b"high", PartitionKey="k", ExplicitHashKey=str(half))
        await client.merge_shards(
            StreamName=label,
            ShardToMerge="shardId-000000000001",
            AdjacentShardToMerge="shardId-000000000002",
        )
        await active()
        last = await client.put_record(StreamName=label, Data=b"last", PartitionKey="k")
        shards = (await client.list_shards(StreamName=label))["Shards"]
        everything = await read_stream(url, label)
        answer = await client.get_shard_iterator(
            StreamName=label, ShardId="shardId-000000000000", ShardIteratorType="TRIM_HORIZON"
        )
        iterator = answer["ShardIterator"]
        for _ in range(3):  # kinesalite needs a second call to notice the end
            page = await client.get_records(ShardIterator=iterator)
            iterator = page.get("NextShardIterator")
            if iterator is None:
                break
        assert iterator is None
    assert [each["ShardId"][-1] for each in (low, high, last)] == ["1", "2", "3"]
    lineage = [(s["ShardId"][-1], s.get("ParentShardId"), s.get("AdjacentParentShardId")) for s in shards]
    first = "shardId-000000000000"
    assert lineage == [
        ("0", None, None),
        ("1", first, None),
        ("2", first, None),
        ("3", "shardId-000000000001", "shardId-000000000002"),
    ]
    assert [int(s["HashKeyRange"]["StartingHashKey"]) for s in shards] == [0, 0, half, 0]
    assert [int(s["HashKeyRange"]["EndingHashKey"]) for s in shards] == [
        TOP - 1,
        half - 1,
        TOP - 1,
        TOP - 1,
    ]
    closed = ["EndingSequenceNumber" in s["SequenceNumberRange"] for s in shards]
    assert closed == [True, True, True, False]
    assert [(record.data, record.shard[-1]) for record in everything] == [
        (b"before", "0"),
        (b"low", "1"),
        (b"high", "2"),
        (b"last", "3"),
    ]


GOOD = {"Data": "eA==", "PartitionKey": "k"}
# What the real service refuses as a whole, and how. kinesalite recorded its texts from AWS; peers
# that are known not to check are left out (kinesis-facts: 501 and 0 records, the record size).
REFUSED: list[tuple[str, list[Any], str, tuple[str, ...]]] = [
    ("501 records", [GOOD] * 501, "ValidationException", ("kinesalite",)),
    ("no record", [], "ValidationException", ("kinesalite",)),
    ("key of 257", [GOOD, {**GOOD, "PartitionKey": "k" * 257}], "ValidationException", PEERS[1:2]),
    ("empty key", [{**GOOD, "PartitionKey": ""}], "ValidationException", ("kinesalite",)),
    ("no key", [GOOD, {"Data": "eA=="}], "ValidationException", ("kinesalite",)),
    ("no data", [{"PartitionKey": "k"}], "ValidationException", ("kinesalite",)),
    (
        "hash key that is no number",
        [{**GOOD, "ExplicitHashKey": "x"}],
        "ValidationException",
        ("kinesalite",),
    ),
    (
        # kinesalite anchors only one arm of the pattern; the model is clear
        "hash key with a leading zero",
        [{**GOOD, "ExplicitHashKey": "01"}],
        "ValidationException",
        (),
    ),
    (
        "hash key of 2^128",
        [{**GOOD, "ExplicitHashKey": str(TOP)}],
        "InvalidArgumentException",
        ("kinesalite", "kinesis-mock"),
    ),
    ("key that is a number", [{**GOOD, "PartitionKey": 7}], "SerializationException", PEERS[1:]),
    ("record that is a text", ["x"], "SerializationException", PEERS[1:]),
    ("not base64", [{**GOOD, "Data": "***"}], "SerializationException", ("kinesalite",)),
]


@pytest.mark.process
@pytest.mark.parametrize(("records", "code", "peers"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
async def test_one_bad_record_refuses_the_whole_call(
    records: list[Any], code: str, peers: tuple[str, ...], request: pytest.FixtureRequest
) -> None:
    texts = {}
    for name in ("emulator", *peers):
        async with stream(name, request, 1) as (_, label, url):
            status, answer = await raw_call(url, {"StreamName": label, "Records": records})
            assert (status, answer["__type"]) == (400, code), name
            texts[name] = answer.get("message", answer.get("Message", ""))
            assert await read_stream(url, label) == []
    if code != "SerializationException" and "kinesalite" in texts:
        # Kinesis prints a list of entries as Java objects: compare what follows.
        ours, theirs = (
            text.rpartition(" failed to satisfy")[2] or text for text in (texts["emulator"], texts["kinesalite"])
        )
        assert ours == theirs


@on_all()
async def test_an_unknown_stream_is_not_found(name: str, request: pytest.FixtureRequest) -> None:
    async with peer(name, request) as url, kinesis_client(url) as client:
        for call in (
            client.describe_stream_summary(StreamName="absent"),
            client.list_shards(StreamName="absent"),
            client.put_record(StreamName="absent", Data=b"", PartitionKey="k"),
            client.put_records(StreamName="absent", Records=[{"Data": b"", "PartitionKey": "k"}]),
        ):
            with pytest.raises(ClientError, match="ResourceNotFoundException"):
                await call


@on_all()
async def test_a_stream_cannot_be_created_twice(name: str, request: pytest.FixtureRequest) -> None:
    async with stream(name, request, 1) as (client, label, _):
        assert label in (await client.list_streams(Limit=10_000))["StreamNames"]
        with pytest.raises(ClientError, match="ResourceInUseException"):
            await client.create_stream(StreamName=label, ShardCount=1)


# kinesalite knows no StreamARN.
@on_all("emulator", "kinesis-mock")
async def test_an_arn_names_a_stream_too(name: str, request: pytest.FixtureRequest) -> None:
    async with stream(name, request, 1) as (client, label, url):
        summary = await client.describe_stream_summary(StreamName=label)
        arn = summary["StreamDescriptionSummary"]["StreamARN"]
        status, answer = await raw_call(url, {"StreamARN": arn, "Records": [GOOD]})
        assert (status, answer["FailedRecordCount"]) == (200, 0)
        status, answer = await raw_call(url, {"StreamARN": arn + "x", "Records": [GOOD]})
        assert (status, answer["__type"]) == (400, "ResourceNotFoundException")
        assert [record.data for record in await read_stream(url, label)] == [b"x"]


@on_all()
async def test_the_summary_has_the_fields_a_producer_reads(name: str, request: pytest.FixtureRequest) -> None:
    async with stream(name, request, 3) as (client, label, _):
        summary = (await client.describe_stream_summary(StreamName=label))["StreamDescriptionSummary"]
    assert summary["StreamName"] == label
    assert summary["StreamStatus"] == "ACTIVE"
    assert summary["OpenShardCount"] == 3
    assert summary["StreamARN"].startswith("arn:aws:kinesis:us-east-1:")
    assert summary["StreamARN"].endswith(f":stream/{label}")
    if name == "emulator":  # of this year; botocore's model has them, the peers do not
        assert summary["MaxRecordSizeInKiB"] == 1024
        assert summary["RecordDistributionStrategy"] == "USER_PARTITION_KEY"


def cbor_body(label: str, payloads: list[bytes], *, indefinite: bool) -> bytes:
    """PutRecords as the SDK for Java writes it (indefinite) or the short way, written by hand."""

    def text(value: str) -> bytes:
        raw = value.encode()
        return bytes([0x78, len(raw)]) + raw

    def blob(value: bytes) -> bytes:
        return b"\x5a" + len(value).to_bytes(4, "big") + value

    begin, end = (b"\xbf", b"\xff") if indefinite else (b"\xa2", b"")
    records = b"".join(begin + text("PartitionKey") + text("k") + text("Data") + blob(each) + end for each in payloads)
    items = b"\x9f" + records + b"\xff" if indefinite else bytes([0x80 + len(payloads)]) + records
    return begin + text("StreamName") + text(label) + text("Records") + items + end


# kinesalite accepts CBOR but stores the data as an object (mhart/kinesalite#101).
@on_all("emulator", "kinesis-mock")
@pytest.mark.parametrize("indefinite", [True, False])
async def test_cbor_bodies_store_the_same_bytes(name: str, indefinite: bool, request: pytest.FixtureRequest) -> None:
    payloads = [b"", b"\x00\xff\xfe", bytes(range(256)), b"z" * 70_000]
    async with stream(name, request, 1) as (_, label, url):
        status, answer = await raw_call(
            url,
            cbor_body(label, payloads, indefinite=indefinite),
            content_type="application/x-amz-cbor-1.1",
        )
        assert status == 200
        assert b"FailedRecordCount" in answer
        assert [record.data for record in await read_stream(url, label)] == payloads


@on_all()
async def test_what_goes_in_comes_out(name: str, request: pytest.FixtureRequest) -> None:
    payloads = [b"", b"\x00", b"x" * 152, "ß".encode(), bytes(range(256)) * 40, b"y" * 300_000]
    async with stream(name, request, 4) as (client, label, url):
        sent = [{"Data": each, "PartitionKey": f"key-{n}"} for n, each in enumerate(payloads)]
        answer = await client.put_records(StreamName=label, Records=sent)
        found = await read_stream(url, label)
    placed = {
        (f"key-{n}", each, entry["ShardId"])
        for n, (each, entry) in enumerate(zip(payloads, answer["Records"], strict=True))
    }
    assert {tuple(record) for record in found} == placed
    assert len(found) == len(payloads)


async def raw_call(url: str, body: Any, *, content_type: str = "application/x-amz-json-1.1") -> tuple[int, Any]:
    """PutRecords with a body the SDK would not let out."""
    import aiohttp
    import orjson

    data = body if isinstance(body, bytes) else orjson.dumps(body)
    headers = {
        "Content-Type": content_type,
        "X-Amz-Target": "Kinesis_20131202.PutRecords",
        "X-Amz-Date": "20261121T000000Z",
        "Authorization": "AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/20261121/us-east-1/kinesis/"
        "aws4_request, SignedHeaders=host;x-amz-date, Signature=0",
    }
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/", data=data, headers=headers) as reply,
    ):
        answer = await reply.read()
        if content_type.endswith("json-1.1"):
            return reply.status, orjson.loads(answer) if answer else {}
        return reply.status, answer


def test_the_example_payload_is_base64() -> None:
    assert base64.b64decode(GOOD["Data"]) == b"x"
