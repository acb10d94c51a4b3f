"""Golden bytes both ways, and every kind of malformed packet a broker could send."""

from __future__ import annotations

import contextlib
import mmap

import pytest

from fastkin.errors import LibraryError, ProtocolError
from fastkin.mqtt import _core as _mqtt
from support.mqtt_wire import (
    CONNACKS,
    PUBLISH_PROPERTIES,
    REASON,
    USER,
    Rig,
    corpus,
    packet,
    props,
    publish,
    text,
)


def fresh(version: int, **options: int) -> _mqtt.Session:
    return Rig(version, connected=False, **options).session


# -- what we send


def test_connect_311() -> None:
    session = fresh(4, receive_maximum=10)
    assert session.connect(client_id="ab", keep_alive=300) == (b"\x10\x0e\x00\x04MQTT\x04\x02\x01\x2c\x00\x02ab")
    assert session.connect(client_id="", keep_alive=0) == (b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x00\x00\x00")
    assert session.connect(client_id="ab", user="ü", password=b"p\xff", clean_start=False, keep_alive=6) == (
        b"\x10\x16\x00\x04MQTT\x04\xc0\x00\x06\x00\x02ab\x00\x02\xc3\xbc\x00\x02p\xff"
    )


def test_connect_5() -> None:
    session = fresh(5, receive_maximum=10_000, max_packet_bytes=65536, topic_alias_maximum=7)
    wire = session.connect(client_id="ab", clean_start=False, session_expiry=3600)
    assert wire == packet(
        0x10,
        b"\x00\x04MQTT\x05\x00\x00\x3c"
        + props(5, b"\x11\x00\x00\x0e\x10", b"\x21\x27\x10", b"\x22\x00\x07")
        + text("ab"),
    )
    # Receive Maximum is said even when it is the default of the specification
    assert fresh(5).connect(client_id="") == packet(
        0x10,
        b"\x00\x04MQTT\x05\x02\x00\x3c" + props(5, b"\x21\xff\xff") + text(""),
    )
    # 5.0 takes a password without a user
    assert fresh(5).connect(client_id="", password=b"t")[9] == 0x42


@pytest.mark.parametrize(
    ("version", "arguments", "message"),
    [
        (4, {"client_id": "", "clean_start": False}, "needs a client identifier"),
        (4, {"client_id": "a", "password": b"x"}, "only with a user"),
        (4, {"client_id": "a\0"}, "client identifier has a NUL"),
        (4, {"client_id": "\ud800"}, "UTF-8 cannot carry"),
        (4, {"client_id": "a" * 65536}, "at most 65535"),
        (5, {"client_id": "a", "keep_alive": 65536}, "keep alive"),
        (5, {"client_id": "a", "keep_alive": -1}, "keep alive"),
        (5, {"client_id": "a", "session_expiry": 1 << 32}, "session expiry"),
        (5, {"client_id": "a", "password": b"x" * 65536}, "password has more"),
    ],
)
def test_connect_refuses(version: int, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(LibraryError, match=message):
        fresh(version).connect(**arguments)  # type: ignore[arg-type]


def test_subscribe_and_unsubscribe() -> None:
    four, five = fresh(4), fresh(5)
    filters = [("a/#", 1), ("$share/g/+", 2)]
    assert four.subscribe(258, filters) == (b"\x82\x15\x01\x02\x00\x03a/#\x01\x00\x0a$share/g/+\x02")
    assert five.subscribe(258, filters) == (b"\x82\x16\x01\x02\x00\x00\x03a/#\x01\x00\x0a$share/g/+\x02")
    assert four.unsubscribe(1, ["a", "b"]) == b"\xa2\x08\x00\x01\x00\x01a\x00\x01b"
    assert five.unsubscribe(1, ["a", "b"]) == b"\xa2\x09\x00\x01\x00\x00\x01a\x00\x01b"
    many = [f"plant/{i}/#" for i in range(2000)]
    body = b"\x00\x09" + b"".join(text(one) + b"\x01" for one in many)
    assert four.subscribe(9, [(one, 1) for one in many]) == packet(0x82, body)
    for session in (four, five):
        with pytest.raises(LibraryError, match="at least one"):
            session.subscribe(1, [])
        with pytest.raises(LibraryError, match="at least one"):
            session.unsubscribe(1, [])
        with pytest.raises(LibraryError, match="packet identifier 0"):
            session.subscribe(0, filters)
        with pytest.raises(LibraryError, match="packet identifier 65536"):
            session.unsubscribe(65536, ["a"])
        with pytest.raises(LibraryError, match="QoS 3"):
            session.subscribe(1, [("a", 3)])
        with pytest.raises(LibraryError, match="last level"):
            session.subscribe(1, [("#/a", 1)])
        with pytest.raises(LibraryError, match="stand alone"):
            session.unsubscribe(1, ["a+"])


def test_ping_and_disconnect() -> None:
    assert fresh(4).pingreq() == fresh(5).pingreq() == b"\xc0\x00"
    assert fresh(4).disconnect() == fresh(5).disconnect() == b"\xe0\x00"
    assert fresh(4).disconnect(0x81) == b"\xe0\x00"
    assert fresh(5).disconnect(0x81) == b"\xe0\x01\x81"
    with pytest.raises(LibraryError, match="256"):
        fresh(5).disconnect(256)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("size", [0, 1, 100, 127, 128, 16_380, 16_384, 2_097_150, 2_097_160])
def test_publish_bytes(version: int, size: int) -> None:
    payload = bytes(size)
    for qos in (0, 1, 2):
        for flags in (0, 1, 8, 9) if qos else (0, 1):
            assert _mqtt.publish(
                "a/ä",
                payload,
                qos=qos,
                packet_id=515 if qos else 0,
                version=version,
                retain=bool(flags & 1),
                dup=bool(flags & 8),
            ) == publish("a/ä", payload, qos=qos, packet_id=515, version=version, flags=flags)


def test_publish_takes_buffers() -> None:
    want = _mqtt.publish("t", b"abc")
    assert _mqtt.publish("t", bytearray(b"abc")) == want
    assert _mqtt.publish("t", memoryview(b"xabcx")[1:4]) == want


@pytest.mark.parametrize(
    ("topic", "options", "message"),
    [
        ("", {}, "at least one character"),
        ("a/#", {}, "wildcards"),
        ("+", {}, "wildcards"),
        ("a\0", {}, "NUL"),
        ("a" * 65536, {}, "65535"),
        ("a", {"qos": 1}, "packet identifier 0"),
        ("a", {"qos": 3, "packet_id": 1}, "QoS 3"),
        ("a", {"qos": -1, "packet_id": 1}, "QoS -1"),
        ("a", {"version": 3}, "MQTT version 3"),
    ],
)
def test_publish_refuses(topic: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(LibraryError, match=message):
        _mqtt.publish(topic, b"", **options)  # type: ignore[arg-type]


def test_publish_refuses_what_no_header_can_say() -> None:
    with (
        mmap.mmap(-1, 268_435_453) as never_touched,
        pytest.raises(LibraryError, match="more than MQTT allows"),
    ):
        _mqtt.publish("t", never_touched)


# -- what we receive


@pytest.mark.parametrize("version", [4, 5])
def test_connack(version: int) -> None:
    for wire in CONNACKS[version]:
        session = fresh(version)
        assert session.feed_data(wire) == _mqtt.EVENTS
        (event,) = session.take_events()
        assert isinstance(event, _mqtt.Connack)
        assert event.session_present == (wire[-2] == 1 if version == 4 else wire[2] & 1 == 1)
        assert session.take_events() == []


def test_connack_properties() -> None:
    session = fresh(5)
    session.feed_data(CONNACKS[5][3])
    (event,) = session.take_events()
    assert isinstance(event, _mqtt.Connack)
    assert event.session_present
    assert event.code == 0
    assert event.properties == {
        "session_expiry_interval": 3600,
        "assigned_client_identifier": "auto-1",
        "server_keep_alive": 30,
        "authentication_method": "SCRAM",
        "authentication_data": b"\x00\x01",
        "response_information": "info",
        "server_reference": "other",
        "reason_string": "because",
        "receive_maximum": 20,
        "topic_alias_maximum": 10,
        "maximum_qos": 1,
        "retain_available": False,
        "user_property": [("colour", "grün"), ("colour", "grün")],
        "maximum_packet_size": 65536,
        "wildcard_subscription_available": True,
        "subscription_identifiers_available": True,
        "shared_subscription_available": False,
    }
    assert "receive_maximum': 20" in repr(event)


def test_a_311_broker_refuses_a_5_client_in_its_own_words() -> None:
    session = fresh(5)
    session.feed_data(b"\x20\x02\x00\x01")
    (event,) = session.take_events()
    assert isinstance(event, _mqtt.Connack)
    assert (event.code, event.properties) == (1, {})
    assert "does not speak this MQTT version" in _mqtt.reason_text(event.code)


def test_control_packets() -> None:
    rig = Rig(4)
    rig.feed(b"\x40\x02\x00\x05\x40\x02\x01\x00\x90\x05\x00\x01\x01\x80\x02\xb0\x02\x00\x02\xd0\x00\x40\x02\x00\x07")
    acks, suback, unsuback, pong, late = rig.session.take_events()
    assert isinstance(acks, _mqtt.Puback)
    assert isinstance(late, _mqtt.Puback)
    assert (acks.packet_ids, acks.refused) == ([5, 256], {})
    assert late.packet_ids == [7]
    assert isinstance(suback, _mqtt.Suback)
    assert (suback.packet_id, suback.codes) == (1, [1, 0x80, 2])
    assert isinstance(unsuback, _mqtt.Unsuback)
    assert (unsuback.packet_id, unsuback.codes) == (2, [])
    assert isinstance(pong, _mqtt.Pingresp)
    assert [repr(event) for event in (acks, suback, unsuback, pong)] == [
        "Puback(packet_ids=[5, 256], refused={})",
        "Suback(packet_id=1, codes=[1, 128, 2])",
        "Unsuback(packet_id=2, codes=[])",
        "Pingresp()",
    ]


def test_control_packets_5() -> None:
    rig = Rig(5)
    rig.feed(
        packet(0x40, b"\x00\x05")
        + packet(0x40, b"\x00\x06\x10")
        + packet(0x40, b"\x00\x07\x97" + props(5, REASON, USER, USER))
        + packet(0x40, b"\x00\x08\x87")
        + packet(0x90, b"\x00\x01" + props(5, USER, REASON) + b"\x01\x87")
        + packet(0xB0, b"\x00\x02" + props(5) + b"\x00\x11\x8f")
        + packet(0xE0, b"\x8e" + props(5, REASON, USER, b"\x1c" + text("there")))
        + packet(0xE0, b"\x8b")
        + packet(0xE0, b"")
    )
    acks, suback, unsuback, *ends = rig.session.take_events()
    assert isinstance(acks, _mqtt.Puback)
    assert (acks.packet_ids, acks.refused) == ([5, 6, 7, 8], {7: 0x97, 8: 0x87})
    assert isinstance(suback, _mqtt.Suback)
    assert suback.codes == [1, 0x87]
    assert isinstance(unsuback, _mqtt.Unsuback)
    assert unsuback.codes == [0, 0x11, 0x8F]
    assert [(end.code, end.properties) for end in ends if isinstance(end, _mqtt.Disconnect)] == [
        (
            0x8E,
            {
                "reason_string": "because",
                "user_property": [("colour", "grün")],
                "server_reference": "there",
            },
        ),
        (0x8B, {}),
        (0, {}),
    ]
    assert repr(ends[1]) == "Disconnect(code=139, properties={})"


@pytest.mark.parametrize("version", [4, 5])
def test_publish_is_offered(version: int) -> None:
    rig = Rig(version)
    for qos in (0, 1, 2):
        for size in (0, 1, 152, 70_000):
            rig.seen.clear()
            payload = bytes(range(256)) * (size // 256 + 1)
            number = size % 997 + 1
            rig.feed(publish("a/ä", payload[:size], qos=qos, packet_id=number, version=version))
            ((topic, got, token),) = rig.seen
            assert (topic, got, token > 0) == ("a/ä".encode(), payload[:size], qos > 0)
    assert rig.session.messages == 12


@pytest.mark.parametrize("block", PUBLISH_PROPERTIES)
def test_publish_properties_are_passed_over(block: bytes) -> None:
    rig = Rig(5)
    rig.feed(publish("t", b"payload", qos=1, version=5, properties=block))
    ((topic, payload, token),) = rig.seen
    assert (topic, payload, token > 0) == (b"t", b"payload", True)


def test_311_takes_what_brokers_really_send() -> None:
    rig = Rig(4)
    rig.feed(publish("t", b"1", flags=8))  # DUP on QoS 0 says nothing
    rig.feed(b"\x30\x84\x00\x00\x01t2")  # a length in more bytes than it needs
    assert rig.payloads == [b"1", b"2"]


@pytest.mark.parametrize("version", [4, 5])
def test_every_packet_cut_at_every_byte(version: int) -> None:
    """Bytes that come in two parts give what they give in one."""
    for wire in corpus(version):
        whole = Rig(version, topic_alias_maximum=3)
        prefix = publish("alias/one", version=version, properties=b"\x23\x00\x01")
        start = prefix if version == 5 else b""
        whole.feed(start + wire)
        want = (whole.seen, repr(whole.session.take_events()), whole.session.take_output())
        step = 1 if len(wire) < 1000 else 97
        for cut in range(0, len(wire), step):
            rig = Rig(version, topic_alias_maximum=3)
            rig.feed(start + wire[:cut])
            assert len(rig.seen) == (1 if start else 0)
            rig.feed(wire[cut:])
            assert (rig.seen, repr(rig.session.take_events()), rig.session.take_output()) == want


@pytest.mark.parametrize("version", [4, 5])
def test_every_packet_truncated_within_is_refused_or_taken(version: int) -> None:
    """The header says less than the packet needs: an error of ours, or another valid packet."""
    for wire in [*corpus(version), *CONNACKS[version]]:
        head = 1
        while wire[head] & 0x80:
            head += 1
        body = wire[head + 1 :]
        for cut in range(0, len(body), 1 if len(body) < 1000 else 97):
            rig = Rig(version, connected=wire[0] != 0x20, topic_alias_maximum=3)
            with contextlib.suppress(ProtocolError):
                rig.feed(packet(wire[0], body[:cut]))


def bad(name: str, version: int, wire: bytes, message: str, code: int = 0x81) -> object:
    return pytest.param(version, wire, message, code, id=f"v{version}-{name}")


def bad_publish(name: str, wire: bytes | None, message: str, code: int = 0x81, **options: object) -> object:
    return bad(name, 5, wire or publish("t", b"x", version=5, **options), message, code)  # type: ignore[arg-type]


BOTH = [
    entry
    for v in (4, 5)
    for entry in (
        # the name is the OASIS 5.0 statement it touches
        bad("2.1.1-type-0", v, b"\x00\x00", "only clients send", 0x82),
        bad("2.1.1-CONNECT", v, b"\x10\x00", "only clients send", 0x82),
        bad("2.1.1-SUBSCRIBE", v, b"\x82\x00", "only clients send", 0x82),
        bad("2.1.1-UNSUBSCRIBE", v, b"\xa2\x00", "only clients send", 0x82),
        bad("2.1.1-PINGREQ", v, b"\xc0\x00", "only clients send", 0x82),
        bad("2.1.3-1-CONNACK", v, b"\x21\x00", "reserved flags"),
        bad("2.1.3-1-PUBACK", v, b"\x42\x02\x00\x01", "reserved flags"),
        bad("2.1.3-1-PUBREL", v, b"\x60\x02\x00\x01", "PUBREL without its flags"),
        bad("2.1.3-1-PUBREL-3", v, b"\x63\x02\x00\x01", "reserved flags"),
        bad("2.1.3-1-SUBACK", v, b"\x91\x00", "reserved flags"),
        bad("2.1.3-1-UNSUBACK", v, b"\xb8\x00", "reserved flags"),
        bad("2.1.3-1-PINGRESP", v, b"\xd1\x00", "reserved flags"),
        bad("2.1.4-five-length-bytes", v, b"\x30\x80\x80\x80\x80\x01", "remaining length"),
        bad("2.1.4-PINGRESP-body", v, b"\xd0\x01\x00", "PINGRESP with a body"),
        bad(
            "2.2.1-3-PUBLISH-1",
            v,
            publish("t", qos=1, packet_id=0, version=v),
            "identifier 0",
            0x82,
        ),
        bad(
            "2.2.1-3-PUBLISH-2",
            v,
            publish("t", qos=2, packet_id=0, version=v),
            "identifier 0",
            0x82,
        ),
        bad("2.2.1-PUBACK-0", v, b"\x40\x02\x00\x00", "identifier 0", 0x82),
        bad("2.2.1-PUBREL-0", v, b"\x62\x02\x00\x00", "identifier 0", 0x82),
        bad("2.2.1-SUBACK-0", v, b"\x90\x04\x00\x00\x00\x00", "identifier 0", 0x82),
        bad("3.2.0-2-second-CONNACK", v, b"\x20\x02\x00\x00", "second CONNACK", 0x82),
        bad("3.3.1-4-QoS-3", v, b"\x36\x00", "QoS 3"),
        bad("3.3.1-4-QoS-3-flags", v, b"\x3f\x05\x00\x01t\x00\x01", "QoS 3"),
        bad("3.3.2-empty", v, packet(0x30, b""), "ends before its topic"),
        bad("3.3.2-half-length", v, packet(0x30, b"\x00"), "ends before its topic"),
        bad("3.3.2-topic-over", v, packet(0x30, b"\x00\x03ab"), "topic runs over"),
        bad("3.3.2-no-id", v, packet(0x32, b"\x00\x01a\x00"), "before its packet identifier"),
        bad("3.3.2-1-NUL", v, publish("a\0b", version=v), "NUL"),
        bad("3.3.2-2-hash", v, publish("a/#", version=v), "wildcard", 0x90),
        bad("3.3.2-2-plus", v, publish("+/a", version=v), "wildcard", 0x90),
        bad("3.3.2-2-long", v, publish("a" * 37 + "+" + "b" * 20, version=v), "wildcard", 0x90),
        bad("3.3.2-empty-topic", v, publish("", version=v), "neither topic nor alias", 0x82),
        bad("1.5.4-1-surrogate", v, publish(b"\xed\xa0\x80", version=v), "UTF-8"),
        bad("1.5.4-1-overlong-2", v, publish(b"\xc0\x80", version=v), "UTF-8"),
        bad("1.5.4-1-overlong-2b", v, publish(b"\xc1\xbf", version=v), "UTF-8"),
        bad("1.5.4-1-overlong-3", v, publish(b"\xe0\x9f\xbf", version=v), "UTF-8"),
        bad("1.5.4-1-overlong-4", v, publish(b"\xf0\x8f\xbf\xbf", version=v), "UTF-8"),
        bad("1.5.4-1-above-10FFFF", v, publish(b"\xf4\x90\x80\x80", version=v), "UTF-8"),
        bad("1.5.4-1-F5", v, publish(b"\xf5\x80\x80\x80", version=v), "UTF-8"),
        bad("1.5.4-1-lone-continuation", v, publish(b"abcdefgh\x80", version=v), "UTF-8"),
        bad("1.5.4-1-cut-1", v, publish(b"\xc3", version=v), "UTF-8"),
        bad("1.5.4-1-cut-2", v, publish(b"\xe2\x82", version=v), "UTF-8"),
        bad("1.5.4-1-cut-3", v, publish(b"\xf0\x9d\x84", version=v), "UTF-8"),
        bad("1.5.4-1-bad-2", v, publish(b"\xc3(", version=v), "UTF-8"),
        bad("1.5.4-1-bad-3", v, publish(b"\xe2\x82(", version=v), "UTF-8"),
        bad("1.5.4-1-bad-4", v, publish(b"\xf0\x9d\x84(", version=v), "UTF-8"),
        bad("3.4-PUBACK-short", v, b"\x40\x01\x00", "PUBACK has a wrong length"),
        bad("3.6-PUBREL-short", v, b"\x62\x00", "PUBREL has a wrong length"),
        bad("4.3.3-PUBREC", v, b"\x50\x02\x00\x01", "never sent", 0x82),
        bad("4.3.3-PUBCOMP", v, b"\x70\x02\x00\x01", "never sent", 0x82),
        bad("3.9-SUBACK-short", v, b"\x90\x01\x00", "without its packet identifier"),
        bad("3.11-UNSUBACK-short", v, b"\xb0\x00", "without its packet identifier"),
    )
]

ONLY_4 = [
    bad("3.4-PUBACK-long", 4, b"\x40\x03\x00\x01\x00", "PUBACK has a wrong length"),
    bad("3.6-PUBREL-long", 4, b"\x62\x03\x00\x01\x00", "PUBREL has a wrong length"),
    bad("3.9-SUBACK-empty", 4, b"\x90\x02\x00\x01", "without a reason code"),
    bad("3.9.3-2-code-3", 4, b"\x90\x03\x00\x01\x03", "does not exist"),
    bad("3.11-UNSUBACK-long", 4, b"\xb0\x03\x00\x01\x00", "UNSUBACK has a wrong length"),
    bad("3.14-DISCONNECT", 4, b"\xe0\x00", "3.1.1 broker", 0x82),
    bad("2.2-AUTH", 4, b"\xf0\x00", "AUTH", 0x82),
]

ONLY_5 = [
    bad("1.5.5-1-remaining-length", 5, b"\x30\x84\x00\x00\x01t2", "remaining length"),
    bad("3.3.1-2-DUP-QoS-0", 5, publish("t", version=5, flags=8), "DUP"),
    bad("3.15-AUTH", 5, b"\xf0\x00", "AUTH", 0x82),
    bad_publish("2.2.2-none", packet(0x30, b"\x00\x01t"), "ends before its properties"),
    bad_publish("2.2.2-cut-length", packet(0x30, b"\x00\x01t\x80"), "ends before its properties"),
    bad_publish("2.2.2-over", packet(0x30, b"\x00\x01t\x05abcd"), "run over the packet"),
    bad_publish("1.5.5-1-length", packet(0x30, b"\x00\x01t\x80\x00"), "property length"),
    bad_publish("1.5.5-5-bytes", packet(0x30, b"\x00\x01t\x80\x80\x80\x80\x01"), "property length"),
    bad_publish("2.2.2.2-unknown-00", None, "unknown property", properties=b"\x00"),
    bad_publish("2.2.2.2-unknown-04", None, "unknown property", properties=b"\x04\x00"),
    bad_publish("2.2.2.2-unknown-2b", None, "unknown property", properties=b"\x2b\x00"),
    bad_publish("2.2.2.2-unknown-80", None, "unknown property", properties=b"\x81\x00\x01"),
    bad_publish("2.2.2.2-unknown-ff", None, "unknown property", properties=b"\xff"),
    bad_publish("2.2.2.2-foreign", None, "not allowed", 0x82, properties=b"\x11\x00\x00\x00\x01"),
    bad_publish("2.2.2.2-twice", None, "given twice", 0x82, properties=b"\x01\x00\x01\x00"),
    bad_publish("2.2.2.2-twice-2", None, "given twice", 0x82,
                properties=b"\x02\x00\x00\x00\x01" * 2),
    bad_publish("3.3.2-format-2", None, "neither 0 nor 1", 0x82, properties=b"\x01\x02"),
    bad_publish("3.3.2-format-cut", None, "runs over", properties=b"\x01"),
    bad_publish("3.3.2-expiry-cut", None, "runs over", properties=b"\x02\x00\x00\x00"),
    bad_publish("3.3.2-type-cut", None, "runs over", properties=b"\x03\x00"),
    bad_publish("3.3.2-type-over", None, "runs over", properties=b"\x03\x00\x02a"),
    bad_publish("1.5.4-1-type", None, "not valid UTF-8", properties=b"\x03\x00\x02\xc3("),
    bad_publish("1.5.4-2-type", None, "not valid UTF-8", properties=b"\x03\x00\x01\x00"),
    bad_publish("3.3.2-14-response", None, "wildcard", 0x82, properties=b"\x08\x00\x01#"),
    bad_publish("3.3.2-correlation-over", None, "runs over", properties=b"\x09\xff\xffa"),
    bad_publish("3.3.4-6-id-0", None, "identifier 0", 0x82, properties=b"\x0b\x00"),
    bad_publish("3.3.4-6-id-cut", None, "runs over", properties=b"\x0b\x80"),
    bad_publish("1.5.5-id", None, "length is not valid", properties=b"\x0b\x80\x80\x80\x80\x01"),
    bad_publish("3.3.2-8-alias-0", None, "topic alias 0", 0x94, properties=b"\x23\x00\x00"),
    bad_publish("3.3.2-alias-cut", None, "runs over", properties=b"\x23\x00"),
    bad_publish("3.3.2-10-alias-over", None, "above what we allow", 0x94,
                properties=b"\x23\x00\x04"),
    bad("3.3.2-12-alias-unset", 5, publish("", version=5, properties=b"\x23\x00\x02"),
        "never set", 0x94),
    bad("3.3.2-2-alias-wildcard", 5, publish("#", version=5, properties=b"\x23\x00\x02"),
        "wildcard", 0x90),
    bad_publish("3.3.2-user-cut", None, "runs over", properties=b"\x26\x00\x01a\x00"),
    bad_publish("1.5.7-user", None, "not valid UTF-8", properties=b"\x26\x00\x00\x00\x01\xff"),
    bad("3.4.2-PUBACK-foreign", 5, packet(0x40, b"\x00\x01\x00\x02\x01\x00"), "not allowed", 0x82),
    bad("3.4.2-PUBACK-over", 5, packet(0x40, b"\x00\x01\x00\x05\x1f"), "run over"),
    bad("3.4.2-PUBACK-after", 5, packet(0x40, b"\x00\x01\x00\x00\x00"), "after the properties"),
    bad("3.6.2-PUBREL-twice", 5, packet(0x62, b"\x00\x01\x00" + props(5, REASON, REASON)),
        "given twice", 0x82),
    bad("3.9-SUBACK-no-props", 5, packet(0x90, b"\x00\x01"), "before its properties"),
    bad("3.9-SUBACK-props-over", 5, packet(0x90, b"\x00\x01\x01"), "run over"),
    bad("3.9-SUBACK-props-bad", 5, packet(0x90, b"\x00\x01\x01\x1f\x00"), "runs over"),
    bad("3.9-SUBACK-empty", 5, packet(0x90, b"\x00\x01\x00"), "without a reason code"),
    bad("3.9.3-code", 5, packet(0x90, b"\x00\x01\x00\x03"), "does not exist"),
    bad("3.11-UNSUBACK-empty", 5, packet(0xB0, b"\x00\x01\x00"), "without a reason code"),
    bad("3.11.3-code", 5, packet(0xB0, b"\x00\x01\x00\x01"), "does not exist"),
    bad("3.14.2-expiry", 5, packet(0xE0, b"\x00" + props(5, b"\x11\x00\x00\x00\x01")),
        "not allowed", 0x82),
    bad("3.14.2-over", 5, packet(0xE0, b"\x00\x09"), "run over"),
    bad("3.14.2-after", 5, packet(0xE0, b"\x00\x00\x00"), "after the properties"),
]  # fmt: skip


@pytest.mark.parametrize(("version", "wire", "message", "code"), BOTH + ONLY_4 + ONLY_5)
def test_malformed(version: int, wire: bytes, message: str, code: int) -> None:
    rig = Rig(version, topic_alias_maximum=3)
    good = publish("t", b"before", qos=1, packet_id=9, version=version)
    with pytest.raises(ProtocolError, match=message) as caught:
        rig.feed(good + wire)
    assert caught.value.code == code
    assert 0 <= caught.value.offset <= len(wire)
    # what was whole before it stays valid
    assert rig.payloads == [b"before"]
    rig.settle_all()
    assert rig.session.take_output() == b"\x40\x02\x00\x09"
    # and the session stays ended, for the same reason
    with pytest.raises(ProtocolError, match=message):
        rig.feed(good)
    with pytest.raises(ProtocolError, match=message):
        rig.session.resume()
    assert len(rig.seen) == 1
    # byte by byte the verdict is the same
    rig = Rig(version, topic_alias_maximum=3)
    with pytest.raises(ProtocolError, match=message):  # noqa: PT012
        for byte in wire:
            rig.feed(bytes((byte,)))


@pytest.mark.parametrize(
    ("version", "wire", "message"),
    [
        (4, publish("t"), "PUBLISH before CONNACK"),
        (5, publish("t", version=5), "PUBLISH before CONNACK"),
        (4, b"\xd0\x00", "first packet is not CONNACK"),
        (5, b"\x90\x04\x00\x01\x00\x00", "first packet is not CONNACK"),
        (4, b"\x20\x03\x00\x00\x00", "CONNACK has a wrong length"),
        (4, b"\x20\x00", "CONNACK has a wrong length"),
        (5, b"\x20\x01\x00", "CONNACK has a wrong length"),
        (5, b"\x20\x02\x00\x00", "ends before its properties"),
        (4, b"\x20\x02\x02\x00", "CONNACK has reserved flags"),
        (5, b"\x20\x03\x80\x00\x00", "CONNACK has reserved flags"),
        (4, b"\x20\x02\x01\x05", "refuses but says"),
        (5, b"\x20\x03\x01\x87\x00", "refuses but says"),
        (5, packet(0x20, b"\x00\x00\x05\x21"), "run over"),
        (5, packet(0x20, b"\x00\x00\x00\x00"), "after the properties"),
        (5, packet(0x20, b"\x00\x00" + props(5, b"\x21\x00\x00")), "Receive Maximum 0"),
        (5, packet(0x20, b"\x00\x00" + props(5, b"\x27\x00\x00\x00\x00")), "Maximum Packet Size 0"),
        (5, packet(0x20, b"\x00\x00" + props(5, b"\x24\x02")), "neither 0 nor 1"),
        (5, packet(0x20, b"\x00\x00" + props(5, b"\x23\x00\x01")), "not allowed"),
        (5, packet(0x20, b"\x00\x00" + props(5, b"\x12\x00\x01")), "runs over"),
        (5, packet(0x20, b"\x00\x00" + props(5, b"\x13\x00")), "runs over"),
    ],
)
def test_before_and_in_connack(version: int, wire: bytes, message: str) -> None:
    session = fresh(version)
    with pytest.raises(ProtocolError, match=message):
        session.feed_data(wire)


def test_a_refusal_before_connack_is_heard() -> None:
    """A broker may say why in DISCONNECT although it should not yet (MQTT-3.14.0-1)."""
    session = fresh(5)
    session.feed_data(b"\xe0\x01\x89")
    (event,) = session.take_events()
    assert isinstance(event, _mqtt.Disconnect)
    assert event.code == 0x89


@pytest.mark.parametrize("limit", [64, 1000, 70_000])
def test_what_is_too_large_is_handed_out_and_not_held(limit: int) -> None:
    for version in (4, 5):
        head = len(packet(0x30, b"\0" * limit)) - limit
        fits = publish("t", b"", version=version)
        room = limit - head - (len(fits) - 2)
        rig = Rig(version, max_packet_bytes=limit)
        for size in range(room, room - 3, -1):
            wire = publish("t", b"\0" * size, version=version)
            if len(wire) <= limit:
                break
        rig.feed(wire)
        assert len(rig.seen) == 1
        over = publish("t", b"\0" * (size + 1), version=version)
        assert len(over) == limit + 1
        assert rig.feed(over) & _mqtt.APART
        assert rig.session.apart is not None
        assert rig.session.apart.topic == b"t"
        assert rig.session.apart.nbytes == size + 1
        assert rig.session.take_piece() == b"\0" * (size + 1)
        rig.session.finish_apart()
        assert rig.session.resume() == 0
        assert len(rig.seen) == 1
        assert rig.session.messages == 2
        assert rig.session.buffer_bytes <= limit + 65536


def test_reason_texts() -> None:
    assert _mqtt.reason_text(0) == "success"
    assert _mqtt.reason_text(4) == "bad user name or password (code 0x04)"
    assert _mqtt.reason_text(5) == "not authorised (code 0x05)"
    assert _mqtt.reason_text(0x8E).startswith("session taken over")
    assert _mqtt.reason_text(0x7B) == "unknown reason code 0x7b"
