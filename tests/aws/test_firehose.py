"""Firehose as a destination (IC-08): moto stores what is put, a scripted server fails entries and calls."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import uuid
from typing import TYPE_CHECKING, Any, Self

import pytest
from aiobotocore.session import get_session

from fastkin._codec import KeyPlan
from fastkin.aws.client import StreamSummary
from fastkin.aws.destinations import FIREHOSE, KINESIS
from fastkin.aws.error_table import classify_record, classify_request
from fastkin.aws.native import KinesisClient
from fastkin.aws.sdk import SdkClient
from fastkin.aws.transports import make_client
from fastkin.config import Kinesis
from fastkin.delivery.delivery import Delivery, Options
from fastkin.emulator import Emulator
from fastkin.errors import Action, KinesisError, RecordFailed
from fastkin.limits import KIB, MIB
from fastkin.runtime.deadline import Deadline
from support.fake_http import FakeServer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from fastkin.aws.client import Client
    from support.fake_http import Link, Request
    from support.servers import Server

KEYS = {"aws_access_key_id": "AKID", "aws_secret_access_key": "secret"}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


def settings(url: str, name: str = "plant", **more: Any) -> Kinesis:
    return Kinesis(firehose=name, region="us-east-1", endpoint_url=url, access_key="AKID", secret_key="secret", **more)


class Put:
    """A delivery to Firehose, with what was put."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.refused: list[str] = []

    async def __aenter__(self) -> Self:
        await self.client.start()
        self.delivery = Delivery(
            self.client, Options(budget_bytes=64 * MIB, budget_records=100_000, max_batch_bytes=10 * MIB),
            name="plant", stream="plant", key=KeyPlan("uuid"),
        )  # fmt: skip
        self.delivery.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.delivery.close(Deadline(5.0, "plant"), spool_limit=Deadline(5.0, "plant"))
        await self.client.close()

    async def all(self, *records: bytes) -> None:
        receipts = [self.delivery.batcher.put(record) for record in records]
        await self.delivery.flush()
        for receipt in receipts:
            await receipt


class Script:
    """Answers PutRecordBatch; `fate(data, times it came)` is an (ErrorCode, ErrorMessage), or None: stored."""

    def __init__(self, fate: Callable[[bytes, int], tuple[str, str] | None] = lambda _data, _times: None) -> None:
        self.fate = fate
        self.calls: list[list[bytes]] = []
        self.stored: list[bytes] = []
        self.seen: dict[bytes, int] = {}
        self.refuse: list[tuple[int, bytes]] = []  # whole answers, for the next calls
        self.heads: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []

    async def answer(self, link: Link, request: Request) -> None:
        self.heads.append(request.headers)
        body = json.loads(request.body)
        self.bodies.append(body)
        datas = [base64.b64decode(each["Data"]) for each in body["Records"]]
        self.calls.append(datas)
        if self.refuse:
            link.reply(*self.refuse.pop(0))
            return
        responses: list[dict[str, str]] = []
        for data in datas:
            self.seen[data] = self.seen.get(data, 0) + 1
            if (why := self.fate(data, self.seen[data])) is None:
                self.stored.append(data)
                responses.append({"RecordId": uuid.uuid4().hex})
            else:
                responses.append({"ErrorCode": why[0], "ErrorMessage": why[1]})
        failed = sum("ErrorCode" in each for each in responses)
        link.reply(200, json.dumps({"FailedPutCount": failed, "RequestResponses": responses}).encode())


async def objects(url: str, bucket: str) -> bytes:
    """What the bucket holds, in the order of its keys."""
    async with get_session().create_client("s3", region_name="us-east-1", endpoint_url=url, **KEYS) as s3:
        listed = await s3.list_objects_v2(Bucket=bucket)
        found = b""
        for each in listed.get("Contents", []):
            answer = await s3.get_object(Bucket=bucket, Key=each["Key"])
            found += await answer["Body"].read()
        return found


async def delivery_stream(url: str) -> str:
    """A new delivery stream of moto, into a bucket of the same name."""
    name = f"plant-{uuid.uuid4().hex[:12]}"
    session = get_session()
    async with session.create_client("s3", region_name="us-east-1", endpoint_url=url, **KEYS) as s3:
        await s3.create_bucket(Bucket=name)
    async with session.create_client("firehose", region_name="us-east-1", endpoint_url=url, **KEYS) as firehose:
        await firehose.create_delivery_stream(
            DeliveryStreamName=name,
            ExtendedS3DestinationConfiguration={
                "RoleARN": "arn:aws:iam::123456789012:role/firehose", "BucketARN": f"arn:aws:s3:::{name}",
            },
        )  # fmt: skip
    return name


# -- moto


@pytest.mark.parametrize("kind", [KinesisClient, SdkClient])
async def test_moto_stores_what_is_put(kind: type[KinesisClient | SdkClient], moto_server: Server) -> None:
    """IC-08: at most 500 records to a call, and every one of them is in the bucket behind the delivery stream."""
    name = await delivery_stream(moto_server.url)
    records = [b"%04d\n" % n for n in range(1200)]
    async with Put(kind(settings(moto_server.url, name), destination=FIREHOSE)) as put:
        await put.all(*records)
        assert put.delivery.stats()["stored"] == 1200
        assert put.client.calls == 3
    assert sorted((await objects(moto_server.url, name)).splitlines(keepends=True)) == records


async def test_moto_describes_the_delivery_stream(moto_server: Server) -> None:
    name = await delivery_stream(moto_server.url)
    client = make_client(settings(moto_server.url, name))
    await client.start()
    told = await client.describe()
    await client.close()
    assert (told.name, told.status, told.mode, told.shard_count) == (name, "ACTIVE", "DirectPut", 0)
    assert told.arn.endswith(f":deliverystream/{name}")


async def test_moto_refuses_the_wrong_delivery_stream(moto_server: Server) -> None:
    client = make_client(settings(moto_server.url, "nobody"))
    await client.start()
    for asked in (client.describe(), client.put(b'{"Records":[{"Data":"YQ=="}],"DeliveryStreamName":"nobody"}')):
        with pytest.raises(KinesisError, match="nobody") as caught:
            await asked
        assert (caught.value.code, caught.value.action) == ("ResourceNotFoundException", Action.OPERATOR)
    await client.close()


# -- a server that fails what it is told to


async def test_only_failed_entries_go_again() -> None:
    """IC-08: ServiceUnavailableException and InternalFailure are retried, record by record, and nothing else is."""
    fates = {b"b": ("ServiceUnavailableException", "Slow down."), b"d": ("InternalFailure", "Internal failure.")}
    script = Script(lambda data, times: fates.get(data) if times <= 2 else None)
    async with FakeServer(script.answer) as server, Put(make_client(settings(server.url))) as put:
        await put.all(b"a", b"b", b"c", b"d", b"e")
        counters = put.delivery.sender.counters
        assert dict(counters.failed_by_code) == {"ServiceUnavailableException": 2, "InternalFailure": 2}
        assert put.delivery.stats()["throttled"] == 2  # Firehose has no other code for it
        assert put.delivery.stats()["retries"] == 4
    assert script.calls[0] == [b"a", b"b", b"c", b"d", b"e"]
    assert sorted(data for call in script.calls[1:] for data in call) == [b"b", b"b", b"d", b"d"]
    assert sorted(script.stored) == [b"a", b"b", b"c", b"d", b"e"]


async def test_a_call_to_firehose_is_signed_for_firehose_and_holds_no_key() -> None:
    script = Script()
    async with FakeServer(script.answer) as server, Put(make_client(settings(server.url))) as put:
        await put.all(b"a")
    (head,), (body,) = script.heads, script.bodies
    assert "/us-east-1/firehose/aws4_request" in head["authorization"]
    assert head["x-amz-target"] == "Firehose_20150804.PutRecordBatch"
    assert head["content-type"] == "application/x-amz-json-1.1"
    assert body == {"Records": [{"Data": "YQ=="}], "DeliveryStreamName": "plant"}


async def test_a_throttled_call_goes_again_and_lowers_the_rate() -> None:
    script = Script()
    script.refuse = [(503, b'{"__type":"ServiceUnavailableException","message":"Slow down."}')]
    async with FakeServer(script.answer) as server, Put(make_client(settings(server.url))) as put:
        await put.all(b"a", b"b")
        assert dict(put.delivery.sender.counters.calls_failed_by_code) == {"ServiceUnavailableException": 1}
        assert put.delivery.sender.pacer.even.limit < float("inf")
    assert script.stored == [b"a", b"b"]


@pytest.mark.parametrize(
    ("status", "code", "cure"),
    [
        (400, "AccessDeniedException", "allow firehose:PutRecordBatch on the stream"),
        (400, "ResourceNotFoundException", "check stream name, region and account"),
        (400, "InvalidKMSResourceException", ""),
    ],
)
async def test_an_operators_error_keeps_the_records(
    status: int, code: str, cure: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 0.2)
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_CAP_S", 0.2)
    script = Script()
    script.refuse = [(status, json.dumps({"__type": code, "message": "no"}).encode())]
    async with FakeServer(script.answer) as server, Put(make_client(settings(server.url))) as put:
        receipt = put.delivery.batcher.put(b"a")
        flushed = asyncio.create_task(put.delivery.flush())
        while put.delivery.sender.operator_error is None:
            await asyncio.sleep(0.01)
        assert put.delivery.batcher.in_flight == 1
        assert code in put.delivery.sender.operator_error
        await flushed  # the next call is answered
        await receipt
        assert put.delivery.sender.operator_error is None
    (line,) = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
    assert "the data is kept" in line
    assert line.endswith(cure)


async def test_a_refused_record_is_set_aside_alone() -> None:
    """InvalidArgumentException refuses a whole call: it is halved until the bad record stands alone."""
    script = Script()

    async def answer(link: Link, request: Request) -> None:
        if b'"Data":"YmFk"' in request.body:
            script.calls.append([base64.b64decode(each["Data"]) for each in json.loads(request.body)["Records"]])
            link.reply(400, b'{"__type":"InvalidArgumentException","message":"bad"}')
            return
        await script.answer(link, request)

    async with FakeServer(answer) as server, Put(make_client(settings(server.url))) as put:
        good = [put.delivery.batcher.put(b"%d" % n) for n in range(7)]
        bad = put.delivery.batcher.put(b"bad")
        await put.delivery.flush()
        for receipt in good:
            await receipt
        with pytest.raises(RecordFailed, match="InvalidArgumentException"):
            await bad
    assert sorted(script.stored) == [b"%d" % n for n in range(7)]


async def test_calls_stay_below_the_limits_of_firehose() -> None:
    """IC-08: 500 records, 4 MiB, 1,000 KiB a record before base64."""
    script = Script()
    async with FakeServer(script.answer) as server, Put(make_client(settings(server.url))) as put:
        await put.all(*[b"x" * 900 * KIB] * 9)
        await put.all(b"y" * 1000 * KIB, *[b"%d" % n for n in range(1001)])
    assert all(len(call) <= 500 and sum(map(len, call)) <= 4 * MIB for call in script.calls)
    assert max(len(data) for call in script.calls for data in call) == 1_024_000


# -- the table of errors


@pytest.mark.parametrize(
    ("code", "kinesis", "firehose"),
    [
        ("ServiceUnavailableException", Action.RETRY, Action.THROTTLE),
        ("InternalFailure", Action.RETRY, Action.RETRY),
        ("InvalidArgumentException", Action.REJECTED, Action.REJECTED),
        ("InvalidKMSResourceException", Action.OPERATOR, Action.OPERATOR),
        ("InvalidSourceException", Action.OPERATOR, Action.OPERATOR),
        ("ResourceNotFoundException", Action.OPERATOR, Action.OPERATOR),
        ("LimitExceededException", Action.THROTTLE, Action.THROTTLE),
    ],
)
def test_what_a_code_means_to_each(code: str, kinesis: Action, firehose: Action) -> None:
    for row, action in ((KINESIS, kinesis), (FIREHOSE, firehose)):
        assert classify_record(code, row.codes) is action
        assert classify_request(code, 400, row.codes) == (code, action)


# -- which client is made


def test_the_settings_choose_the_destination() -> None:
    kinesis = Kinesis(stream="s", region="eu-west-1")
    assert make_client(kinesis).destination is KINESIS
    assert make_client(Kinesis(firehose="f", region="eu-west-1")).destination is FIREHOSE


async def test_the_emulator_describes_its_delivery_streams() -> None:
    async with Emulator(firehose=["plant"]) as emulator:
        client = make_client(settings(emulator.url))
        await client.start()
        assert await client.describe() == StreamSummary(
            "plant", "arn:aws:firehose:us-east-1:123456789012:deliverystream/plant", "ACTIVE", 0, 1_024_000,
            "DirectPut", True,
        )  # fmt: skip
        await client.close()
