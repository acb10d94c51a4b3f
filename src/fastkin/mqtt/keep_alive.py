"""Pings the broker, and ends a connection on which nothing is heard.

A broker that is gone may leave a connection that looks open for ever. But silence tells nothing while we do not read,
and memory may be full for hours. So the time in which reading is paused counts as alive. Pings leave all the same: the
broker would take us for dead without them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkin.mqtt.transport import silence

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from fastkin.mqtt._core import Session
    from fastkin.mqtt.reading import Reading
    from fastkin.mqtt.transport import Wire

_TRICKLE_MOST = 5  # times a time-out: bytes that make no packet stand for a broker that lives


class KeepAlive:
    """Pings twice per keep-alive, whether we read or not. Silence is death only while we listen."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        session: Session,
        reading: Reading,
        last_read: Callable[[], float],
        give_up: Callable[[str], None],
    ) -> None:
        """`last_read()` tells when bytes were last read, `give_up(why)` ends the connection."""
        self._loop = loop
        self._session = session
        self._reading = reading
        self._last_read = last_read
        self._give_up = give_up
        self._wire: Wire | None = None
        self._keep_alive_s = 0.0
        self._alive_at = 0.0  # the broker was heard, or could not be because we did not listen
        # something came that was no answer to a ping, or could not come because we did not listen
        self._talked_at = 0.0
        self.asked_at: float = 0.0  # SUBSCRIBE was written
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, wire: Wire, now: float) -> None:
        """There is a connection."""
        self._wire = wire
        self._alive_at = now

    def start(self, keep_alive_s: float, now: float) -> None:
        """CONNACK has come. `keep_alive_s` 0: no pings."""
        self._alive_at = now
        self._keep_alive_s = keep_alive_s
        if keep_alive_s:
            # Half of it: the broker may count from when it read our last packet, and one ping may be late.
            self._timer = self._loop.call_later(keep_alive_s / 2, self._ping)

    def talked(self, now: float) -> None:
        """Something came that was no answer to a ping."""
        self._talked_at = now

    def listen_again(self) -> None:
        """What the broker said while we did not listen is unread: the time counts as alive."""
        self._alive_at = self._talked_at = self._loop.time()

    def patience_left(self, patience_s: float, now: float) -> float:
        """How long an answer to SUBSCRIBE may still take. Answers to pings are no sign of it: what was asked after
        SUBSCRIBE is answered, and SUBSCRIBE is not."""
        return patience_s - (now - self._heard_at(now, patience_s, max(self._talked_at, self.asked_at)))

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _heard_at(self, now: float, patience_s: float, heard: float) -> float:
        """When the broker was heard last, or when we began to ask or to listen again: `heard`, or later.

        A WebSocket message is seen when it is whole. While bytes come a large one is on its way, or it is the
        pings of a proxy in front of a broker that is dead: they count for a while only.
        """
        assert self._wire is not None
        return max(heard, min(now - silence(self._wire), heard + _TRICKLE_MOST * patience_s))

    def _ping(self) -> None:
        assert self._wire is not None
        now = self._loop.time()
        # We do not read, so silence says nothing. The ping goes out all the same: the broker must not take us for
        # dead.
        if not self._reading.listening:
            self._alive_at = now
        else:
            heard = max(self._alive_at, self.asked_at, self._last_read())
            silent = now - self._heard_at(now, 1.5 * self._keep_alive_s, heard)
            # One and a half times: when a broker gives a silent client up [MQTT-3.1.2-22], we give up a silent broker.
            if silent > 1.5 * self._keep_alive_s:
                self._give_up(f"the broker has been silent for {silent:.0f} s: it is taken for dead")
                return
        self._wire.write(self._session.pingreq())
        self._timer = self._loop.call_later(self._keep_alive_s / 2, self._ping)
