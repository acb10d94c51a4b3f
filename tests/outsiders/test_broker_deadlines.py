"""A deadline at the broker counts silence: what talks is waited for, what is silent is given up, every wait ends."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
import uvloop

from fastkin.config import Broker
from fastkin.mqtt._core import publish
from fastkin.mqtt.publisher import Publisher
from support.fake_broker import CONNACK, FakeBroker, Peer, Rig, lines, until

LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


async def trickle(peer: Peer, data: bytes, seconds: float) -> None:
    for at in range(len(data)):
        peer.send(data[at : at + 1])
        await asyncio.sleep(seconds)


@pytest.mark.parametrize("qos", [0, 1])
def test_a_suback_behind_a_flood_is_waited_for(run: Any, caplog: Any, qos: int) -> None:
    """Retained and queued messages come first: five time-outs long here, for hours on a large session."""
    caplog.set_level(logging.INFO)

    async def script(peer: Peer) -> None:
        await peer.connect()
        first, body = await peer.packet()
        assert first == 0x82
        for n in range(1, 61):
            peer.send(publish("plant/1", b"%d" % n, qos=qos, packet_id=n if qos else 0, version=peer.version))
            await asyncio.sleep(0.05)
        peer.send(b"\x90\x04", body[:2], b"\0\1")
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker, connect_timeout_s=0.6)
            rig.start()
            await until(lambda: len(rig.got) >= 30)
            assert not rig.subscriber.connected.is_set()
            await rig.connected()
            assert rig.subscriber.traffic.connects == 1
            assert rig.subscriber.traffic.disconnects == 0
            assert len(rig.got) == 60
            await rig.subscriber.close()

    run(main())
    late = [line for line in lines(caplog, logging.WARNING) if "no SUBACK" in line]
    assert len(late) == 1  # told, once


def test_a_suback_behind_one_packet_that_trickles_in_is_waited_for(run: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        first, body = await peer.packet()
        assert first == 0x82
        await trickle(peer, publish("plant/1", bytes(20), version=5), 0.06)
        peer.send(b"\x90\x04", body[:2], b"\0\1")
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker, Rig(broker, connect_timeout_s=0.5) as rig:
            assert rig.subscriber.traffic.connects == 1
            assert len(rig.got) == 1

    run(main())


def test_a_connack_that_trickles_in_is_waited_for(run: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.packet()
        told = b"\x1f\x00\x0fwelcome, welder"
        await trickle(peer, bytes((0x20, 3 + len(told), 0, 0, len(told))) + told, 0.06)
        peer.version = 5
        await peer.subscribe()
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker, Rig(broker, connect_timeout_s=0.5, protocol="5") as rig:
            assert rig.subscriber.traffic.connects == 1
            assert broker.connections == 1

    run(main())


def test_a_publisher_waits_for_a_connack_that_trickles_in() -> None:
    async def script(peer: Peer) -> None:
        await peer.packet()
        await trickle(peer, CONNACK[4], 0.25)
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            async with Publisher(Broker(host=broker.host, port=broker.port, connect_timeout_s=0.6)) as publisher:
                assert publisher.version == 4
            assert broker.connections == 1

    asyncio.run(main())


def test_a_silent_broker_is_given_up_at_suback(run: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker, connect_timeout_s=0.3)
            rig.start()
            await until(lambda: rig.subscriber.traffic.disconnects >= 2)
            assert "no SUBACK" in (rig.subscriber.last_error or "")
            await rig.subscriber.close()

    run(main())


def test_answers_to_pings_are_no_sign_of_a_suback(run: Any) -> None:
    """A broker that swallowed SUBSCRIBE answers what was sent after it: it would be waited for without end."""

    async def script(peer: Peer) -> None:
        await peer.connect()
        first, _ = await peer.packet()
        assert first == 0x82
        while (got := await peer.packet()) is not None and got[0] == 0xC0:
            peer.send(b"\xd0\x00")

    async def main() -> None:
        async with FakeBroker(script) as broker:
            rig = Rig(broker, connect_timeout_s=0.6, keep_alive_s=1)  # a ping each half second
            rig.start()
            await until(lambda: rig.subscriber.traffic.disconnects >= 1)
            assert "no SUBACK" in (rig.subscriber.last_error or "")
            await rig.subscriber.close()

    run(main())


class Mute:
    """A transport that never says that the connection is gone: uvloop has such moments."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        pass

    def abort(self) -> None:
        pass


@pytest.mark.parametrize("who", ["intake", "intake that gives up", "publisher"])
def test_every_wait_for_the_end_of_a_connection_ends(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        if who != "publisher":
            await peer.subscribe()
        if who == "intake that gives up":
            peer.send(b"\x00\x00")
        await asyncio.sleep(60)

    def muted(transports: list[Any], link: Any) -> None:
        name = "wire" if hasattr(link, "wire") else "_wire"
        transports.append(getattr(link, name))
        setattr(link, name, Mute(getattr(link, name)))

    async def main() -> None:
        kept: list[Any] = []
        async with FakeBroker(script) as broker:
            if who == "publisher":
                monkeypatch.setattr("fastkin.mqtt.publisher._CLOSE_S", 0.2)
                publisher = Publisher(Broker(host=broker.host, port=broker.port))
                await publisher.connect()
                muted(kept, publisher._link)
                async with asyncio.timeout(8):
                    await publisher.close()
            else:
                rig = Rig(broker)
                if who == "intake that gives up":
                    rig.start()
                    await until(lambda: rig.subscriber._link is not None and rig.subscriber._link.wire is not None)
                    muted(kept, rig.subscriber._link)
                    await until(lambda: rig.subscriber.traffic.connects >= 2, 8)
                else:
                    rig.start()
                    await rig.connected()
                    muted(kept, rig.subscriber._link)
                async with asyncio.timeout(8):
                    await rig.subscriber.close()
                    assert rig.task is not None
                    if who == "intake":
                        await rig.task
                if not rig.task.done():
                    await rig.crash()
            for transport in kept:
                transport.abort()

    asyncio.run(main())
