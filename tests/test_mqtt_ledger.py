"""Acknowledgements in order: the ledger against a model that is a plain list."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastkin import _codec, _mqtt
from fastkin.errors import ProtocolError
from mqtt_wire import Rig, publish


@dataclass
class Slot:
    token: int
    packet_id: int
    qos: int
    pending: int
    born: float
    failed: bool = False
    answer_only: bool = False


class LedgerModel(RuleBasedStateMachine):
    """One subscription session over many connections, seen from the broker's side."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []  # what the sink will say next
        self.rig = Rig(4)
        self.rig.sink = _mqtt.CallbackSink(self.offer)
        self.rig.router.add("m", self.rig.sink)
        self.rig.router = _mqtt.Router()
        self.rig.router.add("m", self.rig.sink)
        self.rig.connection()
        self.early = 0
        self.slots: list[Slot] = []
        self.stale: list[Slot] = []
        self.received: set[int] = set()
        self.offered: list[int] = []
        self.clock = 0.0

    def offer(self, topic: bytes, payload: bytes, token: int) -> int:
        self.offered.append(token)
        count = payload[0]
        early = payload[1]
        if token and early:
            self.rig.ledger.settled(token, early)
        return count

    @rule(
        packet_id=st.integers(1, 6),
        qos=st.sampled_from([0, 1, 1, 1, 2]),
        count=st.integers(0, 5),
        early=st.integers(0, 5),
    )
    def publish(self, packet_id: int, qos: int, count: int, early: int) -> None:
        early = min(early, count)
        self.clock += 1.0
        self.rig.session.now = self.clock
        self.offered.clear()
        flags = self.rig.feed(publish("m", bytes((count, early)), qos=qos, packet_id=packet_id))
        assert flags & _mqtt.STALLED == 0
        if qos == 2 and any(s.qos == 2 and s.packet_id == packet_id for s in self.slots):
            assert self.offered == []
            return
        if qos == 2 and packet_id in self.received:
            assert self.offered == []
            self.slots.append(Slot(0, packet_id, 2, 0, self.clock, answer_only=True))
            return
        (token,) = self.offered
        if qos == 0:
            assert token == 0
            return
        assert token > max((s.token for s in self.slots + self.stale), default=0)
        self.slots.append(Slot(token, packet_id, qos, count - early, self.clock))

    @precondition(lambda self: any(s.pending for s in self.slots))
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from([s for s in self.slots if s.pending]))
        count = data.draw(st.integers(1, slot.pending))
        outcome = data.draw(
            st.sampled_from([_codec.STORED] * 8 + [_codec.DEAD, _codec.FILTERED, _codec.DROPPED, _codec.FAILED])
        )
        self.rig.ledger.settled(slot.token, count, outcome)
        slot.pending -= count
        if outcome == _codec.FAILED:
            slot.failed = True

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def settle_late(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.stale))
        self.rig.ledger.settled(slot.token, data.draw(st.integers(1, 9)))

    @rule()
    def take(self) -> None:
        want = b""
        while self.slots and not self.slots[0].pending and not self.slots[0].failed:
            slot = self.slots.pop(0)
            want += bytes((0x50 if slot.qos == 2 else 0x40, 2, 0, slot.packet_id))
            if slot.qos == 2 and not slot.answer_only:
                self.received.add(slot.packet_id)
            if slot.token:
                self.stale.append(slot)
        assert self.rig.ledger.take() == want

    @rule(packet_id=st.integers(1, 6))
    def pubrel(self, packet_id: int) -> None:
        if any(s.qos == 2 and s.packet_id == packet_id for s in self.slots):
            return  # only a broken broker; see test_pubrel_before_pubrec
        self.rig.feed(bytes((0x62, 2, 0, packet_id)))
        self.received.discard(packet_id)
        ready = self.rig.ledger.ready
        output = self.rig.session.take_output()
        assert output[-4:] == bytes((0x70, 2, 0, packet_id))
        for _ in range(ready):  # take_output() took these too
            slot = self.slots.pop(0)
            if slot.qos == 2 and not slot.answer_only:
                self.received.add(slot.packet_id)
            if slot.token:
                self.stale.append(slot)

    @rule(keep=st.booleans(), present=st.booleans())
    def reconnect(self, keep: bool, present: bool) -> None:
        self.rig.ledger.reset(keep)
        self.rig.connection(connected=False)
        self.rig.feed(b"\x20\x02" + bytes((present, 0)))
        self.stale += [s for s in self.slots if s.token]
        self.slots.clear()
        if not (keep and present):
            self.received.clear()

    @invariant()
    def counts_agree(self) -> None:
        ready = 0
        while ready < len(self.slots):
            if self.slots[ready].pending or self.slots[ready].failed:
                break
            ready += 1
        assert self.rig.ledger.unacked == len(self.slots)
        assert self.rig.ledger.ready == ready
        assert self.rig.ledger.failed == sum(s.failed for s in self.slots)
        assert self.rig.ledger.oldest() == (self.slots[0].born if self.slots else 0.0)


LedgerModel.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestLedgerModel = LedgerModel.TestCase


def run(ids: range | list[int], qos: int = 1) -> bytes:
    kind = 0x40 if qos == 1 else 0x50
    return b"".join(bytes((kind, 2)) + i.to_bytes(2, "big") for i in ids)


def test_completed_prefix_only() -> None:
    rig = Rig(4)
    for i in (1, 2, 3):
        rig.feed(publish("t", qos=1, packet_id=i))
    tokens = [token for _, _, token in rig.seen]
    rig.ledger.settled(tokens[2])
    rig.ledger.settled(tokens[1])
    assert (rig.ledger.unacked, rig.ledger.ready, rig.ledger.take()) == (3, 0, b"")
    rig.ledger.settled(tokens[0])
    assert (rig.ledger.unacked, rig.ledger.ready) == (3, 3)
    assert rig.ledger.take() == run([1, 2, 3])
    assert (rig.ledger.unacked, rig.ledger.ready, rig.ledger.take()) == (0, 0, b"")


def test_what_failed_is_never_acknowledged_nor_what_follows() -> None:
    rig = Rig(4)
    for i in (1, 2, 3):
        rig.feed(publish("t", qos=1, packet_id=i))
    rig.ledger.settled(1)
    rig.ledger.settled(2, 1, _codec.FAILED)
    rig.ledger.settled(3)
    assert (rig.ledger.failed, rig.ledger.ready) == (1, 1)
    assert rig.ledger.take() == run([1])
    assert rig.ledger.unacked == 2
    rig.ledger.reset(True)
    assert (rig.ledger.failed, rig.ledger.unacked) == (0, 0)


def test_stale_tokens_do_nothing() -> None:
    rig = Rig(4)
    rig.feed(publish("t", qos=1, packet_id=7))
    rig.ledger.reset(True)
    rig.connection()
    rig.feed(publish("t", qos=1, packet_id=7, flags=8))
    old, new = (token for _, _, token in rig.seen)
    rig.ledger.settled(old)
    rig.ledger.settled(old, 5, _codec.FAILED)
    assert (rig.ledger.ready, rig.ledger.failed) == (0, 0)
    rig.ledger.settled(new)
    assert rig.ledger.take() == run([7])


def test_more_settlements_than_held_is_a_bug_that_shows() -> None:
    rig = Rig(4)
    rig.feed(publish("t", qos=1, packet_id=1) + publish("t", qos=1, packet_id=2))
    with pytest.raises(RuntimeError, match="token 2 is settled more often"):
        rig.ledger.settled(2, 2)
    with pytest.raises(RuntimeError, match="never given out"):
        rig.ledger.settled(3)
    rig.ledger.settled(2)
    rig.ledger.settled(2, 0)
    rig.ledger.settled(0)
    assert rig.ledger.ready == 0
    rig.ledger.settled(1)
    assert rig.ledger.take() == run([1, 2])


def test_grows_and_shrinks_with_ids_that_wrap() -> None:
    rig = Rig(4)
    at = 1
    for burst in (1, 255, 256, 257, 5000, 20_000):
        for i in range(at, at + burst):
            rig.feed(publish("t", qos=1, packet_id=i % 65535 + 1))
        assert rig.ledger.unacked == burst
        # settled from the back: all become ready at once
        for _, _, token in reversed(rig.seen):
            rig.ledger.settled(token)
        rig.seen.clear()
        assert rig.ledger.take() == run([i % 65535 + 1 for i in range(at, at + burst)])
        at += burst
    for i in range(64 * 12):  # small takes for long: the ring shrinks and keeps what it holds
        rig.feed(publish("t", qos=1, packet_id=1) + publish("t", qos=1, packet_id=2))
        if i:
            rig.ledger.settled(rig.seen[2 * i - 1][2])
        rig.ledger.settled(rig.seen[2 * i][2])
        assert rig.ledger.take() == run([1] if i == 0 else [2, 1])
        assert rig.ledger.unacked == 1


def test_unacknowledged_messages_are_bounded() -> None:
    rig = Rig(4)
    data = publish("t", qos=1, packet_id=5)
    rig.feed(data * 65536)
    assert rig.ledger.unacked == 65536
    with pytest.raises(ProtocolError, match="65536 messages") as caught:
        rig.feed(data)
    assert caught.value.code == 0x93


def test_oldest() -> None:
    rig = Rig(4)
    assert rig.ledger.oldest() == 0.0
    for i in (1, 2):
        rig.session.now = i * 10.0
        rig.feed(publish("t", qos=1, packet_id=i))
    assert rig.ledger.oldest() == 10.0
    rig.ledger.settled(1)
    rig.ledger.take()
    assert rig.ledger.oldest() == 20.0
    rig.ledger.settled(2)
    rig.ledger.take()
    assert rig.ledger.oldest() == 0.0


def test_a_failure_settled_before_the_sink_has_answered() -> None:
    rig = Rig(4)
    rig.router = _mqtt.Router()

    def offer(topic: bytes, payload: bytes, token: int) -> int:
        rig.ledger.settled(token, 1, _codec.FAILED)
        assert rig.ledger.ready == 0
        return 1

    rig.router.add("t", _mqtt.CallbackSink(offer))
    rig.connection()
    rig.feed(publish("t", qos=1, packet_id=3))
    assert (rig.ledger.failed, rig.ledger.unacked, rig.ledger.ready) == (1, 1, 0)


def test_overruns_of_receive_maximum_are_tolerated_and_counted() -> None:
    rig = Rig(5)
    rig.connection(receive_maximum=2)
    for i in range(1, 6):
        rig.feed(publish("t", qos=1, packet_id=i, version=5))
    assert rig.session.overruns == 3
    assert len(rig.seen) == 5
