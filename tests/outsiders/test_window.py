"""Calls at low rates follow the linger, and a broker that grants few messages is not kept waiting: in virtual time.

A broker with a window, a source with a rate and a Kinesis with a latency around the real batcher, flusher and window.
"""

from __future__ import annotations

import heapq
import inspect
import itertools
import random
from collections import deque
from typing import TYPE_CHECKING, Any

import pytest

from fastkin._codec import DROPPED, WINDOW, Batcher, Budget, KeyPlan
from fastkin.delivery.flusher import Flusher
from fastkin.mqtt.window import Window

if TYPE_CHECKING:
    from collections.abc import Callable

LINGER_S = 0.05


class Clock:
    """As much of an event loop as a flusher needs."""

    class Handle:
        cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

    def __init__(self) -> None:
        self._now = 1000.0
        self._due: list[tuple[float, int, Clock.Handle, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = itertools.count()

    def time(self) -> float:
        return self._now

    def call_at(self, when: float, fn: Callable[..., None], *args: Any) -> Clock.Handle:
        handle = Clock.Handle()
        heapq.heappush(self._due, (max(when, self._now), next(self._serial), handle, fn, args))
        return handle

    def run(self, until: float) -> None:
        while self._due and self._due[0][0] <= until:
            self._now, _, handle, fn, args = heapq.heappop(self._due)
            if not handle.cancelled:
                fn(*args)
        self._now = until


class Plant:
    """A source, a broker, the pipeline, a Kinesis."""

    def __init__(
        self, window: int | None, rate: float, latency_s: float, *, asked: int = 10_000, way_s: float = 0.0001,
        even: bool = True, connections: int = 16,
    ) -> None:  # fmt: skip
        self.clock = Clock()
        self.rate = rate
        self.latency_s = latency_s
        self.way_s = way_s
        self.random = None if even else random.Random(7)
        # the broker
        self.granted = window or 1 << 30
        self.unacked_there = 0
        self.queue: deque[float] = deque()
        # the pipeline
        named = inspect.signature(Window).parameters
        options = {"linger_s": LINGER_S, "sure": False}
        self.window = Window(asked, 65_535, **{k: v for k, v in options.items() if k in named})  # type: ignore[arg-type]
        self.window.round_trip_s = 2 * way_s
        self.batcher = Batcher(
            settler=None, budget=Budget(1 << 30, 1 << 30), frame="raw", key=KeyPlan("uuid"), target=b'"StreamName":"s"'
        )
        self.flusher = Flusher(self.batcher, self, LINGER_S, self.clock)  # type: ignore[arg-type]
        self.last_read = 0.0
        self.unacked: deque[list[Any]] = deque()  # [published, ended], oldest first
        self.open: deque[list[Any]] = deque()  # of those, what is not in a call yet
        # Kinesis
        self.connections = connections
        self.in_flight = 0
        self.calls = 0
        self.full = 0
        self.stored = 0
        self.waits: list[float] = []
        self.clock.call_at(self.clock.time(), self._publish)

    # -- the broker

    def _publish(self) -> None:
        now = self.clock.time()
        self.queue.append(now)
        self._deliver()
        gap = 1 / self.rate if self.random is None else self.random.expovariate(self.rate)
        self.clock.call_at(now + gap, self._publish)

    def _deliver(self) -> None:
        ready = []
        while self.queue and self.unacked_there < self.granted:
            ready.append(self.queue.popleft())
            self.unacked_there += 1
        if ready:
            self.clock.call_at(self.clock.time() + self.way_s, self._read, ready)

    def _acked(self, count: int) -> None:
        self.unacked_there -= count
        self._deliver()

    # -- the pipeline, as PipelineRun and Subscriber do it

    def _read(self, published: list[float]) -> None:
        now = self.last_read = self.clock.time()
        for at in published:
            message = [at, False]
            self.unacked.append(message)
            self.open.append(message)
            self.batcher.add(b"x")
        self.window.received(len(self.unacked), now)
        if self.batcher.dirty:
            self.flusher.attend()
        if self.batcher.open_records and self._exhausted(now):
            self.flusher.close(WINDOW)

    def _exhausted(self, now: float) -> bool:
        if hasattr(self.window, "exhausted"):
            return self.window.exhausted(len(self.unacked), now)
        return len(self.unacked) >= self.window.granted  # type: ignore[unreachable]

    # -- the sender

    @property
    def idle(self) -> bool:
        return not self.in_flight and not self.batcher.ready

    def pump(self) -> None:
        while self.in_flight < self.connections and (batch := self.batcher.take()) is not None:
            count = len(batch)
            batch.finish(DROPPED)
            self.in_flight += 1
            self.calls += 1
            self.full += count == 500
            messages = [self.open.popleft() for _ in range(count)]
            self.clock.call_at(self.clock.time() + self.latency_s, self._answered, messages)

    def _answered(self, messages: list[list[Any]]) -> None:
        now = self.clock.time()
        self.in_flight -= 1
        self.stored += len(messages)
        for message in messages:
            message[1] = True
            self.waits.append(now - message[0])
        before = len(self.unacked)
        while self.unacked and self.unacked[0][1]:
            self.unacked.popleft()
        if (count := before - len(self.unacked)) > 0:
            self.window.acknowledging(before, now, self.last_read)
            self.clock.call_at(now + self.way_s, self._acked, count)
        self.pump()

    # -- what is measured

    def run(self, seconds: float, warm_s: float = 2.0) -> Plant:
        """Calls, full calls and messages a second, after a while to get to know each other."""
        began = self.clock.time()
        self.clock.run(began + warm_s)
        calls, full, stored = self.calls, self.full, self.stored
        self.waits.clear()
        self.clock.run(began + warm_s + seconds)
        self.calls_s = (self.calls - calls) / seconds
        self.full_s = (self.full - full) / seconds
        self.stored_s = (self.stored - stored) / seconds
        self.flusher.stop()
        self.batcher.abandon(RuntimeError("over"))
        return self

    def p99(self) -> float:
        return sorted(self.waits)[int(len(self.waits) * 0.99)]


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("latency_s", [0.008, 0.05])
@pytest.mark.parametrize("rate", [1, 5, 10, 20, 30, 50, 90, 100, 110, 125, 300, 1000, 3000, 10_000])
@pytest.mark.parametrize("window", [1, 10, 20, 50, 100, 1000, None])
def test_the_window_binds_or_the_linger_does(window: int | None, rate: float, latency_s: float, even: bool) -> None:
    plant = Plant(window, rate, latency_s, even=even).run(max(4.0, min(20.0, 40_000 / rate)))
    # what the window allows, an acknowledgement and its answer on the way included; a hold now and then
    able = min(float("inf") if window is None else 0.85 * window / (latency_s + 3 * plant.way_s), 0.95 * rate)
    if rate * 4 < 100:
        able *= 0.8  # few messages: one more or less
    assert plant.stored_s >= able, (plant.stored_s, able)
    binds = window is not None and rate * (latency_s + LINGER_S) >= window
    if not binds:
        assert plant.calls_s <= 1.1 / LINGER_S + plant.full_s, plant.calls_s


@pytest.mark.parametrize("way_s", [0.0001, 0.001])
@pytest.mark.parametrize("asked", [20, 10_000])
def test_a_steady_low_rate_is_no_small_window(asked: int, way_s: float) -> None:
    """A message each 10 ms that is acknowledged after 8: it falls silent, and goes on right after."""
    plant = Plant(None, 100.0, 0.008, asked=asked, way_s=way_s).run(60.0)
    assert plant.calls_s <= 22
    assert plant.window.granted >= 5
    assert plant.stored_s >= 99


def test_a_guess_that_was_wrong_is_forgotten() -> None:
    """A message each 58.2 ms comes right after the one before was acknowledged: that looks like a window of one."""
    plant = Plant(None, 1 / 0.0582, 0.008)
    plant.clock.run(plant.clock.time() + 5.0)
    plant.rate = 120.0
    plant.run(20.0, warm_s=10.0)
    assert plant.calls_s <= 22


@pytest.mark.parametrize(("window", "rate", "least"), [(1, 500, 18.5), (10, 1000, 180), (50, 5000, 850)])
def test_small_windows_are_used_up(window: int, rate: float, least: float) -> None:
    """As many as come with 50 ms to Kinesis: ejabberd 19 a second, RabbitMQ and Moquette 190, HiveMQ 950."""
    assert Plant(window, rate, 0.05).run(20.0).stored_s >= least


@pytest.mark.parametrize("latency_s", [0.008, 0.05])
def test_a_window_that_grows(latency_s: float) -> None:
    """mosquitto 3.1.1: 20, and 400 once 20 were acknowledged together."""
    plant = Plant(20, 20_000, latency_s, asked=20)
    plant.clock.run(plant.clock.time() + 3.0)
    assert plant.window.granted == 20
    plant.granted = 400
    plant.run(10.0)
    assert plant.stored_s >= 0.85 * min(400 / latency_s, 20_000 / 0.95)


def test_one_alone_does_not_wait_for_the_linger() -> None:
    for even in (True, False):
        assert Plant(None, 10.0, 0.008, even=even).run(30.0).p99() <= (0.030 if even else LINGER_S + 0.016)
    for even in (True, False):
        assert Plant(None, 1000.0, 0.008, even=even).run(10.0).p99() <= LINGER_S + 0.016
