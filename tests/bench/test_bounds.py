"""What a soak may cost, and when a figure is past its bound (MK-25)."""

from __future__ import annotations

from typing import Any

import pytest

from fastkin.bench.bounds import Bounds
from fastkin.bench.ledger import Balance
from fastkin.bench.plan import Plan, Sample
from fastkin.bench.result import Result

LEAK_MB_H = 8.0


def sample(seconds: float, rss_mb: float) -> Sample:
    return Sample(seconds, 0, 0, 100.0, 0, 0, rss_mb, 1.0, 98.0, 47.0)


def leaking(seconds: float) -> float:
    return 37.0 + LEAK_MB_H * seconds / 3600


def stepping(seconds: float) -> float:
    """An arena of 1 MB in the second half."""
    return 37.0 if seconds < 400 else 38.0


def warming(seconds: float) -> float:
    """Everything is used for the first time."""
    return 30.0 + min(seconds, 100.0) / 10


def steady(_: float) -> float:
    return 37.0


def soaked(rss: Any = steady, *, seconds: int = 600, rate: float = 100.0, **more: Any) -> Result:
    figures = {"cpu_s": 0.012 * seconds, "wakeups": 98 * seconds, "calls": 47 * seconds, "rss_mb": rss(seconds)} | more
    return Result(
        plan=Plan(command="soak", rate=rate), measured="fastkin run", watched_s=float(seconds),
        samples=[sample(float(at), rss(float(at))) for at in range(1, seconds + 1)], **figures,
    )  # fmt: skip


def past(result: Result, **bounds: float) -> list[str]:
    return [each.name for each in Bounds(**bounds).verdicts(result) if not each.held]


def test_what_a_hundred_messages_a_second_cost_today_is_within_the_bounds() -> None:
    verdicts = Bounds().verdicts(soaked())
    assert [(each.name, each.most, each.unit) for each in verdicts] == [
        ("CPU share", 1.5, "%"), ("RSS growth", 4.0, "MB/h"), ("wake-ups", 200.0, "/s"), ("calls", 70.0, "/s"),
    ]  # fmt: skip
    assert [each.figure for each in verdicts] == [pytest.approx(1.2), pytest.approx(0.0, abs=1e-6), 98.0, 47.0]
    assert all(each.judged and each.held for each in verdicts)


@pytest.mark.parametrize(
    ("figures", "name"),
    [
        ({"cpu_s": 9.1}, "CPU share"),
        ({"rss": leaking}, "RSS growth"),
        ({"wakeups": 120_001}, "wake-ups"),
        ({"calls": 60_000}, "calls"),  # one for each message
    ],
)
def test_each_figure_has_a_bound(figures: dict[str, Any], name: str) -> None:
    assert past(soaked(**figures)) == [name]


def test_memory_that_grows_is_told_in_megabytes_an_hour() -> None:
    growth = soaked(leaking).growth
    assert growth == pytest.approx(LEAK_MB_H)
    assert past(soaked(leaking), growth_mb_h=LEAK_MB_H + 0.01) == []


@pytest.mark.parametrize("rss", [stepping, warming])
def test_what_is_taken_once_is_no_growth(rss: Any) -> None:
    assert soaked(rss).growth == pytest.approx(0.0, abs=1e-6)


def test_half_a_megabyte_once_matters_less_the_longer_a_run_is() -> None:
    """A session's table of packet ids fills within 65,535 messages."""

    def most(seconds: float) -> float:
        result = Result(plan=Plan(command="soak"), measured="fastkin run", watched_s=seconds)
        return Bounds().verdicts(result)[1].most

    assert most(600.0) == pytest.approx(4.0)
    assert most(3600.0) == pytest.approx(1.5)
    assert most(50_000.0) == pytest.approx(1.036)
    assert Bounds(growth_mb_h=1.0).verdicts(soaked())[1].most == 1.0


def test_the_bounds_of_a_higher_rate_are_as_many_times_more() -> None:
    costly = {"cpu_s": 17.0, "wakeups": 239_000, "calls": 83_000}
    assert past(soaked(**costly)) == ["CPU share", "wake-ups", "calls"]
    assert past(soaked(rate=200.0, **costly)) == []
    assert past(soaked(leaking, rate=1000.0)) == ["RSS growth"]


def test_a_short_run_is_judged_by_the_bounds_that_are_given() -> None:
    result = soaked(leaking, seconds=20, cpu_s=20.0)
    assert past(result) == []
    assert past(result, growth_mb_h=1.0) == ["RSS growth"]
    assert past(result, cpu_percent=99.0) == ["CPU share"]
    assert Bounds().verdicts(result)[0].row() == ("CPU share", "100.00 %", "at most 1.5 %: too short a run to judge")


def test_what_cannot_be_measured_is_not_within_its_bound() -> None:
    """Without /proc all figures are zeros."""
    result = soaked(rss=lambda _: 0.0, cpu_s=0.0, wakeups=0)
    assert past(result) == ["CPU share", "RSS growth", "wake-ups", "calls"]
    assert Bounds().verdicts(result)[1].row() == ("RSS growth", "? MB/h", "at most 4 MB/h: EXCEEDED")


def test_one_lost_record_is_enough() -> None:
    result = soaked()
    result.plan = Plan(command="soak", messages=3)
    result.balance = Balance(published=3, stored=3)
    assert result.good
    result.balance = Balance(published=3, stored=2, lost=1)
    assert not result.good
