"""What the status port says of several workers."""

from __future__ import annotations

from typing import Any

from prometheus_client import generate_latest

from fastkin.service.channel import GoneError
from fastkin.service.workers_page import WorkersPage

FIGURES = [
    ["fastkin_records_stored", "Records.", "counter", [["fastkin_records_stored_total", {"pipeline": "a"}, 5.0]]],
    [
        "fastkin_call_seconds",
        "Time.",
        "histogram",
        [
            ["fastkin_call_seconds_bucket", {"pipeline": "a", "le": "+Inf"}, 2.0],
            ["fastkin_call_seconds_count", {"pipeline": "a"}, 2.0],
            ["fastkin_call_seconds_sum", {"pipeline": "a"}, 0.5],
        ],
    ],
]
WELL = {"failed": {"a": None}, "unready": {"a": None}, "last_error": {"a": None}, "connected": True}


class FakeWorkers:
    """Answers as the workers would; an answer that is None: it hangs. Not there: it has died."""

    pipelines = ["a"]  # noqa: RUF012

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def places(self) -> list[tuple[str, int | None]]:
        return [("0", 100), ("1", 101 if "one" in self.answers else None)]

    def trouble(self, name: str) -> str | None:
        return None if name == "0" or "one" in self.answers else "was ended by SIGKILL after 3.0 s: starts again"

    def restarts(self, name: str) -> int:
        return int(name)

    async def ask(self, name: str, what: str, timeout_s: float) -> Any:
        answer = self.answers.get("zero" if name == "0" else "one")
        if answer is None:
            raise GoneError("it has ended")
        return FIGURES if what == "figures" else answer


def page(**answers: Any) -> WorkersPage:
    return WorkersPage(FakeWorkers(**answers))  # type: ignore[arg-type]


async def test_figures_bear_the_worker_and_each_family_is_told_once() -> None:
    text = generate_latest(await page(zero=WELL, one=WELL).registry()).decode()
    assert text.count("# TYPE fastkin_records_stored_total counter") == 1
    assert 'fastkin_records_stored_total{pipeline="a",worker="0"} 5.0' in text
    assert 'fastkin_records_stored_total{pipeline="a",worker="1"} 5.0' in text
    assert text.count("# TYPE fastkin_call_seconds histogram") == 1
    assert 'fastkin_call_seconds_count{pipeline="a",worker="1"} 2.0' in text
    assert 'fastkin_worker_restarts_total{worker="1"} 1.0' in text
    assert 'fastkin_worker_up{worker="0"} 1.0' in text


async def test_a_dead_worker_is_told_and_the_figures_of_others_are() -> None:
    text = generate_latest(await page(zero=WELL).registry()).decode()
    assert 'fastkin_worker_up{worker="1"} 0.0' in text
    assert 'worker="0"} 5.0' in text
    assert 'fastkin_records_stored_total{pipeline="a",worker="1"}' not in text


async def test_all_is_well_when_each_worker_is() -> None:
    health = await page(zero=WELL, one=WELL).health()
    assert health.failed == health.unready == {"a": None}
    assert health.more == {
        "workers": {"0": {"ok": True, "reason": None, "pid": 100}, "1": {"ok": True, "reason": None, "pid": 101}}
    }


async def test_a_worker_that_is_started_again_is_not_ready_and_nobody_is_unhealthy() -> None:
    health = await page(zero=WELL).health()
    assert health.failed == {"a": None}
    assert health.unready == {"a": "worker 1: was ended by SIGKILL after 3.0 s: starts again"}


async def test_a_worker_that_hangs_is_unhealthy() -> None:
    health = await page(zero=WELL, one=None).health()
    assert health.failed == {"a": "worker 1: does not answer for 5 s"}
    assert health.unready == health.failed


async def test_what_one_worker_says_is_said_with_its_name() -> None:
    ill = {**WELL, "unready": {"a": "the broker: waiting"}, "last_error": {"a": "connection refused"}}
    health = await page(zero=WELL, one=ill).health()
    assert health.unready == {"a": "worker 1: the broker: waiting"}
    assert health.last_error == {"a": "worker 1: connection refused"}
    assert health.failed == {"a": None}


async def test_before_any_worker_answers_nothing_is_ready() -> None:
    health = await page().health()
    assert health.unready["a"] == "no worker answers: they are being started or stopped"
