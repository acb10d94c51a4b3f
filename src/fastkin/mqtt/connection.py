"""One connection to a broker, from CONNECT to its end: packets in, acknowledgements out, pauses in reading."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Protocol, cast

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
from fastkin.mqtt.subscriptions import Subscriptions
from fastkin.mqtt.transport import (
    Receiver,
    blame,
    explain,
    farewell,
    open_wire,
    refusal,
    silence,
    while_heard,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fastkin.mqtt._core import Apart
    from fastkin.mqtt.subscriber import Intake
    from fastkin.mqtt.transport import Wire

# Why reading is paused, see _Reading.
_STALL = 1
_COALESCE = 2
STOPPED = 4
_APART = 8  # a piece of a message that is set aside is not taken yet
# Reads are coalesced while messages come faster than this in reads smaller than that. Below 2,000/s a
# pause costs latency and gains nothing, from 5,000/s on it saves four to seven of the wake-ups.
_COALESCE_ON = 5_000.0
_COALESCE_OFF = 4_000.0  # per second
_COALESCE_READ = 32 * 1024
_COALESCE_LOOK_S = 0.02
_RETAIN = {"always": 0, "new": 1, "never": 2}  # Retain Handling of MQTT 5.0
_LEAVE_S = 2.0  # for the broker to take our last acknowledgements and close
_LINGER_S = 2.0  # for a connection that we give up to write what waits
_UNREAD_MOST = 1 << 20  # bytes: four times the acknowledgements that can be due at once
SHARED_QUIET_S = 60.0  # a shared subscription over 3.1.1 that brought nothing for so long is spoken of
_TRICKLE_MOST = 5  # times a time-out: bytes that make no packet stand for a broker that lives
_GONE_S = 1.0  # for an event loop to say that a connection is gone that we have aborted
_QUOTA = 0x97


class Carrier(Protocol):
    """Takes one message aside. Whoever has it lets go of it when the connection ends before whole()."""

    async def take(self, piece: bytes) -> None:
        """Return when there is room for the next."""

    async def whole(self) -> None:
        """All of it was taken: settle its token once, when it is safe. Return when there is room for the next one.

        It may be cancelled while it waits, and must not have to be asked again: the token is held for this.
        """


class _Reading:
    """Whether a link reads: it does unless a cause is set. Each cause has one who ends it, set up before the pause.

    ========== ================================= ==========================================================
    _STALL     a sink has no room, or too many   Connection.resume(). The pipeline calls it whenever records are
               are unacknowledged                settled and the budget is low, flush() when acknowledgements
                                                 leave; a call that comes in the middle of a feed is made up
                                                 for after it (Connection._idle()).
    _COALESCE  the next read would be small      the timer that pause_for() arms
    _APART     a piece of a message that is set  Connection._carry(), the task that takes it, when who sets it
               aside is not taken                aside has room for the next
    STOPPED   stop(): no more is wanted         leave()
    ========== ================================= ==========================================================

    The end of the connection ends all. A cause may be set before there is a wire: begin() minds it.
    """

    __slots__ = ("_loop", "_stalled_at", "_timer", "_wire", "paused")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._wire: Wire | None = None
        self._stalled_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.paused = 0  # bits

    def begin(self, wire: Wire) -> None:
        self._wire = wire
        if self.paused:
            wire.pause_reading()

    def pause(self, why: int) -> None:
        if self.paused & why:
            return
        if why == _STALL:
            self._stalled_at = self._loop.time()
        if not self.paused and self._wire is not None and not self._wire.is_closing():
            self._wire.pause_reading()
        self.paused |= why

    def pause_for(self, seconds: float) -> None:
        self.pause(_COALESCE)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self.go_on, _COALESCE)

    def go_on(self, why: int) -> None:
        if not self.paused & why:
            return
        self.paused &= ~why
        if not self.paused and self._wire is not None and not self._wire.is_closing():
            self._wire.resume_reading()

    def stalled_for(self) -> float:
        return self._loop.time() - self._stalled_at if self.paused & _STALL else 0.0

    def end(self) -> None:
        self.paused = 0
        self._wire = None
        if self._timer is not None:
            self._timer.cancel()


class Connection(Receiver):
    """One connection: what asyncio calls when bytes come, and what is written."""

    def __init__(self, intake: Intake, version: int) -> None:
        broker = intake.broker
        self.intake = intake
        self.version = version
        self.loop = asyncio.get_running_loop()
        self.session = Session(
            version=version,
            ledger=intake.ledger,
            router=intake.router,
            receive_maximum=broker.receive_maximum,
            max_packet_bytes=broker.max_packet_bytes,
            topic_alias_maximum=intake._aliases,
            unfit=intake._unfit,
        )
        self.wire: Wire | None = None
        self.ended: asyncio.Future[None] = self.loop.create_future()
        self.began = 0.0  # when CONNACK came
        self.up = False  # CONNACK has come, and nothing ended the connection yet
        self.subscribing = False
        self.coalescing = False
        self.reason = ""  # why it ended
        self.malformed = False  # it ended for what the broker sent
        self.code = 0
        self._ready: asyncio.Future[None] = self.loop.create_future()  # CONNACK, or why there is none
        self._ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())  # nobody may be waiting
        self._sent_at = 0.0
        self._heard = False  # bytes have come
        self._shut = False  # the peer closed; nothing else ended the connection
        self._deaf = False  # what still comes is thrown away
        self._dump: memoryview | None = None
        self._busy = False
        self._again = False  # resume() came while busy
        self._timers: dict[str, asyncio.TimerHandle] = {}

        self._reading = _Reading(self.loop)
        self._carrying: asyncio.Task[None] | None = None
        self._piece = asyncio.Event()  # one waits in the session
        self._alive_at = 0.0  # the broker was heard, or could not be because we did not listen
        self._keep_alive = float(broker.keep_alive_s)

        self.subscriptions = Subscriptions(
            self.session, _RETAIN[broker.retain_handling], intake.unavailable(), intake.identifiers
        )
        self._asked_at = 0.0
        # something came that was no answer to a ping, or could not come because we did not listen
        self._talked_at = 0.0
        self._late = False  # and it was said

        self._look_at = 0.0  # when the rate was last looked at
        self._look_messages = 0
        self._look_reads = 0
        self._look_bytes = 0
        self._pause_s = broker.coalesce_ms / 1000 if broker.scheme in {"mqtt", "mqtts"} else 0.0

    # -- opening ---------------------------------------------------------------------------------

    def unanswered(self, *, timed_out: bool) -> bool:
        """The peer took our CONNECT and closed, or let it time out, without a word."""
        return bool(self._sent_at) and not self._heard and (timed_out or self._shut)

    async def open(self) -> None:
        """To CONNACK. Raises what explain() explains."""
        limit = self.intake.broker.connect_timeout_s
        try:
            async with asyncio.timeout(limit):
                await open_wire(self.intake.broker, self, self.intake._tls)
            await while_heard(self._ready, limit, lambda: max(self._sent_at, self.intake.last_read))
        except BaseException as error:
            if isinstance(error, TimeoutError) and self.wire is not None:
                blame(self.wire)
            self.abort()
            raise

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.wire = cast("Wire", transport)
        self._reading.begin(self.wire)
        broker = self.intake.broker
        clean = broker.clean_session
        password = None if broker.password is None else broker.password.encode()
        # 3.1.1 has no password without a user name, but an empty name will do
        user = broker.user or ("" if password is not None and self.version == 4 else None)
        self._sent_at = self._alive_at = self._look_at = self.loop.time()
        try:
            packet = self.session.connect(
                client_id=self.intake.client_id,
                user=user,
                password=password,
                clean_start=clean,
                keep_alive=broker.keep_alive_s,
                session_expiry=0 if clean or self.version == 4 else broker.session_expiry_s,
            )
        except Exception as error:  # noqa: BLE001 - a setting that nobody validated
            self._bug(error)
            return
        self.wire.write(packet)

    # -- reading: the hot path, once per read -----------------------------------------------------

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._deaf:
            if self._dump is None:
                self._dump = memoryview(bytearray(65_536))
            return self._dump
        return self.session.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        if self._deaf:
            return
        session = self.session
        now = session.now = self.intake.last_read = self.loop.time()
        before = session.messages
        self._busy = True
        try:
            flags = session.feed(nbytes)
        except Exception as error:  # noqa: BLE001 - sorted in _broken()
            self._broken(error, session.messages - before)
            return
        self._took(flags, session.messages - before, nbytes, now)

    def data_received(self, data: bytes | memoryview) -> None:
        if self._deaf:
            return
        session = self.session
        now = session.now = self.intake.last_read = self.loop.time()
        before = session.messages
        self._busy = True
        try:
            flags = session.feed_data(data)
        except Exception as error:  # noqa: BLE001
            self._broken(error, session.messages - before)
            return
        self._took(flags, session.messages - before, len(data), now)

    def resume(self) -> None:
        """Offer what a sink refused, then read on."""
        if self._deaf or self._reading.paused & STOPPED:
            return
        if self._busy:  # whatever stalls, or has stalled, before the feed in hand is done is offered again after it
            self._again = True
            return
        if self._reading.paused & _STALL:
            self._walk_on(_STALL, STALLED)

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
        intake = self.intake
        self._heard = True
        try:
            if taken:
                intake.messages += taken
                intake.reads += 1
                intake.window.received(intake.ledger.unacked, now)
            if taken or not flags & EVENTS:
                self._talked_at = now
            if flags:
                if flags & STALLED:
                    self.pause(_STALL)
                if flags & EVENTS:
                    self._events()
                if flags & OUTPUT:
                    self.flush()
                if flags & APART:
                    self._apart()
            if taken or flags & STALLED:
                intake.on_read()
        except Exception as error:  # noqa: BLE001
            self._bug(error)
            return
        finally:
            self._idle()
        if self._pause_s:
            self._coalesce(taken, nbytes, now)

    def _idle(self) -> None:
        """The feed is done: a resume() that came meanwhile is made up for."""
        self._busy = False
        if self._again:
            self._again = False
            self.loop.call_soon(self.resume)

    def _coalesce(self, taken: int, nbytes: int, now: float) -> None:
        """A pause after a small read, while many messages come in small reads.

        Each wake-up costs 20-30 us whatever it brings; behind a broker that sends message by message a
        short pause makes one read of ten. A pause is pointless when the window is exhausted: the broker
        waits for us.
        """
        self._look_messages += taken
        self._look_reads += 1
        self._look_bytes += nbytes
        elapsed = now - self._look_at
        if elapsed >= _COALESCE_LOOK_S:
            rate = self._look_messages / elapsed
            self.coalescing = (
                rate >= (_COALESCE_OFF if self.coalescing else _COALESCE_ON)
                and self._look_bytes < self._look_reads * _COALESCE_READ
            )
            self._look_at = now
            self._look_messages = self._look_reads = self._look_bytes = 0
        if (
            self.coalescing
            and nbytes < _COALESCE_READ
            and not self._reading.paused
            and not self._deaf
            and self.intake.ledger.unacked < self.intake.window.granted
        ):
            self._reading.pause_for(self._pause_s)

    # -- what can never be a record ------------------------------------------------------------------

    def _apart(self) -> None:
        """A piece waits. Nothing is read until it is taken."""
        self.pause(_APART)
        self._piece.set()
        if self._carrying is None and not self._deaf:
            self._carrying = self.loop.create_task(self._carry(), name="fastkin[intake].apart")
            self._carrying.add_done_callback(self._carried)

    async def _carry(self) -> None:
        session = self.session
        while (message := session.apart) is not None:
            carrier = self.intake.set_apart(message)
            while True:
                await self._piece.wait()
                self._piece.clear()
                await carrier.take(session.take_piece())
                if not session.apart_left:
                    break
                self._behind_piece(0)
            if self._reading.paused & STOPPED:
                return
            session.finish_apart()
            await carrier.whole()
            self._behind_piece(1)
        # here and not when the task is over: reading goes on already, and the next message needs a task of its own
        self._carrying = None

    def _behind_piece(self, taken: int) -> None:
        if not (self._deaf or self._reading.paused & STOPPED):
            self._walk_on(_APART, APART, taken)

    async def _rescue(self, message: Apart, pieces: list[bytes]) -> None:
        """The connection ends for a message that nobody will send again."""
        carrier = self.intake.set_apart(message)
        for piece in pieces:
            await carrier.take(piece)
        await carrier.whole()

    def _carried(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._bug(error if isinstance(error, Exception) else RuntimeError(str(error)))

    # -- pausing -----------------------------------------------------------------------------------

    @property
    def forgotten(self) -> bool:
        """A piece waits, reading with it, and no task is there to take it."""
        if not self._reading.paused & _APART or self._reading.paused & STOPPED or self._deaf:
            return False
        return self._carrying is None or self._carrying.done()

    def carry_on(self) -> None:
        if self.forgotten:
            self._apart()

    @property
    def stalled(self) -> bool:
        """Reading waits for room. A connection that is being given up reads no more, whatever room there is."""
        return bool(self._reading.paused & _STALL) and not self._deaf

    def stalled_for(self) -> float:
        return self._reading.stalled_for()

    def pause(self, why: int) -> None:
        self._reading.pause(why)

    def _go_on(self, why: int) -> None:
        if why == _STALL:
            self.intake._paused_s += self.stalled_for()
        # What the broker said meanwhile is unread: the time counts as alive.
        self._alive_at = self._talked_at = self.loop.time()
        self._reading.go_on(why)

    # -- control packets -------------------------------------------------------------------------

    def _events(self) -> None:
        for event in self.session.take_events():
            if self._deaf:
                return
            if not isinstance(event, Pingresp):
                self._talked_at = self.intake.last_read
            if isinstance(event, Suback):
                try:
                    self._suback(event)
                except ProtocolError as error:
                    self._give_up(str(error), error.code, error)
            elif isinstance(event, Connack):
                self._connack(event)
            elif isinstance(event, Disconnect):
                self.code = event.code
                self._give_up(farewell(event, self.intake.broker.password), None)
            elif isinstance(event, Unsuback):
                self._write(self.subscriptions.unsuback(event))
                for topic_filter, why in self.subscriptions.kept():
                    self.intake._kept(topic_filter, why)
            elif not isinstance(event, Pingresp):
                self._give_up(f"malformed MQTT from the broker: {type(event).__name__} for nothing we sent", 0x82)

    def _connack(self, connack: Connack) -> None:
        if connack.code:
            error = refusal(connack, self.intake.broker.password)
            self.code = connack.code
            self.reason = str(error)
            if not self._ready.done():
                self._ready.set_exception(error)
            return
        now = self.loop.time()
        self.intake.window.round_trip_s = now - self._sent_at
        self.began = self._alive_at = now
        self.up = True
        keep_alive = connack.properties.get("server_keep_alive")
        if isinstance(keep_alive, int):
            self._keep_alive = float(keep_alive)
        self.intake._opened(self, connack)
        if not self._ready.done():
            self._ready.set_result(None)
        self.subscriptions.learn(connack.properties)
        self._subscribe(self.intake.subscriptions)
        self._write(self.subscriptions.unsubscribe(self.intake.unsubscribe))
        if self._keep_alive:
            self._timers["ping"] = self.loop.call_later(self._keep_alive / 2, self._ping)

    def _write(self, packets: bytes) -> None:
        if packets and self.wire is not None:
            self.wire.write(packets)

    def _subscribe(self, filters: Sequence[tuple[str, int]]) -> None:
        packets = self.subscriptions.subscribe(filters)
        if not packets:
            self._answered()
            return
        self.subscribing = True
        self._write(packets)
        self._asked_at = self.loop.time()
        self._await_subacks(self.intake.broker.connect_timeout_s)

    def _await_subacks(self, seconds: float) -> None:
        self._timers["suback"] = self.loop.call_later(seconds, self._no_suback)

    def _no_suback(self) -> None:
        """Gives up a broker that is silent. One that talks may have much to say before it comes to SUBACK."""
        limit = self.intake.broker.connect_timeout_s
        now = self.loop.time()
        if self._reading.paused & (_STALL | STOPPED | _APART):  # it may be behind what we do not read
            self._await_subacks(limit)
            return
        # Answers to pings are no sign of it: what was asked after SUBSCRIBE is answered, and SUBSCRIBE is not.
        left = limit - (now - self._heard_at(now, limit, max(self._talked_at, self._asked_at)))
        if left <= 0:
            self._give_up(f"no SUBACK within {limit:g} s", 0x83)
            return
        if not self._late and now - self._asked_at >= limit:
            self._late = True
            self.intake._late_suback(now - self._asked_at)
        self._await_subacks(max(left, 0.01))

    def _heard_at(self, now: float, patience_s: float, heard: float) -> float:
        """When the broker was heard last, or when we began to ask or to listen again: `heard`, or later.

        A WebSocket message is seen when it is whole. While bytes come a large one is on its way, or it is the
        pings of a proxy in front of a broker that is dead: they count for a while only.
        """
        assert self.wire is not None
        return max(heard, min(now - silence(self.wire), heard + _TRICKLE_MOST * patience_s))

    def _suback(self, suback: Suback) -> None:
        if not self.subscriptions.waiting:
            self.subscriptions.suback(suback)  # said twice, or nonsense
            return
        self._write(self.subscriptions.suback(suback))
        if not self.subscriptions.waiting:
            self._timers.pop("suback").cancel()
            self._answered()

    def _answered(self) -> None:
        """Every filter has its answer for now."""
        again = [
            (refusal.topic_filter, refusal.qos) for refusal in self.subscriptions.missing.values() if not refusal.final
        ]
        if again:
            self._timers["again"] = self.loop.call_later(
                self.intake.broker.reconnect_max_s, self._subscribe_again, again
            )
        self.intake._subscribed(self)

    def watch_shared(self, filters: Sequence[str]) -> None:
        """Say it when they bring nothing."""

        def look() -> None:
            if not self.session.messages and not self._reading.paused & STOPPED:
                self.intake._quiet_shared(filters)

        self._timers["shared"] = self.loop.call_later(SHARED_QUIET_S, look)

    def _subscribe_again(self, filters: list[tuple[str, int]]) -> None:
        if self.up and not self._reading.paused & STOPPED:
            self._subscribe(filters)

    # -- keep-alive ---------------------------------------------------------------------------------

    def _ping(self) -> None:
        """Twice per keep-alive, whether we read or not. Silence is death only while we listen."""
        assert self.wire is not None
        now = self.loop.time()
        if self._reading.paused & (_STALL | STOPPED | _APART):
            self._alive_at = now
        else:
            heard = max(self._alive_at, self._asked_at, self.intake.last_read)
            silent = now - self._heard_at(now, 1.5 * self._keep_alive, heard)
            if silent > 1.5 * self._keep_alive:
                self._give_up(f"the broker has been silent for {silent:.0f} s: it is taken for dead", None)
                return
        self.wire.write(self.session.pingreq())
        self._timers["ping"] = self.loop.call_later(self._keep_alive / 2, self._ping)

    # -- writing -----------------------------------------------------------------------------------

    def flush(self) -> None:
        """Acknowledgements that are ready, as one run."""
        if not self.up or self.wire is None:
            return
        intake = self.intake
        unacked = intake.ledger.unacked
        output = self.session.take_output()
        if output:
            if not self._reading.paused & (_STALL | STOPPED | _APART):
                intake.window.acknowledging(unacked, self.loop.time(), intake.last_read)
            self.wire.write(output)
            if self.wire.get_write_buffer_size() > _UNREAD_MOST:
                self._give_up("the broker does not read our acknowledgements", None)
                return
            if self.session.crowded:  # room for as many as were acknowledged
                self.resume()
        if intake.ledger.failed and not intake._stopping.is_set():
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
            self.intake._aliases = 0
        if (message := self.session.apart) is not None:
            pieces = []
            while self.session.apart_left:
                pieces.append(self.session.take_piece())
            self.session.finish_apart()
            self.intake.spawn(self._rescue(message, pieces))
        if not self._deaf:
            self._give_up(str(error), error.code, error)

    def _bug(self, error: Exception) -> None:
        self.intake._failed(error)
        self.reason = f"{type(error).__name__}: {error}"
        if not self._ready.done():
            self._ready.set_exception(MqttError(self.reason))
        self.abort()

    def _give_up(self, reason: str, code: int | None, error: MqttError | None = None) -> None:
        """End the connection; `code` goes to a 5.0 broker."""
        self.reason = self.reason or reason
        if not self._ready.done():
            self._ready.set_exception(error or MqttError(reason))
        if self.wire is None:
            return
        if self.up and code is not None and self.version == 5:
            self.wire.write(self.session.disconnect(code))
        self.up = False
        self._deaf = True
        self.wire.close()
        # close() waits for what is to be written; a dead peer never takes it.
        self._timers["linger"] = self.loop.call_later(_LINGER_S, self.abort)

    async def leave(self) -> None:
        """The last acknowledgements, then DISCONNECT; the broker closes.

        What is unread is read and thrown away meanwhile: closing a socket with unread bytes would send a
        reset, and that may overtake our acknowledgements.
        """
        assert self.wire is not None
        self.flush()
        self.up = False
        self.reason = "we left"
        self._deaf = True
        self.wire.write(self.session.disconnect(0))
        for why in (_STALL, STOPPED, _COALESCE, _APART):
            if self._reading.paused & why:
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
        self.up = False
        self._deaf = True
        # cancelled: so was the task that awaited it, and the wire is still there
        over = self.ended.done() and not self.ended.cancelled()
        if self.wire is not None and not over and not self.loop.is_closed():
            self.wire.abort()
            # No wait for the end may hang on an event loop that forgets to tell of it.
            self._timers["gone"] = self.loop.call_later(_GONE_S, self.connection_lost, None)

    def eof_received(self) -> bool:
        return False  # close

    def connection_lost(self, exc: Exception | None) -> None:
        if self.ended.done():
            return
        self.up = False
        self._deaf = True
        for timer in self._timers.values():
            timer.cancel()
        if self._carrying is not None:
            self._carrying.cancel()
        self.intake._paused_s += self.stalled_for()
        self._reading.end()
        self._shut = not self.reason and (exc is None or isinstance(exc, (ConnectionError, ssl.SSLEOFError)))
        if not self.reason:
            self.reason = explain(exc) if exc is not None else "the broker closed the connection"
        self.ended.set_result(None)
        if not self._ready.done():
            self._ready.set_exception(exc if exc is not None else MqttError(self.reason))
