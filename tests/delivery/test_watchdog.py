"""Nothing that waits is ever looked at by nobody: the invariant, and the line of those who wait for room."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from delivery.test_backlog import broker, pipeline, until
from fastkin.delivery.watchdog import unattended
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


async def test_who_came_first_for_room_is_served_first(emulator: Emulator) -> None:
    """Room comes and goes; who waits longest gets it, and nobody who asks later passes."""
    served: list[int] = []
    async with producer(emulator, budget_records=16, max_records=4, linger_ms=1) as one:

        async def put(n: int) -> None:
            await one.put(b"%d" % n)
            served.append(n)

        async with asyncio.timeout(30):
            await asyncio.gather(*[put(n) for n in range(400)])
    assert served == list(range(400))
    assert sorted(int(record.data) for record in emulator.stored("welders")) == list(range(400))


async def test_who_gives_up_waiting_does_not_take_the_room_of_the_next(emulator: Emulator) -> None:
    async with producer(emulator, budget_records=8, max_records=4, linger_ms=1) as one:
        async with asyncio.timeout(30):
            for _ in range(40):
                puts = [asyncio.create_task(one.put(b"x")) for _ in range(30)]
                await asyncio.sleep(0.001)
                for put in puts[10:20]:
                    put.cancel()
                done = await asyncio.gather(*puts, return_exceptions=True)
                assert sum(not isinstance(result, BaseException) for result in done) >= 20
        assert one._delivery.budget.waiting == 0
    assert one.stats()["in_flight"] == 0


@pytest.mark.parametrize("policy", ["pause", "spool", "drop_oldest", "drop_newest"])
async def test_nothing_is_ever_unattended(emulator: Emulator, tmp_path: Any, policy: str) -> None:
    """Looked at between any two steps of the loop, in an outage and after it."""
    run = PipelineRun(
        pipeline(
            emulator.url, tmp_path / "spool" if policy == "spool" else None, on_full=policy, budget_records=400,
            max_records=50,
        ),
        broker(),
    )  # fmt: skip
    looks = 0
    found: list[str] = []

    def look() -> None:
        nonlocal looks
        looks += 1
        if run.delivery.batcher.dirty:
            run._read()
        if (what := run.stuck()) is not None:
            found.append(what)

    run.start()
    await until(lambda: run.ready)
    fault = emulator.faults.call("ServiceUnavailable", for_s=1.0)
    emulator.faults.record("ProvisionedThroughputExceededException", every=7, for_s=1.5)
    emulator.faults.record("InternalFailure", every=11, for_s=1.5)
    n = 0
    async with asyncio.timeout(60):
        while n < 3000:
            for _ in range(40):
                n += run.delivery.batcher.offer(b"plant/1", b"%d" % n, 0) > 0
            run._read()
            for _ in range(5):
                look()
                await asyncio.sleep(0)
            await asyncio.sleep(0.002)
        while run.delivery.batcher.in_flight or run.delivery.batcher.spooled:
            look()
            await asyncio.sleep(0.001)
    fault.remove()
    assert found == []
    assert looks > 100
    assert await run.stop() == 0


async def test_a_producer_whose_timer_is_lost_is_found(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    stalls.look_every(monkeypatch, 0.05)
    async with producer(emulator, linger_ms=60_000) as one:
        receipt = await one.put(b"x")
        one._delivery.flusher.stop()  # its timer is lost
        async with asyncio.timeout(10):
            await receipt
        assert one.stats()["stalls"] == 1
        assert one.stuck() is None
    assert len(stalls.found) == 1
    stalls.found.clear()


@pytest.mark.parametrize("writing", [False, True])
def test_a_disk_that_takes_its_time_is_no_stall(writing: bool) -> None:
    """The file failed, and the attempt to open it again hangs: the spool's own turn has the batches all the same."""
    batcher = SimpleNamespace(in_flight=3, open_records=0)
    sender = SimpleNamespace(waiting=False, attended=False)
    flusher = SimpleNamespace(armed=False)
    overflow = SimpleNamespace(attended=False, holds=True, writing=writing)
    found = unattended(batcher, sender, flusher, overflow)  # type: ignore[arg-type]
    assert (found is None) is writing
