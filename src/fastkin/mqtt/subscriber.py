"""The MQTT session: connect, subscribe, receive, pause, acknowledge, reconnect.

    intake = Intake(broker, [("plant/#", 1)], router=router, ledger=ledger, on_read=engine_pump)
    task = asyncio.create_task(intake.run())

`Intake` lives as long as the pipeline; a `Connection` is one connection of it. Bytes land in the buffer of
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
from typing import TYPE_CHECKING

from fastkin._codec import DROPPED
from fastkin.errors import MqttError, RefusedError
from fastkin.mqtt._core import (
    Connack,
    Unfit,
)
from fastkin.mqtt.connection import Connection
from fastkin.mqtt.dialect import REFUSALS, Dialect
from fastkin.mqtt.handshake import SHARED_QUIET_S
from fastkin.mqtt.reading import STOPPED
from fastkin.mqtt.reasons import UNAVAILABLE
from fastkin.mqtt.subscriptions import SHARED, Refusal
from fastkin.mqtt.transport import (
    explain,
    renewed_tls,
    said,
)
from fastkin.mqtt.window import MAX_WINDOW, Window
from fastkin.status.logs import Repeats

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from fastkin.config import Broker
    from fastkin.mqtt._core import Apart, Ledger, Router
    from fastkin.mqtt.handshake import Handshake
    from fastkin.mqtt.set_apart import Carrier

_LOG = logging.getLogger("fastkin.intake")
_FILTERS_SHOWN = 10
_WORKED_S = 5.0  # a connection that lived so long was a good one
_EARLY_MOST = 3  # so many connections that die right after SUBSCRIBE are no accident
# A broker that is away for hours: so many lines of a kind, then one line a minute that counts the rest.
_TROUBLE_LINES = 5
_TROUBLE_S = 60.0
_AUTH_CODES = frozenset({0x04, 0x05, 0x86, 0x87, 0x8A, 0x8C})
_UNAVAILABLE_S = 600.0  # how long we do not ask for what ended a connection
_ID_CODES = frozenset({0x02, 0x80, 0x85})  # mosquitto says 0x80
_TAKEN_OVER = 0x8E
# Broker and client id of each session that this process has had: a reload makes a new Intake for an old session.
_SESSIONS: set[tuple[str, str]] = set()


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
        self.unfit = Unfit()
        self._work: set[asyncio.Task[None]] = set()
        self.tls = renewed_tls(broker)
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
        self._link: Connection | None = None
        self._opening: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._bug: Exception | None = None
        self._attempts = 0  # since a connection worked
        self._early = 0  # connections in a row that died right after SUBSCRIBE
        self._dialect = Dialect(broker.protocol)
        self._windows: dict[int, Window] = {}  # by version
        self._unavailable: dict[int, float] = {}  # reason codes that ended a connection, and until when they count
        self.topic_aliases = broker.topic_alias_maximum

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
        return self._link is not None and self._link.coalescing.on

    @property
    def paused(self) -> bool:
        """Reading is paused because a sink has no room."""
        return self._link is not None and self._link.reading.stalled

    @property
    def stopping(self) -> bool:
        """No more messages are taken."""
        return self._stopping.is_set()

    @property
    def forgotten(self) -> bool:
        """Reading is paused for a message that is set aside, and nobody is at it."""
        return self._link is not None and self._link.set_apart.forgotten

    def carry_on(self) -> None:
        """For a watchdog: take up what is forgotten."""
        if self._link is not None:
            self._link.set_apart.carry_on()

    @property
    def paused_s(self) -> float:
        """How long reading was paused for want of room, in all."""
        return self._paused_s + (self._link.reading.stalled_for() if self._link is not None else 0.0)

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
            self._link.reading.pause(STOPPED)
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
            most = self.broker.receive_maximum if version == 5 else MAX_WINDOW
            first = most if version == 5 else self.broker.inflight
            new = Window(first, most, linger_s=self._linger_s, sure=version == 5)
            self.window = self._windows.setdefault(version, new)
            self.version = version
        self.ledger.reset(not self.broker.clean_session)
        link = self._link = Connection(self, version)
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
                link.reading.pause(STOPPED)
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

    def _not_connected(self, link: Connection, error: Exception) -> bool:
        """True: try at once, in another way."""
        url = self.broker.url
        code = error.code if isinstance(error, RefusedError) else None
        now = link.loop.time()
        timed_out = isinstance(error, TimeoutError) and error.errno is None
        other = "3.1.1" if link.version == 5 else "5.0"
        if code in REFUSALS:
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
        elif self.tls is not None and link.unanswered(timed_out=False):
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

    def _disconnected(self, link: Connection) -> None:
        self.disconnects += 1
        lived = link.loop.time() - link.began
        if lived >= _WORKED_S:
            self._attempts = self._early = 0
        elif link.handshake.subscribing and not link.malformed:
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

    def opened(self, handshake: Handshake, connack: Connack) -> None:
        """The broker takes us."""
        self.connects += 1
        self._dialect.worked(handshake.version)
        broker = self.broker
        assigned = connack.properties.get("assigned_client_identifier")
        client = self.client_id or str(assigned or "")
        self._lines.say(
            logging.INFO, "connected",
            "%s broker=%s client=%s connected (MQTT %s, %s)",
            self._where, broker.url, said(client), "5.0" if handshake.version == 5 else "3.1.1",
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

    def subscribed(self, handshake: Handshake) -> None:
        """Every filter that was asked for has its answer."""
        granted, refused = handshake.subscriptions.outcome()
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
            if handshake.version == 4 and any(topic.startswith(SHARED) for topic, _ in granted):
                shown += " (MQTT 3.1.1 cannot tell whether the broker knows $share)"
                handshake.watch_shared([topic for topic, _ in granted if topic.startswith(SHARED)])
            more = f" and {len(granted) - _FILTERS_SHOWN} more" if len(granted) > _FILTERS_SHOWN else ""
            self._lines.say(
                logging.INFO, "subscribed", "%s broker=%s subscribed %s%s", self._where, self.broker.url, shown, more
            )
        if self._stopping.is_set():
            return
        if missing := handshake.subscriptions.missing:
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

    def kept(self, topic_filter: str, why: str) -> None:
        """The broker did not unsubscribe the filter."""
        self._lines.say(
            logging.WARNING, "kept",
            "%s broker=%s client=%s filter=%s cannot be unsubscribed: %s. The broker goes on sending what it matches,"
            " and it is thrown away; asked again at the next connection",
            self._where, self.broker.url, ascii(self.client_id), ascii(topic_filter), why,
        )  # fmt: skip

    def late_suback(self, waited_s: float) -> None:
        """Other packets come, and no SUBACK."""
        self._lines.say(
            logging.WARNING, "late",
            "%s broker=%s client=%s no SUBACK after %.0f s, though other packets come: they are taken, and the filters"
            " count as not subscribed until the broker answers",
            self._where, self.broker.url, ascii(self.client_id), waited_s,
        )  # fmt: skip

    def quiet_shared(self, filters: Sequence[str]) -> None:
        """They brought nothing for SHARED_QUIET_S."""
        self._lines.say(
            logging.WARNING, "quiet",
            "%s broker=%s client=%s nothing came for %.0f s. The shared subscription %s was granted over MQTT 3.1.1,"
            " where a broker that does not know $share takes it for a plain topic: if messages are published there, set"
            " the filter without $share/GROUP/ (and let one fastkin alone subscribe it), or protocol = \"5\"",
            self._where, self.broker.url, ascii(self.client_id), SHARED_QUIET_S, ", ".join(map(ascii, filters)),
        )  # fmt: skip

    def spawn(self, work: Coroutine[None, None, None]) -> None:
        """What goes on when a connection has ended."""
        task = asyncio.create_task(work, name="fastkin[intake].apart")
        self._work.add(task)
        task.add_done_callback(self._worked)

    def _worked(self, task: asyncio.Task[None]) -> None:
        self._work.discard(task)
        if not task.cancelled() and isinstance(error := task.exception(), Exception):
            self.failed(error)

    def was_paused(self, seconds: float) -> None:
        """Reading waited so long for room."""
        self._paused_s += seconds

    def failed(self, error: Exception) -> None:
        """A bug of ours, or of what on_read() calls: run() raises it."""
        if self._bug is None:
            self._bug = error
