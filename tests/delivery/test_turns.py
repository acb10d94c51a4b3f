"""Who waits for room gets it in the order they came, and keeps the place when it is gone again."""

from __future__ import annotations

import asyncio

import pytest

from fastkin._codec import Budget, Receipt
from fastkin.delivery.turns import Turns
from support.codec_rig import Rig


class Waiters:
    def __init__(self, room: int) -> None:
        self.rig = Rig(budget=Budget(1 << 30, room))
        self.turns = Turns(self.rig.budget)
        self.served: list[int] = []
        self.asked = 0

    async def put(self, name: int) -> None:
        async with self.turns.turn(self.make_room):
            assert not self.rig.budget.full
            self.rig.batcher.offer(b"t", b"x", 1)
            self.served.append(name)

    def make_room(self) -> None:
        self.asked += 1

    def start(self, *names: int) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.put(name)) for name in names]


async def turn_of_the_loop() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_in_the_order_they_came_and_no_more_than_there_is_room_for() -> None:
    w = Waiters(4)
    tasks = w.start(*range(60))
    await turn_of_the_loop()
    assert w.served == [0, 1, 2, 3]
    assert w.rig.budget.waiting == 56
    assert w.asked >= 56
    while len(w.served) < 60:
        before = len(w.served)
        w.rig.store()
        await turn_of_the_loop()
        assert len(w.served) == before + 4
        assert w.turns.stuck(1) is None
    await asyncio.gather(*tasks)
    assert w.served == list(range(60))
    assert w.rig.budget.waiting == 0


async def test_who_is_cancelled_holds_nobody_up() -> None:
    w = Waiters(1)
    tasks = w.start(*range(6))
    await turn_of_the_loop()
    tasks[2].cancel()  # while in the line
    await turn_of_the_loop()
    w.rig.store()
    tasks[1].cancel()  # called, and has not run yet
    await turn_of_the_loop()
    assert w.served == [0, 3]
    for _ in range(3):
        w.rig.store()
        await turn_of_the_loop()
    assert w.served == [0, 3, 4, 5]
    assert w.rig.budget.waiting == 0
    assert [task.cancelled() for task in tasks] == [False, True, True, False, False, False]


async def test_who_fails_holds_nobody_up() -> None:
    w = Waiters(1)
    w.rig.batcher.offer(b"t", b"x", 1)

    async def fail() -> None:
        async with w.turns.turn(w.make_room):
            raise RuntimeError("as said")

    failing = asyncio.create_task(fail())
    tasks = w.start(1)
    await turn_of_the_loop()
    w.rig.store()
    with pytest.raises(RuntimeError, match="as said"):
        await failing
    await asyncio.gather(*tasks)
    assert w.served == [1]


async def test_the_end_is_told_to_all_in_the_line() -> None:
    w = Waiters(1)
    tasks = w.start(0, 1, 2)
    await turn_of_the_loop()
    w.turns.close(RuntimeError("closed"))
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert [repr(one) for one in ended] == ["None", "RuntimeError('closed')", "RuntimeError('closed')"]
    assert w.rig.budget.waiting == 0


async def test_what_nobody_will_look_at() -> None:
    w = Waiters(2)
    tasks = w.start(0, 1, 2)
    await turn_of_the_loop()
    assert w.turns.stuck(2) is None
    assert w.turns.stuck(0) == "1 who put wait for room and nothing is in flight"
    w.rig.budget.on_room = None  # a wake-up that is lost
    w.rig.store()
    assert w.turns.stuck(0) == "1 who put wait for room and there is some"
    w.turns.call()
    assert w.turns.stuck(0) is None
    await asyncio.gather(*tasks)


def test_room_made_after_the_loop_has_closed_calls_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever drops an engine without closing it drops what it held: that makes room, and wakes receipts."""
    wrong: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", wrong.append)
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)  # tasks are pending as it ends: that is the case

    async def begin() -> tuple[Waiters, list[asyncio.Task[None]]]:
        w = Waiters(1)
        tasks = w.start(1, 2)
        w.rig.batcher.put(b"y").add_done_callback(lambda receipt: None)
        tasks.append(asyncio.create_task(wait_for(w.rig.batcher.put(b"z"))))
        await turn_of_the_loop()
        return w, tasks

    w, tasks = loop.run_until_complete(begin())
    loop.close()
    w.rig.store()
    assert not w.rig.budget.full
    assert wrong == []
    del tasks


async def wait_for(receipt: Receipt) -> None:
    await receipt


async def test_who_was_called_is_on_the_way_for_those_behind() -> None:
    """More in the line than are called at once, and nothing is in flight by then: the last one called calls them."""
    w = Waiters(1)
    tasks = w.start(*range(20))
    await turn_of_the_loop()
    assert w.served == [0]
    w.rig.store()  # the record ends: some are called, and have not run yet
    assert w.turns.stuck(0) is None
    for _ in range(100):
        await turn_of_the_loop()
        w.rig.store()
    await asyncio.gather(*tasks)
    assert w.served == list(range(20))
