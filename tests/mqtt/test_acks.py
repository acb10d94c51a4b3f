"""Acknowledgements in order: the AckTracker against a model that is a plain list."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fastkin import _codec
from fastkin.mqtt import _core as _mqtt
from support.mqtt_wire import Rig, publish


@dataclass(eq=False)
class Slot:
    token: int
    packet_id: int
    qos: int
    payload: bytes
    pending: int
    taken_at: float
    ordered: bool = True  # of this connection, not acknowledged
    failed: bool = False
    received: bool = False  # PUBREC was sent
    released: bool = False


class AckModel(RuleBasedStateMachine):
    """One subscription session over many connections, seen from the broker's side."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(4)
        self.rig.sink = _mqtt.CallbackSink(self.offer)
        self.rig.router = _mqtt.Router()
        self.rig.router.add("m", self.rig.sink)
        self.rig.connection()
        self.order: list[Slot] = []
        self.known: list[Slot] = []
        self.newest: dict[int, Slot] = {}
        self.stale: list[Slot] = []
        self.offered: list[int] = []
        self.moved_on = False
        self.clock = 0.0

    def offer(self, topic: bytes, payload: bytes, token: int) -> int:
        self.offered.append(token)
        count, early = payload[0], payload[1]
        if token and early:
            self.rig.acks.settled(token, early)
        return count

    def forget(self, slot: Slot) -> None:
        self.known.remove(slot)
        self.stale.append(slot)
        if self.newest.get(slot.packet_id) is slot:
            del self.newest[slot.packet_id]

    @rule(
        packet_id=st.integers(1, 4),
        qos=st.sampled_from([0, 1, 1, 1, 2, 2]),
        again=st.booleans(),
        count=st.integers(0, 2),
        early=st.integers(0, 1),
    )
    def publish(self, packet_id: int, qos: int, again: bool, count: int, early: int) -> None:
        payload = bytes((count, min(early, count)))
        self.clock += 1.0
        self.rig.session.now = self.clock
        self.offered.clear()
        wire = publish("m", payload, qos=qos, packet_id=packet_id, flags=8 if again and qos else 0)
        assert self.rig.feed(wire) & _mqtt.STALLED == 0
        if qos == 0:
            assert self.offered == [0]
            return
        held = self.newest.get(packet_id)
        if held is not None:
            if again and (held.qos, held.payload) == (qos, payload):
                assert self.offered == []
                if not held.ordered:
                    held.ordered = True
                    self.order.append(held)
                return
            if not held.ordered:
                self.forget(held)
        (token,) = self.offered
        assert token > 0
        assert token not in {s.token for s in self.known + self.stale}
        slot = Slot(token, packet_id, qos, payload, count - payload[1], self.clock)
        self.order.append(slot)
        self.known.append(slot)
        self.newest[packet_id] = slot
        self.moved_on |= not again

    @precondition(lambda self: any(s.pending for s in self.known))
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from([s for s in self.known if s.pending]))
        count = data.draw(st.integers(1, slot.pending))
        outcome = data.draw(
            st.sampled_from([_codec.STORED] * 8 + [_codec.DEAD, _codec.FILTERED, _codec.DROPPED, _codec.FAILED])
        )
        self.rig.acks.settled(slot.token, count, outcome)
        slot.pending -= count
        if outcome == _codec.FAILED:
            if slot.ordered:
                slot.failed = True
            else:
                self.forget(slot)

    @precondition(lambda self: self.stale)
    @rule(data=st.data())
    def settle_late(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.stale))
        self.rig.acks.settled(slot.token, data.draw(st.integers(1, 9)))

    def taken(self) -> bytes:
        want = b""
        while self.order and not self.order[0].pending and not self.order[0].failed:
            slot = self.order.pop(0)
            want += bytes((0x50 if slot.qos == 2 else 0x40, 2, 0, slot.packet_id))
            slot.ordered = False
            if slot.qos == 2 and self.newest.get(slot.packet_id) is slot:
                slot.received = True
            else:
                self.forget(slot)
        return want

    @rule()
    def take(self) -> None:
        assert self.rig.acks.take() == self.taken()

    @rule(packet_id=st.integers(1, 4))
    def pubrel(self, packet_id: int) -> None:
        self.rig.feed(bytes((0x62, 2, 0, packet_id)))
        slot = self.newest.get(packet_id)
        if slot is not None and slot.qos == 2:
            if slot.ordered:
                slot.released = True
                del self.newest[packet_id]
            elif slot.received:
                self.forget(slot)
        assert self.rig.session.take_output() == self.taken() + bytes((0x70, 2, 0, packet_id))

    @rule(keep=st.booleans(), present=st.sampled_from([True, True, False]))
    def reconnect(self, keep: bool, present: bool) -> None:
        self.rig.acks.reset(keep)
        self.rig.connection(connected=False)
        self.rig.feed(b"\x20\x02" + bytes((present, 0)))
        for slot in list(self.known):
            if slot.ordered:
                drop = slot.failed or slot.released or self.newest.get(slot.packet_id) is not slot
            else:
                drop = self.moved_on and not slot.received
            slot.ordered = False
            if drop or not keep or not present:
                self.forget(slot)
        self.order.clear()
        self.moved_on = False

    @invariant()
    def counts_agree(self) -> None:
        ready = 0
        while ready < len(self.order):
            if self.order[ready].pending or self.order[ready].failed:
                break
            ready += 1
        assert self.rig.acks.unacked == len(self.order)
        assert self.rig.acks.ready == ready
        assert self.rig.acks.failed == sum(s.failed for s in self.order)
        assert self.rig.acks.known == len(self.known)
        assert self.rig.acks.oldest() == (self.order[0].taken_at if self.order else 0.0)


AckModel.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestAckModel = AckModel.TestCase


def run(ids: range | list[int], qos: int = 1) -> bytes:
    kind = 0x40 if qos == 1 else 0x50
    return b"".join(bytes((kind, 2)) + i.to_bytes(2, "big") for i in ids)


def test_completed_prefix_only() -> None:
    rig = Rig(4)
    for i in (1, 2, 3):
        rig.feed(publish("t", qos=1, packet_id=i))
    tokens = [token for _, _, token in rig.seen]
    rig.acks.settled(tokens[2])
    rig.acks.settled(tokens[1])
    assert (rig.acks.unacked, rig.acks.ready, rig.acks.take()) == (3, 0, b"")
    rig.acks.settled(tokens[0])
    assert (rig.acks.unacked, rig.acks.ready) == (3, 3)
    assert rig.acks.take() == run([1, 2, 3])
    assert (rig.acks.unacked, rig.acks.ready, rig.acks.take()) == (0, 0, b"")


def test_what_failed_is_never_acknowledged_nor_what_follows() -> None:
    rig = Rig(4)
    for i in (1, 2, 3):
        rig.feed(publish("t", qos=1, packet_id=i))
    first, second, third = (token for _, _, token in rig.seen)
    rig.acks.settled(first)
    rig.acks.settled(second, 1, _codec.FAILED)
    rig.acks.settled(third)
    assert (rig.acks.failed, rig.acks.ready) == (1, 1)
    assert rig.acks.take() == run([1])
    assert rig.acks.unacked == 2
    rig.acks.reset(True)
    assert (rig.acks.failed, rig.acks.unacked) == (0, 0)


def test_stale_tokens_do_nothing() -> None:
    rig = Rig(4)
    rig.feed(publish("t", qos=1, packet_id=7))
    rig.acks.reset(True)
    rig.connection()
    rig.feed(publish("t", qos=1, packet_id=7, flags=8))
    old, new = (token for _, _, token in rig.seen)
    rig.acks.settled(old)
    rig.acks.settled(old, 5, _codec.FAILED)
    assert (rig.acks.ready, rig.acks.failed) == (0, 0)
    rig.acks.settled(new)
    assert rig.acks.take() == run([7])


def test_more_settlements_than_held_is_a_bug_that_shows() -> None:
    rig = Rig(4)
    rig.feed(publish("t", qos=1, packet_id=1) + publish("t", qos=1, packet_id=2))
    first, second = (token for _, _, token in rig.seen)
    with pytest.raises(RuntimeError, match=f"token {second} is settled more often"):
        rig.acks.settled(second, 2)
    for never in (second + (second - first), 2**64 - 1):
        with pytest.raises(RuntimeError, match="never given out"):
            rig.acks.settled(never)
    rig.acks.settled(second)
    rig.acks.settled(second, 0)
    rig.acks.settled(0)
    assert rig.acks.ready == 0
    rig.acks.settled(first)
    assert rig.acks.take() == run([1, 2])


def test_grows_and_shrinks_with_ids_that_wrap() -> None:
    rig = Rig(4)
    at = 1
    for burst in (1, 255, 256, 257, 5000, 20_000):
        for i in range(at, at + burst):
            rig.feed(publish("t", qos=1, packet_id=i % 65535 + 1))
        assert rig.acks.unacked == burst
        # settled from the back: all become ready at once
        for _, _, token in reversed(rig.seen):
            rig.acks.settled(token)
        rig.seen.clear()
        assert rig.acks.take() == run([i % 65535 + 1 for i in range(at, at + burst)])
        at += burst
    for i in range(64 * 12):  # small takes for long: the ring shrinks and keeps what it holds
        rig.feed(publish("t", qos=1, packet_id=1) + publish("t", qos=1, packet_id=2))
        if i:
            rig.acks.settled(rig.seen[2 * i - 1][2])
        rig.acks.settled(rig.seen[2 * i][2])
        assert rig.acks.take() == run([1] if i == 0 else [2, 1])
        assert rig.acks.unacked == 1


def test_unacknowledged_messages_are_bounded() -> None:
    """Reading stops before there are more than packet identifiers, and goes on as acknowledgements leave."""
    rig = Rig(4)
    wire = b"".join(publish("t", qos=1, packet_id=i % 65535 + 1) for i in range(80_000))
    assert rig.feed(wire) & _mqtt.STALLED
    most = rig.acks.unacked
    assert 32_768 < most < 65_535
    assert rig.session.stalled
    assert rig.session.crowded
    assert rig.session.resume() & _mqtt.STALLED
    assert rig.acks.unacked == len(rig.seen) == most
    for _, _, token in rig.seen[:10]:
        rig.acks.settled(token)
    acks = rig.session.take_output()
    assert rig.session.resume() & _mqtt.STALLED
    assert len(rig.seen) == most + 10
    done = 10
    while done < 80_000:
        batch = rig.seen[done : done + 20_000]
        for _, _, token in batch:
            rig.acks.settled(token)
        done += len(batch)
        acks += rig.session.take_output()
        rig.session.resume()
    assert not rig.session.stalled
    assert not rig.session.crowded
    assert acks == run([i % 65535 + 1 for i in range(80_000)])


def test_two_messages_under_one_identifier_are_told_apart() -> None:
    rig = Rig(4)
    for payload in (b"1", b"2", b"3"):
        rig.feed(publish("t", payload, qos=1, packet_id=5))
    rig.feed(publish("t", b"4", qos=1, packet_id=5, flags=8))
    assert rig.payloads == [b"1", b"2", b"3", b"4"]
    for _, _, token in reversed(rig.seen):
        assert rig.acks.ready == 0
        rig.acks.settled(token)
    assert rig.acks.take() == run([5] * 4)


def test_what_is_remembered_is_bounded_and_given_back() -> None:
    """Messages of former connections: one per identifier, whatever comes and goes."""
    rig = Rig(4)
    for connection in range(4):
        for i in range(1, 65_535):
            if rig.feed(publish("t", bytes([connection]), qos=1, packet_id=i, flags=8)) & _mqtt.STALLED:
                break
        rig.acks.reset(True)
        rig.connection(connected=False)
        rig.feed(b"\x20\x02\x01\x00")
        assert rig.acks.known <= 65_535
    rig.acks.reset(False)
    assert (rig.acks.known, rig.acks.unacked) == (0, 0)


def test_oldest() -> None:
    rig = Rig(4)
    assert rig.acks.oldest() == 0.0
    for i in (1, 2):
        rig.session.now = i * 10.0
        rig.feed(publish("t", qos=1, packet_id=i))
    assert rig.acks.oldest() == 10.0
    rig.acks.settled(rig.seen[0][2])
    rig.acks.take()
    assert rig.acks.oldest() == 20.0
    rig.acks.settled(rig.seen[1][2])
    rig.acks.take()
    assert rig.acks.oldest() == 0.0


def test_a_failure_settled_before_the_sink_has_answered() -> None:
    rig = Rig(4)
    rig.router = _mqtt.Router()

    def offer(topic: bytes, payload: bytes, token: int) -> int:
        rig.acks.settled(token, 1, _codec.FAILED)
        assert rig.acks.ready == 0
        return 1

    rig.router.add("t", _mqtt.CallbackSink(offer))
    rig.connection()
    rig.feed(publish("t", qos=1, packet_id=3))
    assert (rig.acks.failed, rig.acks.unacked, rig.acks.ready) == (1, 1, 0)


def test_overruns_of_receive_maximum_are_tolerated_and_counted() -> None:
    rig = Rig(5)
    rig.connection(receive_maximum=2)
    for i in range(1, 6):
        rig.feed(publish("t", qos=1, packet_id=i, version=5))
    assert rig.session.overruns == 3
    assert len(rig.seen) == 5
