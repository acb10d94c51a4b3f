"""Which version of MQTT is spoken under protocol = "auto": guesses from silence expire, on every transport."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import pytest
import uvloop
from aiohttp import WSMsgType, web

from fastkin.config import Broker
from fastkin.mqtt.publisher import Publisher
from support.fake_broker import CONNACK, FakeBroker, Peer, Rig, lines, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


class Versions:
    """A broker that does with each CONNECT what its plan says, and notes the versions."""

    def __init__(self, *plan: str) -> None:
        self.plan = plan
        self.seen: list[int] = []

    async def __call__(self, peer: Peer) -> None:
        body = (await peer.packet())[1]
        version = peer.version = body[6]
        at = len(self.seen)
        self.seen.append(version)
        what = self.plan[min(at, len(self.plan) - 1)]
        if what == "close":
            return
        if what == "only 4, by silence" and version == 5:
            return
        if what == "only 4, in words" and version == 5:
            peer.send(b"\x20\x02\x00\x01")
            return
        if what == "mute at 5" and version == 5:
            await peer.until_closed()
            return
        peer.send(CONNACK[version])
        await peer.subscribe()
        if what != "take and cut":
            await peer.until_closed()


def test_silent_closes_after_5_0_had_worked_do_not_change_the_version(run: Any) -> None:
    async def main() -> None:
        versions = Versions("take and cut", "close", "close", "take and cut", "close", "close", "close", "take")
        async with FakeBroker(versions) as broker, Rig(broker) as rig:
            await until(lambda: len(versions.seen) == 8 and rig.subscriber.connected.is_set())
            assert rig.subscriber.version == 5
            assert rig.subscriber.granted_window == 10_000
        assert versions.seen == [5] * 8

    run(main())


def test_a_guess_from_silence_lasts_for_one_connection(run: Any) -> None:
    """A proxy in front of a broker that starts: each 5.0 is closed, 3.1.1 is taken by chance; in the end it is 5.0."""

    async def main() -> None:
        versions = Versions("close", "take and cut", "close", "take and cut", "close", "take and cut", "take")
        async with FakeBroker(versions) as broker, Rig(broker) as rig:
            await until(lambda: len(versions.seen) == 7 and rig.subscriber.connected.is_set())
            assert rig.subscriber.version == 5
            assert rig.subscriber.granted_window == 10_000
        assert versions.seen == [5, 4, 5, 4, 5, 4, 5]

    run(main())


def test_a_broker_that_closes_at_5_0_is_spoken_to_in_3_1_1() -> None:
    async def main() -> None:
        versions = Versions("only 4, by silence")
        async with FakeBroker(versions) as broker, Rig(broker) as rig:
            assert rig.subscriber.version == 4
        assert versions.seen == [5, 4]

    asyncio.run(main())


def test_a_broker_that_does_not_answer_5_0_is_spoken_to_in_3_1_1(run: Any) -> None:
    async def main() -> None:
        versions = Versions("mute at 5")
        async with FakeBroker(versions) as broker, Rig(broker, connect_timeout_s=0.3) as rig:
            assert rig.subscriber.version == 4
        assert versions.seen == [5, 4]

    run(main())


def test_a_refusal_in_words_is_remembered_over_connections() -> None:
    async def main() -> None:
        versions = Versions("only 4, in words", "take and cut", "take and cut", "take")
        async with FakeBroker(versions) as broker, Rig(broker) as rig:
            await until(lambda: len(versions.seen) == 4 and rig.subscriber.connected.is_set())
        assert versions.seen == [5, 4, 4, 4]

    asyncio.run(main())


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_version_that_is_set_stays(protocol: Any) -> None:
    async def main() -> None:
        versions = Versions("close", "close", "close", "take")
        async with FakeBroker(versions) as broker, Rig(broker, protocol=protocol):
            pass
        assert versions.seen == [5 if protocol == "5" else 4] * 4

    asyncio.run(main())


def test_a_refused_connection_says_nothing_about_the_version(caplog: Any) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        rig = Rig(type("Nobody", (), {"host": "127.0.0.1", "port": 9})())
        rig.start()
        await until(lambda: rig.states.count("connecting") >= 3)
        assert rig.subscriber.version == 5
        await rig.subscriber.close()

    asyncio.run(main())
    assert not [line for line in lines(caplog) if "3.1.1" in line]


# -- WebSocket ----------------------------------------------------------------------------------------


async def websocket_broker(serve: Callable[[web.WebSocketResponse], Awaitable[None]]) -> tuple[web.AppRunner, Any]:
    async def handle(request: web.Request) -> web.WebSocketResponse:
        websocket = web.WebSocketResponse(protocols=("mqtt",))
        await websocket.prepare(request)
        await serve(websocket)
        return websocket

    app = web.Application()
    app.router.add_get("/mqtt", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    return runner, type("Listener", (), {"host": "127.0.0.1", "port": port})()


@pytest.mark.parametrize("manner", ["never answers", "closes"])
def test_over_websocket_the_same_rule_holds(run: Any, manner: str) -> None:
    seen: list[int] = []

    async def serve(websocket: web.WebSocketResponse) -> None:
        async for message in websocket:
            if message.type is not WSMsgType.BINARY:
                return
            if message.data[0] == 0x10:
                seen.append(message.data[8])
                if seen[-1] == 4:
                    await websocket.send_bytes(b"\x20\x02\x00\x00")
                elif manner == "closes":
                    return
            elif message.data[0] == 0x82:
                await websocket.send_bytes(b"\x90\x03" + message.data[2:4] + b"\x01")

    async def main() -> None:
        runner, listener = await websocket_broker(serve)
        try:
            async with Rig(listener, scheme="ws", connect_timeout_s=0.5) as rig:
                assert rig.subscriber.version == 4
            assert seen == [5, 4]
        finally:
            await runner.cleanup()

    run(main())


def test_a_publisher_keeps_what_it_was_told() -> None:
    seen: list[int] = []

    async def script(peer: Peer) -> None:
        body = (await peer.packet())[1]
        seen.append(body[6])
        peer.send(b"\x20\x02\x00\x01" if body[6] == 4 else CONNACK[5])
        await peer.until_closed()

    async def main() -> None:
        async with FakeBroker(script) as broker:
            publisher = Publisher(Broker(host=broker.host, port=broker.port))
            for _ in range(2):
                await publisher.connect()
                assert publisher.version == 5
                await publisher.close()
        assert seen == [4, 5, 5]

    asyncio.run(main())
