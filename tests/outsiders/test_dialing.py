"""Connections to hosts with several addresses, some of which are black holes; and calls cancelled at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
import trustme
from aiohttp import WSMsgType, web

from fastkin.aws.http import HttpPool
from fastkin.config import Broker
from fastkin.errors import NotSent
from fastkin.mqtt.publisher import Publisher
from fastkin.net import dial
from support.fake_broker import FakeBroker, Peer, Rig, until
from support.fake_http import FakeServer, Link, Request, on_both_loops

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncIterator, Iterator


def head(length: int) -> bytes:
    return f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


async def echo(link: Link, request: Request) -> None:
    link.reply(200, request.body)


@contextlib.contextmanager
def black_hole(host: str, port: int) -> Iterator[None]:
    """A port that answers nothing: the kernel drops further SYNs once the backlog is full."""
    with contextlib.ExitStack() as stack:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        full = stack.enter_context(socket.socket(family))
        full.bind((host, port))
        full.listen(0)
        for _ in range(4):
            sock = stack.enter_context(socket.socket(family))
            sock.setblocking(False)
            sock.connect_ex((host, port))
        yield


def resolve(monkeypatch: pytest.MonkeyPatch, *hosts: str) -> None:
    """Every name has these addresses."""
    true = socket.getaddrinfo

    def fake(host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0) -> Any:  # noqa: A002
        if host != "several.test":
            return true(host, port, family, type, proto, flags)
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "not a number")
        return [info for one in hosts for info in true(one, port, 0, socket.SOCK_STREAM)]

    monkeypatch.setattr(socket, "getaddrinfo", fake)


ADDRESSES = [
    ("127.0.0.2", "127.0.0.1"),
    ("127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.1"),
    ("::1", "127.0.0.1"),
    ("::1", "127.0.0.2", "127.0.0.1"),
]


@contextlib.contextmanager
def holes(hosts: tuple[str, ...], port: int) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for host in hosts[:-1]:
            stack.enter_context(black_hole(host, port))
        yield


@on_both_loops
@pytest.mark.parametrize("hosts", ADDRESSES)
async def test_kinesis_is_reached_when_the_first_addresses_are_black_holes(
    hosts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, *hosts)
    async with FakeServer(echo) as server:
        with holes(hosts, server.port):
            pool = HttpPool(f"http://several.test:{server.port}", connect_timeout_s=6.0, request_timeout_s=6.0)
            try:
                assert (await pool.request(head(4), b"body")).body == b"body"
            finally:
                await pool.close()


async def accept(peer: Peer) -> None:
    await peer.connect()
    await peer.until_closed()


async def accept_websocket(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse(protocols=("mqtt",))
    await socket.prepare(request)
    async for message in socket:
        if message.type is WSMsgType.BINARY and message.data[0] == 0x10:
            await socket.send_bytes(b"\x20\x02\x00\x00")
    return socket


@contextlib.asynccontextmanager
async def broker_of(scheme: str) -> AsyncIterator[int]:
    if scheme == "mqtt":
        async with FakeBroker(accept) as broker:
            yield broker.port
        return
    application = web.Application()
    application.router.add_get("/mqtt", accept_websocket)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@on_both_loops
@pytest.mark.parametrize("hosts", ADDRESSES)
@pytest.mark.parametrize("scheme", ["mqtt", "ws"])
async def test_the_broker_is_reached_when_the_first_addresses_are_black_holes(
    hosts: tuple[str, ...], scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, *hosts)
    async with broker_of(scheme) as port:
        with holes(hosts, port):
            broker = Broker(scheme=scheme, host="several.test", port=port, path="/mqtt", protocol="3.1.1")
            publisher = Publisher(broker)
            await publisher.connect()
            await publisher.close()


@on_both_loops
async def test_an_address_that_fails_in_its_handshake_does_not_hide_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address takes the connection, and ends it where TLS would begin."""
    import ssl

    resolve(monkeypatch, "127.0.0.2", "127.0.0.1")
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("several.test").configure_cert(tls)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    async def shut(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with FakeServer(echo, tls=tls) as server:
        other = await asyncio.start_server(shut, "127.0.0.2", server.port)
        pool = HttpPool(f"https://several.test:{server.port}", ssl_context=trusting)
        try:
            assert (await pool.request(head(4), b"body")).body == b"body"
        finally:
            await pool.close()
            other.close()


@on_both_loops
async def test_a_silent_address_is_tried_last_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address takes the connection and then says nothing to the handshake: the whole time is gone, once."""
    import ssl

    resolve(monkeypatch, "127.0.0.2", "127.0.0.1")
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("several.test").configure_cert(tls)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with FakeServer(echo, tls=tls) as server:
        with socket.socket() as silent:
            silent.bind(("127.0.0.2", server.port))
            silent.listen(50)
            where = f"https://several.test:{server.port}"
            pool = HttpPool(where, ssl_context=trusting, connect_timeout_s=1.5)
            # What is known of addresses is the process's. Time enough for a handshake, however busy the machine is.
            patient = HttpPool(where, ssl_context=trusting, connect_timeout_s=30.0)
            try:
                with pytest.raises(NotSent):
                    await pool.request(head(4), b"body")
                async with asyncio.timeout(20.0):
                    assert (await patient.request(head(4), b"body")).body == b"body"
            finally:
                await pool.close()
                await patient.close()


@on_both_loops
async def test_a_broker_address_that_says_nothing_is_tried_last_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve(monkeypatch, "127.0.0.2", "127.0.0.1")

    async def serve(peer: Peer) -> None:
        await peer.connect()
        await peer.subscribe()
        await peer.until_closed()

    async with FakeBroker(serve) as broker:
        with socket.socket() as silent:
            silent.bind(("127.0.0.2", broker.port))
            silent.listen(50)
            rig = Rig(broker, host="several.test", connect_timeout_s=0.5)
            rig.start()
            try:
                await rig.connected(15.0)
            finally:
                await rig.subscriber.close()
                assert rig.task is not None
                await asyncio.wait([rig.task])


@on_both_loops
async def test_a_good_address_that_was_slow_once_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have failed then. To begin with the silent one each time would leave the good one untried for a minute."""
    resolve(monkeypatch, "127.0.0.2", "127.0.0.1")
    seen = 0

    async def serve(peer: Peer) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            await peer.connect()
            await peer.subscribe()
        await peer.until_closed()

    async with FakeBroker(serve) as broker:
        with socket.socket() as silent:
            silent.bind(("127.0.0.2", broker.port))
            silent.listen(50)
            rig = Rig(broker, host="several.test", connect_timeout_s=0.5)
            rig.start()
            try:
                await rig.connected(20.0)
                assert seen > 1
            finally:
                await rig.subscriber.close()
                assert rig.task is not None
                await asyncio.wait([rig.task])


@on_both_loops
async def test_a_late_loop_takes_what_has_connected_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address has connected at once, and the loop is late: the next one is not begun beside it."""
    resolve(monkeypatch, "127.0.0.1", "127.0.0.2")
    begin = dial._Race.start_next
    begun = 0

    def late(self: dial._Race) -> None:
        nonlocal begun
        begun += 1
        begin(self)
        if begun == 1:
            time.sleep(2 * dial.STAGGER_S)

    monkeypatch.setattr(dial._Race, "start_next", late)
    with socket.socket() as good, socket.socket() as silent:
        good.bind(("127.0.0.1", 0))
        good.listen(5)
        silent.bind(("127.0.0.2", good.getsockname()[1]))
        silent.listen(5)
        transport = await dial.dial(asyncio.Protocol(), "several.test", good.getsockname()[1], tls=None)
        try:
            assert transport.get_extra_info("peername")[0] == "127.0.0.1"
            assert begun == 1
        finally:
            transport.abort()
            await asyncio.sleep(0)


@on_both_loops
async def test_a_name_that_hangs_holds_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver that does not answer takes none of the threads that everybody shares."""
    true = socket.getaddrinfo
    go_on = threading.Event()

    def fake(host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0) -> Any:  # noqa: A002
        if host == "hangs.test" and not flags & socket.AI_NUMERICHOST:
            go_on.wait(60)
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return true(host, port, family, type, proto, flags)

    monkeypatch.setattr(socket, "getaddrinfo", fake)
    loop = asyncio.get_running_loop()
    pool = HttpPool("http://hangs.test", max_connections=64, connect_timeout_s=0.3)
    try:
        tried = await asyncio.gather(*(pool.request(head(0), b"") for _ in range(64)), return_exceptions=True)
        assert all(isinstance(one, NotSent) for one in tried)
        async with asyncio.timeout(10):
            assert await loop.run_in_executor(None, lambda: 7) == 7
        assert sum("lookup" in thread.name for thread in threading.enumerate()) <= 3
    finally:
        go_on.set()
        await pool.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@on_both_loops
@pytest.mark.parametrize("secure", [False, True])
async def test_a_call_cancelled_while_it_connects_leaves_nothing_behind(secure: bool) -> None:
    """Whatever the moment: the pool's books are empty, close() returns, and no socket stays open."""
    import ssl

    tls: ssl.SSLContext | None = None
    trusting: ssl.SSLContext | None = None
    if secure:
        authority = trustme.CA()
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(tls)
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
    async with FakeServer(echo, tls=tls) as server:
        before = descriptors()
        for turn in range(80):
            pool = HttpPool(server.url, ssl_context=trusting)
            calls = [asyncio.create_task(pool.request(head(4), b"body")) for _ in range(2)]
            for _ in range(turn % 20):
                await asyncio.sleep(0)
            if turn % 2:
                # the peer has answered, and we have not looked yet
                time.sleep(0.0005)
                await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            async with asyncio.timeout(10):
                await pool.close()
            assert pool.open == pool.busy == 0
        await until(lambda: server.open == 0, 10.0)
        await until(lambda: descriptors() <= before, 10.0)


@on_both_loops
async def test_a_broker_connection_cancelled_while_it_is_made_leaves_nothing_behind() -> None:
    async with FakeBroker(accept) as broker:
        before = descriptors()
        for turn in range(40):
            rig = Rig(broker)
            rig.start()
            assert rig.task is not None
            for _ in range(turn % 15):
                await asyncio.sleep(0)
            if turn % 2:
                time.sleep(0.0005)
                await asyncio.sleep(0)
            async with asyncio.timeout(10):
                await rig.crash()
        await until(lambda: descriptors() <= before, 5.0)
