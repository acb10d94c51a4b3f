"""A steady trickle behind a real broker: calls follow the linger, and one message alone does not wait for it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from service.test_pipeline import rig
from support.servers import mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.servers import Server


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto() as running:  # its defaults
        yield running


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
@pytest.mark.parametrize("latency_ms", [8, 50])
async def test_a_hundred_messages_a_second(server: Server, protocol: str, latency_ms: int) -> None:
    seconds = 5.0
    async with rig(server, emulator={"latency_ms": latency_ms}, broker={"protocol": protocol}) as r:
        began = time.monotonic()
        sent = 0
        while (now := time.monotonic() - began) < seconds:
            while sent < now * 100:
                await r.publisher.publish("plant/1", b"%d" % sent, 1)
                sent += 1
            await asyncio.sleep(0.01 - (time.monotonic() - began) % 0.01)
        await r.publisher.drain()
        await r.settled(sent)
        took = time.monotonic() - began
        assert r.emulator.counters.operations["PutRecords"] <= 22 * took
        assert len(r.stored()) == sent


async def test_one_alone_is_stored_soon(server: Server) -> None:
    """Ten messages a second: half of them sooner than the linger, whatever else this machine does."""
    waits = []
    async with rig(server, linger_ms=200.0, emulator={"latency_ms": 8}) as r:
        for n in range(1, 13):
            began = time.monotonic()
            await r.publish(b"%d" % n)
            await r.settled(n)
            waits.append(time.monotonic() - began)
            await asyncio.sleep(0.25)
    assert sorted(waits)[len(waits) // 2] < 0.2
