"""Questions to a worker and its answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import pytest

from fastkin.service.channel import Answerer, Asker, GoneError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable


class Pair:
    def __init__(self, asker: Asker, answerer: Answerer, serving: asyncio.Task[None]) -> None:
        self.asker = asker
        self.answerer = answerer
        self.serving = serving


@contextlib.asynccontextmanager
async def pair(**answers: Callable[[], Awaitable[Any]]) -> AsyncIterator[Pair]:
    ours, theirs = socket.socketpair()
    asker, answerer = Asker(), Answerer(theirs, answers)
    serving = asyncio.create_task(answerer.serve())
    await asker.open(ours)
    try:
        yield Pair(asker, answerer, serving)
    finally:
        asker.close()
        await asyncio.wait([serving])


async def test_each_question_gets_its_own_answer_whichever_comes_first() -> None:
    slow = asyncio.Event()

    async def one() -> str:
        await slow.wait()
        return "one"

    async def two() -> list[int]:
        slow.set()
        return [2]

    async with pair(one=one, two=two) as both:
        first = asyncio.create_task(both.asker.ask("one", 30))
        assert await both.asker.ask("two", 30) == [2]
        assert await first == "one"


async def test_an_answer_may_be_large() -> None:
    async def large() -> str:
        return "x" * 3_000_000

    async with pair(large=large) as both:
        assert len(await both.asker.ask("large", 30)) == 3_000_000


async def test_a_question_that_cannot_be_answered_is_none_and_the_next_one_is() -> None:
    async def wrong() -> None:
        raise ValueError("a bug")

    async def right() -> bool:
        return True

    async with pair(wrong=wrong, right=right) as both:
        assert await both.asker.ask("wrong", 30) is None
        assert await both.asker.ask("right", 30) is True


async def test_who_waits_for_an_answer_hears_that_the_other_end_has_gone() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    async with pair(never=never) as both:
        waiting = asyncio.create_task(both.asker.ask("never", None))
        await asyncio.sleep(0)
        both.serving.cancel()
        with pytest.raises(GoneError, match="it has ended"):
            await waiting
        with pytest.raises(GoneError):
            await both.asker.ask("never", None)


async def test_the_end_that_answers_ends_with_the_one_that_asks() -> None:
    async with pair() as both:
        both.asker.close()
        await asyncio.wait_for(both.serving, 30)


async def test_no_answer_in_time() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    async with pair(never=never) as both:
        with pytest.raises(GoneError, match=r"not answered for 0\.01 s"):
            await both.asker.ask("never", 0.01)


async def test_finish_waits_for_answers_that_are_under_way() -> None:
    go = asyncio.Event()

    async def later() -> int:
        await go.wait()
        return 7

    async with pair(later=later) as both:
        asked = asyncio.create_task(both.asker.ask("later", 30))
        while not both.answerer._tasks:
            await asyncio.sleep(0)
        finished = asyncio.create_task(both.answerer.finish())
        await asyncio.sleep(0)
        assert not finished.done()
        go.set()
        await finished
        both.serving.cancel()
        assert await asked == 7


async def test_there_is_nobody_before_it_is_open() -> None:
    with pytest.raises(GoneError):
        await Asker().ask("anything", None)
