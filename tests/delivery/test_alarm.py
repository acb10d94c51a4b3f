"""One timer for all who wait: it rings at the earliest time that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastkin.delivery.alarm import Alarm

if TYPE_CHECKING:
    from collections.abc import Callable


class Timer:
    def __init__(self, when: float, call: Callable[[], None]) -> None:
        self.when = when
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """Holds timers; the test rings them."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(when, call))
        return self.timers[-1]

    @property
    def armed(self) -> list[float]:
        return [timer.when for timer in self.timers if not timer.cancelled]


def alarm() -> tuple[Alarm, Loop, list[str]]:
    loop: Any = Loop()
    rang: list[str] = []
    return Alarm(loop, lambda: rang.append("rang")), loop, rang


def test_an_earlier_time_takes_the_place_of_a_later_one() -> None:
    one, loop, _ = alarm()
    one.set(20.0)
    one.set(10.0)
    assert loop.armed == [10.001]


def test_a_later_time_changes_nothing() -> None:
    one, loop, _ = alarm()
    one.set(10.0)
    one.set(20.0)
    assert loop.armed == [10.001]
    assert one.rings_by(10.0)
    assert not one.rings_by(9.0)


def test_after_it_rang_it_can_be_set_again() -> None:
    one, loop, rang = alarm()
    one.set(10.0)
    loop.timers.pop().call()
    assert rang == ["rang"]
    assert not one.rings_by(100.0)
    one.set(20.0)
    assert loop.armed == [20.001]


def test_closed_it_rings_no_more() -> None:
    one, loop, _ = alarm()
    one.set(10.0)
    one.close()
    one.set(5.0)
    assert loop.armed == []
