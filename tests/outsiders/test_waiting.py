"""Whoever waits keeps the place; what waits and will be looked at by nobody is found, said and woken up."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from delivery.test_backlog import broker, pipeline, until
from fastkin._codec import DRAIN
from fastkin.emulator import Emulator
from fastkin.service.pipeline import PipelineRun
from support import stalls
from support.producers import producer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with Emulator({"welders": 4}) as emulator:
        yield emulator


async def test_who_waits_for_room_is_not_passed_by_who_never_waits(emulator: Emulator) -> None:
    served: list[str] = []
    async with producer(emulator, budget_records=16, max_records=4, linger_ms=1) as one:

        async def put(name: str) -> None:
            await one.put(name.encode())
            served.append(name)

        async def eager() -> None:
            """Asks again at each turn of the loop."""
            for n in range(300):
                await put(f"eager {n}")

        async with asyncio.timeout(30):
            crowd = [asyncio.create_task(eager()) for _ in range(20)]
            await until(lambda: one._delivery.budget.full)
            patient = asyncio.create_task(put("patient"))
            await asyncio.sleep(0)
            before = len(served)
            await patient
            passed = served.index("patient") - before
            await asyncio.gather(*crowd)
    assert passed <= 21, "who came later was served before"


async def test_a_lost_wake_up_is_found_and_made_good(
    emulator: Emulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stalls.look_every(monkeypatch, 0.05)
    run = PipelineRun(pipeline(emulator.url, None, on_full="pause"), broker())
    run.start()
    await until(lambda: run.ready)
    for n in range(10):
        assert run.delivery.batcher.offer(b"plant/1", b"%d" % n, 0) == 1
    run.delivery.batcher.dirty = False
    run.delivery.batcher.close_batch(DRAIN)  # and nobody hears of it
    await until(lambda: run.delivery.batcher.stored == 10)
    assert run.stuck() is None
    assert run.stats()["stalls"] == 1
    (line,) = [record.getMessage() for record in caplog.records if "stalled" in record.getMessage()]
    assert "batches wait to be sent, 10 records are in flight" in line
    assert await run.stop() == 0
    assert len(stalls.found) == 1
    stalls.found.clear()
