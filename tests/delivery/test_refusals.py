"""Whose fault it is that a single record is refused."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from fastkin._codec import Batch, Budget
from fastkin.delivery.refusals import REFUSED_FOR_S, REFUSED_IN_A_ROW, Refusals
from fastkin.errors import KinesisError
from support.codec_rig import Rig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def judge(
    *, trusted: bool = False, harmless: Callable[[], Awaitable[bool | None]] | None = None
) -> tuple[Refusals, Rig]:
    rig = Rig(budget=Budget(1 << 20, 20))
    return Refusals(rig.budget, trusted=trusted, harmless=harmless, name="p"), rig


def one(rig: Rig, data: bytes = b"x") -> Batch:
    rig.batcher.offer(b"t", data, 1)
    (batch,) = rig.drain()
    return batch


async def test_before_anything_is_stored_the_destination_is_in_doubt() -> None:
    refusals, rig = judge()
    batch = one(rig)
    assert refusals.doubting
    assert refusals.untold
    assert not refusals.at_fault(batch, 0.0)
    assert not refusals.at_fault(batch, 1e9), "nothing has told that it takes others"
    refusals.stored()
    assert not refusals.doubting
    assert refusals.at_fault(batch, 1e9)


async def test_a_row_of_refusals_brings_doubt_and_a_stored_record_ends_it() -> None:
    refusals, rig = judge()
    refusals.stored()
    assert all(refusals.at_fault(one(rig), 0.0) for _ in range(REFUSED_IN_A_ROW))
    doubted = one(rig)
    assert not refusals.at_fault(doubted, 100.0)
    assert not refusals.at_fault(doubted, 100.0 + REFUSED_FOR_S - 0.1)
    assert refusals.at_fault(doubted, 100.0 + REFUSED_FOR_S), "others were stored in this run"
    another = one(rig)
    assert not refusals.at_fault(another, 100.0 + REFUSED_FOR_S)
    assert not refusals.at_fault(another, 100.0 + 2 * REFUSED_FOR_S - 0.1), "one in a minute at most"
    assert refusals.at_fault(another, 100.0 + 2 * REFUSED_FOR_S)


@pytest.mark.parametrize("said", [True, False, None])
async def test_a_harmless_record_may_tell(said: bool | None) -> None:
    async def ask() -> bool | None:
        return said

    refusals, rig = judge(harmless=ask)
    batch = one(rig)
    assert not refusals.at_fault(batch, 0.0)
    await asyncio.gather(*refusals.tasks())
    assert refusals.tasks() == []
    assert refusals.at_fault(batch, REFUSED_FOR_S) is (said is True)
    assert refusals.may_give_up(3 * REFUSED_FOR_S) is (said is True)


async def test_a_question_that_fails_tells_nothing_good() -> None:
    async def ask() -> bool | None:
        raise KinesisError("Away", "not there")

    refusals, rig = judge(harmless=ask)
    batch = one(rig)
    refusals.at_fault(batch, 0.0)
    await asyncio.gather(*refusals.tasks())
    assert not refusals.at_fault(batch, 1e9)


async def test_what_is_larger_than_the_stream_takes_is_refused_for_that() -> None:
    refusals, rig = judge()
    refusals.takes = 50
    assert refusals.at_fault(one(rig, b"x" * 51), 0.0)
    assert not refusals.at_fault(one(rig), 0.0)
    trusting, _ = judge(trusted=True)
    assert trusting.at_fault(one(rig), 0.0)


async def test_what_is_in_doubt_does_not_fill_the_budget_alone() -> None:
    refusals, rig = judge()
    batch = one(rig)
    rig.batcher.offer(b"t", b"y" * (1 << 20), 2)  # no room beside it
    assert rig.budget.full
    refusals.at_fault(batch, 0.0)
    assert not rig.budget.full
    refusals.forget(batch)
    assert rig.batcher.offer(b"t", b"y" * (1 << 20), 2) == -1
