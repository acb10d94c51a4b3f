"""`request_timeout_s` is the time in which nothing moves, and a call that ran out of it tells what had not left."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from typing import TYPE_CHECKING

import pytest
import trustme

from fastkin.aws.http import HttpPool
from fastkin.aws.transports import make_client
from fastkin.config import Kinesis
from fastkin.errors import KinesisError, TransportError
from support.fake_http import FakeServer, Link, Request, on_both_loops

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MIB = 2**20


def head(length: int) -> bytes:
    return f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


@contextlib.asynccontextmanager
async def slow_server(rate: float, *, answers: bool = True, buffer: int = 32 * 1024) -> AsyncIterator[str]:
    """Takes so many bytes a second, as a slow line does: what it has not taken stays with the sender. 0: nothing."""
    loop = asyncio.get_running_loop()
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    listening.bind(("127.0.0.1", 0))
    listening.listen()
    listening.setblocking(False)
    accepted: list[socket.socket] = []

    async def serve(sock: socket.socket) -> None:
        got = b""
        began = time.monotonic()
        while rate:
            while len(got) > rate * (time.monotonic() - began):
                await asyncio.sleep(0.01)
            data = await loop.sock_recv(sock, 8192)
            if not data:
                return
            got += data
            if b"\r\n\r\n" in got:
                wanted = int(got.split(b"Content-Length: ")[1].split(b"\r\n")[0])
                if len(got.partition(b"\r\n\r\n")[2]) >= wanted and answers:
                    await loop.sock_sendall(sock, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                    return

    async def accept() -> None:
        async with asyncio.TaskGroup() as group:
            while True:
                sock, _ = await loop.sock_accept(listening)
                accepted.append(sock)
                group.create_task(serve(sock))

    task = asyncio.create_task(accept())
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        task.cancel()
        await asyncio.wait([task])
        for sock in (*accepted, listening):
            sock.close()


@on_both_loops
async def test_a_body_that_still_leaves_is_not_given_up() -> None:
    """1 MiB at 300 kB/s takes more than three times the timeout. All of it sits in the kernel from the start."""
    async with slow_server(300_000) as url:
        pool = HttpPool(url, request_timeout_s=1.0)
        try:
            assert (await pool.request(head(MIB), bytes(MIB))).body == b"ok"
        finally:
            await pool.close()


@on_both_loops
async def test_what_a_slow_line_holds_in_its_own_buffers_has_time_to_arrive() -> None:
    """The receiving machine has the last half MiB long before its reader gets there: 2 s without a sign of progress."""
    async with slow_server(300_000, buffer=256 * 1024) as url:
        pool = HttpPool(url, request_timeout_s=1.0)
        try:
            assert (await pool.request(head(MIB), bytes(MIB))).body == b"ok"
        finally:
            await pool.close()


@on_both_loops
async def test_a_peer_that_reads_nothing_ends_the_call_and_the_rest_is_counted() -> None:
    async with slow_server(0) as url:
        pool = HttpPool(url, request_timeout_s=0.5)
        try:
            with pytest.raises(TransportError) as caught:
                await pool.request(head(4 * MIB), bytes(4 * MIB))
        finally:
            await pool.close()
    assert caught.value.code == "RequestTimeout"
    assert MIB < getattr(caught.value, "unsent_bytes", None) <= 4 * MIB


@on_both_loops
@pytest.mark.parametrize("size", [100, MIB])
@pytest.mark.parametrize("secure", [False, True])
async def test_a_peer_that_took_all_and_hangs_has_it_all(size: int, secure: bool) -> None:
    async def hang(link: Link, request: Request) -> None:
        await asyncio.sleep(30)

    tls: ssl.SSLContext | None = None
    trusting: ssl.SSLContext | None = None
    if secure:
        authority = trustme.CA()
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(tls)
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
    async with FakeServer(hang, tls=tls) as server:
        pool = HttpPool(server.url, ssl_context=trusting, request_timeout_s=1.0)
        try:
            with pytest.raises(TransportError) as caught:
                await pool.request(head(size), bytes(size))
        finally:
            await pool.close()
        assert len(server.requests[0].body) == size
    assert caught.value.code == "RequestTimeout"
    assert getattr(caught.value, "unsent_bytes", None) == 0


@on_both_loops
async def test_a_peer_that_stops_reading_does_not_hold_a_call_of_the_sdk_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The SDK's own timeouts count from when the body is written, which it never is."""
    monkeypatch.setattr("fastkin.aws.sdk._SLOW_RATE", 1e9, raising=False)
    keys = {"access_key": "A", "secret_key": "S", "region": "us-east-1", "transport": "sdk"}
    async with slow_server(0) as url:
        client = make_client(Kinesis(stream="s", endpoint_url=url, request_timeout_s=0.3, **keys))
        await client.start()
        try:
            async with asyncio.timeout(30):
                with pytest.raises(KinesisError) as caught:
                    await client.call("PutRecords", bytes(8 * MIB))
        finally:
            await client.close()
    assert caught.value.code == "RequestTimeout"


@on_both_loops
async def test_an_answer_that_still_comes_is_not_given_up() -> None:
    async def slowly(link: Link, request: Request) -> None:
        link.send(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n")
        for _ in range(20):
            link.send(bytes(10_000))
            await asyncio.sleep(0.1)

    async with FakeServer(slowly) as server:
        pool = HttpPool(server.url, request_timeout_s=1.0)
        try:
            assert len((await pool.request(head(1), b"x")).body) == 200_000
        finally:
            await pool.close()


@on_both_loops
@pytest.mark.parametrize("what", ["answer", "hints"])
async def test_a_trickle_does_not_hold_a_call_for_ever(what: str) -> None:
    async def trickle(link: Link, request: Request) -> None:
        if what == "answer":
            link.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            link.send(b"x" if what == "answer" else b"HTTP/1.1 103 Hints\r\n\r\n")
            await asyncio.sleep(0.05)

    async with FakeServer(trickle) as server:
        pool = HttpPool(server.url, request_timeout_s=0.3)
        try:
            with pytest.raises(TransportError) as caught:
                async with asyncio.timeout(20):
                    await pool.request(head(1), b"x")
        finally:
            await pool.close()
    assert caught.value.code == "RequestTimeout"
