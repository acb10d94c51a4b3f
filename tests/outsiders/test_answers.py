"""An answer belongs to one request or to none: bytes that nobody asked for end a connection."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from typing import TYPE_CHECKING, Any

import pytest

from fastkin import Producer
from fastkin.aws.http import HttpPool
from fastkin.errors import TransportError
from support.fake_http import FakeServer, Link, Request, on_both_loops
from support.servers import ACCESS_KEY, SECRET_KEY

if TYPE_CHECKING:
    from fastkin.aws.http_answer import Reply

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nmine"
PLANTED = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nPLANTED"


def head(length: int) -> bytes:
    return f"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


async def post(pool: HttpPool, body: bytes = b"body") -> Reply:
    return await pool.request(head(len(body)), body)


class pool_to:  # noqa: N801 - reads as a call
    def __init__(self, url: str, **options: Any) -> None:
        self.pool = HttpPool(url, **{"request_timeout_s": 5.0, "connect_timeout_s": 5.0, **options})

    async def __aenter__(self) -> HttpPool:
        return self.pool

    async def __aexit__(self, *_: object) -> None:
        await self.pool.close()


BEHIND = {
    "half an answer": PLANTED[:25],
    "all but a byte": PLANTED[:-1],
    "a head": PLANTED[: PLANTED.index(b"\r\n\r\n") + 4],
    "one letter": b"H",
    "a whole answer": PLANTED,
    "two answers": PLANTED * 2,
    "an answer and a half": PLANTED + PLANTED[:30],
    "nonsense": b"\x00\x01\x02",
    "a blank line": b"\r\n",
    "a line feed": b"\n",
    "early hints": b"HTTP/1.1 103 Early Hints\r\n\r\n",
}
FIRST = {
    "length": WHOLE,
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nmine\r\n0\r\n\r\n",
    "trailers": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nmine\r\n0\r\nX: y\r\n\r\n",
    "empty": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "no content": b"HTTP/1.1 204 No Content\r\n\r\n",
    "not modified": b"HTTP/1.1 304 Not Modified\r\n\r\n",
}


@on_both_loops
@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("behind", BEHIND)
async def test_bytes_behind_an_answer_never_reach_the_next_call(first: str, behind: str) -> None:
    """They come in the same read as the answer; the rest of them, where there is one, after the next request."""

    async def answer(link: Link, request: Request) -> None:
        if request.number == 0:
            link.send(FIRST[first] + BEHIND[behind])
        elif request.nth > 1:
            link.send(PLANTED[25:] + PLANTED)  # to a request on the connection that should be gone
        else:
            link.reply(200, b"fresh")

    async with FakeServer(answer) as server, pool_to(server.url) as pool:
        assert (await post(pool)).body in {b"mine", b""}
        assert (await post(pool)).body == b"fresh"
        assert server.connections == 2


@on_both_loops
@pytest.mark.parametrize("piece", [1, 2, 3, 7, 20])
async def test_bytes_behind_an_answer_are_seen_wherever_it_is_cut(piece: int) -> None:
    async def answer(link: Link, request: Request) -> None:
        if request.number:
            link.reply(200, b"fresh")
            return
        raw = WHOLE + PLANTED[:17]
        for at in range(0, len(raw), piece):
            link.send(raw[at : at + piece])
            await asyncio.sleep(0)

    async with FakeServer(answer) as server, pool_to(server.url) as pool:
        assert (await post(pool)).body == b"mine"
        assert (await post(pool)).body == b"fresh"
        assert server.connections == 2


@on_both_loops
async def test_an_answer_that_lies_ready_before_the_request_is_not_its_answer() -> None:
    """It came between two calls, and the loop has not looked yet: the next call finds it in the socket."""
    sent = asyncio.Event()

    async def answer(link: Link, request: Request) -> None:
        link.reply(200, b"mine" if request.number == 0 else b"fresh")
        if request.number == 0:
            await link.writer.drain()
            sent.set()

    async with FakeServer(answer) as server, pool_to(server.url) as pool:
        assert (await post(pool)).body == b"mine"
        await sent.wait()
        planting = server.links[0].writer.get_extra_info("socket")
        with socket.socket(fileno=socket.dup(planting.fileno())) as raw:
            raw.send(PLANTED)
            time.sleep(0.05)  # loopback has it; our loop has had no turn
            assert (await post(pool)).body == b"fresh"
        assert server.connections == 2


@on_both_loops
async def test_an_answer_to_a_connection_that_has_not_asked_is_not_taken() -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(PLANTED)
        await writer.drain()
        await reader.read()
        writer.close()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, pool_to(f"http://127.0.0.1:{port}") as pool:
        for _ in range(3):
            reply: Any = None
            try:
                reply = await post(pool)
            except TransportError:
                continue
            # sent before it read us, received after: nobody can tell; the connection is not used again
            assert reply.body == b"PLANTED"
        assert pool.connects == 3


@on_both_loops
async def test_nobody_has_stored_what_was_not_sent_yet() -> None:
    """A 200 while most of the body is still here: an answer to something else."""

    async def answer(link: Link, request: Request) -> None:
        link.reply(200, b"stored")
        await asyncio.sleep(30)

    async with FakeServer(answer, head_only=True) as server, pool_to(server.url) as pool:
        with pytest.raises(TransportError, match="before the request was written") as caught:
            await post(pool, bytes(20_000_000))
        assert caught.value.code == "BadAnswer"
        assert pool.open == 0


CHUNKED = b"4\r\nmine\r\n0\r\n\r\n"
TWO_WAYS = {
    "two codings": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + CHUNKED,
    "an unknown coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKED,
    "not chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nmine",
    "both": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + CHUNKED,
    "both, the other way": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    "chunked in 1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nContent-Length: 4\r\n\r\nmine",
    "a folded length": b"HTTP/1.1 200 OK\r\nContent-Length:\r\n 4\r\n\r\nmine",
    "a folded header": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 4\r\n\r\nmine",
    "a hint with a length": b"HTTP/1.1 103 Hints\r\nContent-Length: 4\r\n\r\n" + WHOLE,
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 4\r\n\r\nmine",
    "HTTP/0.9": b"HTTP/0.9 200 OK\r\nContent-Length: 4\r\n\r\nmine",
    "RTSP": b"RTSP/1.0 200 OK\r\nContent-Length: 4\r\n\r\nmine",
    "status 0": b"HTTP/1.1 000 OK\r\nContent-Length: 0\r\n\r\n" + WHOLE,
    "status 600": b"HTTP/1.1 600 OK\r\nContent-Length: 4\r\n\r\nmine",
    "a blank line first": b"\r\n" + WHOLE,
    "hints for ever": b"HTTP/1.1 103 Hints\r\n\r\n" * 10_000,
}


@on_both_loops
@pytest.mark.parametrize("name", TWO_WAYS)
async def test_an_answer_that_can_be_read_in_two_ways_is_none(name: str) -> None:
    async def answer(link: Link, request: Request) -> None:
        if request.number:
            link.reply(200, b"fresh")
        else:
            link.send(TWO_WAYS[name])

    async with FakeServer(answer) as server, pool_to(server.url, request_timeout_s=2.0) as pool:
        with pytest.raises(TransportError) as caught:
            await post(pool)
        assert caught.value.code in {"BadAnswer", "AnswerTooLarge"}
        assert (await post(pool)).body == b"fresh"
        assert server.connections == 2


@on_both_loops
@pytest.mark.parametrize("piece", [1, 5, 1000])
async def test_an_answer_and_the_end_in_one_read(piece: int) -> None:
    async def answer(link: Link, request: Request) -> None:
        for at in range(0, len(WHOLE), piece):
            link.send(WHOLE[at : at + piece])
        link.writer.write_eof()

    async with FakeServer(answer) as server, pool_to(server.url) as pool:
        for _ in range(4):
            assert (await post(pool)).body == b"mine"
        assert server.connections == 4


async def test_no_receipt_is_resolved_by_an_answer_to_another_call() -> None:
    """The first answer has the beginning of a second one behind it. The server keeps nothing of the second call."""
    kept: list[bytes] = []

    def stored(count: int, number: int) -> bytes:
        one = {"SequenceNumber": str(number), "ShardId": "shardId-000000000000"}
        body = json.dumps({"FailedRecordCount": 0, "Records": [one] * count}).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    planted = stored(1, 666)

    async def answer(link: Link, request: Request) -> None:
        if request.nth > 1:
            link.send(planted[40:])
            await asyncio.sleep(0.05)
            link.cut()
            return
        records = json.loads(request.body)["Records"]
        kept.extend(record["Data"] for record in records)
        behind = planted[:40] if request.number == 0 else b""
        link.send(stored(len(records), 100 + len(kept)) + behind)

    keys = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY}
    async with (
        FakeServer(answer) as server,
        Producer(
            "s", region="us-east-1", endpoint_url=server.url, shard_map=False, linger_ms=0, max_connections=1, **keys
        ) as producer,
    ):
        results = []
        for n in range(2):
            receipt = await producer.put(b"%d" % n)
            results.append((await receipt).sequence_number)
        assert results == ["101", "102"]
        assert len(kept) == 2
