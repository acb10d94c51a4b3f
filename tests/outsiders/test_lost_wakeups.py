"""Whatever waits, somebody will look at it: an open call, an armed timer, a closed gate, or a wake-up from the peer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from fastkin import Producer, encode_frame
from fastkin._codec import DRAIN, DROPPED, Batcher, Budget, KeyPlan
from fastkin.emulator import Emulator
from service.test_pipeline import rig
from support.servers import ACCESS_KEY, SECRET_KEY, mosquitto

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.servers import Server


@pytest.fixture(scope="module")
def server(process: None) -> Iterator[Server]:
    with mosquitto("max_queued_messages 0\nmax_inflight_messages 0\n") as running:
        yield running


def grouped(**options: Any) -> Batcher:
    return Batcher(
        settler=None, budget=Budget(1 << 20, 10_000), frame="raw", key=KeyPlan("uuid"), target=b'"StreamName":"s"',
        aggregate_bytes=10_000, **options,
    )  # fmt: skip


def test_closing_the_last_aggregate_may_fill_the_batch() -> None:
    """It is closed by itself then; whoever asked for it must hear that there is something to take."""
    batcher = grouped(max_records=5)
    for n in range(5):
        batcher.add(b"x", key=f"key {n}")
    assert batcher.ready == 0
    assert batcher.close_batch(DRAIN)
    batch = batcher.take()
    assert batch is not None
    assert len(batch) == 5
    batch.finish(DROPPED)
    assert not batcher.close_batch(DRAIN)


async def test_as_many_keys_as_records_in_a_call() -> None:
    """The last aggregate is the 500th entry."""
    async with Emulator({"welders": 4}) as emulator:
        one = Producer(
            "welders", region="us-east-1", endpoint_url=emulator.url, access_key=ACCESS_KEY, secret_key=SECRET_KEY,
            aggregate_bytes=10_000, linger_ms=20,
        )  # fmt: skip
        async with one:
            receipts = [await one.put(b"%d" % n, f"key {n}") for n in range(500)]
            async with asyncio.timeout(10):
                for receipt in receipts:
                    await receipt
        assert len(emulator.stored("welders")) == 500


async def test_a_window_as_large_as_a_call(server: Server) -> None:
    async with rig(
        server, aggregation="kpl", partition_key="topic", max_records=20, linger_ms=60_000.0,
        broker={"receive_maximum": 20, "protocol": "5"},
    ) as r:  # fmt: skip
        for n in range(100):
            await r.publisher.publish(f"plant/{n}", b"%d" % n, 1)
        await r.publisher.drain()
        await r.settled(100)


@pytest.mark.parametrize("policy", ["drop_newest", "drop_oldest"])
async def test_intake_goes_on_when_closing_a_batch_made_room(server: Server, policy: str) -> None:
    """An aggregate costs less once it is closed: nothing has to be dropped then, and nothing settles either."""
    frame = encode_frame([b"x"] * 500)
    async with rig(
        server, format="bulk", aggregation="kpl", on_full=policy, budget_records=100_000, budget_bytes=65_536,
        max_batch_bytes=8192, linger_ms=60_000.0,
    ) as r:  # fmt: skip
        for _ in range(20):
            await r.publisher.publish("plant/1", frame, 1)
        await r.publisher.drain()
        await r.until(lambda: r.stats["messages"] == 20, "all are taken")
        r.run.delivery.flusher.close(DRAIN)
        await r.settled(10_000)
        assert r.stats["stored"] + r.stats["dropped"] == 10_000
        assert not r.run.subscriber.paused
