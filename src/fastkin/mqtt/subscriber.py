"""The MQTT session: connect, subscribe, receive, pause, acknowledge, reconnect.

    intake = Intake(broker, [("plant/#", 1)], router=router, ledger=ledger, on_read=engine_pump)
    task = asyncio.create_task(intake.run())

`Intake` lives as long as the pipeline; a `_Link` is one connection of it. Bytes land in the buffer of
the link's `_mqtt.Session`, which hands payloads to the router's sinks without a Python object per
message; Python runs once per read. The ledger outlives connections and is reset at each new one, so that
an acknowledgement of a former connection is never sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import ssl
from typing import TYPE_CHECKING, Protocol, cast

from fastkin._codec import DROPPED
from fastkin.errors import MqttError, ProtocolError, RefusedError
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
    Unfit,
    Unsuback,
)
from fastkin.mqtt.dialect import Dialect
from fastkin.mqtt.reasons import UNAVAILABLE
from fastkin.mqtt.subscriptions import SHARED, Refusal, Subscriptions
from fastkin.mqtt.transport import (
    Receiver,
    blame,
    explain,
    farewell,
    open_wire,
    refusal,
    renewed_tls,
    said,
    silence,
    while_heard,
)
from fastkin.status.logs import Repeats

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from fastkin.config import Broker
    from fastkin.mqtt._core import Apart, Ledger, Router
    from fastkin.mqtt.transport import Wire

_LOG = logging.getLogger("fastkin.intake")

_FILTERS_SHOWN = 10

# Why reading is paused, see _Reading.
_STALL = 1
_COALESCE = 2
_STOPPED = 4
_APART = 8  # a piece of a message that is set aside is not taken yet

# Reads are coalesced while messages come faster than this in reads smaller than that. Below 2,000/s a
# pause costs latency and gains nothing, from 5,000/s on it saves four to seven of the wake-ups.
_COALESCE_ON = 5_000.0
_COALESCE_OFF = 4_000.0  # per second
_COALESCE_READ = 32 * 1024
_COALESCE_LOOK_S = 0.02
_RETAIN = {"always": 0, "new": 1, "never": 2}  # Retain Handling of MQTT 5.0

_WORKED_S = 5.0  # a connection that lived so long was a good one
_EARLY_MOST = 3  # so many connections that die right after SUBSCRIBE are no accident
_LEAVE_S = 2.0  # for the broker to take our last acknowledgements and close
_LINGER_S = 2.0  # for a connection that we give up to write what waits
_MAX_WINDOW = 65_535
_UNREAD_MOST = 1 << 20  # bytes: four times the acknowledgements that can be due at once
# A broker that is away for hours: so many lines of a kind, then one line a minute that counts the rest.
_TROUBLE_LINES = 5
_TROUBLE_S = 60.0

_AUTH_CODES = frozenset({0x04, 0x05, 0x86, 0x87, 0x8A, 0x8C})
_VERSION_CODES = frozenset({0x01, 0x84})
_UNAVAILABLE_S = 600.0  # how long we do not ask for what ended a connection
_SHARED_QUIET_S = 60.0  # a shared subscription over 3.1.1 that brought nothing for so long is spoken of
_TRICKLE_MOST = 5  # times a time-out: bytes that make no packet stand for a broker that lives
_GONE_S = 1.0  # for an event loop to say that a connection is gone that we have aborted
_ID_CODES = frozenset({0x02, 0x80, 0x85})  # mosquitto says 0x80
_TAKEN_OVER = 0x8E
_QUOTA = 0x97


# Broker and client id of each session that this process has had: a reload makes a new Intake for an old session.
_SESSIONS: set[tuple[str, str]] = set()


class Window:
    """How many unacknowledged messages the broker hands out: what was asked for, then what was seen.

    A window is exhausted when the broker falls silent and goes on as soon as acknowledgements leave. The
    same count seen like that three times in a row is the broker's window. More than the window proves
    the guess wrong: it is doubled, and learned anew. Pure: times come from outside.

    A slow source falls silent too, so silence alone says little. It counts when it was long compared with how messages
    came just before, or as long as a batch is held at all. And a guess is believed only while the broker
    presses, that is, has the next message at hand when acknowledgements leave: else nobody waits for us and there is
    no hurry. It is verified now and then by holding a batch although the guess says that no more will come.
    """

    QUIET_S = 0.005
    AGREE = 3
    LONG = 4  # silence this many times as long as the gaps before it is no gap
    MOST_OF = 0.8  # of the linger
    # after a guess, and twice that after each time it held: a hold costs a linger at most
    VERIFY_S = 1.0
    VERIFY_LINGERS = 20
    VERIFY_DOUBLED = 8

    __slots__ = (
        "_acked_at",
        "_agreed",
        "_count",
        "_gap",
        "_held_at",
        "_hold_s",
        "_pressing",
        "_probe",
        "_received_at",
        "_sure",
        "_verify_at",
        "_verify_least_s",
        "_verify_s",
        "granted",
        "most",
        "round_trip_s",
    )

    def __init__(self, granted: int, most: int = _MAX_WINDOW, *, linger_s: float = 0.0, sure: bool = False) -> None:
        """`linger_s`: how long a batch is held at most. `sure`: the broker was told not to go beyond `most`."""
        self.most = most
        self.granted = max(1, min(granted, most))
        self.round_trip_s = 0.0
        self._hold_s = max(self.QUIET_S, self.MOST_OF * linger_s)
        self._sure = sure
        self._pressing = True
        self._probe = 0  # what was unacknowledged when acknowledgements left after a silence
        self._acked_at: float | None = None  # when the first left since messages came
        self._received_at: float | None = None
        self._gap: float | None = None  # between reads that no acknowledgement lies between, the longest lately
        self._count = 0
        self._agreed = 0
        self._held_at: float | None = None  # since when a batch is held to verify the guess
        self._verify_least_s = max(self.VERIFY_S, self.VERIFY_LINGERS * linger_s)
        self._verify_s = self._verify_least_s
        self._verify_at: float | None = None

    def acknowledging(self, unacked: int, now: float, last_read: float) -> None:
        """Acknowledgements are about to leave."""
        if self._held_at is not None and now - self._held_at >= self._hold_s:
            # It was held for long enough, and no more came than the guess says.
            self._held_at = None
            self._verify_s = min(2 * self._verify_s, self.VERIFY_DOUBLED * self._verify_least_s)
            self._verify_at = now + self._verify_s
        if self._acked_at is not None:
            if now - self._acked_at <= self._at_once():
                return  # together with those before: the broker has not had the time to say what they are worth
            self._probe = 0
        else:
            self._acked_at = now
        if now - last_read > self._silence():
            self._probe = unacked

    def received(self, unacked: int, now: float) -> None:
        """Messages came; `unacked` counts them."""
        acked_at, self._acked_at = self._acked_at, None
        before, self._received_at = self._received_at, now
        probe, self._probe = self._probe, 0
        if unacked > self.granted:
            self.granted = min(self.most, max(2 * unacked, 1))
            self._agreed = 0
            self._held_at = None
        if acked_at is None:
            if before is not None:
                gap = now - before
                self._gap = gap if self._gap is None else max(gap, self._gap * 0.9)
            return
        self._pressing = now - acked_at <= self._at_once()
        if not self._pressing:
            self._agreed = 0  # they did not come because of the acknowledgements
            return
        if not probe:
            return
        self._agreed = self._agreed + 1 if probe == self._count else 1
        self._count = probe
        if self._agreed >= self.AGREE and probe < self.granted:
            self.granted = probe
            self._held_at = None
            self._verify_s = self._verify_least_s
            self._verify_at = now + self._verify_s

    def exhausted(self, unacked: int, now: float) -> bool:
        """Is everything here that the broker will hand out? Then to wait for more would be to wait for nothing."""
        if unacked < self.granted:
            return False
        if self._sure and self.granted == self.most:  # no guess, though mosquitto may go a little beyond it
            return True
        if not self._pressing:
            return False
        if self._verify_at is None:
            self._verify_at = now + self._verify_s
        if now < self._verify_at:
            return True
        if self._held_at is None:
            self._held_at = now
        return False

    def _at_once(self) -> float:
        return self.QUIET_S + 2 * self.round_trip_s

    def _silence(self) -> float:
        """What is longer is no gap between messages."""
        if self._gap is None:
            return self._hold_s
        return min(self._hold_s, max(self.QUIET_S, self.LONG * self._gap))


class Carrier(Protocol):
    """Takes one message aside. Whoever has it lets go of it when the connection ends before whole()."""

    async def take(self, piece: bytes) -> None:
        """Return when there is room for the next."""

    async def whole(self) -> None:
        """All of it was taken: settle its token once, when it is safe. Return when there is room for the next one.

        It may be cancelled while it waits, and must not have to be asked again: the token is held for this.
        """


class _Nowhere:
    """Takes messages aside that nobody wants to have."""

    def __init__(self, intake: Intake, message: Apart) -> None:
        self._intake = intake
        self._message = message

    async def take(self, piece: bytes) -> None: ...

    async def whole(self) -> None:
        self._intake.ledger.settled(self._message.token, 1, DROPPED)


class Intake:
    """One subscription: keeps a connection to the broker and feeds what comes to the router's sinks."""

    def __init__(
        self,
        broker: Broker,
        subscriptions: Sequence[tuple[str, int]],
        *,
        router: Router,
        ledger: Ledger,
        on_read: Callable[[], None],
        on_state: Callable[[str], None] | None = None,
        set_apart: Callable[[Apart], Carrier] | None = None,
        name: str | None = None,
        identifiers: Mapping[str, int] | None = None,
        linger_s: float = 0.0,
    ) -> None:
        """`on_read` runs once per read in which messages were taken or a sink stalled; `set_apart` says where a message
        goes that can never be a record, None: nowhere. `identifiers`: the Subscription Identifier of each filter, which
        a 5.0 broker says with the messages.

        ConfigError: certificate files that cannot be read.
        """
        self.broker = broker
        self.subscriptions = list(subscriptions)
        self.identifiers = identifiers or {}
        self.router = router
        self._unwanted: tuple[str, ...] = ()
        self.ledger = ledger
        self.on_read = on_read
        self._on_state = on_state
        self.set_apart: Callable[[Apart], Carrier] = set_apart or (lambda message: _Nowhere(self, message))
        self._unfit = Unfit()
        self._work: set[asyncio.Task[None]] = set()
        self._tls = renewed_tls(broker)
        self._where = f"pipeline={name} stage=intake" if name else "stage=intake"
        self.client_id = broker.client_id
        if not broker.client_id and not broker.clean_session:
            self.client_id = f"fastkin-{os.urandom(8).hex()}"
            _LOG.warning(
                "%s broker=%s no client id is set: using %s for this process. The session, and what the broker keeps"
                " in it, cannot be taken up again after a restart; set a client id",
                self._where, broker.url, self.client_id,
            )  # fmt: skip

        self.state = "new"  # new, connecting, connected, refused (a filter), waiting, draining, closed
        self.connected = asyncio.Event()  # and every filter is subscribed
        self.connects = 0
        self.disconnects = 0
        self.messages = 0
        self.reads = 0
        self.last_read = 0.0  # loop time
        self.last_error: str | None = None
        self.version = 0  # 4 is 3.1.1, 5 is 5.0: of the connection that is open, or was last
        self._linger_s = linger_s  # how long what it hands on may be held: see Window
        self.window = Window(broker.receive_maximum, broker.receive_maximum, linger_s=linger_s, sure=True)

        loop = asyncio.get_running_loop()
        self._lines = Repeats(_LOG, loop.call_later, most=_TROUBLE_LINES, per_s=_TROUBLE_S)
        self._paused_s = 0.0
        self._link: _Link | None = None
        self._opening: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._bug: Exception | None = None
        self._attempts = 0  # since a connection worked
        self._early = 0  # connections in a row that died right after SUBSCRIBE
        self._dialect = Dialect(broker.protocol)
        self._windows: dict[int, Window] = {}  # by version
        self._unavailable: dict[int, float] = {}  # reason codes that ended a connection, and until when they count
        self._aliases = broker.topic_alias_maximum

    # -- what is seen from outside ---------------------------------------------------------------

    @property
    def granted_window(self) -> int:
        """Unacknowledged messages the broker lets us hold, as far as is known."""
        return self.window.granted

    @property
    def unsubscribe(self) -> Sequence[str]:
        """Filters that the session may have from before and that are not wanted any more."""
        return self._unwanted

    @unsubscribe.setter
    def unsubscribe(self, filters: Sequence[str]) -> None:
        for topic_filter in filters:
            if topic_filter not in self._unwanted:
                self.router.remove(topic_filter)
        self._unwanted = tuple(filters)

    @property
    def coalescing(self) -> bool:
        """Small reads are followed by a pause just now."""
        return self._link is not None and self._link.coalescing

    @property
    def paused(self) -> bool:
        """Reading is paused because a sink has no room."""
        return self._link is not None and self._link.stalled

    @property
    def stopping(self) -> bool:
        """No more messages are taken."""
        return self._stopping.is_set()

    @property
    def forgotten(self) -> bool:
        """Reading is paused for a message that is set aside, and nobody is at it."""
        return self._link is not None and self._link.forgotten

    def carry_on(self) -> None:
        """For a watchdog: take up what is forgotten."""
        if self._link is not None:
            self._link.carry_on()

    @property
    def paused_s(self) -> float:
        """How long reading was paused for want of room, in all."""
        return self._paused_s + (self._link.stalled_for() if self._link is not None else 0.0)

    # -- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, subscribe, reconnect until stop(). Trouble with the network is logged, not raised."""
        try:
            while not self._stopping.is_set():
                if await self._attempt() or self._stopping.is_set():
                    continue
                delay = self._backoff()
                self._set_state("waiting")
                self._lines.say(
                    logging.INFO, "again", "%s broker=%s trying again in %.1f s", self._where, self.broker.url, delay
                )
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._stopping.wait()
        finally:
            self.connected.clear()
            self._set_state("closed")
            self._lines.close()

    def flush_acks(self) -> None:
        """Write the acknowledgements that are ready, as one run."""
        if self._link is not None:
            self._link.flush()

    def resume(self) -> None:
        """There is room again: offer what was refused, and read on."""
        if self._link is not None:
            self._link.resume()

    async def stop(self) -> None:
        """Take no more messages. The connection and its keep-alive stay, so that acknowledgements can go out."""
        self._stopping.set()
        if self._link is None:
            return
        if self._opening is not None:
            self._opening.cancel()
        elif self._link.up:
            self._link.pause(_STOPPED)
            self._set_state("draining")

    async def close(self) -> None:
        """stop(), write the last acknowledgements, say goodbye, close."""
        await self.stop()
        link = self._link
        if link is not None and link.up:
            await link.leave()

    def abort(self) -> None:
        """Drop the connection at once, without goodbye."""
        if self._link is not None:
            self._link.abort()

    def _set_state(self, state: str) -> None:
        if state != self.state:
            _LOG.debug("%s broker=%s client=%s is %s now", self._where, self.broker.url, ascii(self.client_id), state)
            self.state = state
            if self._on_state is not None:
                self._on_state(state)

    def _backoff(self) -> float:
        """Exponential with full jitter, above half of the least."""
        least, most = self.broker.reconnect_min_s, self.broker.reconnect_max_s
        self._attempts += 1
        ceiling = min(most, least * 2.0 ** min(self._attempts - 1, 30))
        return random.uniform(least / 2, max(least, ceiling))  # noqa: S311

    # -- one connection ------------------------------------------------------------------------

    async def _attempt(self) -> bool:
        """One connection, from its start to its end. True: the next attempt may follow at once."""
        version = self._dialect.next(asyncio.get_running_loop().time())
        if version != self.version:
            most = self.broker.receive_maximum if version == 5 else _MAX_WINDOW
            first = most if version == 5 else self.broker.inflight
            new = Window(first, most, linger_s=self._linger_s, sure=version == 5)
            self.window = self._windows.setdefault(version, new)
            self.version = version
        self.ledger.reset(not self.broker.clean_session)
        link = self._link = _Link(self, version)
        self._set_state("connecting")
        try:
            try:
                self._opening = asyncio.create_task(link.open(), name="fastkin[intake].connect")
                await self._opening
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if self._stopping.is_set() and task is not None and not task.cancelling():
                    return True  # it was stop() that cancelled the attempt
                raise
            except (OSError, MqttError) as error:
                return self._not_connected(link, error)
            finally:
                self._opening = None
            if self._stopping.is_set():
                link.pause(_STOPPED)
                self._set_state("draining")
            # not the future itself: cancelled with us it would pass for an end, and the connection would stay
            await asyncio.shield(link.ended)
            self._disconnected(link)
            return False
        finally:
            if not link.ended.done():
                link.abort()
            self._link = None
            self.connected.clear()
            if self._bug is not None:
                raise self._bug

    def _not_connected(self, link: _Link, error: Exception) -> bool:
        """True: try at once, in another way."""
        url = self.broker.url
        code = error.code if isinstance(error, RefusedError) else None
        now = link.loop.time()
        timed_out = isinstance(error, TimeoutError) and error.errno is None
        other = "3.1.1" if link.version == 5 else "5.0"
        if code in _VERSION_CODES:
            if self._dialect.refused(link.version, now):
                self._lines.say(
                    logging.INFO, "version", "%s broker=%s does not take MQTT %s: trying %s",
                    self._where, url, "5.0" if link.version == 5 else "3.1.1", other,
                )  # fmt: skip
                return True
        elif link.unanswered(timed_out=timed_out) and self._dialect.unanswered(link.version, now, timed_out=timed_out):
            self._lines.say(
                logging.INFO, "version guess", "%s broker=%s did not answer MQTT %s: it may not speak it, trying %s",
                self._where, url, "5.0" if link.version == 5 else "3.1.1", other,
            )  # fmt: skip
            return True
        reason = explain(error)
        if code in _ID_CODES and not self.client_id:
            self.client_id = f"fastkin-{os.urandom(8).hex()}"
            _LOG.info("%s broker=%s wants a client id: using %s", self._where, url, self.client_id)
            return True
        if timed_out:
            reason = f"no answer within {self.broker.connect_timeout_s:g} s"
        elif self._tls is not None and link.unanswered(timed_out=False):
            # TLS 1.3: the broker judges our certificate when we are through, and its alert may be lost in the reset.
            reason += "; this soon after the TLS handshake it may want a client certificate, or another one"
        if code in _AUTH_CODES:
            reason += "; check user, password and client id, and what the broker's policy allows them"
        self.last_error = reason
        self._lines.say(
            logging.ERROR if code is not None else logging.WARNING, f"cannot connect {code}",
            "%s broker=%s client=%s cannot connect: %s", self._where, url, ascii(self.client_id), reason,
        )  # fmt: skip
        return False

    def _disconnected(self, link: _Link) -> None:
        self.disconnects += 1
        lived = link.loop.time() - link.began
        if lived >= _WORKED_S:
            self._attempts = self._early = 0
        elif link.subscribing and not link.malformed:
            self._early += 1
        if link.code in UNAVAILABLE:
            self._unavailable[link.code] = link.loop.time() + _UNAVAILABLE_S
        else:
            self._unavailable.clear()  # the broker may be another one now
        if self._stopping.is_set():
            _LOG.info("%s broker=%s disconnected: %s", self._where, self.broker.url, link.reason)
            return
        self.last_error = link.reason
        self._lines.say(
            logging.WARNING, "lost",
            "%s broker=%s client=%s connection lost after %.1f s: %s",
            self._where, self.broker.url, ascii(self.client_id), lived, link.reason,
        )  # fmt: skip
        if self._early == _EARLY_MOST and link.code != _TAKEN_OVER:
            _LOG.error(
                "%s broker=%s client=%s the connection was lost %d times in a row soon after subscribing: does the"
                " broker's policy allow these filters to this client, and does another client use the same client id?"
                " Going on with a growing delay",
                self._where, self.broker.url, ascii(self.client_id), self._early,
            )  # fmt: skip

    # -- what a link reports ---------------------------------------------------------------------

    def unavailable(self) -> list[int]:
        """Reason codes by which the broker ended a connection not long ago: it must not be asked for that again."""
        now = asyncio.get_running_loop().time()
        return [code for code, until in self._unavailable.items() if now < until]

    def _opened(self, link: _Link, connack: Connack) -> None:
        self.connects += 1
        self._dialect.worked(link.version)
        broker = self.broker
        assigned = connack.properties.get("assigned_client_identifier")
        client = self.client_id or str(assigned or "")
        self._lines.say(
            logging.INFO, "connected",
            "%s broker=%s client=%s connected (MQTT %s, %s)",
            self._where, broker.url, said(client), "5.0" if link.version == 5 else "3.1.1",
            self._session_words(connack),
        )  # fmt: skip
        if connack.properties.get("maximum_qos") == 0 and any(qos for _, qos in self.subscriptions):
            self._lines.say(
                logging.WARNING, "maximum qos",
                "%s broker=%s takes and gives QoS 0 only (Maximum QoS): a message that is on its way when a connection"
                " or fastkin ends is lost, whatever qos is set",
                self._where, broker.url,
            )  # fmt: skip
        mine = (broker.url, self.client_id)
        if broker.clean_session:
            _SESSIONS.discard(mine)
            return
        if mine in _SESSIONS and not connack.session_present:
            self._lines.say(
                logging.WARNING, "session lost",
                "%s broker=%s client=%s the broker has lost our session: what was published meanwhile is lost. It does"
                " not keep sessions over its restarts, they expire (session_expiry_s), or another client ended it",
                self._where, broker.url, said(client),
            )  # fmt: skip
        _SESSIONS.add(mine)
        expiry = connack.properties.get("session_expiry_interval")
        if isinstance(expiry, int) and expiry < broker.session_expiry_s:
            self._lines.say(
                logging.WARNING, "session expiry",
                "%s broker=%s keeps our session for %d s only, %d were asked for",
                self._where, broker.url, expiry, broker.session_expiry_s,
            )  # fmt: skip

    def _session_words(self, connack: Connack) -> str:
        if connack.session_present:
            return "the broker has our session"
        if self.broker.clean_session:
            return "a clean session"
        if (self.broker.url, self.client_id) in _SESSIONS:
            return "a new session, ours is lost"
        if not self.broker.client_id:
            return "a new session"  # of a client id that is new as well
        return "a new session: if this client id had one, the broker has lost it and what it held"

    def _subscribed(self, link: _Link) -> None:
        """Every filter that was asked for has its answer."""
        granted, refused = link.subscriptions.outcome()
        for told in refused:
            self._refused(told)
        asked = dict(self.subscriptions)
        for topic_filter, qos in granted:
            if qos < asked.get(topic_filter, 0):
                self._lines.say(
                    logging.WARNING, "granted",
                    "%s broker=%s filter=%s QoS %d was asked for and %d granted%s",
                    self._where, self.broker.url, ascii(topic_filter), asked[topic_filter], qos,
                    ": messages may be lost" if qos == 0 else "",
                )  # fmt: skip
        if granted:
            shown = ", ".join(f"{topic!a} QoS {qos}" for topic, qos in granted[:_FILTERS_SHOWN])
            if link.version == 4 and any(topic.startswith(SHARED) for topic, _ in granted):
                shown += " (MQTT 3.1.1 cannot tell whether the broker knows $share)"
                link.watch_shared([topic for topic, _ in granted if topic.startswith(SHARED)])
            more = f" and {len(granted) - _FILTERS_SHOWN} more" if len(granted) > _FILTERS_SHOWN else ""
            self._lines.say(
                logging.INFO, "subscribed", "%s broker=%s subscribed %s%s", self._where, self.broker.url, shown, more
            )
        if self._stopping.is_set():
            return
        if missing := link.subscriptions.missing:
            self.connected.clear()
            topic_filter, told = next(iter(missing.items()))
            self.last_error = f"the broker refused to subscribe {topic_filter}: {told.why}"
            self._set_state("refused")
        else:
            self.last_error = None
            self.connected.set()
            self._set_state("connected")

    def _refused(self, refusal: Refusal) -> None:
        again = "Not asked for" if refusal.final else f"Asking again in {self.broker.reconnect_max_s:.0f} s"
        self._lines.say(
            logging.ERROR, f"refused {refusal.topic_filter}",
            "%s broker=%s client=%s filter=%s subscription with QoS %d refused: %s%s. %s",
            self._where, self.broker.url, ascii(self.client_id), ascii(refusal.topic_filter), refusal.qos,
            refusal.why, refusal.cure and f"; {refusal.cure}", again,
        )  # fmt: skip

    def _kept(self, topic_filter: str, why: str) -> None:
        self._lines.say(
            logging.WARNING, "kept",
            "%s broker=%s client=%s filter=%s cannot be unsubscribed: %s. The broker goes on sending what it matches,"
            " and it is thrown away; asked again at the next connection",
            self._where, self.broker.url, ascii(self.client_id), ascii(topic_filter), why,
        )  # fmt: skip

    def _late_suback(self, waited_s: float) -> None:
        self._lines.say(
            logging.WARNING, "late",
            "%s broker=%s client=%s no SUBACK after %.0f s, though other packets come: they are taken, and the filters"
            " count as not subscribed until the broker answers",
            self._where, self.broker.url, ascii(self.client_id), waited_s,
        )  # fmt: skip

    def _quiet_shared(self, filters: Sequence[str]) -> None:
        self._lines.say(
            logging.WARNING, "quiet",
            "%s broker=%s client=%s nothing came for %.0f s. The shared subscription %s was granted over MQTT 3.1.1,"
            " where a broker that does not know $share takes it for a plain topic: if messages are published there, set"
            " the filter without $share/GROUP/ (and let one fastkin alone subscribe it), or protocol = \"5\"",
            self._where, self.broker.url, ascii(self.client_id), _SHARED_QUIET_S, ", ".join(map(ascii, filters)),
        )  # fmt: skip

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """What goes on when a connection has ended."""
        task = asyncio.create_task(work, name="fastkin[intake].apart")
        self._work.add(task)
        task.add_done_callback(self._worked)

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        """A bug of ours, or of what on_read() calls: run() raises it."""
        if self._bug is None:
            self._bug = error


class _Reading:
    """Whether a link reads: it does unless a cause is set. Each cause has one who ends it, set up before the pause.

    ========== ================================= ==========================================================
    _STALL     a sink has no room, or too many   _Link.resume(). The pipeline calls it whenever records are
               are unacknowledged                settled and the budget is low, flush() when acknowledgements
                                                 leave; a call that comes in the middle of a feed is made up
                                                 for after it (_Link._idle()).
    _COALESCE  the next read would be small      the timer that pause_for() arms
    _APART     a piece of a message that is set  _Link._carry(), the task that takes it, when who sets it
               aside is not taken                aside has room for the next
    _STOPPED   stop(): no more is wanted         leave()
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


class _Link(Receiver):
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
        if self._deaf or self._reading.paused & _STOPPED:
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
            if self._reading.paused & _STOPPED:
                return
            session.finish_apart()
            await carrier.whole()
            self._behind_piece(1)
        # here and not when the task is over: reading goes on already, and the next message needs a task of its own
        self._carrying = None

    def _behind_piece(self, taken: int) -> None:
        if not (self._deaf or self._reading.paused & _STOPPED):
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
        if not self._reading.paused & _APART or self._reading.paused & _STOPPED or self._deaf:
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
        if self._reading.paused & (_STALL | _STOPPED | _APART):  # it may be behind what we do not read
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
            if not self.session.messages and not self._reading.paused & _STOPPED:
                self.intake._quiet_shared(filters)

        self._timers["shared"] = self.loop.call_later(_SHARED_QUIET_S, look)

    def _subscribe_again(self, filters: list[tuple[str, int]]) -> None:
        if self.up and not self._reading.paused & _STOPPED:
            self._subscribe(filters)

    # -- keep-alive ---------------------------------------------------------------------------------

    def _ping(self) -> None:
        """Twice per keep-alive, whether we read or not. Silence is death only while we listen."""
        assert self.wire is not None
        now = self.loop.time()
        if self._reading.paused & (_STALL | _STOPPED | _APART):
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
            if not self._reading.paused & (_STALL | _STOPPED | _APART):
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
        for why in (_STALL, _STOPPED, _COALESCE, _APART):
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
