"""MQTT over WebSocket: a connection of aiohttp with the face of asyncio's transport.

aiohttp does the framing, and is imported only when such a broker is set.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import functools
import socket
from typing import TYPE_CHECKING, Any

from fastkin.errors import MqttError, ProtocolError, masked
from fastkin.mqtt.frames import Frames
from fastkin.net.dial import STAGGER_S, look_up, new_socket

if TYPE_CHECKING:
    import ssl

    from aiohttp import ClientSession, ClientWebSocketResponse
    from aiohttp.abc import AbstractResolver, ResolveResult
    from aiohttp.client_proto import ResponseHandler

    from fastkin.config import Broker
    from fastkin.mqtt.transport import Receiver

_HIGH = 1 << 20  # bytes waiting to be written before the receiver is asked to wait
_MOST = 1 << 20  # of a message: those with MQTT in them are cut into smaller ones
_CLOSE_S = 2.0  # for the broker to answer our close
_AHEAD = 1 << 20  # bytes read while reading is paused, to come to the pings among them
_FRAME = 128  # bytes that a frame costs besides its payload
_SLICE = 64 << 10
_PONG_S = 5.0  # between pongs that nobody asked for


class WebSocketWire:
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
        if not self._full and len(self._waiting) > _HIGH:
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
                if len(frame) > _SLICE:
                    self._ahead.appendleft(frame[_SLICE:])
                    frame = frame[:_SLICE]
                else:
                    self._ahead_bytes -= _FRAME
                self._ahead_bytes -= len(frame)
                self._receiver.data_received(frame)
        finally:
            self._handing = False
        if self._ahead_bytes <= _AHEAD:
            self._room.set()

    async def _read(self) -> None:
        from aiohttp import WSMsgType

        while True:
            if self._ahead_bytes > _AHEAD:
                self._room.clear()
                await self._wait_for_room()
            message = await self._websocket.receive()
            if message.type is WSMsgType.BINARY:
                self._ahead.append(memoryview(message.data))
                self._ahead_bytes += len(message.data) + _FRAME
                if not self._scheduled:
                    self._hand_on()
            elif message.type is WSMsgType.TEXT:
                raise ProtocolError("a WebSocket text message came, MQTT needs binary ones", 0, 0x81)
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
                async with asyncio.timeout(_PONG_S):
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
                async with asyncio.timeout(_CLOSE_S):
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
        async with asyncio.timeout(_CLOSE_S):
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


async def open_websocket(broker: Broker, receiver: Receiver, tls: ssl.SSLContext | None) -> WebSocketWire:
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
            max_msg_size=_MOST,
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
    return WebSocketWire(session, websocket, receiver)
