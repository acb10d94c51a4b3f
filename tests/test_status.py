"""The status port: /metrics, /healthz, /readyz, over a real socket."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from typing import TYPE_CHECKING, Any

import pytest

import fastkin
from fastkin.config import Broker, Kinesis, Pipeline, Settings, Status
from fastkin.emulator import Emulator
from fastkin.errors import ConfigError
from fastkin.publisher import Publisher
from servers import ACCESS_KEY, SECRET_KEY, free_port, mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator

    from servers import Server

_RIGS = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
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


async def test_a_port_that_is_taken_is_one_clear_error(server: Server) -> None:
    async with Emulator({"welders": 1}) as emulator:
        made = settings(server.port, emulator.url)
        other = await asyncio.start_server(lambda *_: None, "127.0.0.1", made.status.port)
        try:
            with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1 port {made.status.port}"):
                await fastkin.Engine(made).start()
        finally:
            other.close()
