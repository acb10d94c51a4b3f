"""What is tried until it is done says so now and then."""

from __future__ import annotations

import time

import pytest

from fastkin.deadletter import insist


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits cost no time, and the clock shows what they would have cost."""
    now = [100.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(insist.asyncio, "sleep", sleep)


async def outcome(failures: int) -> tuple[float | None, list[tuple[str, float]]]:
    left = [f"failure {n}" for n in range(failures)]
    said: list[tuple[str, float]] = []

    async def attempt() -> str | None:
        return left.pop(0) if left else None

    return await insist.insist(attempt, lambda why, again_s: said.append((why, again_s))), said


async def test_what_is_done_at_once_says_nothing() -> None:
    assert await outcome(0) == (None, [])


async def test_the_first_failure_is_said_and_the_time_is_told() -> None:
    assert await outcome(3) == (15.0, [("failure 0", 5.0)])


async def test_it_is_said_again_each_minute() -> None:
    took, said = await outcome(30)
    assert took == 150.0
    assert said == [("failure 0", 5.0), ("failure 12", 5.0), ("failure 24", 5.0)]
