"""Keep-alive HTTP/1.1 to one endpoint: a pool of connections, TLS, timeouts.

One call is one coroutine of its caller: no task is made for it. A body is written in slices, each when
the socket has taken the one before, so that several large calls share the loop with everybody else.

A connection ends with its call when anything about the call was odd: an answer before the body was
written, a broken answer, a timeout, a cancelled caller. Only a call that ended as HTTP/1.1 says leaves
its connection in the pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from fastkin.errors import Action, NotSent, TransportError

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

# One write is at most this much: 256 KiB of TLS is about 0.1 ms of the loop's time, and slices of this
# size also measured 10 to 19 % less CPU over TLS than whole bodies (they stay in the cache).
SLICE = 256 * 1024
# The transport asks us to wait once this much is queued behind the socket, and goes on below LOW_WATER.
HIGH_WATER = 256 * 1024
LOW_WATER = 64 * 1024
MAX_ANSWER = 16 * 1024 * 1024  # of any call: GetRecords ends at 14 MB
PUT_ANSWER = 1024 * 1024  # of PutRecords: an answer to 500 records is 56 KB, 150 KB when all of them failed
MAX_HEADERS = 64 * 1024  # as h11 and node allow 16 to 80 KB
MAX_HEADER_COUNT = 256
# An answer may cost so many bytes of framing (chunk sizes, extensions, trailers) for each byte of its body, and
# MAX_HEADERS besides: a body sent byte by byte needs five.
FRAMING_PER_BYTE = 8
IDLE_AWS_S = 12.0  # what aiobotocore keeps
IDLE_FOREIGN_S = 4.0  # node closes an idle connection after 5 s


class Reply(NamedTuple):
    """An answer, whole. Header names are in lower case; the last of several equal ones counts."""

    status: int
    headers: dict[str, str]
    body: bytes


class HttpPool:
    """Connections to one endpoint, at most `max_connections`; the one used last is used first."""

    def __init__(
        self,
        url: str,
        *,
        max_connections: int = 16,
        connect_timeout_s: float = 6.0,
        request_timeout_s: float = 30.0,
        ssl_context: ssl.SSLContext | None = None,
        idle_s: float | None = None,
        on_resend: Callable[[Buffer], None] | None = None,
    ) -> None:
        """`on_resend(body)`: a connection died without an answer, so the call goes again at once, unknown to its
        caller. Whether the other side had acted on it is unknown."""
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.tls else 80)
        self._ssl = (ssl_context or ssl.create_default_context()) if self.tls else None
        self._max = max_connections
        self._connect_timeout = connect_timeout_s
        self._request_timeout = request_timeout_s
        self._idle_s = IDLE_FOREIGN_S if idle_s is None else idle_s
        self._on_resend = on_resend
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._busy = 0
        self._reaper: asyncio.TimerHandle | None = None
        self._closed = False
        self.connects = 0
        self.retries = 0

    @property
    def open(self) -> int:
        """Connections that are open now, idle ones included."""
        return len(self._all)

    @property
    def busy(self) -> int:
        """Calls that hold a place now."""
        return self._busy

    async def request(self, head: bytes | Callable[[], bytes], body: Buffer, max_answer: int = MAX_ANSWER) -> Reply:
        """One call. `head` as a function is called when a connection is there, again for a retry.

        `body` must not change until this returns; nothing of it is used after that. An answer whose body is longer
        than `max_answer` bytes is TransportError AnswerTooLarge.
        """
        if self._busy < self._max:
            self._busy += 1
        else:
            await self._wait()
        try:
            if self._closed:
                raise TransportError("PoolClosed", "the connections are closed")
            connection = self._pop_idle()
            if connection is not None:
                try:
                    return await self._exchange(connection, head, body, max_answer)
                except _StaleConnectionError:
                    # The other side had closed it, or did so before it read us. It happens to every
                    # keep-alive client; storing twice is allowed, losing is not.
                    self.retries += 1
                    if self._on_resend is not None:
                        self._on_resend(body)
            return await self._exchange(await self._connect(), head, body, max_answer)
        finally:
            self._leave()

    async def _exchange(
        self, connection: _Connection, head: bytes | Callable[[], bytes], body: Buffer, max_answer: int
    ) -> Reply:
        reply = await connection.exchange(
            head if isinstance(head, bytes) else head(), body, self._request_timeout, max_answer
        )
        if connection.usable:
            self._keep(connection)
        return reply

    async def close(self) -> None:
        """Close every connection; calls that are on their way end with TransportError."""
        self._closed = True
        if self._reaper is not None:
            self._reaper.cancel()
            self._reaper = None
        open_now = list(self._all)
        for connection in open_now:
            connection.shut("PoolClosed", "the connections were closed during the call")
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
                self._busy += 1
        self._waiters.clear()
        for connection in open_now:
            await connection.wait_closed()

    async def _wait(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter  # the place of the call that ended is ours: _busy already counts it
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._leave()
            else:
                with contextlib.suppress(ValueError):
                    self._waiters.remove(waiter)
            raise

    def _leave(self) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._busy -= 1

    def _pop_idle(self) -> _Connection | None:
        idle = self._idle
        oldest = asyncio.get_running_loop().time() - self._idle_s
        while idle:
            connection = idle.pop()
            if connection.idle_since > oldest and connection.usable:
                return connection
            connection.abort()
        return None

    def _keep(self, connection: _Connection) -> None:
        """A connection whose call ended as it should waits for the next one."""
        if self._closed:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._reaper is None:
            self._reaper = loop.call_later(self._idle_s, self._reap)

    def forget(self, connection: _Connection) -> None:
        """A connection is gone."""
        self._all.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    def _reap(self) -> None:
        loop = asyncio.get_running_loop()
        self._drop_idle_before(loop.time() - self._idle_s + 0.05)
        self._reaper = loop.call_at(self._idle[0].idle_since + self._idle_s, self._reap) if self._idle else None

    def _drop_idle_before(self, oldest: float) -> None:
        # the longest idle is first: a connection is put back at the end and taken from there
        while self._idle and self._idle[0].idle_since <= oldest:
            self._idle.pop(0).abort()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        where = f"{self.host}:{self.port}"
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self, loop),
                    self.host,
                    self.port,
                    ssl=self._ssl,
                    server_hostname=self.host if self._ssl is not None else None,
                )
        except TimeoutError:
            raise NotSent("ConnectTimeout", f"no connection to {where} within {self._connect_timeout:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise NotSent(
                "CertificateNotTrusted",
                f"the certificate of {where} was refused: {error.verify_message or error};"
                " set ca_bundle (or AWS_CA_BUNDLE) if the endpoint uses its own authority",
                action=Action.OPERATOR,
            ) from None
        except ssl.SSLError as error:
            raise NotSent(
                "TlsFailed",
                f"no TLS with {where}: {error.reason or error}; is the endpoint really https?",
            ) from None
        except socket.gaierror as error:
            raise NotSent("NameNotFound", f"{self.host}: {error.strerror}") from None
        except UnicodeError:
            raise NotSent("NameNotFound", f"{self.host!r} is no name of a host") from None
        except OSError as error:
            # asyncio puts its own words into strerror; the number is the kernel's
            why = os.strerror(error.errno) if error.errno else str(error)
            raise NotSent("ConnectFailed", f"no connection to {where}: {why}") from None
        self.connects += 1
        return connection

    def opened(self, connection: _Connection) -> None:
        """A connection is there (before its TLS handshake is reported done by create_connection)."""
        self._all.add(connection)


class _StaleConnectionError(Exception):
    """A reused connection died before the first byte of an answer."""


class _Connection(asyncio.Protocol):
    """One connection, one call at a time."""

    def __init__(self, pool: HttpPool, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None  # HttpResponseParser, while connected
        self._lost: asyncio.Future[None] = loop.create_future()
        self._waiter: asyncio.Future[Reply] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._calls = 0
        self.idle_since = 0.0
        # what is being written
        self._body: memoryview | None = None
        self._sent = 0
        # what is being read
        self._reply: Reply | None = None
        self._error: BaseException | None = None
        self._begun = False
        self._status = 0
        self._headers: dict[str, str] = {}
        self._head_done = False
        self._header_count = 0
        self._max_answer = MAX_ANSWER
        self._wire_bytes = 0  # of this answer, early hints and framing included
        # the body: one piece is handed on as it came, more are joined as they come
        self._piece = b""
        self._joined: bytearray | None = None
        self._received = 0
        self._until_close = False

    # -- for the pool

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, head: bytes, body: Buffer, timeout_s: float, max_answer: int = MAX_ANSWER) -> Reply:
        """Write one request, read its answer. Raises _StaleConnectionError if it may be tried again."""
        transport = self._transport
        self._begun = False
        if transport is None or transport.is_closing():
            raise self._broken("the connection closed before the call")
        loop = self._loop
        waiter: asyncio.Future[Reply] = loop.create_future()
        self._waiter = waiter
        self._reply = self._error = None
        self._head_done = False
        self._max_answer = max_answer
        self._wire_bytes = self._received = 0
        view = memoryview(body)
        if view.ndim != 1 or view.itemsize != 1:
            view = view.cast("B")
        self._timer = loop.call_later(timeout_s, self._late, timeout_s)
        try:
            if len(view) <= SLICE:
                transport.writelines((head, view) if len(view) else (head,))
            else:
                self._body = view
                self._sent = 0
                transport.write(head)
                self._pump()
            return await waiter
        except asyncio.CancelledError:
            self.abort()
            raise
        finally:
            self._timer.cancel()
            self._timer = None
            self._waiter = None
            self._body = None
            self._calls += 1
            # The transport may still hold the buffer: it is let go before the caller gets it back.
            if self._transport is not None and transport.get_write_buffer_size():
                self.abort()
            if transport.is_closing() and not self._lost.done():
                await asyncio.shield(self._lost)
            with contextlib.suppress(BufferError):
                view.release()  # a traceback that keeps this frame must not keep the body

    def shut(self, code: str, message: str) -> None:
        """Close at once; a call that is on its way ends with this error."""
        self._error = self._error or TransportError(code, message)
        self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        if self._transport is not None:
            await self._lost

    # -- writing

    def _pump(self) -> None:
        """Write the next slice. Called again by the loop, or when the transport has room."""
        view = self._body
        transport = self._transport
        if view is None or transport is None or self._paused or transport.is_closing():
            return
        at = self._sent
        self._sent = end = min(at + SLICE, len(view))
        if end == len(view):
            self._body = None
        transport.write(view[at:end])
        if self._body is not None and not self._paused:
            self._loop.call_soon(self._pump)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        # not at once: we may be inside the transport's own write
        if self._body is not None:
            self._loop.call_soon(self._pump)

    # -- what the loop tells us

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio.Transport by class
        self._transport = transport = cast("asyncio.Transport", transport)
        transport.set_write_buffer_limits(HIGH_WATER, LOW_WATER)
        sock = transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._parser = HttpResponseParser(self)
        self._pool.opened(self)

    def data_received(self, data: bytes) -> None:
        if self._waiter is None or self._reply is not None:
            self.abort()  # bytes that nobody asked for
            return
        self._begun = True
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            self._fail("BadAnswer", "the server wants to change the protocol")
            return
        except HttpParserError as error:
            cause = error.__context__
            if isinstance(cause, _RefusedError):
                self._fail(cause.code, str(cause))
            elif self._reply is None or self._error is not None:
                self._fail("BadAnswer", f"the answer is not HTTP/1.1: {error}")
            return
        self._wire_bytes += len(data)
        if self._wire_bytes - self._received > MAX_HEADERS + FRAMING_PER_BYTE * self._received and self._reply is None:
            what = "chunk framing and trailers" if self._head_done else "headers"
            self._fail("AnswerTooLarge", f"{what} of more than {MAX_HEADERS} bytes")

    def eof_received(self) -> bool | None:
        if self._until_close and self._head_done and self._waiter is not None:
            self._complete()
        return None  # the transport closes itself

    def connection_lost(self, exc: BaseException | None) -> None:
        self._transport = None
        self._parser = None
        self._body = None
        self._pool.forget(self)
        if not self._lost.done():
            self._lost.set_result(None)
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._reply is not None:
            waiter.set_result(self._reply)
        elif self._error is not None:
            waiter.set_exception(self._error)
        elif self._until_close and self._head_done and exc is None:
            waiter.set_result(Reply(self._status, self._headers, self._whole_body()))
        else:
            waiter.set_exception(self._broken(f"{type(exc).__name__}: {exc}" if exc else "closed by the other side"))

    def _broken(self, why: str) -> Exception:
        if self._calls and not self._begun:
            return _StaleConnectionError(why)
        when = "in the middle of the answer" if self._begun else "before an answer"
        return TransportError("ConnectionLost", f"the connection broke {when}: {why}")

    def _late(self, timeout_s: float) -> None:
        where = f"{self._pool.host}:{self._pool.port}"
        self._fail("RequestTimeout", f"no whole answer from {where} within {timeout_s:g} s")

    def _fail(self, code: str, message: str) -> None:
        """End the call with an error; the caller hears of it when the transport has let go."""
        if self._error is None:
            self._error = TransportError(code, message)
            self._reply = None
        self.abort()

    # -- what the parser tells us

    def on_message_begin(self) -> None:
        self._status = 0
        self._headers = {}
        self._header_count = 0
        self._head_done = False
        self._piece = b""
        self._joined = None
        self._received = 0
        self._until_close = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_count += 1
        if self._header_count > MAX_HEADER_COUNT:
            raise _RefusedError("AnswerTooLarge", f"more than {MAX_HEADER_COUNT} headers")
        if not self._head_done:  # a trailer is none of ours
            self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._head_done = self._status >= 200
        headers = self._headers
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"identity", ""} and self._head_done:
            # never asked for, and never unpacked: a few bytes may become gigabytes
            raise _RefusedError("BadAnswer", f"the answer is compressed ({encoding[:40]!a}), which was not asked for")
        length = headers.get("content-length")
        if length is not None:
            if int(length) > self._max_answer:
                raise _RefusedError("AnswerTooLarge", f"an answer of {length[:24]} bytes, more than {self._max_answer}")
        else:
            self._until_close = (
                self._status not in {204, 304} and "chunked" not in headers.get("transfer-encoding", "").lower()
            )

    def on_body(self, data: bytes) -> None:
        self._received += len(data)
        if self._received > self._max_answer:
            raise _RefusedError("AnswerTooLarge", f"an answer of more than {self._max_answer} bytes")
        if self._joined is not None:
            self._joined += data
        elif self._piece:
            # not a list of pieces: two bytes in a chunk would cost fifty
            self._joined = bytearray(self._piece)
            self._joined += data
        else:
            self._piece = data

    def on_message_complete(self) -> None:
        if self._status < 200:  # 100 Continue, 103 Early Hints: the answer is still to come
            self._head_done = False
            return
        if self._reply is not None:
            self.abort()  # two answers to one request
            return
        self._complete()

    def _whole_body(self) -> bytes:
        return self._piece if self._joined is None else bytes(self._joined)

    def _complete(self) -> None:
        self._reply = reply = Reply(self._status, self._headers, self._whole_body())
        self._piece = b""
        self._joined = None
        transport = self._transport
        waiter = self._waiter
        if transport is None or waiter is None or waiter.done():
            return
        if (
            self._body is not None  # an early answer: the body is not written
            or transport.get_write_buffer_size()
            or self._until_close
            or not self._parser.should_keep_alive()
        ):
            self.abort()  # connection_lost gives the answer out, when the buffer is free
            return
        waiter.set_result(reply)


class _RefusedError(Exception):
    """Raised inside the parser: the answer is not taken."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)
