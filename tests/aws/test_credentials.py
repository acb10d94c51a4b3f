from __future__ import annotations

import asyncio
import datetime
import itertools
import json
import logging
import os
import time
import urllib.parse
from typing import TYPE_CHECKING, Any

import pytest

import fastkin.aws.credentials as module
from fastkin.aws.credentials import ChainCredentials, StaticCredentials, make_provider, static_credentials
from fastkin.aws.native import KinesisClient
from fastkin.aws.signing import Credentials
from fastkin.config import Kinesis
from fastkin.emulator import Emulator, Secret
from fastkin.errors import Action, ConfigError, KinesisError
from support.fake_http import FakeServer, Link, Request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ROLE = "arn:aws:iam::123456789012:role/ingest"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def at(seconds: float) -> str:
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


# -- static


def test_settings_win_over_everything() -> None:
    kinesis = Kinesis(stream="x", access_key="A", secret_key="S", session_token="T", profile="p")
    environment = {"AWS_ACCESS_KEY_ID": "E", "AWS_SECRET_ACCESS_KEY": "F", "AWS_PROFILE": "q"}
    assert static_credentials(kinesis, environment) == Credentials("A", "S", "T")


def test_environment() -> None:
    environment = {"AWS_ACCESS_KEY_ID": "E", "AWS_SECRET_ACCESS_KEY": "F"}
    assert static_credentials(Kinesis(stream="x"), environment) == ("E", "F", None, None)
    environment |= {"AWS_SESSION_TOKEN": "T", "AWS_ACCOUNT_ID": "123456789012"}
    assert static_credentials(Kinesis(stream="x"), environment) == ("E", "F", "T", "123456789012")


@pytest.mark.parametrize("name", ["AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CREDENTIAL_EXPIRATION"])
def test_the_environment_is_left_to_the_sdk_when_it_asks_for_more(name: str) -> None:
    environment = {"AWS_ACCESS_KEY_ID": "E", "AWS_SECRET_ACCESS_KEY": "F", name: "x"}
    assert static_credentials(Kinesis(stream="x"), environment) is None
    assert static_credentials(Kinesis(stream="x", profile="p"), {**environment, name: ""}) is None
    assert static_credentials(Kinesis(stream="x"), {}) is None


def test_half_a_key_pair_is_an_error() -> None:
    with pytest.raises(ConfigError, match="secret_key is missing"):
        static_credentials(Kinesis(stream="x", access_key="A"), {})
    with pytest.raises(ConfigError, match="access_key is missing"):
        static_credentials(Kinesis(stream="x", secret_key="S"), {})


@pytest.mark.parametrize(
    ("access", "secret", "token"),
    [("AK ID", "s", None), ("AKID\n", "s", None), ("A", "s\n", None), ("A", "s", "t\r\nX: y")],
)
def test_keys_that_cannot_stand_in_a_header(access: str, secret: str, token: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        static_credentials(Kinesis(stream="x", access_key=access, secret_key=secret, session_token=token), {})
    assert "copy it again" in str(caught.value)
    assert "X: y" not in str(caught.value)


async def test_static_keys_stay() -> None:
    provider = await make_provider(Kinesis(stream="x", access_key="A", secret_key="S"))
    assert isinstance(provider, StaticCredentials)
    assert await provider.get() == ("A", "S", None, None)
    assert not provider.invalidate()
    await provider.close()


# -- the SDK's chain


async def once(kinesis: Kinesis) -> Credentials:
    provider = await make_provider(kinesis)
    assert isinstance(provider, ChainCredentials)
    try:
        return await provider.get()
    finally:
        await provider.close()


async def test_shared_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id=D\naws_secret_access_key=DS\n"
        "[plant]\naws_access_key_id=P\naws_secret_access_key=PS\naws_session_token=PT\n"
    )
    assert (await once(Kinesis(stream="x")))[:3] == ("D", "DS", None)
    assert (await once(Kinesis(stream="x", profile="plant")))[:3] == ("P", "PS", "PT")
    monkeypatch.setenv("AWS_PROFILE", "plant")
    assert (await once(Kinesis(stream="x")))[:3] == ("P", "PS", "PT")


@pytest.mark.process
async def test_a_process(tmp_path: Path) -> None:
    told = {"Version": 1, "AccessKeyId": "C", "SecretAccessKey": "CS", "SessionToken": "CT", "Expiration": at(3600)}
    (tmp_path / "told.json").write_text(json.dumps(told))
    (tmp_path / "config").write_text(f"[profile plant]\ncredential_process = cat {tmp_path / 'told.json'}\n")
    assert (await once(Kinesis(stream="x", profile="plant")))[:3] == ("C", "CS", "CT")


async def test_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(link: Link, request: Request) -> None:
        assert request.headers["authorization"] == "pod-token"
        told = {"AccessKeyId": "C", "SecretAccessKey": "CS", "Token": "CT", "Expiration": at(3600)}
        link.reply(200, json.dumps(told).encode())

    async with FakeServer(answer) as server:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", server.url + "/get")
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN", "pod-token")
        assert (await once(Kinesis(stream="x")))[:3] == ("C", "CS", "CT")


async def test_an_instance_role(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(link: Link, request: Request) -> None:
        told = {
            "Code": "Success", "Type": "AWS-HMAC", "LastUpdated": at(0), "Expiration": at(6 * 3600),
            "AccessKeyId": "I", "SecretAccessKey": "IS", "Token": "IT",
        }  # fmt: skip
        if request.path == "/latest/api/token":
            link.reply(200, b"imds-token")
        elif request.path.endswith("/security-credentials/"):
            link.reply(200, b"role-name")
        else:
            link.reply(200, json.dumps(told).encode())

    async with FakeServer(answer) as server:
        monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", server.url)
        assert (await once(Kinesis(stream="x")))[:3] == ("I", "IS", "IT")


async def test_no_keys_anywhere(caplog: pytest.LogCaptureFixture) -> None:
    """MD-01: and the line says which pipeline has none."""
    provider = await make_provider(Kinesis(stream="x"), "welders")
    with pytest.raises(KinesisError) as caught:
        await provider.get()
    assert caught.value.code == "NoCredentials"
    assert caught.value.action is Action.OPERATOR
    with pytest.raises(KinesisError) as again:  # not asked again at once
        await provider.get()
    assert again.value.retry_after is not None
    (line,) = [r for r in caplog.records if r.levelno == logging.ERROR and r.name.startswith("fastkin")]
    assert line.getMessage().startswith("pipeline=welders stage=credentials no valid credentials")
    await provider.close()


async def test_an_unknown_profile_is_a_settings_error() -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        await once(Kinesis(stream="x", profile="nowhere"))


# -- an assumed role, against a small STS


class Sts:
    """Answers AssumeRole with numbered keys and keeps what was asked."""

    def __init__(self, valid_s: float = 3600.0) -> None:
        self.valid_s = valid_s
        self.asked: list[dict[str, str]] = []
        self.signed: list[str] = []
        self.delay_s = 0.0
        self.failing = False
        self.open = 0  # calls that are not answered yet

    async def answer(self, link: Link, request: Request) -> None:
        form = dict(urllib.parse.parse_qsl(request.body.decode()))
        self.asked.append(form)
        self.signed.append(request.headers.get("authorization", ""))
        self.open += 1
        await asyncio.sleep(self.delay_s)
        self.open -= 1
        if self.failing:
            text = "<ErrorResponse><Error><Code>AccessDenied</Code><Message>not you</Message></Error></ErrorResponse>"
            link.reply(403, text.encode(), {"Content-Type": "text/xml"})
            return
        name, n = form["Action"], len(self.asked)
        text = (
            f'<{name}Response xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><{name}Result><Credentials>'
            f"<AccessKeyId>ROLE{n}</AccessKeyId><SecretAccessKey>role-secret-{n}</SecretAccessKey>"
            f"<SessionToken>role-token-{n}</SessionToken><Expiration>{at(self.valid_s)}</Expiration></Credentials>"
            "<AssumedRoleUser><AssumedRoleId>x:y</AssumedRoleId>"
            f"<Arn>arn:aws:sts::123456789012:assumed-role/ingest/y</Arn></AssumedRoleUser></{name}Result></{name}Response>"
        )
        link.reply(200, text.encode(), {"Content-Type": "text/xml"})


def assume(**more: Any) -> Kinesis:
    return Kinesis(stream="x", region="eu-west-1", access_key="BASE", secret_key="base-secret", role_arn=ROLE, **more)


async def test_a_role_without_external_id(monkeypatch: pytest.MonkeyPatch) -> None:
    sts = Sts()
    async with FakeServer(sts.answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.url)
        keys = await once(assume())
    assert keys == Credentials("ROLE1", "role-secret-1", "role-token-1", "123456789012")
    (asked,) = sts.asked
    assert asked["Action"] == "AssumeRole"
    assert asked["RoleArn"] == ROLE
    assert asked["RoleSessionName"] == "fastkin"
    assert "ExternalId" not in asked
    assert "Credential=BASE/" in sts.signed[0]


async def test_a_role_with_external_id_and_session_name(monkeypatch: pytest.MonkeyPatch) -> None:
    sts = Sts()
    async with FakeServer(sts.answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "FROMENV")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "env-secret")
        await once(
            Kinesis(stream="x", region="eu-west-1", role_arn=ROLE, external_id="tenant-7", session_name="line-3")
        )
    (asked,) = sts.asked
    assert asked["ExternalId"] == "tenant-7"
    assert asked["RoleSessionName"] == "line-3"
    assert "Credential=FROMENV/" in sts.signed[0]


async def test_a_role_by_web_identity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sts = Sts()
    (tmp_path / "token").write_text("the-jwt")
    async with FakeServer(sts.answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.url)
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", ROLE)
        keys = await once(Kinesis(stream="x", region="eu-west-1"))
    assert keys[:3] == ("ROLE1", "role-secret-1", "role-token-1")
    assert sts.asked[0]["WebIdentityToken"] == "the-jwt"


@pytest.fixture
def moto_sts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """moto's STS as the SDK's; the book that it keeps."""
    from moto.server import ThreadedMotoServer
    from moto.sts.models import sts_backends

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://{host}:{port}")
    yield sts_backends["123456789012"]["aws"]
    sts_backends.reset()
    server.stop()


async def test_a_call_is_signed_with_what_motos_sts_gave_out(moto_sts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # A busy machine may take longer for one call than the pause between two roles.
    monkeypatch.setattr("fastkin.aws.credentials.REFUSED_EVERY_S", 600.0)
    async with Emulator({"x": 2}, credentials={"NOBODY": "nobodys-secret"}, region="eu-west-1") as emulator:
        assert emulator.verifier is not None
        client = KinesisClient(assume(session_name="line-3", external_id="tenant-7", endpoint_url=emulator.url))
        await client.start()
        (role,) = moto_sts.assumed_roles
        assert (role.role_arn, role.session_name, role.external_id) == (ROLE, "line-3", "tenant-7")
        body = b'{"Records":[{"Data":"aGVsbG8=","PartitionKey":"k"}],"StreamName":"x"}'
        # The service knows the key with another secret: the call is refused, and the role assumed once more.
        emulator.verifier.secrets[role.access_key_id] = Secret("another", role.session_token)
        with pytest.raises(KinesisError):
            await client.call("PutRecords", body)
        assert emulator.stored("x") == []
        assert len(moto_sts.assumed_roles) == 2
        for each in moto_sts.assumed_roles:
            emulator.verifier.secrets[each.access_key_id] = Secret(each.secret_access_key, each.session_token)
        assert json.loads(await client.call("PutRecords", body))["FailedRecordCount"] == 0
        assert [record.data for record in emulator.stored("x")] == [b"hello"]
        await client.close()


# -- an assumed role, of the emulator's own STS


OWN = {"BASE": "base-secret"}  # of assume()


async def with_a_role(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, **more: Any) -> KinesisClient:
    """A client that has keys of the role from the emulator, which checks the signature of every call."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", emulator.url)
    client = KinesisClient(assume(endpoint_url=emulator.url, **more))
    try:
        await client.start()
    except BaseException:
        await client.close()
        raise
    return client


BODY = b'{"Records":[{"Data":"aGVsbG8=","PartitionKey":"k"}],"StreamName":"x"}'


async def test_a_call_is_signed_with_what_the_emulators_sts_gave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Emulator({"x": 2}, credentials=OWN, roles={ROLE: "tenant-7"}, region="eu-west-1") as emulator:
        client = await with_a_role(emulator, monkeypatch, session_name="line-3", external_id="tenant-7")
        assert json.loads(await client.call("PutRecords", BODY))["FailedRecordCount"] == 0
        (role,) = emulator.sts.assumed
        assert (role.role_arn, role.session_name, role.external_id) == (ROLE, "line-3", "tenant-7")
        # A refused key is not used again: the role is assumed once more, and the call goes on.
        emulator.faults.expired_token(times=1)
        assert json.loads(await client.call("PutRecords", BODY))["FailedRecordCount"] == 0
        assert len(emulator.sts.assumed) == 2
        assert len(emulator.stored("x")) == 2
        await client.close()


async def test_keys_of_a_role_that_end_are_replaced_by_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    away = [0.0]
    async with Emulator(
        {"x": 1}, credentials=OWN, region="eu-west-1", skew_s=None, wall=lambda: time.time() + away[0]
    ) as emulator:
        client = await with_a_role(emulator, monkeypatch)
        await client.call("PutRecords", BODY)
        away[0] = 3601.0  # by the service's clock they are over
        await client.call("PutRecords", BODY)
        first, second = emulator.sts.assumed
        assert first.access_key != second.access_key
        assert len(emulator.stored("x")) == 2
        await client.close()


@pytest.mark.parametrize("more", [{"external_id": "tenant-8"}, {}])
async def test_a_role_that_the_emulator_refuses(more: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    async with Emulator(credentials=OWN, roles={ROLE: "tenant-7"}, region="eu-west-1") as emulator:
        with pytest.raises(KinesisError) as caught:
            await with_a_role(emulator, monkeypatch, **more)
    assert caught.value.code == "NoCredentials"
    assert "AccessDenied" in str(caught.value)
    assert "external_id is the one it asks for" in str(caught.value)


async def test_wrong_keys_cannot_ask_the_emulator_for_a_role(monkeypatch: pytest.MonkeyPatch) -> None:
    async with Emulator(credentials={"BASE": "another-secret"}, region="eu-west-1") as emulator:
        with pytest.raises(KinesisError, match="the keys that ask are expired or wrong") as caught:
            await with_a_role(emulator, monkeypatch)
    assert "SignatureDoesNotMatch" in str(caught.value)
    assert emulator.sts.assumed == []


async def test_a_short_lived_role_is_refreshed_without_pausing_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    sts = Sts(valid_s=6)
    async with FakeServer(sts.answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.url)
        provider = await make_provider(assume())
        seen = [await provider.get()]
        asked_at = [time.monotonic()]
        during: set[int] = set()  # which questions were open when keys were had
        sts.delay_s = 1.0
        async with asyncio.timeout(60):
            while len(seen) < 3:
                keys = await provider.get()
                if keys != seen[-1]:
                    seen.append(keys)
                if len(sts.asked) > len(asked_at):
                    asked_at.append(time.monotonic())
                if sts.open:
                    during.add(len(sts.asked))
                await asyncio.sleep(0.01)
        await provider.close()
    assert [keys.access_key for keys in seen] == ["ROLE1", "ROLE2", "ROLE3"]
    assert during == {2, 3}, "nobody waits for an answer"
    assert len(asked_at) == 3, "once for each"
    assert asked_at[2] - asked_at[1] > 1.0


async def test_a_refresh_that_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    sts = Sts(valid_s=4)
    async with FakeServer(sts.answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.url)
        provider = await make_provider(assume(external_id="tenant-7"), "welders")
        first = await provider.get()
        begin = time.monotonic()
        sts.failing = True
        while time.monotonic() < begin + 2.5:
            assert await provider.get() == first  # good while they are valid
            await asyncio.sleep(0.02)
        tries = len(sts.asked) - 1
        assert 1 <= tries <= 3
        logged = [r for r in caplog.records if r.name == "fastkin.credentials" and r.levelno == logging.ERROR]
        assert len(logged) == tries
        # MD-01
        assert all(r.getMessage().startswith("pipeline=welders stage=credentials ") for r in logged)
        assert "not you" in caplog.text
        while time.monotonic() < begin + 5.5:
            await asyncio.sleep(0.1)
        with pytest.raises(KinesisError) as caught:
            await provider.get()
        assert caught.value.code == "NoCredentials"
        assert caught.value.action is Action.OPERATOR
        sts.failing = False
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                assert (await provider.get()).access_key.startswith("ROLE")
                break
            except KinesisError:
                await asyncio.sleep(0.1)
        else:
            raise AssertionError("never came back")
        await provider.close()
    for secret in ("base-secret", "role-secret", "role-token", "tenant-7"):
        assert secret not in caplog.text


async def test_refused_keys_are_fetched_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    sts = Sts()
    async with FakeServer(sts.answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.url)
        provider = await make_provider(assume())
        first = await provider.get()
        assert provider.invalidate(first)
        second, third = await asyncio.gather(provider.get(), provider.get())
        assert second == third != first
        assert provider.invalidate(first)  # a late answer to a call with the old keys
        assert await provider.get() == second
        assert not provider.invalidate(second)  # too soon: STS throttles
        assert await provider.get() == second
        assert len(sts.asked) == 2
        await provider.close()


# -- the schedule, with a clock in hand


class Source:
    """Stands for the SDK's credentials object."""

    def __init__(self, clock: Clock, valid_s: float) -> None:
        self.clock = clock
        self.valid_s = valid_s
        self.expires = 0.0
        self.asked = 0
        self.number = 0
        self.failing = False

    def refresh_needed(self, refresh_in: float = 900) -> bool:
        return self.expires - self.clock.now < refresh_in

    async def get_frozen_credentials(self) -> Credentials:
        self.asked += 1
        if self.refresh_needed():
            if self.failing:
                if self.refresh_needed(600):
                    raise RuntimeError("no answer")
            else:
                self.number += 1
                self.expires = self.clock.now + self.valid_s
        return Credentials(f"KEY{self.number}", "secret", "token")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("valid_s", "most"), [(3600.0, 61), (900.0, 61), (43_200.0, 61), (60.0, 260)])
async def test_the_sdk_is_asked_rarely_and_in_time(monkeypatch: pytest.MonkeyPatch, valid_s: float, most: int) -> None:
    clock = Clock()
    source = Source(clock, valid_s)

    async def load(_: Kinesis) -> Source:
        return source

    monkeypatch.setattr(module, "_load_source", load)
    provider = ChainCredentials(Kinesis(stream="x"), clock=clock)
    for _ in range(3600 * 4):
        await provider.get()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert source.expires > clock.now  # never out of date
        clock.now += 0.25
    assert source.asked <= most + 2
    await provider.close()


async def test_failing_refreshes_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    source = Source(clock, 3600)

    async def load(_: Kinesis) -> Source:
        return source

    monkeypatch.setattr(module, "_load_source", load)
    provider = ChainCredentials(Kinesis(stream="x"), clock=clock)
    first = await provider.get()
    source.failing = True
    asked_at: list[float] = []
    before = source.asked
    while clock.now < source.expires - 1:
        assert await provider.get() == first
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if source.asked > before and clock.now > source.expires - 900:
            asked_at.append(clock.now)
        before = source.asked
        clock.now += 1.0
    gaps = [b - a for a, b in itertools.pairwise(asked_at)]
    assert gaps[0] <= 3
    assert max(gaps) <= 32
    assert 28 <= len(asked_at) <= 40
    await provider.close()


async def test_keys_long_out_of_date_are_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody called for hours: the first call must not go out with keys of yesterday."""
    clock = Clock()
    source = Source(clock, 3600)

    async def load(_: Kinesis) -> Source:
        return source

    monkeypatch.setattr(module, "_load_source", load)
    provider = ChainCredentials(Kinesis(stream="x"), clock=clock)
    assert (await provider.get()).access_key == "KEY1"
    clock.now += 86_400
    assert (await provider.get()).access_key == "KEY2"
    await provider.close()
