"""A pipeline into Firehose (IC-08), from a real broker to the emulator's delivery stream."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import pytest

import fastkin
from fastkin.config import Broker, Kinesis, Pipeline, Settings
from fastkin.emulator import Emulator
from fastkin.mqtt.publisher import Publisher
from support.servers import ACCESS_KEY, SECRET_KEY, mosquitto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from support.servers import Server

_RIGS = itertools.count()


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto() as running:
        yield running


@contextlib.asynccontextmanager
async def rig(
    server: Server, emulator: Emulator, stream: str = "plant", **more: Any
) -> AsyncIterator[tuple[fastkin.Engine, Publisher]]:
    broker = Broker(host=server.host, port=server.port, client_id=f"firehose-{next(_RIGS)}")
    kinesis = Kinesis(
        firehose=stream, region="us-east-1", endpoint_url=emulator.url, access_key=ACCESS_KEY, secret_key=SECRET_KEY
    )
    pipeline = Pipeline(id="p", topics=("plant/#",), kinesis=kinesis, **{"dead_letter": "none"} | more)
    async with fastkin.Engine(Settings(broker=broker, pipelines=(pipeline,))) as engine:
        async with asyncio.timeout(20):
            await engine.pipelines["p"].subscriber.connected.wait()
        publisher = Publisher(Broker(host=server.host, port=server.port))
        await publisher.connect()
        try:
            yield engine, publisher
        finally:
            await publisher.close()


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
    async with Emulator(firehose=["plant"]) as emulator, rig(server, emulator, startup_check="put") as (engine, _):
        assert engine.pipelines["p"].unready() is None
        (record,) = emulator.stored("plant")
        assert b"connection_test" in record.data
