"""One connection: QoS 2, stalls and resumption, topic aliases, the receive buffer, misuse."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastkin import _codec
from fastkin.errors import LibraryError, ProtocolError
from fastkin.mqtt import _core as _mqtt
from support.mqtt_wire import Rig, connack, corpus, packet, props, publish

if TYPE_CHECKING:
    from collections.abc import Callable

PUBREC_7 = b"\x50\x02\x00\x07"
PUBACK_3 = b"\x40\x02\x00\x03"
PUBREL_7 = b"\x62\x02\x00\x07"
PUBCOMP_7 = b"\x70\x02\x00\x07"


# -- QoS 2


@pytest.mark.parametrize("version", [4, 5])
def test_qos_2_flow(version: int) -> None:
    rig = Rig(version)
    wire = publish("t", b"once", qos=2, packet_id=7, version=version)
    again = publish("t", b"once", qos=2, packet_id=7, version=version, flags=8)
    assert rig.feed(wire) == 0
    assert rig.session.take_output() == b""
    rig.feed(again)  # before it is stored: the PUBREC to come answers this one too
    assert (len(rig.seen), rig.acks.unacked, rig.session.duplicates) == (1, 1, 1)
    rig.settle_all()
    assert rig.session.take_output() == PUBREC_7
    assert rig.feed(again) == _mqtt.OUTPUT  # the PUBREC was lost: answered, not offered
    assert rig.session.take_output() == PUBREC_7
    assert (len(rig.seen), rig.session.duplicates) == (1, 2)
    assert rig.feed(PUBREL_7) == _mqtt.OUTPUT
    assert rig.session.take_output() == PUBCOMP_7
    rig.feed(wire)  # the identifier is free: a new message
    assert len(rig.seen) == 2
    assert rig.session.messages == 4


def test_pubrec_in_publish_order_among_pubacks() -> None:
    rig = Rig(4)
    for i, qos in enumerate((1, 2, 2, 1), 1):
        rig.feed(publish("t", qos=qos, packet_id=i))
    for at in (3, 1, 2, 0):
        rig.acks.settled(rig.seen[at][2])
    assert rig.session.take_output() == (b"\x40\x02\x00\x01\x50\x02\x00\x02\x50\x02\x00\x03\x40\x02\x00\x04")


def test_pubrel_of_an_unknown_identifier() -> None:
    rig = Rig(5)
    rig.feed(PUBREL_7)
    assert rig.session.take_output() == b"\x70\x03\x00\x07\x92"
    rig = Rig(4)
    rig.feed(PUBREL_7 + b"\x62\x02\x01\x00")
    assert rig.session.take_output() == PUBCOMP_7 + b"\x70\x02\x01\x00"


def test_pubrel_before_pubrec() -> None:
    """A broker out of step: the identifier must not stay known, or a new message would be lost."""
    rig = Rig(4)
    wire = publish("t", qos=2, packet_id=7)
    rig.feed(wire + PUBREL_7)
    assert rig.session.take_output() == PUBCOMP_7
    rig.settle_all()
    assert rig.session.take_output() == PUBREC_7
    rig.feed(wire)
    assert len(rig.seen) == 2


def test_pubrel_while_a_repetition_waits_for_its_answer() -> None:
    rig = Rig(4)
    rig.feed(publish("t", qos=2, packet_id=7))
    rig.settle_all()
    rig.session.take_output()
    rig.feed(publish("t", qos=1, packet_id=1))  # holds the run back
    rig.feed(publish("t", qos=2, packet_id=7, flags=8) + PUBREL_7)
    assert rig.session.take_output() == PUBCOMP_7
    rig.acks.settled(rig.seen[1][2])
    assert rig.session.take_output() == b"\x40\x02\x00\x01" + PUBREC_7
    rig.feed(publish("t", b"new", qos=2, packet_id=7))
    assert rig.payloads[-1] == b"new"


@pytest.mark.parametrize(("keep", "present"), [(True, 1), (True, 0), (False, 1)])
def test_qos_2_over_a_reconnect(keep: bool, present: int) -> None:
    """What was answered with PUBREC stays known only while both sides keep the session."""
    rig = Rig(4)
    stored = publish("t", b"stored", qos=2, packet_id=7, flags=8)
    waiting = publish("t", b"waiting", qos=2, packet_id=8, flags=8)
    rig.feed(stored + waiting)
    rig.acks.settled(rig.seen[0][2])
    assert rig.session.take_output() == PUBREC_7
    rig.acks.reset(keep)
    rig.connection(connected=False)
    rig.seen.clear()
    # what a resumed session replays comes in the same read as CONNACK
    rig.feed(b"\x20\x02" + bytes((present, 0)) + stored + waiting)
    known = keep and present == 1
    assert rig.payloads == ([] if known else [b"stored", b"waiting"])
    assert rig.acks.unacked == 2
    assert rig.acks.take() == (PUBREC_7 if known else b"")


@pytest.mark.parametrize("version", [4, 5])
def test_qos_1_sent_again_while_it_waits_is_answered_once(version: int) -> None:
    """Brokers with a retry interval do that in an outage. A second PUBACK would answer what has the identifier next."""
    rig = Rig(version)
    once = publish("t", b"1", qos=1, packet_id=3, version=version)
    again = publish("t", b"1", qos=1, packet_id=3, flags=8, version=version)
    rig.feed(once + again + again)
    assert rig.payloads == [b"1"]
    assert (rig.session.messages, rig.session.duplicates, rig.acks.unacked) == (3, 2, 1)
    assert rig.acks.repeated == 0
    rig.settle_all()
    assert rig.session.take_output() + rig.acks.take() == PUBACK_3
    # answered: whatever comes with the identifier is a new message [MQTT-4.3.2-2]
    rig.feed(again)
    assert len(rig.seen) == 2
    # and a broker that uses it for another message while this one waits does not say DUP
    rig.feed(publish("t", b"2", qos=1, packet_id=3, version=version))
    assert rig.payloads[1:] == [b"1", b"2"]
    rig.settle_all()
    assert rig.session.take_output() + rig.acks.take() == PUBACK_3 * 2
    assert rig.acks.repeated == 1


def again_on(rig: Rig, present: int, *wires: bytes, **options: int) -> None:
    """A new connection, whose CONNACK and what is sent again come in one read."""
    rig.acks.reset(True)
    rig.connection(connected=False, **options)
    head = b"\x20\x02" if rig.version == 4 else b"\x20\x03"
    rig.feed(head + bytes((present, 0)) + (b"" if rig.version == 4 else b"\0") + b"".join(wires))


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("stored", ["before", "away", "after"])
def test_what_waits_takes_its_place_on_a_resumed_session(version: int, stored: str) -> None:
    """Stored once, acknowledged once, in the order of the new connection."""
    rig = Rig(version)
    one = publish("t", b"1", qos=1, packet_id=3, version=version)
    two = publish("t", b"2", qos=1, packet_id=4, version=version)
    rig.feed(one + two)
    if stored == "before":
        rig.settle_all()
    rig.acks.reset(True)
    if stored == "away":
        rig.settle_all()
    assert (rig.acks.unacked, rig.acks.take()) == (0, b"")
    again = [publish("t", b"2", qos=1, packet_id=4, flags=8, version=version)]
    again += [publish("t", b"1", qos=1, packet_id=3, flags=8, version=version)] * 2
    again_on(rig, 1, *again)
    assert rig.payloads == [b"1", b"2"]
    assert (rig.acks.unacked, rig.session.duplicates, rig.acks.repeated) == (2, 3, 0)
    if stored == "after":
        assert rig.session.take_output() == b""
        rig.settle_all()
    assert rig.session.take_output() == b"\x40\x02\x00\x04" + PUBACK_3


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    ("present", "topic", "payload", "qos", "flags"),
    [
        (1, "t", b"1", 1, 0),  # no DUP
        (1, "t", b"2", 1, 8),
        (1, "u", b"1", 1, 8),
        (1, "t1", b"", 1, 8),
        (1, "t", b"1", 2, 8),
        (0, "t", b"1", 1, 8),  # the broker has no session
    ],
)
def test_what_may_be_another_message_is_taken(
    version: int, present: int, topic: str, payload: bytes, qos: int, flags: int
) -> None:
    rig = Rig(version)
    rig.feed(publish("t", b"1", qos=1, packet_id=3, version=version))
    (_, _, old) = rig.seen[0]
    again_on(rig, present, publish(topic, payload, qos=qos, packet_id=3, flags=flags, version=version))
    assert len(rig.seen) == 2
    rig.acks.settled(old)
    assert rig.acks.ready == 0
    rig.acks.settled(rig.seen[1][2])
    assert rig.session.take_output() == bytes((0x40 if qos == 1 else 0x50, 2, 0, 3))


def test_an_identifier_whose_puback_was_written_may_be_another_message() -> None:
    rig = Rig(4)
    rig.feed(publish("t", b"on", qos=1, packet_id=3))
    rig.settle_all()
    assert rig.session.take_output() == PUBACK_3
    again_on(rig, 1, publish("t", b"on", qos=1, packet_id=3, flags=8))
    assert rig.payloads == [b"on", b"on"]


def test_a_message_that_no_sink_took_is_not_remembered() -> None:
    rig = Rig(4)
    rig.room = 0
    rig.feed(publish("t", b"1", qos=1, packet_id=3))
    rig.room = -1
    again_on(rig, 1, publish("t", b"1", qos=1, packet_id=3, flags=8))
    assert rig.payloads == [b"1"]
    assert rig.acks.ready == 0
    rig.settle_all()
    assert rig.session.take_output() == PUBACK_3


def test_a_message_that_failed_is_taken_again() -> None:
    rig = Rig(4)
    rig.feed(publish("t", b"1", qos=1, packet_id=3) + publish("t", b"2", qos=1, packet_id=4))
    rig.acks.settled(rig.seen[0][2], 1, _codec.FAILED)
    rig.acks.reset(True)
    rig.acks.settled(rig.seen[1][2], 1, _codec.FAILED)  # while away
    wires = [publish("t", bytes([48 + i]), qos=1, packet_id=2 + i, flags=8) for i in (1, 2)]
    again_on(rig, 1, *wires)
    assert rig.payloads == [b"1", b"2", b"1", b"2"]
    assert (rig.acks.failed, rig.acks.ready, rig.acks.repeated) == (0, 0, 2)


def test_what_the_broker_has_no_more_is_forgotten() -> None:
    """A broker sends again what it has before what is new. Years later the identifier is another message's."""
    rig = Rig(4)
    rig.feed(publish("t", b"on", qos=1, packet_id=3))
    again_on(rig, 1, publish("t", b"new", qos=1, packet_id=4))
    assert rig.acks.known == 2
    again_on(rig, 1, publish("t", b"on", qos=1, packet_id=3, flags=8))
    assert rig.payloads == [b"on", b"new", b"on"]


def test_qos_2_identifier_used_again() -> None:
    """PUBREC was sent for A, the PUBREL never came, and the broker uses the identifier for B: both are stored."""
    rig = Rig(4)
    rig.feed(publish("t", b"A", qos=2, packet_id=7))
    rig.settle_all()
    assert rig.session.take_output() == PUBREC_7
    again_on(rig, 1, publish("t", b"B", qos=2, packet_id=7))
    assert rig.payloads == [b"A", b"B"]
    rig.settle_all()
    assert rig.session.take_output() == PUBREC_7
    rig.feed(publish("t", b"C", qos=2, packet_id=7, flags=8))  # a broker restored from an older save
    rig.feed(publish("t", b"B", qos=2, packet_id=7, flags=8))
    assert rig.payloads == [b"A", b"B", b"C", b"B"]


# -- stalls


def add_taker(router: _mqtt.Router, topic_filter: str, budget: list[int]) -> list[bytes]:
    """What a sink took: two settlements a message, while the budget that all share lasts."""
    taken: list[bytes] = []

    def take(topic: bytes, payload: bytes, token: int) -> int:
        if budget[0] == 0:
            return -1
        budget[0] -= 1
        taken.append(payload)
        return 2 if token else 0

    router.add(topic_filter, _mqtt.CallbackSink(take))
    return taken


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("sinks", [1, 3])
def test_a_stall_at_every_message(version: int, sinks: int) -> None:
    """Whatever stalls when: each sink gets its messages once, in order."""
    wires = [
        publish(f"t/{i % 3}", bytes([i]) * (i * 37), qos=i % 3, packet_id=i + 1, version=version) for i in range(9)
    ]
    tail = b"\xd0\x00" + publish("t/0", b"last", version=version)
    want = [*(bytes([i]) * (i * 37) for i in range(9)), b"last"]
    wants = [want] if sinks == 1 else [want[0::3], want[1::3], want[2::3]]
    for stop in range(10):
        for part in (False, True):
            rig = Rig(version)
            rig.router = _mqtt.Router()
            budget = [stop]
            taken = [add_taker(rig.router, "t/#" if sinks == 1 else f"t/{i}", budget) for i in range(sinks)]
            rig.connection()
            if part:
                flags = 0
                for wire in [*wires, tail]:  # the rest still arrives after the stall
                    flags = rig.feed(wire[:3]) | rig.feed(wire[3:])
            else:
                flags = rig.feed(b"".join(wires) + tail)
            assert flags & _mqtt.STALLED
            assert rig.session.stalled
            assert sum(map(len, taken)) == stop
            assert rig.session.resume() & _mqtt.STALLED  # still no room
            while rig.session.stalled:
                budget[0] = 1
                flags = rig.session.resume()
            assert flags == _mqtt.EVENTS
            assert taken == wants
            assert rig.session.messages == 10
            assert rig.acks.unacked == 6


def test_stalled_on_an_aliased_topic() -> None:
    rig = Rig(5, topic_alias_maximum=1)
    rig.feed(publish("long/topic", b"0", version=5, properties=b"\x23\x00\x01"))
    rig.room = 0
    assert rig.feed(publish("", b"1", version=5, properties=b"\x23\x00\x01")) == _mqtt.STALLED
    rig.feed(publish("new", b"2", version=5, properties=b"\x23\x00\x01"))
    rig.feed(publish("", b"3", version=5, properties=b"\x23\x00\x01"))
    rig.room = -1
    assert rig.session.resume() == 0
    assert [(topic, payload) for topic, payload, _ in rig.seen] == [
        (b"long/topic", b"0"),
        (b"long/topic", b"1"),
        (b"new", b"2"),
        (b"new", b"3"),
    ]


def test_a_reset_while_stalled() -> None:
    """The token in progress is stale then: taking the message acknowledges nothing."""
    rig = Rig(4)
    rig.room = 0
    rig.feed(publish("t", qos=1, packet_id=1))
    rig.acks.reset(True)
    rig.room = -1
    rig.session.resume()
    rig.settle_all()
    assert (rig.acks.unacked, rig.acks.take()) == (0, b"")


def test_reading_on_while_stalled_is_bounded() -> None:
    rig = Rig(4, max_packet_bytes=1000)
    rig.room = 0
    rig.feed(publish("t", b"x" * 900))
    wire = publish("t", b"y" * 900)
    taken = 1
    for _ in range(100):
        try:
            room = rig.session.get_buffer(-1)
        except BufferError:
            break
        count = len(room) // len(wire)
        room[: count * len(wire)] = wire * count
        assert rig.session.feed(count * len(wire)) == _mqtt.STALLED
        taken += count
    else:
        pytest.fail("a stalled session took everything")
    assert rig.session.buffer_bytes <= 1000 + 2 * 262144
    rig.room = -1
    rig.session.resume()
    assert not rig.session.stalled
    assert rig.session.messages == taken
    for _ in range(70):
        rig.feed(b"")
    assert rig.session.buffer_bytes <= 262144


# -- topic aliases


def test_topic_aliases() -> None:
    rig = Rig(5, topic_alias_maximum=2)
    rig.feed(publish("one", b"1", version=5, properties=b"\x23\x00\x01"))
    rig.feed(publish("two", b"2", version=5, properties=b"\x23\x00\x02"))
    rig.feed(publish("", b"3", version=5, properties=b"\x23\x00\x01"))
    rig.feed(publish("uno", b"4", version=5, properties=b"\x23\x00\x01"))
    rig.feed(publish("", b"5", qos=1, version=5, properties=b"\x23\x00\x01"))
    rig.feed(publish("", b"6", version=5, properties=b"\x23\x00\x02"))
    assert [topic for topic, _, _ in rig.seen] == [b"one", b"two", b"one", b"uno", b"uno", b"two"]


def test_no_alias_is_taken_when_none_is_allowed() -> None:
    rig = Rig(5)
    with pytest.raises(ProtocolError, match="above what we allow") as caught:
        rig.feed(publish("one", version=5, properties=b"\x23\x00\x01"))
    assert caught.value.code == 0x94


# -- the buffer


def drive(session: _mqtt.Session, data: bytes, sizes: Callable[[int], int]) -> int:
    """Feeds as a transport does: as much as there is room for, or what `sizes` says."""
    at = 0
    flags = 0
    turn = 0
    while at < len(data):
        room = session.get_buffer(-1)
        assert isinstance(room, memoryview)
        assert not room.readonly
        n = min(len(room), len(data) - at, max(1, sizes(turn)))
        room[:n] = data[at : at + n]
        flags |= session.feed(n)
        at += n
        turn += 1
    return flags


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([4, 5]),
    st.lists(st.integers(0, 400_000) | st.integers(0, 300), max_size=12),
    st.lists(st.integers(1, 200_000), min_size=1, max_size=8),
)
def test_any_sizes_in_any_reads(version: int, payloads: list[int], reads: list[int]) -> None:
    rig = Rig(version, max_packet_bytes=500_000)
    want = [bytes([i]) * size for i, size in enumerate(payloads)]
    data = b"".join(publish("a/topic", payload, version=version) for payload in want)
    drive(rig.session, data, lambda turn: reads[turn % len(reads)])
    assert rig.payloads == want
    assert rig.session.buffer_bytes <= 500_000 + 262_144


def test_the_buffer_grows_to_the_packet_and_gives_back() -> None:
    rig = Rig(4, max_packet_bytes=3_000_000)
    assert rig.session.buffer_bytes == 65536
    big = publish("t", b"x" * 2_500_000)
    drive(rig.session, big, lambda turn: 60_000)
    assert 2_500_000 < rig.session.buffer_bytes < 2_600_000
    assert len(rig.payloads[0]) == 2_500_000
    for _ in range(3):
        drive(rig.session, publish("t"), lambda turn: 100)
    assert rig.session.buffer_bytes == 65536


def test_reads_that_are_filled_get_larger_and_calm_down() -> None:
    rig = Rig(4)
    data = publish("t", b"x" * 150) * 8000
    drive(rig.session, data, lambda turn: 1 << 30)
    assert rig.session.buffer_bytes == 262_144
    for _ in range(200):
        drive(rig.session, publish("t"), lambda turn: 100)
    assert rig.session.buffer_bytes == 65536
    assert len(rig.seen) == 8200


def test_a_memoryview_outlives_its_buffer() -> None:
    rig = Rig(4)
    old = rig.session.get_buffer(-1)
    rig.feed(publish("t", b"x" * 1_000_000))
    for _ in range(100):
        rig.feed(b"")
    old[:] = b"z" * len(old)  # memory of its own by now
    rig.feed(publish("t", b"y"))
    assert rig.payloads[1] == b"y"
    session = rig.session
    del rig, session
    gc.collect()
    assert bytes(old[:2]) == b"zz"


def test_feed_data_takes_buffers() -> None:
    rig = Rig(4)
    wire = publish("t", b"abc")
    rig.session.feed_data(bytearray(wire))
    rig.session.feed_data(memoryview(b"__" + wire)[2:])
    rig.session.feed_data(b"")
    assert rig.payloads == [b"abc"] * 2
    with pytest.raises(TypeError):
        rig.session.feed_data("text")  # type: ignore[arg-type]


def test_one_huge_feed_is_taken_in_parts() -> None:
    rig = Rig(5)
    wire = publish("t", b"x" * 100, version=5)
    assert rig.feed(wire * 20_000) == 0
    assert rig.session.messages == 20_000
    assert rig.session.buffer_bytes <= 262_144


# -- misuse


def test_feed_more_than_there_is_room_for() -> None:
    rig = Rig(4)
    room = rig.session.get_buffer(-1)
    for nbytes in (len(room) + 1, -1, 1 << 62):
        with pytest.raises(ValueError, match="room for"):
            rig.session.feed(nbytes)
    assert rig.session.feed(0) == 0


def test_a_sink_must_not_feed_its_session() -> None:
    rig = Rig(4)
    rig.router = _mqtt.Router()
    errors: list[str] = []
    outputs: list[bytes] = []

    def offer(topic: bytes, payload: bytes, token: int) -> int:
        for call in (
            lambda: rig.session.feed(0),
            lambda: rig.session.feed_data(b"\xd0\x00"),
            lambda: rig.session.resume(),
            lambda: rig.session.get_buffer(-1),
        ):
            try:
                call()
            except RuntimeError as error:
                errors.append(str(error))
        # the rest of the face is whole meanwhile
        assert rig.session.take_events() == []
        outputs.append(rig.session.take_output())
        rig.router.add(f"more/{len(errors)}", _mqtt.CountSink())
        return 0

    rig.router.add("t", _mqtt.CallbackSink(offer))
    rig.connection()
    rig.feed(publish("t", qos=1) + publish("t"))
    assert len(errors) == 8
    assert outputs == [b"", b"\x40\x02\x00\x01"]
    assert all("from within feed()" in error for error in errors)
    assert rig.session.messages == 2


def test_an_exception_in_a_sink_leaves_the_message_to_be_offered_again() -> None:
    rig = Rig(4)
    rig.router = _mqtt.Router()
    seen: list[bytes] = []
    tokens: list[int] = []
    trouble: list[object] = [ZeroDivisionError(), -2, "x", None]

    def offer(topic: bytes, payload: bytes, token: int) -> int:
        if trouble:
            answer = trouble.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer  # type: ignore[return-value]
        seen.append(payload)
        tokens.append(token)
        return 1

    rig.router.add("t", _mqtt.CallbackSink(offer))
    rig.connection()
    with pytest.raises(ZeroDivisionError):
        rig.feed(publish("t", b"1", qos=1) + publish("t", b"2", qos=1, packet_id=2))
    with pytest.raises(ValueError, match="returned -2"):
        rig.session.resume()
    with pytest.raises(TypeError):
        rig.session.resume()
    with pytest.raises(TypeError):
        rig.session.resume()
    assert rig.session.stalled
    assert rig.session.resume() == 0
    assert seen == [b"1", b"2"]
    for token in tokens:
        rig.acks.settled(token)
    assert rig.session.take_output() == b"\x40\x02\x00\x01\x40\x02\x00\x02"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 3}, "MQTT version 3"),
        ({"version": 6}, "MQTT version 6"),
        ({"receive_maximum": 0}, "receive_maximum 0"),
        ({"receive_maximum": 65536}, "receive_maximum 65536"),
        ({"max_packet_bytes": 63}, "max_packet_bytes 63"),
        ({"max_packet_bytes": 268_435_461}, "max_packet_bytes"),
        ({"topic_alias_maximum": -1}, "topic_alias_maximum"),
        ({"topic_alias_maximum": 65536}, "topic_alias_maximum"),
    ],
)
def test_wrong_settings(options: dict[str, int], message: str) -> None:
    arguments = {"version": 5, **options}
    with pytest.raises(LibraryError, match=message):
        _mqtt.Session(acks=_mqtt.AckTracker(), router=_mqtt.Router(), **arguments)


def test_wrong_types() -> None:
    with pytest.raises(TypeError):
        _mqtt.Session(version=4, acks=None, router=_mqtt.Router())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        _mqtt.Session(version=4, acks=_mqtt.AckTracker(), router=object())  # type: ignore[arg-type]


def test_init_may_run_again() -> None:
    rig = Rig(4)
    for thing in (rig.session, rig.acks, rig.router, rig.sink):
        thing.__init__()
    rig.feed(publish("t", b"1"))
    assert rig.payloads == [b"1"]


def test_count_sink() -> None:
    acks = _mqtt.AckTracker()
    router = _mqtt.Router()
    waiting = _mqtt.CountSink(acks)
    free = _mqtt.CountSink()
    router.add("a", waiting)
    router.add("b", free)
    session = _mqtt.Session(version=4, acks=acks, router=router)
    session.feed_data(connack(4))
    session.feed_data(publish("b", b"12", qos=1, packet_id=1) + publish("a", b"345"))
    session.feed_data(publish("a", b"6", qos=1, packet_id=2) + publish("a", qos=1, packet_id=3))
    assert (waiting.messages, waiting.nbytes, free.messages, free.nbytes) == (3, 4, 1, 2)
    assert acks.ready == 1
    waiting.release()
    waiting.release()
    assert session.take_output() == b"".join(b"\x40\x02\x00" + bytes([i]) for i in (1, 2, 3))


def test_cycles_through_a_callback_are_collected() -> None:
    class Owner:
        def __init__(self) -> None:
            self.router = _mqtt.Router()
            self.router.add("t", _mqtt.CallbackSink(self.offer))
            self.session = _mqtt.Session(version=4, acks=_mqtt.AckTracker(), router=self.router)

        def offer(self, topic: bytes, payload: bytes, token: int) -> int:
            return 0

    gone = weakref.ref(Owner())
    gc.collect()
    assert gone() is None


def test_nothing_but_a_result_or_a_protocol_error() -> None:
    """Events in the same read as STALLED and a later fault keep their order."""
    rig = Rig(4)
    rig.room = 0
    flags = rig.feed(b"\xd0\x00" + publish("t", b"1") + b"\x90\x03\x00\x01\x00" + b"\x36\x00")
    assert flags == _mqtt.EVENTS | _mqtt.STALLED
    assert len(rig.session.take_events()) == 1
    rig.room = -1
    with pytest.raises(ProtocolError, match="QoS 3"):
        rig.session.resume()
    assert rig.payloads == [b"1"]
    assert len(rig.session.take_events()) == 1


@pytest.mark.parametrize("version", [4, 5])
def test_the_whole_corpus_in_one_stream(version: int) -> None:
    """All packets one behind the other, in reads of every small size."""
    data = b"".join(corpus(version))
    whole = Rig(version, topic_alias_maximum=3)
    whole.feed(data)
    for size in [*range(1, 20), 1000, 65_000]:
        rig = Rig(version, topic_alias_maximum=3)
        drive(rig.session, data, lambda turn, size=size: size)  # type: ignore[misc]
        assert rig.seen == whole.seen
        assert rig.session.messages == whole.session.messages
    assert whole.session.messages == sum(wire[0] >> 4 == 3 for wire in corpus(version))


def test_suback_in_a_packet_with_properties_is_not_a_publish() -> None:
    rig = Rig(5)
    rig.feed(packet(0x90, b"\x12\x34" + props(5) + b"\x00"))
    (event,) = rig.session.take_events()
    assert isinstance(event, _mqtt.Suback)
    assert (event.packet_id, event.codes) == (0x1234, [0])


# -- what is remembered of topics, and of what can never be a record


def test_the_topics_of_aliases_are_bounded() -> None:
    rig = Rig(5, topic_alias_maximum=65_535)
    wires = [
        publish("t" * 60_000, qos=1, packet_id=i, version=5, properties=b"\x23" + i.to_bytes(2, "big"))
        for i in range(1, 100)
        for _ in range(2)  # set anew: no more
    ]
    with pytest.raises(ProtocolError, match="aliases are more than 1 MiB") as caught:
        rig.feed(b"".join(wires))
    assert caught.value.code == 0x97
    assert len(rig.seen) < 2 * (1 << 20) // 60_000 + 2


def take_apart(rig: Rig) -> int:
    """All pieces of the message in hand; its token."""
    while rig.session.apart_left:
        rig.session.take_piece()
        rig.session.resume()
    apart = rig.session.apart
    assert apart is not None
    rig.session.finish_apart()
    return apart.token


def test_a_message_too_large_is_known_by_its_beginning_on_its_own_connection_only() -> None:
    rig = Rig(4, max_packet_bytes=20_000)
    body = b"x" * 30_000
    once = publish("t", body, qos=1, packet_id=3)
    again = publish("t", body, qos=1, packet_id=3, flags=8)
    rig.feed(once)
    first = take_apart(rig)
    rig.feed(again)  # the PUBACK to come answers it too
    assert (rig.session.apart, rig.acks.unacked, rig.session.duplicates) == (None, 1, 1)
    rig.feed(publish("t", b"small", qos=1, packet_id=3, flags=8))
    assert rig.payloads == [b"small"]
    again_on(rig, 1, again, max_packet_bytes=20_000)  # its end may be another's: set aside once more
    second = take_apart(rig)
    assert second != first
    rig.acks.settled(first)
    assert rig.acks.ready == 0
    rig.acks.settled(second)
    assert rig.session.take_output() == PUBACK_3


def test_a_message_too_large_waits_for_acknowledgements_too() -> None:
    rig = Rig(4, max_packet_bytes=20_000)
    rig.feed(b"".join(publish("t", qos=1, packet_id=i % 65_535 + 1) for i in range(60_000)))
    assert not rig.session.stalled
    assert rig.feed(publish("t", b"x" * 30_000, qos=1, packet_id=60_001)) & _mqtt.STALLED
    assert rig.session.crowded
    rig.settle_all()
    rig.session.take_output()
    rig.session.resume()
    rig.acks.settled(take_apart(rig))
    assert rig.session.take_output() == b"\x40\x02" + (60_001).to_bytes(2, "big")
