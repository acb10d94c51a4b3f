"""The codec against mqtt5 (5.0) and paho-mqtt (3.1.1) on random packets cut at random places."""

from __future__ import annotations

from typing import Any

import mqtt5
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from paho.mqtt import _packet as paho_packet
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.exception import MQTTException

from fastkin.errors import ProtocolError
from fastkin.mqtt import _core as _mqtt
from support.mqtt_wire import Rig, packet, publish, varint

QUICK = settings(max_examples=300, deadline=None)

words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
topics = st.text(st.characters(codec="utf-8", exclude_characters="\0#+"), min_size=1, max_size=40).filter(
    lambda topic: not topic.startswith("$")
)
payloads = st.binary(max_size=200) | st.integers(0, 20_000).map(bytes)
packet_ids = st.integers(1, 65535)
pairs = st.lists(st.tuples(words, words), max_size=3)
cuts = st.lists(st.integers(1, 400), min_size=1, max_size=6)


def members(kind: Any) -> list[Any]:
    """Of an enumeration of mqtt5, which cannot be iterated."""
    return [getattr(kind, name) for name in dir(kind) if name.isupper()]


def feed_cut(rig: Rig, data: bytes, sizes: list[int]) -> None:
    at = turn = 0
    while at < len(data):
        size = sizes[turn % len(sizes)]
        rig.feed(data[at : at + size])
        at += size
        turn += 1


def read_all(data: bytes) -> list[Any]:
    view = memoryview(data)
    out = []
    while view:
        got, used = mqtt5.read(view)
        out.append(got)
        view = view[used:]
    return out


@st.composite
def publish_5(draw: st.DrawFn) -> mqtt5.PublishPacket:
    qos = draw(st.sampled_from(members(mqtt5.QoS)))
    return mqtt5.PublishPacket(
        draw(topics),
        draw(payloads),
        qos=qos,
        retain=draw(st.booleans()),
        packet_id=draw(packet_ids) if int(qos) else None,
        duplicate=draw(st.booleans()) and int(qos) > 0,
        payload_format_indicator=draw(st.integers(0, 1)),
        message_expiry_interval=draw(st.none() | st.integers(0, 2**32 - 1)),
        content_type=draw(st.none() | words),
        response_topic=draw(st.none() | topics),
        correlation_data=draw(st.none() | st.binary(max_size=30)),
        subscription_ids=draw(st.lists(st.integers(1, 268_435_455), max_size=3)),
        topic_alias=draw(st.none() | st.integers(1, 4)),
        user_properties=draw(pairs),
    )


acks_5 = st.builds(
    mqtt5.PubAckPacket,
    packet_ids,
    reason_code=st.sampled_from(members(mqtt5.PubAckReasonCode)),
    reason_str=st.none() | words,
    user_properties=pairs,
)
subacks_5 = st.builds(
    mqtt5.SubAckPacket,
    packet_ids,
    st.lists(st.sampled_from(members(mqtt5.SubAckReasonCode)), min_size=1, max_size=4),
    reason_str=st.none() | words,
    user_properties=pairs,
)
unsubacks_5 = st.builds(
    mqtt5.UnsubAckPacket,
    packet_ids,
    st.lists(st.sampled_from(members(mqtt5.UnsubAckReasonCode)), min_size=1, max_size=4),
    reason_str=st.none() | words,
    user_properties=pairs,
)
disconnects_5 = st.builds(
    mqtt5.DisconnectPacket,
    reason_code=st.sampled_from(members(mqtt5.DisconnectReasonCode)),
    server_reference=st.none() | words,
    reason_str=st.none() | words,
    user_properties=pairs,
)


@QUICK
@given(
    st.lists(
        publish_5() | acks_5 | subacks_5 | unsubacks_5 | disconnects_5 | st.just(mqtt5.PingRespPacket()),
        max_size=8,
    ),
    cuts,
)
def test_what_mqtt5_writes_we_read_alike(packets: list[Any], sizes: list[int]) -> None:
    rig = Rig(5, topic_alias_maximum=4)
    data = b"".join(one.write() for one in packets)
    assert read_all(data) == packets  # the oracle agrees with itself
    feed_cut(rig, data, sizes)

    want_messages = []
    want_acks = []
    holders: dict[int, tuple[int, str, bytes]] = {}  # packet identifier -> the message that had it last
    want_events: list[Any] = []
    for one in packets:
        if isinstance(one, mqtt5.PublishPacket):
            message = (int(one.qos), one.topic, one.payload)
            if one.duplicate and one.packet_id and holders.get(one.packet_id) == message:
                continue  # sent again, and answered once
            if one.packet_id:
                holders[one.packet_id] = message
            want_messages.append((one.topic.encode(), one.payload))
            if int(one.qos) == 1:
                want_acks.append(mqtt5.PubAckPacket(one.packet_id))  # type: ignore[arg-type]
            elif int(one.qos) == 2:
                want_acks.append(mqtt5.PubRecPacket(one.packet_id))  # type: ignore[arg-type]
        elif isinstance(one, mqtt5.PubAckPacket):
            refused = {one.packet_id: int(one.reason_code)} if int(one.reason_code) >= 0x80 else {}
            if want_events and want_events[-1][0] == "puback":
                want_events[-1][1].append(one.packet_id)
                want_events[-1][2].update(refused)
            else:
                want_events.append(("puback", [one.packet_id], refused))
        elif isinstance(one, mqtt5.DisconnectPacket):
            properties: dict[str, object] = {}
            if one.server_reference is not None:
                properties["server_reference"] = one.server_reference
            if one.reason_str is not None:
                properties["reason_string"] = one.reason_str
            if one.user_properties:
                properties["user_property"] = one.user_properties
            want_events.append(("disconnect", int(one.reason_code), properties))
        elif isinstance(one, mqtt5.PingRespPacket):
            if want_events[-1:] != [("pingresp",)]:  # a run of them is one event
                want_events.append(("pingresp",))
        else:
            want_events.append((one.packet_id, [int(code) for code in one.reason_codes]))

    assert [(topic, payload) for topic, payload, _ in rig.seen] == want_messages
    got_events: list[Any] = []
    for event in rig.session.take_events():
        match event:
            case _mqtt.Puback():
                # runs are cut where events were taken; here never
                got_events.append(("puback", event.packet_ids, event.refused))
            case _mqtt.Disconnect():
                got_events.append(("disconnect", event.code, event.properties))
            case _mqtt.Pingresp():
                got_events.append(("pingresp",))
            case _mqtt.Suback() | _mqtt.Unsuback():
                got_events.append((event.packet_id, event.codes))
    assert got_events == want_events
    rig.settle_all()
    assert read_all(rig.session.take_output()) == want_acks


@QUICK
@given(st.data())
def test_connack_of_mqtt5(data: st.DataObject) -> None:
    code = data.draw(st.sampled_from(members(mqtt5.ConnAckReasonCode)))
    one = mqtt5.ConnAckPacket(
        session_present=data.draw(st.booleans()) if int(code) == 0 else False,
        reason_code=code,
        session_expiry_interval=data.draw(st.none() | st.integers(0, 2**32 - 1)),
        assigned_client_id=data.draw(st.none() | words),
        server_keep_alive=data.draw(st.none() | st.integers(0, 65535)),
        authentication_method=data.draw(st.none() | words),
        authentication_data=data.draw(st.none() | st.binary(max_size=20)),
        response_info=data.draw(st.none() | words),
        server_reference=data.draw(st.none() | words),
        reason_str=data.draw(st.none() | words),
        receive_max=data.draw(st.integers(1, 65535)),
        topic_alias_max=data.draw(st.integers(0, 65535)),
        max_qos=data.draw(st.sampled_from([mqtt5.QoS.AT_MOST_ONCE, mqtt5.QoS.AT_LEAST_ONCE])),
        retain_available=data.draw(st.booleans()),
        max_packet_size=data.draw(st.none() | st.integers(1, 2**32 - 1)),
        wildcard_subscription_available=data.draw(st.booleans()),
        subscription_id_available=data.draw(st.booleans()),
        shared_subscription_available=data.draw(st.booleans()),
        user_properties=data.draw(pairs),
    )
    rig = Rig(5, connected=False)
    feed_cut(rig, one.write(), data.draw(cuts))
    (event,) = rig.session.take_events()
    assert isinstance(event, _mqtt.Connack)
    got = event.properties
    assert (event.session_present, event.code) == (one.session_present, int(one.reason_code))
    rows: list[tuple[str, object, object]] = [
        ("session_expiry_interval", one.session_expiry_interval, None),
        ("assigned_client_identifier", one.assigned_client_id, None),
        ("server_keep_alive", one.server_keep_alive, None),
        ("authentication_method", one.authentication_method, None),
        ("authentication_data", one.authentication_data, None),
        ("response_information", one.response_info, None),
        ("server_reference", one.server_reference, None),
        ("reason_string", one.reason_str, None),
        ("receive_maximum", one.receive_max, 65535),
        ("topic_alias_maximum", one.topic_alias_max, 0),
        ("maximum_qos", int(one.max_qos), 2),
        ("retain_available", one.retain_available, True),
        ("maximum_packet_size", one.max_packet_size, None),
        ("wildcard_subscription_available", one.wildcard_subscription_available, True),
        ("subscription_identifiers_available", one.subscription_id_available, True),
        ("shared_subscription_available", one.shared_subscription_available, True),
        ("user_property", one.user_properties, []),
    ]
    for ours, theirs, default in rows:
        assert got.get(ours, default) == theirs, ours


@QUICK
@given(st.data())
def test_mqtt5_reads_what_we_write(data: st.DataObject) -> None:
    maximum = data.draw(st.integers(1, 65535))
    limit = data.draw(st.integers(64, 268_435_460))
    aliases = data.draw(st.integers(0, 65535))
    session = _mqtt.Session(
        version=5,
        acks=_mqtt.AckTracker(),
        router=_mqtt.Router(),
        receive_maximum=maximum,
        max_packet_bytes=limit,
        topic_alias_maximum=aliases,
    )
    client_id, user = data.draw(words), data.draw(st.none() | words)
    password = data.draw(st.none() | st.binary(max_size=30))
    clean, keep_alive = data.draw(st.booleans()), data.draw(st.integers(0, 65535))
    expiry = data.draw(st.integers(0, 2**32 - 1))
    (got,) = read_all(
        session.connect(
            client_id=client_id,
            user=user,
            password=password,
            clean_start=clean,
            keep_alive=keep_alive,
            session_expiry=expiry,
        )
    )
    assert got == mqtt5.ConnectPacket(
        client_id,
        username=user,
        password=password,
        clean_start=clean,
        keep_alive=keep_alive,
        session_expiry_interval=expiry,
        receive_max=maximum,
        topic_alias_max=aliases,
    )
    number = data.draw(packet_ids)
    filters = data.draw(st.lists(st.tuples(topics, st.integers(0, 2)), min_size=1, max_size=4))
    (got,) = read_all(session.subscribe(number, filters))
    assert got == mqtt5.SubscribePacket(
        number,
        [mqtt5.TopicFilter(name, max_qos=mqtt5.QoS(qos), retain_as_published=False) for name, qos in filters],
    )
    (got,) = read_all(session.unsubscribe(number, [name for name, _ in filters]))
    assert got == mqtt5.UnsubscribePacket(number, [name for name, _ in filters])
    code = data.draw(st.sampled_from(members(mqtt5.DisconnectReasonCode)))
    (got,) = read_all(session.disconnect(int(code)))
    assert got == mqtt5.DisconnectPacket(reason_code=code)
    assert read_all(session.pingreq()) == [mqtt5.PingReqPacket()]
    qos = data.draw(st.sampled_from(members(mqtt5.QoS)))
    topic, payload = data.draw(topics), data.draw(payloads)
    retain, dup = data.draw(st.booleans()), data.draw(st.booleans()) and int(qos) > 0
    (got,) = read_all(_mqtt.publish(topic, payload, qos=int(qos), packet_id=number, version=5, retain=retain, dup=dup))
    assert got == mqtt5.PublishPacket(
        topic,
        payload,
        qos=qos,
        packet_id=number if int(qos) else None,
        retain=retain,
        duplicate=dup,
    )


def paho_decode(wire: bytes) -> paho_packet.PublishPacket:
    at = 1
    while wire[at] & 0x80:
        at += 1
    return paho_packet.decode_publish(wire[0], wire[at + 1 :], MQTTProtocolVersion.MQTTv311)


@QUICK
@given(
    st.lists(
        st.tuples(topics, payloads, st.integers(0, 2), packet_ids, st.booleans(), st.booleans()),
        max_size=8,
    ),
    cuts,
)
def test_311_publishes_as_paho_reads_them(rows: list[Any], sizes: list[int]) -> None:
    rig = Rig(4)
    wires = [
        _mqtt.publish(topic, payload, qos=qos, packet_id=number, retain=retain, dup=dup and qos > 0)
        for topic, payload, qos, number, retain, dup in rows
    ]
    feed_cut(rig, b"".join(wires), sizes)
    want = []
    acks = b""
    newest: dict[int, tuple[int, str, bytes]] = {}  # of each identifier, all of which wait
    for wire, (topic, payload, qos, number, retain, dup) in zip(wires, rows, strict=True):
        one = paho_decode(wire)
        assert (one.topic, one.payload, one.qos) == (topic.encode(), payload, qos)
        assert (one.retain, one.dup, one.mid) == (retain, dup and qos > 0, number if qos else 0)
        if qos and dup and newest.get(number) == (qos, topic, payload):
            continue  # sent again, and answered once
        if qos:
            newest[number] = (qos, topic, payload)
        want.append((one.topic, bytes(one.payload)))
        if qos:
            acks += bytes((0x40 if qos == 1 else 0x50, 2)) + number.to_bytes(2, "big")
    assert [(topic, payload) for topic, payload, _ in rig.seen] == want
    rig.settle_all()
    assert rig.session.take_output() == acks


def structurally_sound(body: bytes, flags: int, version: int) -> bool:
    """A PUBLISH as the obvious slow decoder sees it, without properties."""
    qos = flags >> 1 & 3
    if qos == 3 or (version == 5 and flags & 8 and not qos):
        return False
    length = int.from_bytes(body[:2], "big")
    if len(body) < 2 + length + (2 if qos else 0):
        return False
    try:
        topic = body[2 : 2 + length].decode()
    except UnicodeDecodeError:
        return False
    if not topic or set(topic) & set("\0#+"):
        return False
    return not qos or body[2 + length : 4 + length] != b"\0\0"


@settings(max_examples=1000, deadline=None)
@given(
    st.integers(0, 15),
    st.integers(0, 12).flatmap(lambda n: st.binary(max_size=30).map(lambda rest: n.to_bytes(2, "big") + rest))
    | st.binary(max_size=8),
)
def test_random_311_bodies(flags: int, body: bytes) -> None:
    """A random body is taken exactly when the slow decoder takes it, and then alike."""
    rig = Rig(4)
    wire = packet(0x30 | flags, body)
    if structurally_sound(body, flags, 4):
        assume(body[2:3] != b"$")
        rig.feed(wire)
        one = paho_decode(wire)
        assert [(topic, payload) for topic, payload, _ in rig.seen] == [(one.topic, one.payload)]
    else:
        with pytest.raises(ProtocolError):
            rig.feed(wire)
        assert rig.seen == []


# A block of properties as bytes: well-formed pieces, junk, repetitions
pieces = st.sampled_from(
    [
        b"\x01\x00",
        b"\x01\x01",
        b"\x01\x02",
        b"\x02\x00\x00\x00\x05",
        b"\x03\x00\x01a",
        b"\x03\x00\x01\xff",
        b"\x08\x00\x01r",
        b"\x08\x00\x01#",
        b"\x09\x00\x02\x00\xff",
        b"\x0b\x01",
        b"\x0b\x00",
        b"\x0b\x80\x01",
        b"\x0b\x80\x00",
        b"\x23\x00\x01",
        b"\x23\x00\x00",
        b"\x26\x00\x01k\x00\x01v",
        b"\x26\x00\x01k\x00\x05v",
        b"\x11\x00\x00\x00\x01",
        b"\x1f\x00\x01x",
        b"\x2b",
        b"\x26",
        b"\xff\x01",
    ]
)

ALLOWED = {
    1: "flag",
    2: "four",
    3: "text",
    8: "topic",
    9: "binary",
    11: "varint",
    35: "two",
    38: "pair",
}


class Unsound(Exception):  # noqa: N818
    """The slow decoder's verdict."""


def slow_varint(data: bytes) -> tuple[int, bytes]:
    value = 0
    for i in range(4):
        if i >= len(data):
            raise Unsound
        value += (data[i] & 127) * 128**i
        if data[i] < 128:
            if varint(value) != data[: i + 1]:
                raise Unsound
            return value, data[i + 1 :]
    raise Unsound


def slow_fixed(data: bytes, size: int) -> tuple[bytes, bytes]:
    if len(data) < size:
        raise Unsound
    return data[:size], data[size:]


def slow_text(data: bytes) -> tuple[str, bytes]:
    head, data = slow_fixed(data, 2)
    value, data = slow_fixed(data, int.from_bytes(head, "big"))
    try:
        decoded = value.decode()
    except UnicodeDecodeError:
        raise Unsound from None
    if "\0" in decoded:
        raise Unsound
    return decoded, data


def slow_properties(data: bytes) -> bytes:
    """What follows the properties of a PUBLISH."""
    length, data = slow_varint(data)
    data, rest = slow_fixed(data, length)
    seen = set()
    while data:
        ident, data = data[0], data[1:]
        kind = ALLOWED.get(ident)
        if kind is None or (ident in seen and ident not in (11, 38)):
            raise Unsound
        seen.add(ident)
        value: object = None
        if kind == "varint":
            value, data = slow_varint(data)
        elif kind in ("flag", "two", "four"):
            got, data = slow_fixed(data, {"flag": 1, "two": 2, "four": 4}[kind])
            value = int.from_bytes(got, "big")
        elif kind == "binary":
            got, data = slow_fixed(data, 2)
            value, data = slow_fixed(data, int.from_bytes(got, "big"))
        else:
            value, data = slow_text(data)
            if kind == "pair":
                value, data = slow_text(data)
        if (kind == "flag" and value not in (0, 1)) or (ident in (11, 35) and value == 0):
            raise Unsound
        if kind == "topic" and set(str(value)) & set("+#"):
            raise Unsound
    return rest


@settings(max_examples=2000, deadline=None)
@given(st.lists(pieces, max_size=5), st.sampled_from([0, 0, 0, -2, -1, 1, 2]))
def test_random_property_blocks(blocks: list[bytes], slip: int) -> None:
    """Taken exactly when the slow decoder takes them, and then as mqtt5 does."""
    joined = b"".join(blocks)
    length = len(joined) + slip
    assume(length >= 0)
    body = varint(length) + joined + b"xy"
    wire = packet(0x30, b"\x00\x01t" + body)
    rig = Rig(5, topic_alias_maximum=65535)
    try:
        payload = slow_properties(body)
    except Unsound:
        with pytest.raises(ProtocolError):
            rig.feed(wire)
        assert rig.seen == []
        return
    rig.feed(wire)
    (theirs,) = read_all(wire)
    assert rig.seen == [(b"t", payload, 0)] == [(theirs.topic.encode(), theirs.payload, 0)]


def test_oracles_are_what_they_are() -> None:
    """The oracles do refuse: otherwise the comparisons above say less than they seem to."""
    with pytest.raises((ValueError, IndexError)):
        mqtt5.read(memoryview(packet(0x30, b"\x00\x05t")))
    with pytest.raises(MQTTException):
        paho_decode(publish("")[:3] + b"\x05t")
