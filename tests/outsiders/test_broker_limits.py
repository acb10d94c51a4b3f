"""What a broker says about itself in CONNACK, SUBACK and DISCONNECT is used, and told with its own cure."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

import fastkin.mqtt.handshake
from fastkin.config import Broker
from fastkin.errors import MqttError
from fastkin.mqtt._core import publish
from fastkin.mqtt.publisher import Publisher
from support.fake_broker import FakeBroker, Peer, Rig, lines, until


def connack(*properties: bytes) -> bytes:
    joined = b"".join(properties)
    return bytes((0x20, 3 + len(joined), 0, 0, len(joined))) + joined


def maximum_packet_size(size: int) -> bytes:
    return b"\x27" + size.to_bytes(4, "big")


NO_WILDCARDS = b"\x28\x00"
NO_SHARED = b"\x2a\x00"


async def packets_until(peer: Peer, count: int) -> list[list[str]]:
    return [await peer.subscribe() for _ in range(count)]


def test_subscribe_is_split_below_the_brokers_packet_size() -> None:
    filters = [(f"plant/{'x' * 30}/{n}/#", 1) for n in range(8)]
    sizes: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.connect(connack(maximum_packet_size(128)))
        left = len(filters)
        while left:
            first, body = await peer.packet()
            assert first == 0x82
            sizes.append(len(body) + 2)
            if sizes[-1] > 128:
                peer.send(b"\xe0\x02\x95\x00")  # as the standard has it: packet too large
                return
            at, codes = 3, b""
            while at < len(body):
                at += 3 + int.from_bytes(body[at : at + 2], "big")
                codes += b"\1"
            left -= len(codes)
            peer.send(bytes((0x90, 3 + len(codes))), body[:2], b"\0", codes)
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker, Rig(broker, filters, protocol="5") as rig:
            assert rig.subscriber.traffic.connects == 1
        assert max(sizes) <= 128

    asyncio.run(main())


@pytest.mark.parametrize(
    ("property_", "impossible", "words", "cure"),
    [
        (maximum_packet_size(60), "plant/" + "y" * 80, "Maximum Packet Size", "shorten the filter"),
        (NO_SHARED, "$share/workers/plant/b", "shared subscriptions not supported", "without $share/GROUP/"),
        (NO_WILDCARDS, "plant/+/b", "wildcard subscriptions not supported", "name each topic"),
    ],
    ids=["too large", "$share", "wildcard"],
)
def test_what_the_broker_cannot_do_is_not_asked_for(
    property_: bytes, impossible: str, words: str, cure: str, caplog: Any
) -> None:
    asked: list[str] = []

    async def script(peer: Peer) -> None:
        await peer.connect(connack(property_))
        while True:
            first, body = await peer.packet()
            if first != 0x82:
                return
            asked.append(body[5:-1].decode())
            if impossible in asked[-1]:
                return  # what a broker must do
            peer.send(b"\x90\x04", body[:2], b"\0\1", publish("plant/a", b"comes", version=5))

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker, [("plant/a", 1), (impossible, 1)], protocol="5")
            rig.start()
            await until(lambda: rig.got)
            await until(lambda: rig.subscriber.state == "refused")
            await asyncio.sleep(0.5)  # several times reconnect_max_s
            assert rig.subscriber.traffic.disconnects == 0
            assert not rig.subscriber.connected.is_set()
            assert words in (rig.subscriber.last_error or "")
            await rig.subscriber.close()

    asyncio.run(main())
    assert asked == ["plant/a"]
    (error,) = lines(caplog, logging.ERROR)
    assert repr(impossible) in error
    assert words in error
    assert cure in error
    assert "policy" not in error


@pytest.mark.parametrize(
    ("code", "words", "cure"),
    [
        (0x83, "implementation specific", "log"),
        (0x87, "not authorised", "policy"),
        (0x8F, "topic filter not valid", "correct it in topics"),
        (0x97, "quota", "fewer filters"),
        (0x9E, "shared subscriptions not supported", "without $share/GROUP/"),
        (0xA1, "subscription identifiers not supported", "3.1.1"),
        (0xA2, "wildcard subscriptions not supported", "name each topic"),
    ],
)
def test_each_refusal_has_its_own_cure(code: int, words: str, cure: str, caplog: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.subscribe(code)
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker, protocol="5", reconnect_max_s=30.0)
            rig.start()
            await until(lambda: rig.subscriber.state == "refused")
            await rig.subscriber.close()

    asyncio.run(main())
    (error,) = lines(caplog, logging.ERROR)
    assert words in error
    assert cure in error
    assert ("policy" in error) == (code == 0x87)


@pytest.mark.parametrize(("code", "cure"), [(0x9E, "without $share/GROUP/"), (0xA2, "name each topic")])
def test_a_filter_that_ended_the_connection_is_not_asked_for_again(code: int, cure: str, caplog: Any) -> None:
    impossible = "$share/g/plant/b" if code == 0x9E else "plant/+/c"

    async def script(peer: Peer) -> None:
        await peer.connect()
        first, body = await peer.packet()
        assert first == 0x82
        if impossible.encode() in body:
            peer.send(bytes((0xE0, 2, code, 0)))
            return
        peer.send(b"\x90\x04", body[:2], b"\0\1", publish("plant/a", b"comes", version=5))
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker, [("plant/a", 1), (impossible, 1)], protocol="5")
            rig.start()
            await until(lambda: rig.got)
            await until(lambda: rig.subscriber.state == "refused")
            assert rig.subscriber.traffic.disconnects == 1
            await rig.subscriber.close()

    asyncio.run(main())
    assert any(cure in line and impossible in line for line in lines(caplog, logging.ERROR))


def test_a_broker_that_comes_back_able_is_asked_again() -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        first, body = await peer.packet()
        assert first == 0x82
        shared = b"$share" in body
        if shared and peer.number == 1:
            peer.send(b"\xe0\x02\x9e\x00")
        elif not shared:  # without it; then the broker restarts, with another configuration
            assert peer.number == 2
            peer.send(b"\x90\x04", body[:2], b"\0\1")
            await asyncio.sleep(0.1)
        else:
            peer.send(b"\x90\x05", body[:2], b"\0\1\1")
            await peer.until_closed()

    async def main() -> None:
        filters = [("plant/a", 1), ("$share/g/plant/b", 1)]
        async with FakeBroker(script) as broker, Rig(broker, filters, protocol="5") as rig:
            assert rig.subscriber.traffic.connects == 3

    asyncio.run(main())


def test_a_packet_identifier_in_use_is_answered_with_another_at_once(caplog: Any) -> None:
    ids: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.connect()
        while True:
            first, body = await peer.packet()
            if first != 0x82:
                return
            ids.append(int.from_bytes(body[:2], "big"))
            peer.send(b"\x90\x04", body[:2], b"\0", b"\x91" if len(ids) < 4 else b"\1")

    async def main() -> None:
        async with FakeBroker(script) as broker, Rig(broker, protocol="5", reconnect_max_s=30.0) as rig:
            assert rig.subscriber.traffic.connects == 1
        assert len(set(ids)) == 4
        assert lines(caplog, logging.WARNING) == []

    asyncio.run(main())


def test_a_packet_identifier_that_is_always_in_use_is_told_in_the_end(caplog: Any) -> None:
    asked = 0

    async def script(peer: Peer) -> None:
        nonlocal asked
        await peer.connect()
        while True:
            first, body = await peer.packet()
            if first != 0x82:
                return
            asked += 1
            peer.send(b"\x90\x04", body[:2], b"\0\x91")

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker, protocol="5", reconnect_max_s=30.0)
            rig.start()
            await until(lambda: rig.subscriber.state == "refused")
            await rig.subscriber.close()

    asyncio.run(main())
    assert 3 <= asked <= 20
    (error,) = lines(caplog, logging.ERROR)
    assert "packet identifier in use" in error
    assert "policy" not in error


def test_a_suback_that_is_said_twice_ends_nothing() -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        first, body = await peer.packet()
        assert first == 0x82
        suback = b"\x90\x04" + body[:2] + b"\0\1"
        peer.send(suback, suback)
        await asyncio.sleep(0.1)
        peer.send(publish("plant/1", b"behind", version=5))
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker, Rig(broker, protocol="5") as rig:
            await until(lambda: rig.got)
            assert rig.subscriber.traffic.disconnects == 0

    asyncio.run(main())


def test_a_broker_that_answers_once_per_packet_is_asked_filter_by_filter() -> None:
    """Some small brokers say one code, whatever the SUBSCRIBE holds."""

    async def script(peer: Peer) -> None:
        await peer.connect()
        while True:
            first, body = await peer.packet()
            if first != 0x82:
                return
            peer.send(b"\x90\x03", body[:2], b"\1")

    async def main() -> None:
        filters = [(f"plant/{n}", 1) for n in range(3)]
        async with FakeBroker(script) as broker, Rig(broker, filters, protocol="3.1.1") as rig:
            assert rig.subscriber.traffic.connects == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("property_", "qos", "words"),
    [(maximum_packet_size(128), 0, "more than the broker takes, 128"), (b"\x24\x00", 1, "QoS 0 at most")],
    ids=["Maximum Packet Size", "Maximum QoS"],
)
def test_a_publisher_does_not_send_what_would_end_its_connection(property_: bytes, qos: int, words: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.connect(connack(property_))
        while True:
            first, body = await peer.packet()
            if first == 0xE0:
                return
            if len(body) + 2 > 128 or (property_[0] == 0x24 and first & 6):
                peer.send(b"\xe0\x02\x95\x00")
                return

    async def main() -> None:
        async with FakeBroker(script) as broker:
            publisher = Publisher(Broker(host=broker.host, port=broker.port, protocol="5"))
            await publisher.connect()
            with pytest.raises(MqttError, match=words):
                await publisher.publish("plant/1", bytes(200 if property_[0] == 0x27 else 1), qos)
            await publisher.publish("plant/1", b"small", 0)  # the connection stands
            await publisher.drain()
            await asyncio.sleep(0.05)
            await publisher.publish("plant/1", b"small", 0)
            await publisher.close()

    asyncio.run(main())


def test_a_filter_that_cannot_be_unsubscribed_is_told(caplog: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.subscribe()
        first, body = await peer.packet()
        assert first == 0xA2
        peer.send(b"\xb0\x04", body[:2], b"\0\x87")
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker, protocol="5")
            rig.subscriber.unsubscribe = ["former/#"]
            async with rig:
                await until(lambda: lines(caplog, logging.WARNING))
                assert rig.subscriber.traffic.disconnects == 0

    asyncio.run(main())
    (told,) = lines(caplog, logging.WARNING)
    assert "'former/#'" in told
    assert "not authorised" in told


def test_packet_identifiers_of_what_is_in_flight_differ() -> None:
    ids: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.connect()
        bodies = []
        for _ in range(6):
            first, body = await peer.packet()
            ids.append(body[:2])
            if first == 0x82:
                bodies.append(body[:2])
        peer.send(*(b"\x90\x0b" + packet_id + b"\0" + b"\1" * 8 for packet_id in bodies))
        await peer.until_closed()  # no UNSUBACK ever: nothing waits for one

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker, [(f"plant/{n}", 1) for n in range(24)], protocol="5")
            rig.subscriber.unsubscribe = [f"former/{n}" for n in range(24)]
            async with rig:
                assert rig.subscriber.traffic.connects == 1

    asyncio.run(main())
    assert len(set(ids)) == 6


def test_a_shared_subscription_over_3_1_1_that_brings_nothing_is_told(
    caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aedes, NATS, amqtt, Moquette and RabbitMQ grant $share/... as a plain topic."""
    monkeypatch.setattr(fastkin.mqtt.handshake, "SHARED_QUIET_S", 0.2)
    caplog.set_level(logging.INFO)

    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.subscribe()
        await peer.until_closed()

    async def main() -> None:
        filters = [("$share/workers/plant/#", 1)]
        async with FakeBroker(script) as broker, Rig(broker, filters, protocol="3.1.1"):
            await asyncio.sleep(0.5)

    asyncio.run(main())
    told = [line for line in lines(caplog, logging.WARNING) if "$share/workers/plant/#" in line]
    assert len(told) == 1
    assert "3.1.1" in told[0]
    assert any("$share" in line and "subscribed" in line and "3.1.1" in line for line in lines(caplog))


def test_a_shared_subscription_over_3_1_1_that_brings_something_is_not_doubted(
    caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastkin.mqtt.handshake, "SHARED_QUIET_S", 0.2)

    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.subscribe()
        peer.send(publish("plant/1", b"x", version=4))
        await peer.until_closed()

    async def main() -> None:
        filters = [("$share/workers/plant/#", 1)]
        async with FakeBroker(script) as broker, Rig(broker, filters, protocol="3.1.1"):
            await asyncio.sleep(0.5)

    asyncio.run(main())
    assert lines(caplog, logging.WARNING) == []
