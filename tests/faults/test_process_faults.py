"""fastkin itself is killed or asked to end, at every moment that is bad for it."""

from __future__ import annotations

import random
import signal
import time
from typing import TYPE_CHECKING

import pytest

from harness import Rig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.faults_full
def test_sigkill_before_anything_is_stored(tmp_path: Path) -> None:
    with Rig(tmp_path, emulator={"latency_ms": 400}) as rig:
        rig.flow(1000)
        rig.until(lambda: len(rig.ledger.handed) > 50, "records are handed out")
        rig.kill()
        rig.restart()
        rig.settle()
        rig.finish(least_redelivered=1)


@pytest.mark.parametrize("seed", [pytest.param(1), *(pytest.param(n, marks=pytest.mark.faults_full) for n in (2, 3))])
def test_sigkill_in_mid_flow(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    with Rig(tmp_path, emulator={"latency_ms": 40}) as rig:
        rig.flow(2500)
        for target in (300, 900, 1500):
            rig.stored(target)
            time.sleep(rng.random() * 0.2)
            rig.kill()
            rig.restart()
        rig.settle()
        rig.finish(least_redelivered=1)


@pytest.mark.faults_full
def test_sigkill_during_the_drain(tmp_path: Path) -> None:
    with Rig(tmp_path, emulator={"latency_ms": 300}) as rig:
        rig.flow(1500)
        rig.stored(300)
        assert rig.service.process is not None
        rig.service.process.send_signal(signal.SIGTERM)
        rig.logged("takes no more")
        rig.kill()
        rig.restart()
        rig.settle()
        rig.finish(least_redelivered=1)


@pytest.mark.faults_full
def test_sigkill_while_it_starts(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.flow(1500)
        rig.stored(200)
        for wait in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
            rig.kill()
            rig.service.start()
            time.sleep(wait)
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_sigkill_while_calls_fail(tmp_path: Path) -> None:
    with Rig(tmp_path, emulator={"latency_ms": 20}) as rig:
        rig.call(lambda: rig.kinesis.faults.cut("after", every=3))
        rig.call(lambda: rig.kinesis.faults.record(probability=0.2))
        rig.flow(2000)
        for target in (400, 900):
            rig.stored(target)
            rig.kill()
            rig.restart()
        rig.call(rig.kinesis.faults.clear)
        rig.settle()
        rig.finish(least_redelivered=1)


def test_sigterm_in_mid_flow_makes_no_duplicate(tmp_path: Path) -> None:
    """All that was taken is stored and acknowledged before the end: the next run begins where this one stopped."""
    with Rig(tmp_path, emulator={"latency_ms": 40}) as rig:
        rig.flow(2000)
        for target in (300, 900):
            rig.stored(target)
            rig.terminate()
            rig.restart()
        rig.settle()
        assert rig.finish()["dup"] == 0


def nothing(rig: Rig) -> None:
    """Records are under way, and all is well."""


def kinesis_is_silent(rig: Rig) -> None:
    rig.call(rig.kinesis_way.hold)


def kinesis_throttles(rig: Rig) -> None:
    rig.call(lambda: rig.kinesis.faults.record("ProvisionedThroughputExceededException", probability=1.0))


def kinesis_fails(rig: Rig) -> None:
    rig.call(lambda: rig.kinesis.faults.call("InternalFailure", status=500))


def keys_are_refused(rig: Rig) -> None:
    rig.call(lambda: rig.kinesis.faults.call("AccessDeniedException"))


def answers_are_cut(rig: Rig) -> None:
    rig.call(lambda: rig.kinesis.faults.cut("after"))


def the_broker_is_silent(rig: Rig) -> None:
    rig.call(rig.broker_way.hold)


def the_broker_is_gone(rig: Rig) -> None:
    rig.wait(rig.broker_way.refuse())
    rig.call(rig.broker_way.cut)


def all_is_silent(rig: Rig) -> None:
    rig.call(rig.broker_way.hold)
    rig.call(rig.kinesis_way.hold)


FAULTS = [
    nothing, kinesis_is_silent, kinesis_throttles, kinesis_fails, keys_are_refused, answers_are_cut,
    the_broker_is_silent, the_broker_is_gone, all_is_silent,
]  # fmt: skip


@pytest.mark.parametrize("again", [False, True], ids=["at the deadline", "second signal"])
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_sigterm_ends_it_whatever_is_wrong(tmp_path: Path, fault: Callable[[Rig], None], again: bool) -> None:
    """Within shutdown_timeout_s and two seconds, or at once after the second: and nothing is lost by it."""
    limit = 60.0 if again else 1.0
    with Rig(tmp_path, pipeline={"shutdown_timeout_s": limit}, emulator={"latency_ms": 300}) as rig:
        rig.flow(1500, rate=2000.0)
        rig.stored(300)
        fault(rig)
        time.sleep(0.3)
        process = rig.service.process
        assert process is not None
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        if again:
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
        process.wait(2.0 if again else limit + 2.0)
        assert process.returncode == 0 or again, rig.service.log()[-4000:]
        assert again or time.monotonic() - began < limit + 2.0
        rig.call(rig.kinesis.faults.clear)
        rig.call(rig.kinesis_way.release)
        rig.call(rig.broker_way.release)
        if fault is the_broker_is_gone:
            rig.wait(rig.broker_way.start())
        rig.until(lambda: not rig.broker_way.links, "the connections are gone")
        rig.look_at_spool()
        rig.emulator.latency_s = 0.0
        rig.restart()
        rig.settle()
        rig.finish()


def test_sigterm_while_kinesis_is_dead_ends_at_the_deadline(tmp_path: Path) -> None:
    with Rig(tmp_path, pipeline={"shutdown_timeout_s": 0.7}) as rig:
        rig.flow(1200)
        rig.stored(300)
        rig.call(rig.kinesis_way.hold)
        time.sleep(0.3)
        began = time.monotonic()
        rig.terminate()
        assert time.monotonic() - began < 10
        assert "not settled" in rig.service.log()
        rig.call(rig.kinesis_way.release)
        rig.restart()
        rig.settle()
        rig.finish(least_redelivered=1)


@pytest.mark.faults_full
def test_sigterm_while_the_broker_is_gone(tmp_path: Path) -> None:
    """What is held is stored although nobody can be told; the broker hands it out again."""
    with Rig(tmp_path, emulator={"latency_ms": 300}) as rig:
        rig.flow(800, wait=True)
        rig.wait(rig.broker_way.refuse())
        rig.call(rig.broker_way.cut)
        rig.terminate()
        rig.wait(rig.broker_way.start())
        rig.restart()
        rig.settle()
        rig.finish()
