"""WebSocket: what belongs to the connection goes on while the data are not read."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Self

import pytest
import uvloop
from aiohttp import WSMsgType, web

from fastkin.mqtt._core import publish
from support.fake_broker import Rig, until

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


class Broker:
    """Speaks 3.1.1 over a WebSocket; `script` runs once the filters are granted. Pongs are noted."""

    def __init__(self, script: Callable[[web.WebSocketResponse], Awaitable[None]], **options: Any) -> None:
        self.script = script
        self.options = options
        self.pongs: list[bytes] = []
        self.acked = 0
        self.answers_pings = True
        self.connections = 0
        self.host = "127.0.0.1"
        self.port = 0

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/mqtt", self._serve)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, 0).start()
        self.port = self._runner.addresses[0][1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._runner.cleanup()

    async def _serve(self, request: web.Request) -> web.WebSocketResponse:
        self.connections += 1
        websocket = web.WebSocketResponse(protocols=("mqtt",), autoping=False, **self.options)
        await websocket.prepare(request)
        task: asyncio.Task[None] | None = None
        async for message in websocket:
            if message.type is WSMsgType.PONG:
                self.pongs.append(bytes(message.data))
            elif message.type is WSMsgType.BINARY and message.data[0] == 0x10:
                await websocket.send_bytes(b"\x20\x02\x00\x00")
            elif message.type is WSMsgType.BINARY and message.data[0] == 0x82:
                await websocket.send_bytes(b"\x90\x03" + message.data[2:4] + b"\x01")
                task = asyncio.create_task(self._run(websocket))
            elif message.type is WSMsgType.BINARY and message.data[0] == 0x40:
                self.acked += len(message.data) // 4
            elif message.type is WSMsgType.BINARY and message.data[0] == 0xC0 and self.answers_pings:
                await websocket.send_bytes(b"\xd0\x00")
        if task is not None:
            task.cancel()
        return websocket

    async def _run(self, websocket: web.WebSocketResponse) -> None:
        with contextlib.suppress(ConnectionError):
            await self.script(websocket)


def message(number: int, size: int = 200) -> bytes:
    return publish("plant/1", b"%d " % number + bytes(size), qos=1, packet_id=number, version=4)


def test_pings_are_answered_while_reading_is_paused(run: Any) -> None:
    async def script(websocket: web.WebSocketResponse) -> None:
        for n in range(1, 201):
            await websocket.send_bytes(message(n))
            if n % 20 == 0:
                await websocket.ping(b"%d" % n)

    async def main() -> None:
        async with Broker(script) as broker:
            rig = Rig(broker, scheme="ws", protocol="3.1.1")
            rig.room = False
            rig.start()
            await rig.connected()
            await until(lambda: broker.pongs == [b"%d" % n for n in range(20, 201, 20)])
            assert rig.subscriber.paused
            assert rig.got == []
            rig.room = True
            rig.subscriber.resume()
            await until(lambda: len(rig.got) == 200)
            assert [payload.split()[0] for payload in rig.payloads] == [b"%d" % n for n in range(1, 201)]
            rig.settle_all()
            rig.subscriber.flush_acks()
            await until(lambda: broker.acked == 200)
            assert broker.connections == 1
            await rig.subscriber.close()

    run(main())


def test_a_broker_with_heartbeats_keeps_a_client_that_has_no_room(run: Any) -> None:
    """aiohttp's own server closes when it sees no pong for half a second here."""

    async def script(websocket: web.WebSocketResponse) -> None:
        for n in range(1, 51):
            await websocket.send_bytes(message(n))

    async def main() -> None:
        async with Broker(script, heartbeat=1.0) as broker:
            rig = Rig(broker, scheme="ws", protocol="3.1.1", keep_alive_s=0)
            rig.room = False
            rig.start()
            await rig.connected()
            await asyncio.sleep(2.5)
            assert rig.subscriber.traffic.disconnects == 0
            rig.room = True
            rig.subscriber.resume()
            await until(lambda: len(rig.got) == 50)
            rig.settle_all()
            rig.subscriber.flush_acks()
            await until(lambda: broker.acked == 50)
            assert broker.connections == 1
            await rig.subscriber.close()

    run(main())


def test_what_is_read_ahead_is_bounded_and_signs_of_life_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than is read ahead: the pings lie behind it. Pongs go out unasked then, and memory stays."""
    monkeypatch.setattr("fastkin.mqtt.websocket._PONG_S", 0.1)
    sent = 0

    async def script(websocket: web.WebSocketResponse) -> None:
        nonlocal sent
        for n in range(1, 4001):
            await websocket.send_bytes(message(n, 8000))
            sent = n

    async def main() -> None:
        async with Broker(script) as broker:
            rig = Rig(broker, scheme="ws", protocol="3.1.1")
            rig.room = False
            rig.start()
            await rig.connected()
            await until(lambda: len(broker.pongs) >= 3)
            assert sent < 3000  # the socket is full: most of the 32 MB are not here
            rig.room = True
            rig.subscriber.resume()
            await until(lambda: len(rig.got) == 4000, 20)
            assert [payload.split()[0] for payload in rig.payloads] == [b"%d" % n for n in range(1, 4001)]
            rig.settle_all()
            await rig.subscriber.close()

    asyncio.run(main())


def test_what_came_before_the_broker_closed_is_taken(run: Any) -> None:
    async def script(websocket: web.WebSocketResponse) -> None:
        for n in range(1, 21):
            await websocket.send_bytes(publish("plant/1", b"%d" % n, version=4))  # QoS 0: nobody sends it again
        await websocket.close()

    async def main() -> None:
        async with Broker(script) as broker:
            rig = Rig(broker, [("plant/#", 0)], scheme="ws", protocol="3.1.1", reconnect_min_s=5.0, reconnect_max_s=9.0)
            rig.room = False
            rig.start()
            await rig.connected()
            await until(lambda: rig.subscriber.paused)
            await asyncio.sleep(0.2)
            rig.room = True
            rig.subscriber.resume()
            await until(lambda: len(rig.got) == 20)
            await rig.subscriber.close()

    run(main())


def test_a_large_frame_is_paused_in_its_middle(run: Any) -> None:
    """Many packets in one frame: a pause keeps the rest of the frame out of the receive buffer."""

    async def script(websocket: web.WebSocketResponse) -> None:
        await websocket.send_bytes(b"".join(message(n, 2000) for n in range(1, 2001)))

    async def main() -> None:
        async with Broker(script) as broker:
            rig = Rig(broker, scheme="ws", protocol="3.1.1")
            rig.room = False
            rig.start()
            await rig.connected()
            await until(lambda: rig.subscriber.paused)
            link: Any = rig.subscriber._link
            assert link.session.buffer_bytes < 1_000_000
            for _ in range(50):
                rig.room = True
                rig.subscriber.resume()
                rig.room = False
                await asyncio.sleep(0)
            rig.room = True
            rig.subscriber.resume()
            await until(lambda: len(rig.got) == 2000)
            assert [payload.split()[0] for payload in rig.payloads] == [b"%d" % n for n in range(1, 2001)]
            rig.settle_all()
            await rig.subscriber.close()

    run(main())


def test_many_messages_above_the_limit_in_a_row(run: Any) -> None:
    """The next one is read ahead while one is set aside: it comes as soon as reading goes on."""

    async def script(websocket: web.WebSocketResponse) -> None:
        for n in range(1, 21):
            await websocket.send_bytes(message(n, 200_000))

    async def main() -> None:
        async with Broker(script) as broker, Rig(broker, scheme="ws", protocol="3.1.1", max_packet_bytes=65_536) as rig:
            await until(lambda: broker.acked == 20)
            assert broker.connections == 1
            assert rig.got == []

    run(main())


def test_the_pings_of_a_proxy_do_not_stand_for_a_broker_that_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastkin.mqtt.keep_alive._TRICKLE_MOST", 1)

    async def script(websocket: web.WebSocketResponse) -> None:
        while True:
            await websocket.ping(b"alive")
            await asyncio.sleep(0.1)

    async def main() -> None:
        async with Broker(script) as broker:
            broker.answers_pings = False
            rig = Rig(broker, scheme="ws", protocol="3.1.1", keep_alive_s=1)
            rig.start()
            await rig.connected()
            await until(lambda: rig.subscriber.traffic.disconnects, 10)
            assert "taken for dead" in (rig.subscriber.last_error or "")
            await rig.subscriber.close()

    asyncio.run(main())


def test_a_large_frame_that_trickles_in_is_a_broker_that_lives(run: Any) -> None:
    """One WebSocket message is seen when it is whole; the bytes before that count."""

    async def script(websocket: web.WebSocketResponse) -> None:
        packet = publish("plant/1", bytes(3000), version=4)
        head = b"\x82\x7e" + len(packet).to_bytes(2, "big")
        transport = websocket._req.transport  # type: ignore[union-attr]
        data = head + packet
        for at in range(0, len(data), 100):
            transport.write(data[at : at + 100])
            await asyncio.sleep(0.1)

    async def main() -> None:
        async with Broker(script) as broker:
            broker.answers_pings = False
            rig = Rig(broker, scheme="ws", protocol="3.1.1", keep_alive_s=1)
            rig.start()
            await rig.connected()
            await until(lambda: rig.got, 10)
            assert rig.subscriber.traffic.disconnects == 0
            await rig.subscriber.close()

    run(main())
