"""Faults on the way to a Kinesis that is not fastkin's own: kinesalite behind the proxy."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from proxy import FaultProxy
from support.readback import read_stream
from support.running import CountingProxy, Plant, service, wait_until
from support.servers import mosquitto

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from support.servers import KinesisServer

SETTINGS = """
[broker]
url = "mqtt://127.0.0.1:{broker}"
client_id = "{stream}"
clean_session = false
receive_maximum = 200
reconnect_min_s = 0.05
reconnect_max_s = 0.5

[kinesis]
stream = "{stream}"
endpoint_url = "http://127.0.0.1:{kinesis}"
region = "us-east-1"
max_connections = 4
request_timeout_s = 3

[[pipeline]]
id = "welders"
topics = ["plant/#"]
aggregation = "{aggregation}"
"""


@contextlib.asynccontextmanager
async def proxied(port: int) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(port)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.close()


async def numbers(url: str, stream: str) -> Counter[int]:
    from ledger import user_records

    found: Counter[int] = Counter()
    for _, data, _ in await read_stream(url, stream):
        found.update(int(each.partition(b"-")[0]) for each in user_records(data))
    return found


@pytest.mark.timeout(180)
@pytest.mark.parametrize("aggregation", ["none", "kpl"])
def test_cuts_and_a_kill_before_kinesalite(tmp_path: Path, kinesalite_server: KinesisServer, aggregation: str) -> None:
    """Cut on the way there, on the way back, and a SIGKILL: nothing is lost, and what is there is whole."""
    stream = f"faults-{aggregation}"
    kinesalite_server.create_stream(stream, 2)

    async def main() -> None:
        async with proxied(kinesalite_server.port) as way:
            loop = asyncio.get_running_loop()

            def attack() -> None:
                def at_loop(work: object, *args: object) -> None:
                    loop.call_soon_threadsafe(work, *args)  # type: ignore[arg-type]

                settings = SETTINGS.format(broker=proxy.port, stream=stream, kinesis=way.port, aggregation=aggregation)
                with service(tmp_path, settings) as run:
                    wait_until(lambda: "subscribed" in run.log(), 20, "subscribed")
                    with Plant(broker, rate=600, size=120) as plant:
                        for target in (300, 600, 900, 1200):
                            wait_until(lambda t=target: proxy.acked > t, 40, "messages are acknowledged")  # type: ignore[misc]
                            at_loop(way.cut)
                            at_loop(setattr, way.down, "cut_in", 200)
                            if target == 600:
                                run.kill()
                                wait_until(lambda: proxy.closed, 10, "the connection is gone")
                                run.start()
                        total = plant.stop()
                        at_loop(way.heal)
                        wait_until(lambda: proxy.unacked == 0 and proxy.acked >= total, 60, "all is acknowledged")
                        assert run.terminate() == 0, run.log()[-3000:]
                stored = asyncio.run_coroutine_threadsafe(numbers(kinesalite_server.url, stream), loop).result(60)
                assert set(stored) == set(range(total)), f"{total - len(stored)} are missing"

            with mosquitto("max_queued_messages 0\n") as broker, CountingProxy(broker.port) as proxy:
                await asyncio.to_thread(attack)

    asyncio.run(main())
