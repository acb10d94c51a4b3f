"""Keep-alive HTTP/1.1 to one endpoint: a pool of connections, TLS, and a second try for a stale connection.

A call has one connection, and a connection one call at a time. What happens on it is in `http_connection.py`; how the
answer is read is in `http_answer.py`; when a call is given up is in `http_progress.py`.

The connection used last is used first. So at a low rate few stay open, and the others end by themselves before the
other side closes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections import deque
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fastkin.aws.http_answer import MAX_ANSWER, Reply
from fastkin.aws.http_connection import CLOSE_S, Connection, StaleConnectionError
from fastkin.errors import Action, NotSent, TransportError
from fastkin.net.dial import dial
from fastkin.net.tls import client_context, why_refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

IDLE_AWS_S = 12.0  # what aiobotocore keeps
IDLE_FOREIGN_S = 4.0  # node closes an idle connection after 5 s


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
        self.host: str = parts.hostname or ""
        self.tls: bool = parts.scheme == "https"
        self.port: int = parts.port or (443 if self.tls else 80)
        self._ssl = (ssl_context or client_context()) if self.tls else None
        self._ca_bundle = ca_bundle
        self._max = max_connections
        self._connect_timeout = connect_timeout_s
        self._request_timeout = request_timeout_s
        self._idle_s = IDLE_FOREIGN_S if idle_s is None else idle_s
        self._on_resend = on_resend
        self._idle: list[Connection] = []
        self._all: set[Connection] = set()
        self._waiters: deque[asyncio.Future[None]] = deque()
        self._busy = 0
        self._reaper: asyncio.TimerHandle | None = None
        self._closed = False
        self.connects: int = 0
        self.retries: int = 0

    @property
    def open(self) -> int:
        """Connections that are open now, idle ones included."""
        return len(self._all)

    @property
    def busy(self) -> int:
        """Calls that hold a place now."""
        return self._busy

    async def request(
        self,
        head: bytes | Callable[[], bytes],
        body: Buffer,
        max_answer: int = MAX_ANSWER,
        *,
        once: bool = False,
    ) -> Reply:
        """One call. `head` as a function is called when a connection is there, again for a retry.

        `once`: there is none. A kept connection that ended meanwhile is TransportError then, like any other.

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
                except StaleConnectionError:
                    if once:
                        raise TransportError("ConnectionLost", "the connection ended before an answer came") from None
                    # The other side had closed it, or did so before it read us. It happens to every
                    # keep-alive client; storing twice is allowed, losing is not.
                    self.retries += 1
                    if self._on_resend is not None:
                        self._on_resend(body)
            return await self._exchange(await self._connect(), head, body, max_answer)
        finally:
            self._leave()

    async def _exchange(
        self, connection: Connection, head: bytes | Callable[[], bytes], body: Buffer, max_answer: int
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

    def _pop_idle(self) -> Connection | None:
        idle = self._idle
        oldest = asyncio.get_running_loop().time() - self._idle_s
        while idle:
            connection = idle.pop()
            if connection.idle_since > oldest and connection.usable:
                return connection
            connection.abort()
        return None

    def _keep(self, connection: Connection) -> None:
        """A connection whose call ended as it should waits for the next one."""
        if self._closed:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._reaper is None:
            self._reaper = loop.call_later(self._idle_s, self._reap)

    def forget(self, connection: Connection) -> None:
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

    async def _connect(self) -> Connection:
        where = f"{self.host}:{self.port}"
        connection = Connection(asyncio.get_running_loop(), where, tls=self.tls, gone=self.forget)
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
