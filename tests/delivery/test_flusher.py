"""When the open batch closes: linger, idle downstream, on demand; and never later than the linger."""

from __future__ import annotations

import asyncio

import pytest

from fastkin._codec import DRAIN, DROPPED, IDLE, LINGER, Batcher, Budget, KeyPlan
from fastkin.delivery.flusher import Flusher
from support.fake_http import on_both_loops


class FakeSender:
    """Takes what is ready, and is as idle as the test says."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.idle = False
        self.taken: list[tuple[int, int, float]] = []  # reason, records, when

    def pump(self) -> None:
        now = asyncio.get_running_loop().time()
        while (batch := self.batcher.take()) is not None:
            self.taken.append((batch.reason, len(batch), now))
            batch.finish(DROPPED)


class Rig:
    def __init__(self, linger_s: float, **options: int) -> None:
        self.batcher = Batcher(
            settler=None,
            budget=Budget(2**20, 1000),
            frame="raw",
            key=KeyPlan("uuid"),
            target=b'"StreamName":"s"',
            **options,
        )
        self.sender = FakeSender(self.batcher)
        self.loop = asyncio.get_running_loop()
        self.flusher = Flusher(self.batcher, self.sender, linger_s, self.loop)  # type: ignore[arg-type]

    def add(self, count: int = 1) -> None:
        for _ in range(count):
            self.batcher.add(b"x")
        if self.batcher.dirty:
            self.flusher.attend()

    async def taken(self, count: int = 1, timeout: float = 2.0) -> list[tuple[int, int, float]]:
        async with asyncio.timeout(timeout):
            while len(self.sender.taken) < count:
                await asyncio.sleep(0.001)
        return self.sender.taken


@on_both_loops
async def test_linger_counts_from_the_first_record_and_not_from_the_last() -> None:
    rig = Rig(0.1)
    began = rig.loop.time()
    while not rig.sender.taken:
        rig.add()
        await asyncio.sleep(0.005)
        assert rig.loop.time() - began < 1.0
    reason, _, when = rig.sender.taken[0]
    assert reason == LINGER
    assert 0.06 <= when - began <= 0.2


@on_both_loops
async def test_an_idle_sender_gets_a_quiet_batch_early() -> None:
    rig = Rig(1.0)
    rig.sender.idle = True
    began = rig.loop.time()
    rig.add(3)
    ((reason, records, when),) = await rig.taken()
    assert (reason, records) == (IDLE, 3)
    assert when - began < 0.5


async def test_a_busy_sender_gets_it_after_the_linger() -> None:
    rig = Rig(0.1)
    began = rig.loop.time()
    rig.add(3)
    ((reason, records, when),) = await rig.taken()
    assert (reason, records) == (LINGER, 3)
    assert when - began >= 0.07


async def test_without_linger_nothing_waits() -> None:
    rig = Rig(0.0)
    rig.add(2)
    assert [records for _, records, _ in rig.sender.taken] == [2]


async def test_the_batch_after_a_full_one_is_closed_in_time_too() -> None:
    rig = Rig(0.08, max_records=10)
    for _ in range(5):
        began = rig.loop.time()
        rig.add(25)
        await rig.taken(3)
        assert rig.sender.taken[-1][1] == 5
        assert rig.sender.taken[-1][2] - began < 0.3
        rig.sender.taken.clear()


@pytest.mark.parametrize("pause", [0.0, 0.03])
async def test_closed_on_demand_and_opened_again(pause: float) -> None:
    rig = Rig(0.08)
    for _ in range(4):
        rig.add()
        rig.flusher.close(DRAIN)
        assert rig.sender.taken[-1][:2] == (DRAIN, 1)
        began = rig.loop.time()
        rig.add(2)
        seen = len(rig.sender.taken)
        await rig.taken(seen + 1)
        assert rig.sender.taken[-1][1] == 2
        assert rig.loop.time() - began < 0.3
        await asyncio.sleep(pause)


async def test_stop_disarms() -> None:
    rig = Rig(0.02)
    rig.add()
    rig.flusher.stop()
    await asyncio.sleep(0.08)
    assert rig.sender.taken == []
    rig.batcher.abandon(RuntimeError("end"))
