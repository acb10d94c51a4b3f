"""One connection to a broker, from CONNECT to its end: packets in, acknowledgements out.

`Connection` has the bytes: it feeds them to the session and hands on what comes of it, answers of the broker to
`Handshake`, what can be no record to `SetApart`. These two and `KeepAlive` know `Reading`, and none of them the
connection.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from fastkin.errors import MqttError, ProtocolError
from fastkin.mqtt._core import (
    APART,
    EVENTS,
    OUTPUT,
    STALLED,
    Connack,
    Disconnect,
    Pingresp,
    Session,
    Suback,
    Unsuback,
)
from fastkin.mqtt.handshake import Asker, Handshake
from fastkin.mqtt.keep_alive import KeepAlive
from fastkin.mqtt.reading import COALESCE, PIECE, STALL, STOPPED, Coalescing, Reading
from fastkin.mqtt.set_apart import SetApart
from fastkin.mqtt.transport import GONE_S, Receiver, blame, open_wire, while_heard
from fastkin.mqtt.words import explain, farewell, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fastkin.mqtt._core import AckTracker, Apart, Router, Unfit
    from fastkin.mqtt.set_apart import Carrier
    from fastkin.mqtt.standing import Traffic
    from fastkin.mqtt.transport import Wire
    from fastkin.net.tls import Renewed

T = TypeVar("T")

_LEAVE_S = 2.0  # for the broker to take our last acknowledgements and close
_LINGER_S = 2.0  # for a connection that we give up to write what waits
_UNREAD_MOST = 1 << 20  # bytes: four times the acknowledgements that can be due at once
_QUOTA = 0x97


class Owner(Asker, Protocol):
    """Whose connection it is: it lives longer than one, and has what all of them share."""

    router: Router
    acks: AckTracker
    unfit: Unfit
    tls: Renewed | None
    topic_aliases: int  # how many the broker may use
    on_read: Callable[[], None]  # after a read in which messages were taken or a sink stalled
    set_apart: Callable[[Apart], Carrier]
    last_read: float  # loop time
    traffic: Traffic

    @property
    def stopping(self) -> bool: ...

    def was_paused(self, seconds: float) -> None:
        """Reading waited so long for room."""

    def failed(self, error: Exception) -> None:
        """A bug of ours, or of what on_read() calls."""

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """What goes on when a connection has ended."""


class Connection(Receiver):
    """One connection: what asyncio calls when bytes come, and what is written."""

    def __init__(self, owner: Owner, version: int) -> None:
        broker = owner.broker
        self.owner = owner
        self.version = version
        self.loop: asyncio.AbstractEventLoop = asyncio.get_running_loop()
        self.session: Session = Session(
            version=version,
            acks=owner.acks,
            router=owner.router,
            receive_maximum=broker.receive_maximum,
            max_packet_bytes=broker.max_packet_bytes,
            topic_alias_maximum=owner.topic_aliases,
            unfit=owner.unfit,
        )
        self.wire: Wire | None = None
        self.ended: asyncio.Future[None] = self.loop.create_future()
        self.began: float = 0.0  # when CONNACK came
        self.reason: str = ""  # why it ended
        self.malformed: bool = False  # it ended for what the broker sent
        self.code: int = 0
        self._heard = False  # bytes have come
        self._shut = False  # the peer closed; nothing else ended the connection
        self._dump: memoryview | None = None
        self._busy = False
        self._again = False  # resume() came while busy
        self._timers: dict[str, asyncio.TimerHandle] = {}

        self.reading: Reading = Reading(self.loop)
        self.coalescing: Coalescing = Coalescing(0.0 if broker.websocket else broker.coalesce_ms / 1000)
        self._keep_alive = KeepAlive(
            self.loop, self.session, self.reading, lambda: owner.last_read, lambda why: self._give_up(why, None)
        )
        self.handshake: Handshake = Handshake(
            owner, version, self.session, self.reading, self._keep_alive, self._give_up
        )
        self.set_apart: SetApart = SetApart(
            self.loop, self.session, self.reading, owner.set_apart, self._behind_piece, self._bug
        )

    # -- opening ---------------------------------------------------------------------------------

    def unanswered(self, *, timed_out: bool) -> bool:
        """The peer took our CONNECT and closed, or let it time out, without a word."""
        return bool(self.handshake.sent_at) and not self._heard and (timed_out or self._shut)

    async def open(self) -> None:
        """To CONNACK. Raises what explain() explains."""
        owner, handshake = self.owner, self.handshake
        limit = owner.broker.connect_timeout_s
        try:
            async with asyncio.timeout(limit):
                await open_wire(owner.broker, self, owner.tls)
            await while_heard(handshake.ready, limit, lambda: max(handshake.sent_at, owner.last_read))
        except BaseException as error:
            if isinstance(error, TimeoutError) and self.wire is not None:
                blame(self.wire)
            self.abort()
            raise

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.wire = cast("Wire", transport)
        self.reading.begin(self.wire)
        now = self.loop.time()
        self._keep_alive.begin(self.wire, now)
        self.coalescing.begin(now)
        try:
            packet = self.handshake.connect(self.wire, now)
        except Exception as error:  # noqa: BLE001 - a setting that nobody validated
            self._bug(error)
            return
        self.wire.write(packet)

    # -- reading: the hot path, once per read -----------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        if self.reading.deaf:
            if self._dump is None:
                self._dump = memoryview(bytearray(65_536))
            return self._dump
        return self.session.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        self._feed(self.session.feed, nbytes, nbytes)

    def data_received(self, data: bytes | memoryview) -> None:
        self._feed(self.session.feed_data, data, len(data))

    def _feed(self, feed: Callable[[T], int], what: T, nbytes: int) -> None:
        if self.reading.deaf:
            return
        session = self.session
        now = session.now = self.owner.last_read = self.loop.time()
        before = session.messages
        self._busy = True
        try:
            flags = feed(what)
        except Exception as error:  # noqa: BLE001 - sorted in _broken()
            self._broken(error, session.messages - before)
            return
        self._took(flags, session.messages - before, nbytes, now)

    def resume(self) -> None:
        """Offer what a sink refused, then read on."""
        if self.reading.deaf or self.reading.stopped:
            return
        if self._busy:  # whatever stalls, or has stalled, before the feed in hand is done is offered again after it
            self._again = True
            return
        if self.reading.paused & STALL:
            self._walk_on(STALL, STALLED)

    def _behind_piece(self, taken: int) -> None:
        self._walk_on(PIECE, APART, taken)

    def _walk_on(self, cause: int, flag: int, taken: int = 0) -> None:
        """Go on where the session stands, and read on unless its `flag` says that it stands there again. `taken`:
        messages that were taken while it stood."""
        session = self.session
        now = session.now = self.loop.time()
        before = session.messages - taken
        self._busy = True
        try:
            flags = session.resume()
        except Exception as error:  # noqa: BLE001
            self._broken(error, session.messages - before)
            return
        if not flags & flag:
            self._go_on(cause)
        self._took(flags, session.messages - before, 0, now)

    def _took(self, flags: int, taken: int, nbytes: int, now: float) -> None:
        """After each feed."""
        owner = self.owner
        self._heard = True
        try:
            if taken:
                traffic = owner.traffic
                traffic.messages += taken
                traffic.reads += 1
                owner.window.received(owner.acks.unacked, now)
            if taken or not flags & EVENTS:
                self._keep_alive.talked(now)
            if flags:
                if flags & STALLED:
                    self.reading.pause(STALL)
                if flags & EVENTS:
                    self._events()
                if flags & OUTPUT:
                    self.flush()
                if flags & APART:
                    self.set_apart.take()
            if taken or flags & STALLED:
                owner.on_read()
        except Exception as error:  # noqa: BLE001
            self._bug(error)
            return
        finally:
            self._idle()
        if self.coalescing.pause_s:
            self._coalesce(taken, nbytes, now)

    def _idle(self) -> None:
        """The feed is done: a resume() that came meanwhile is made up for."""
        self._busy = False
        if self._again:
            self._again = False
            self.loop.call_soon(self.resume)

    def _coalesce(self, taken: int, nbytes: int, now: float) -> None:
        """A pause is pointless when the window is exhausted: the broker waits for us."""
        if (
            self.coalescing.pays(taken, nbytes, now)
            and not self.reading.paused
            and not self.reading.deaf
            and self.owner.acks.unacked < self.owner.window.granted
        ):
            self.reading.pause_for(self.coalescing.pause_s)

    def _go_on(self, why: int) -> None:
        if why == STALL:
            self.owner.was_paused(self.reading.stalled_for())
        self._keep_alive.listen_again()
        self.reading.go_on(why)

    # -- control packets -------------------------------------------------------------------------

    def _events(self) -> None:
        for event in self.session.take_events():
            if self.reading.deaf:
                return
            if not isinstance(event, Pingresp):
                self._keep_alive.talked(self.owner.last_read)
            if isinstance(event, Suback):
                try:
                    self.handshake.suback(event)
                except ProtocolError as error:
                    self._give_up(str(error), error.code, error)
            elif isinstance(event, Connack):
                self._connack(event)
            elif isinstance(event, Disconnect):
                self.code = event.code
                self._give_up(farewell(event, self.owner.broker.password), None)
            elif isinstance(event, Unsuback):
                self.handshake.unsuback(event)
            elif not isinstance(event, Pingresp):
                self._give_up(f"malformed MQTT from the broker: {type(event).__name__} for nothing we sent", 0x82)

    def _connack(self, connack: Connack) -> None:
        if connack.code:
            error = refusal(connack, self.owner.broker.password)
            self.code = connack.code
            self.reason = str(error)
            self.handshake.fail(error)
            return
        now = self.loop.time()
        self.began = now
        self.handshake.accepted(connack, now)
        server_s = connack.properties.get("server_keep_alive")
        self._keep_alive.start(server_s if isinstance(server_s, int) else self.owner.broker.keep_alive_s, now)

    # -- writing -----------------------------------------------------------------------------------

    @property
    def up(self) -> bool:
        """CONNACK has come, and nothing ended the connection yet."""
        return self.handshake.up

    def flush(self) -> None:
        """Acknowledgements that are ready, as one run."""
        if not self.up or self.wire is None:
            return
        owner = self.owner
        unacked = owner.acks.unacked
        output = self.session.take_output()
        if output:
            if self.reading.listening:
                owner.window.acknowledging(unacked, self.loop.time(), owner.last_read)
            self.wire.write(output)
            if self.wire.get_write_buffer_size() > _UNREAD_MOST:
                self._give_up("the broker does not read our acknowledgements", None)
                return
            if self.session.crowded:  # room for as many as were acknowledged
                self.resume()
        if owner.acks.failed and not owner.stopping:
            self._give_up("a record can neither be stored nor set aside: the broker shall send it again", None)

    # -- ending ------------------------------------------------------------------------------------

    def _broken(self, error: Exception, taken: int) -> None:
        """feed() raised: the broker's fault, or ours."""
        self._idle()
        self._heard = True
        if not isinstance(error, ProtocolError):
            self._bug(error)
            return
        self.malformed = True
        self._took(EVENTS, taken, 0, self.loop.time())  # what came before: a DISCONNECT says more
        if error.code == _QUOTA:  # what its topics take is bounded, and the broker would do it again
            self.owner.topic_aliases = 0
        if (message := self.session.apart) is not None:
            pieces = []
            while self.session.apart_left:
                pieces.append(self.session.take_piece())
            self.session.finish_apart()
            self.owner.spawn(self.set_apart.rescue(message, pieces))
        if not self.reading.deaf:
            self._give_up(str(error), error.code, error)

    def _bug(self, error: Exception) -> None:
        self.owner.failed(error)
        self.reason = f"{type(error).__name__}: {error}"
        self.handshake.fail(MqttError(self.reason))
        self.abort()

    def _give_up(self, reason: str, code: int | None, error: MqttError | None = None) -> None:
        """End the connection; `code` goes to a 5.0 broker."""
        self.reason = self.reason or reason
        self.handshake.fail(error or MqttError(reason))
        if self.wire is None:
            return
        if self.up and code is not None and self.version == 5:
            self.wire.write(self.session.disconnect(code))
        self._turn_away()
        self.wire.close()
        # close() waits for what is to be written; a dead peer never takes it.
        self._timers["linger"] = self.loop.call_later(_LINGER_S, self.abort)

    def _turn_away(self) -> None:
        """It is over, though the wire may still be there: nothing is taken any more."""
        self.handshake.up = False
        self.reading.deaf = True

    async def leave(self) -> None:
        """The last acknowledgements, then DISCONNECT; the broker closes.

        What is unread is read and thrown away meanwhile: closing a socket with unread bytes would send a
        reset, and that may overtake our acknowledgements.
        """
        assert self.wire is not None
        self.flush()
        self.reason = "we left"
        self._turn_away()
        self.wire.write(self.session.disconnect(0))
        for why in (STALL, STOPPED, COALESCE, PIECE):
            if self.reading.paused & why:
                self._go_on(why)
        await self._end_within(_LEAVE_S)
        self.wire.close()
        await self._end_within(_LINGER_S)
        self.abort()
        await self._end_within(_LINGER_S)  # abort() sees to it

    async def _end_within(self, seconds: float) -> None:
        if not self.ended.done():
            await asyncio.wait([self.ended], timeout=seconds)

    def abort(self) -> None:
        self._turn_away()
        # cancelled: so was the task that awaited it, and the wire is still there
        over = self.ended.done() and not self.ended.cancelled()
        if self.wire is not None and not over and not self.loop.is_closed():
            self.wire.abort()
            # No wait for the end may hang on an event loop that forgets to tell of it.
            self._timers["gone"] = self.loop.call_later(GONE_S, self.connection_lost, None)

    def eof_received(self) -> bool:
        return False  # close

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended.done():
            return
        self._turn_away()
        for timer in self._timers.values():
            timer.cancel()
        self._keep_alive.end()
        self.handshake.end()
        self.set_apart.end()
        self.owner.was_paused(self.reading.stalled_for())
        self.reading.end()
        self._shut = not self.reason and (exc is None or isinstance(exc, (ConnectionError, ssl.SSLEOFError)))
        if not self.reason:
            self.reason = explain(exc) if exc is not None else "the broker closed the connection"
        self.ended.set_result(None)
        self.handshake.fail(exc if exc is not None else MqttError(self.reason))
