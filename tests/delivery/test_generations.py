"""A flush waits for what was taken before it, and for nothing that came after."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from fastkin.delivery.generations import NO_GENERATION, Generations
from support.codec_rig import Rig

if TYPE_CHECKING:
    from fastkin._codec import Batch


def taken(generations: Generations, records: int) -> Batch:
    rig = Rig()
    for _ in range(records):
        rig.batcher.offer(b"t", b"x", 1)
    (batch,) = rig.drain()
    generations.take(batch)
    return batch


async def waiting(generations: Generations) -> asyncio.Task[None]:
    task = asyncio.create_task(generations.wait(generations.close_generation()))
    await asyncio.sleep(0)
    return task


async def test_what_comes_later_is_not_waited_for() -> None:
    g = Generations()
    first = taken(g, 3)
    flush = await waiting(g)
    assert g.awaited
    taken(g, 5)
    g.ended(first.flush_generation, 2)
    await asyncio.sleep(0)
    assert not flush.done()
    g.ended(first.flush_generation, 1)
    await flush
    assert not g.awaited


async def test_with_nothing_taken_it_is_over_at_once() -> None:
    g = Generations()
    await g.wait(g.close_generation())
    await g.wait(g.close_generation())


async def test_a_later_flush_waits_for_the_earlier_generation_too() -> None:
    g = Generations()
    one = taken(g, 1)
    first = await waiting(g)
    two = taken(g, 1)
    second = await waiting(g)
    g.ended(two.flush_generation, 1)
    await asyncio.sleep(0)
    assert (first.done(), second.done()) == (False, False)
    g.ended(one.flush_generation, 1)
    await asyncio.gather(first, second)


async def test_what_shares_a_call_with_an_older_one_counts_with_it() -> None:
    g = Generations()
    one = taken(g, 1)
    flush = await waiting(g)
    two = taken(g, 2)
    g.move(two, one.flush_generation)
    g.ended(one.flush_generation, 1)
    await asyncio.sleep(0)
    assert not flush.done()
    g.ended(one.flush_generation, 2)
    await flush


async def test_nobody_waits_for_what_came_back_from_the_spool() -> None:
    g = Generations()
    g.ended(NO_GENERATION, 7)
    await g.wait(g.close_generation())


async def test_who_is_cancelled_is_forgotten_and_who_waits_at_the_end_is_told() -> None:
    g = Generations()
    taken(g, 1)
    one, two = await waiting(g), await waiting(g)
    one.cancel()
    await asyncio.sleep(0)
    g.fail(RuntimeError("closed"))
    with pytest.raises(RuntimeError, match="closed"):
        await two
    assert one.cancelled()
    assert not g.awaited
