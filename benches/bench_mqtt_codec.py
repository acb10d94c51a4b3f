"""Walking a read of welder PUBLISHes: bytes in, payloads to a sink, a run of acknowledgements out.

    python -m pytest benches/bench_mqtt_codec.py

Every contender gets the same bytes, must hand over the same (topic, payload) pairs, which is
checked first, and acknowledges after the whole read, as an engine acknowledges what is stored.
Ours walks to a sink in C that counts, and for an equal hand to a sink in Python. Neither sockets nor
records are in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mqtt5
import pytest
from paho.mqtt import _packet as paho_packet
from paho.mqtt.enums import MQTTProtocolVersion

from fastkin.mqtt import _core as _mqtt

MESSAGES = 1000
PAYLOAD = (
    b'{"id":"welder-0042","ts":1732190400123,"amps":187.25,"volts":24.61,"wire":7.35,'
    b'"gas":14.2,"temp":61.8,"seam":918273,"pass":3,"state":"weld","err":0,"seq":0001}'
)[:152].ljust(152)

Run = Callable[[], tuple[int, bytes]]  # messages, acknowledgements


def wire(version: int, qos: int) -> bytes:
    return b"".join(
        _mqtt.publish(
            f"plant/line{i % 7}/welder{i % 100:03d}/telemetry",
            PAYLOAD,
            qos=qos,
            packet_id=i + 1,
            version=version,
        )
        for i in range(MESSAGES)
    )


def want(version: int, qos: int) -> bytes:
    ids = range(1, MESSAGES + 1) if qos else ()
    return b"".join(b"\x40\x02" + i.to_bytes(2, "big") for i in ids)


def session(version: int, sink: Any, acks: _mqtt.AckTracker) -> _mqtt.Session:
    router = _mqtt.Router()
    router.add("plant/+/+/telemetry", sink)
    made = _mqtt.Session(version=version, acks=acks, router=router)
    made.feed_data(b"\x20\x02\x00\x00" if version == 4 else b"\x20\x03\x00\x00\x00")
    made.take_events()
    return made


def feed(codec: _mqtt.Session, data: bytes) -> None:
    """What the transport does: the copy stands for the one recv() makes."""
    at = 0
    while at < len(data):
        room = codec.get_buffer(-1)
        part = data[at : at + len(room)] if at or len(room) < len(data) else data
        room[: len(part)] = part
        codec.feed(len(part))
        at += len(part)


def ours(version: int, data: bytes, seen: list[tuple[bytes, bytes]]) -> Run:
    acks = _mqtt.AckTracker()
    sink = _mqtt.CountSink(acks)
    codec = session(version, sink, acks)
    before = 0

    def run() -> tuple[int, bytes]:
        nonlocal before
        feed(codec, data)
        sink.release()
        got, before = sink.messages - before, sink.messages
        return got, codec.take_output()

    # what the C sink is given is what a Python one sees
    ours_python(version, data, seen)()
    return run


def ours_python(version: int, data: bytes, seen: list[tuple[bytes, bytes]]) -> Run:
    acks = _mqtt.AckTracker()
    taken: list[tuple[bytes, bytes, int]] = []

    def offer(topic: bytes, payload: bytes, token: int) -> int:
        taken.append((topic, payload, token))
        return 1

    codec = session(version, _mqtt.CallbackSink(offer), acks)

    def run() -> tuple[int, bytes]:
        taken.clear()
        feed(codec, data)
        for _, _, token in taken:
            if token:
                acks.settled(token)
        seen[:] = [(topic, payload) for topic, payload, _ in taken]
        return len(taken), codec.take_output()

    return run


def rust_mqtt5(version: int, data: bytes, seen: list[tuple[bytes, bytes]]) -> Run:
    def run() -> tuple[int, bytes]:
        view = memoryview(data)
        packets: list[Any] = []
        while view:
            packet, used = mqtt5.read(view)
            packets.append(packet)
            view = view[used:]
        acks = [mqtt5.PubAckPacket(packet.packet_id).write() for packet in packets if packet.packet_id is not None]
        if not seen:
            seen[:] = [(packet.topic.encode(), packet.payload) for packet in packets]
        return len(packets), b"".join(acks)

    return run


def paho(version: int, data: bytes, seen: list[tuple[bytes, bytes]]) -> Run:
    """paho's decode_publish alone, behind the least framing: its client costs far more."""
    protocol = MQTTProtocolVersion(version)

    def run() -> tuple[int, bytes]:
        packets = []
        at = 0
        while at < len(data):
            first = data[at]
            shift = length = 0
            while True:
                at += 1
                byte = data[at]
                length |= (byte & 0x7F) << shift
                shift += 7
                if byte < 0x80:
                    break
            at += 1
            packets.append(paho_packet.decode_publish(first, data[at : at + length], protocol))
            at += length
        acks = [b"\x40\x02" + p.mid.to_bytes(2, "big") for p in packets if p.qos]
        if not seen:
            seen[:] = [(packet.topic, bytes(packet.payload)) for packet in packets]
        return len(packets), b"".join(acks)

    return run


CASES = [
    pytest.param(maker, version, qos, id=f"{name}-v{version}-qos{qos}")
    for version in (4, 5)
    for qos in (0, 1)
    for name, maker in (
        ("fastkin", ours),
        ("fastkin-python-sink", ours_python),
        ("mqtt5", rust_mqtt5),
        ("paho", paho),
    )
    if not (name == "mqtt5" and version == 4)
]


@pytest.mark.parametrize(("maker", "version", "qos"), CASES)
def test_walk(benchmark: Any, maker: Any, version: int, qos: int) -> None:
    data = wire(version, qos)
    reference: list[tuple[bytes, bytes]] = []
    paho(version, data, reference)()
    seen: list[tuple[bytes, bytes]] = []
    run = maker(version, data, seen)
    assert run() == (MESSAGES, want(version, qos))
    assert seen == reference
    benchmark.group = f"walk {MESSAGES} PUBLISHes of 152 B, MQTT {version}, QoS {qos}"
    benchmark.extra_info.update(messages=MESSAGES, nbytes=len(data))
    benchmark(run)
    if benchmark.stats is not None:
        benchmark.extra_info["us_per_message"] = benchmark.stats.stats.median / MESSAGES * 1e6
