"""The broker goes, comes back, forgets, repeats itself; and the way to it fails in every manner."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import pytest

from harness import Plant, Rig
from ledger import Ledger
from scripted import ScriptedBroker

if TYPE_CHECKING:
    from pathlib import Path


def played(count: int, **options: Any) -> ScriptedBroker:
    return ScriptedBroker(Plant(0, Ledger()).messages(count, 0), **options)


# -- the broker itself


def test_the_broker_restarts_and_keeps_the_session(tmp_path: Path) -> None:
    with Rig(tmp_path, persistence=True, emulator={"latency_ms": 50}) as rig:
        rig.flow(2500)
        for target in (400, 1100):
            rig.stored(target)
            rig.stop_broker()
            time.sleep(0.3)
            rig.broker.start()
        rig.settle()
        rig.finish()


def test_the_broker_crashes_and_forgets_the_session(tmp_path: Path) -> None:
    """What it had not handed out is lost with it; what it had is stored, although nobody can be told any more."""
    with Rig(tmp_path, emulator={"latency_ms": 100}, lossy_broker=True) as rig:
        rig.flow(2500)
        for target in (400, 900):
            rig.stored(target)
            rig.stop_broker(kill=True)
            time.sleep(0.2)
            rig.broker.start()
        rig.settle()
        books = rig.finish()
        assert books["published"] > 900


@pytest.mark.faults_full
def test_the_broker_is_away_for_a_while(tmp_path: Path) -> None:
    with Rig(tmp_path, persistence=True) as rig:
        rig.flow(1500)
        rig.stored(400)
        rig.stop_broker()
        time.sleep(3.0)
        rig.broker.start()
        rig.settle()
        rig.finish()


@pytest.mark.parametrize(
    "order", ["shuffled", *(pytest.param(order, marks=pytest.mark.faults_full) for order in ("same", "reversed"))]
)
def test_redelivery_in_order(tmp_path: Path, order: Any) -> None:
    """Connections end in mid flow, what was not acknowledged comes again, in an order of the broker's choice."""
    options = {"emulator": {"latency_ms": 150 if order == "reversed" else 30}}
    broker = played(1500, order=order, cut_after=60, cuts=6)
    with Rig(tmp_path, scripted=broker, **options) as rig:
        rig.settle()
        rig.finish(least_redelivered=1)


@pytest.mark.faults_full
def test_redelivery_while_the_first_is_in_flight(tmp_path: Path) -> None:
    """The same packet id twice on one connection, the second marked as a duplicate."""
    broker = played(1200, repeat=3)
    with Rig(tmp_path, scripted=broker, emulator={"latency_ms": 30}) as rig:
        rig.settle()
        rig.finish(least_redelivered=1)
        assert broker.repeats > 50


@pytest.mark.faults_full
def test_packet_ids_are_used_again_at_once(tmp_path: Path) -> None:
    with Rig(tmp_path, scripted=played(1200, window=3)) as rig:
        rig.settle()
        assert rig.finish()["dup"] == 0


def test_packet_ids_begin_again_after_a_lost_session(tmp_path: Path) -> None:
    """An acknowledgement of the former connection must not acknowledge another message that has its number now."""
    broker = played(1000, forget=True, cut_after=50, cuts=6, window=50)
    with Rig(tmp_path, scripted=broker, emulator={"latency_ms": 100}) as rig:
        rig.settle()
        rig.finish(least_redelivered=1)


# -- the way to it


@pytest.mark.parametrize(
    "seconds", [pytest.param(0.0, id="at-once"), pytest.param(0.02, marks=pytest.mark.faults_full, id="in-between")]
)
def test_the_connection_is_cut(tmp_path: Path, seconds: float) -> None:
    with Rig(tmp_path, emulator={"latency_ms": 50}) as rig:
        rig.flow(2500)
        for target in (300, 700, 1100, 1500, 1900):
            rig.stored(target)
            time.sleep(seconds)
            # What was in flight may be stored before the next connection is there.
            rig.until(lambda: rig.call(rig.broker_way.cut) > 0, "a connection to cut")
        rig.settle()
        rig.finish(least_redelivered=1)


@pytest.mark.faults_full
def test_the_connection_is_cut_inside_a_packet(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.flow(2000)
        for number, target in enumerate((200, 500, 800, 1100)):
            rig.stored(target)
            rig.broker_way.down.cut_in = 1 + number * 37
        rig.settle()
        rig.finish()
        assert rig.broker_way.accepted >= 2 + 3, "the fault did not bite"


@pytest.mark.faults_full
def test_the_connection_is_cut_inside_the_acknowledgements(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.flow(2000)
        for number, target in enumerate((200, 500, 800, 1100)):
            rig.stored(target)
            rig.broker_way.up.cut_in = 1 + number * 6
        rig.settle()
        rig.finish()
        assert rig.broker_way.accepted >= 2 + 3, "the fault did not bite"


@pytest.mark.faults_full
def test_the_broker_half_closes(tmp_path: Path) -> None:
    with Rig(tmp_path, emulator={"latency_ms": 50}) as rig:
        rig.flow(1500)
        for target in (300, 700):
            rig.stored(target)
            rig.until(lambda: rig.call(rig.broker_way.half_close) > 0, "a connection to close by half")
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_the_broker_trickles(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.broker_way.down.trickle = 7
        rig.flow(400, rate=600)
        rig.settle()
        assert rig.finish()["dup"] == 0


@pytest.mark.faults_full
def test_acknowledgements_trickle(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.broker_way.up.trickle = 1
        rig.flow(1000)
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_the_broker_is_slow(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.broker_way.down.delay_s = rig.broker_way.up.delay_s = 0.2
        rig.flow(1500)
        rig.settle()
        assert rig.finish()["dup"] == 0


@pytest.mark.faults_full
def test_a_black_hole_longer_than_the_keep_alive(tmp_path: Path) -> None:
    with Rig(tmp_path, broker={"keep_alive_s": 1}) as rig:
        rig.flow(1500)
        rig.stored(300)
        rig.call(rig.broker_way.hold)
        rig.logged("connection lost")
        rig.call(rig.broker_way.release)
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_a_black_hole_that_swallows(tmp_path: Path) -> None:
    """What was held is never passed on: both ends must find out by themselves."""
    with Rig(tmp_path, broker={"keep_alive_s": 1}) as rig:
        rig.flow(1500)
        rig.stored(300)
        rig.call(rig.broker_way.hold)
        rig.logged("connection lost")
        rig.call(rig.broker_way.cut)
        rig.call(rig.broker_way.release)
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_the_broker_refuses_for_a_while(tmp_path: Path) -> None:
    with Rig(tmp_path) as rig:
        rig.flow(1500)
        rig.stored(300)
        rig.wait(rig.broker_way.refuse())
        rig.call(rig.broker_way.cut)
        time.sleep(1.0)
        rig.wait(rig.broker_way.start())
        rig.settle()
        rig.finish()


@pytest.mark.faults_full
def test_a_packet_that_is_none(tmp_path: Path) -> None:
    """The first byte of a packet is flipped: the connection ends, the message comes again."""
    with Rig(tmp_path) as rig:
        for _ in range(3):
            rig.flow(200, wait=True)
            rig.settle()
            rig.broker_way.down.corrupt_in = 0
        rig.flow(300)
        rig.settle()
        rig.finish()
        assert "malformed" in rig.service.log()


@pytest.mark.faults_full
def test_the_plants_own_connection_is_cut(tmp_path: Path) -> None:
    """The plant says again what the broker did not take over: the broker hands it out twice, nothing is lost."""
    with Rig(tmp_path) as rig:
        rig.flow(2000)
        for target in (300, 800, 1300):
            rig.stored(target)
            rig.call(rig.plant_way.cut)
        rig.settle()
        rig.finish()
