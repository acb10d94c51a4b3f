"""Keep-alive HTTP/1.1 to one endpoint: a pool of connections, TLS, timeouts.

One call is one coroutine of its caller: no task is made for it. A body is written in slices, each when
the socket has taken the one before, so that several large calls share the loop with everybody else.

A connection ends with its call when anything about the call was odd: an answer before the body was
written, a broken answer, a byte that nobody asked for, a timeout, a cancelled caller. Only a call that ended
as HTTP/1.1 says leaves its connection in the pool: an answer belongs to one request, or to none.

A call may take as long as it moves: bytes of its body leave, or bytes of its answer come. `request_timeout_s`
bounds the time in which neither happens.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import fcntl
import os
import socket
import ssl
import sys
import termios
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from fastkin.errors import Action, NotSent, TransportError
from fastkin.net.dial import avoid, dial
from fastkin.net.tls import client_context, why_refused

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
# A call is looked at so many times within its timeout: one without any progress ends at most an eighth late.
LOOKS = 8
# Progress must be worth waiting for: without this a peer that takes or sends a byte now and then would hold a call, and
# what is in it, for ever. A line slower than this could not carry what even a small plant sends.
LEAST_RATE = 1024.0  # bytes a second, over the whole call
PATIENCE = 4.0  # timeouts, before the rate counts; and the longest pause of a call that has moved
CLOSE_S = 5.0  # a transport that was aborted says so within this, or is forgotten
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
        ssl_context: ssl.SSLContext | Callable[[], ssl.SSLContext] | None = None,
        ca_bundle: str | None = None,
        idle_s: float | None = None,
        on_resend: Callable[[Buffer], None] | None = None,
    ) -> None:
        """`ssl_context` as a function is asked for each connection; `ca_bundle` names the file of its authorities, for
        messages.

        `on_resend(body)`: a connection died without an answer, so the call goes again at once, unknown to its
        caller. Whether the other side had acted on it is unknown."""
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.tls else 80)
        self._ssl = (ssl_context or client_context()) if self.tls else None
        self._ca_bundle = ca_bundle
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

    def abort(self) -> None:
        """Close every connection at once, and wait for none."""
        for connection in list(self._all):
            connection.shut("PoolClosed", "the event loop ended during the call")

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
        if open_now:
            await asyncio.wait([connection.lost for connection in open_now], timeout=CLOSE_S)
        for connection in open_now:
            self.forget(connection)

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
        where = f"{self.host}:{self.port}"
        connection = _Connection(self, asyncio.get_running_loop())
        try:
            tls = self._ssl() if callable(self._ssl) else self._ssl
            async with asyncio.timeout(self._connect_timeout):
                await dial(connection, self.host, self.port, tls=tls)
        except TimeoutError:
            raise NotSent("ConnectTimeout", f"no connection to {where} within {self._connect_timeout:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise NotSent(
                "CertificateNotTrusted",
                why_refused(error, where, "ca_bundle (or AWS_CA_BUNDLE)", self._ca_bundle),
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
            why = os.strerror(error.errno) if error.errno else str(error)
            raise NotSent("ConnectFailed", f"no connection to {where}: {why}") from None
        if self._closed:
            connection.abort()
            raise NotSent("PoolClosed", "the connections were closed while this one was made")
        # no await since dial(): from here on the call, or the pool, is its owner
        self._all.add(connection)
        self.connects += 1
        return connection


class _StaleConnectionError(Exception):
    """A reused connection died before the first byte of an answer."""


class _Connection(asyncio.Protocol):
    """One connection, one call at a time."""

    def __init__(self, pool: HttpPool, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None  # HttpResponseParser, while connected
        self.lost: asyncio.Future[None] = loop.create_future()
        self._waiter: asyncio.Future[Reply] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._paused = False
        self._calls = 0
        self.idle_since = 0.0
        # what is being written
        self._body: memoryview | None = None
        self._sent = 0
        self._length = 0
        # when what was written, or read, last moved
        self._timeout_s = 0.0
        self._began_at = self._moved_at = 0.0
        self._seen = (0, 0)
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
        self._expected = -1  # bytes of the body, where the head says so
        self._until_close = False
        self._last_of_all = False  # a whole answer that ends its connection all the same

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
        if (self._calls or not self._pool.tls) and _queued(transport, termios.FIONREAD):
            # What is here before we have asked is no answer to us. (Behind a fresh handshake there may be tickets.)
            self.abort()
            raise self._broken("the server spoke before it was asked")
        loop = self._loop
        waiter: asyncio.Future[Reply] = loop.create_future()
        self._waiter = waiter
        self._reply = self._error = None
        self._head_done = False
        self._max_answer = max_answer
        self._wire_bytes = self._received = 0
        self._expected = -1
        view = memoryview(body)
        if view.ndim != 1 or view.itemsize != 1:
            view = view.cast("B")
        self._length = len(view)
        self._timeout_s = timeout_s
        self._began_at = self._moved_at = loop.time()
        self._seen = (0, 0)
        self._timer = loop.call_later(timeout_s / LOOKS, self._look)
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
            self._waiter = None
            self._body = None
            self._calls += 1
            # The transport may still hold the buffer: it is let go before the caller gets it back.
            if self._transport is not None and transport.get_write_buffer_size():
                self.abort()
            if transport.is_closing():
                try:
                    if not self.lost.done():
                        await asyncio.wait([self.lost], timeout=CLOSE_S)
                finally:
                    self._pool.forget(self)
            with contextlib.suppress(BufferError):
                view.release()  # a traceback that keeps this frame must not keep the body

    def shut(self, code: str, message: str) -> None:
        """Close at once; a call that is on its way ends with this error."""
        self._error = self._error or TransportError(code, message)
        self.abort()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

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
        self._parser = HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        if self._waiter is None or self._reply is not None:
            self.abort()  # bytes that nobody asked for
            return
        if not self._begun and data[0] != _H:
            self._begun = True
            self._fail("BadAnswer", "the answer is not HTTP/1.1")  # the parser passes over blank lines, and knows RTSP
            return
        self._begun = True
        try:
            if self._feed(data):
                self.abort()  # the answer stands, the connection does not
                return
        except HttpParserUpgrade:
            self._fail("BadAnswer", "the server wants to change the protocol")
            return
        except HttpParserError as error:
            cause = error.__context__
            if self._reply is not None:
                self.abort()
            elif isinstance(cause, _RefusedError):
                self._fail(cause.code, str(cause))
            else:
                self._fail("BadAnswer", f"the answer is not HTTP/1.1: {error}")
            return
        self._wire_bytes += len(data)
        if self._wire_bytes - self._received > MAX_HEADERS + FRAMING_PER_BYTE * self._received and self._reply is None:
            what = "chunk framing and trailers" if self._head_done else "headers"
            self._fail("AnswerTooLarge", f"{what} of more than {MAX_HEADERS} bytes")

    def _feed(self, data: bytes) -> bool:
        """Give one read to the parser. True: the answer was whole before the read ended.

        The parser would not tell: it takes what is behind an answer for another one, skips it when it is a blank line,
        or fails. So where a Content-Length says how much is to come, it gets no more than that; elsewhere it gets all
        but the last byte first, at the cost of a copy.
        """
        feed = self._parser.feed_data
        view = memoryview(data)
        at = 0
        if not self._wire_bytes and (at := _head_end(data)):
            feed(view[:at])
        if self._reply is None and self._expected >= 0:
            left = self._expected - self._received
            feed(view[at : at + left])
            return len(data) - at > left
        if self._reply is None and at < len(data):
            feed(view[at:-1])
            if self._reply is None:
                feed(view[-1:])
                return False
        return self._reply is not None and at < len(data)

    def eof_received(self) -> bool | None:
        if self._until_close and self._head_done and self._waiter is not None:
            self._complete()
        return None  # the transport closes itself

    def connection_lost(self, exc: BaseException | None) -> None:
        self._transport = None
        self._parser = None
        self._body = None
        self._pool.forget(self)
        if not self.lost.done():
            self.lost.set_result(None)
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

    def _unsent(self) -> int:
        """Bytes that the peer's machine has not taken yet: ours, the transport's, the kernel's."""
        transport = self._transport
        if transport is None:
            return 0
        ours = self._length - self._sent if self._body is not None else 0
        kernels = _queued(transport, termios.TIOCOUTQ) if sys.platform == "linux" else 0
        return ours + transport.get_write_buffer_size() + kernels

    def _look(self) -> None:
        """Does the call move? Called every eighth of its timeout."""
        now = self._loop.time()
        unsent = self._unsent()
        seen = (unsent, self._wire_bytes)
        if seen != self._seen:
            self._seen = seen
            self._moved_at = now
        where = f"{self._pool.host}:{self._pool.port}"
        # What has moved for long may pause for longer. A slow peer says only now and then that it has read more, and
        # has what it took last in buffers that nobody here sees.
        allowed = min(self._timeout_s + self._moved_at - self._began_at, PATIENCE * self._timeout_s)
        moved = max(self._length - unsent, 0) + self._wire_bytes
        took = now - self._began_at
        slack = self._timeout_s / LOOKS / 2  # timers may be early by a clock's tick
        if now - self._moved_at > allowed - slack:
            self._time_out(
                f"no whole answer from {where} within {took:.3g} s, nothing moved for {now - self._moved_at:.3g} s",
                unsent,
            )
        elif took > PATIENCE * self._timeout_s + moved / LEAST_RATE:
            self._time_out(f"{where} is too slow: {moved:,} bytes in {took:.3g} s", unsent)
        else:
            self._timer = self._loop.call_later(self._timeout_s / LOOKS, self._look)

    def _time_out(self, message: str, unsent: int) -> None:
        if not (self._calls or self._begun) and self._transport is not None:
            avoid(self._transport.get_extra_info("peername"))  # another address of the host may answer
        self._fail("RequestTimeout", message)
        if isinstance(self._error, TransportError):
            self._error.unsent_bytes = min(unsent, self._length)

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
        self._expected = -1
        self._until_close = False
        self._last_of_all = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_count += 1
        if self._header_count > MAX_HEADER_COUNT:
            raise _RefusedError("AnswerTooLarge", f"more than {MAX_HEADER_COUNT} headers")
        if self._head_done:  # a trailer is none of ours
            return
        key = name.decode("latin-1").lower()
        if key in _FRAMING and key in self._headers:
            raise _RefusedError("BadAnswer", f"two headers {key}")
        self._headers[key] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._status = status = self._parser.get_status_code()
        headers = self._headers
        if not 100 <= status < 600:
            raise _RefusedError("BadAnswer", f"a status of {status}")
        self._head_done = status >= 200
        if not self._head_done:
            if not _FRAMING.isdisjoint(headers):
                raise _RefusedError("BadAnswer", f"an answer {status} with a body")
            return
        version = self._parser.get_http_version()
        if version not in {"1.1", "1.0"}:
            raise _RefusedError("BadAnswer", f"the answer is HTTP/{version}")
        self._last_of_all = version == "1.0"
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in {"identity", ""}:
            # never asked for, and never unpacked: a few bytes may become gigabytes
            raise _RefusedError("BadAnswer", f"the answer is compressed ({encoding[:40]!a}), which was not asked for")
        length = headers.get("content-length")
        transfer = headers.get("transfer-encoding")
        if transfer is not None:
            # where such an answer ends is a matter of opinion: two readers of it may differ
            if transfer.strip().lower() != "chunked" or length is not None or version == "1.0":
                raise _RefusedError("BadAnswer", "the length of the answer is told in two ways, or in none we know")
        elif length is not None:
            digits = length.strip()
            if not (digits.isascii() and digits.isdigit()):
                raise _RefusedError("BadAnswer", f"a content-length of {length[:24]!a}")
            if len(digits) > 18 or int(digits) > self._max_answer:
                raise _RefusedError("AnswerTooLarge", f"an answer of {digits[:24]} bytes, more than {self._max_answer}")
            if self._head_done:
                self._expected = int(digits)
        else:
            self._until_close = status not in {204, 304}
        if status in {204, 304} and (transfer is not None or (length or "0") != "0"):
            self._last_of_all = True  # there is no body, whatever it says; some servers send it

    def on_body(self, data: bytes) -> None:
        self._received += len(data)
        if self._received > self._max_answer:
            raise _RefusedError("AnswerTooLarge", f"an answer of more than {self._max_answer} bytes")
        if self._joined is not None:
            self._joined += data
        elif self._piece:
            # Not a list of pieces: two bytes in a chunk would cost fifty. Nor bytes that grow: each one more would copy
            # all that came before it.
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
        early = self._body is not None or transport.get_write_buffer_size() > 0
        if early and reply.status < 300:
            # it may refuse what it has seen, it cannot have taken what it has not
            self._fail("BadAnswer", f"the answer {reply.status} came before the request was written")
            return
        if early or self._until_close or self._last_of_all or not self._parser.should_keep_alive():
            self.abort()  # connection_lost gives the answer out, when the buffer is free
            return
        waiter.set_result(reply)


def _head_end(data: bytes) -> int:
    """Where the head of an answer ends, if all of it is here and its lines end as the standard says; else 0."""
    at = data.find(b"\n\r\n")
    if at < 1 or data[at - 1] != _CR or data.find(b"\n\n", 0, at) >= 0:
        return 0
    return at + 3


_CR = ord("\r")
_H = ord("H")
_FRAMING = frozenset({"content-length", "transfer-encoding"})


def _queued(transport: asyncio.Transport, question: int) -> int:
    """Bytes in the kernel's queue: FIONREAD those to be read, TIOCOUTQ those not sent or not acknowledged yet."""
    sock = transport.get_extra_info("socket")
    if sock is None:
        return 0
    answer = array.array("i", [0])
    try:
        fcntl.ioctl(sock.fileno(), question, answer)
    except (OSError, ValueError):  # closed, or not a socket that knows
        return 0
    return max(answer[0], 0)


class _RefusedError(Exception):
    """Raised inside the parser: the answer is not taken."""

    def __init__(self, code: str, message: str) -> None:
        self.code = code
        super().__init__(message)
