"""A connection to a host: names, addresses, the race between these, TLS, and who owns the socket meanwhile.

A host has several addresses, and any of them may be a black hole. They are tried as RFC 8305 says: the
families take turns, the next one starts when the one before has failed or a quarter of a second has passed, and the
first that connects wins. An address that took the connection and then failed is tried last for a minute. The caller
bounds the time of the whole.

Nothing here can be lost by a cancellation. Sockets that are not connected yet belong to the race, which closes them.
A connected one is given to the loop with a protocol of ours; the caller's own hears connection_made() when nothing
can fail any more, and nothing at all when dial() raises. uvloop closes a transport whose create_connection() was
cancelled without a word to its protocol: whoever waited for connection_lost() would wait for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, cast

from fastkin.net.tcp import keep_alive

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

    # as getaddrinfo() gives them: family, type, protocol, canonical name, address
    AddrInfo = tuple[int, int, int, str, Any]

STAGGER_S = 0.25  # RFC 8305 section 5
AVOID_S = 60.0
_AVOIDED_MOST = 256
_ADDRESSES_MOST = 32  # of one name
# A lookup that hangs is asked again beside itself after so long, by so many threads at most.
_LOOKUP_S = 10.0
_LOOKUPS_MOST = 3

# For every socket of ours, to Kinesis and to brokers: level, option, value. What a system lacks is left out.
SOCKET_OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *keep_alive()]


def new_socket(info: AddrInfo) -> socket.socket:
    """A socket for this address with our options, not connected. aiohttp's connectors take it as their factory."""
    sock = socket.socket(info[0], info[1], info[2])
    sock.setblocking(False)
    for level, option, value in SOCKET_OPTIONS:
        with contextlib.suppress(OSError):
            sock.setsockopt(level, option, value)
    return sock


async def dial(
    receiver: asyncio.BaseProtocol, host: str, port: int, *, tls: ssl.SSLContext | None = None
) -> asyncio.Transport:
    """Connect `receiver`. Raises OSError (ssl.SSLError and socket.gaierror too) and UnicodeError."""
    infos = _in_turn(await look_up(host, port))
    first: OSError | None = None
    while infos:
        try:
            sock, info = await _race(infos)
        except OSError as error:
            # The first failure tells most: what came after it was only tried because of it.
            raise first or error from None
        infos.remove(info)
        try:
            return await _take(receiver, sock, host, tls)
        except OSError as error:
            avoid(info[4])
            first = first or error
        except asyncio.CancelledError:
            avoid(info[4])  # it took the connection, and then the caller's time
            raise
    assert first is not None
    raise first


async def _take(
    receiver: asyncio.BaseProtocol, sock: socket.socket, host: str, tls: ssl.SSLContext | None
) -> asyncio.Transport:
    """Give a connected socket to the loop, and its transport to the receiver."""
    loop = asyncio.get_running_loop()
    keeper = _Keeper()
    try:
        # TLS is part of this: an address that connects and then fails its handshake has failed, and the next one is
        # tried.
        transport, _ = await loop.create_connection(
            lambda: keeper, sock=sock, ssl=tls, server_hostname=host if tls is not None else None
        )
    except BaseException as failure:
        if keeper.transport is not None:
            keeper.transport.abort()
        if type(loop).__module__.startswith("uvloop"):
            # libuv has closed the descriptor, whose number may be somebody else's already
            with contextlib.suppress(OSError):
                sock.detach()
        else:
            sock.close()
        if isinstance(failure, RuntimeError):  # uvloop, when the peer was gone before the transport was there
            raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)) from None
        raise
    # Lost between the connection and this line. The receiver has heard nothing, and must not hear of it now.
    if keeper.lost:
        raise keeper.error or ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    # From here on nothing can fail: the receiver hears connection_made() and, sooner or later, connection_lost().
    transport.set_protocol(receiver)
    receiver.connection_made(transport)
    keeper.hand_over(receiver)
    return transport


# The receiver must not hear connection_made() before nothing can fail. Somebody has to take what comes meanwhile.
class _Keeper(asyncio.Protocol):
    """Stands for the receiver until the connection is its own."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost = False
        self.error: OSError | None = None
        self._early = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio.Transport by class
        self.transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        # a turn of the loop or two: one or two reads
        self._early += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        self.error = exc if isinstance(exc, OSError) else None

    def hand_over(self, receiver: Any) -> None:
        if self._early:
            receiver.data_received(bytes(self._early))


# -- names -------------------------------------------------------------------------------------


class _Lookup:
    """One question to the resolver, in a thread of its own."""

    def __init__(self, key: tuple[str, int]) -> None:
        self.asked = time.monotonic()
        self.future: Future[list[AddrInfo]] = Future()
        # Not the loop's own threads: a resolver that hangs would hold them all, and the disk's work with them. And a
        # daemon: the process must be able to end meanwhile.
        threading.Thread(target=self._run, args=key, name="fastkin-lookup", daemon=True).start()

    def _run(self, host: str, port: int) -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self.future.set_exception(error)
        else:
            self.future.set_result(cast("list[AddrInfo]", found))


_lookups: dict[tuple[str, int], list[_Lookup]] = {}
_lookups_lock = threading.Lock()


async def look_up(host: str, port: int) -> list[AddrInfo]:
    """The addresses of a host. Raises socket.gaierror, UnicodeError for what cannot be a name."""
    with contextlib.suppress(socket.gaierror):
        # an address as it stands: nobody is asked
        return cast(
            "list[AddrInfo]",
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST),
        )
    key = (host, port)
    with _lookups_lock:
        # One question for all who ask the same. After ten seconds a second one, for the first may be lost with its
        # thread.
        running = [one for one in _lookups.get(key, ()) if not one.future.done()]
        if not running or (len(running) < _LOOKUPS_MOST and time.monotonic() - running[-1].asked > _LOOKUP_S):
            running.append(_Lookup(key))
        _lookups[key] = running
        for stale in [k for k, asked in _lookups.items() if all(one.future.done() for one in asked)]:
            del _lookups[stale]
        lookup = running[-1].future
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not answer.done():
            answer.set_result(None)

    def answered(_: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(wake)

    lookup.add_done_callback(answered)
    await answer
    found = lookup.result()
    if not found:
        raise socket.gaierror(socket.EAI_NONAME, "the name has no address")
    return found


# -- addresses ---------------------------------------------------------------------------------

# For the whole process: an address that failed one pipeline will fail the others too.
_avoided: dict[Any, float] = {}


def avoid(address: Any) -> None:
    """A connection to this address failed after it was made: others are tried before it for a while."""
    now = time.monotonic()
    for old in [one for one, until in _avoided.items() if until < now]:
        del _avoided[old]
    # A host behind a name with many addresses must not fill memory with them.
    if len(_avoided) < _AVOIDED_MOST:
        _avoided[address] = now + AVOID_S


def _in_turn(infos: Sequence[AddrInfo]) -> list[AddrInfo]:
    """Each address once, the families in turn, those to avoid last: who failed last is the last of them."""
    families: dict[int, list[AddrInfo]] = {}
    # Resolvers tell an address several times, once for each protocol.
    for info in dict.fromkeys(infos):
        families.setdefault(info[0], []).append(info)
    lists = list(families.values())
    mixed = [of[at] for at in range(max(map(len, lists))) for of in lists if at < len(of)]
    now = time.monotonic()
    # sorted() is stable: among the good ones the families still take turns. Among the bad ones the resolver's order
    # would begin with the same one each time: a good one that was slow once would not be tried again for a minute.
    return sorted(mixed, key=lambda info: max(_avoided.get(info[4], 0.0), now))[:_ADDRESSES_MOST]


async def _race(infos: Sequence[AddrInfo]) -> tuple[socket.socket, AddrInfo]:
    """The first address that connects. Raises OSError with what each of them said."""
    race = _Race(asyncio.get_running_loop(), infos)
    taken: socket.socket | None = None
    try:
        race.start_next()
        taken, info = await race.winner
        return taken, info
    finally:
        race.end(taken)


class _Race:
    """Attempts that run beside each other: plain sockets and callbacks, so that to end one is to close it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, infos: Sequence[AddrInfo]) -> None:
        self._loop = loop
        self._left = list(infos)
        self._open: list[socket.socket] = []
        self._timer: asyncio.TimerHandle | None = None
        self._failed: list[tuple[AddrInfo, OSError]] = []
        self.winner: asyncio.Future[tuple[socket.socket, AddrInfo]] = loop.create_future()

    def start_next(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self.winner.done():
            return
        if not self._left:
            if not self._open:
                self.winner.set_exception(self._why())
            return
        info = self._left.pop(0)
        try:
            sock = new_socket(info)
        except OSError as error:  # a family that this system does not have
            self._fail(info, error)
            return
        self._open.append(sock)
        try:
            # Not the loop's sock_connect(): that is a task, and to cancel one takes a turn of the loop in which it
            # may succeed.
            code = sock.connect_ex(info[4])
        except OSError as error:  # an address that cannot be one
            self._shut(sock)
            self._fail(info, error)
            return
        if code in {0, errno.EISCONN}:
            self._win(sock, info)
        elif code in {errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK, errno.EINTR}:
            self._loop.add_writer(sock, self._ready, sock, info)
            if self._left:
                self._timer = self._loop.call_later(STAGGER_S, self._time_is_over)
        else:
            self._shut(sock)
            self._fail(info, OSError(code, os.strerror(code)))

    def _time_is_over(self) -> None:
        # uvloop runs timers before it looks at sockets. When it is late, an attempt may have ended long ago, and its
        # callback is next: beside a second one it could lose to an address that should come last.
        ended = select.poll()
        for sock in self._open:
            ended.register(sock, select.POLLOUT)
        if not ended.poll(0):
            self.start_next()

    def _ready(self, sock: socket.socket, info: AddrInfo) -> None:
        self._loop.remove_writer(sock)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code == 0:
            self._win(sock, info)
        else:
            self._shut(sock)
            self._fail(info, OSError(code, os.strerror(code)))

    def _win(self, sock: socket.socket, info: AddrInfo) -> None:
        if not self.winner.done():
            self.winner.set_result((sock, info))

    def _fail(self, info: AddrInfo, error: OSError) -> None:
        self._failed.append((info, error))
        self.start_next()

    def _shut(self, sock: socket.socket) -> None:
        self._open.remove(sock)
        self._loop.remove_writer(sock)
        sock.close()

    def end(self, taken: socket.socket | None) -> None:
        """Close everything but the socket that the caller has."""
        if self._timer is not None:
            self._timer.cancel()
        if not self.winner.cancel() and not self.winner.cancelled():
            self.winner.exception()  # a caller that was cancelled at this moment has not seen it
        for sock in self._open:
            self._loop.remove_writer(sock)
            if sock is not taken:
                sock.close()
        self._open.clear()

    def _why(self) -> OSError:
        first = self._failed[0][1]
        # One text for one cause; a list of addresses only where they differ.
        if all(error.errno == first.errno for _, error in self._failed):
            return first
        return OSError("; ".join(f"{info[4][0]}: {error.strerror or error}" for info, error in self._failed))
