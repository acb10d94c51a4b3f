"""What came one by one while Kinesis was away leaves in full calls."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from delivery.test_backlog import MIB, pipeline, running, until
from fastkin import Producer
from fastkin.emulator import Emulator
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

COUNT = 8000
CALLS = 40  # 16 are ideal


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with Emulator({"welders": 4}, limits=False) as emulator:
        yield emulator


def calls(emulator: Emulator) -> int:
    return emulator.counters.operations.get("PutRecords", 0)


async def one_by_one(run: object, first: int, count: int, pause_s: float = 0.0) -> None:
    for n in range(first, first + count):
        assert run.delivery.batcher.offer(b"plant/1", b"%d" % n, 0) == 1  # type: ignore[attr-defined]
        run._read()  # type: ignore[attr-defined]
        if n % 50 == 0:
            await asyncio.sleep(pause_s)


def stored(emulator: Emulator) -> list[int]:
    return sorted(int(record.data) for record in emulator.stored("welders"))


@pytest.mark.parametrize("linger_ms", [0.0, 5.0])
async def test_of_a_pipeline(emulator: Emulator, linger_ms: float) -> None:
    settings = pipeline(emulator.url, None, on_full="pause", linger_ms=linger_ms, budget_bytes=16 * MIB)
    async with running(settings) as run:
        away = emulator.faults.cut("before", operation="PutRecords")
        await one_by_one(run, 0, 100)
        await until(lambda: run.delivery.sender.counters.calls_failed > 0)
        await one_by_one(run, 100, COUNT - 100, pause_s=linger_ms * 1.2e-3)
        before = calls(emulator)
        away.remove()
        await until(lambda: run.delivery.batcher.stored == COUNT)
        assert stored(emulator) == list(range(COUNT))
        assert calls(emulator) - before <= CALLS


async def test_of_a_pipeline_behind_a_gate(emulator: Emulator) -> None:
    """Kinesis answers and takes nothing: no call is open, the gate is closed."""
    settings = pipeline(emulator.url, None, on_full="pause", linger_ms=0.0, budget_bytes=16 * MIB)
    async with running(settings) as run:
        away = emulator.faults.call("ServiceUnavailable", status=503, operation="PutRecords")
        await one_by_one(run, 0, 10)
        await until(lambda: run.delivery.sender.counters.calls_failed > 0 and run.delivery.sender.in_flight == 0)
        await one_by_one(run, 10, COUNT - 10)
        before = calls(emulator)
        away.remove()
        await until(lambda: run.delivery.batcher.stored == COUNT)
        assert stored(emulator) == list(range(COUNT))
        assert calls(emulator) - before <= CALLS


async def test_of_a_pipeline_while_every_connection_waits(emulator: Emulator) -> None:
    settings = pipeline(emulator.url, None, on_full="pause", linger_ms=0.0, budget_bytes=16 * MIB)
    async with running(settings) as run:
        slow = emulator.faults.latency(1500, operation="PutRecords")
        await one_by_one(run, 0, 16)
        await until(lambda: calls(emulator) == 16)
        slow.remove()
        await one_by_one(run, 16, COUNT - 16)
        await until(lambda: run.delivery.batcher.stored == COUNT)
        assert stored(emulator) == list(range(COUNT))
        assert run.delivery.sender.counters.calls <= CALLS


async def test_that_went_through_the_spool(emulator: Emulator, tmp_path: Path) -> None:
    settings = pipeline(
        emulator.url, tmp_path / "spool.db", linger_ms=0.0, budget_bytes=16 * MIB, spool_after_s=0.05
    )  # fmt: skip
    async with running(settings) as run:
        away = emulator.faults.cut("before", operation="PutRecords")
        await one_by_one(run, 0, 10)
        await until(lambda: run.delivery.backlog is not None and run.delivery.backlog.spooling)
        for n in range(10, COUNT, 20):  # rows of few records
            await one_by_one(run, n, min(20, COUNT - n))
            await asyncio.sleep(0.005)
        await until(lambda: run.stats()["spooled_ever"] > COUNT // 2)
        before = calls(emulator)
        away.remove()
        await until(lambda: run.delivery.batcher.stored == COUNT)
        assert stored(emulator) == list(range(COUNT))
        assert calls(emulator) - before <= CALLS


@pytest.mark.parametrize("linger_ms", [0.0, 5.0])
async def test_of_a_producer(emulator: Emulator, linger_ms: float) -> None:
    async with Producer(
        "welders", region="us-east-1", endpoint_url=emulator.url, access_key=ACCESS_KEY, secret_key=SECRET_KEY,
        linger_ms=linger_ms, budget_bytes=16 * MIB,
    ) as one:  # fmt: skip
        away = emulator.faults.cut("before", operation="PutRecords")
        for n in range(COUNT):
            await one.put(b"%d" % n)
            if n % 50 == 0:
                await asyncio.sleep(linger_ms * 1.2e-3)
            if n == 100:
                await until(lambda: one.stats()["retries"] > 0)
        before = calls(emulator)
        away.remove()
        await until(lambda: one.stats()["stored"] == COUNT)
        assert stored(emulator) == list(range(COUNT))
        assert calls(emulator) - before <= CALLS
