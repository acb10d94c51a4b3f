"""`put_record` and `put_records`: one request each, results in order, and errors that tell what happened."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fastkin import (
    EncryptionType,
    ErrorType,
    KinesisError,
    LibraryError,
    Producer,
    PutResult,
    Record,
    RequestFailed,
    UnexpectedResponse,
)
from fastkin.emulator import Emulator
from fastkin.errors import ClosedError, TransportError
from support.fake_http import FakeServer, Link, Request
from support.servers import ACCESS_KEY, SECRET_KEY

TRANSPORTS = pytest.mark.parametrize("transport", ["native", "sdk"])


def producer(url: str, **options: Any) -> Producer:
    keys: dict[str, Any] = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "shard_map": False}
    return Producer("welders", region="us-east-1", endpoint_url=url, **(keys | options))


class Script:
    """A server that gives the same answer to every call, and keeps what it was asked."""

    def __init__(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.status, self.body, self.headers = status, body, headers
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def __call__(self, link: Link, request: Request) -> None:
        self.asked.append((request.target, json.loads(request.body)))
        link.reply(self.status, self.body, self.headers)


STORED = b'{"ShardId":"shardId-000000000000","SequenceNumber":"49"}'


@TRANSPORTS
async def test_put_record_stores_one_record(transport: str) -> None:
    """EI-07, EI-11, EI-20."""
    async with Emulator({"welders": 2}) as emulator, producer(emulator.url, transport=transport) as one:
        result = await one.put_record(Record({"n": 1}, "welder-1"))
        [stored] = emulator.stored("welders")
    assert (stored.data, stored.partition_key) == (b'{"n":1}', "welder-1")
    assert result == PutResult(stored.shard_id, stored.sequence_number, EncryptionType.NONE)
    assert (result.error_code, result.error_message) == (None, None)


@TRANSPORTS
async def test_put_records_is_one_call_with_results_in_order(transport: str) -> None:
    """EI-08."""
    async with Emulator({"welders": 4}) as emulator, producer(emulator.url, transport=transport) as one:
        failed, results = await one.put_records([Record(b"%d" % n, f"key-{n}") for n in range(500)])
        places = {record.sequence_number: record.data for record in emulator.stored("welders")}
        assert emulator.counters.calls == 1
    assert failed == 0
    assert [places[result.sequence_number or ""] for result in results] == [b"%d" % n for n in range(500)]


@TRANSPORTS
async def test_the_body_of_put_record_is_what_the_api_says(transport: str) -> None:
    """EI-07, EI-17, EI-18."""
    async with FakeServer(script := Script(200, STORED)) as server, producer(server.url, transport=transport) as one:
        await one.put_record(Record("Hello!", "k", 7, "49"))
        await one.put_record(Record(b"", "k"))
    target, body = script.asked[0]
    assert target == "PutRecord"
    assert body == {
        "StreamName": "welders",
        "Data": "IkhlbGxvISI=",
        "PartitionKey": "k",
        "ExplicitHashKey": "7",
        "SequenceNumberForOrdering": "49",
    }
    assert script.asked[1][1] == {"StreamName": "welders", "Data": "", "PartitionKey": "k"}


async def test_put_records_does_not_send_a_previous_sequence_number() -> None:
    """EI-18."""
    answer = b'{"FailedRecordCount":0,"EncryptionType":"KMS","Records":[' + STORED + b"]}"
    async with FakeServer(script := Script(200, answer)) as server, producer(server.url) as one:
        failed, [result] = await one.put_records([Record(b"x", "k", None, "49")])
    assert script.asked == [
        ("PutRecords", {"StreamName": "welders", "Records": [{"Data": "eA==", "PartitionKey": "k"}]})
    ]
    assert (failed, result) == (0, PutResult("shardId-000000000000", "49", EncryptionType.KMS))


async def test_put_records_that_fail_in_part_raise_nothing() -> None:
    """EI-08, EI-11: order, length and what is None."""
    answer = {
        "FailedRecordCount": 1,  # two failed: the entries count
        "EncryptionType": "KMS",
        "Records": [
            {"ErrorCode": "ProvisionedThroughputExceededException", "ErrorMessage": "slow"},
            {"ShardId": "shardId-000000000001", "SequenceNumber": "7"},
            {"ErrorCode": "InternalFailure", "ErrorMessage": "broken"},
        ],
    }
    async with FakeServer(script := Script(200, json.dumps(answer).encode())) as server, producer(server.url) as one:
        failed, results = await one.put_records([Record(n, "k") for n in range(3)])
    assert failed == 2
    assert len(script.asked) == 1
    assert results == [
        PutResult(None, None, None, False, "ProvisionedThroughputExceededException", "slow"),
        PutResult("shardId-000000000001", "7", EncryptionType.KMS),
        PutResult(None, None, None, False, "InternalFailure", "broken"),
    ]


FOREIGN = [None, "abc", 123, {}, [], ["abc"], [PutResult(None, None)]]


@pytest.mark.parametrize("given", FOREIGN, ids=repr)
@pytest.mark.parametrize("method", ["put_record", "put_records"])
async def test_arguments_of_a_wrong_type(method: str, given: Any) -> None:
    """EI-10: the matrix of the Electric Imp library, before any I/O."""
    async with FakeServer(script := Script(200, STORED)) as server, producer(server.url) as one:
        with pytest.raises(LibraryError) as caught:
            await getattr(one, method)(given)
    empty = method == "put_records" and given == []
    assert str(caught.value).startswith("Non empty argument required: records" if empty else "Wrong type of argument: ")
    assert (caught.value.type, caught.value.http_status) == (ErrorType.LIBRARY_ERROR, None)
    assert caught.value.details == str(caught.value)
    assert script.asked == []


async def test_what_one_call_cannot_take_is_refused_before_it() -> None:
    """EI-33: limits are checked here."""
    many = [Record(b"", "k")] * 501
    large = [Record(b"x" * 1_000_000, "k")] * 11
    async with FakeServer(script := Script(200, STORED)) as server, producer(server.url, max_record_bytes=2**20) as one:
        with pytest.raises(LibraryError, match="records: 501, and one PutRecords call takes 500") as caught:
            await one.put_records(many)
        assert caught.value.failed_record_count == 501
        with pytest.raises(LibraryError, match="records: more than the 10485760 bytes"):
            await one.put_records(large)
        with pytest.raises(LibraryError, match=r"records\[1\]: "):
            await one.put_records([Record(b"", "k"), Record(b"x" * 2**20, "k")])
        with pytest.raises(LibraryError, match="record: 1048577 bytes of data and key, at most 1048576"):
            await one.put_record(Record(b"x" * 2**20, "k"))
        assert script.asked == []
        # nothing of what was refused is left for the next call
        script.body = b'{"FailedRecordCount":0,"Records":[' + STORED + b"]}"
        assert (await one.put_records([Record(b"x", "k")])).failed_record_count == 0
    assert len(script.asked[0][1]["Records"]) == 1


@TRANSPORTS
@pytest.mark.parametrize("status", [400, 500, 503])
async def test_a_refused_call_says_everything_and_is_not_repeated(transport: str, status: int) -> None:
    """EI-03, EI-04, EI-09."""
    said = {"__type": "com.amazonaws.kinesis#ResourceNotFoundException", "message": "no such stream"}
    script = Script(status, json.dumps(said).encode(), {"x-amzn-RequestId": "r-1"})
    async with FakeServer(script) as server, producer(server.url, transport=transport) as one:
        for call, count in ((one.put_record(Record(1, "k")), 1), (one.put_records([Record(1, "k")] * 3), 3)):
            with pytest.raises(RequestFailed) as caught:
                await call  # type: ignore[misc]
            error = caught.value
            assert isinstance(error, KinesisError)
            assert error.type == "REQUEST_FAILED"
            assert error.details == f"AWS Kinesis request failed with status code: {status}"
            assert error.http_status == status
            assert error.http_response == said
            assert (error.code, error.message) == ("ResourceNotFoundException", "no such stream")
            assert error.request_id == "r-1"
            assert error.failed_record_count == count
    assert len(script.asked) == 2


@pytest.mark.parametrize(("body", "told"), [(b"", {}), (b"<html>", "<html>"), (b"[1]", [1])])
async def test_the_answer_of_a_refused_call_is_kept(body: bytes, told: object) -> None:
    """EI-04: an empty body is {}."""
    async with FakeServer(Script(502, body)) as server, producer(server.url) as one:
        with pytest.raises(RequestFailed) as caught:
            await one.put_record(Record(1, "k"))
    assert caught.value.http_response == told


async def test_expired_keys_are_not_tried_again() -> None:
    """EI-33: put_record makes one request, also where put() would sign again."""
    script = Script(400, b'{"__type":"ExpiredTokenException"}')
    async with FakeServer(script) as server, producer(server.url) as one:
        with pytest.raises(RequestFailed, match="ExpiredTokenException"):
            await one.put_record(Record(1, "k"))
    assert len(script.asked) == 1


async def test_a_secret_in_an_answer_is_not_kept() -> None:
    said = {"message": f"key {SECRET_KEY}", "more": [{SECRET_KEY: SECRET_KEY}, 5]}
    secret = "s/cret+of=welders"
    text = json.dumps(said).replace(SECRET_KEY, secret.replace("/", "\\/"))
    async with FakeServer(Script(400, text.encode())) as server, producer(server.url, secret_key=secret) as one:
        with pytest.raises(RequestFailed) as caught:
            await one.put_record(Record(1, "k"))
    assert caught.value.http_response == {"message": "key ***", "more": [{"***": "***"}, 5]}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"ShardId":"s"}',
        b'{"SequenceNumber":"1"}',
        b'{"ShardId":1,"SequenceNumber":"1"}',
    ],
)
async def test_an_answer_to_put_record_that_cannot_be_read(body: bytes) -> None:
    """EI-04, EI-12."""
    async with FakeServer(Script(200, body)) as server, producer(server.url) as one:
        with pytest.raises(UnexpectedResponse) as caught:
            await one.put_record(Record(1, "k"))
    assert (caught.value.type, caught.value.http_status) == (ErrorType.UNEXPECTED_RESPONSE, 200)
    assert caught.value.http_response == ({} if not body else "not json" if body == b"not json" else json.loads(body))
    assert caught.value.failed_record_count == 1
    assert caught.value.request_id is None  # the server told none


@pytest.mark.parametrize("transport", ["native", "sdk"])
@pytest.mark.parametrize("many", [False, True])
async def test_an_answer_that_cannot_be_read_is_told_with_its_request(transport: Any, many: bool) -> None:
    """EI-04: by the id of the answer's head, as it is of an error."""
    script = Script(200, b"{}", headers={"x-amzn-RequestId": "id-7"})
    async with FakeServer(script) as server, producer(server.url, transport=transport) as one:
        with pytest.raises(UnexpectedResponse, match="request id-7") as caught:
            await (one.put_records([Record(1, "k")]) if many else one.put_record(Record(1, "k")))
    assert caught.value.request_id == "id-7"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b'{"FailedRecordCount":0}',
        b'{"Records":[' + STORED + b"]}",
        b'{"FailedRecordCount":0,"Records":[]}',
        b'{"FailedRecordCount":0,"Records":[' + STORED + b"," + STORED + b"]}",
        b'{"FailedRecordCount":0,"Records":[{"ShardId":"s"}]}',
        b'{"FailedRecordCount":0,"Records":[{"SequenceNumber":"1"}]}',
    ],
)
async def test_an_answer_to_put_records_that_cannot_be_read(body: bytes) -> None:
    """EI-04, EI-08, EI-09, EI-12."""
    async with FakeServer(Script(200, body)) as server, producer(server.url) as one:
        with pytest.raises(UnexpectedResponse) as caught:
            await one.put_records([Record(1, "k")])
        assert (caught.value.http_status, caught.value.failed_record_count) == (200, 1)
        assert one.stats()["in_flight"] == 0


@pytest.mark.parametrize("kept", [False, True])
async def test_a_connection_that_dies_is_not_tried_again(kept: bool) -> None:
    """EI-33: nor on the connection that was kept from the call before."""
    cuts = iter([not kept, True])
    calls = 0

    async def answer(link: Link, _: Request) -> None:
        nonlocal calls
        calls += 1
        if next(cuts):
            link.cut()
        else:
            link.reply(200, STORED)

    async with FakeServer(answer) as server, producer(server.url) as one:
        if kept:
            await one.put_record(Record(1, "k"))
        with pytest.raises(TransportError) as caught:
            await one.put_record(Record(2, "k"))
    assert (caught.value.type, caught.value.http_status) == (ErrorType.REQUEST_FAILED, None)
    assert calls == 1 + kept


async def test_single_calls_need_an_open_producer() -> None:
    one = producer("http://127.0.0.1:9")
    for call in (one.put_record(Record(1, "k")), one.put_records([Record(1, "k")])):
        with pytest.raises(ClosedError, match="not started"):
            await call  # type: ignore[misc]


async def test_a_previous_sequence_number_needs_a_stream_that_orders() -> None:
    """EI-18: known to the producer when it has described the stream, and told by Kinesis otherwise."""
    async with FakeServer(script := Script(200, STORED)) as server, producer(server.url) as one:
        one._watch.auto_keys = True
        with pytest.raises(LibraryError, match="prev_sequence_number: the stream chooses shards itself"):
            await one.put_record(Record(1, "k", None, "1"))
    assert script.asked == []


def test_an_argument_error_of_the_constructor_is_a_library_error() -> None:
    """EI-05."""
    with pytest.raises(LibraryError, match="Non empty argument required: stream or stream_arn") as caught:
        Producer()
    assert caught.value.type is ErrorType.LIBRARY_ERROR
    with pytest.raises(LibraryError, match="region: is empty"):
        Producer("welders", region="")


async def test_the_wire_is_logged_when_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """EI-21: off by default; no header, no key, long bodies cut."""
    said = json.dumps({"__type": "Odd", "message": f"{SECRET_KEY} {ACCESS_KEY}"}).encode()
    script = Script(400, said)
    async with FakeServer(script) as server, producer(server.url) as one:
        with pytest.raises(RequestFailed):
            await one.put_record(Record(1, "k"))
        assert [record for record in caplog.records if record.name == "fastkin.wire"] == []
        with caplog.at_level("DEBUG", "fastkin.wire"), pytest.raises(RequestFailed):
            await one.put_record(Record(b"x" * 1000, "k"))
    asked, answered = [record.getMessage() for record in caplog.records if record.name == "fastkin.wire"]
    assert asked.startswith("> PutRecord, 1")
    assert asked.endswith("eHh...")
    assert len(asked) < 600
    assert answered == f'< PutRecord, status 400, {len(said)} bytes: {{"__type": "Odd", "message": "*** {ACCESS_KEY}"}}'
    assert not any(word in asked + answered for word in ("Authorization", "Signature", SECRET_KEY))
