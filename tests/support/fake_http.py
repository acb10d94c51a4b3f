"""A scripted HTTP/1.1 server on loopback, and a decorator that runs a test on both event loops.

async def answer(link, request): link.reply(200, b"{}")
async with FakeServer(answer) as server: ... server.url, server.requests, server.connections
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import pytest
import uvloop

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable


@dataclass
class Request:
    """One request as it came in. `number` counts over the server, `nth` over its connection."""

    method: str
    path: str
    headers: dict[str, str]
    head: bytes
    body: bytes
    number: int
    nth: int

    @property
    def target(self) -> str:
        return self.headers.get("x-amz-target", "").rpartition(".")[2]


@dataclass
class Link:
    """One connection, seen from the server."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    nth: int = 0
    closed: bool = False

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        lines = [f"HTTP/1.1 {status} Words", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    async def close(self) -> None:
        """End the connection in an orderly way."""
        self.closed = True
        with contextlib.suppress(OSError):
            await self.writer.drain()
        self.writer.close()

    def cut(self) -> None:
        """Drop the connection at once."""
        self.closed = True
        self.writer.transport.abort()


@dataclass
class FakeServer:
    """Reads whole requests and lets `answer` do the rest. With `head_only` bodies are left unread."""

    answer: Callable[[Link, Request], Awaitable[None]]
    tls: ssl.SSLContext | None = None
    head_only: bool = False
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    open: int = 0
    peak: int = 0
    busy: int = 0
    busy_peak: int = 0
    url: str = ""
    links: list[Link] = field(default_factory=list)
    _server: Any = None
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls, limit=2**25)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for link in self.links:
            link.writer.transport.abort()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.sleep(0.01)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        link = Link(reader, writer)
        self.links.append(link)
        self.connections += 1
        self.open += 1
        self.peak = max(self.peak, self.open)
        try:
            while not link.closed:
                request = await self._read(link)
                self.requests.append(request)
                self.busy += 1
                self.busy_peak = max(self.busy_peak, self.busy)
                try:
                    await self.answer(link, request)
                finally:
                    self.busy -= 1
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass
        finally:
            self.open -= 1
            self._tasks.discard(task)
            writer.close()

    async def _read(self, link: Link) -> Request:
        head = await link.reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        headers = {}
        for line in lines:
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        length = int(headers.get("content-length", "0"))
        body = b"" if self.head_only else await link.reader.readexactly(length)
        link.nth += 1
        method, path, _ = first.split(" ")
        return Request(method, path, headers, head, body, len(self.requests), link.nth)


def on_both_loops(test: Callable[..., Any]) -> Callable[..., Any]:
    """Run a coroutine test on asyncio's own loop and on uvloop."""

    def run(loop_name: str, **arguments: Any) -> None:
        factory = uvloop.new_event_loop if loop_name == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(test(**arguments))

    signature = inspect.signature(test)
    loop_name = inspect.Parameter("loop_name", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), loop_name])
    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    run.__module__ = test.__module__
    run.pytestmark = list(getattr(test, "pytestmark", []))
    decorated: Callable[..., Any] = pytest.mark.parametrize("loop_name", ["asyncio", "uvloop"])(run)
    return decorated
