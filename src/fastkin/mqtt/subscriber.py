"""The MQTT session: connect, subscribe, receive, pause, acknowledge, reconnect.

    subscriber = Subscriber(broker, [("plant/#", 1)], router=router, acks=acks, on_read=engine_pump)
    task = asyncio.create_task(subscriber.run())

`Subscriber` lives as long as the pipeline; a `Connection` is one connection of it. Bytes land in the buffer of its
`_core.Session`, which hands payloads to the router's sinks without a Python object per message; Python runs once per
read. The AckTracker outlives connections and is reset at each new one, so that an acknowledgement of a former
connection is never sent.

How the next connection is tried is in `attempts.py`, what the log is told in `reports.py`, what is seen from outside in
`standing.py`. Here is the order of things: which connection there is, and when there is another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING

from fastkin._codec import DROPPED
from fastkin.errors import MqttError, RefusedError
from fastkin.mqtt._core import Connack, Unfit
from fastkin.mqtt.attempts import Attempts
from fastkin.mqtt.connection import Connection
from fastkin.mqtt.dialect import REFUSALS
from fastkin.mqtt.reading import STOPPED
from fastkin.mqtt.reports import Reports
from fastkin.mqtt.standing import Standing, Traffic
from fastkin.mqtt.subscriptions import SHARED
from fastkin.mqtt.transport import renewed_tls
from fastkin.mqtt.words import explain, of_tls

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from fastkin.config import Broker
    from fastkin.mqtt._core import AckTracker, Apart, Router
    from fastkin.mqtt.handshake import Handshake
    from fastkin.mqtt.set_apart import Carrier
    from fastkin.mqtt.window import Window
    from fastkin.net.tls import Renewed

_AUTH_CODES = frozenset({0x04, 0x05, 0x86, 0x87, 0x8A, 0x8C})
_ID_CODES = frozenset({0x02, 0x80, 0x85})  # mosquitto says 0x80


class _Nowhere:
    """Takes messages aside that nobody wants to have."""

    def __init__(self, subscriber: Subscriber, message: Apart) -> None:
        self._subscriber = subscriber
        self._message = message

    async def take(self, piece: bytes) -> None: ...

    async def whole(self) -> None:
        self._subscriber.acks.settled(self._message.token, 1, DROPPED)


class Subscriber:
    """One subscription: keeps a connection to the broker and feeds what comes to the router's sinks."""

    def __init__(
        self,
        broker: Broker,
        subscriptions: Sequence[tuple[str, int]],
        *,
        router: Router,
        acks: AckTracker,
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
        self.subscriptions: list[tuple[str, int]] = list(subscriptions)
        self.identifiers: Mapping[str, int] | dict[str, int] = identifiers or {}
        self.router: Router = router
        self._unwanted: tuple[str, ...] = ()
        self.acks = acks
        self.on_read = on_read
        self.set_apart: Callable[[Apart], Carrier] = set_apart or (lambda message: _Nowhere(self, message))
        self.unfit: Unfit = Unfit()
        self._work: set[asyncio.Task[None]] = set()
        self.tls: Renewed | None = renewed_tls(broker)
        self.client_id: str = broker.client_id
        unnamed = not broker.client_id and not broker.clean_session
        if unnamed:
            self.client_id = _made_up()
        self._reports = Reports(broker, name, self.client_id)
        if unnamed:
            self._reports.no_client_id()
        self._standing = Standing(on_state, self._reports.who)
        self._attempts = Attempts(broker, linger_s)
        self.traffic: Traffic = Traffic()
        self.last_read: float = 0.0  # loop time
        self.version: int = 0  # 4 is 3.1.1, 5 is 5.0: of the connection that is open, or was last
        self.window: Window = self._attempts.first_window()
        self._link: Connection | None = None
        self._opening: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._bug: Exception | None = None
        self.topic_aliases: int = broker.topic_alias_maximum

    # -- what is seen from outside ---------------------------------------------------------------

    @property
    def state(self) -> str:
        """How it stands with the broker: one of the words of Standing."""
        return self._standing.state

    @property
    def connected(self) -> asyncio.Event:
        """Set while connected, and every filter is subscribed."""
        return self._standing.connected

    @property
    def last_error(self) -> str | None:
        """What is wrong now, for a person; None when all is subscribed."""
        return self._standing.last_error

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

    def let_go(self, filters: Sequence[str]) -> None:
        """Unsubscribe, now and at each new connection; what came by these filters before is taken all the same."""
        self._unwanted = tuple(filters)
        if self._link is not None and self._link.up:
            self._link.handshake.unsubscribe(filters)

    @property
    def letting_go(self) -> bool:
        """An UNSUBSCRIBE has no answer yet: what the broker sent before it may still be on its way."""
        return self._link is not None and self._link.handshake.subscriptions.letting_go

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
        return self.traffic.paused_s + (self._link.reading.stalled_for() if self._link is not None else 0.0)

    # -- life ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Connect, subscribe, reconnect until stop(). Trouble with the network is logged, not raised."""
        try:
            while not self._stopping.is_set():
                if await self._attempt() or self._stopping.is_set():
                    continue
                delay = self._attempts.backoff()
                self._set_state("waiting")
                self._reports.waiting(delay)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._stopping.wait()
        finally:
            self._standing.connected.clear()
            self._set_state("closed")
            self._reports.close()

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
        self._standing.become(state, self.client_id)

    # -- one connection ------------------------------------------------------------------------

    async def _attempt(self) -> bool:
        """One connection, from its start to its end. True: the next attempt may follow at once."""
        version = self._attempts.dialect.next(asyncio.get_running_loop().time())
        if version != self.version:
            self.window = self._attempts.window(version)
            self.version = version
        self.acks.reset(not self.broker.clean_session)
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
            if self._stopping.is_set() and link.up:  # not when close() is leaving it: the broker's end would go unread
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
            self._standing.connected.clear()
            if self._bug is not None:
                raise self._bug

    def _not_connected(self, link: Connection, error: Exception) -> bool:
        """True: try at once, in another way."""
        code = error.code if isinstance(error, RefusedError) else None
        now = link.loop.time()
        timed_out = isinstance(error, TimeoutError) and error.errno is None
        dialect = self._attempts.dialect
        if code in REFUSALS:
            if dialect.refused(link.version, now):
                self._reports.version_refused(link.version)
                return True
        elif link.unanswered(timed_out=timed_out) and dialect.unanswered(link.version, now, timed_out=timed_out):
            self._reports.version_unanswered(link.version)
            return True
        reason = explain(error)
        lasting = code is not None or of_tls(error)
        if code in _ID_CODES and not self.client_id:
            self.client_id = self._reports.client_id = _made_up()
            self._reports.given_client_id()
            return True
        if timed_out:
            reason = f"no answer within {self.broker.connect_timeout_s:g} s"
        elif self.tls is not None and link.unanswered(timed_out=False):
            # TLS 1.3: the broker judges our certificate when we are through, and its alert may be lost in the reset.
            reason += "; this soon after the TLS handshake it may want a client certificate, or another one"
            lasting = True
        if code in _AUTH_CODES:
            reason += "; check user, password and client id, and what the broker's policy allows them"
        self._standing.last_error = reason
        self._reports.cannot_connect(code, reason, lasting=lasting)
        return False

    def _disconnected(self, link: Connection) -> None:
        self.traffic.disconnects += 1
        now = link.loop.time()
        lived = now - link.began
        attempts = self._attempts
        attempts.lost(lived, link.code, now, early=link.handshake.subscribing and not link.malformed)
        if self._stopping.is_set():
            self._reports.disconnected(link.reason)
            return
        self._standing.last_error = link.reason
        self._reports.lost(lived, link.reason)
        self._reports.lost_early(attempts.early, link.code)

    # -- what a link reports ---------------------------------------------------------------------

    def unavailable(self) -> list[int]:
        """Reason codes by which the broker ended a connection not long ago: it must not be asked for that again."""
        return self._attempts.unavailable(asyncio.get_running_loop().time())

    def opened(self, handshake: Handshake, connack: Connack) -> None:
        """The broker takes us."""
        self.traffic.connects += 1
        self.traffic.resumed = connack.session_present
        self._attempts.dialect.worked(handshake.version)
        self._reports.connected(handshake.version, connack, asks_qos=any(qos for _, qos in self.subscriptions))

    def subscribed(self, handshake: Handshake) -> None:
        """Every filter that was asked for has its answer."""
        granted, refused = handshake.subscriptions.outcome()
        for told in refused:
            self._reports.refused(told)
        # A 3.1.1 broker that does not know $share grants it all the same, as a plain topic.
        if handshake.version == 4 and (shared := [topic for topic, _ in granted if topic.startswith(SHARED)]):
            handshake.watch_shared(shared)
        self._reports.subscribed(handshake.version, granted, self.subscriptions)
        if self._stopping.is_set():
            return
        if missing := handshake.subscriptions.missing:
            self._standing.connected.clear()
            topic_filter, told = next(iter(missing.items()))
            self._standing.last_error = f"the broker refused to subscribe {topic_filter}: {told.why}"
            self._set_state("refused")
        else:
            self._standing.last_error = None
            self._standing.connected.set()
            self._set_state("connected")

    def kept(self, topic_filter: str, why: str) -> None:
        """The broker did not unsubscribe the filter."""
        self._reports.kept(topic_filter, why)

    def late_suback(self, waited_s: float) -> None:
        """Other packets come, and no SUBACK."""
        self._reports.late_suback(waited_s)

    def quiet_shared(self, filters: Sequence[str]) -> None:
        """They brought nothing for a while."""
        self._reports.quiet_shared(filters)

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
        self.traffic.paused_s += seconds

    def failed(self, error: Exception) -> None:
        """A bug of ours, or of what on_read() calls: run() raises it."""
        if self._bug is None:
            self._bug = error


def _made_up() -> str:
    """A client id, where none is set and one is needed."""
    return f"fastkin-{os.urandom(8).hex()}"
