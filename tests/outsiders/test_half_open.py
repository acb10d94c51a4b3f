"""A peer that vanishes is found out by the kernel, on every TCP connection that fastkin makes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from typing import Any

import pytest
import uvloop
from aiohttp import WSMsgType, web

from fastkin.aws.http import HttpPool
from fastkin.config import Broker
from fastkin.mqtt.publisher import Publisher
from support.fake_broker import FakeBroker, Peer, Rig
from support.fake_http import FakeServer, Link, Request

LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@pytest.fixture(params=LOOPS)
def run(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


def options_towards(port: int) -> list[dict[str, int]]:
    """Of each connection of this process to that port."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        # Only of a socket: a copy of another file that socket() refuses would stay open, and there are more each time.
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as sock:
            if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.getpeername()[1] == port:
                found.append(
                    {
                        option: sock.getsockopt(level, getattr(socket, option))
                        for level, option in (
                            (socket.SOL_SOCKET, "SO_KEEPALIVE"),
                            (socket.IPPROTO_TCP, "TCP_KEEPIDLE"),
                            (socket.IPPROTO_TCP, "TCP_KEEPINTVL"),
                            (socket.IPPROTO_TCP, "TCP_KEEPCNT"),
                            (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT"),
                        )
                    }
                )
    return found


def check(port: int) -> None:
    (options,) = options_towards(port)
    assert options["SO_KEEPALIVE"] == 1
    found_out_s = options["TCP_KEEPIDLE"] + options["TCP_KEEPINTVL"] * options["TCP_KEEPCNT"]
    assert 10 <= found_out_s <= 180
    assert 10_000 <= options["TCP_USER_TIMEOUT"] <= 180_000


async def script(peer: Peer) -> None:
    await peer.connect()
    first, body = await peer.packet()
    if first != 0x82:
        return
    peer.send(b"\x90\x04", body[:2], b"\0\1")
    await peer.until_closed()


class TestKeepAlive:
    def test_of_the_brokers_connection(self, run: Any) -> None:
        async def main() -> None:
            async with FakeBroker(script) as broker, Rig(broker, keep_alive_s=0):
                check(broker.port)

        run(main())

    def test_of_a_publishers_connection(self, run: Any) -> None:
        async def main() -> None:
            async with FakeBroker(script) as broker, Publisher(Broker(host=broker.host, port=broker.port)):
                check(broker.port)

        run(main())

    def test_of_a_connection_to_kinesis(self, run: Any) -> None:
        async def answer(link: Link, _: Request) -> None:
            link.reply(200, b"{}")

        async def main() -> None:
            async with FakeServer(answer) as server:
                pool = HttpPool(server.url, request_timeout_s=5.0, connect_timeout_s=5.0)
                head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n"
                await pool.request(head, b"{}")
                check(int(server.url.rsplit(":", 1)[1].strip("/")))
                await pool.close()

        run(main())

    def test_of_a_websocket(self, run: Any) -> None:
        async def handle(request: web.Request) -> web.WebSocketResponse:
            websocket = web.WebSocketResponse(protocols=("mqtt",))
            await websocket.prepare(request)
            async for message in websocket:
                if message.type is WSMsgType.BINARY and message.data[0] == 0x10:
                    await websocket.send_bytes(b"\x20\x02\x00\x00")
                elif message.type is WSMsgType.BINARY and message.data[0] == 0x82:
                    await websocket.send_bytes(b"\x90\x03" + message.data[2:4] + b"\x01")
            return websocket

        async def main() -> None:
            app = web.Application()
            app.router.add_get("/mqtt", handle)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            port = runner.addresses[0][1]
            listener = type("Listener", (), {"host": "127.0.0.1", "port": port})()
            try:
                async with Rig(listener, scheme="ws", protocol="3.1.1"):
                    check(port)
            finally:
                await runner.cleanup()

        run(main())
