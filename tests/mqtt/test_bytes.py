"""Every byte counts, wherever it stands: in a topic that is checked in wide steps, and in what tells a message that
comes again from another with its identifier."""

from __future__ import annotations

import pytest

from fastkin.errors import ProtocolError
from fastkin.mqtt import _core as _mqtt
from support.mqtt_wire import Rig, publish

BAD = {
    0x00: "NUL",
    0x23: "wildcard",
    0x2B: "wildcard",
    0x80: "UTF-8",
    0xC3: "UTF-8",
    0xFF: "UTF-8",
}


@pytest.mark.parametrize("length", range(1, 50))
def test_a_bad_byte_in_a_topic_is_found_at_every_place(length: int) -> None:
    for place in range(length):
        for bad, why in BAD.items():
            topic = bytearray(b"t" * length)
            topic[place] = bad
            rig = Rig(5, unfit=_mqtt.Unfit())
            with pytest.raises(ProtocolError, match=why):
                rig.feed(publish(bytes(topic), b"x", qos=1, version=5))
            assert rig.seen == []


@pytest.mark.parametrize("length", range(1, 50))
def test_every_other_byte_may_stand_at_every_place(length: int) -> None:
    rig = Rig(5)
    want = []
    for place in range(length):
        for good in b"\x01\x1f\x20\x22\x24\x2a\x2c\x2f\x7e\x7f":
            topic = bytearray(b"t" * length)
            topic[place] = good
            want.append(bytes(topic))
            rig.feed(publish(bytes(topic), b"x", version=5))
    assert [topic for topic, _, _ in rig.seen] == want


# around one word, one and two pairs of words, where pieces of a long message end, and where they begin
LENGTHS = [*range(70), 127, 128, 129, 144, 145, 900, *range(940, 985), 1007, 1008, 1009, 1024, 2015, 2016, 2017, 2500]


@pytest.mark.parametrize("length", LENGTHS)
def test_one_bit_tells_two_messages_apart(length: int) -> None:
    topic, payload = "plant/line/7", bytes(n % 251 for n in range(length))
    places = range(length) if length < 150 else {0, 7, 8, 15, 16, 959, 960, 975, 976, length - 9, length - 1}
    for place in places:
        if place >= length:
            continue
        other = bytearray(payload)
        other[place] ^= 1 << place % 8
        rig = Rig(5)
        rig.feed(publish(topic, payload, qos=1, version=5))
        rig.feed(publish(topic, bytes(other), qos=1, version=5, flags=8))
        assert (len(rig.seen), rig.session.duplicates) == (2, 0), f"byte {place} of {length} does not count"
        rig.feed(publish(topic, bytes(other), qos=1, version=5, flags=8))
        assert (len(rig.seen), rig.session.duplicates) == (2, 1)


@pytest.mark.parametrize("length", range(1, 40))
def test_a_topic_and_where_it_ends_count(length: int) -> None:
    """The same bytes in a row, with the border one byte further on, are another message."""
    row = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    rig = Rig(5)
    rig.feed(publish(row[:length], row[length:], qos=1, version=5))
    rig.feed(publish(row[: length + 1], row[length + 1 :], qos=1, version=5, flags=8))
    rig.feed(publish(row[: length - 1] + b"_", row[length:], qos=1, version=5, flags=8))
    assert (len(rig.seen), rig.session.duplicates) == (3, 0)
