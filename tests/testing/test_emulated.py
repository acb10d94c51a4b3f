"""The emulators of fastkin.testing as context managers: what they show, what goes wrong on request, what is left."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import typing
from typing import TYPE_CHECKING, Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError, ConnectionClosedError, ReadTimeoutError

import fastkin
from fastkin import testing
from fastkin.testing import AsyncEmulator, ThreadEmulator
from support.codec_rig import Rig

if TYPE_CHECKING:
    from collections.abc import Iterator


def client(service: str = "kinesis", **options: Any) -> Any:
    """As a program makes one that knows nothing of tests."""
    config = Config(retries={"total_max_attempts": 1}, read_timeout=options.pop("read_timeout", 10))
    return boto3.client(service, config=config, **options)


@pytest.fixture(autouse=True)
def another_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a machine may have set: nothing of it may reach the program, and all of it must be there again."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "of-the-machine")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of-the-machine")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "intranet")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it keeps the keys of the first who asked


@pytest.fixture
def kinesis() -> Iterator[ThreadEmulator]:
    with ThreadEmulator() as running:
        yield running


# --- the environment ---


def test_the_environment_leads_to_it_and_is_restored() -> None:
    before = dict(os.environ)
    with ThreadEmulator({"s": 1}, region="eu-west-1") as kinesis:
        told = dict(os.environ)
        for service in ("KINESIS", "FIREHOSE", "STS"):
            assert told[f"AWS_ENDPOINT_URL_{service}"] == kinesis.url
        assert (told["AWS_ACCESS_KEY_ID"], told["AWS_SECRET_ACCESS_KEY"]) == (testing.ACCESS_KEY, testing.SECRET_KEY)
        assert told["AWS_REGION"] == told["AWS_DEFAULT_REGION"] == "eu-west-1"
        assert told["NO_PROXY"] == told["no_proxy"] == "intranet,127.0.0.1"
        assert "AWS_PROFILE" not in told
        assert "AWS_SESSION_TOKEN" not in told
        assert client().meta.region_name == "eu-west-1"
        client().put_record(StreamName="s", Data=b"1", PartitionKey="k")
        assert client("sts").get_caller_identity()["Arn"].endswith(f":user/{testing.ACCESS_KEY}")
    assert dict(os.environ) == before


def test_the_environment_is_restored_after_an_error() -> None:
    before = dict(os.environ)

    def broken() -> None:
        with ThreadEmulator():
            os.environ["AWS_REGION"] = "changed-within"
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert dict(os.environ) == before


def test_the_environment_is_left_alone_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    before = dict(os.environ)
    with ThreadEmulator(environ=False) as kinesis:
        assert dict(os.environ) == before
        keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
        client(endpoint_url=kinesis.url, **keys).put_record(StreamName="test", Data=b"1", PartitionKey="k")
        assert kinesis.stored_data() == [b"1"]


async def test_a_producer_of_fastkin_finds_it_too(kinesis: ThreadEmulator) -> None:
    async with fastkin.Producer("test") as producer:
        await (await producer.put(b'{"n":1}'))
    assert kinesis.stored_json() == [{"n": 1}]


# --- looking ---


def test_the_values_of_records_aggregates_and_lines(kinesis: ThreadEmulator) -> None:
    rig = Rig(aggregate_bytes=1000)
    for n in range(3):
        rig.batcher.offer(b"t", b"%d" % n, 1)
    ((aggregate, _, _),) = (entry for call in rig.store() for entry in call)
    for data in (aggregate, b'{"a":\n"b"}', b'[1]\n{"c":2}\n', b'"\xc3\xa4"'):
        client().put_record(StreamName="test", Data=data, PartitionKey="k")
    assert kinesis.stored_json() == [0, 1, 2, {"a": "b"}, [1], {"c": 2}, "\u00e4"]
    assert kinesis.stored_data() == [b"0", b"1", b"2", b'{"a":\n"b"}', b'[1]\n{"c":2}\n', b'"\xc3\xa4"']
    assert kinesis.stored("test")[0].data == aggregate
    assert kinesis.counters.records == 4


@pytest.mark.parametrize("data", [b"{", b"x" * 100, b'{"a":1}\n{', b"\xff"])
def test_a_record_that_is_no_json_is_shown(kinesis: ThreadEmulator, data: bytes) -> None:
    client().put_record(StreamName="test", Data=b"1", PartitionKey="k")
    client().put_record(StreamName="test", Data=data, PartitionKey="k")
    with pytest.raises(ValueError, match=r"record 1 of stream 'test' is no JSON .*stored_data\(\)") as caught:
        kinesis.stored_json()
    assert repr(data[:60]) in str(caught.value)


def test_a_delivery_stream_is_looked_at_like_a_stream() -> None:
    with ThreadEmulator({}, firehose=["lake"]) as kinesis:
        client("firehose").put_record_batch(DeliveryStreamName="lake", Records=[{"Data": b'{"n":1}'}])
        assert kinesis.stored_json() == [{"n": 1}]


def test_a_stream_that_is_not_there_is_named_with_its_cure(kinesis: ThreadEmulator) -> None:
    with pytest.raises(LookupError, match=r"no stream 'welders', only test: make it with create_stream\('welders'\)"):
        kinesis.stored("welders")
    kinesis.create_stream("welders", 2)
    assert kinesis.stored("welders") == []
    assert client().describe_stream_summary(StreamName="welders")["StreamDescriptionSummary"]["OpenShardCount"] == 2
    with pytest.raises(LookupError, match="2 streams: say which one of test, welders"):
        kinesis.stored_json()


def test_waiting_for_records_of_another_thread(kinesis: ThreadEmulator) -> None:
    def write() -> None:
        for n in range(3):
            client().put_record(StreamName="test", Data=b"%d" % n, PartitionKey="k")

    writer = threading.Thread(target=write)
    writer.start()
    kinesis.wait_stored(3)
    assert kinesis.stored_json() == [0, 1, 2]
    writer.join()
    kinesis.wait_stored(3)  # they are there already


def test_waiting_counts_the_records_of_an_aggregate(kinesis: ThreadEmulator) -> None:
    rig = Rig(aggregate_bytes=1000)
    for n in range(3):
        rig.batcher.offer(b"t", b"%d" % n, 1)
    ((aggregate, _, _),) = (entry for call in rig.store() for entry in call)
    client().put_record(StreamName="test", Data=aggregate, PartitionKey="k")
    kinesis.wait_stored(3)
    with pytest.raises(TimeoutError, match=r"stream 'test' holds 3 records after 0.05 s, not 4"):
        kinesis.wait_stored(4, timeout=0.05)


async def test_waiting_in_a_loop_is_awaited(kinesis: ThreadEmulator) -> None:
    with pytest.raises(RuntimeError, match=r"use await until_stored\(1\)"):
        kinesis.wait_stored(1)
    async with fastkin.Producer("test") as producer:
        waiting = asyncio.create_task(kinesis.until_stored(1))
        await producer.put(b"1")
        await waiting
    with pytest.raises(TimeoutError, match="holds 1 records"):
        await kinesis.until_stored(2, timeout=0.05)


async def test_in_the_loop_of_the_test() -> None:
    before = dict(os.environ)
    async with AsyncEmulator({"s": 2}) as kinesis:
        assert kinesis.url in repr(kinesis)
        async with fastkin.Producer("s") as producer:
            waiting = asyncio.create_task(kinesis.until_stored(2))
            fault = kinesis.fail_entries(times=1)
            for n in range(2):
                await producer.put(b"%d" % n)
            await waiting
        assert fault.hits == 1
        assert sorted(kinesis.stored_json("s")) == [0, 1]
        with pytest.raises(TimeoutError, match="holds 2 records"):
            await kinesis.until_stored(3, timeout=0.05)
    assert dict(os.environ) == before
    assert threading.active_count() == len(threading.enumerate())


def test_nothing_is_left_behind() -> None:
    with ThreadEmulator() as kinesis:
        assert [thread.name for thread in threading.enumerate()].count("fastkin emulator") == 1
        made = client()
        made.put_record(StreamName="test", Data=b"1", PartitionKey="k")
    assert [thread.name for thread in threading.enumerate()].count("fastkin emulator") == 0
    with pytest.raises(Exception, match=r"Could not connect|Connection was closed"):
        made.put_record(StreamName="test", Data=b"1", PartitionKey="k")
    assert kinesis.stored_json() == [1]  # what was stored may be looked at afterwards


# --- what goes wrong ---


def put(data: bytes = b"1", **options: Any) -> Any:
    records = [{"Data": data, "PartitionKey": "k"}, {"Data": b"2", "PartitionKey": "k2"}]
    return client(**options).put_records(StreamName="test", Records=records)


def codes(answer: Any) -> list[str | None]:
    return [entry.get("ErrorCode") for entry in answer["Records"]]


THROTTLED = "ProvisionedThroughputExceededException"


def test_throttle_refuses_every_record(kinesis: ThreadEmulator) -> None:
    with kinesis.throttle() as fault:
        assert codes(put()) == [THROTTLED] * 2
        with pytest.raises(ClientError, match=THROTTLED):
            client().put_record(StreamName="test", Data=b"1", PartitionKey="k")
    assert fault.hits == 3
    assert codes(put()) == [None, None]
    assert kinesis.stored_json() == [1, 2]


def test_entries_fail_alone(kinesis: ThreadEmulator) -> None:
    with kinesis.fail_entries(contains=b"bad"):
        assert codes(put(b"bad")) == ["InternalFailure", None]
    with kinesis.fail_entries("KMSThrottlingException", "slow down", key="k2"):
        answer = put()
        assert codes(answer) == [None, "KMSThrottlingException"]
        assert answer["Records"][1]["ErrorMessage"] == "slow down"
    with kinesis.fail_entries(every=2) as fault:
        assert codes(put()) == [None, "InternalFailure"]
        assert repr(fault) == "<ActiveFault record hits=1>"


def test_calls_fail_whole(kinesis: ThreadEmulator) -> None:
    kinesis.fail_calls("AccessDeniedException", times=1)
    with pytest.raises(ClientError, match="AccessDeniedException"):
        put()
    assert kinesis.stored_json() == []
    kinesis.fail_calls(stored=True, times=1)
    with pytest.raises(ClientError, match="ServiceUnavailable"):
        put()
    assert kinesis.stored_json() == [1, 2]
    kinesis.fail_calls("AccessDenied", operation="AssumeRole")
    with pytest.raises(ClientError, match="AccessDenied"):
        client("sts").assume_role(RoleArn="arn:aws:iam::123456789012:role/r", RoleSessionName="s1")
    kinesis.clear_faults()
    client("sts").assume_role(RoleArn="arn:aws:iam::123456789012:role/r", RoleSessionName="s1")


def test_answers_that_are_late_or_never_come(kinesis: ThreadEmulator) -> None:
    with kinesis.latency(300), pytest.raises(ReadTimeoutError):
        put(read_timeout=0.1)
    with kinesis.silent(), pytest.raises(ReadTimeoutError):
        put(read_timeout=0.1)
    assert kinesis.stored_json() == [1, 2]  # of the late one: it was stored, and nobody heard of it
    with kinesis.silent(stored=True), pytest.raises(ReadTimeoutError):
        put(read_timeout=0.1)
    assert kinesis.stored_json() == [1, 2, 1, 2]
    put(read_timeout=5)


@pytest.mark.parametrize(("where", "stored"), [("before", 0), ("after", 2)])
def test_connections_that_break(kinesis: ThreadEmulator, where: Any, stored: int) -> None:
    with kinesis.cut(where), pytest.raises(ConnectionClosedError):
        put()
    assert len(kinesis.stored()) == stored


def test_signatures_are_checked_on_request() -> None:
    with ThreadEmulator(credentials={testing.ACCESS_KEY: testing.SECRET_KEY}) as kinesis:
        put()
        with pytest.raises(ClientError, match="UnrecognizedClientException"):
            put(aws_access_key_id="another", aws_secret_access_key="secret")
        assert kinesis.stored_json() == [1, 2]


async def test_a_role_of_the_emulator_for_a_producer_of_fastkin() -> None:
    """The whole chain: the environment's keys ask STS for the role, and what is stored is signed with the role's."""
    role = "arn:aws:iam::123456789012:role/ingest"
    with ThreadEmulator(credentials={testing.ACCESS_KEY: testing.SECRET_KEY}, roles={role: "tenant-7"}) as kinesis:
        async with fastkin.Producer("test", role_arn=role, external_id="tenant-7") as producer:
            await (await producer.put(b"1"))
        assert kinesis.stored_json() == [1]
        (assumed,) = kinesis.emulator.sts.assumed
        assert assumed.session_name == "fastkin"
        with pytest.raises(fastkin.KinesisError, match="external_id is the one it asks for"):
            async with fastkin.Producer("test", role_arn=role, external_id="tenant-8"):
                pass


# --- for who reads it ---


@pytest.mark.parametrize("name", sorted(testing.__all__))
def test_the_types_of_the_public_face_can_be_read(name: str) -> None:
    face = getattr(testing, name)
    members = [face] if inspect.isfunction(face) else [] if isinstance(face, str) else [face.__init__]
    if inspect.isclass(face):
        members += [member for key, member in inspect.getmembers(face, inspect.isfunction) if not key.startswith("_")]
    for member in members:
        typing.get_type_hints(member)
        assert face.__doc__
