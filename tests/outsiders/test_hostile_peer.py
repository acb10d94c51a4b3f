"""Nothing that a peer sends ends more than its own call, or makes it last for ever."""

from __future__ import annotations

import asyncio
import json
import math
import time
from typing import TYPE_CHECKING, Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkin import Producer
from fastkin.aws.error_table import error_from, retry_after
from fastkin.aws.http_answer import Reply
from fastkin.aws.native import KinesisClient
from fastkin.aws.shards import Shard
from fastkin.config import Kinesis
from fastkin.errors import KinesisError, UnexpectedResponse
from service.test_pipeline import rig
from support.fake_http import FakeServer, Link, Request
from support.servers import ACCESS_KEY, SECRET_KEY, mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.servers import Server

TOP = 2**128 - 1
WHOLE = {"ShardId": "shardId-000000000000", "HashKeyRange": {"StartingHashKey": "0", "EndingHashKey": str(TOP)}}


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto("max_queued_messages 0\nmax_inflight_messages 100\n") as running:
        yield running


class Answers(KinesisClient):
    """A client whose calls have these answers, one after the other; the last one for ever."""

    def __init__(self, *answers: bytes | KinesisError) -> None:
        super().__init__(Kinesis(stream="s", region="eu-west-1", access_key="A", secret_key="S"))
        self.answers = list(answers)
        self.asked = 0

    async def call(self, target: str, body: Any) -> bytes:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, KinesisError):
            raise answer
        return answer


def no_such_call() -> KinesisError:
    return KinesisError("UnknownOperationException", "")


# -- headers

HEADERS = [
    "\xb2", "\xb9\xb2\xb3", "9" * 5000, "-1", "1e9", "nan", "inf", "", " ", "\x00", "1" * 30, "+5", "0x10", "1_000",
    "Fri, 99 Foo 20000 00:00:00 GMT", "Thu, 01 Jan 0000 00:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 -2359",
    "Mon, 01 Jan 0001 00:00:00 +2359", "Mon, 01 Jan 2024 25:61:61 GMT", "Mon, 01 Jan 2024 00:00:00 +999999999999",
    "Mon, 01 Jan " + "9" * 5000 + " 00:00:00 GMT", "Mon", ",,,,", "Mon, , , ::", "\u0661",
]  # fmt: skip


@pytest.mark.parametrize("text", HEADERS)
def test_any_retry_after_is_a_wait_or_none(text: str) -> None:
    wait = retry_after({"retry-after": text}, time.time())
    assert wait is None or 0.0 <= wait <= 3600.0
    error = error_from(Reply(503, {"retry-after": text, "x-amzn-requestid": text, "x-amzn-errortype": text}, b""), 0.0)
    assert isinstance(error, KinesisError)


@pytest.mark.parametrize("text", HEADERS)
async def test_any_date_leaves_the_client_able_to_sign(text: str) -> None:
    """A refused signature makes us look at the answer's date."""

    async def refuse(link: Link, request: Request) -> None:
        raw = text.encode("utf-8", "replace").replace(b"\x00", b"")
        body = b'{"__type":"InvalidSignatureException"}'
        link.send(
            b"HTTP/1.1 400 Bad\r\nDate: %s\r\nRetry-After: %s\r\nContent-Length: %d\r\n\r\n%s"
            % (raw, raw, len(body), body)
        )

    async with FakeServer(refuse) as server:
        client = KinesisClient(
            Kinesis(stream="s", region="eu-west-1", access_key="A", secret_key="S", endpoint_url=server.url)
        )
        await client.start()
        try:
            for _ in range(2):
                with pytest.raises(KinesisError):
                    await client.call("PutRecords", b"{}")
            assert math.isfinite(client.clock_offset)
        finally:
            await client.close()


# -- JSON

NASTY: list[Any] = [
    None, True, 0, -1, 1.5, 1e308, 10**18, "", "x", "\u202e", "9" * 5000, "-5", "\xb2", "NaN", [], [[]], {}, {"a": 1},
    [None], "shardId-000000000000", str(TOP), str(TOP + 1),
]  # fmt: skip
VALUES = st.recursive(
    st.sampled_from(NASTY) | st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def described(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = st.fixed_dictionaries({}, optional={"StartingHashKey": values, "EndingHashKey": values})
    shard = st.fixed_dictionaries(
        {},
        optional={
            "ShardId": values | st.just("shardId-000000000001"),
            "HashKeyRange": values | keys,
            "ParentShardId": values,
            "SequenceNumberRange": values,
        },
    )
    names = (
        "StreamName", "StreamARN", "StreamStatus", "OpenShardCount", "MaxRecordSizeInKiB", "StreamModeDetails",
        "RecordDistributionStrategy", "HasMoreShards", "NextToken",
    )  # fmt: skip
    summary = st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(names, values)
        | {"Shards": values | st.lists(shard | st.just(WHOLE) | values, max_size=3)},
    )
    return values | st.fixed_dictionaries(
        {},
        optional={"StreamDescriptionSummary": values | summary, "StreamDescription": values | summary}
        | {"Shards": values | st.lists(shard | st.just(WHOLE) | values, max_size=3), "NextToken": values},
    )


@settings(max_examples=300, deadline=None)
@given(described(VALUES), st.booleans())
def test_any_answer_about_a_stream_is_one_or_a_kinesis_error(told: Any, old: bool) -> None:
    answer = orjson.dumps(told)

    async def ask(method: str) -> Any:
        client = Answers(*([no_such_call()] if old else []), answer)
        async with asyncio.timeout(30):
            return await getattr(client, method)()

    for method in ("describe", "list_shards"):
        try:
            found = asyncio.run(ask(method))
        except KinesisError:
            continue
        if method == "list_shards":
            for shard in found:
                assert isinstance(shard, Shard)
                assert isinstance(shard.id, str)
                assert 0 <= shard.start <= shard.end <= TOP
                assert shard.parent is None or isinstance(shard.parent, str)
        else:
            assert all(isinstance(text, str) for text in (found.name, found.arn, found.status, found.mode))
            assert all(text.isprintable() for text in (found.name, found.arn, found.status, found.mode))
            assert 0 <= found.shard_count <= 10**9
            assert 1024 <= found.max_record_bytes <= 2**30


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=200)
    | VALUES.map(orjson.dumps)
    | st.dictionaries(st.sampled_from(["__type", "code", "Code", "message", "Message", "errorMessage"]), VALUES).map(
        orjson.dumps
    ),
    st.integers(100, 599),
    st.dictionaries(
        st.sampled_from(["retry-after", "date", "x-amzn-requestid", "x-amzn-errortype"]),
        st.binary(max_size=40).map(lambda raw: raw.decode("latin-1")) | st.sampled_from(HEADERS),
    ),
)
def test_any_refusal_is_a_kinesis_error(body: bytes, status: int, headers: dict[str, str]) -> None:
    error = error_from(Reply(status, headers, body), time.time(), ("any", "a", "secret-of-a-sensible-length", " ", ""))
    assert isinstance(error, KinesisError)
    assert str(error).isprintable()
    assert error.retry_after is None or 0 <= error.retry_after <= 3600


DEEP = b"[" * 900 + b"]" * 900


@pytest.mark.parametrize(
    "body", [b'{"__type":' + DEEP + b"}", b'{"message":' + DEEP + b"}", b"[" * 100_000, b"\xff" * 9]
)
def test_a_deep_refusal_is_a_kinesis_error(body: bytes) -> None:
    assert isinstance(error_from(Reply(400, {}, body), 0.0), KinesisError)


SHARDS: list[Any] = [
    [WHOLE | {"ShardId": []}], [WHOLE | {"ShardId": {}}], [WHOLE | {"ShardId": 7}], [WHOLE | {"ShardId": None}],
    [WHOLE | {"HashKeyRange": {"StartingHashKey": "0", "EndingHashKey": "9" * 5000}}],
    [WHOLE | {"HashKeyRange": {"StartingHashKey": 0, "EndingHashKey": 1e308}}],
    [WHOLE | {"HashKeyRange": {"StartingHashKey": "5", "EndingHashKey": "4"}}],
    [WHOLE | {"HashKeyRange": {"StartingHashKey": "-5", "EndingHashKey": str(TOP)}}],
    [WHOLE | {"ParentShardId": ["a"]}], [WHOLE | {"SequenceNumberRange": "x"}], "shards", {"a": 1}, [1], 7,
]  # fmt: skip


@pytest.mark.parametrize("shards", SHARDS)
async def test_a_shard_that_is_none_is_refused_where_it_is_read(shards: Any) -> None:
    with pytest.raises(UnexpectedResponse):
        await Answers(orjson.dumps({"Shards": shards})).list_shards()


MANY = [WHOLE | {"ShardId": f"shardId-{n:012d}"} for n in range(1000)]


@pytest.mark.parametrize(
    "answers",
    [
        (orjson.dumps({"Shards": MANY, "NextToken": "the same"}),),
        (orjson.dumps({"Shards": [], "NextToken": "the same"}),),
        (no_such_call(), orjson.dumps({"StreamDescription": {"Shards": MANY, "HasMoreShards": True}})),
        (
            no_such_call(),
            orjson.dumps({"StreamDescription": {"Shards": [WHOLE], "HasMoreShards": True}}),
            orjson.dumps({"StreamDescription": {"Shards": [], "HasMoreShards": True}}),
        ),
    ],
    ids=["the same token", "the same token, no shards", "the same last shard", "no further shards"],
)
async def test_pages_that_lead_to_themselves_are_read_once(answers: Any) -> None:
    client = Answers(*answers)
    with pytest.raises(UnexpectedResponse, match="page"):
        await _bounded(client)
    assert client.asked <= 4


@pytest.mark.parametrize("size", [0, 1000])
async def test_pages_without_end_are_bounded(size: int) -> None:
    class Endless(Answers):
        async def call(self, target: str, body: Any) -> bytes:
            self.asked += 1
            return orjson.dumps({"Shards": MANY[:size], "NextToken": f"token {self.asked}"})

    client = Endless(b"")
    with pytest.raises(UnexpectedResponse, match="more than"):
        await _bounded(client)


async def _bounded(client: Answers, most: int = 3000) -> None:
    """list_shards(), broken off when it asks without end."""
    true = client.call

    async def call(target: str, body: Any) -> bytes:
        assert client.asked < most, "asks for pages without end"
        return await true(target, body)

    client.call = call  # type: ignore[method-assign]
    await client.list_shards()


# -- the service goes on


class Kept:
    """A Kinesis that stores everything, and answers questions with whatever it is told to."""

    def __init__(self) -> None:
        self.stored = 0
        self.asked = 0
        self.question: Any = {"Shards": [WHOLE]}
        self.headers: dict[str, str] = {}
        self.status = 200
        self.failing = 0

    async def __call__(self, link: Link, request: Request) -> None:
        if request.target != "PutRecords":
            self.asked += 1
            link.reply(self.status, orjson.dumps(self.question), self.headers)
            return
        if self.failing:
            self.failing -= 1
            link.reply(503, b"{}", self.headers)
            return
        count = len(json.loads(request.body)["Records"])
        self.stored += count
        one = {"SequenceNumber": "1", "ShardId": "shardId-000000000000"}
        link.reply(200, orjson.dumps({"FailedRecordCount": 0, "Records": [one] * count}))


NONSENSE: list[Any] = [
    {"Shards": [WHOLE | {"ShardId": []}]},
    {"Shards": [WHOLE, WHOLE | {"HashKeyRange": None}]},
    {"Shards": [1]},
    {"StreamDescriptionSummary": {"StreamName": [], "OpenShardCount": "x", "MaxRecordSizeInKiB": "9" * 5000}},
    {"StreamDescriptionSummary": {"StreamStatus": 7, "StreamModeDetails": [], "OpenShardCount": None}},
    {"StreamDescriptionSummary": {"StreamARN": {"a": 1}, "MaxRecordSizeInKiB": 1e308}},
]


@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_a_pipeline_outlives_nonsense_about_its_shards(
    server: Server, nonsense: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkin.delivery.stream_watch._EVERY_S", 0.02)
    monkeypatch.setattr("fastkin.delivery.stream_watch._LOOKS", 1)
    kinesis = Kept()
    kinesis.question = {
        "Shards": [WHOLE],
        "StreamDescriptionSummary": {"StreamName": "welders", "StreamStatus": "ACTIVE", "OpenShardCount": 1},
    }
    async with FakeServer(kinesis) as http, rig(server, kinesis={"endpoint_url": http.url}) as r:
        await r.publish(b"before")
        await r.settled(1)
        kinesis.question = nonsense
        asked = kinesis.asked
        await r.until(lambda: kinesis.asked >= asked + 4, "asked again and again")
        await r.publish(b"after")
        await r.settled(2)
        assert kinesis.stored == 2


@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_a_producer_outlives_nonsense_about_its_shards(nonsense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkin.delivery.stream_watch._EVERY_S", 0.02)
    monkeypatch.setattr("fastkin.delivery.stream_watch._LOOKS", 1)
    kinesis = Kept()
    keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
    async with (
        FakeServer(kinesis) as http,
        Producer("s", region="us-east-1", endpoint_url=http.url, linger_ms=0, **keys) as producer,
    ):
        await (await producer.put(b"before"))
        kinesis.question = nonsense
        asked = kinesis.asked
        async with asyncio.timeout(10):
            while kinesis.asked < asked + 4:
                await asyncio.sleep(0.01)
        await (await producer.put(b"after"))
        assert kinesis.stored == 2


async def test_a_pipeline_starts_beside_a_retry_after_that_is_no_number(server: Server) -> None:
    kinesis = Kept()
    kinesis.headers = {"Retry-After": "\xb2"}
    kinesis.status = 503
    kinesis.failing = 1

    async with (
        FakeServer(kinesis) as http,
        rig(server, kinesis={"endpoint_url": http.url}) as r,
    ):
        await r.publish(b"x")
        await r.settled(1)
        assert kinesis.stored == 1
