"""What goes wrong with credentials is one line: the pipeline, the role, what was said, and the cure that fits."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
from typing import TYPE_CHECKING, Any

import pytest

from fastkin.aws.credentials import make_provider
from fastkin.aws.error_table import error_from
from fastkin.aws.http_answer import Reply
from fastkin.commands.check import check
from fastkin.config import Kinesis
from fastkin.errors import ConfigError, KinesisError
from fastkin.mqtt.words import said
from fastkin.settings import load
from fastkin.status.logs import setup
from service.test_pipeline import rig
from support.fake_broker import until
from support.fake_http import FakeServer, Link, Request
from support.servers import free_port, mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.servers import Server

ROLE = "arn:aws:iam::123456789012:role/ingest"


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto("max_queued_messages 0\nmax_inflight_messages 100\n") as running:
        yield running


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def page() -> Iterator[io.StringIO]:
    """What the service's own set-up writes to stderr."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    setup(stream=stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("fastkin").setLevel(logging.NOTSET)
    logging.captureWarnings(False)


def refusing(code: str, message: str) -> Any:
    async def answer(link: Link, request: Request) -> None:
        text = f"<ErrorResponse><Error><Code>{code}</Code><Message>{message}</Message></Error></ErrorResponse>"
        link.reply(403, text.encode(), {"Content-Type": "text/xml"})

    return answer


REFUSALS = [
    ("AccessDenied", "trust policy"),
    ("ExpiredToken", "the keys that ask are expired or wrong"),
    ("RegionDisabledException", "activate STS"),
]


@pytest.mark.parametrize(("code", "cure"), REFUSALS)
async def test_a_refused_role_is_told_in_one_line(
    server: Server, code: str, cure: str, page: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastkin.service.preflight._RETRY_S", 0.1)
    async with FakeServer(refusing(code, "not you")) as sts:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
        async with rig(server, kinesis={"role_arn": ROLE}, shutdown_timeout_s=0.5):
            await until(lambda: len(sts.requests) >= 3, 20.0)
    lines = page.getvalue().splitlines()
    told = [line for line in lines if " ERROR " in line and " p credentials " in line]
    assert told
    for part in (ROLE, code, "not you", cure):
        assert part in told[0]
    assert len([line for line in lines if " ERROR " in line]) == len(told)  # nobody says it a second time
    assert "Traceback" not in page.getvalue()
    assert len(lines) < 30


async def test_check_fails_for_a_refused_role(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MK-13: exit code 1, and the role with the cure in one line; `run` keeps the data and goes on asking."""
    async with FakeServer(refusing("AccessDenied", "not you")) as sts:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
        keys = {"AWS_ACCESS_KEY_ID": "AKEXAMPLE", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        named = {"BROKER": f"127.0.0.1:{free_port()}", "TOPIC": "t", "KIN_STREAM_NAME": "s", "CLIENTID": "c"}
        made = load(env=keys | named | {"AWS_ASSUME_ROLE_ARN": ROLE, "KIN_SESSION_NAME": "line-3"})
        assert await asyncio.to_thread(check, made, connect=True, quiet=True) == 1
        assert b"RoleSessionName=line-3" in sts.requests[0].body
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: stream s")]
    assert len(failed) == 1
    for part in (ROLE, "AccessDenied", "not you", "trust policy"):
        assert part in failed[0]


async def test_an_unreachable_sts_is_told_as_that(
    server: Server, page: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "http://127.0.0.1:1")
    async with rig(server, kinesis={"role_arn": ROLE}, shutdown_timeout_s=0.5):
        await until(lambda: "ERROR" in page.getvalue(), 20.0)
    lines = page.getvalue().splitlines()
    told = [line for line in lines if " ERROR " in line and " p credentials " in line]
    assert told
    assert "cannot be reached" in told[0]
    assert ROLE in told[0]
    assert "Traceback" not in page.getvalue()
    assert len(lines) < 20


async def test_an_sts_that_hangs_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, within seconds: not five times a minute each, in silence."""

    async def hang(link: Link, request: Request) -> None:
        await asyncio.sleep(60)

    async with FakeServer(hang) as sts:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
        provider = await make_provider(
            Kinesis(stream="x", region="eu-west-1", access_key="A", secret_key="S", role_arn=ROLE)
        )
        try:
            async with asyncio.timeout(25):
                with pytest.raises(KinesisError) as caught:
                    await provider.get()
        finally:
            with contextlib.suppress(TimeoutError):
                await provider.close()
    assert "cannot be reached" in str(caught.value)


NASTY = ["[]", '"x"', "7", "null", "", "<html>", "[" * 500, '{"Expiration": "never", "AccessKeyId": 7}']
NASTY += [
    '{{"AccessKeyId": {}, "SecretAccessKey": {}, "Token": {}, "Expiration": {}, "AccountId": {}}}'.format(*each)
    for each in [
        ("[]", '"s"', '"t"', '"2100-01-01T00:00:00Z"', "null"),
        ('"A"', "{}", '"t"', '"2100-01-01T00:00:00Z"', "null"),
        ('"A"', '"s"', "5", '"2100-01-01T00:00:00Z"', "null"),
        ('"A"', '"s"', '"t"', '"2100-01-01T00:00:00"', "null"),
        ('"A"', '"s"', '"t"', '"99999-01-01"', "null"),
        ('"A"', '"s"', '"t"', "[]", "null"),
        ('"A"', '"s"', '"t"', "1e308", "null"),
        ('"A"', '"s"', '"t"', '"2100-01-01T00:00:00Z"', '"evil.example.com/"'),
        ('"A"', '"s"', '"t\\r\\nX: y"', '"2100-01-01T00:00:00Z"', "null"),
        ('"A"', '"\\ud800"', '"t"', '"2100-01-01T00:00:00Z"', "null"),
    ]
]


@pytest.mark.parametrize("body", NASTY)
async def test_any_answer_with_keys_is_keys_or_a_kinesis_error(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(link: Link, request: Request) -> None:
        link.reply(200, body.encode())

    async with FakeServer(answer) as container:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", container.url + "/get")
        provider = await make_provider(Kinesis(stream="x", region="eu-west-1"))
        try:
            keys = await provider.get()
        except (KinesisError, ConfigError):
            return
        finally:
            await provider.close()
    assert all(isinstance(part, str) for part in keys[:2])
    assert keys.account_id is None or keys.account_id.isdigit()
    (keys.access_key + keys.secret_key + (keys.token or "")).encode()


# -- secrets in what others say


@pytest.mark.parametrize("secret", ["any", "Requests", "T", "Too", "Many", "e"])
def test_a_short_secret_does_not_change_what_an_error_is(secret: str) -> None:
    reply = Reply(400, {}, b'{"__type":"TooManyRequestsException","message":"Rate exceeded, try again"}')
    bare, told = error_from(reply, 0.0), error_from(reply, 0.0, (secret,))
    assert (told.code, told.action) == (bare.code, bare.action) == ("TooManyRequestsException", bare.action)
    assert told.message == "Rate exceeded, try again"


@pytest.mark.parametrize("secret", ["any", "x", "p@s", "_", "secret-of-a-sensible-length", "ünicode"])
def test_no_secret_is_repeated_short_ones_included(secret: str) -> None:
    for text in (f"password={secret}", f"'{secret}' is wrong", f"{secret}: no", f"user:{secret}@host", secret):
        if secret == "_":
            continue  # nobody learns it from a line that has one
        body = ('{"__type":"Foo","message":"' + text + '"}').encode()
        assert secret not in error_from(Reply(400, {}, body), 0.0, (secret,)).message.replace("is wrong", "")
        assert secret not in said(text, secret)


@pytest.mark.parametrize("secret", ["a", "the", "user", "not"])
def test_a_brokers_words_stay_readable_beside_a_short_password(secret: str) -> None:
    words = said("authentication of nobody's username failed, see another page", secret)
    assert words == '"authentication of nobody\'s username failed, see another page"'
