"""The publisher against mosquitto and a scripted broker."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import uvloop

from fastkin.config import Broker
from fastkin.errors import ClosedError, LibraryError, MqttError, RefusedError
from fastkin.mqtt.publisher import Publisher
from support.fake_broker import FakeBroker, Peer, Rig, until
from support.servers import Server, free_port, mosquitto

if TYPE_CHECKING:
    from pathlib import Path

LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


def at(server: Server | FakeBroker, **settings: Any) -> Broker:
    return Broker(host=server.host, port=server.port, **settings)


@pytest.mark.parametrize("protocol", ["auto", "5", "3.1.1"])
@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.process
def test_everything_arrives(run: Any, qos: int, protocol: Any) -> None:
    async def main() -> None:
        with mosquitto("max_inflight_messages 0\nmax_queued_messages 0\n") as server:
            async with Rig(server, [("plant/#", qos)]) as rig:
                async with Publisher(at(server, protocol=protocol), window=50) as publisher:
                    assert publisher.version == (5 if protocol == "5" else 4)
                    for n in range(3000):
                        await publisher.publish("plant/1", b"%d" % n, qos)
                        assert publisher.unacked <= 50
                    await publisher.drain()
                    assert publisher.published == 3000
                    assert publisher.acked == (3000 if qos else 0)
                    assert publisher.unacked == 0
                await until(lambda: len(rig.got) == 3000, 10)
                assert rig.payloads == [b"%d" % n for n in range(3000)]
                rig.settle_all()

    run(main())


@pytest.mark.process
def test_the_brokers_receive_maximum_lowers_the_window() -> None:
    async def main() -> None:
        with mosquitto("max_inflight_messages 7\n") as server:
            async with Publisher(at(server, protocol="5"), window=1000) as publisher:
                assert publisher.window == 7

    asyncio.run(main())


@pytest.mark.process
def test_several_publish_at_once(run: Any) -> None:
    async def main() -> None:
        with mosquitto() as server:
            async with Publisher(at(server), window=3) as publisher:

                async def say(who: int) -> None:
                    for _ in range(200):
                        await publisher.publish(f"plant/{who}", b"x", 1)

                await asyncio.gather(*(say(who) for who in range(10)))
                await publisher.drain()
                assert publisher.acked == 2000

    run(main())


def test_a_full_window_says_no() -> None:
    hold = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.connect()
        for _ in range(2):
            await peer.packet()
        await hold.wait()
        peer.send(b"\x40\x02\x00\x02\x40\x02\x00\x01")
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker, Publisher(at(broker), window=2) as publisher:
            assert publisher.publish_nowait("plant/1", b"1", 1)
            assert publisher.publish_nowait("plant/1", b"2", 1)
            assert not publisher.publish_nowait("plant/1", b"3", 1)
            assert publisher.publish_nowait("plant/1", b"4", 0)  # no window for QoS 0
            hold.set()
            await publisher.drain()
            assert publisher.acked == 2
            assert publisher.publish_nowait("plant/1", b"3", 1)

    asyncio.run(main())


def test_packet_identifiers_in_use_are_skipped() -> None:
    """One message is never acknowledged while 70,000 others are: its identifier must not be used again."""
    used: list[int] = []

    async def script(peer: Peer) -> None:
        await peer.connect()
        held = b""
        for n in range(70_000):
            body = (await peer.packet())[1]
            topic = int.from_bytes(body[:2], "big")
            packet_id = body[2 + topic : 4 + topic]
            used.append(int.from_bytes(packet_id, "big"))
            if n == 4:
                held = packet_id
            else:
                peer.send(b"\x40\x02" + packet_id)
        peer.send(b"\x40\x02" + held)
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker, Publisher(at(broker), window=100) as publisher:
            for _ in range(70_000):
                await publisher.publish("p", b"", 1)
            await publisher.drain()
            assert publisher.acked == 70_000

    asyncio.run(main())
    assert used.count(5) == 1
    assert used[:65_535] == list(range(1, 65_536))
    assert used[65_535:65_541] == [1, 2, 3, 4, 6, 7]


def test_a_slow_broker_is_waited_for() -> None:
    """QoS 0: what the broker does not read must not pile up here."""
    go = asyncio.Event()
    received = 0

    async def script(peer: Peer) -> None:
        nonlocal received
        await peer.connect()
        await go.wait()
        while True:
            first, body = await peer.packet()
            if first == 0xE0:
                return
            received += 1
            assert len(body) > 100_000

    async def main() -> None:
        async with FakeBroker(script) as broker, Publisher(at(broker)) as publisher:
            accepted = 0
            while publisher.publish_nowait("plant/1", bytes(100_000)):
                accepted += 1
                await asyncio.sleep(0)
                assert accepted < 1000, "the publisher takes without end"
            go.set()
            for _ in range(100):
                await publisher.publish("plant/1", bytes(100_000))
            await publisher.drain()
            await until(lambda: received == accepted + 100)

    asyncio.run(main())


def test_refused_messages_are_said_at_drain() -> None:
    async def script(peer: Peer) -> None:
        await peer.connect()
        await peer.packet()
        await peer.packet()
        peer.send(b"\x40\x02\x00\x01\x40\x03\x00\x02\x97")
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker, Publisher(at(broker, protocol="5")) as publisher:
            await publisher.publish("plant/1", b"1", 1)
            await publisher.publish("plant/1", b"2", 1)
            with pytest.raises(RefusedError, match="quota"):
                await publisher.drain()
            assert publisher.refused == 1
            await publisher.drain()  # said once

    asyncio.run(main())


def test_why_there_is_no_connection(run: Any) -> None:
    async def script(peer: Peer) -> None:
        body = (await peer.packet())[1]
        if peer.number == 1:
            peer.send(b"\x20\x02\x00\x05")
        elif peer.number == 2:
            return
        elif peer.number == 3:
            peer.send(b"nonsense")
        elif peer.number == 4:
            await peer.until_closed()
        else:
            assert body[6] == (4 if peer.number == 5 else 5)
            peer.send(b"\x20\x02\x00\x01" if peer.number == 5 else b"\x20\x03\x00\x00\x00")
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            publisher = Publisher(at(broker, connect_timeout_s=0.2, password="only a password"))
            for reason, kind in (
                ("not authorised", RefusedError),
                ("closed the connection", MqttError),
                ("malformed", MqttError),
                ("no answer within 0.2 s", MqttError),
            ):
                with pytest.raises(kind, match=reason) as raised:
                    await publisher.connect()
                assert "only a password" not in str(raised.value)
            await publisher.close()  # never was connected
            await publisher.connect()  # 3.1.1 is refused, 5.0 taken
            assert publisher.version == 5
            await publisher.close()
        with pytest.raises(MqttError, match="nothing listens"):
            await Publisher(Broker(host="127.0.0.1", port=free_port())).connect()

    run(main())


@pytest.mark.process
def test_misuse_is_said() -> None:
    with pytest.raises(LibraryError, match="window 0"):
        Publisher(Broker(), window=0)

    async def main() -> None:
        with pytest.raises(ClosedError):
            await Publisher(Broker()).publish("plant/1", b"")
        with mosquitto() as server, pytest.raises(LibraryError, match="client identifier"):
            await Publisher(at(server, client_id="a\0b")).connect()
        with mosquitto() as server:
            async with Publisher(at(server)) as publisher:
                with pytest.raises(LibraryError, match="QoS 2"):
                    await publisher.publish("plant/1", b"", 2)
                with pytest.raises(LibraryError, match="wildcards"):
                    await publisher.publish("plant/#", b"", 1)
                assert publisher.unacked == 0
                await publisher.publish("plant/1", b"", 1)
                await publisher.drain()

    asyncio.run(main())


@pytest.mark.process
def test_a_connection_that_is_lost_is_said(run: Any) -> None:
    async def main() -> None:
        with mosquitto() as server:
            publisher = Publisher(at(server))
            await publisher.connect()
            await asyncio.to_thread(server.kill)
            with contextlib.suppress(MqttError):
                for _ in range(1000):
                    await publisher.publish("plant/1", b"x", 1)
                    await asyncio.sleep(0.001)
            with pytest.raises(MqttError, match=r"connection to mqtt://.* lost"):
                await publisher.drain()
            with pytest.raises(MqttError):
                await publisher.publish("plant/1", b"x", 1)
            await publisher.close()
            await publisher.close()

    run(main())


def test_keep_alive_and_a_dead_broker() -> None:
    pings = 0

    async def script(peer: Peer) -> None:
        nonlocal pings
        await peer.connect()
        while True:
            if (await peer.packet())[0] == 0xC0:
                pings += 1
                if pings <= 2:
                    peer.send(b"\xd0\x00")

    async def main() -> None:
        async with FakeBroker(script) as broker:
            publisher = Publisher(at(broker, keep_alive_s=1))
            await publisher.connect()
            await asyncio.sleep(0.8)
            await publisher.publish("plant/1", b"x", 1)
            with pytest.raises(MqttError, match="silent"):
                await asyncio.wait_for(publisher.drain(), 6)
            await publisher.close()

    asyncio.run(main())
    assert pings >= 3


@pytest.mark.process
def test_user_and_password(tmp_path: Path) -> None:
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    subprocess.run(["mosquitto_passwd", "-b", str(passwords), "welder", "s3cret-word"], check=True)

    async def main() -> None:
        with mosquitto(f"allow_anonymous false\npassword_file {passwords}\n") as server:
            async with Publisher(at(server, user="welder", password="s3cret-word")) as publisher:
                await publisher.publish("plant/1", b"x", 1)
                await publisher.drain()
            with pytest.raises(RefusedError) as raised:
                await Publisher(at(server, user="welder", password="wr0ng")).connect()
            assert "wr0ng" not in str(raised.value)

    asyncio.run(main())
