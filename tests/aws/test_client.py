from __future__ import annotations

import asyncio
import base64
import email.utils
import json
import logging
import os
import re
import ssl
import subprocess
import sys
import threading
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import trustme

import fastkin.aws.native as module
from fastkin._codec import DRAIN, Batcher, Budget, KeyPlan
from fastkin.aws.client import StreamSummary
from fastkin.aws.error_table import REQUEST_ACTIONS, classify_record, classify_request, error_from, retry_after
from fastkin.aws.http_answer import Reply
from fastkin.aws.native import INLINE_BYTES, KinesisClient
from fastkin.aws.shards import Shard
from fastkin.aws.signing import Credentials
from fastkin.aws.transports import make_client
from fastkin.config import Kinesis
from fastkin.emulator import Emulator
from fastkin.errors import Action, ConfigError, KinesisError, TransportError, UnexpectedResponse
from support.fake_http import FakeServer, Link, Request, on_both_loops

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from support import servers

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
TOKEN = "the-session-token-that-nobody-may-see"
JSON = "application/x-amz-json-1.1"
BODY = b'{"Records":[{"Data":"aGVsbG8=","PartitionKey":"k"}],"StreamName":"welders"}'
STORED = b'{"FailedRecordCount":0,"Records":[{"SequenceNumber":"1","ShardId":"shardId-000000000000"}]}'


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


def settings(url: str, **more: Any) -> Kinesis:
    fixed: dict[str, Any] = {
        "stream": "welders", "region": "eu-west-1", "endpoint_url": url, "access_key": "AKIDEXAMPLE",
        "secret_key": SECRET, "session_token": TOKEN, "request_timeout_s": 5.0, "connect_timeout_s": 5.0,
    }  # fmt: skip
    return Kinesis(**(fixed | more))


class client_to:  # noqa: N801 - reads as a call
    """A started client and its server, both ended afterwards."""

    def __init__(self, answer: Callable[[Link, Request], Awaitable[None]], clock: Any = None, **more: Any) -> None:
        self.server = FakeServer(answer)
        self.clock = clock
        self.more = more

    async def __aenter__(self) -> tuple[KinesisClient, FakeServer]:
        await self.server.__aenter__()
        options = {"clock": self.clock} if self.clock else {}
        self.client = KinesisClient(settings(self.server.url, **self.more), **options)
        await self.client.start()
        return self.client, self.server

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.server.__aexit__()


def saying(status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> Any:
    async def answer(link: Link, request: Request) -> None:
        link.reply(status, body, headers)

    return answer


# -- one good call


@on_both_loops
async def test_a_call_as_it_goes_out() -> None:
    async with client_to(saying(200, STORED)) as (client, server):
        assert await client.call("PutRecords", BODY) == STORED
    (request,) = server.requests
    assert (request.method, request.path, request.body) == ("POST", "/", BODY)
    assert request.headers["x-amz-target"] == "Kinesis_20131202.PutRecords"
    assert request.headers["content-type"] == JSON
    assert request.headers["content-length"] == str(len(BODY))
    assert request.headers["host"] == f"127.0.0.1:{server.port}"
    assert request.headers["x-amz-security-token"] == TOKEN
    assert re.fullmatch(
        r"AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/\d{8}/eu-west-1/kinesis/aws4_request, SignedHeaders="
        r"content-type;host;x-amz-date;x-amz-security-token;x-amz-target, Signature=[0-9a-f]{64}",
        request.headers["authorization"],
    )


def check_signature(
    request: Request, secret: str = SECRET, token: str | None = TOKEN, region: str = "eu-west-1"
) -> None:
    """The signature fits what came over the wire: the body, the path, the date."""
    import datetime

    from aws.test_signing import by_botocore

    when = datetime.datetime.strptime(request.headers["x-amz-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.UTC)
    told = {name: request.headers[name.lower()] for name in ("Content-Type", "X-Amz-Target")}
    url = f"http://{request.headers['host']}{request.path}"
    keys = Credentials("AKIDEXAMPLE", secret, token)
    assert (
        by_botocore(keys, region, url, told, request.body, when.timestamp())["Authorization"]
        == (request.headers["authorization"])
    )


@on_both_loops
@pytest.mark.parametrize("size", [0, 200, INLINE_BYTES, INLINE_BYTES + 1, 2_000_000])
@pytest.mark.parametrize("path", ["", "/base/path", "/odd//path/%20x/"])
async def test_what_arrives_fits_its_signature(size: int, path: str) -> None:
    server = FakeServer(saying(200, STORED))
    async with server:
        client = KinesisClient(settings(server.url + path))
        await client.start()
        await client.call("PutRecords", bytes(size))
        await client.close()
    check_signature(server.requests[0])
    assert server.requests[0].path == (path or "/")


class Kept(bytearray):
    """A body that can hold its digest, as a Batch does."""

    digest: str | None = None


@on_both_loops
async def test_a_large_body_is_hashed_in_a_thread_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    true = module._sha256

    def watch(body: Any) -> str:
        hashed.append(threading.current_thread().name)
        return true(body)

    monkeypatch.setattr(module, "_sha256", watch)
    body = Kept(500_000)
    async with client_to(saying(200, STORED)) as (client, server):
        for _ in range(3):
            await client.call("PutRecords", body)
        await client.call("PutRecords", bytes(INLINE_BYTES))
    assert len(hashed) == 1
    assert hashed[0].startswith("fastkin-hash")
    assert body.digest == sha256(body).hexdigest()
    for request in server.requests:
        check_signature(request)


@on_both_loops
async def test_calls_at_once_are_bounded() -> None:
    async def slow(link: Link, request: Request) -> None:
        await asyncio.sleep(0.005)
        link.reply(200, STORED)

    async with client_to(slow, max_connections=5) as (client, server):
        await asyncio.gather(*(client.call("PutRecords", BODY) for _ in range(40)))
        assert server.busy_peak == 5
        assert server.peak == 5


# -- the error table, row by row

THROTTLED = [
    "ProvisionedThroughputExceededException", "Throttling", "ThrottlingException", "ThrottledException",
    "RequestThrottled", "RequestThrottledException", "TooManyRequestsException", "RequestLimitExceeded",
    "BandwidthLimitExceeded", "LimitExceededException", "SlowDown", "PriorRequestNotComplete", "KMSThrottlingException",
]  # fmt: skip
ROWS: list[tuple[str, int, Action]] = [
    *((code, 400, Action.THROTTLE) for code in THROTTLED),
    ("InternalFailure", 500, Action.RETRY),
    ("InternalFailureException", 500, Action.RETRY),
    ("ServiceUnavailable", 503, Action.RETRY),
    ("ServiceUnavailableException", 503, Action.RETRY),
    ("RequestTimeout", 400, Action.RETRY),
    ("RequestTimeoutException", 400, Action.RETRY),
    ("RequestAborted", 400, Action.RETRY),
    ("ResourceInUseException", 400, Action.RETRY),
    ("ExpiredIteratorException", 400, Action.RETRY),
    ("ExpiredNextTokenException", 400, Action.RETRY),
    ("ExpiredTokenException", 400, Action.CREDENTIALS),
    ("ExpiredToken", 403, Action.CREDENTIALS),
    ("InvalidSignatureException", 400, Action.CREDENTIALS),
    ("SignatureDoesNotMatch", 403, Action.CREDENTIALS),
    ("UnrecognizedClientException", 400, Action.CREDENTIALS),
    ("InvalidClientTokenId", 403, Action.CREDENTIALS),
    ("MissingAuthenticationToken", 403, Action.CREDENTIALS),
    ("MissingAuthenticationTokenException", 400, Action.CREDENTIALS),
    ("IncompleteSignature", 400, Action.CREDENTIALS),
    ("RequestExpired", 400, Action.CLOCK),
    ("AccessDeniedException", 400, Action.OPERATOR),
    ("AccessDenied", 403, Action.OPERATOR),
    ("KMSAccessDeniedException", 400, Action.OPERATOR),
    ("KMSDisabledException", 400, Action.OPERATOR),
    ("KMSInvalidStateException", 400, Action.OPERATOR),
    ("KMSNotFoundException", 400, Action.OPERATOR),
    ("KMSOptInRequired", 400, Action.OPERATOR),
    ("OptInRequired", 403, Action.OPERATOR),
    ("ResourceNotFoundException", 400, Action.OPERATOR),
    ("UnknownOperationException", 400, Action.OPERATOR),
    ("InvalidArgumentException", 400, Action.REJECTED),
    ("ValidationException", 400, Action.REJECTED),
    ("SerializationException", 400, Action.REJECTED),
    ("RequestEntityTooLarge", 413, Action.REJECTED),
    ("SomethingNobodyKnows", 400, Action.OPERATOR),
    ("SomethingNobodyKnows", 500, Action.RETRY),
    ("SomethingNobodyKnows", 599, Action.RETRY),
]


@pytest.mark.parametrize(("code", "status", "action"), ROWS)
@pytest.mark.parametrize("shape", ["plain", "prefixed", "header", "url", "Message"])
async def test_every_row_of_the_table(code: str, status: int, action: Action, shape: str) -> None:
    told: dict[str, str] = {"__type": code, "message": "the words"}
    headers = {"x-amzn-RequestId": "id-7"}
    if shape == "prefixed":
        told["__type"] = f"com.amazonaws.kinesis.v20131202#{code}"
    elif shape == "header":
        del told["__type"]
        headers["x-amzn-ErrorType"] = code
    elif shape == "url":
        del told["__type"]
        headers["x-amzn-ErrorType"] = f"{code}:http://internal.amazon.com/coral/com.amazon.coral.service/"
    elif shape == "Message":
        told = {"__type": code, "Message": "the words"}
    async with client_to(saying(status, json.dumps(told).encode(), headers)) as (client, server):
        with pytest.raises(KinesisError) as caught:
            await client.call("PutRecords", BODY)
    error = caught.value
    assert (error.code, error.action, error.http_status) == (code, action, status)
    assert (error.message, error.request_id) == ("the words", "id-7")
    assert len(server.requests) == 1


PAGES = [
    (500, b"", "InternalFailure", Action.RETRY),
    (500, b"<html><body>oops</body></html>", "InternalFailure", Action.RETRY),
    (502, b"<html><body>Bad Gateway</body></html>", "BadGateway", Action.RETRY),
    (503, b"", "ServiceUnavailable", Action.RETRY),
    (504, b"upstream", "GatewayTimeout", Action.RETRY),
    (507, b"", "Http507", Action.RETRY),
    (429, b"", "TooManyRequestsException", Action.THROTTLE),
    (408, b"", "RequestTimeout", Action.RETRY),
    (413, b"", "RequestEntityTooLarge", Action.REJECTED),
    (401, b"", "MissingAuthenticationToken", Action.CREDENTIALS),
    (403, b"<html/>", "AccessDenied", Action.OPERATOR),
    (404, b"not found", "NotFound", Action.OPERATOR),
    (301, b"", "Http301", Action.OPERATOR),
    (400, b"what?", "Http400", Action.OPERATOR),
    (400, b"[]", "Http400", Action.OPERATOR),
    (400, b'{"__type":7}', "Http400", Action.OPERATOR),
    (400, b'{"message":{"a":1}}', "Http400", Action.OPERATOR),
    (500, b"\xff\xfe\x00", "InternalFailure", Action.RETRY),
    (204, b"", "Http204", Action.OPERATOR),
]


@pytest.mark.parametrize(("status", "body", "code", "action"), PAGES)
async def test_answers_that_name_no_error(status: int, body: bytes, code: str, action: Action) -> None:
    async with client_to(saying(status, body)) as (client, _):
        with pytest.raises(KinesisError) as caught:
            await client.call("PutRecords", BODY)
    assert (caught.value.code, caught.value.action, caught.value.http_status) == (code, action, status)
    assert "<" not in caught.value.message


def test_the_throttling_codes_of_the_sdk_are_all_here() -> None:
    from botocore.retries.standard import ThrottledRetryableChecker, TransientRetryableChecker

    for code in ThrottledRetryableChecker._THROTTLED_ERROR_CODES:
        assert REQUEST_ACTIONS[code] is Action.THROTTLE, code
    for code in TransientRetryableChecker._TRANSIENT_ERROR_CODES:
        assert REQUEST_ACTIONS[code] in (Action.RETRY, Action.THROTTLE), code


def test_the_errors_of_the_service_model_are_all_here() -> None:
    import botocore.session

    model = botocore.session.get_session().get_service_model("kinesis").operation_model("PutRecords")
    for shape in model.error_shapes:
        if shape.name != "DryRunOperationException":
            assert shape.name in REQUEST_ACTIONS, shape.name


@pytest.mark.parametrize(
    ("code", "action"),
    [
        ("ProvisionedThroughputExceededException", Action.THROTTLE),
        ("InternalFailure", Action.RETRY),
        ("KMSThrottlingException", Action.THROTTLE),
        ("InvalidArgumentException", Action.REJECTED),
        ("ValidationException", Action.REJECTED),
        ("ValidationError", Action.REJECTED),
        ("AccessDeniedException", Action.OPERATOR),
        ("ResourceNotFoundException", Action.OPERATOR),
        ("ServiceUnavailable", Action.RETRY),
        ("ExpiredTokenException", Action.CREDENTIALS),
        ("KMSInvalidStateException", Action.OPERATOR),
        ("RequestExpired", Action.CLOCK),
        ("Whatever", Action.STRANGE),
        ("", Action.STRANGE),
    ],
)
def test_per_record_codes(code: str, action: Action) -> None:
    assert classify_record(code) is action


def test_unknown_codes_never_cost_data() -> None:
    for status in range(300, 600):
        _, action = classify_request("Unheard", status)
        assert action is not Action.REJECTED or status == 413


# -- waiting, clock, keys


def test_retry_after() -> None:
    now = 1_000_000_000.0
    assert retry_after({}, now) is None
    assert retry_after({"retry-after": "7"}, now) == 7
    assert retry_after({"retry-after": email.utils.formatdate(now + 9, usegmt=True)}, now) == 9
    assert retry_after({"retry-after": email.utils.formatdate(now - 9, usegmt=True)}, now) == 0
    assert retry_after({"retry-after": "soon"}, now) is None
    assert retry_after({"retry-after": "99999999999"}, now) == 3600


async def test_retry_after_is_handed_on() -> None:
    async with client_to(saying(503, b"", {"Retry-After": "3"})) as (client, _):
        with pytest.raises(KinesisError) as caught:
            await client.call("PutRecords", BODY)
    assert caught.value.retry_after == 3


@pytest.mark.parametrize("off", [-4000.0, 1200.0, 86_400.0])
@pytest.mark.parametrize("code", ["RequestExpired", "InvalidSignatureException"])
async def test_a_wrong_clock_is_corrected(off: float, code: str, caplog: pytest.LogCaptureFixture) -> None:
    import time

    async def answer(link: Link, request: Request) -> None:
        signed = email.utils.parsedate_to_datetime(
            time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.strptime(request.headers["x-amz-date"], "%Y%m%dT%H%M%SZ"))
        ).timestamp()
        if abs(signed - time.time()) > 300:
            told = json.dumps({"__type": code, "message": "Signature expired: ..."}).encode()
            link.reply(400, told, {"Date": email.utils.formatdate(usegmt=True)})
        else:
            link.reply(200, STORED)

    async with client_to(answer, clock=lambda: time.time() + off) as (client, server):
        for _ in range(3):
            assert await client.call("PutRecords", BODY) == STORED
        assert len(server.requests) == 4  # learned once
        assert abs(client.clock_offset + off) < 5
        assert client.resigned == 1
    assert "clock" in caplog.text


async def test_an_expired_request_with_a_right_clock_is_handed_on() -> None:
    told = b'{"__type":"RequestExpired"}'
    async with client_to(saying(400, told, {"Date": email.utils.formatdate(usegmt=True)})) as (client, server):
        with pytest.raises(KinesisError) as caught:
            await client.call("PutRecords", BODY)
    assert caught.value.action is Action.CLOCK
    assert len(server.requests) == 1


async def test_a_server_whose_date_makes_no_sense_is_not_followed_for_ever() -> None:
    import itertools

    days = itertools.count(1)

    async def answer(link: Link, request: Request) -> None:
        date = email.utils.formatdate(next(days) * 86_400.0, usegmt=True)
        link.reply(400, b'{"__type":"RequestExpired"}', {"Date": date})

    async with client_to(answer) as (client, server):
        with pytest.raises(KinesisError) as caught:
            await client.call("PutRecords", BODY)
    assert caught.value.action is Action.CLOCK
    assert len(server.requests) == 3


class Keys:
    """A provider with a row of keys: each refusal brings the next."""

    def __init__(self, *rows: Credentials) -> None:
        self.rows = list(rows)
        self.refused: list[Credentials | None] = []

    async def get(self) -> Credentials:
        return self.rows[0]

    def invalidate(self, refused: Credentials | None = None) -> bool:
        self.refused.append(refused)
        if len(self.rows) > 1:
            self.rows.pop(0)
        return True

    async def close(self) -> None:
        pass


def only(access_key: str) -> Any:
    async def answer(link: Link, request: Request) -> None:
        if f"Credential={access_key}/" in request.headers["authorization"]:
            link.reply(200, STORED)
        else:
            link.reply(400, b'{"__type":"ExpiredTokenException","message":"too old"}')

    return answer


@pytest.mark.parametrize("refusals", [1, 2])
async def test_refused_keys_are_replaced_within_the_call(refusals: int) -> None:
    rows = [Credentials(f"KEY{n}", "s") for n in range(4)]
    async with client_to(only(f"KEY{refusals}")) as (client, server):
        client._provider = keys = Keys(*rows)
        assert await client.call("PutRecords", BODY) == STORED
    assert keys.refused == rows[:refusals]
    assert len(server.requests) == refusals + 1


async def test_keys_that_stay_refused_are_handed_on() -> None:
    rows = [Credentials(f"KEY{n}", "s") for n in range(9)]
    async with client_to(only("NOBODY")) as (client, server):
        client._provider = Keys(*rows)
        with pytest.raises(KinesisError) as caught:
            await client.call("PutRecords", BODY)
        assert len(server.requests) == 3
        client._provider = Keys(rows[0])  # the same keys again: not worth another call
        with pytest.raises(KinesisError):
            await client.call("PutRecords", BODY)
    assert caught.value.action is Action.CREDENTIALS
    assert len(server.requests) == 4


async def test_static_keys_that_are_refused_are_handed_on_at_once() -> None:
    async with client_to(only("NOBODY")) as (client, server):
        with pytest.raises(KinesisError) as caught:
            await client.call("PutRecords", BODY)
    assert caught.value.action is Action.CREDENTIALS
    assert len(server.requests) == 1


async def test_new_keys_of_another_account_have_another_host() -> None:
    client = KinesisClient(Kinesis(stream="x", region="eu-west-1", access_key="A", secret_key="B"))
    await client.start()
    assert client._endpoint is not None
    assert client._endpoint.data.host == "kinesis.eu-west-1.amazonaws.com"
    client._provider = Keys(Credentials("A", "B", None, "123456789012"))
    await client.start()
    assert client._endpoint.data.host == "123456789012.data-kinesis.eu-west-1.amazonaws.com"
    assert client._endpoint.control.host == "123456789012.control-kinesis.eu-west-1.amazonaws.com"
    await client.close()


# -- secrets


async def test_no_secret_in_error_log_or_repr(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    told = {
        "__type": "InvalidSignatureException",
        "message": f"The request signature does not match {SECRET} {TOKEN}.\n\nThe Canonical String for this request"
        f" should have been\n'POST\n/\n\nx-amz-security-token:{TOKEN}\n'",
    }
    async with client_to(saying(400, json.dumps(told).encode())) as (client, _):
        with pytest.raises(KinesisError) as caught:
            await client.call("PutRecords", BODY)
        texts = [
            str(caught.value),
            repr(caught.value),
            caplog.text,
            repr(client),
            repr(client.kinesis),
            repr(vars(client)),
        ]
    assert "does not match *** ***." in str(caught.value)
    for text in texts:
        assert SECRET not in text
        assert TOKEN not in text


def test_long_messages_are_cut() -> None:
    error = error_from(Reply(400, {}, orjson.dumps({"__type": "ValidationException", "message": "x" * 10_000})), 0.0)
    assert len(error.message) == 500


# -- trouble on the way


@on_both_loops
async def test_no_answer_is_a_transport_error() -> None:
    async def cut(link: Link, request: Request) -> None:
        link.cut()

    async with client_to(cut) as (client, _):
        with pytest.raises(TransportError) as caught:
            await client.call("PutRecords", BODY)
    assert caught.value.action is Action.RETRY


@on_both_loops
async def test_an_answer_that_never_comes() -> None:
    async def nothing(link: Link, request: Request) -> None:
        await asyncio.sleep(30)

    async with client_to(nothing, request_timeout_s=0.1) as (client, _):
        with pytest.raises(TransportError) as caught:
            await client.call("PutRecords", BODY)
    assert caught.value.code == "RequestTimeout"


@on_both_loops
async def test_a_dead_reused_connection_is_signed_and_sent_again() -> None:
    async def answer(link: Link, request: Request) -> None:
        if request.number == 1:
            link.cut()
        else:
            link.reply(200, STORED)

    async with client_to(answer) as (client, server):
        for _ in range(2):
            assert await client.call("PutRecords", BODY) == STORED
    assert len(server.requests) == 3
    check_signature(server.requests[2])


async def test_tls_with_an_authority_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = trustme.CA()
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    async with FakeServer(saying(200, STORED), tls=tls) as server:
        for more, environment in (({"ca_bundle": str(bundle)}, None), ({}, str(bundle))):
            if environment:
                monkeypatch.setenv("AWS_CA_BUNDLE", environment)
            client = KinesisClient(settings(server.url, **more))
            await client.start()
            assert await client.call("PutRecords", BODY) == STORED
            await client.close()
        monkeypatch.delenv("AWS_CA_BUNDLE")
        client = KinesisClient(settings(server.url))
        await client.start()
        with pytest.raises(TransportError, match="ca_bundle") as caught:
            await client.call("PutRecords", BODY)
        assert caught.value.action is Action.OPERATOR
        await client.close()


@pytest.mark.parametrize("text", [None, "not a certificate"])
async def test_a_broken_bundle_is_a_settings_error(tmp_path: Path, text: str | None) -> None:
    bundle = tmp_path / "ca.pem"
    if text:
        bundle.write_text(text)
    client = KinesisClient(settings("https://127.0.0.1:1", ca_bundle=str(bundle)))
    with pytest.raises(ConfigError, match="ca_bundle"):
        await client.start()
    await client.close()


# -- questions about the stream


def test_the_streams_name_as_it_stands_in_a_body() -> None:
    assert KinesisClient(Kinesis(stream="welders")).target_json() == b'"StreamName":"welders"'
    arn = "arn:aws:kinesis:eu-west-1:123456789012:stream/welders"
    assert KinesisClient(Kinesis(stream_arn=arn)).target_json() == b'"StreamARN":"' + arn.encode() + b'"'
    assert KinesisClient(Kinesis(stream="x", stream_arn=arn)).target_json().startswith(b'"StreamARN"')
    with pytest.raises(ConfigError, match="missing"):
        KinesisClient(Kinesis())


SUMMARY = {
    "StreamName": "welders", "StreamARN": "arn:x", "StreamStatus": "ACTIVE", "OpenShardCount": 4,
    "StreamModeDetails": {"StreamMode": "ON_DEMAND"}, "MaxRecordSizeInKiB": 10_240,
    "RecordDistributionStrategy": "AUTO",
}  # fmt: skip


async def test_describe() -> None:
    async with client_to(saying(200, orjson.dumps({"StreamDescriptionSummary": SUMMARY}))) as (client, server):
        assert await client.describe() == StreamSummary(
            "welders", "arn:x", "ACTIVE", 4, 10_240 * 1024, "ON_DEMAND", auto_keys=True
        )
    assert server.requests[0].target == "DescribeStreamSummary"
    assert server.requests[0].body == b'{"StreamName":"welders"}'


async def test_describe_with_little_told() -> None:
    async with client_to(saying(200, b'{"StreamDescriptionSummary":{"StreamStatus":"CREATING"}}')) as (client, _):
        assert await client.describe() == StreamSummary(
            "welders", "", "CREATING", 0, 1024 * 1024, "PROVISIONED", auto_keys=False
        )


@pytest.mark.parametrize("body", [b"", b"[]", b"nonsense", b"{}", b'{"StreamDescriptionSummary":7}'])
async def test_descriptions_that_are_none(body: bytes) -> None:
    async with client_to(saying(200, body)) as (client, _):
        with pytest.raises(UnexpectedResponse):
            await client.describe()


def shard(n: int, *, closed: bool = False, parent: str | None = None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "ShardId": f"shardId-{n:012}",
        "HashKeyRange": {"StartingHashKey": str(n * 10), "EndingHashKey": str(n * 10 + 9)},
        "SequenceNumberRange": {"StartingSequenceNumber": "1"},
    }
    if closed:
        told["SequenceNumberRange"]["EndingSequenceNumber"] = "9"
    if parent:
        told["ParentShardId"] = parent
    return told


async def test_list_shards_over_pages() -> None:
    async def answer(link: Link, request: Request) -> None:
        asked = orjson.loads(request.body)
        if "NextToken" in asked:
            assert asked == {"NextToken": "more"}
            link.reply(200, orjson.dumps({"Shards": [shard(2, parent="shardId-000000000000")]}))
        else:
            assert asked == {"StreamName": "welders"}
            link.reply(200, orjson.dumps({"Shards": [shard(0, closed=True), shard(1)], "NextToken": "more"}))

    async with client_to(answer) as (client, _):
        assert await client.list_shards() == [
            Shard("shardId-000000000000", 0, 9, None, closed=True),
            Shard("shardId-000000000001", 10, 19),
            Shard("shardId-000000000002", 20, 29, "shardId-000000000000"),
        ]


@pytest.mark.parametrize("body", [b"{}", b'{"Shards":[{"ShardId":"x"}]}', b'{"Shards":{"a":1}}', b'{"Shards":[1]}'])
async def test_shard_lists_that_are_none(body: bytes) -> None:
    async with client_to(saying(200, body)) as (client, _):
        if body == b"{}":
            assert await client.list_shards() == []
        else:
            with pytest.raises(UnexpectedResponse):
                await client.list_shards()


async def test_servers_that_know_neither_summary_nor_list() -> None:
    async def answer(link: Link, request: Request) -> None:
        if request.target != "DescribeStream":
            link.reply(400, b'{"__type":"UnknownOperationException"}')
            return
        asked = orjson.loads(request.body)
        first = "ExclusiveStartShardId" not in asked
        shards = [shard(0), shard(1, closed=True)] if first else [shard(2)]
        told = {"StreamName": "welders", "StreamStatus": "ACTIVE", "Shards": shards, "HasMoreShards": first}
        link.reply(200, orjson.dumps({"StreamDescription": told}))

    async with client_to(answer) as (client, _):
        assert (await client.describe()).shard_count == 2
        assert [found.id[-1] for found in await client.list_shards()] == ["0", "1", "2"]


async def test_describe_hands_other_errors_on() -> None:
    async with client_to(saying(400, b'{"__type":"ResourceNotFoundException"}')) as (client, server):
        for ask in (client.describe, client.list_shards):
            with pytest.raises(KinesisError) as caught:
                await ask()
            assert caught.value.action is Action.OPERATOR
    assert len(server.requests) == 2


async def test_dry_run() -> None:
    async with client_to(saying(400, b'{"__type":"DryRunOperationException"}')) as (client, server):
        assert await client.dry_run()
    asked = orjson.loads(server.requests[0].body)
    assert asked["DryRun"] is True
    assert asked["StreamName"] == "welders"
    async with client_to(saying(400, b'{"__type":"AccessDeniedException"}')) as (client, _):
        with pytest.raises(KinesisError, match="AccessDenied"):
            await client.dry_run()
    async with client_to(saying(200, STORED)) as (client, _):
        assert not await client.dry_run()


async def test_a_client_can_be_closed_and_started_again() -> None:
    async with client_to(saying(200, STORED)) as (client, _):
        for _ in range(2):
            assert await client.call("PutRecords", bytes(500_000)) == STORED
            await client.close()
            await client.start()


# -- which client

PLAIN: dict[str, Any] = {"stream": "x", "region": "eu-west-1", "access_key": "A", "secret_key": "B"}


@pytest.mark.parametrize(
    ("environment", "more", "native"),
    [
        ({}, {}, True),
        ({"HTTPS_PROXY": "http://proxy:3128"}, {}, False),
        ({"https_proxy": "http://proxy:3128"}, {}, False),
        ({"HTTPS_PROXY": "http://proxy:3128"}, {"transport": "native"}, True),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "amazonaws.com"}, {}, True),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": ".amazonaws.com,localhost"}, {}, True),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "example.com"}, {}, False),
        ({"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "*"}, {}, True),
        ({"HTTP_PROXY": "http://proxy:3128"}, {}, True),
        ({"HTTP_PROXY": "http://proxy:3128"}, {"endpoint_url": "http://localhost:4567"}, False),
        ({"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "localhost"}, {"endpoint_url": "http://localhost:4567"}, True),
        ({"HTTPS_PROXY": "http://proxy:3128"}, {"endpoint_url": "http://localhost:4567"}, True),
        ({"HTTPS_PROXY": "http://proxy:3128", "AWS_USE_FIPS_ENDPOINT": "true"}, {}, False),
        ({}, {"transport": "sdk"}, False),
    ],
)
def test_which_client(
    environment: dict[str, str], more: dict[str, Any], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert type(make_client(Kinesis(**(PLAIN | more)))).__name__ == ("KinesisClient" if native else "SdkClient")


@pytest.mark.process
def test_importing_never_loads_the_sdk() -> None:
    code = (
        "import sys; import fastkin.aws.transports; "
        "bad = [n for n in sys.modules if n.partition('.')[0] in ('aiobotocore', 'botocore', 'boto3', 'aiohttp')]; "
        "assert not bad, bad"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr


# -- real servers


def put(stream: str, records: list[bytes]) -> bytes:
    entries = [{"Data": base64.b64encode(data).decode(), "PartitionKey": str(n)} for n, data in enumerate(records)]
    return orjson.dumps({"Records": entries, "StreamName": stream})


async def exercise(server: servers.KinesisServer, stream: str, *, bad_is_whole: bool) -> None:
    """What every server must do for us: describe, list, store, refuse."""
    server.create_stream(stream, 4)
    client = KinesisClient(settings(server.url, stream=stream, region="us-east-1"))
    await client.start()
    try:
        summary = await client.describe()
        assert (summary.name, summary.status, summary.shard_count) == (stream, "ACTIVE", 4)
        shards = await client.list_shards()
        assert len(shards) == 4
        assert shards[0].start == 0
        assert shards[-1].end == 2**128 - 1
        for count, size in ((1, 0), (3, 100), (500, 200), (100, 20_000)):
            answer = orjson.loads(await client.call("PutRecords", put(stream, [bytes([7]) * size] * count)))
            assert len(answer["Records"]) == count
            assert not answer["FailedRecordCount"]
        missing = KinesisClient(settings(server.url, stream="nowhere", region="us-east-1"))
        await missing.start()
        for ask in (missing.describe, missing.list_shards, missing.dry_run):
            with pytest.raises(KinesisError) as caught:
                await ask()
            assert (caught.value.code, caught.value.action) == ("ResourceNotFoundException", Action.OPERATOR)
        await missing.close()
        large = put(stream, [b"fine", bytes(1024 * 1024 + 1)])
        if bad_is_whole:
            with pytest.raises(KinesisError) as caught:
                await client.call("PutRecords", large)
            assert caught.value.action is Action.REJECTED
        else:
            answer = orjson.loads(await client.call("PutRecords", large))
            code = answer["Records"][1]["ErrorCode"]
            assert classify_record(code) is Action.REJECTED
    finally:
        await client.close()


async def test_kinesalite(kinesalite_server: servers.KinesisServer) -> None:
    await exercise(kinesalite_server, "send-path", bad_is_whole=True)
    client = KinesisClient(settings(kinesalite_server.url, stream="send-path", region="us-east-1"))
    await client.start()
    with pytest.raises(KinesisError) as caught:  # over kinesalite's own limit of the HTTP body
        await client.call("PutRecords", put("send-path", [bytes(900_000)] * 8))
    assert (caught.value.http_status, caught.value.action) == (413, Action.REJECTED)
    await client.close()


async def test_kinesis_mock(kinesis_mock_server: servers.KinesisServer) -> None:
    await exercise(kinesis_mock_server, "send-path", bad_is_whole=False)
    name = "arn:aws:kinesis:us-east-1:000000000000:stream/send-path"
    client = KinesisClient(settings(kinesis_mock_server.url, stream=None, stream_arn=name, region="us-east-1"))
    await client.start()
    assert (await client.describe()).shard_count == 4
    body = put("x", [b"by arn"]).replace(b'"StreamName":"x"', client.target_json())
    assert orjson.loads(await client.call("PutRecords", body))["FailedRecordCount"] == 0
    await client.close()


@on_both_loops
async def test_real_batches_into_the_emulator_which_checks_signatures() -> None:
    async with Emulator(
        {"welders": 4}, limits=False, credentials={"AKIDEXAMPLE": SECRET}, region="eu-west-1"
    ) as emulator:
        client = KinesisClient(settings(emulator.url, session_token=None))
        await client.start()
        budget = Budget(64 * 2**20, 10_000)
        key = KeyPlan("uuid")
        batcher = Batcher(settler=None, budget=budget, frame="raw", key=key, target=client.target_json())
        receipts = [batcher.put(os.urandom(size)) for size in (0, 1, 200, 9000) * 125]
        batcher.close_batch(DRAIN)
        while (batch := batcher.take()) is not None:
            assert batch.settle(await client.call("PutRecords", batch)) == []
        assert len({(await receipt).sequence_number for receipt in receipts}) == 500
        assert await client.dry_run()
        assert budget.bytes == 0
        assert len(emulator.stored("welders")) == 500
        await client.close()
        stranger = KinesisClient(settings(emulator.url, session_token=None, secret_key="guessed"))
        await stranger.start()
        with pytest.raises(KinesisError) as caught:
            await stranger.describe()
        assert caught.value.action is Action.CREDENTIALS
        await stranger.close()
