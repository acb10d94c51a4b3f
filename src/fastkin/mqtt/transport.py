"""A byte stream to a broker: TCP, TLS or WebSocket, and what can go wrong on the way, in plain words.

A TCP or TLS wire is asyncio's own transport. A WebSocket wire has the same face; aiohttp does its
framing and is imported only then.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import functools
import logging
import socket
import ssl
from typing import TYPE_CHECKING, Any, Protocol

from fastkin.errors import ConfigError, MqttError, ProtocolError, RefusedError, masked, printable
from fastkin.mqtt._core import reason_text
from fastkin.mqtt.frames import Frames
from fastkin.mqtt.reasons import with_cure
from fastkin.net import tcp
from fastkin.net.dial import STAGGER_S, avoid, dial, look_up, new_socket
from fastkin.net.tls import Renewed, client_context, system_files, why_refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp import ClientSession, ClientWebSocketResponse
    from aiohttp.abc import AbstractResolver, ResolveResult
    from aiohttp.client_proto import ResponseHandler

    from fastkin.config import Broker
    from fastkin.mqtt._core import Connack, Disconnect

_LOG = logging.getLogger("fastkin.intake")

GONE_S = 1.0  # for an event loop to say that a connection is gone that was aborted
_WEBSOCKET_HIGH = 1 << 20  # bytes waiting to be written before the receiver is asked to wait
_WEBSOCKET_MOST = 1 << 20  # of a message: those with MQTT in them are cut into smaller ones
_WEBSOCKET_CLOSE_S = 2.0
_WEBSOCKET_AHEAD = 1 << 20  # bytes read while reading is paused, to come to the pings among them
_WEBSOCKET_FRAME = 128  # bytes that a frame costs besides its payload
_WEBSOCKET_SLICE = 64 << 10
_WEBSOCKET_PONG_S = 5.0  # between pongs that nobody asked for
_SAID_MOST = 200  # characters of what a broker says for people: a reason may be 64 KiB


class Wire(Protocol):
    """What a connection writes to, and where it stops and restarts reading."""

    def write(self, data: bytes, /) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def get_write_buffer_size(self) -> int: ...
    def is_closing(self) -> bool: ...
    def close(self) -> None: ...  # writes what waits, then closes
    def abort(self) -> None: ...
    def get_extra_info(self, name: str, default: Any = None) -> Any: ...


class Receiver(asyncio.BufferedProtocol):
    """What a wire calls. connection_made() comes before open_wire() returns, connection_lost() once at the end."""

    def data_received(self, data: bytes | memoryview) -> None:
        """Bytes that did not come through get_buffer(): a WebSocket message."""
        raise NotImplementedError


async def open_wire(broker: Broker, receiver: Receiver, tls: Renewed | None) -> None:
    """Connect. Raises OSError (ssl.SSLError too) or MqttError; the caller bounds the time.

    `receiver` is connected from here on, by its connection_made(). When this raises it has heard nothing, and will not.
    """
    try:
        await _open(broker, receiver, tls.context() if tls is not None else None)
    except UnicodeError:
        raise OSError(f"{broker.host!r} is no name of a host") from None
    except ssl.SSLCertVerificationError as error:
        why = why_refused(error, f"{broker.host}:{broker.port}", "ca", broker.tls.ca)
        raise MqttError(f"TLS failed: {why}") from None


def blame(wire: Wire) -> None:
    """The peer took the connection and never answered: other addresses of its name are tried before it for a while."""
    if (address := wire.get_extra_info("peername")) is not None:
        avoid(address)


def silence(wire: Wire) -> float:
    """Seconds since bytes came, whether anybody has read them or not; infinite where the system does not say."""
    return tcp.silence(wire.get_extra_info("socket"))


_HEARD_MOST = 6  # times the time-out: a peer that trickles is waited for, not for ever


async def while_heard(waited: asyncio.Future[Any], silence_s: float, heard_at: Callable[[], float]) -> None:
    """Wait for it as long as bytes come. TimeoutError when none came for `silence_s`."""
    loop = asyncio.get_running_loop()
    end = loop.time() + _HEARD_MOST * silence_s
    while not waited.done():
        left = min(heard_at() + silence_s, end) - loop.time()
        if left <= 0:
            raise TimeoutError
        await asyncio.wait([waited], timeout=left)
    waited.result()


async def _open(broker: Broker, receiver: Receiver, tls: ssl.SSLContext | None) -> None:
    if broker.scheme in {"ws", "wss"}:
        wire = await _open_websocket(broker, receiver, tls)
        receiver.connection_made(wire)  # type: ignore[arg-type]
        wire.start()
        return
    await dial(receiver, broker.host, broker.port, tls=tls)


def renewed_tls(broker: Broker) -> Renewed | None:
    """TLS that follows its files; None for a scheme without. ConfigError names the file that is wrong."""
    if broker.scheme not in {"mqtts", "wss"}:
        return None
    tls = broker.tls
    files = (tls.ca, tls.cert, tls.key) if tls.ca else (*system_files(), tls.cert, tls.key)
    return Renewed(lambda: _tls_context(broker), files, _LOG)


def tls_context(broker: Broker) -> ssl.SSLContext | None:
    """None for a scheme without TLS. ConfigError names the file that is wrong."""
    return _tls_context(broker) if broker.scheme in {"mqtts", "wss"} else None


def _tls_context(broker: Broker) -> ssl.SSLContext:
    tls = broker.tls
    try:
        context = client_context(tls.ca)
    except FileNotFoundError:
        raise ConfigError("broker tls ca", f"{tls.ca} does not exist") from None
    except OSError as error:
        raise ConfigError("broker tls ca", f"{tls.ca}: {_tls_words(error)}", "give a PEM file") from None
    if tls.insecure_skip_verify:
        _LOG.warning(
            "stage=intake broker=%s THE BROKER'S CERTIFICATE IS NOT CHECKED (insecure_skip_verify): anybody on the way"
            " can read and change messages and learn the password",
            broker.url,
        )
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if tls.cert is not None:
        try:
            # An empty password, not none: OpenSSL would ask for one at the terminal.
            context.load_cert_chain(tls.cert, tls.key, tls.key_password or "")
        except FileNotFoundError:
            raise ConfigError("broker tls cert, key", f"{tls.cert} or {tls.key} does not exist") from None
        except OSError as error:
            cure = "are certificate and key PEM, do they belong together, is the key's password right?"
            raise ConfigError("broker tls cert, key", f"{tls.cert}, {tls.key}: {_tls_words(error)}", cure) from None
    if tls.alpn:
        context.set_alpn_protocols(list(tls.alpn))
    return context


# -- words -------------------------------------------------------------------------------------

_ERRNO_WORDS = {
    errno.ECONNREFUSED: "connection refused: nothing listens on that port",
    errno.ECONNRESET: "the broker reset the connection",
    errno.EPIPE: "the broker has closed the connection",
    errno.EHOSTUNREACH: "no route to the host",
    errno.ENETUNREACH: "the network is unreachable",
    errno.ETIMEDOUT: "the network gave up: nothing came back from the host",
}

# parts of OpenSSL's reasons
_TLS_WORDS = (
    ("WRONG_VERSION_NUMBER", "that port does not speak TLS"),
    ("CERTIFICATE_REQUIRED", "the broker wants a client certificate: set cert and key"),
    ("HANDSHAKE_FAILURE", "the broker refused the handshake: it may want a client certificate"),
    ("UNKNOWN_CA", "the broker does not trust our client certificate"),
    ("BAD_CERTIFICATE", "the broker does not take our client certificate"),
    ("CERTIFICATE_EXPIRED", "the broker says that our client certificate has expired"),
    ("CERTIFICATE_REVOKED", "the broker says that our client certificate is revoked"),
    ("NO_APPLICATION_PROTOCOL", "the broker takes none of our ALPN protocols"),
    ("PROTOCOL_VERSION", "no TLS version in common: fastkin asks for 1.2 or newer"),
    ("UNSUPPORTED_PROTOCOL", "no TLS version in common: fastkin asks for 1.2 or newer"),
)


def _tls_words(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or ""
    for part, words in _TLS_WORDS:
        if part in reason:
            return words
    return reason.replace("_", " ").lower() or str(error) or type(error).__name__


def explain(error: BaseException) -> str:
    """Why there is no connection, or why it ended, for the log: fit for it, whatever the peer put into it."""
    return printable(_explain(error))


def _explain(error: BaseException) -> str:
    if isinstance(error, MqttError):
        return str(error)
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {_tls_words(error)}"
    if isinstance(error, socket.gaierror):
        return f"the host name cannot be resolved ({error.strerror})"
    if isinstance(error, TimeoutError) and error.errno is None:
        return "no answer in time"
    if isinstance(error, OSError):
        if error.errno is None and str(error).count(f"[Errno {errno.ECONNREFUSED}]") > 1:
            return _ERRNO_WORDS[errno.ECONNREFUSED]  # asyncio's summary of several addresses
        if error.errno in _ERRNO_WORDS:
            return _ERRNO_WORDS[error.errno]
        return error.strerror or str(error) or type(error).__name__
    return str(error) or type(error).__name__


def refusal(connack: Connack, secret: str | None = None) -> RefusedError:
    """A CONNACK that says no. `secret` is cut out of what the broker adds, should it repeat it."""
    return RefusedError(
        f"the broker refused the connection: {reason_text(connack.code)}{_told(connack.properties, secret)}",
        connack.code,
    )


def farewell(disconnect: Disconnect, secret: str | None = None) -> str:
    """A DISCONNECT of the broker, in words."""
    why = with_cure(disconnect.code) if disconnect.code else "no reason given"
    return f"the broker ended the connection: {why}{_told(disconnect.properties, secret)}"


def _told(properties: dict[str, object], secret: str | None) -> str:
    """What the broker added for people; escaped and cut, since it goes to a log."""
    told = ""
    if text := properties.get("reason_string"):
        told += f"; it says {said(text, secret)}"
    if server := properties.get("server_reference"):
        told += f"; it names {said(server, secret)} instead"
    return told


def said(text: object, secret: str | None = None) -> str:
    """A peer's words for a log line: quoted, escaped, not too long."""
    words = masked(str(text), (secret,))
    return ascii(words) if len(words) <= _SAID_MOST else f"{words[:_SAID_MOST]!a} (and {len(words) - _SAID_MOST} more)"


# -- WebSocket ---------------------------------------------------------------------------------


class _WebSocketWire:
    """A WebSocket with the face of a transport: write() never waits, one task reads, one writes.

    Pings lie among the data, and aiohttp answers them as it reads. So pause_reading() only stops what is
    handed on: frames are read ahead, within a bound, since the broker takes a client without pongs for
    dead. Past the bound pongs go out unasked (RFC 6455, 5.5.3), which most brokers take as a sign of life.
    """

    def __init__(self, session: ClientSession, websocket: ClientWebSocketResponse[Any], receiver: Receiver) -> None:
        self._session = session
        self._websocket = websocket
        self._receiver = receiver
        self._waiting = bytearray()
        self._sending = 0
        self._full = False
        self._closing = False
        self._lost = False
        self._kick = asyncio.Event()
        self._paused = False
        self._ahead: collections.deque[memoryview] = collections.deque()  # read, and not handed on
        self._ahead_bytes = 0
        self._room = asyncio.Event()  # to read ahead
        self._room.set()
        self._handing = False
        self._scheduled = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._guard(self._read()), name="fastkin[websocket].read"),
            loop.create_task(self._guard(self._write()), name="fastkin[websocket].write"),
        ]

    def write(self, data: bytes, /) -> None:
        if self._closing or self._lost:
            return
        self._waiting += data
        self._kick.set()
        if not self._full and len(self._waiting) > _WEBSOCKET_HIGH:
            self._full = True
            self._receiver.pause_writing()

    def get_write_buffer_size(self) -> int:
        return len(self._waiting) + self._sending

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._websocket.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        self._paused = False
        if self._ahead and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._hand_on)

    def is_closing(self) -> bool:
        return self._closing or self._lost

    def close(self) -> None:
        self._closing = True
        self._kick.set()

    def abort(self) -> None:
        self._end(None)

    def _hand_on(self) -> None:
        """What was read, in slices: a pause in the middle of a large frame leaves the rest here."""
        self._scheduled = False
        if self._handing:
            return
        self._handing = True
        try:
            while self._ahead and not self._paused and not self._lost:
                frame = self._ahead.popleft()
                if len(frame) > _WEBSOCKET_SLICE:
                    self._ahead.appendleft(frame[_WEBSOCKET_SLICE:])
                    frame = frame[:_WEBSOCKET_SLICE]
                else:
                    self._ahead_bytes -= _WEBSOCKET_FRAME
                self._ahead_bytes -= len(frame)
                self._receiver.data_received(frame)
        finally:
            self._handing = False
        if self._ahead_bytes <= _WEBSOCKET_AHEAD:
            self._room.set()

    async def _read(self) -> None:
        from aiohttp import WSMsgType

        while True:
            if self._ahead_bytes > _WEBSOCKET_AHEAD:
                self._room.clear()
                await self._wait_for_room()
            message = await self._websocket.receive()
            if message.type is WSMsgType.BINARY:
                self._ahead.append(memoryview(message.data))
                self._ahead_bytes += len(message.data) + _WEBSOCKET_FRAME
                if not self._scheduled:
                    self._hand_on()
            elif message.type is WSMsgType.TEXT:
                raise ProtocolError("a WebSocket text message, MQTT comes in binary ones", 0, 0x81)
            elif message.type is WSMsgType.ERROR:
                raise self._websocket.exception() or ConnectionResetError(errno.ECONNRESET, "")
            else:
                while self._ahead:  # the peer has closed; what it said before counts
                    self._room.clear()
                    await self._room.wait()
                return

    async def _wait_for_room(self) -> None:
        while not self._room.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WEBSOCKET_PONG_S):
                    await self._room.wait()
            if not self._room.is_set():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):  # a broker that waits for us must not make us wait for it
                        await self._websocket.pong()

    async def _write(self) -> None:
        while True:
            await self._kick.wait()
            self._kick.clear()
            while self._waiting:
                data = bytes(self._waiting)
                self._waiting.clear()
                self._sending = len(data)
                await self._websocket.send_bytes(data)
                self._sending = 0
                if self._full:
                    self._full = False
                    self._receiver.resume_writing()
            if self._closing:
                return

    async def _guard(self, work: Any) -> None:
        """The first of the two that ends takes the wire down with it."""
        error: Exception | None = None
        try:
            await work
        except Exception as failure:  # noqa: BLE001 - handed to connection_lost()
            error = failure
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = True
        loop = asyncio.get_running_loop()
        self._tasks.append(loop.create_task(self._shut(error), name="fastkin[websocket].close"))

    async def _shut(self, error: Exception | None) -> None:
        try:
            for task in self._tasks[:2]:
                task.cancel()
            with contextlib.suppress(Exception):
                async with asyncio.timeout(_WEBSOCKET_CLOSE_S):
                    await self._websocket.close()
            await _let_go(self._session)
        finally:
            self._receiver.connection_lost(error)


def _resolver() -> AbstractResolver:
    """aiohttp asks for names as dial() does: not in the threads of the loop."""
    from aiohttp.abc import AbstractResolver

    class Resolver(AbstractResolver):
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
        ) -> list[ResolveResult]:
            return [
                {
                    "hostname": host,
                    "host": info[4][0],
                    "port": port,
                    "family": info[0],
                    "proto": info[2],
                    "flags": socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
                }
                for info in await look_up(host, port)
                if family in {socket.AF_UNSPEC, info[0]}
            ]

        async def close(self) -> None:
            pass

    return Resolver()


async def _let_go(session: ClientSession) -> None:
    """Close it, whatever its connections do."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(_WEBSOCKET_CLOSE_S):
            await session.close()


def _cutting() -> type[ResponseHandler]:
    """aiohttp's connection, with long frames cut before its reader, which holds a message until it is whole."""
    from aiohttp.client_proto import ResponseHandler

    class Handler(ResponseHandler):
        _frames: Frames | None = None

        def set_parser(self, *args: Any, **options: Any) -> None:
            self._frames = Frames()  # from the first byte behind the HTTP answer on
            super().set_parser(*args, **options)

        def data_received(self, data: bytes) -> None:
            super().data_received(data if self._frames is None else self._frames.feed(data))

    return Handler


async def _open_websocket(broker: Broker, receiver: Receiver, tls: ssl.SSLContext | None) -> _WebSocketWire:
    import aiohttp

    path, _, query = broker.path.partition("?")
    # one connection: its addresses race as dial()'s do, and its sockets have the same options
    connector = aiohttp.TCPConnector(resolver=_resolver(), socket_factory=new_socket, happy_eyeballs_delay=STAGGER_S)
    connector._factory = functools.partial(_cutting(), loop=asyncio.get_running_loop())
    session = aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
    )
    try:
        websocket = await session.ws_connect(
            broker.address,
            protocols=("mqtt",),
            ssl=True if tls is None else tls,
            max_msg_size=_WEBSOCKET_MOST,
        )
    except aiohttp.WSServerHandshakeError as error:
        await _let_go(session)
        raise MqttError(
            f"the WebSocket upgrade was refused (HTTP {error.status}): is {path} the path, is it a listener for"
            " MQTT over WebSocket?"
        ) from None
    except aiohttp.ClientConnectorCertificateError as error:
        await _let_go(session)
        raise error.certificate_error from None
    except aiohttp.ClientConnectorError as error:
        await _let_go(session)
        raise error.os_error from None
    except aiohttp.ClientError as error:
        await _let_go(session)
        why = masked(str(error), (query,)) or type(error).__name__
        raise MqttError(f"no WebSocket: {why!a}") from None
    except BaseException:
        await _let_go(session)
        raise
    return _WebSocketWire(session, websocket, receiver)
