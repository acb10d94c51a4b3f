"""Publishing, for simulators, tests and `fastkin check`: QoS 0 and 1 within a window, one connection.

    publisher = Publisher(broker)
    await publisher.connect()
    await publisher.publish("plant/1", payload, 1)   # waits only for room
    await publisher.drain()                          # everything is acknowledged
    await publisher.close()

Packets of one turn of the loop leave in one write. There is no reconnect: who publishes knows better
what to say again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Self, TypeVar, cast

from fastkin.errors import ClosedError, FastkinError, LibraryError, MqttError, RefusedError
from fastkin.mqtt import _core as _mqtt
from fastkin.mqtt._core import EVENTS, AckTracker, Connack, Disconnect, Puback, Router, Session, reason_text
from fastkin.mqtt.dialect import REFUSALS, Dialect
from fastkin.mqtt.subscriptions import PACKET_IDS
from fastkin.mqtt.transport import GONE_S, Receiver, blame, open_wire, renewed_tls, silence, while_heard
from fastkin.mqtt.words import explain, farewell, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from typing_extensions import Buffer

    from fastkin.config import Broker
    from fastkin.mqtt.transport import Wire

T = TypeVar("T")

_BATCH = 256 * 1024  # bytes that are written before the turn of the loop ends
_CLOSE_S = 5.0


class Publisher:
    """One connection. `protocol="auto"` prefers 3.1.1, which has no window of the broker's.

    Only a refusal in words makes it try 5.0: every broker of 5.0 that keeps silent to 3.1.1 would be the first.
    """

    def __init__(self, broker: Broker, window: int = 1000) -> None:
        """`window`: QoS 1 messages without an acknowledgement; a 5.0 broker may lower it.

        ConfigError: certificate files that cannot be read.
        """
        # More than there are identifiers could never be told apart.
        if not 1 <= window <= PACKET_IDS:
            raise LibraryError(f"window {window} is not in 1..{PACKET_IDS}")
        self.broker = broker
        self.client_id: str = broker.client_id or f"fastkin-pub-{os.urandom(6).hex()}"
        self.window: int = window
        self.version: int = 0
        self.published: int = 0
        self.acked = 0
        self.refused = 0  # by a 5.0 broker's own reason code
        self._asked_window = window
        self._dialect = Dialect(broker.protocol, prefer=4)
        self._tls = renewed_tls(broker)
        self._link: _Link | None = None
        self._refusal = 0

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """MqttError says in plain words why not; RefusedError when the broker said no."""
        while not await self._connect(self._dialect.next(asyncio.get_running_loop().time())):
            pass

    async def _connect(self, version: int) -> bool:
        """False: to be tried with the other version."""
        link = _Link(self, version)
        limit = self.broker.connect_timeout_s
        try:
            async with asyncio.timeout(limit):
                await open_wire(self.broker, link, self._tls)
            await while_heard(link.ready, limit, lambda: link.heard_at)
            connack = link.ready.result()
        except RefusedError as error:
            link.abort()
            if error.code in REFUSALS and self._dialect.refused(version, asyncio.get_running_loop().time()):
                return False
            raise
        except (OSError, MqttError) as error:
            link.abort()
            timed_out = isinstance(error, TimeoutError) and error.errno is None
            if timed_out and link._wire is not None:
                blame(link._wire)
            reason = f"no answer within {limit:g} s" if timed_out else explain(error)
            raise MqttError(f"cannot connect to {self.broker.url}: {reason}") from None
        except BaseException:
            link.abort()
            raise
        self._dialect.worked(version)
        granted = connack.properties.get("receive_maximum") if version == 5 else None
        self.window = min(self._asked_window, granted) if isinstance(granted, int) else self._asked_window
        link.learn(connack.properties)
        self.version = version
        self._link = link
        return True

    async def publish(self, topic: str, payload: Buffer, qos: int = 0) -> None:
        """Waits for room in the window (QoS 1) or in the socket (QoS 0), not for the acknowledgement."""
        while not self.publish_nowait(topic, payload, qos):
            await self._open_link().room()

    def publish_nowait(self, topic: str, payload: Buffer, qos: int = 0) -> bool:
        """False when there is no room: nothing was sent."""
        link = self._open_link()
        if link.blocked or (qos and link.unacked >= self.window):
            return False
        packet_id = 0
        if qos:
            if qos != 1:
                raise LibraryError(f"QoS {qos}: a publisher sends with QoS 0 or 1")
            packet_id = link.free_id()
            if qos > link.most_qos:
                raise MqttError(f"the broker takes QoS {link.most_qos} at most: publish with that")
        packet = _mqtt.publish(topic, payload, qos=qos, packet_id=packet_id, version=link.version)
        if len(packet) > link.most_bytes:
            raise MqttError(
                f"topic={topic!a} a packet of {len(packet)} bytes is more than the broker takes, {link.most_bytes}:"
                " raise its limit, or publish less at once"
            )
        link.send(packet, packet_id)
        self.published += 1
        return True

    @property
    def unacked(self) -> int:
        return self._link.unacked if self._link is not None else 0

    async def drain(self) -> None:
        """Everything published so far is acknowledged (QoS 1) or given to the system (QoS 0).

        RefusedError when a 5.0 broker refused messages since the last drain().
        """
        link = self._open_link()
        link.write()
        while link.unacked or link.waiting:
            await link.room()
        if self._refusal:
            code, self._refusal = self._refusal, 0
            raise RefusedError(f"the broker refused messages: {reason_text(code)}", code)

    async def close(self) -> None:
        """Write what waits, DISCONNECT, close. May be called at any time."""
        link, self._link = self._link, None
        if link is not None:
            await link.leave()

    def _open_link(self) -> _Link:
        if self._link is None:
            raise ClosedError("the publisher is not connected")
        if self._link.error is not None:
            raise self._link.error
        return self._link


class _Link(Receiver):
    def __init__(self, publisher: Publisher, version: int) -> None:
        self._publisher = publisher
        self.version = version
        self._loop = asyncio.get_running_loop()
        self._session = Session(version=version, acks=AckTracker(), router=Router())
        self._wire: Wire | None = None
        self.ready: asyncio.Future[Connack] = self._loop.create_future()
        self.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())  # nobody may be waiting
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self.error: FastkinError | None = None
        self.blocked = False
        self._leaving = False
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._scheduled = False
        self._in_flight: set[int] = set()
        self._last_id = 0
        self._room: asyncio.Future[None] | None = None
        self._ping: asyncio.TimerHandle | None = None
        self.heard_at = 0.0
        self.most_bytes = 1 << 29
        self.most_qos = 2

    def learn(self, properties: dict[str, object]) -> None:
        """What the broker takes, from its CONNACK."""
        if isinstance(most := properties.get("maximum_packet_size"), int) and most > 0:
            self.most_bytes = most
        if isinstance(most := properties.get("maximum_qos"), int):
            self.most_qos = most

    # -- out ---------------------------------------------------------------------------------------

    @property
    def unacked(self) -> int:
        return len(self._in_flight)

    @property
    def waiting(self) -> bool:
        """Bytes have not left yet."""
        return bool(self._out) or (self._wire is not None and self._wire.get_write_buffer_size() > 0)

    def free_id(self) -> int:
        packet_id = self._last_id
        while True:
            packet_id = packet_id % PACKET_IDS + 1
            if packet_id not in self._in_flight:
                break
        return packet_id

    def send(self, packet: bytes, packet_id: int) -> None:
        if packet_id:
            self._last_id = packet_id
            self._in_flight.add(packet_id)
        self._out.append(packet)
        self._out_bytes += len(packet)
        # Many small packets of one turn of the loop become one write; a large amount does not wait for its end.
        if self._out_bytes >= _BATCH:
            self.write()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self.write)

    def write(self) -> None:
        self._scheduled = False
        if self._out and self._wire is not None:
            out, self._out, self._out_bytes = self._out, [], 0
            self._wire.write(out[0] if len(out) == 1 else b"".join(out))

    async def room(self) -> None:
        """Something was acknowledged or written; MqttError when the connection is lost."""
        if self.error is not None:
            raise self.error
        self.write()
        if self._room is None:
            self._room = self._loop.create_future()
        if self._in_flight or self.blocked:
            await asyncio.shield(self._room)  # several may wait for the same room
        elif self.waiting:
            await asyncio.sleep(0.001)  # nobody says when a transport's buffer is empty
        if self.error is not None:
            raise self.error

    def _wake(self) -> None:
        if self._room is not None:
            self._room.set_result(None)
            self._room = None

    def pause_writing(self) -> None:
        self.blocked = True

    def resume_writing(self) -> None:
        self.blocked = False
        self._wake()

    # -- in ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._wire = cast("Wire", transport)
        self.heard_at = self._loop.time()
        broker = self._publisher.broker
        password = None if broker.password is None else broker.password.encode()
        user = broker.user or ("" if password is not None and self.version == 4 else None)
        with self._guarded():
            self._wire.write(
                self._session.connect(
                    client_id=self._publisher.client_id,
                    user=user,
                    password=password,
                    # Nothing is taken up again: what was not acknowledged is the caller's to publish anew.
                    clean_start=True,
                    keep_alive=broker.keep_alive_s,
                )
            )

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._session.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        self._feed(self._session.feed, nbytes)

    def data_received(self, data: bytes | memoryview) -> None:
        self._feed(self._session.feed_data, data)

    def _feed(self, feed: Callable[[T], int], what: T) -> None:
        if self.error is not None:
            return
        self.heard_at = self._loop.time()
        with self._guarded():
            if feed(what) & EVENTS:
                for event in self._session.take_events():
                    self._event(event)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except FastkinError as error:  # also a LibraryError: a setting that nobody validated
            self._fail(error)

    def _event(self, event: object) -> None:
        publisher = self._publisher
        if isinstance(event, Puback):
            before = len(self._in_flight)
            self._in_flight.difference_update(event.packet_ids)
            publisher.acked += before - len(self._in_flight)
            if event.refused:
                publisher.refused += len(event.refused)
                publisher._refusal = next(iter(event.refused.values()))
            self._wake()
        elif isinstance(event, Connack):
            if event.code:
                self._fail(refusal(event, publisher.broker.password))
                return
            keep_alive = event.properties.get("server_keep_alive", publisher.broker.keep_alive_s)
            if isinstance(keep_alive, int) and keep_alive:
                self._ping = self._loop.call_later(keep_alive / 2, self._keep_alive, float(keep_alive))
            if not self.ready.done():
                self.ready.set_result(event)
        elif isinstance(event, Disconnect):
            self._fail(MqttError(farewell(event, publisher.broker.password)))

    def _keep_alive(self, seconds: float) -> None:
        if self._wire is None or self.error is not None or self._leaving:
            return
        now = self._loop.time()
        if now - max(self.heard_at, now - silence(self._wire)) > 1.5 * seconds:
            self._fail(MqttError("the broker has been silent for too long: it is taken for dead"))
            return
        self._wire.write(self._session.pingreq())
        self._ping = self._loop.call_later(seconds / 2, self._keep_alive, seconds)

    # -- the end -----------------------------------------------------------------------------------

    def _fail(self, error: FastkinError) -> None:
        if self.error is None:
            self.error = error
        if not self.ready.done():
            self.ready.set_exception(self.error)
        self._wake()
        self.abort()

    async def leave(self) -> None:
        self._leaving = True
        if self._wire is None:
            return
        if self.error is None:
            self.write()
            self._wire.write(self._session.disconnect())
        self._wire.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.shield(self._ended)
        self.abort()
        await asyncio.wait([self._ended], timeout=_CLOSE_S)  # abort() sees to it

    def abort(self) -> None:
        if self._wire is not None and not self._ended.done() and not self._loop.is_closed():
            self._wire.abort()
            # No wait for the end may hang on an event loop that forgets to tell of it.
            self._loop.call_later(GONE_S, self.connection_lost, None)

    def eof_received(self) -> bool:
        return False  # close

    def connection_lost(self, exc: Exception | None) -> None:
        if self._ended.done():
            return
        if self._ping is not None:
            self._ping.cancel()
        if self.error is None:
            reason = explain(exc) if exc is not None else "the broker closed the connection"
            self.error = MqttError(f"connection to {self._publisher.broker.url} lost: {reason}")
        if not self.ready.done():
            # as it came: connect() adds the address
            self.ready.set_exception(exc or MqttError("the broker closed the connection"))
        self._ended.set_result(None)
        self._wake()
