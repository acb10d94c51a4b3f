"""fastkin inside other services: a Producer in an aiohttp application, an Engine in a loop that runs already."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter

import pytest
from aiohttp import ClientSession, web

import fastkin
from fastkin.config import Broker, Kinesis, Pipeline, Settings
from fastkin.emulator import Emulator
from fastkin.mqtt.publisher import Publisher
from support.servers import ACCESS_KEY, SECRET_KEY, mosquitto

PRODUCER = web.AppKey("producer", fastkin.Producer)


def application(url: str) -> web.Application:
    """The ten lines of the README: every POST is stored before it is answered."""

    async def producer_of(app: web.Application):
        async with fastkin.Producer("welders", region="us-east-1", endpoint_url=url) as app[PRODUCER]:
            yield

    async def measure(request: web.Request) -> web.Response:
        receipt = await request.app[PRODUCER].put(await request.read())
        return web.json_response((await receipt)._asdict())

    app = web.Application()
    app.cleanup_ctx.append(producer_of)
    app.router.add_post("/measure", measure)
    return app


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


async def test_an_aiohttp_service_embeds_the_producer() -> None:
    async with Emulator({"welders": 2}) as emulator:
        runner = web.AppRunner(application(emulator.url))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with ClientSession() as session:

            async def post(n: int) -> dict[str, str]:
                async with session.post(f"http://127.0.0.1:{port}/measure", data=b"%d" % n) as answer:
                    assert answer.status == 200
                    return await answer.json()

            results = await asyncio.gather(*(post(n) for n in range(200)))
        await runner.cleanup()
        stored = {record.sequence_number: record for record in emulator.stored("welders")}
        assert len(stored) == 200
        for n, result in enumerate(results):
            record = stored[result["sequence_number"]]
            assert record.data == b"%d" % n
            assert record.shard_id == result["shard_id"]


async def test_an_engine_runs_inside_another_services_loop() -> None:
    ticks = 0

    async def other_work() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    settled: list[str] = []
    with mosquitto() as server:
        async with Emulator({"welders": 2}) as emulator:
            own = asyncio.create_task(other_work())
            settings = Settings(
                broker=Broker(host=server.host, port=server.port, client_id="embedded"),
                pipelines=(
                    Pipeline(
                        id="welders",
                        topics=("plant/#",),
                        kinesis=Kinesis(stream="welders", endpoint_url=emulator.url, region="us-east-1"),
                        dead_letter="none",
                    ),
                ),
            )
            async with fastkin.Engine(settings, on_settled=settled.append) as engine:
                async with asyncio.timeout(20):
                    while engine.stats()["welders"]["state"] != "connected":
                        await asyncio.sleep(0.01)
                publisher = Publisher(Broker(host=server.host, port=server.port))
                await publisher.connect()
                for n in range(500):
                    await publisher.publish("plant/1", b"%d" % n, 1)
                await publisher.drain()
                await publisher.close()
                async with asyncio.timeout(20):
                    while engine.stats()["welders"]["stored"] < 500:
                        await asyncio.sleep(0.01)
                stats = engine.stats()["welders"]
                assert stats["received"] == stats["stored"] + stats["in_flight"] == 500
                assert await engine.stop() == 0
                assert await engine.stop() == 0
                await engine.wait()
            own.cancel()
            assert Counter(r.data for r in emulator.stored("welders")) == Counter(b"%d" % n for n in range(500))
    assert set(settled) == {"welders"}
    assert ticks > 100


def test_importing_the_face_loads_neither_sdk_nor_event_loop() -> None:
    code = (
        "import sys, fastkin; fastkin.Producer, fastkin.Engine;"
        "print([m for m in ('aiobotocore', 'botocore', 'aiohttp', 'rich', 'click', 'uvloop') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
