"""A pipeline into Firehose (IC-08), from a real broker to a delivery stream of the emulator or of moto."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import urllib.request
from typing import TYPE_CHECKING, Any

import orjson
import pytest

import fastkin
from aws.test_firehose import delivery_stream, objects
from fastkin import settings
from fastkin.config import Broker, Kinesis, Pipeline, Settings
from fastkin.emulator import Emulator
from fastkin.mqtt.publisher import Publisher
from support.fake_http import FakeServer
from support.servers import ACCESS_KEY, SECRET_KEY, mosquitto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from support.fake_http import Link, Request
    from support.servers import Server

_RIGS = itertools.count()


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto() as running:
        yield running


@contextlib.asynccontextmanager
async def working(made: Settings, server: Server) -> AsyncIterator[tuple[fastkin.Engine, Publisher]]:
    """The engine, subscribed, and who publishes."""
    async with fastkin.Engine(made) as engine:
        async with asyncio.timeout(20):
            await engine.pipelines["p"].subscriber.connected.wait()
        publisher = Publisher(Broker(host=server.host, port=server.port))
        await publisher.connect()
        try:
            yield engine, publisher
        finally:
            await publisher.close()


@contextlib.asynccontextmanager
async def rig(
    server: Server, emulator: Emulator, stream: str = "plant", **more: Any
) -> AsyncIterator[tuple[fastkin.Engine, Publisher]]:
    broker = Broker(host=server.host, port=server.port, client_id=f"firehose-{next(_RIGS)}")
    kinesis = Kinesis(
        firehose=stream, region="us-east-1", endpoint_url=emulator.url, access_key=ACCESS_KEY, secret_key=SECRET_KEY
    )
    pipeline = Pipeline(id="p", topics=("plant/#",), kinesis=kinesis, **{"dead_letter": "none"} | more)
    async with working(Settings(broker=broker, pipelines=(pipeline,)), server) as both:
        yield both


async def settled(engine: fastkin.Engine, count: int) -> dict[str, Any]:
    async with asyncio.timeout(15):
        while (told := engine.stats()["p"])["received"] < count or told["in_flight"] or told["unacked"]:
            await asyncio.sleep(0.01)
    return told


async def test_messages_become_records_of_the_delivery_stream(server: Server) -> None:
    """Entries that fail go again alone, each message is acknowledged when its own record is stored."""
    async with Emulator(firehose=["plant"]) as emulator:
        emulator.faults.record("ServiceUnavailableException", times=3)
        async with rig(server, emulator, separator="\n") as (engine, publisher):
            for n in range(20):
                await publisher.publish("plant/a", b'{"n":%d}' % n, 1)
            await publisher.drain()
            told = await settled(engine, 20)
            assert (told["stored"], told["retries"], told["throttled"]) == (20, 3, 3)
            assert engine.pipelines["p"].unready() is None
        stored = b"".join(sorted(record.data for record in emulator.stored("plant")))
    assert sorted(stored.splitlines()) == sorted(b'{"n":%d}' % n for n in range(20))


async def test_the_wrong_delivery_stream_is_not_ready_and_loses_nothing(server: Server) -> None:
    async with Emulator(firehose=["other"]) as emulator, rig(server, emulator, shutdown_timeout_s=1.0) as (engine, pub):
        await pub.publish("plant/a", b"{}", 1)
        await pub.drain()
        run = engine.pipelines["p"]
        async with asyncio.timeout(15):
            while not run.delivery.batcher.in_flight:
                await asyncio.sleep(0.01)
        assert "Firehose plant under account 123456789012 not found" in str(run.unready())
        assert engine.stats()["p"]["stored"] == 0
        assert engine.stats()["p"]["unacked"] == 1


async def test_a_connection_test_is_put_without_a_key(server: Server) -> None:
    """It ends as records do, or it would be glued to the first of them. Nobody asks for shards."""
    async with (
        Emulator(firehose=["plant"]) as emulator,
        rig(server, emulator, startup_check="put", separator="\n") as (engine, _),
    ):
        assert engine.pipelines["p"].unready() is None
        (record,) = emulator.stored("plant")
        assert record.data.startswith(b'{"type":"connection_test"')
        assert record.data.endswith(b"}\n")


async def test_a_delivery_stream_is_not_asked_for_shards(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async with Emulator(firehose=["plant"]) as emulator, rig(server, emulator) as (engine, _):
        assert engine.pipelines["p"].unready() is None
        assert set(emulator.counters.operations) <= {"DescribeDeliveryStream", "PutRecordBatch"}
    assert not [each for each in caplog.records if "shard" in each.getMessage()]


# -- the setting, and moto behind it


class Between:
    """Hands calls on to moto, which never fails an entry: those of `fails` (Data -> ErrorCode) fail once, here."""

    def __init__(self, url: str, fails: dict[bytes, str]) -> None:
        self._url = url
        self._fails = fails
        self.calls: list[list[bytes]] = []

    async def answer(self, link: Link, request: Request) -> None:
        if request.target != "PutRecordBatch":
            link.reply(200, await self._moto(request, request.body))
            return
        asked = orjson.loads(request.body)
        datas = [base64.b64decode(each["Data"]) for each in asked["Records"]]
        self.calls.append(datas)
        codes = [self._fails.pop(data, None) for data in datas]
        asked["Records"] = [each for each, code in zip(asked["Records"], codes, strict=True) if code is None]
        taken = iter(())
        if asked["Records"]:
            taken = iter(orjson.loads(await self._moto(request, orjson.dumps(asked)))["RequestResponses"])
        told = [next(taken) if code is None else {"ErrorCode": code, "ErrorMessage": "no"} for code in codes]
        failed = sum(code is not None for code in codes)
        link.reply(200, orjson.dumps({"FailedPutCount": failed, "RequestResponses": told}))

    async def _moto(self, request: Request, body: bytes) -> bytes:
        headers = {name: request.headers[name] for name in ("authorization", "content-type", "x-amz-target")}
        call = urllib.request.Request(self._url, body, headers)

        def ask() -> bytes:
            with urllib.request.urlopen(call, timeout=60) as answer:
                found: bytes = answer.read()
                return found

        return await asyncio.to_thread(ask)


async def test_only_failed_entries_go_to_moto_again(server: Server, moto_server: Server, tmp_path: Path) -> None:
    """IC-08: `firehose =` in a file of settings; ServiceUnavailableException and InternalFailure go again alone."""
    name = await delivery_stream(moto_server.url)
    lines = [b'{"n":%d}\n' % n for n in range(1200)]
    fails = {lines[3]: "ServiceUnavailableException", lines[700]: "InternalFailure"}
    between = Between(moto_server.url, dict(fails))
    async with FakeServer(between.answer) as proxy:
        path = tmp_path / "fastkin.toml"
        path.write_text(
            f"""
            [broker]
            url = "mqtt://{server.host}:{server.port}"
            client_id = "firehose-{next(_RIGS)}"
            [kinesis]
            region = "us-east-1"
            endpoint_url = "{proxy.url}"
            access_key = "{ACCESS_KEY}"
            secret_key = "{SECRET_KEY}"
            [[pipeline]]
            id = "p"
            topics = ["moto/#"]
            firehose = "{name}"
            dead_letter = "none"
            linger_ms = 200
            """
        )
        async with working(settings.load(path, env={}), server) as (engine, publisher):
            for line in lines:
                await publisher.publish("moto/a", line.removesuffix(b"\n"), 1)
            await publisher.drain()
            told = await settled(engine, 1200)
            assert (told["stored"], told["retries"], told["dead_lettered"]) == (1200, 2, 0)
            assert engine.pipelines["p"].unready() is None
    assert sorted((await objects(moto_server.url, name)).splitlines(keepends=True)) == sorted(lines)
    put = [data for call in between.calls for data in call]
    assert sorted(put) == sorted([*lines, *fails])  # those two twice, and nothing else
    assert max(len(call) for call in between.calls) <= 500
