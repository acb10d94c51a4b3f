"""Packet identifiers are the broker's, and may be another message's: what comes again is known by its content."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from support.fake_broker import FakeBroker, Rig, until
from support.mqtt_wire import publish

if TYPE_CHECKING:
    from support.fake_broker import Peer

PROTOCOLS = pytest.mark.parametrize("protocol", ["3.1.1", "5"])


def version(protocol: str) -> int:
    return 5 if protocol == "5" else 4


async def take(peer: Peer, *, present: bool) -> None:
    """Take CONNECT and SUBSCRIBE, and say whether the broker has the session."""
    first, body = await peer.packet()
    assert first == 0x10
    peer.version = body[6]
    peer.send(b"\x20\x03" if peer.version == 5 else b"\x20\x02", bytes((present, 0)), b"\0" * (peer.version == 5))
    await peer.subscribe()


async def answers(peer: Peer, count: int) -> list[tuple[int, int]]:
    """(type, packet identifier) of the next `count` packets."""
    got = []
    while len(got) < count:
        first, body = await peer.packet()
        if first & 0xF0 in {0x40, 0x50, 0x70}:
            got.append((first & 0xF0, int.from_bytes(body[:2], "big")))
    return got


def message(protocol: str, payload: bytes, packet_id: int, *, qos: int = 1, again: bool = False) -> bytes:
    return publish("plant/1", payload, qos=qos, packet_id=packet_id, version=version(protocol), flags=8 if again else 0)


async def settle_when(rig: Rig, count: int) -> None:
    await until(lambda: len(rig.got) >= count)
    rig.settle_all()
    rig.subscriber.flush_acks()


@PROTOCOLS
@pytest.mark.parametrize("qos", [1, 2])
async def test_a_link_that_flaps_while_nothing_can_be_stored(protocol: Any, qos: int) -> None:
    """Six cuts: one copy of each message is held, and each is acknowledged once, on the last connection."""
    ids = range(1, 101)
    done = asyncio.Event()
    got: list[tuple[int, int]] = []

    async def script(peer: Peer) -> None:
        await take(peer, present=peer.number > 1)
        peer.send(*(message(protocol, b"%d" % i, i, qos=qos, again=peer.number > 1) for i in ids))
        if peer.number < 7:
            await peer.writer.drain()
            await until(lambda: rig.acks.unacked == len(ids))
            return
        got.extend(await answers(peer, len(ids)))
        done.set()
        await peer.until_closed()

    async with FakeBroker(script) as broker:
        rig = Rig(broker, protocol=protocol)
        async with rig:
            await until(lambda: broker.connections == 7 and rig.acks.unacked == len(ids), 20)
            assert rig.payloads == [b"%d" % i for i in ids]
            await settle_when(rig, len(ids))
            async with asyncio.timeout(5):
                await done.wait()
    assert got == [(0x40 if qos == 1 else 0x50, i) for i in ids]
    assert rig.acks.repeated == 0


@PROTOCOLS
async def test_what_was_stored_while_the_broker_was_away(protocol: Any) -> None:
    """It is answered when it comes again, and not stored again."""
    away = asyncio.Event()
    got: list[tuple[int, int]] = []

    async def script(peer: Peer) -> None:
        if peer.number == 2:
            await away.wait()
        await take(peer, present=peer.number > 1)
        peer.send(*(message(protocol, b"%d" % i, i, again=peer.number > 1) for i in (1, 2, 3)))
        if peer.number == 1:
            await until(lambda: len(rig.got) == 3)
            return
        got.extend(await answers(peer, 3))
        await peer.until_closed()

    async with FakeBroker(script) as broker:
        rig = Rig(broker, protocol=protocol)
        async with rig:
            await until(lambda: rig.subscriber.traffic.disconnects == 1)
            rig.settle_all()
            away.set()
            await until(lambda: len(got) == 3 or len(rig.got) > 0)
            assert rig.got == []
    assert got == [(0x40, 1), (0x40, 2), (0x40, 3)]


@PROTOCOLS
async def test_qos_2_identifier_of_a_message_whose_pubrel_never_came(protocol: Any) -> None:
    """A was answered with PUBREC; after a cut the broker uses its identifier for B: B is stored."""
    got: list[tuple[int, int]] = []

    async def script(peer: Peer) -> None:
        await take(peer, present=peer.number > 1)
        if peer.number == 1:
            peer.send(message(protocol, b"A", 7, qos=2))
            got.extend(await answers(peer, 1))
            return
        peer.send(message(protocol, b"B", 7, qos=2))
        got.extend(await answers(peer, 1))
        peer.send(b"\x62\x02\x00\x07")
        got.extend(await answers(peer, 1))
        await peer.until_closed()

    async with FakeBroker(script) as broker:
        rig = Rig(broker, protocol=protocol)
        async with rig:
            await settle_when(rig, 1)
            await until(lambda: rig.subscriber.traffic.connects == 2)
            await until(lambda: rig.payloads == [b"B"] or len(got) == 3)
            assert rig.payloads == [b"B"]
            await settle_when(rig, 1)
            await until(lambda: len(got) == 3)
    assert got == [(0x50, 7), (0x50, 7), (0x70, 7)]


@PROTOCOLS
@pytest.mark.parametrize("qos", [1, 2])
async def test_an_identifier_that_a_restored_broker_uses_again(protocol: Any, qos: int) -> None:
    """It says "session present" and sends another message under the identifier of one that waits, even with DUP."""
    got: list[tuple[int, int]] = []

    async def script(peer: Peer) -> None:
        await take(peer, present=True)
        peer.send(message(protocol, b"one", 5, qos=qos), message(protocol, b"two", 5, qos=qos, again=True))
        peer.send(message(protocol, b"two", 5, qos=qos, again=True), message(protocol, b"two", 5, qos=qos))
        got.extend(await answers(peer, 3))
        await peer.until_closed()

    async with FakeBroker(script) as broker:
        rig = Rig(broker, protocol=protocol)
        async with rig:
            await until(lambda: rig.subscriber.traffic.messages == 4)
            assert rig.payloads == [b"one", b"two", b"two"]
            tokens = rig.got[:]
            rig.settle(*tokens[1:])
            rig.subscriber.flush_acks()
            assert rig.acks.unacked == 3, "nothing overtakes the first"
            rig.settle(tokens[0])
            rig.subscriber.flush_acks()
            await until(lambda: len(got) == 3)
    assert got == [(0x40 if qos == 1 else 0x50, 5)] * 3


@PROTOCOLS
async def test_more_under_way_than_there_are_identifiers(protocol: Any) -> None:
    """80,000 messages whose identifiers wrap while nothing can be stored: no cut, each is taken and answered once."""
    total = 80_000
    got: list[tuple[int, int]] = []
    wires = [message(protocol, b"%d" % i, i % 65_535 + 1) for i in range(total)]

    async def script(peer: Peer) -> None:
        await take(peer, present=False)

        async def send() -> None:
            for at in range(0, total, 2000):
                peer.send(*wires[at : at + 2000])
                await peer.writer.drain()

        sending = asyncio.create_task(send())
        got.extend(await answers(peer, total))
        await sending
        await peer.until_closed()

    async with FakeBroker(script) as broker:
        rig = Rig(broker, protocol=protocol, receive_maximum=65_535)
        async with rig:
            await until(lambda: rig.subscriber.paused or broker.connections > 1, 30)
            assert rig.acks.unacked < 65_535
            payloads: list[bytes] = []
            async with asyncio.timeout(60):
                while len(payloads) < total and broker.connections == 1:
                    payloads += rig.payloads
                    rig.settle_all()
                    rig.subscriber.flush_acks()
                    await asyncio.sleep(0)
            await until(lambda: len(got) == total or broker.connections > 1, 30)
    assert broker.connections == 1
    assert payloads == [b"%d" % i for i in range(total)]
    assert got == [(0x40, i % 65_535 + 1) for i in range(total)]
