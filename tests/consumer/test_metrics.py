"""A consumer's figures in Prometheus: how far it is behind, and what it was given."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry

from consumer.rig import FIRST, consumer, put
from fastkin.consumer import Consumer
from fastkin.emulator import Emulator
from fastkin.status.registry import OF_CONSUMER

KEY = "42f1f393-6907-8f2a-bfe6-b639387b4d1c"


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"fastkin_consumer_{name}", {"stream": "s"} | labels)


async def test_the_figures_of_a_consumer() -> None:
    """EI-30: iterator_age_ms by shard, and the counters, in the loop and from another thread."""
    registry = CollectorRegistry()
    wall = [1_764_000_000.0]
    emulating = Emulator({"s": 1}, wall=lambda: wall[0])
    async with emulating as emulator, consumer(emulator.url, limit=1, dedupe=10) as one:
        registry.register(one.metrics())
        assert value(registry, "records_total") == 0
        await put(emulator.url, [b"11", b"11", b"no json", b"4"], key=KEY)
        wall[0] += 7
        records = one.stream("trim_horizon")
        await anext(records)
        assert value(registry, "iterator_age_ms", shard=FIRST) in (7000, 0)  # the next batch may be read already
        await anext(records)
        await anext(records)
        figures = {
            "records_total": 3, "bytes_total": 10, "batches_total": 4, "duplicates_total": 1, "decode_errors_total": 1,
            "throttled_total": 0, "reseeks_total": 0,
        }  # fmt: skip
        for name, wanted in figures.items():
            assert value(registry, name) == wanted, name
            assert await asyncio.to_thread(value, registry, name) == wanted, name
        assert value(registry, "iterator_age_ms", shard=FIRST) == 0
        await records.aclose()
    assert len(figures) == len(OF_CONSUMER) - 1


async def test_every_row_is_a_figure_of_stats() -> None:
    assert {key for key, _ in OF_CONSUMER} <= Consumer("s", region="us-east-1").stats().keys()
    names = [metric.name for _, metric in OF_CONSUMER]
    assert len(set(names)) == len(names)
    assert all(name.startswith("fastkin_consumer_") for name in names)
