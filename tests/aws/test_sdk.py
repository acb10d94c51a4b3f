"""The reference path must do what the native one does: same bytes out, same answers, same errors."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import os
import ssl
import time
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import trustme

from aws.test_client import (
    BODY,
    SECRET,
    STORED,
    SUMMARY,
    TOKEN,
    Keys,
    check_signature,
    only,
    put,
    saying,
    settings,
    shard,
)
from fastkin.aws.credentials import make_provider
from fastkin.aws.native import KinesisClient
from fastkin.aws.sdk import SdkClient
from fastkin.aws.signing import Credentials
from fastkin.aws.transports import make_client
from fastkin.config import Kinesis
from fastkin.emulator import Emulator
from fastkin.emulator.signature import Secret
from fastkin.errors import Action, ConfigError, KinesisError, NotSent, TransportError
from support.fake_http import FakeServer, Link, Request

if TYPE_CHECKING:
    from pathlib import Path

    from support import servers


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


class sdk_to:  # noqa: N801 - reads as a call
    """A started SdkClient and its server, both ended afterwards."""

    def __init__(self, answer: Any, **more: Any) -> None:
        self.server = FakeServer(answer)
        self.more = more

    async def __aenter__(self) -> tuple[SdkClient, FakeServer]:
        await self.server.__aenter__()
        client = make_client(settings(self.server.url, transport="sdk", **self.more))
        assert isinstance(client, SdkClient)
        self.client = client
        await client.start()
        return client, self.server

    async def __aexit__(self, *_: object) -> None:
        await self.client.close()
        await self.server.__aexit__()


async def test_the_finished_body_goes_out_as_it_is() -> None:
    async with sdk_to(saying(200, STORED)) as (client, server):
        for body in (BODY, bytearray(BODY), memoryview(BODY), bytes(2**20), b"x" * 2_000_000):
            assert await client.call("PutRecords", body) == STORED
            request = server.requests[-1]
            assert request.body == bytes(body)
            assert request.headers["x-amz-target"] == "Kinesis_20131202.PutRecords"
            assert request.headers["content-length"] == str(len(body))
            assert request.headers["x-amz-security-token"] == TOKEN
        assert len(server.requests) == 5
        assert server.connections == 1


async def test_both_ways_send_the_same_request() -> None:
    """All but the user agent and what the SDK adds about itself."""
    seen = []
    async with FakeServer(saying(200, STORED)) as server:
        for kind in (KinesisClient, SdkClient):
            client = kind(settings(server.url + "/base"))
            await client.start()
            await client.call("PutRecords", BODY)
            await client.close()
            request = server.requests[-1]
            fixed = ("host", "content-type", "x-amz-target", "x-amz-security-token", "content-length")
            seen.append((request.method, request.path, request.body, *(request.headers[name] for name in fixed)))
    assert seen[0] == seen[1]
    check_signature(server.requests[0])


@pytest.mark.parametrize(
    ("status", "told", "code", "action"),
    [
        (
            400,
            {"__type": "ProvisionedThroughputExceededException"},
            "ProvisionedThroughputExceededException",
            Action.THROTTLE,
        ),
        (400, {"__type": "com.amazonaws#ValidationException", "message": "m"}, "ValidationException", Action.REJECTED),
        (400, {"__type": "ResourceNotFoundException"}, "ResourceNotFoundException", Action.OPERATOR),
        (500, {}, "InternalFailure", Action.RETRY),
        (503, None, "ServiceUnavailable", Action.RETRY),
        (413, None, "RequestEntityTooLarge", Action.REJECTED),
        (400, {"__type": "ExpiredTokenException"}, "ExpiredTokenException", Action.CREDENTIALS),
    ],
)
async def test_the_same_errors(status: int, told: Any, code: str, action: Action) -> None:
    body = b"<html/>" if told is None else json.dumps(told).encode()
    headers = {"x-amzn-RequestId": "id-7", "Retry-After": "2"}
    errors = []
    async with FakeServer(saying(status, body, headers)) as server:
        for kind in (KinesisClient, SdkClient):
            client = kind(settings(server.url))
            await client.start()
            with pytest.raises(KinesisError) as caught:
                await client.call("PutRecords", BODY)
            errors.append(caught.value)
            await client.close()
    assert len(server.requests) == 2  # the SDK's own retries are off
    for error in errors:
        assert (error.code, error.action, error.http_status) == (code, action, status)
        assert (error.request_id, error.retry_after) == ("id-7", 2.0)
    assert str(errors[0]) == str(errors[1])


async def test_refused_keys_are_replaced_within_the_call() -> None:
    async with sdk_to(only("KEY1")) as (client, server):
        rows = [Credentials(f"KEY{n}", "s") for n in range(2)]
        keys = Keys(*rows)
        assert client._provider is not None
        await client.close()
        client._provider = keys
        await client.start()
        assert await client.call("PutRecords", BODY) == STORED
        assert keys.refused == rows[:1]
        assert len(server.requests) == 2


@pytest.mark.parametrize("kind", [KinesisClient, SdkClient])
@pytest.mark.parametrize("off", [-4000.0, 1200.0, 86_400.0])
async def test_a_wrong_clock_is_corrected(off: float, kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The service tells a skew as InvalidSignatureException, which alone would look like wrong keys."""
    secrets = {"AKIDEXAMPLE": Secret(SECRET, TOKEN)}
    async with Emulator(
        {"welders": 1}, credentials=secrets, region="eu-west-1", wall=lambda: time.time() + off, limits=False
    ) as emulator:
        client = kind(settings(emulator.url))
        await client.start()
        assert (await client.describe()).shard_count == 1
        small, large = put("welders", [b"a"]), put("welders", [bytes(900_000)] * 2)
        for body in (small, large, memoryview(small)):
            assert orjson.loads(await client.call("PutRecords", body))["FailedRecordCount"] == 0
        assert client.resigned == 1  # learned once
        assert abs(client.clock_offset - off) < 5
        assert emulator.stored_count("welders") == 4
        await client.close()
    assert caplog.text.count("the clock of this machine is") == 1


@pytest.mark.parametrize("kind", [KinesisClient, SdkClient])
async def test_calls_that_are_open_when_the_clock_jumps_all_go_again(kind: Any) -> None:
    """The first refusal corrects the clock; the others must not be taken for wrong keys then."""
    secrets = {"AKIDEXAMPLE": Secret(SECRET, TOKEN)}
    jump = 0.0
    async with Emulator(
        {"welders": 1}, credentials=secrets, region="eu-west-1", wall=lambda: time.time() + jump, latency_ms=50
    ) as emulator:
        client = kind(settings(emulator.url))
        await client.start()
        for jump in (1200.0, 0.0):  # and back, as when somebody sets the clock
            await asyncio.gather(*(client.call("PutRecords", put("welders", [b"a"])) for _ in range(8)))
            assert abs(client.clock_offset - jump) < 5
        assert emulator.stored_count("welders") == 16
        await client.close()


@pytest.mark.parametrize("code", ["RequestExpired", "RequestTimeTooSkewed", "InvalidSignatureException"])
async def test_a_clock_that_cannot_be_followed_is_told_as_that(code: str) -> None:
    days = itertools.count(1)

    async def answer(link: Link, request: Request) -> None:
        date = email.utils.formatdate(next(days) * 86_400.0, usegmt=True)
        link.reply(400, json.dumps({"__type": code}).encode(), {"Date": date})

    async with sdk_to(answer) as (client, server):
        with pytest.raises(KinesisError) as caught:
            await client.call("PutRecords", BODY)
        assert (caught.value.code, caught.value.action) == (code, Action.CLOCK)
        assert len(server.requests) == 3
        dates = [request.headers["x-amz-date"][:8] for request in server.requests]
        assert dates[1:] == ["19700102", "19700103"]
        for request in server.requests:
            check_signature(request)


async def test_refused_keys_with_a_right_clock_are_not_the_clocks() -> None:
    told = b'{"__type":"InvalidSignatureException"}'
    async with sdk_to(saying(400, told, {"Date": email.utils.formatdate(usegmt=True)})) as (client, server):
        with pytest.raises(KinesisError) as caught:
            await client.call("PutRecords", BODY)
        assert caught.value.action is Action.CREDENTIALS
        assert client.clock_offset == 0
        assert len(server.requests) == 1


async def test_questions_about_the_stream() -> None:
    async def answer(link: Link, request: Request) -> None:
        if request.target == "DescribeStreamSummary":
            link.reply(200, orjson.dumps({"StreamDescriptionSummary": SUMMARY}))
        elif b"NextToken" in request.body:
            link.reply(200, orjson.dumps({"Shards": [shard(1)]}))
        elif request.target == "ListShards":
            link.reply(200, orjson.dumps({"Shards": [shard(0)], "NextToken": "more"}))
        else:
            assert orjson.loads(request.body)["DryRun"] is True
            link.reply(400, b'{"__type":"DryRunOperationException"}')

    async with sdk_to(answer) as (client, _):
        assert (await client.describe()).shard_count == 4
        assert len(await client.list_shards()) == 2
        assert await client.dry_run()
        assert client.target_json() == b'"StreamName":"welders"'


async def test_trouble_on_the_way() -> None:
    async def cut(link: Link, request: Request) -> None:
        if request.number:
            await asyncio.sleep(30)
        link.cut()

    async with sdk_to(cut, request_timeout_s=0.3) as (client, _):
        codes = []
        for _ in range(2):
            with pytest.raises(TransportError) as caught:
                await client.call("PutRecords", BODY)
            codes.append(caught.value.code)
            assert SECRET not in str(caught.value)
        assert codes == ["ConnectionLost", "RequestTimeout"]
    client = SdkClient(settings("http://127.0.0.1:1"))
    await client.start()
    with pytest.raises(NotSent):
        await client.call("PutRecords", BODY)
    await client.close()


async def test_a_call_before_there_were_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages come while the credentials are awaited: their calls fail as any other, and go again."""
    client = SdkClient(settings("http://127.0.0.1:1"))
    provider = client._provider = await make_provider(client.kinesis)

    async def none_yet() -> None:
        raise KinesisError("NoCredentials", "none yet", action=Action.OPERATOR)

    with monkeypatch.context() as patch:
        patch.setattr(type(provider), "get", lambda _: none_yet())
        with pytest.raises(KinesisError, match="NoCredentials"):
            await client.start()
        with pytest.raises(KinesisError, match="NoCredentials"):
            await client.call("PutRecords", BODY)
    with pytest.raises(KinesisError, match="NotStarted"):
        await client.call("PutRecords", BODY)
    await client.close()


async def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    bundle = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(bundle))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    async with FakeServer(saying(200, STORED), tls=tls) as server:
        client = SdkClient(settings(server.url, ca_bundle=str(bundle)))
        await client.start()
        assert await client.call("PutRecords", BODY) == STORED
        await client.close()
        client = SdkClient(settings(server.url))
        await client.start()
        with pytest.raises(TransportError) as caught:
            await client.call("PutRecords", BODY)
        assert caught.value.action is Action.OPERATOR
        await client.close()


async def test_a_proxy_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeServer(saying(200, STORED)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        client = make_client(settings("http://kinesis.invalid/"))
        assert isinstance(client, SdkClient)
        await client.start()
        assert await client.call("PutRecords", BODY) == STORED
        await client.close()
    assert proxy.requests[0].path == "http://kinesis.invalid/"
    assert proxy.requests[0].body == BODY


async def test_settings_that_cannot_work() -> None:
    client = SdkClient(Kinesis(stream="x", access_key="A", secret_key="B"))
    with pytest.raises(ConfigError, match="region"):
        await client.start()
    client = SdkClient(settings("ftp://nowhere"))
    with pytest.raises(ConfigError, match="endpoint_url"):
        await client.start()


@pytest.mark.parametrize("kind", [KinesisClient, SdkClient])
async def test_kinesalite_stores_the_same(kinesalite_server: servers.KinesisServer, kind: Any) -> None:
    stream = f"by-{kind.__name__}"
    kinesalite_server.create_stream(stream, 2)
    client = kind(settings(kinesalite_server.url, stream=stream, region="us-east-1"))
    await client.start()
    assert (await client.describe()).shard_count == 2
    answer = orjson.loads(await client.call("PutRecords", put(stream, [b"a", b"", bytes(range(256))])))
    assert answer["FailedRecordCount"] == 0
    assert len(answer["Records"]) == 3
    await client.close()
