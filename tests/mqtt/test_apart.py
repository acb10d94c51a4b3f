"""Messages that can be no record, sans-io: too large ones in pieces, ill-formed ones that end a connection once."""

from __future__ import annotations

from typing import Any

import pytest

from fastkin.errors import ProtocolError
from fastkin.mqtt import _core as _mqtt
from support.mqtt_wire import Rig, packet, publish, text, varint

PRESENT = {4: b"\x20\x02\x01\x00", 5: b"\x20\x03\x01\x00\x00"}
LIMIT = 4096


def resumed(rig: Rig, unfit: _mqtt.Unfit | None = None, **options: Any) -> _mqtt.Session:
    """A new connection of the session that the broker has kept."""
    rig.acks.reset(True)
    session = _mqtt.Session(version=rig.version, acks=rig.acks, router=rig.router, unfit=unfit, **options)
    session.feed_data(PRESENT[rig.version])
    session.take_events()
    return session


def pieces(session: _mqtt.Session, data: bytes, step: int) -> tuple[_mqtt.Apart | None, bytes]:
    """Feed `data` in steps; what was set aside, with all of its bytes."""
    told, got, at = None, b"", 0
    while at < len(data):
        flags = session.feed_data(data[at : at + step])
        at += step
        while flags & _mqtt.APART:
            told = session.apart
            got += session.take_piece()
            if session.apart_left == 0:
                session.finish_apart()
            flags = session.resume()
    return told, got


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("step", [1, 7, 65_536])
def test_a_large_message_comes_in_pieces_however_it_is_cut(version: int, step: int) -> None:
    topic = "t" * 5_000
    properties = b"\x26" + text("k") + text("v" * 200) if version == 5 else b""
    rig = Rig(version, max_packet_bytes=LIMIT)
    payload = bytes(range(256)) * 30
    told, got = pieces(
        rig.session, publish(topic, payload, qos=1, packet_id=7, version=version, properties=properties), step
    )
    assert told is not None
    assert (told.topic, told.reason, told.again, got) == (topic.encode(), None, False, payload)
    assert repr(told).startswith("<Apart 7680 bytes of b'tttt")
    assert "too large" in repr(told)
    rig.acks.settled(told.token)
    assert rig.session.take_output() == b"\x40\x02\x00\x07"
    rig.feed(publish("t", b"behind", version=version))
    assert rig.payloads == [b"behind"]


def test_a_large_message_that_comes_again_on_its_connection_is_passed_over() -> None:
    rig = Rig(4, max_packet_bytes=LIMIT, receive_maximum=1)
    payload = b"x" * 300_000
    told, got = pieces(rig.session, publish("t", payload, qos=1, packet_id=7), 50_000)
    assert told is not None
    assert got == payload
    again = publish("t", payload, qos=1, packet_id=7, flags=0x08)
    assert pieces(rig.session, again, 50_000) == (None, b"")
    assert rig.session.duplicates == 1
    assert rig.session.overruns == 1
    rig.acks.settled(told.token)
    assert rig.session.take_output() == b"\x40\x02\x00\x07"


LARGE_AND_BAD = {
    "properties without end": varint(140_000) + b"\x26" + text("k") + text("v" * 60_000) + b"\0" * 90_000,
    "unknown property": varint(3) + b"\x7f\0\0" + b"\0" * 9_000,
    "properties beyond the packet": b"\xff\xff\xff\x7f" + b"\0" * 9_000,
    "no property length": b"\xff\xff\xff\xff" + b"\0" * 9_000,
}


@pytest.mark.parametrize("name", LARGE_AND_BAD)
def test_a_large_message_that_is_ill_formed_too_ends_one_connection(name: str) -> None:
    unfit = _mqtt.Unfit()
    rig = Rig(5, max_packet_bytes=LIMIT, unfit=unfit)
    body = text("t") + b"\0\x07" + LARGE_AND_BAD[name]
    with pytest.raises(ProtocolError):
        pieces(rig.session, packet(0x32, body), 3_000)
    session = resumed(rig, unfit, max_packet_bytes=LIMIT)
    told, got = pieces(session, packet(0x3A, body), 3_000)
    assert told is not None
    assert (told.topic, told.again, got) == (b"t", True, body)
    assert told.reason
    assert told.reason in repr(told)
    rig.acks.settled(told.token)
    assert session.take_output() == b"\x40\x02\x00\x07"


def test_a_large_message_with_a_bad_topic_ends_one_connection() -> None:
    unfit = _mqtt.Unfit()
    rig = Rig(4, max_packet_bytes=LIMIT, unfit=unfit)
    body = text(b"a/\xff") + b"\0\x07" + b"p" * 9_000
    with pytest.raises(ProtocolError, match="UTF-8"):
        pieces(rig.session, packet(0x32, body), 3_000)
    told, _ = pieces(resumed(rig, unfit, max_packet_bytes=LIMIT), packet(0x3A, body), 3_000)
    assert told is not None
    assert told.topic == b"a/\xff"


def bad(number: int) -> bytes:
    return packet(0x32, text(b"a/\xff") + b"\0\x07" + b"%d" % number)


def test_different_ill_formed_messages_end_three_connections_and_then_one_a_minute() -> None:
    unfit = _mqtt.Unfit()
    rig = Rig(4)

    def ends(number: int, now: float) -> bool:
        session = resumed(rig, unfit)
        session.now = now
        try:
            told, _ = pieces(session, bad(number), 99)
        except ProtocolError:
            return True
        assert told is not None
        return False

    assert [ends(n, 100.0) for n in range(5)] == [True, True, True, False, False]
    assert not ends(0, 100.0)  # the same one again
    assert [ends(n, 161.0) for n in (10, 11)] == [True, False]
    # far more than are remembered: the first ones are new again
    assert all(ends(n, 1_000.0 + 60 * n) for n in range(20, 1_100))
    assert ends(0, 100_000.0)


def test_there_is_nothing_to_take_without_such_a_message() -> None:
    rig = Rig(4)
    assert rig.session.apart is None
    with pytest.raises(RuntimeError, match="no piece"):
        rig.session.take_piece()
    with pytest.raises(RuntimeError, match="wholly taken"):
        rig.session.finish_apart()


def test_control_packets_have_bounds_of_their_own() -> None:
    with pytest.raises(ProtocolError, match="more than 131072 bytes"):
        Rig(5).feed(b"\x90" + varint(140_000) + b"\0" * 10)
    with pytest.raises(ProtocolError, match="larger than max_packet_bytes"):
        Rig(5, max_packet_bytes=LIMIT).feed(b"\x90" + varint(5_000) + b"\0" * 10)
    rig = Rig(5)
    with pytest.raises(ProtocolError, match="1024 control packets"):
        rig.feed(b"\x90\x04\0\x01\0\x01" * 1_100)


def test_the_pool_of_messages_shrinks_after_a_peak() -> None:
    rig = Rig(4)
    for n in range(1, 20_001):
        rig.feed(publish("t", b"%d" % n, qos=1, packet_id=n))
    rig.settle_all()
    assert len(rig.session.take_output()) == 4 * 20_000
    for n in range(2_000):
        rig.seen.clear()
        rig.feed(publish("t", b"again %d" % n, qos=1, packet_id=n % 100 + 1))
        rig.settle_all()
        assert len(rig.session.take_output()) == 4
    assert rig.acks.unacked == 0
