"""What is asked of a broker at the beginning of a connection, and what came of it: CONNECT to the last SUBACK."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from fastkin.mqtt.subscriptions import Subscriptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fastkin.config import Broker
    from fastkin.mqtt._core import Connack, Session, Suback, Unsuback
    from fastkin.mqtt.keep_alive import KeepAlive
    from fastkin.mqtt.reading import Reading
    from fastkin.mqtt.transport import Wire
    from fastkin.mqtt.window import Window

_RETAIN = {"always": 0, "new": 1, "never": 2}  # Retain Handling of MQTT 5.0
SHARED_QUIET_S = 60.0  # a shared subscription over 3.1.1 that brought nothing for so long is spoken of
_UNSPECIFIC = 0x83  # "implementation specific error": no other reason code says it


class Asker(Protocol):
    """Whose subscriptions they are, and who is told what came of them."""

    broker: Broker
    client_id: str
    subscriptions: list[tuple[str, int]]
    identifiers: Mapping[str, int]  # the Subscription Identifier of each filter
    window: Window

    @property
    def unsubscribe(self) -> Sequence[str]: ...

    def unavailable(self) -> list[int]:
        """Reason codes by which the broker ended a connection not long ago: it must not be asked for that again."""
        ...

    def opened(self, handshake: Handshake, connack: Connack) -> None:
        """The broker takes us."""

    def subscribed(self, handshake: Handshake) -> None:
        """Every filter that was asked for has its answer."""

    def kept(self, topic_filter: str, why: str) -> None:
        """It could not be unsubscribed."""

    def late_suback(self, waited_s: float) -> None:
        """Other packets come, and no SUBACK."""

    def quiet_shared(self, filters: Sequence[str]) -> None:
        """They brought nothing for SHARED_QUIET_S."""


class Handshake:
    """Of one connection. CONNECT at its beginning, SUBSCRIBE behind CONNACK, and again what was refused for now."""

    def __init__(
        self,
        asker: Asker,
        version: int,
        session: Session,
        reading: Reading,
        keep_alive: KeepAlive,
        give_up: Callable[[str, int], None],
    ) -> None:
        """`give_up(why, reason code)` ends the connection."""
        self.version = version
        self._asker = asker
        self._loop = asyncio.get_running_loop()
        self._session = session
        self._reading = reading
        self._keep_alive = keep_alive
        self._give_up = give_up
        self._wire: Wire | None = None
        self.ready: asyncio.Future[None] = self._loop.create_future()  # CONNACK, or why there is none
        self.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())  # nobody may be waiting
        self.sent_at: float = 0.0  # when CONNECT left
        self.up: bool = False  # CONNACK has come, and nothing ended the connection yet
        self.subscribing: bool = False
        self.subscriptions: Subscriptions = Subscriptions(
            session, _RETAIN[asker.broker.retain_handling], asker.unavailable(), asker.identifiers
        )
        self._late = False  # SUBACK is, and it was said
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connect(self, wire: Wire, now: float) -> bytes:
        """There is a connection: the packet to begin with. Raises for a setting that nobody validated."""
        self._wire = wire
        self.sent_at = now
        broker = self._asker.broker
        clean = broker.clean_session
        password = None if broker.password is None else broker.password.encode()
        # 3.1.1 has no password without a user name, but an empty name will do
        user = broker.user or ("" if password is not None and self.version == 4 else None)
        return self._session.connect(
            client_id=self._asker.client_id,
            user=user,
            password=password,
            clean_start=clean,
            keep_alive=broker.keep_alive_s,
            session_expiry=0 if clean or self.version == 4 else broker.session_expiry_s,
        )

    def accepted(self, connack: Connack, now: float) -> None:
        """CONNACK says yes: ask for the subscriptions."""
        asker = self._asker
        # CONNECT to CONNACK is one round trip and what the broker does for it. The window judges by it what "at once"
        # means.
        asker.window.round_trip_s = now - self.sent_at
        self.up = True
        asker.opened(self, connack)
        if not self.ready.done():
            self.ready.set_result(None)
        # Before anything is asked for: what the broker says it cannot do must not be asked, for it would end the
        # connection.
        self.subscriptions.learn(connack.properties)
        self._subscribe(asker.subscriptions)
        self.unsubscribe(asker.unsubscribe)

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Ask the broker to queue nothing more for them."""
        self._write(self.subscriptions.unsubscribe(filters))

    def fail(self, error: BaseException) -> None:
        """There will be no CONNACK: whoever waits for it raises `error`."""
        if not self.ready.done():
            self.ready.set_exception(error)

    def suback(self, suback: Suback) -> None:
        """ProtocolError: it answers nothing."""
        if not self.subscriptions.waiting:
            self.subscriptions.suback(suback)  # said twice, or nonsense
            return
        self._write(self.subscriptions.suback(suback))
        if not self.subscriptions.waiting:
            self._timers.pop("suback").cancel()
            self._answered()

    def unsuback(self, unsuback: Unsuback) -> None:
        self._write(self.subscriptions.unsuback(unsuback))
        for topic_filter, why in self.subscriptions.kept():
            self._asker.kept(topic_filter, why)

    def watch_shared(self, filters: Sequence[str]) -> None:
        """Say it when they bring nothing."""

        def look() -> None:
            # Any message will do, whatever filter it came by: a broker that takes `$share` for a plain topic sends
            # none at all.
            if not self._session.messages and not self._reading.stopped:
                self._asker.quiet_shared(filters)

        self._timers["shared"] = self._loop.call_later(SHARED_QUIET_S, look)

    def end(self) -> None:
        for timer in self._timers.values():
            timer.cancel()

    def _write(self, packets: bytes) -> None:
        if packets and self._wire is not None:
            self._wire.write(packets)

    def _subscribe(self, filters: Sequence[tuple[str, int]]) -> None:
        packets = self.subscriptions.subscribe(filters)
        if not packets:
            self._answered()
            return
        self.subscribing = True
        self._write(packets)
        self._keep_alive.asked_at = self._loop.time()
        self._await_subacks(self._asker.broker.connect_timeout_s)

    def _subscribe_again(self, filters: list[tuple[str, int]]) -> None:
        if self.up and not self._reading.stopped:
            self._subscribe(filters)

    def _await_subacks(self, seconds: float) -> None:
        self._timers["suback"] = self._loop.call_later(seconds, self._no_suback)

    def _no_suback(self) -> None:
        """Gives up a broker that is silent. One that talks may have much to say before it comes to SUBACK."""
        limit = self._asker.broker.connect_timeout_s
        now = self._loop.time()
        if not self._reading.listening:  # it may be behind what we do not read
            self._await_subacks(limit)
            return
        # A session with a long queue may send all of it before it comes to SUBACK: a deadline of its own would end
        # the connection again and again, and the queue would never shrink.
        left = self._keep_alive.patience_left(limit, now)
        if left <= 0:
            self._give_up(f"no SUBACK within {limit:g} s", _UNSPECIFIC)
            return
        waited = now - self._keep_alive.asked_at
        if not self._late and waited >= limit:
            self._late = True
            self._asker.late_suback(waited)
        self._await_subacks(max(left, 0.01))

    def _answered(self) -> None:
        """Every filter has its answer for now."""
        again = [
            (refusal.topic_filter, refusal.qos) for refusal in self.subscriptions.missing.values() if not refusal.final
        ]
        if again:
            # Permissions may be granted later. Other filters are served meanwhile, so the connection stays.
            self._timers["again"] = self._loop.call_later(
                self._asker.broker.reconnect_max_s, self._subscribe_again, again
            )
        self._asker.subscribed(self)
