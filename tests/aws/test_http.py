from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from fastkin.aws.http import HttpPool
from fastkin.errors import Action, KinesisError, NotSent, TransportError
from support.fake_http import FakeServer, Link, Request, on_both_loops

if TYPE_CHECKING:
    from fastkin.aws.http_answer import Reply


def head(length: int, host: str = "localhost") -> bytes:
    return f"POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n".encode()


async def post(pool: HttpPool, body: Any = b"body") -> Reply:
    return await pool.request(head(memoryview(body).nbytes), body)


async def echo(link: Link, request: Request) -> None:
    link.reply(200, request.body, {"X-Nth": str(request.nth)})


class pool_to:  # noqa: N801 - reads as a call
    """A pool that is closed at the end."""

    def __init__(self, url: str, **options: Any) -> None:
        self.pool = HttpPool(url, **{"request_timeout_s": 5.0, "connect_timeout_s": 5.0, **options})

    async def __aenter__(self) -> HttpPool:
        return self.pool

    async def __aexit__(self, *_: object) -> None:
        await self.pool.close()
        assert self.pool.open == 0
        assert self.pool.busy == 0


@on_both_loops
async def test_one_connection_serves_many_calls() -> None:
    async with FakeServer(echo) as server, pool_to(server.url) as pool:
        for size in (0, 1, 200, 70_000):
            body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
            reply = await post(pool, body)
            assert (reply.status, reply.body) == (200, body)
        assert reply.headers["x-nth"] == "4"
        assert server.connections == pool.connects == 1


@on_both_loops
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_large_bodies_arrive_whole(kind: type) -> None:
    sizes = [256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1, 6_800_000]
    async with FakeServer(echo) as server, pool_to(server.url) as pool:
        for size in sizes:
            body = kind((b"0123456789abcdef" * (size // 16 + 1))[:size])
            assert (await post(pool, body)).body == bytes(body)
        assert server.connections == 1


@on_both_loops
async def test_never_more_connections_than_allowed() -> None:
    async def slow(link: Link, request: Request) -> None:
        await asyncio.sleep(0.01)
        link.reply(200, request.body)

    async with FakeServer(slow) as server, pool_to(server.url, max_connections=3) as pool:
        replies = await asyncio.gather(*(post(pool, b"%d" % n) for n in range(30)))
        assert [reply.body for reply in replies] == [b"%d" % n for n in range(30)]
        assert server.peak <= 3
        assert server.busy_peak == 3
        assert server.connections == 3


@on_both_loops
async def test_the_connection_used_last_is_used_first() -> None:
    async def slow(link: Link, request: Request) -> None:
        await asyncio.sleep(0.01)
        link.reply(200, b"", {"X-Nth": str(request.nth)})

    async with FakeServer(slow) as server, pool_to(server.url, max_connections=4) as pool:
        await asyncio.gather(*(post(pool) for _ in range(4)))
        nth = [(await post(pool)).headers["x-nth"] for _ in range(3)]
        assert nth == ["2", "3", "4"]


@on_both_loops
async def test_an_idle_connection_is_closed_after_its_limit() -> None:
    async with FakeServer(echo) as server, pool_to(server.url, idle_s=0.1) as pool:
        await post(pool)
        assert pool.open == 1
        await asyncio.sleep(0.3)
        assert pool.open == 0
        await post(pool)
        assert server.connections == 2
        assert pool.retries == 0


@on_both_loops
async def test_a_reused_connection_that_dies_before_an_answer_is_replaced_at_once() -> None:
    async def die_on_second(link: Link, request: Request) -> None:
        if request.number == 1:
            link.cut()
        else:
            link.reply(200, request.body)

    heads = []

    async with FakeServer(die_on_second) as server, pool_to(server.url) as pool:

        def make_head() -> bytes:
            heads.append(1)
            return head(4)

        for _ in range(3):
            assert (await pool.request(make_head, b"body")).body == b"body"
        assert pool.retries == 1
        assert len(heads) == 4  # signed anew for the second try
        assert server.connections == 2


@on_both_loops
async def test_a_connection_the_server_closed_while_idle_is_not_noticed_by_the_caller() -> None:
    async def answer_and_close(link: Link, request: Request) -> None:
        link.reply(200, request.body)
        await link.close()

    async with FakeServer(answer_and_close) as server, pool_to(server.url) as pool:
        for _ in range(5):
            assert (await post(pool)).body == b"body"
        assert server.connections == 5


@on_both_loops
async def test_a_fresh_connection_that_dies_is_an_error() -> None:
    async def cut(link: Link, request: Request) -> None:
        link.cut()

    async with FakeServer(cut) as server, pool_to(server.url) as pool:
        with pytest.raises(TransportError, match="before an answer") as caught:
            await post(pool)
        assert caught.value.code == "ConnectionLost"
        assert caught.value.action is Action.RETRY
        assert server.connections == 1


@on_both_loops
async def test_a_reused_connection_that_dies_in_the_answer_is_an_error() -> None:
    async def half(link: Link, request: Request) -> None:
        if request.nth == 1:
            link.reply(200, b"")
        else:
            link.send(b"HTTP/1.1 200 OK\r\nContent-Le")
            await link.close()

    async with FakeServer(half) as server, pool_to(server.url) as pool:
        await post(pool)
        with pytest.raises(TransportError, match="in the middle of the answer"):
            await post(pool)
        assert pool.retries == 0


ANSWERS = {
    "chunked": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
        b"abcde",
        True,
    ),
    "continue first": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"ok",
        True,
    ),
    "hints first": (
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"ok",
        True,
    ),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    "close": (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", b"ok", False),
    "1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", b"ok", False),
}


@on_both_loops
@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("piece", [1, 7, 10_000])
async def test_answers_in_any_shape_and_any_pieces(name: str, piece: int) -> None:
    raw, body, kept = ANSWERS[name]

    async def answer(link: Link, request: Request) -> None:
        for at in range(0, len(raw), piece):
            link.send(raw[at : at + piece])
            await asyncio.sleep(0)

    async with FakeServer(answer) as server, pool_to(server.url) as pool:
        for _ in range(2):
            assert (await post(pool)).body == body
        assert server.connections == (1 if kept else 2)
        assert pool.retries == 0


@on_both_loops
async def test_an_answer_that_ends_with_the_connection() -> None:
    async def answer(link: Link, request: Request) -> None:
        link.send(b"HTTP/1.1 200 OK\r\n\r\n")
        for part in (b"one ", b"two ", b"three"):
            link.send(part)
            await asyncio.sleep(0.01)
        await link.close()

    async with FakeServer(answer) as server, pool_to(server.url) as pool:
        assert (await post(pool)).body == b"one two three"
        assert (await post(pool)).body == b"one two three"
        assert server.connections == 2


BAD = {
    "not http": (b"SSH-2.0-OpenSSH_9.2\r\n", "BadAnswer"),
    "bad chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "BadAnswer"),
    "two lengths": (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "BadAnswer"),
    "minus": (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "BadAnswer"),
    "upgrade": (b"HTTP/1.1 101 S\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "BadAnswer"),
    "huge length": (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", "AnswerTooLarge"),
    "huge number": (b"HTTP/1.1 200 OK\r\nContent-Length: 9999999999999999999999\r\n\r\n", "BadAnswer"),
    "endless header": (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000, "AnswerTooLarge"),
    "endless headers": (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 30_000, "AnswerTooLarge"),
    "zero bytes": (bytes(100), "BadAnswer"),
}


@on_both_loops
@pytest.mark.parametrize("name", BAD)
async def test_nonsense_ends_the_call_and_its_connection(name: str) -> None:
    raw, code = BAD[name]

    async def answer(link: Link, request: Request) -> None:
        if request.number == 0:
            link.send(raw)
        else:
            link.reply(200, b"fine")

    async with FakeServer(answer) as server, pool_to(server.url) as pool:
        with pytest.raises(TransportError) as caught:
            await post(pool)
        assert caught.value.code == code
        assert pool.open == 0
        assert (await post(pool)).body == b"fine"


@on_both_loops
async def test_an_endless_answer_is_cut_off() -> None:
    async def answer(link: Link, request: Request) -> None:
        link.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(40):
            link.send(b"100000\r\n" + b"x" * 2**20 + b"\r\n")
            await link.writer.drain()

    async with FakeServer(answer) as server, pool_to(server.url) as pool:
        with pytest.raises(TransportError) as caught:
            await post(pool)
        assert caught.value.code == "AnswerTooLarge"


@on_both_loops
async def test_two_answers_to_one_request_end_the_connection() -> None:
    async def answer(link: Link, request: Request) -> None:
        link.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\naHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nb")

    async with FakeServer(answer) as server, pool_to(server.url) as pool:
        assert (await post(pool)).body == b"a"
        assert (await post(pool)).body == b"a"  # never the second answer
        assert server.connections == 2


@on_both_loops
async def test_bytes_nobody_asked_for_end_an_idle_connection() -> None:
    async def answer(link: Link, request: Request) -> None:
        link.reply(200, b"a")
        await asyncio.sleep(0.02)
        link.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nb")

    async with FakeServer(answer) as server, pool_to(server.url) as pool:
        await post(pool)
        await asyncio.sleep(0.1)
        assert pool.open == 0
        assert (await post(pool)).body == b"a"


class Body:
    """A body that tells whether anybody still holds its buffer."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    @property
    def held(self) -> bool:
        gc.collect()
        try:
            self.data.append(0)
        except BufferError:
            return True
        self.data.pop()
        return False


@on_both_loops
@pytest.mark.parametrize("closing", [True, False])
async def test_an_early_413_is_delivered_and_the_body_is_free(closing: bool) -> None:
    async def refuse(link: Link, request: Request) -> None:
        link.reply(413, b"too big")
        if closing:
            await link.close()
        else:
            await asyncio.sleep(30)

    async with FakeServer(refuse, head_only=True) as server, pool_to(server.url) as pool:
        body = Body(20_000_000)
        reply = await pool.request(head(len(body.data)), body.data)
        assert (reply.status, reply.body) == (413, b"too big")
        assert not body.held
        assert pool.open == 0


@on_both_loops
async def test_a_body_the_server_does_not_read_times_out_and_is_free() -> None:
    async def nothing(link: Link, request: Request) -> None:
        await asyncio.sleep(30)

    async with (
        FakeServer(nothing, head_only=True) as server,
        pool_to(server.url, request_timeout_s=0.2) as pool,
    ):
        body = Body(20_000_000)
        with pytest.raises(TransportError) as caught:
            await pool.request(head(len(body.data)), body.data)
        assert caught.value.code == "RequestTimeout"
        assert not body.held


@on_both_loops
async def test_a_cancelled_call_frees_its_place_and_its_body() -> None:
    async def answer(link: Link, request: Request) -> None:
        if request.number == 0:
            await asyncio.sleep(30)
        link.reply(200, b"ok")

    async with FakeServer(answer, head_only=True) as server, pool_to(server.url, max_connections=1) as pool:
        body = Body(20_000_000)
        first = asyncio.create_task(pool.request(head(len(body.data)), body.data))
        second = asyncio.create_task(post(pool, b""))
        third = asyncio.create_task(post(pool, b""))
        await asyncio.sleep(0.05)
        second.cancel()  # while it waits for a place
        first.cancel()  # while it writes
        assert (await third).body == b"ok"
        assert first.cancelled()
        assert second.cancelled()
        del first
        assert not body.held


@on_both_loops
async def test_cancelled_at_any_moment() -> None:
    async def answer(link: Link, request: Request) -> None:
        await asyncio.sleep(0.001)
        link.reply(200, request.body)

    async with FakeServer(answer) as server, pool_to(server.url, max_connections=2) as pool:
        for turn in range(60):
            tasks = [asyncio.create_task(post(pool, b"%d" % n)) for n in range(4)]
            for _ in range(turn % 12):
                await asyncio.sleep(0)
            if turn % 3 == 0:
                await asyncio.sleep(0.0005 * (turn % 7))
            for task in tasks[:: 1 + turn % 2]:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
            for n, end in enumerate(ended):
                assert isinstance(end, asyncio.CancelledError) or end.body == b"%d" % n
            assert pool.busy == 0
            assert pool.open <= 2
        assert (await post(pool)).body == b"body"


@on_both_loops
async def test_a_slow_answer_times_out() -> None:
    async def slow(link: Link, request: Request) -> None:
        link.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        for _ in range(100):
            link.send(b"x")
            await asyncio.sleep(0.05)

    async with FakeServer(slow) as server, pool_to(server.url, request_timeout_s=0.2) as pool:
        begin = time.monotonic()
        with pytest.raises(TransportError, match=r"is too slow: \d+ bytes in") as caught:
            await post(pool)
        assert caught.value.code == "RequestTimeout"
        assert time.monotonic() - begin < 3
        assert pool.open == 0


@on_both_loops
async def test_a_slow_reader_gets_the_whole_body() -> None:
    async def slow(link: Link, request: Request) -> None:
        left = int(request.headers["content-length"])
        total = 0
        while left:
            data = await link.reader.read(min(left, 300_000))
            left -= len(data)
            total += sum(data[::1000])
            await asyncio.sleep(0.002)
        link.reply(200, b"%d" % total)

    body = bytes(range(1, 251)) * 20_000
    async with FakeServer(slow, head_only=True) as server, pool_to(server.url) as pool:
        assert (await post(pool, body)).status == 200


@on_both_loops
async def test_nobody_listens() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with pool_to(f"http://127.0.0.1:{taken.getsockname()[1]}") as pool:
            with pytest.raises(NotSent, match="refused") as caught:
                await post(pool)
    assert caught.value.code == "ConnectFailed"


@on_both_loops
async def test_no_such_host() -> None:
    async with pool_to("http://no-such-host.invalid") as pool:
        with pytest.raises(TransportError) as caught:
            await post(pool)
    assert caught.value.code == "NameNotFound"
    assert "no-such-host.invalid" in str(caught.value)


@on_both_loops
async def test_connecting_times_out() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        where = full.getsockname()
        fill = [socket.socket() for _ in range(4)]
        try:
            for sock in fill:  # the kernel drops further SYNs once the backlog is full
                sock.setblocking(False)
                sock.connect_ex(where)
            async with pool_to(f"http://127.0.0.1:{where[1]}", connect_timeout_s=0.2) as pool:
                with pytest.raises(NotSent, match=r"within 0\.2 s") as caught:
                    await post(pool)
            assert caught.value.code == "ConnectTimeout"
        finally:
            for sock in fill:
                sock.close()


@on_both_loops
async def test_closing_ends_the_calls_that_are_on_their_way() -> None:
    async def nothing(link: Link, request: Request) -> None:
        await asyncio.sleep(30)

    async with FakeServer(nothing) as server:
        pool = HttpPool(server.url, max_connections=1)
        calls = [asyncio.create_task(post(pool)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await pool.close()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [getattr(end, "code", end) for end in ended] == ["PoolClosed"] * 3
        with pytest.raises(TransportError, match="closed"):
            await post(pool)
        assert pool.busy == pool.open == 0


# -- TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def server_side(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


def client_side(authority: trustme.CA | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if authority is not None:
        authority.configure_trust(context)
    return context


@on_both_loops
async def test_tls_with_large_bodies(authority: trustme.CA) -> None:
    tls = server_side(authority, "127.0.0.1")
    async with (
        FakeServer(echo, tls=tls) as server,
        pool_to(server.url, ssl_context=client_side(authority)) as pool,
    ):
        for size in (10, 300_000, 6_800_000):
            body = (b"0123456789abcdef" * (size // 16 + 1))[:size]
            assert (await post(pool, body)).body == body
        assert server.connections == 1


@on_both_loops
async def test_tls_early_answer(authority: trustme.CA) -> None:
    async def refuse(link: Link, request: Request) -> None:
        link.reply(413, b"too big")
        await asyncio.sleep(30)

    tls = server_side(authority, "127.0.0.1")
    async with (
        FakeServer(refuse, tls=tls, head_only=True) as server,
        pool_to(server.url, ssl_context=client_side(authority)) as pool,
    ):
        body = Body(20_000_000)
        assert (await pool.request(head(len(body.data)), body.data)).status == 413
        assert not body.held


@on_both_loops
async def test_tls_reused_connection_that_dies(authority: trustme.CA) -> None:
    async def die_on_second(link: Link, request: Request) -> None:
        if request.number == 1:
            link.cut()
        else:
            link.reply(200, request.body)

    tls = server_side(authority, "127.0.0.1")
    async with (
        FakeServer(die_on_second, tls=tls) as server,
        pool_to(server.url, ssl_context=client_side(authority)) as pool,
    ):
        for _ in range(3):
            assert (await post(pool)).body == b"body"
        assert pool.retries == 1


@on_both_loops
@pytest.mark.parametrize("case", ["unknown authority", "wrong host", "expired"])
async def test_tls_refuses_a_certificate_that_does_not_fit(authority: trustme.CA, case: str) -> None:
    import datetime

    trusted: trustme.CA | None = authority
    if case == "unknown authority":
        tls, trusted = server_side(authority, "127.0.0.1"), None
        words = "unable to get local issuer certificate.*set ca_bundle|self.signed.*set ca_bundle"
    elif case == "wrong host":
        tls, words = server_side(authority, "kinesis.example.com"), "for another name: .*(mismatch|not valid for)"
    else:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
        authority.issue_cert("127.0.0.1", not_after=past).configure_cert(tls)
        words = "expired.*clock"
    async with (
        FakeServer(echo, tls=tls) as server,
        pool_to(server.url, ssl_context=client_side(trusted)) as pool,
    ):
        with pytest.raises(KinesisError, match=words) as caught:
            await post(pool)
        assert caught.value.code == "CertificateNotTrusted"
        assert caught.value.action is Action.OPERATOR
        assert "127.0.0.1" in str(caught.value)
        assert ("ca_bundle" in str(caught.value)) == (trusted is None)
        assert not server.requests


@on_both_loops
async def test_tls_to_a_server_that_speaks_plain_http() -> None:
    async def never(link: Link, request: Request) -> None:
        raise AssertionError

    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    async with server, pool_to(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}") as pool:
        with pytest.raises(TransportError, match="is the endpoint really https") as caught:
            await post(pool)
        assert caught.value.code == "TlsFailed"


@on_both_loops
async def test_old_tls_is_refused(authority: trustme.CA) -> None:
    from fastkin.aws.client import tls_context
    from fastkin.config import Kinesis

    context = tls_context(Kinesis(stream="x"))
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


# -- the loop stays free


@on_both_loops
async def test_large_bodies_are_written_in_slices() -> None:
    """No single turn of the loop writes a whole body, even when the socket would take it."""
    async with FakeServer(echo) as server, pool_to(server.url) as pool:
        await post(pool)  # connected
        (connection,) = pool._all
        written: list[int] = []
        turns: list[int] = []
        turn = 0
        true = connection._transport

        class Watch:
            def __getattr__(self, name: str) -> Any:
                return getattr(true, name)

            def write(self, data: Any) -> None:
                written.append(len(data))
                turns.append(turn)
                true.write(data)

        connection._transport = Watch()  # type: ignore[assignment]

        async def count() -> None:
            nonlocal turn
            while True:
                turn += 1
                await asyncio.sleep(0)

        counter = asyncio.create_task(count())
        await post(pool, bytes(3_000_000))
        counter.cancel()
        slices = written[1:]
        assert sum(slices) == 3_000_000
        assert max(slices) <= 256 * 1024
        assert len(set(turns[1:])) >= len(slices) - 1
