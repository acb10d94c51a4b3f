"""The status port: /metrics, /healthz, /readyz, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import re
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import fastkin
from fastkin.config import Broker, Kinesis, Pipeline, Settings, Status
from fastkin.emulator import Emulator
from fastkin.errors import ConfigError
from fastkin.mqtt.publisher import Publisher
from fastkin.settings import SettingsError, load
from fastkin.settings.show import effective
from fastkin.status import server as status
from fastkin.status.server import EnginePage, StatusServer
from support.running import service, wait_until
from support.servers import ACCESS_KEY, SECRET_KEY, free_port, mosquitto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from support.servers import Server

_RIGS = itertools.count()


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto() as running:
        yield running


def settings(broker_port: int, url: str, **broker: Any) -> Settings:
    return Settings(
        broker=Broker(port=broker_port, client_id=f"status-{next(_RIGS)}", **broker),
        pipelines=(
            Pipeline(
                id="p",
                kinesis=Kinesis(
                    stream="welders", region="us-east-1", endpoint_url=url, access_key=ACCESS_KEY, secret_key=SECRET_KEY
                ),
                topics=("plant/#",),
                dead_letter="none",
            ),
        ),
        status=Status(port=free_port()),
    )


async def ask(port: int, path: str = "/", raw: bytes | None = None, **fields: str) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = [f"GET {path} HTTP/1.1", "Host: here", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    writer.write("\r\n".join(lines).encode() if raw is None else raw)
    answer = await asyncio.wait_for(reader.read(), 20)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    return int(first.split(" ")[1]), {k.lower(): v for k, _, v in (line.partition(": ") for line in rest)}, body


async def state(port: int) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((await ask(port, "/readyz"))[2])["pipelines"]["p"]
    return told


async def why(port: int, word: str) -> dict[str, Any]:
    """What /readyz says, once its reason has that word and an error."""
    async with asyncio.timeout(20):
        while True:
            code, _, body = await ask(port, "/readyz")
            told: dict[str, Any] = json.loads(body)["pipelines"]["p"]
            if code == 503 and word in told["reason"] and told["last_error"]:
                return told
            await asyncio.sleep(0.02)


class Nothing:
    """An engine without pipelines."""

    pipelines: dict[str, Any] = {}  # noqa: RUF012

    def stats(self) -> dict[str, dict[str, Any]]:
        return {}

    def failed(self) -> dict[str, str | None]:
        return {}

    def unready(self) -> dict[str, str | None]:
        return {}


@pytest.fixture
async def idle() -> AsyncIterator[StatusServer]:
    server = StatusServer(EnginePage(Nothing()))
    await server.start(Status(port=0))
    yield server
    await server.close()


async def until_ready(port: int) -> None:
    async with asyncio.timeout(20):
        while (await ask(port, "/readyz"))[0] != 200:
            await asyncio.sleep(0.02)


async def test_ready_and_counted(server: Server) -> None:
    async with Emulator({"welders": 2}) as emulator:
        made = settings(server.port, emulator.url)
        async with fastkin.Engine(made) as engine:
            port = made.status.port
            await until_ready(port)
            async with Publisher(dataclasses.replace(made.broker, client_id="", clean_session=True)) as publisher:
                await publisher.publish("plant/a", b"one", 1)
                await publisher.drain()
            async with asyncio.timeout(20):
                while engine.stats()["p"]["stored"] < 1:
                    await asyncio.sleep(0.01)
            code, head, body = await ask(port, "/metrics")
            assert code == 200 and head["content-type"].startswith("text/plain; version=")
            assert b'fastkin_records_stored_total{pipeline="p"} 1.0' in body
            assert (await ask(port, "/healthz"))[0] == 200
            told = json.loads((await ask(port, "/readyz"))[2])
            assert told == {"ready": True, "pipelines": {"p": {"ok": True, "reason": None, "last_error": None}}}


async def test_not_ready_says_why_and_the_error_goes_away(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkin.service.preflight._RETRY_S", 0.1)
    async with Emulator({"welders": 1}) as emulator:
        fault = emulator.faults.call("ResourceNotFoundException", operation="DescribeStreamSummary")
        made = settings(server.port, emulator.url)
        port = made.status.port
        async with fastkin.Engine(made):
            told = await why(port, "stream")
            assert told["reason"].startswith("the stream was not reached: ResourceNotFoundException")
            assert "ResourceNotFoundException" in told["last_error"]
            assert (await ask(port, "/healthz"))[0] == 200
            fault.remove()
            await until_ready(port)
            assert (await state(port)) == {"ok": True, "reason": None, "last_error": None}


@pytest.mark.parametrize(
    "code", ["AccessDeniedException", "ResourceNotFoundException", "KMSDisabledException", "ExpiredTokenException"]
)
async def test_what_somebody_must_mend_is_not_ready(server: Server, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream was reached, and then the permission went: the service is not ready until something is stored."""
    monkeypatch.setattr("fastkin.delivery.gate._OPERATOR_BASE_S", 0.1)
    monkeypatch.setattr("fastkin.delivery.gate._CREDENTIALS_BASE_S", 0.1)
    async with Emulator({"welders": 1}) as emulator:
        made = settings(server.port, emulator.url)
        port = made.status.port
        async with fastkin.Engine(made) as engine:
            await until_ready(port)
            fault = emulator.faults.call(code, operation="PutRecords")
            async with Publisher(dataclasses.replace(made.broker, client_id="", clean_session=True)) as publisher:
                await publisher.publish("plant/a", b"one", 1)
                await publisher.drain()
            told = await why(port, "stream")
            assert told["reason"].startswith(f"the stream: {code}")
            assert b'fastkin_pipeline_ready{pipeline="p"} 0.0' in (await ask(port, "/metrics"))[2]
            assert (await ask(port, "/healthz"))[0] == 200
            fault.remove()
            await until_ready(port)
            assert engine.stats()["p"]["stored"] == 1


@pytest.mark.process
async def test_a_broker_that_leaves_and_comes_back(tmp_path: Path) -> None:
    async with Emulator({"welders": 1}) as emulator:
        with mosquitto() as first:
            made = settings(first.port, emulator.url, reconnect_max_s=0.5)
            port = made.status.port
            engine = fastkin.Engine(made)
            await engine.start()
            await until_ready(port)
        try:
            told = await why(port, "broker")
            assert re.match(r"the broker: (waiting|connecting): ", told["reason"])
            assert b'fastkin_pipeline_ready{pipeline="p"} 0.0' in (await ask(port, "/metrics"))[2]
            with mosquitto(port=made.broker.port):
                await until_ready(port)
                assert (await state(port))["last_error"] is None
        finally:
            await engine.stop()


async def test_a_failed_call_shows_and_goes_away(server: Server) -> None:
    async with Emulator({"welders": 1}) as emulator:
        made = settings(server.port, emulator.url)
        port = made.status.port
        async with fastkin.Engine(made) as engine:
            await until_ready(port)
            fault = emulator.faults.call("ServiceUnavailableException")
            async with Publisher(dataclasses.replace(made.broker, client_id="", clean_session=True)) as publisher:
                await publisher.publish("plant/a", b"one", 1)
                await publisher.drain()
            async with asyncio.timeout(20):
                while (await state(port))["last_error"] is None:
                    await asyncio.sleep(0.01)
            told = await state(port)
            assert told["ok"] and "ServiceUnavailable" in told["last_error"]
            fault.remove()
            async with asyncio.timeout(20):
                while engine.stats()["p"]["stored"] < 1:
                    await asyncio.sleep(0.01)
            assert (await state(port))["last_error"] is None


async def test_a_pipeline_that_failed_is_not_healthy(server: Server) -> None:
    async with Emulator({"welders": 1}) as emulator:
        made = settings(server.port, emulator.url)
        port = made.status.port
        async with fastkin.Engine(made) as engine:
            await until_ready(port)
            engine.pipelines["p"].failure.set_exception(ConfigError("pipeline 'p'", "x\u2028\x1b[2J"))
            for path, word in (("/healthz", "alive"), ("/readyz", "ready")):
                code, head, body = await ask(port, path)
                told = json.loads(body)
                assert code == 503 and head["content-type"] == "application/json"
                assert told[word] is False
                assert told["pipelines"]["p"]["reason"].startswith("failed: ConfigError: pipeline 'p': x")
                assert body.decode().rstrip("\n").isprintable()


# --- strangers ---


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"GET /metrics HTTP/1.1\r\nX: " + b"x" * 9000 + b"\r\n\r\n", 431),
        (b"GET /" + b"x" * 20_000, 431),
        (b"\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET  /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics FTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (b"POST /metrics HTTP/1.1\r\n\r\n", 405),
        (b"DELETE /readyz HTTP/1.1\r\n\r\n", 405),
        (b"GET / HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics/../../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"GET http://elsewhere/metrics HTTP/1.1\r\n\r\n", 404),
        (b"GET /metrics?x=1 HTTP/1.0\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.1\nHost: x\r\n\r\n", 400),
    ],
)
async def test_odd_requests(idle: StatusServer, raw: bytes, code: int) -> None:
    got, head, body = await ask(idle.port, raw=raw)
    assert got == code
    assert int(head["content-length"]) == len(body)
    assert head["connection"] == "close"
    assert b"passwd" not in body and b"elsewhere" not in body
    if code == 405:
        assert head["allow"] == "GET, HEAD"


async def test_head_has_no_body(idle: StatusServer) -> None:
    code, head, body = await ask(idle.port, raw=b"HEAD /healthz HTTP/1.1\r\n\r\n")
    assert (code, body) == (200, b"") and int(head["content-length"]) > 0


async def test_openmetrics_for_who_accepts_it(idle: StatusServer) -> None:
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
    _, head, body = await ask(idle.port, "/metrics", Accept=accept)
    assert head["content-type"].startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    "accept", ["text/plain;version=x", "text/plain;version=1.", "application/openmetrics-text; version=abc", ";;=,"]
)
async def test_nonsense_in_accept_is_no_trouble(
    idle: StatusServer, accept: str, caplog: pytest.LogCaptureFixture
) -> None:
    code, head, body = await ask(idle.port, "/metrics", Accept=accept)
    assert code == 200
    assert head["content-type"].startswith("text/plain")
    assert b"fastkin_records_stored_total" in body
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_whoever_is_slow_or_silent_is_cut_off(idle: StatusServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_TIME_S", 0.3)
    for said in (b"", b"GET /metrics HT"):
        reader, writer = await asyncio.open_connection("127.0.0.1", idle.port)
        writer.write(said)
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
    # sends a byte now and then
    reader, writer = await asyncio.open_connection("127.0.0.1", idle.port)
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while not reader.at_eof() and time.monotonic() - began < 10:
            writer.write(b"G")
            await asyncio.sleep(0.05)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), 0.01)
    assert time.monotonic() - began < 10
    writer.close()


async def test_connections_are_bounded(idle: StatusServer) -> None:
    held = [await asyncio.open_connection("127.0.0.1", idle.port) for _ in range(40)]
    await asyncio.sleep(0.1)
    assert len(idle._open) <= 32
    for _, writer in held:
        writer.transport.abort()
    async with asyncio.timeout(20):
        while idle._open:
            await asyncio.sleep(0.01)
    assert (await ask(idle.port, "/healthz"))[0] == 200


async def test_a_peer_that_reads_nothing_does_not_hold_us(idle: StatusServer) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", idle.port)
    writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
    await writer.drain()
    await asyncio.sleep(0.05)
    await asyncio.wait_for(idle.close(), 5)
    writer.transport.abort()


async def test_no_secret_of_the_settings_is_on_any_page(server: Server) -> None:
    """Not even when the stream's answer repeats them."""
    async with Emulator({"welders": 1}) as emulator:
        emulator.faults.call("AccessDeniedException", message="no: kin-secret-1 token-secret-2", operation="PutRecords")
        made = settings(server.port, emulator.url, user="u", password="broker-secret-3")
        kinesis = dataclasses.replace(
            made.pipelines[0].kinesis,
            access_key="AKIDSECRET0",
            secret_key="kin-secret-1",
            session_token="token-secret-2",
            external_id="external-secret-4",
        )
        changed = dataclasses.replace(made.pipelines[0], kinesis=kinesis, shutdown_timeout_s=0.1)
        made = dataclasses.replace(made, pipelines=(changed,))
        port = made.status.port
        async with fastkin.Engine(made):
            await until_ready(port)
            async with Publisher(Broker(port=server.port)) as publisher:
                await publisher.publish("plant/a", b"one", 1)
                await publisher.drain()
            async with asyncio.timeout(20):
                while (await state(port))["last_error"] is None:
                    await asyncio.sleep(0.01)
            for path in ("/metrics", "/healthz", "/readyz", "/"):
                body = (await ask(port, path))[2].lower()
                assert b"secret" not in body, body


async def test_a_host_that_can_be_none_is_one_clear_error(server: Server) -> None:
    async with Emulator({"welders": 1}) as emulator:
        made = settings(server.port, emulator.url)
        made = dataclasses.replace(made, status=Status(port=made.status.port, host="a" * 64))
        with pytest.raises(ConfigError, match=rf"cannot listen on a+ port {made.status.port}"):
            await fastkin.Engine(made).start()


# --- settings, and the process ---


def written(directory: Path, more: str, emulator_url: str = "http://127.0.0.1:1") -> str:
    path = directory / "x.toml"
    path.write_text(
        f'[broker]\nurl = "mqtt://127.0.0.1:1"\nclient_id = "x"\n[[pipeline]]\nid = "p"\ntopics = ["t"]\n'
        f'stream = "s"\nregion = "us-east-1"\nendpoint_url = "{emulator_url}"\ndead_letter = "none"\n'
        f"shutdown_timeout_s = 0.1\n{more}"
    )
    return str(path)


def test_the_status_table(tmp_path: Path) -> None:
    assert load(written(tmp_path, ""), env={}).status == Status(port=0, host="127.0.0.1")
    made = load(written(tmp_path, "[status]\nport = 9464\n"), env={})
    assert made.status == Status(port=9464)
    assert made.warnings == ()
    assert '[status]\nport = 9464\nhost = "127.0.0.1"\n' in effective(made)
    assert "[status]" not in effective(load(written(tmp_path, ""), env={}))
    made = load(
        written(tmp_path, "[status]\nport = 9464\n"), env={"FASTKIN_STATUS_PORT": "1", "FASTKIN_STATUS_HOST": "::"}
    )
    assert made.status == Status(port=1, host="::")
    assert any("without a password" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("[status]\nport = 65536\n", "port"),
        ('[status]\nport = "x"\n', "port"),
        ("[status]\nprot = 1\n", "port"),
        ('[status]\nport = 1\nhost = "a b"\n', "'a b' is not a host name or address"),
        ("[[status]]\nport = 1\n", "write [status]"),
        ("[stats]\nport = 1\n", "status"),
    ],
)
def test_wrong_status_settings_are_named(tmp_path: Path, table: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(written(tmp_path, table), env={})
    (problem,) = caught.value.problems
    assert said in str(problem) and "stat" in str(problem)


@pytest.mark.process
def test_the_process_says_in_one_line_that_the_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with service(tmp_path, Path(written(tmp_path, f"[status]\nport = {port}\n")).read_text()) as run:
            wait_until(lambda: "cannot listen on" in run.log(), 30, "the port is taken")
            assert run.terminate() == 0
            errors = [line for line in run.log().splitlines() if "cannot listen on" in line]
            assert len(errors) == 1 and f"127.0.0.1 port {port}" in errors[0], run.log()
            assert "Traceback" not in run.log()


@pytest.mark.process
def test_the_process_is_seen_while_it_waits_and_stops(tmp_path: Path) -> None:
    port = free_port()
    with service(tmp_path, Path(written(tmp_path, f"[status]\nport = {port}\n")).read_text()) as run:

        def page(path: str) -> tuple[int, bytes]:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.read()
            except OSError:
                return 0, b""

        wait_until(lambda: page("/healthz")[0] == 200, 30, "/healthz")
        assert page("/readyz")[0] == 503
        assert b"process_resident_memory_bytes" in page("/metrics")[1]
        assert run.terminate() == 0
        assert page("/healthz")[0] == 0
