"""MQTT bytes by hand, for tests: a slow, obvious encoder, a session that records, a corpus."""

from __future__ import annotations

from typing import Any

from fastkin.mqtt import _core as _mqtt

CONNACK_4 = b"\x20\x02\x00\x00"
CONNACK_5 = b"\x20\x03\x00\x00\x00"


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        byte, value = value % 128, value // 128
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)


def packet(first: int, body: bytes) -> bytes:
    return bytes((first,)) + varint(len(body)) + body


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return len(data).to_bytes(2, "big") + data


def publish(
    topic: str | bytes,
    payload: bytes = b"",
    *,
    qos: int = 0,
    packet_id: int = 1,
    version: int = 4,
    properties: bytes = b"",
    flags: int = 0,
) -> bytes:
    body = text(topic)
    if qos:
        body += packet_id.to_bytes(2, "big")
    if version == 5:
        body += varint(len(properties)) + properties
    return packet(0x30 | qos << 1 | flags, body + payload)


def connack(version: int) -> bytes:
    return CONNACK_5 if version == 5 else CONNACK_4


class Rig:
    """A session whose only sink records what it is offered."""

    def __init__(self, version: int = 4, *topics: str, connected: bool = True, count: int = 1, **options: Any) -> None:
        self.version = version
        self.seen: list[tuple[bytes, bytes, int]] = []
        self.room = -1  # messages that are still taken; negative: all
        self.count = count  # settlements per message
        self.acks = _mqtt.AckTracker()
        self.router = _mqtt.Router()
        self.sink = _mqtt.CallbackSink(self.offer)
        for topic in topics or ("#",):
            self.router.add(topic, self.sink)
        self.session = self.connection(connected=connected, **options)

    def connection(self, *, connected: bool = True, **options: Any) -> _mqtt.Session:
        session = _mqtt.Session(version=self.version, acks=self.acks, router=self.router, **options)
        if connected:
            session.feed_data(connack(self.version))
            session.take_events()
        self.session = session
        return session

    def offer(self, topic: bytes, payload: bytes, token: int) -> int:
        if self.room == 0:
            return -1
        self.room -= 1
        self.seen.append((topic, payload, token))
        return self.count

    def feed(self, data: bytes) -> int:
        return self.session.feed_data(data)

    def settle_all(self) -> None:
        for _, _, token in self.seen:
            if token:
                self.acks.settled(token, self.count)

    @property
    def payloads(self) -> list[bytes]:
        return [payload for _, payload, _ in self.seen]


def props(version: int, *parts: bytes) -> bytes:
    """A property block with its length; nothing in 3.1.1."""
    joined = b"".join(parts)
    return varint(len(joined)) + joined if version == 5 else b""


USER = b"\x26" + text("colour") + text("grün")
REASON = b"\x1f" + text("because")

PUBLISH_PROPERTIES = [
    b"",
    b"\x01\x00",
    b"\x01\x01\x02\x00\x00\x0e\x10",
    b"\x03" + text("application/json"),
    b"\x08" + text("answers/to/me") + b"\x09" + text(b"\x00\xff\x80"),
    b"\x0b\x07" + b"\x0b\xff\xff\xff\x7f",
    USER + USER,
    b"\x02\x00\x00\x00\x00" + USER + b"\x0b\x80\x01" + b"\x01\x01",
]


def corpus(version: int) -> list[bytes]:
    """Packets a broker may send after CONNACK, one of each shape; topic aliases up to 3."""
    out = [
        publish("a", version=version),
        publish("plant/7/welder/12", b"x" * 152, version=version),
        publish("plant/ä/€/𝄞", b"{}", qos=1, packet_id=1, version=version),
        publish("a/b", b"\x00" * 130, qos=1, packet_id=65535, version=version, flags=1),
        publish("a/b", b"again", qos=1, packet_id=77, version=version, flags=8),
        publish("two", b"once", qos=2, packet_id=300, version=version),
        publish("$SYS/uptime", b"1", version=version),
        publish("big", b"y" * 20_000, qos=1, packet_id=9, version=version),
        b"\x62\x02\x01\x2c",
        b"\x40\x02\x00\x05\x40\x02\x00\x06",
        packet(0x90, b"\x00\x01" + props(version) + b"\x01\x00\x80"),
        packet(0xB0, b"\x00\x02" + (props(version) + b"\x00\x11" if version == 5 else b"")),
        b"\xd0\x00",
    ]
    if version == 5:
        out += [
            publish("p", b"z", qos=i % 3, packet_id=500 + i, version=5, properties=block)
            for i, block in enumerate(PUBLISH_PROPERTIES)
        ]
        out += [
            publish("alias/one", b"1", version=5, properties=b"\x23\x00\x01"),
            publish("", b"2", version=5, properties=b"\x23\x00\x01"),
            publish("alias/three", b"3", qos=1, version=5, properties=b"\x23\x00\x03"),
            packet(0x40, b"\x00\x07\x10"),
            packet(0x40, b"\x00\x08\x97" + props(5, REASON, USER)),
            packet(0x62, b"\x01\x2c\x00"),
            packet(0x62, b"\x01\x2c\x92" + props(5, REASON, USER, USER)),
            packet(0x90, b"\x00\x03" + props(5, REASON, USER) + b"\x02\x87"),
            packet(0xE0, b"\x8b" + props(5, REASON, b"\x1c" + text("other:1883"), USER)),
            packet(0xE0, b"\x8e"),
            packet(0xE0, b""),
        ]
    return out


CONNACKS = {
    4: [CONNACK_4, b"\x20\x02\x01\x00", b"\x20\x02\x00\x05"],
    5: [
        CONNACK_5,
        b"\x20\x02\x00\x01",
        packet(0x20, b"\x00\x87" + props(5, REASON)),
        packet(
            0x20,
            b"\x01\x00"
            + props(
                5,
                b"\x11\x00\x00\x0e\x10",
                b"\x12" + text("auto-1"),
                b"\x13\x00\x1e",
                b"\x15" + text("SCRAM"),
                b"\x16" + text(b"\x00\x01"),
                b"\x1a" + text("info"),
                b"\x1c" + text("other"),
                REASON,
                b"\x21\x00\x14",
                b"\x22\x00\x0a",
                b"\x24\x01",
                b"\x25\x00",
                USER,
                USER,
                b"\x27\x00\x01\x00\x00",
                b"\x28\x01",
                b"\x29\x01",
                b"\x2a\x00",
            ),
        ),
    ],
}
