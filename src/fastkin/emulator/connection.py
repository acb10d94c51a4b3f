"""One connection of a client: requests in, answers out in order, late, slowly or cut as a fault wants it."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import httptools

from .streams import MIB

if TYPE_CHECKING:
    from .faults import Fault, Plan
    from .server import Emulator

# Ten times the largest legal body: only a client gone wild is stopped here.
MAX_BODY_BYTES: Final = 128 * MIB
MAX_PIPELINED: Final = 64
SLOW_STEPS: Final = 10


@dataclass(slots=True)
class Put:
    """One call that stored records. `answered`: its true answer was written whole; `port`: the caller's."""

    port: int
    stored: int
    answered: bool = False


@dataclass(slots=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""
    keep_alive: bool = True
    early: Fault | None = None
    port: int = 0
    put: Put | None = None


class Connection(asyncio.Protocol):
    """One connection: requests are answered one after another, in order."""

    def __init__(self, emulator: Emulator, loop: asyncio.AbstractEventLoop) -> None:
        self._emulator = emulator
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._queue: deque[Request] = deque()
        self._busy = False
        self._port = 0
        self._last_put: Put | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reset()

    # --- asyncio -------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is of another class
        self._port = transport.get_extra_info("peername")[1]
        self._emulator.joined(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if exc is not None and self._last_put is not None:
            self._last_put.answered = False  # a reset throws away what the caller had not read
        self._emulator.left(self)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for _ in range(len(self._queue) + self._busy):
            self._emulator.end()
        self._queue.clear()
        self._busy = False
        self._parser = None  # it points back at us

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse()
        except httptools.HttpParserError:
            self._refuse()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # --- httptools -----------------------------------------------------------------------------

    def _reset(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._chunks: list[bytes] = []
        self._length = 0
        self._early: Fault | None = None

    def on_message_begin(self) -> None:
        self._reset()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._headers.get("expect", "").lower() == "100-continue" and self._transport:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._emulator.faults.earlies:
            operation = self._headers.get("x-amz-target", "").rpartition(".")[2]
            self._early = self._emulator.faults.early_answer(operation)
            if self._early is not None:
                self._enqueue(b"")

    def on_body(self, chunk: bytes) -> None:
        self._length += len(chunk)
        if self._length > MAX_BODY_BYTES:
            self.abort()
        elif self._early is None:  # an answered request's body is read and forgotten
            self._chunks.append(chunk)

    def on_message_complete(self) -> None:
        if self._early is not None:
            # Closing before the body was read would reset the connection under the answer.
            if self._transport is not None:
                self._transport.close()
            return
        self._enqueue(self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks))

    # --- answering -----------------------------------------------------------------------------

    def _enqueue(self, body: bytes) -> None:
        if len(self._queue) >= MAX_PIPELINED:
            self.abort()
            return
        self._emulator.begin()
        self._queue.append(
            Request(
                method=self._parser.get_method().decode(),
                path=self._url.decode("latin-1"),
                headers=self._headers,
                body=body,
                keep_alive=self._parser.should_keep_alive(),
                early=self._early,
                port=self._port,
            )
        )
        self._chunks = []
        if not self._busy:
            self._next()

    def _next(self) -> None:
        while self._queue and not self._busy and self._transport is not None:
            self._busy = True
            request = self._queue.popleft()
            head, body, plan = self._emulator.answer(request)
            if plan.delay_s > 0:
                self._timer = self._loop.call_later(plan.delay_s, self._send, request, head, body, plan)
            else:
                self._send(request, head, body, plan, again=False)

    def _send(self, request: Request, head: bytes, body: bytes, plan: Plan, again: bool = True) -> None:
        self._timer = None
        if self._transport is None or self._transport.is_closing():
            return  # the caller has left: what is written now is dropped without a word, and was no answer
        if plan.cut in ("before", "after"):
            self._emulator.was_cut()
            self._transport.abort()
            return
        if plan.cut == "inside":
            self._emulator.was_cut()
            self._transport.write(head + body[: len(body) // 2])
            self._transport.close()
            return
        if plan.slow_s > 0:
            self._transport.write(head)
            self._dribble(request, body, max(1, -(-len(body) // SLOW_STEPS)), plan)
            return
        self._transport.write(head + body)
        self._finish(request, plan)
        if again:
            self._next()

    def _dribble(self, request: Request, body: bytes, step: int, plan: Plan) -> None:
        self._timer = None
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(body[:step])
        if len(body) > step:
            self._timer = self._loop.call_later(
                plan.slow_s / SLOW_STEPS, self._dribble, request, body[step:], step, plan
            )
        else:
            self._finish(request, plan)
            self._next()

    def _finish(self, request: Request, plan: Plan) -> None:
        self._busy = False
        if request.put is not None:
            request.put.answered = plan.error is None and plan.rewrite is None and not plan.delta
            self._last_put = request.put
        self._emulator.end()
        if not request.keep_alive and self._transport is not None:
            self._transport.close()

    def _refuse(self) -> None:
        if self._transport is not None:
            self._transport.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self._transport.close()
