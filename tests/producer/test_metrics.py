"""A producer's figures in Prometheus: each record in one counter, from any thread."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from fastkin import ClosedError, DeliveryTimeout, Producer, SyncProducer
from fastkin.emulator import Emulator
from fastkin.status.registry import BY_KEY, OF_PRODUCER, OF_RUN
from support.servers import ACCESS_KEY, SECRET_KEY, free_port


def options(url: str, **more: Any) -> dict[str, Any]:
    given = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "shard_map": False, "linger_ms": 1.0}
    return {"region": "us-east-1", "endpoint_url": url} | given | more


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, {"pipeline": "welders"} | labels)


async def test_the_figures_of_a_producer() -> None:
    registry = CollectorRegistry()
    async with Emulator({"welders": 1}) as emulator, Producer("welders", **options(emulator.url)) as one:
        registry.register(one.metrics())
        await asyncio.gather(*await one.put_many([b"%d" % n for n in range(70)]))
        for name, wanted in (
            ("fastkin_records_received_total", 70), ("fastkin_records_stored_total", 70),
            ("fastkin_records_in_flight", 0), ("fastkin_producer_records_dropped_total", 0),
            ("fastkin_producer_duplicates_possible_total", 0), ("fastkin_stalls_total", 0),
        ):  # fmt: skip
            assert value(registry, name) == wanted, name
            assert await asyncio.to_thread(value, registry, name) == wanted, name


async def test_two_producers_share_a_registry() -> None:
    """Which of them a figure is of says the label."""
    registry = CollectorRegistry()
    async with (
        Emulator({"welders": 1, "others": 1}) as emulator,
        Producer("welders", **options(emulator.url)) as one,
        Producer("others", **options(emulator.url)) as two,
    ):
        registry.register(one.metrics())
        registry.register(two.metrics())
        await two.put_and_wait(b"x")
        assert value(registry, "fastkin_records_stored_total") == 0
        assert value(registry, "fastkin_records_stored_total", pipeline="others") == 1


async def test_what_timed_out_is_counted() -> None:
    registry = CollectorRegistry()
    url = f"http://127.0.0.1:{free_port()}"
    async with Producer("welders", **options(url, delivery_timeout_s=0.2)) as one:
        registry.register(one.metrics())
        with pytest.raises(DeliveryTimeout):
            await one.put_and_wait(b"x")
        assert value(registry, "fastkin_producer_records_dropped_total") == 1
        assert (value(registry, "fastkin_calls_failed_total", code="ConnectFailed") or 0) > 0


async def test_the_figures_of_a_sync_producer_from_a_thread() -> None:
    async with Emulator({"welders": 1}) as emulator:

        def work() -> float | None:
            registry = CollectorRegistry()
            with SyncProducer("welders", **options(emulator.url)) as one:
                registry.register(one.metrics())
                one.put(b"x").result(60)
                return value(registry, "fastkin_records_stored_total")

        assert await asyncio.to_thread(work) == 1


async def test_a_producer_that_is_not_open_has_no_figures() -> None:
    with pytest.raises(ClosedError, match="not started"):
        Producer("welders", region="us-east-1").metrics()


def test_no_two_rows_of_a_producer_have_a_name_in_common() -> None:
    names = [row.metric.name for row in OF_PRODUCER if row.metric is not None]
    assert len(names) == len(set(names)) == len(OF_PRODUCER)
    assert {row.key for row in OF_PRODUCER} <= BY_KEY.keys()
    theirs = {row.metric.name for row in OF_RUN if row.metric is not None}
    assert [name for name in names if name not in theirs] == [
        "fastkin_producer_records_dropped_total",
        "fastkin_producer_duplicates_possible_total",
    ]
