"""Calls in flight: however one ends, its batch is told of once."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from fastkin.delivery.open_calls import OpenCalls


def batch(*, restored: bool = False) -> Any:
    return SimpleNamespace(restored=restored)


class Rig:
    def __init__(self) -> None:
        self.ended: list[tuple[Any, bool, bool]] = []
        self.calls = OpenCalls("test", asyncio.get_running_loop(), lambda *how: self.ended.append(how))

    async def settle(self) -> None:
        await asyncio.gather(*self.calls.tasks(), return_exceptions=True)
        await asyncio.sleep(0)


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def test_an_answered_call_leaves_nothing() -> None:
    rig, one = Rig(), batch()
    rig.calls.start(asyncio.sleep(0), one, 1.0)
    assert list(rig.calls.batches()) == [one]
    await rig.settle()
    assert rig.ended == [(one, False, False)]
    assert len(rig.calls) == 0


async def test_a_call_cancelled_before_its_first_step_gives_its_batch_back() -> None:
    rig, one = Rig(), batch()
    rig.calls.start(never(), one, 1.0)
    rig.calls.tasks()[0].cancel()
    await rig.settle()
    assert rig.ended == [(one, True, False)]


async def test_only_older_calls_are_cut_short_and_none_that_came_from_the_disk() -> None:
    rig = Rig()
    old, restored, young = batch(), batch(restored=True), batch()
    for one, began in ((old, 1.0), (restored, 1.0), (young, 2.0)):
        rig.calls.start(never(), one, began)
    rig.calls.cut_short(2.0)
    assert rig.calls.cutting
    await asyncio.sleep(0.01)
    assert rig.ended == [(old, True, True)]
    assert not rig.calls.cutting
    for task in rig.calls.tasks():
        task.cancel()
    await rig.settle()


async def test_what_fails_in_a_call_is_told_to_the_loop() -> None:
    rig, one = Rig(), batch()
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
    wrong = RuntimeError("a bug")

    async def fails() -> None:
        raise wrong

    rig.calls.start(fails(), one, 1.0)
    await rig.settle()
    assert told == [wrong]
    assert rig.ended == [(one, False, False)]
